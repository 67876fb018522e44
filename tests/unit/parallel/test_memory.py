"""Too little memory is one line that names what is needed, what there is, who has the rest, and what helps."""

import dataclasses
import subprocess
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from resnet_jax.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig
from resnet_jax.parallel import memory
from resnet_jax.parallel.memory import TooLittleMemoryError, check_memory, explained, training_remedies
from resnet_jax.trainer import Trainer
from resnet_jax.training import train

GIB = 2**30


def card(monkeypatch, in_use, limit, listed=""):
    """Let JAX see one GPU with so many GiB in use and allowed; nvidia-smi lists `listed`."""
    stats = {"bytes_in_use": in_use * GIB, "bytes_limit": limit * GIB}
    device = SimpleNamespace(device_kind="NVIDIA H100", memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=listed))
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)


def program(**gib):
    sizes = {f"{name}_size_in_bytes": gib.get(name, 0) * GIB for name in ("argument", "output", "alias", "temp")}
    return SimpleNamespace(memory_analysis=lambda: SimpleNamespace(**sizes))


def test_what_is_needed_is_compared_with_what_there_is(monkeypatch):
    step = program(argument=2, output=2, alias=2, temp=57)
    card(monkeypatch, in_use=3, limit=60)
    check_memory(step, "a step", [])
    card(monkeypatch, in_use=4, limit=60)
    with pytest.raises(TooLittleMemoryError) as raised:
        check_memory(step, "a step", ["--model.remat", "--data.batch-size below 256"])
    assert str(raised.value) == (
        "a step needs 61.0 GiB, and JAX may use 60.0 GiB of NVIDIA H100; what helps: --model.remat, --data.batch-size"
        " below 256, XLA_CLIENT_MEM_FRACTION=0.95 in the environment (JAX takes three quarters of a GPU)"
    )
    assert raised.value.exit_code == 2


def test_who_else_holds_the_card(monkeypatch):
    card(
        monkeypatch,
        in_use=0,
        limit=10,
        listed=f"4711, python, 20000\n{memory.os.getpid()}, python, 500\n9, [Not Found], [N/A]\n",
    )
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")
    with pytest.raises(
        TooLittleMemoryError, match=r"H100; the card is also held by python \(process 4711, 20000 MiB\);"
    ):
        check_memory(program(temp=11), "a step", ["-"])


def test_a_real_program_is_measured(monkeypatch):
    compiled = jax.jit(lambda x: x @ x).lower(jnp.zeros((512, 512))).compile()  # two MiB
    check_memory(compiled, "it", [])  # a CPU has no limit
    card(monkeypatch, in_use=0, limit=1 / 1024)
    with pytest.raises(TooLittleMemoryError):
        check_memory(compiled, "it", [])
    card(monkeypatch, in_use=0, limit=4 / 1024)
    check_memory(compiled, "it", [])


def test_options_that_are_used_are_not_named():
    config = Config(ModelConfig(), DataConfig(batch_size=128))
    group = config.bn_group_size
    assert 128 % (2 * group) == 0
    assert training_remedies(config) == [
        "--model.remat",
        "--optim.accumulation-steps 2",
        "--model.dtype bfloat16",
        "--data.batch-size below 128",
    ]
    config = Config(
        ModelConfig(remat=True, dtype="bfloat16", bn_group_size=64),
        DataConfig(batch_size=128),
        OptimConfig(accumulation_steps=2),
    )
    assert training_remedies(config) == ["--data.batch-size below 128"]  # parts of 32 have no BN group of 64


def exhausted(*_, **__):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12 bytes.")


def test_other_errors_are_as_they_were():
    with pytest.raises(jax.errors.JaxRuntimeError), explained("it", []):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
    said = r"too little memory for it \(RESOURCE_EXHAUSTED: Out of"
    with pytest.raises(TooLittleMemoryError, match=said), explained("it", ["less"]):
        exhausted()


@pytest.mark.parametrize("method", ["begin", "train", "evaluate"])
def test_a_new_work_directory_is_removed_and_one_with_a_checkpoint_stays(method, tmp_path, monkeypatch):
    run = RunConfig(workdir=str(tmp_path / "run"), steps=1, log_every=1, save_every=1, eval_every=1)
    data = DataConfig(name="digits", batch_size=8, eval_batch_size=8)
    config = Config(ModelConfig(depth=8, bn_group_size=8), data, OptimConfig(0.1, boundaries=()), run)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, method, exhausted)
        with pytest.raises(TooLittleMemoryError, match="what helps: "):
            train(config)
        assert not list(tmp_path.iterdir())
    if method == "train":
        train(config)
        monkeypatch.setattr(Trainer, method, exhausted)
        with pytest.raises(TooLittleMemoryError):
            train(dataclasses.replace(config, run=dataclasses.replace(run, steps=2)))
        assert (tmp_path / "run" / "checkpoints").is_dir()
