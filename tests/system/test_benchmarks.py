"""The benchmark's networks, bookkeeping and report; one small run of two workers."""

import dataclasses
import importlib.util
import json
import time
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from image_folders import write_folder

from benchmarks import input_pipeline, plain_flax, roofline
from benchmarks.__main__ import main
from benchmarks.cases import CASES, Case, select
from benchmarks.driver import OUT_OF_TIME, run_case
from benchmarks.end_to_end import write_cifar10
from benchmarks.process import Worker, WorkerError
from benchmarks.report import render
from resnet_jax import create_model
from resnet_jax.data import load_dataset
from resnet_jax.errors import UserError
from resnet_jax.paper.analysis.summary import summarize

NETWORKS = sorted({case.network for case in CASES} - {"resnet1202"})  # resnet110 at length, and slow to trace
TINY = Case("cpu", "resnet8", "train", 4, "float32", ("flax", "torch"), single_step=True)


def count_params(model, case):
    image = jnp.zeros((1, case.image_size, case.image_size, 3))
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), image)
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize("network", NETWORKS)
def test_peers_have_the_same_parameters(network):
    torch = pytest.importorskip("torch")
    from benchmarks import torch_networks

    case = Case("cpu", network, "train", 1, "float32", ())
    with torch.device("meta"):
        params = sum(p.numel() for p in torch_networks.build(network, case.num_classes).parameters())
    assert count_params(create_model(network, num_classes=case.num_classes), case) == params
    assert count_params(plain_flax.build(case), case) == params


@pytest.mark.parametrize("network", ["resnet20", "resnet18", "resnet50"])
def test_torch_networks_have_the_same_shapes(network):
    torch = pytest.importorskip("torch")
    from benchmarks import torch_networks

    size = 32 if network == "resnet20" else 224
    model, layers = torch_networks.build(network, 10).eval(), []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: layers.append(tuple(output.shape[1:])))
    with torch.device("meta"):
        model.to("meta")(torch.zeros(1, 3, size, size))
    summary = summarize(network, create_model(network, num_classes=10), size)
    ours = [layer.output_shape for layer in summary.layers if layer.kind in ("conv", "dense")]
    assert sorted(layers) == sorted((*shape[2:], *shape[:2]) for shape in ours)


def test_cases():
    for platform in ("cpu", "gpu"):
        names = [case.name for case in select(platform, None, None)]
        assert len(names) == len(set(names))
    (case,) = select("cpu", ["resnet20-inference-f32-128"], ["torch", "ours"])
    assert case.peers == ("ours", "torch")
    with pytest.raises(ValueError, match="no case 'resnet21' on this cpu; there are resnet20-train-f32-128,"):
        select("cpu", ["resnet21"], None)
    with pytest.raises(ValueError, match="no peer 'mxnet'"):
        select("cpu", None, ["mxnet"])


def test_mistakes_on_the_command_line():
    for args, message in (
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--budget", "-1"], "--budget must be above 0"),
        (["--data", "nowhere"], "--data nowhere: there is no such folder"),
        (["--out", "pyproject.toml"], "cannot write pyproject.toml"),
        (["--case", "x"], "see python -m benchmarks --help"),
    ):
        with pytest.raises(UserError, match=message):
            main(args)


