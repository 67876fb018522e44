"""The benchmarks: the peers' networks are the same, the report is right, and a small run comes to its end."""

import importlib.util
import json
import os
import signal
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from image_folders import write_folder

from benchmarks import driver, input_pipeline, ours, plain_flax
from benchmarks.cases import CASES, Case
from benchmarks.driver import main, measure, select
from benchmarks.report import render
from benchmarks.worker import Worker
from resnet_jax import create_model
from resnet_jax.errors import UserError
from resnet_jax.paper.analysis.summary import summarize

TINY = Case("cpu", "resnet8", "train", 4, "float32", ("plain Flax", "PyTorch"))


def count_params(model, case):
    image = jnp.zeros((1, case.image_size, case.image_size, 3))
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), image)
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize("network", ["resnet20", "resnet18", "resnet50", "vgg16"])
def test_peers_have_the_same_parameters(network):
    torch = pytest.importorskip("torch")
    from benchmarks import torch_peer

    case = TINY._replace(network=network)
    with torch.device("meta"):
        params = sum(p.numel() for p in torch_peer.build(case).parameters())
    assert count_params(create_model(network, num_classes=case.num_classes), case) == params
    assert count_params(plain_flax.build(case), case) == params


@pytest.mark.parametrize("network", ["resnet20", "resnet50"])
def test_torch_networks_have_the_same_shapes(network):
    torch = pytest.importorskip("torch")
    from benchmarks import torch_peer

    case, layers = TINY._replace(network=network), []
    with torch.device("meta"):
        model = torch_peer.build(case).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: layers.append(tuple(output.shape[1:])))
    model(torch.zeros(1, 3, case.image_size, case.image_size, device="meta"))
    summary = summarize(network, create_model(network, num_classes=case.num_classes), case.image_size)
    ours = [layer.output_shape for layer in summary.layers if layer.kind in ("conv", "dense")]
    assert sorted(layers) == sorted((*shape[2:], *shape[:2]) for shape in ours)


def test_cases_are_chosen_by_name():
    for platform in ("cpu", "gpu"):
        names = [case.name for case in CASES if case.platform == platform]
        assert len(names) == len(set(names))
    (case,) = select(CASES[:5], "resnet20-inference-f32-128, PyTorch,ours")
    assert case.peers == ("ours", "PyTorch")
    with pytest.raises(UserError, match="resnet21: no such case or peer; there are resnet20-train-f32-128, "):
        select(CASES[:5], "resnet21")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--rounds", "0"], "argument --rounds: must be above 0; got 0"),
        (["--minutes", "-1"], "argument --minutes: must be above 0"),
        (["--out", "pyproject.toml"], "cannot write pyproject.toml"),
        (["--case", "x"], "see python -m benchmarks --help"),
    ],
)
def test_mistakes_on_the_command_line(args, message):
    with pytest.raises(UserError, match=message):
        main(args)


