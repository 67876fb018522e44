"""python -m benchmarks.gpu comes to its end where there is no GPU, goes on where it stopped, and sums kernels up."""

import json
import os
import subprocess
import sys
import time

import pytest
from paths import ROOT
from safetensors.numpy import load_file

from benchmarks.gpu import pieces
from benchmarks.gpu.profile import Kernel, kind_of, summarize
from benchmarks.gpu.runs import Run

pytest.importorskip("torch")
TRAIN_ARGS = pieces.CPU.train_args


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with half of the network that is trained without a GPU."""
    folder = tmp_path_factory.mktemp("begun")
    command = [sys.executable, "train.py", "configs/digits_resnet20.py", *TRAIN_ARGS, "--run.steps", "20"]
    subprocess.run([*command, "--run.workdir", str(folder / "digits_resnet20")], cwd=ROOT, env=fast(), check=True)
    return folder


def fast():
    return {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu"}


def call(*args, code=0):
    command = [sys.executable, "-m", "benchmarks.gpu", "--minutes", "30", *map(str, args)]
    called = subprocess.run(command, cwd=ROOT, env=fast(), capture_output=True, text=True)
    assert called.returncode == code, called.stderr
    return called


@pytest.mark.slow
def test_it_runs_to_its_end_and_what_is_finished_is_not_made_again(tmp_path, begun):
    out = tmp_path / "out"
    page = call("--out", out, "--resume", begun, "--against", ROOT).stdout
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    results = {record["piece"]: record["result"] for record in records if "piece" in record}
    assert [name.split()[0] for name in results] == ["tests", "repeated", "speed", "against", "train"]
    assert not [result for result in results.values() if "error" in result]
    tests, repeated, speed, against, trained = results.values()
    assert tests["passed"] > 0
    assert tests["failed_tests"] == []
    # On a CPU the flag changes nothing, and the program is the same.
    assert len({digest for peer in repeated["peers"].values() for digest in peer["digests"]}) == 1
    assert all(len(peer["ms"]) == 2 for found in (speed, against) for peer in found["peers"].values())
    profile = speed["peers"]["ours"]["profile"]
    assert 0 < profile["busy_us"] <= profile["span_us"]
    assert profile["kinds"]["forward convolutions and products"][1] > 0
    assert (trained["begun_at"], trained["step"]) == (20, 40)
    assert sorted(path.name for path in (out / "finished/digits_resnet20").iterdir()) == [
        *("config.json", "curves.png", "digits_resnet20.safetensors", "inputs.json", "metrics.jsonl")
    ]
    assert load_file(out / trained["weights"])
    assert not list((out / "runs").iterdir())
    assert page == (out / "gpu.md").read_text() + "\n"
    assert "the same bits twice in one process" in page

    again = call("--out", tmp_path / "again", "--resume", out, "--against", ROOT).stderr
    assert again.count(": finished before\n") == len(results)


def test_a_network_without_time_is_packed_and_taken_up_again(tmp_path, begun):
    (tmp_path / "logs").mkdir()
    run = Run("digits_resnet20", [*TRAIN_ARGS], tmp_path, begun, 10)
    for resume in (begun, None):
        found = run._replace(resume=resume).go_on(time.monotonic())
        assert (found["begun_at"], found["step"], found["error"]) == (20, 20, "out of time")
        assert [path.name for path in (tmp_path / "runs").iterdir()] == ["digits_resnet20.tar.gz"]


def test_tests_that_do_not_run_are_not_finished(tmp_path):
    assert pieces._run_tests(("test_metrics.py",), time.monotonic(), tmp_path) == {"error": "out of time"}
    found = pieces._run_tests(("no_such_file.py",), time.monotonic() + 600, tmp_path)
    assert list(found) == ["error"]
    assert "no_such_file.py" in found["error"]


def test_what_the_plan_for_a_gpu_names_is_there():
    for config in pieces.GPU.configs:
        assert (ROOT / "configs" / f"{config}.py").is_file()
    for name in pieces.GPU.tests:
        assert (ROOT / "tests/unit" / name).is_file()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--only", "sped"], "--only sped: there is no such piece; there are tests, repeated resnet8-train-f32-4"),
        (["--against", "no-such-commit"], "--against no-such-commit is neither a folder nor a commit"),
        (["--resume", "nowhere"], "--resume nowhere is no folder"),
        (["--out", "pyproject.toml"], "cannot write pyproject.toml"),
    ],
)
def test_what_is_refused(args, message, tmp_path):
    called = call("--out", tmp_path / "out", *args, code=2)
    assert called.stderr.splitlines()[-1].startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (
            "sm80_xmma_wgrad_implicit_gemm_indexed_tf32f32_tf32f32_f32_nhwckrsc_nhwc_tilesize128x64x16",
            "weight gradients",
        ),
        ("cutlass_80_tensorop_bf16_s16816dgrad_optimized_bf16_256x64_32x4_nhwc", "data gradients"),
        ("void cudnn::engines_precompiled::nchwToNhwcKernel<float, float>", "cuDNN's conversions"),
        ("sm80_xmma_fprop_implicit_gemm_f32f32_tf32f32_f32_nhwckcrs_nchw", "forward convolutions and products"),
        ("input_reduce_fusion_12", "XLA reductions"),
        ("loop_add_multiply_fusion_3", "elementwise"),
        ("input_scatter_fusion", "other"),
        ("loop_transpose_fusion", "copies"),
        ("MemcpyD2D", "copies"),
    ],
)
def test_kernels_have_a_kind_by_name(name, kind):
    assert kind_of(name) == kind


def test_kernels_of_two_streams_are_busy_once():
    """Two steps: [0, 3] and [2, 4] us overlap, [6, 7] us is alone."""
    kernels = [Kernel("loop_fusion", 2000, 2000), Kernel("wgrad", 0, 3000), Kernel("wgrad", 6000, 1000)]
    found = summarize(kernels, steps=2)
    assert (found["kernels"], found["busy_us"], found["span_us"]) == (1.5, 2.5, 3.5)
    assert found["kinds"]["weight gradients"] == [2.0, 1.0]
    assert found["longest"] == [["wgrad", 2.0, 1.0], ["loop_fusion", 1.0, 0.5]]
