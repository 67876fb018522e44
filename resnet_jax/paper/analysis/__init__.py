"""What can be read off finished and running work directories."""
