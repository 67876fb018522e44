"""Measure training and inference beside plain Flax and PyTorch: python -m benchmarks."""
