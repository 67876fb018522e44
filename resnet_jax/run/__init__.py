"""The record of a run: work directory, checkpoints, logs, lock."""
