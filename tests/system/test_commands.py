"""train.py and eval.py as a user runs them: output, exit codes, one line for each mistake."""

import json
import os
import re
import runpy
import subprocess
import sys

import jax  # noqa: F401 (patched by name)
import pytest
from paths import ROOT

from resnet_jax.cli.arguments import run_command

SMALL = (
    "--run.steps 3 --model.depth 8 --model.bn-group-size 8 --data.batch-size 8 --run.log-every 1"
    " --run.eval-every 2 --run.save-every 2"
)


def run(*command: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **(environment or {})}
    )


def test_train_on_two_devices_then_evaluate_on_one(tmp_path):
    workdir = str(tmp_path / "runs" / "digits_resnet20")
    two_devices = {"JAX_NUM_CPU_DEVICES": "2"}
    train = run(
        "train.py", "configs/digits_resnet20.py", "--run.workdir", workdir, *SMALL.split(), environment=two_devices
    )
    assert train.returncode == 0, train.stderr
    assert "devices 2" in train.stdout
    lines = train.stdout.splitlines()
    assert [line[:8] for line in lines if line.startswith("step")] == [
        "step 1  ",
        "step 2  ",
        "step 2  ",
        "step 3  ",
        "step 3  ",
    ]
    assert lines[-2].startswith("test error ")
    assert "(360 images)" in lines[-2]
    assert train.stderr == ""

    # The checkpoint of two devices is read on one.
    one_device = {"JAX_NUM_CPU_DEVICES": "1"}
    evaluation = run("eval.py", workdir, "--json", environment=one_device)
    assert evaluation.returncode == 0, evaluation.stderr
    assert evaluation.stderr == ""
    *table, last = evaluation.stdout.splitlines()
    result = json.loads(last)
    assert table[0].startswith(f"step 3: test error {result['top1_error']:.2f} %")
    assert len(table) == 11  # and a line a class
    assert result["count"] == 360
    assert f"test error {result['top1_error']:.2f} %" in lines[-2]
    assert json.loads(run("eval.py", workdir, "--json", "--step", "2").stdout.splitlines()[-1])["members"] == [
        {"workdir": workdir, "step": 2, "scales": [37]}
    ]

    # README's Python example loads the same run.
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    here = {"PYTHONPATH": str(ROOT)}
    readme = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **here}
    )
    assert readme.returncode == 0, readme.stderr
    assert readme.stdout.splitlines()[-1] == f"test error {result['top1_error']:.2f} %"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train.py", "which configuration?"),
        ("train.py configs/digits_resnet2.py", "did you mean configs/digits_resnet20.py"),
        ("train.py configs/digits_resnet20.py --model.dpth 8", "did you mean --model.depth?"),
        ("train.py configs/digits_resnet20.py --model.depth 21 --run.workdir {tmp}/run", "depth must be 6n+2"),
        (
            "train.py configs/cifar10_resnet20.py --data.dir {tmp}/broken --run.workdir {tmp}/run",
            "data_batch_1.bin: could not be read (No such file",
        ),
        ("train.py configs/digits_resnet20.py --data.name digit --run.workdir {tmp}/run", "did you mean digits?"),
        ("eval.py {tmp}/none", "is not a work directory"),
        ("eval.py", "the following arguments are required: WORKDIR"),
        ("eval.py {tmp} --stp 3", "unrecognized arguments: --stp 3"),
        ("eval.py {tmp} --protocol 11crop", "invalid choice: '11crop'"),
        ("eval.py {tmp} {tmp} --step 3", "--step goes with one work directory; got 2"),
        ("-m resnet_jax paper table7", "invalid choice: 'table7'"),
        ("-m resnet_jax paper table6 --runs {tmp}/none", "none: --runs must name the folder that holds the work"),
        ("-m resnet_jax paper table6 --budget 5", "--budget takes the minutes"),
        ("-m resnet_jax responses {tmp}/none", "is not a work directory"),
        ("-m resnet_jax data check {tmp}/none", "no folder"),
        ("-m resnet_jax data pack {tmp}/none {tmp}/out", "no folder"),
        ("-m resnet_jax data chek {tmp}", "invalid choice: 'chek'"),
        ("-m resnet_jax report {tmp}/none", "is not a work directory"),
        ("-m resnet_jax report {tmp} --out {tmp}/no/page.html", "--out: there is no folder"),
        ("eval.py {tmp} --save-predictions {tmp}/no/a.npz", "--save-predictions: there is no folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, command, message):
    broken = tmp_path / "broken" / "cifar-10-batches-bin"
    broken.mkdir(parents=True)
    (broken / "test_batch.bin").write_bytes(b"too short")
    arguments = command.format(tmp=tmp_path).split()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("resnet_jax.parallel.devices.configure", lambda config=None: None)  # it would outlive the test
    if arguments[0] == "-m":
        del arguments[0]
    monkeypatch.setattr(sys, "argv", arguments)
    script = "resnet_jax/__main__.py" if arguments[0] == "resnet_jax" else arguments[0]
    with pytest.raises(SystemExit) as stop:  # in this process: a new one takes seconds
        runpy.run_path(script, run_name="__main__")
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_a_reader_that_has_seen_enough():
    command = [sys.executable, "-m", "resnet_jax", "summary", "resnet20"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # as head does
        assert process.stderr.read() == b""
    assert process.returncode == 141  # as a shell reports SIGPIPE


def test_a_bug_in_one_of_several_processes_ends_it_at_once(monkeypatch, capsys):
    """Otherwise JAX would wait for the goodbye of the others, which wait for this one in a step."""
    left = []
    monkeypatch.setattr(os, "_exit", left.append)

    def fail(arguments):
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        run_command(fail)
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    run_command(fail)
    assert left == [1]
    assert "KeyError: 'a bug'" in capsys.readouterr().err