def row(text, start):
    """Return the cells of the first row that begins so."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_report():
    """Of a made-up run."""
    machine = {"platform": "gpu", "device": "A GPU", "cpu": "a CPU", "cores": 16, "memory_gib": 128.0, "gpu": None}
    machine |= {"os": "Linux", "python": "3.12.1", "versions": {"jax": "0.10.2", "torch": None}, "xla_flags": ""}
    fields = {"steps": 10, "peak_bytes": 2**30, "compile_seconds": 61.2, "settings": {"devices": "1 gpu"}}
    peers = {
        "ours": {"ms": [41.0, 40.0, 50.0], **fields},
        "plain Flax": {"ms": [82.0, 80.0, 90.0], **fields, "compile_seconds": None},
        "PyTorch": {"ms": [], "error": "out of memory"},
        "torch.compile": {"ms": [20.5], "error": "out of time", "steps": 3},
    }
    case = Case("gpu", "resnet50", "train", 256, "bfloat16", tuple(peers))
    run = {"machine": machine, "date": "2030-01-01", "command": "python -m benchmarks", "seconds": 0.5}
    text = render({**run, "cases": [{"case": case._asdict(), "peers": peers}]})
    name = "resnet50 train bfloat16, batch 256"
    assert row(text, name) == [name, "ours", "41.0", "40.0 to 50.0, 3 x 10 steps", "1.00", "6,244", "61.2", "1,024"]
    assert row(text, f"{name} | plain")[2:] == ["82.0", "80.0 to 90.0, 3 x 10 steps", "2.00", "3,122", "", "1,024"]
    assert row(text, f"{name} | PyTorch")[2:] == ["out of memory", "", "", "", "", ""]
    assert row(text, f"{name} | torch.compile")[2:5] == ["20.5 (out of time)", "20.5 to 20.5, 1 x 3 steps", "0.500"]
    assert "- ours: devices 1 gpu" in text
    for expected in ("a CPU, 16 cores", "jax 0.10.2, torch not installed", "2030-01-01", "`python -m benchmarks`"):
        assert expected in text


def test_a_small_run_comes_to_its_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(driver, "CASES", [TINY])
    monkeypatch.setattr(driver, "_SECONDS", {"cpu": 0.01})
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert main(["--rounds", "2", "--out", str(tmp_path), "--only", ",".join(TINY.peers)]) == 0
    (entry,) = json.loads((tmp_path / "bench.json").read_text())["cases"]
    if not importlib.util.find_spec("torch"):
        assert entry["peers"].pop("PyTorch")["error"] == "torch is not installed"
    for result in entry["peers"].values():
        assert "error" not in result
        assert len(result["ms"]) == 2
        assert min(result["ms"]) > 0
        assert result["peak_bytes"] > 2**26
    text = (tmp_path / "bench.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    assert row(text, "resnet8 train float32, batch 4 | PyTorch")


@pytest.mark.parametrize(
    ("peer", "mode", "steps"), [(ours, "train", 1), (ours, "inference", 16), (plain_flax, "inference", 1)]
)
def test_other_peers_run(peer, mode, steps, monkeypatch):
    monkeypatch.setattr(ours, "_CIFAR_IMAGES", 64)
    prepared = peer.prepare(TINY._replace(mode=mode))
    prepared.compute(2)
    assert prepared.steps_per_call == steps


def test_a_peer_that_fails_or_dies_or_takes_too_long(tmp_path):
    pytest.importorskip("torch")
    case = TINY._replace(peers=("PyTorch",), platform="gpu")  # which is not here
    (result,) = measure(case, 1, 0.01, time.monotonic() + 100, tmp_path).values()
    assert result == {"ms": [], "error": "no CUDA"}
    worker = Worker(case, "PyTorch", 0.01, tmp_path / "log")
    try:
        assert worker.reply(time.monotonic()) == {"error": "out of time"}
        os.kill(worker.process.pid, signal.SIGKILL)
        assert worker.reply(time.monotonic() + 30) == {"error": "died, exit code -9"}
    finally:
        worker.close()


def test_input_pipeline(tmp_path, monkeypatch):
    write_folder(tmp_path / "images", images=2, test_images=1)
    monkeypatch.setattr(input_pipeline, "find_spec", lambda name: None)  # DataLoader takes seconds to start
    rows = input_pipeline.measure(tmp_path / "images", tmp_path, 1, 0.01, 4, 1)
    assert [row.name for row in rows] == [
        "plain: decode",
        "decode",
        "plain: decode, resize, crop",
        "decode + jitter",
        "packed + jitter",
        "packed raw + jitter",
        "end to end, folder",
        "end to end, packed",
        "end to end, packed raw",
    ]
    assert all(len(row.per_core) == 1 and min(row.per_core) > 0 for row in rows)


def test_the_table_of_the_input_pipeline():
    rows = [
        input_pipeline.Row("plain", "plain", [90.0, 100.0, 140.0]),
        input_pipeline.Row("packed", "plain", [150.0, 160.0, 155.0]),
        input_pipeline.Row("end to end", "torch", [80.0]),
    ]
    assert input_pipeline.to_text(rows).splitlines()[-3:] == [
        "| plain | 100 | 90 to 140 | |",
        "| packed | 155 | 150 to 160 | 1.55 |",
        "| end to end | 80 | 80 to 80 | |",
    ]


def test_mistakes_of_the_input_pipeline(tmp_path):
    for arguments in (["--rounds", "0"], ["--batch-size", "-1"]):
        with pytest.raises(UserError, match=f"{arguments[0]}: must be above 0; got {arguments[1]}"):
            input_pipeline.main([str(tmp_path), *arguments])


def test_the_peer_that_learns_augments_and_logs(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    from benchmarks import learning

    random = np.random.default_rng(0)
    images = torch.arange(5 * 3 * 32 * 32, dtype=torch.float32).reshape(5, 3, 32, 32) + 1  # no two pixels alike, no 0
    found = learning._augmented(images, random).numpy()
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)))
    for image, crop in zip(padded, found, strict=True):
        crops = [image[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
        assert sum(np.array_equal(crop, other[..., ::step]) for other in crops for step in (1, -1)) == 1
    batches = [next(indices) for indices in [learning._indices(300, random)] for _ in range(4)]
    assert [len(set(a) | set(b)) for a, b in (batches[:2], batches[2:])] == [256, 256]  # no image twice in an epoch

    write_cifar10(tmp_path / "cifar-10-batches-bin")
    arguments = [str(tmp_path), str(tmp_path / "out.jsonl"), "--depth", "8", "--steps", "1", "--threads", "1"]
    assert learning.main(arguments) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [("start", 0), ("test", 1)]
    assert (lines[0]["depth"], lines[0]["bn_group_size"], lines[1]["images"]) == (8, 64, 10_000)


def write_cifar10(folder):
    """Write files of the official length, of noise."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        records = random.integers(0, 256, (10_000, 3073), np.uint8)
        records[:, 0] %= 10
        records.tofile(folder / f"{name}.bin")


def test_detection_finds_what_pytorch_finds_with_the_same_weights(capsys):
    """Trunk, RPN, suppression, RoI pooling, tail and boxes of a peer that shares no code with ours."""
    pytest.importorskip("torch")
    from benchmarks import detection

    assert detection.main(["--size", "152", "232", "--turns", "1"]) == 0
    *parts, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert {"training step", "inference", "RoI pooling of 300"} <= {part["part"] for part in parts}
    assert last["compared"] >= 20
    assert last["difference_of_scores"] < 1e-4
    assert last["difference_of_boxes"] < 0.05  # pixels
