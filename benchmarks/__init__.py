"""Measure speed, compile time and memory side by side with plain Flax and PyTorch: python -m benchmarks."""
