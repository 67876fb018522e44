"""What is settled before JAX computes anything."""

import json
import os
import subprocess
import sys

import pytest
from paths import ROOT

from resnet_jax.config import Config, DataConfig, HostsConfig, ModelConfig, OptimConfig
from resnet_jax.parallel.devices import cpu_devices

SCRIPT = """
import json, jax
from resnet_jax.parallel import devices as runtime
from resnet_jax.config import Config
runtime.configure(Config())
print(json.dumps({"devices": jax.device_count(), **runtime.description()}))
"""


@pytest.mark.parametrize(
    ("processes", "parts", "devices"),
    [(1, 1, 8), (2, 1, 4), (4, 2, 1), (1, 2, 4), (1, 8, 8), (16, 1, 1)],  # 8 groups of 32; 8 parts: single groups
)
def test_the_devices_of_a_cpu_with_several_processes_or_parts(processes, parts, devices):
    config = Config(
        model=ModelConfig(bn_group_size=32),
        data=DataConfig(batch_size=256, eval_batch_size=256),
        optim=OptimConfig(accumulation_steps=parts),
        hosts=HostsConfig(coordinator="h:1", processes=processes, process_id=0),
    )
    assert cpu_devices(config, 8) == devices


@pytest.mark.parametrize(
    ("cores", "batch_size", "group", "eval_batch_size", "devices"),
    [
        (2, 128, 64, 500, 2),
        (1, 128, 64, 500, 1),
        (64, 128, 64, 500, 2),  # whole groups on each device
        (8, 256, 32, 1000, 8),
        (3, 128, 64, 500, 2),
        (4, 256, 64, 250, 2),  # the evaluation divides as well
        (2, 64, 64, 120, 2),  # one group: its statistics come from both
        (4, 128, None, 500, 4),
        (2, 63, 63, 120, 1),
    ],
)
def test_the_devices_of_a_cpu(cores, batch_size, group, eval_batch_size, devices):
    model, data = ModelConfig(bn_group_size=group), DataConfig(batch_size=batch_size, eval_batch_size=eval_batch_size)
    assert cpu_devices(Config(model=model, data=data), cores) == devices


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
