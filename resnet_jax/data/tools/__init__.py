"""Commands that read a whole data set: check, pack, statistics."""