def test_out_of_time(tmp_path, capsys):
    """Nothing fits into 15 seconds; what was not run is listed nevertheless."""
    main(["--budget", "0.25", "--out", str(tmp_path)])
    run = json.loads((tmp_path / "bench.json").read_text())
    platform = run["machine"]["platform"]
    assert [entry["name"] for entry in run["cases"]] == [case.name for case in select(platform, None, None)]
    text = (tmp_path / "bench.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    assert row(text, "resnet20 train")[2] == OUT_OF_TIME
    assert run["command"].startswith("python -m benchmarks --budget 0.25")


def entry(case, **peers):
    return {"name": case.name, "case": dataclasses.asdict(case), "peers": peers}


def result(*ms, **fields):
    return {"status": "ok", "ms": list(ms), "steps": 10, "peak_host_bytes": 2**30, **fields}


@pytest.fixture
def run():
    """A made-up run on a GPU, as bench.json has it."""
    cases = [case for case in CASES if case.platform == "gpu"]
    resnet50, resnet20, resnet110, train_py = cases[:4]
    measured = {"xla_bytes": 6e10, "minimum_bytes": 3e10, "flops": 6e12, "copy_bytes_per_second": 3e12}
    missing = {"status": OUT_OF_TIME, "ms": []}
    return {
        "machine": {
            "platform": "gpu", "device": "A GPU", "devices": 1, "cpu": "a CPU", "cores": 16, "memory_gib": 128.0,
            "gpu": "A GPU, 600.1, 81920 MiB", "os": "Linux", "python": "3.12.1",
            "versions": {"jax": "0.10.2", "torch": "2.13.0"}, "xla_flags": "",
        },
        "date": "2030-01-01T00:00:00+00:00", "command": "python -m benchmarks", "rounds": 3, "round_seconds": 1.5,
        "cases": [
            entry(resnet50, ours=result(40, 41, 50, roofline=measured), flax=result(80, 82, 90),
                  torch=result(60, 61.5, 70), **{"torch-compile": result(50, 51.25, 52, compile_seconds=61.2)}),
            entry(resnet20, ours=result(0.5), flax={"status": "out of memory", "ms": [], "detail": "x"}, torch=missing),
            entry(resnet110, ours=missing),
            entry(train_py, ours={"status": OUT_OF_TIME}),
        ],
    }  # fmt: skip


def row(text, start):
    """Return the cells of the first row that begins so."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_report(run):
    text = render(run)
    assert row(text, "resnet50 train") == [
        "resnet50 train bfloat16, batch 256", "6,244", "41.0", "82.0", "61.5", "51.2", "2.00", "1.50", "1.25",
    ]  # fmt: skip
    assert row(text, "resnet20 train")[2:6] == ["0.500", "out of memory", OUT_OF_TIME, ""]
    assert row(text, "resnet110 train")[2] == OUT_OF_TIME
    assert row(text, "resnet50 train bfloat16, batch 256 | torch.compile")[2:9] == [
        "3 x 10", "50.0", "51.2", "52.0", "4,995", "61.2", "1,024",
    ]  # fmt: skip
    assert row(text, "train.py")[-1] == OUT_OF_TIME
    for expected in ("a CPU, 16 cores", "A GPU, 600.1", "jax 0.10.2", "2030-01-01", "`python -m benchmarks`"):
        assert expected in text


def test_report_of_targets_and_roofline(run):
    text = render(run)
    assert row(text, "resnet20 bfloat16")[1:] == ["32.0 s (projected from 0.500 ms a step)", "yes"]
    assert row(text, "resnet110 bfloat16")[1:] == ["not measured", ""]
    assert row(text, "resnet50 bfloat16: at least 5,000")[1:] == ["6,244 images/s", "yes"]
    assert row(text, "resnet50 bfloat16: at least 1.2 x")[1:] == ["1.25 x", "yes"]
    # 41 ms; 60 GB and 30 GB at 3 TB/s are 20 and 10 ms.
    assert row(text, "resnet50 bfloat16, batch 256 |")[1:] == [
        "3,000", "41.00", "60.00", "20.00", "2.05", "30.00", "10.00", "4.10", "146.3",
    ]  # fmt: skip


def test_report_without_torch(run):
    run["cases"][0]["peers"]["torch"] = run["cases"][0]["peers"]["torch-compile"] = {
        "status": "not installed", "ms": [],
    }  # fmt: skip
    run["machine"]["versions"]["torch"] = None
    text = render(run)
    assert row(text, "resnet50 train")[3:] == ["82.0", "", "", "2.00", "", ""]
    assert "torch not installed" in text


def test_bytes_of_library_calls():
    hlo = """
  %input.1 = bf16[8,4]{1,0} parameter(0)
  %kernel = f32[4,2]{1,0} parameter(1)
  %conv.5 = (bf16[8,2]{1,0}, u8[512]{0}) custom-call(%input.1, %kernel), custom_call_target="__cudnn$convForward"
  ROOT %out = bf16[8,2]{1,0} get-tuple-element(%conv.5), index=0
"""
    assert roofline.library_call_bytes(hlo) == 2 * 8 * 4 + 4 * 4 * 2 + 2 * 8 * 2


def test_minimum_bytes():
    summary = summarize("resnet8", create_model("resnet8"), 32)
    bfloat16 = roofline.minimum_bytes(summary, dataclasses.replace(TINY, dtype="bfloat16"))
    float32 = roofline.minimum_bytes(summary, TINY)
    assert float32 - bfloat16 == bfloat16 - 16 * summary.params  # the parameters stay float32
    # By hand, elements of inputs and outputs of the 9 convolutions and the fully-connected layer:
    k = 1024
    inputs = [3 * k, 16 * k, 16 * k, 16 * k, 8 * k, 8 * k, 4 * k, 64]
    outputs = [16 * k, 16 * k, 16 * k, 8 * k, 8 * k, 4 * k, 4 * k, 10]
    elements = 3 * sum(inputs) - inputs[0] + 4 * sum(outputs[:-1]) + 2 * outputs[-1]
    assert float32 == 4 * 4 * elements + 16 * summary.params


def test_copy_bandwidth():
    assert 1e8 < roofline.copy_bandwidth(2**20, repeats=2) < 1e13


def test_made_up_cifar10(tmp_path):
    write_cifar10(tmp_path)
    dataset = load_dataset("cifar10", tmp_path)
    assert len(dataset.train) == 50_000
    assert set(dataset.train.labels[:1000].tolist()) == set(range(10))


def test_workers(tmp_path):
    results = run_case(TINY, rounds=1, deadline=time.monotonic() + 100, logs=tmp_path, say=lambda line: None)
    assert results["flax"]["status"] == "ok", results
    assert results["torch"]["status"] == ("ok" if importlib.util.find_spec("torch") else "not installed"), results
    for result in results.values():
        if result["status"] == "ok":
            assert result["ms"][0] > 0
            assert result["peak_host_bytes"] > 2**26


def test_a_worker_that_fails(tmp_path):
    case = dataclasses.replace(TINY, network="resnet9")
    with Worker(case, "nobody", log=tmp_path / "log") as worker:
        with pytest.raises(WorkerError, match="timeout"):
            worker.receive(time.monotonic())
        worker.send("time", calls=1)
        with pytest.raises(WorkerError, match="not prepared"):
            worker.receive(time.monotonic() + 30)


def test_input_pipeline(tmp_path, monkeypatch):
    write_folder(tmp_path / "images", images=2, test_images=1)
    monkeypatch.setattr(input_pipeline, "find_spec", lambda name: None)  # DataLoader takes seconds to start
    rows = input_pipeline.measure(tmp_path / "images", tmp_path, 2, 0.01, 4, 1)
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
    assert all(len(row.per_core) == 2 and min(row.per_core) > 1 for row in rows)


def test_the_table_of_the_input_pipeline():
    rows = [
        {"name": "plain", "peer": "plain", "per_core": [90.0, 100.0, 140.0], "ratio": 1.0},
        {"name": "packed", "peer": "plain", "per_core": [150.0, 160.0, 155.0], "ratio": 1.55},
        {"name": "end to end", "peer": "torch", "per_core": [80.0], "ratio": None},
    ]
    machine = {"cores": 2, "cpu": "a processor", "python": "3.11"}
    text = input_pipeline.to_text({"machine": machine, "workers": 2, "command": "python", "rows": rows})
    assert text.splitlines()[-3:] == [
        "| plain | 100 | 90 to 140 |  |",
        "| packed | 155 | 150 to 160 | 1.55 |",
        "| end to end | 80 | 80 to 80 |  |",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--rounds", "0"], "--rounds must be above 0; got 0"), (["--batch-size", "-1"], "--batch-size must be above 0")],
)
def test_mistakes_of_the_input_pipeline(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        input_pipeline.main([str(tmp_path), *arguments])
