"""What someone with a GPU for some minutes runs: python -m benchmarks.gpu."""
