"""Several processes that train one network: connecting them, and agreeing on what each alone could decide."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from resnet_jax.config import HostsConfig
from resnet_jax.errors import CommandError, UserError, reason
from resnet_jax.parallel.signals import StopSignal


def connect(config: HostsConfig) -> None:
    """Wait for the other processes, if there are any; call it before anything is computed.

    Raises:
      UserError: the environment does not describe them, or they cannot be reached.
    """
    if not config.distributed and config.coordinator is None:
        return
    if config.process_id:  # if nobody is there, JAX ends the process after five minutes with a message of its own
        print(f"process {config.process_id} of {config.processes}: waiting for {config.coordinator}", file=sys.stderr)
    try:
        jax.distributed.initialize(config.coordinator, config.processes, config.process_id)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot connect the processes ({reason(error)}): name them with --hosts.coordinator HOST:PORT"
            " --hosts.processes N --hosts.process-id I"
        ) from error


def is_first() -> bool:
    """Tell whether this process is the one that writes logs."""
    return jax.process_index() == 0


@contextlib.contextmanager
def all_hosts() -> Iterator[None]:
    """Do something in every process: if it fails in one, it fails in all.

    Raises:
      CommandError: of this process, or one that says that another failed.
    """
    failure, failed = None, False
    try:
        yield
    except CommandError as error:
        failure = error
    if jax.process_count() > 1:
        failed = bool(np.any(multihost_utils.process_allgather(np.array(failure is not None))))
    if failure is not None:
        raise failure
    if failed:
        raise UserError("another process cannot go on; its own message says why")


class AgreedStop:
    """The stop signal of any process, as all of them know it after the same dispatch."""

    def __init__(self, stop: StopSignal, by_device: jax.sharding.Sharding, replicated: jax.sharding.Sharding):
        """Ask the devices, one number on each; a process of its own just looks."""
        self._stop, self._by_device = stop, by_device
        self._largest = jax.jit(lambda signums: signums.max(), out_shardings=replicated)
        self._before = self._ask() if jax.process_count() > 1 else None

    def signum(self) -> int:
        """Return the signal, or 0; of several processes that of one dispatch ago, so that no device waits."""
        if self._before is None:
            return self._stop.signum
        signum = int(self._before)
        self._before = self._ask()
        return signum

    def _ask(self) -> jax.Array:
        signums = np.full(jax.local_device_count(), self._stop.signum, np.int32)
        return self._largest(jax.make_array_from_process_local_data(self._by_device, signums))
