"""Too little memory on a device, as one line: what is needed, what there is, who has the rest, and what helps."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from resnet_jax.config import Config
from resnet_jax.errors import UserError, reason

_GIB = 2**30


class TooLittleMemoryError(UserError):
    """A device has not the memory that a program needs."""


def check_memory(compiled: Any, what: str, remedies: Sequence[str]) -> None:
    """Compare what a compiled program needs with what each device has; nothing where JAX does not know (on CPUs).

    Args:
      compiled: a jax.stages.Compiled whose arguments are on the devices.
      what: name of the program, for the message.
      remedies: options that make it need less.

    Raises:
      TooLittleMemoryError: it does not fit.
    """
    analysis = compiled.memory_analysis()
    for device in jax.local_devices() if analysis else ():
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            continue
        held = max(stats.get("bytes_in_use", 0), analysis.argument_size_in_bytes)
        new = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        if held + new > stats["bytes_limit"]:
            needs, has = (f"{size / _GIB:.1f} GiB" for size in (held + new, stats["bytes_limit"]))
            raise _too_little(f"{what} needs {needs}, and JAX may use {has} of {device.device_kind}", remedies)


@contextlib.contextmanager
def explained(what: str, remedies: Sequence[str]) -> Iterator[None]:
    """Turn XLA's report that memory is exhausted, while compiling or running, into a TooLittleMemoryError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        kind = jax.devices()[0].device_kind
        raise _too_little(f"{kind} has too little memory for {what} ({reason(error)})", remedies) from error


def _too_little(said: str, remedies: Sequence[str]) -> TooLittleMemoryError:
    return TooLittleMemoryError(f"{said}{_others()}; what helps: {', '.join([*remedies, *_take_more()])}")


def training_remedies(config: Config) -> list[str]:
    """Name the options that make a training of this configuration need less memory; the first ones change no result."""
    batch, parts, group = config.data.batch_size, config.optim.accumulation_steps, config.bn_group_size
    remedies = []
    if config.model.family != "vgg" and not config.model.remat:
        remedies.append("--model.remat")
    if batch % (2 * parts) == 0 and (batch // (2 * parts)) % (group or batch) == 0:
        remedies.append(f"--optim.accumulation-steps {2 * parts}")
    if config.model.dtype == "float32":
        remedies.append("--model.dtype bfloat16")
    return [*remedies, f"--data.batch-size below {batch}"]


def _take_more() -> list[str]:
    """Name JAX's own option where it keeps a quarter of a GPU for others."""
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    if jax.default_backend() != "gpu" or any(name in os.environ for name in names):
        return []
    return ["XLA_CLIENT_MEM_FRACTION=0.95 in the environment (JAX takes three quarters of a GPU)"]


def _others() -> str:
    """Name the other processes that hold memory of NVIDIA's cards, as far as nvidia-smi knows them."""
    if jax.default_backend() != "gpu":
        return ""
    query = ["nvidia-smi", "--query-compute-apps=pid,process_name,used_gpu_memory", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    rows = re.findall(r"^(\d+), (.*), (\d+)$", listed, re.MULTILINE)
    others = [f"{name} (process {pid}, {mib} MiB)" for pid, name, mib in rows if int(pid) != os.getpid()]
    return f"; the card is also held by {', '.join(others)}" if others else ""
