"""What is settled before JAX computes anything."""

import json
import os
import subprocess
import sys

import pytest
from paths import ROOT

from resnet_jax.config import Config, DataConfig, HostsConfig, ModelConfig, OptimConfig
from resnet_jax.parallel.devices import cpu_devices, round_up

SCRIPT = """
import json, jax
from resnet_jax.parallel import devices
from resnet_jax.config import Config
devices.configure(Config())
print(json.dumps({"devices": jax.device_count(), **devices.description()}))
"""


@pytest.mark.parametrize(
    ("cores", "batch_size", "group", "parts", "processes", "devices"),
    [
        (2, 128, 64, 1, 1, 2),
        (1, 128, 64, 1, 1, 1),
        (64, 128, 64, 1, 1, 2),  # whole groups on each device
        (8, 256, 32, 1, 1, 8),
        (3, 128, 64, 1, 1, 2),
        (2, 64, 64, 1, 1, 2),  # one group: its statistics come from both
        (4, 128, None, 1, 1, 4),
        (2, 63, 63, 1, 1, 1),
        (8, 256, 32, 1, 2, 4),  # 8 groups
        (8, 256, 32, 2, 4, 1),  # 4 at a time
        (8, 256, 32, 2, 1, 4),
        (8, 256, 32, 8, 1, 8),  # parts of one group
        (8, 256, 32, 1, 16, 1),
        (2, 120, 60, 1, 2, 1),
    ],
)
def test_the_devices_of_a_cpu(cores, batch_size, group, parts, processes, devices):
    config = Config(
        ModelConfig(bn_group_size=group),
        DataConfig(batch_size=batch_size),
        OptimConfig(accumulation_steps=parts),
        hosts=HostsConfig(coordinator="h:1", processes=processes, process_id=0),
    )
    assert cpu_devices(config, cores) == devices


def test_the_size_of_an_evaluation_batch_does_not_matter():
    """As of 2 processes with a batch of 120 images: 500 do not divide over 3 devices each, 504 do."""
    data = DataConfig(batch_size=120, eval_batch_size=500)
    config = Config(
        ModelConfig(bn_group_size=20), data, hosts=HostsConfig(coordinator="h:1", processes=2, process_id=0)
    )
    assert cpu_devices(config, 8) == 3


@pytest.mark.parametrize(("devices", "rounded"), [(1, 500), (2, 500), (6, 504), (8, 504), (1000, 1000)])
def test_evaluation_batches_are_rounded_up(monkeypatch, devices, rounded):
    monkeypatch.setattr("jax.device_count", lambda: devices)
    assert round_up(500) == rounded


def configured(**variables) -> dict:
    names = ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "JAX_ENABLE_COMPILATION_CACHE")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-c", SCRIPT]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return json.loads(result.stdout)


def test_defaults_and_what_the_user_has_set(tmp_path):
    cores = len(os.sched_getaffinity(0))
    assert configured(XDG_CACHE_HOME=str(tmp_path)) == {
        "devices": min(cores, 2),
        "compilation_cache": str(tmp_path / "resnet_jax"),
    }
    flags = "--xla_force_host_platform_device_count=3"
    chosen = configured(XLA_FLAGS=flags, JAX_COMPILATION_CACHE_DIR="here", JAX_ENABLE_COMPILATION_CACHE="0")
    assert chosen == {"devices": 3, "compilation_cache": "off", "XLA_FLAGS": flags}
