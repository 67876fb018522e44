"""What the peers on JAX share."""

from __future__ import annotations

import jax


def peak_device_bytes() -> int | None:
    """Return the peak of the allocator of the first device; None on the CPU, which has no such figure."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
