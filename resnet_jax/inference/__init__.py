"""Trained networks: load them, feed them images."""
