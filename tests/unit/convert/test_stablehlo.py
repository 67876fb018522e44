"""StableHLO files give the logits of the network to a program that has jax alone, or are not written."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from paths import ROOT

from resnet_jax.convert.stablehlo import export_stablehlo
from resnet_jax.convert.verify import write_verified
from resnet_jax.errors import CommandError, UserError

needs_flatbuffers = pytest.mark.skipif(
    not importlib.util.find_spec("flatbuffers"), reason="needs flatbuffers: pip install flatbuffers"
)

PROGRAM = """
import sys
from pathlib import Path
import jax.export
import numpy as np
classify = jax.export.deserialize(Path("network.jax").read_bytes())
assert classify.platforms == ("cpu", "cuda", "tpu")
images = np.load("images.npz")
np.savez("logits.npz", **{name: classify.call(images[name]) for name in images})
assert not {"flax", "resnet_jax"} & set(sys.modules)
"""


@needs_flatbuffers
def test_a_program_without_this_package_gets_the_logits(network, tmp_path):
    path = tmp_path / "network.jax"
    difference = export_stablehlo(network.model, network.variables, network.preprocessing, network.image_shape, path)
    assert 0 <= difference <= 1e-5
    assert str(ROOT).encode() not in path.read_bytes()  # no paths of this computer
    np.savez(tmp_path / "images.npz", *network.images)
    subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, check=True)
    with np.load(tmp_path / "logits.npz") as logits:
        for found, expected in zip(logits.values(), network.logits, strict=True):
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert {file.name for file in tmp_path.iterdir()} == {"network.jax", "images.npz", "logits.npz"}


@needs_flatbuffers
def test_a_truncated_file_is_not_left(cifar_network, tmp_path, monkeypatch):
    write_bytes = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: write_bytes(path, data[: len(data) // 2]))
    with pytest.raises(CommandError, match=r"network.jax was not written: it does not read back: ."):
        export_stablehlo(*cifar_network[:4], tmp_path / "network.jax")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda logits: logits + 1e-3 * np.abs(logits).max(),
        lambda logits: logits * np.float32("nan"),
        lambda logits: logits[:1],
        lambda logits: logits.astype(np.float64),
    ],
)
def test_other_logits_are_refused_and_the_old_file_stays(tmp_path, spoil):
    def classify(images):
        return images.mean((1, 2), dtype=np.float32)

    path = tmp_path / "network"
    path.write_bytes(b"old")
    with pytest.raises(CommandError, match=r"network was not written: its logits differ by (0.001|inf)"):
        write_verified(b"new", path, lambda _: lambda images: spoil(classify(images)), classify, (4, 4, 3))
    assert path.read_bytes() == b"old"
    assert write_verified(b"new", path, lambda _: classify, classify, (4, 4, 3)) == 0
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@needs_flatbuffers
def test_without_a_cpu_the_way_out_is_named(cifar_network, tmp_path, monkeypatch):
    def local_devices(backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", local_devices)
    with pytest.raises(UserError, match="add it to JAX_PLATFORMS"):
        export_stablehlo(*cifar_network[:4], tmp_path / "network.jax")


def test_without_flatbuffers_the_way_out_is_named(cifar_network, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(UserError, match=r"needs flatbuffers, of the extra \[convert\]: pip install flatbuffers"):
        export_stablehlo(*cifar_network[:4], tmp_path / "network.jax")
