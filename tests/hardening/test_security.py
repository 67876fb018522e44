"""What README promises under "What to trust": files of others run nothing, and show nothing but text."""

from __future__ import annotations

import json
import os
import pathlib
import pickle
import subprocess
import sys
import types
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from image_files import encoded, write, write_folder
from paths import ROOT

from resnet_jax.cli.arguments import run_command
from resnet_jax.cli.commands import main
from resnet_jax.config import Config, DataConfig, ModelConfig, RunConfig, to_json
from resnet_jax.convert.files import read_tensors
from resnet_jax.data import load_dataset
from resnet_jax.data.tools.check import check
from resnet_jax.data.tools.statistics import load_statistics
from resnet_jax.data.types import Inputs, Preprocessing
from resnet_jax.errors import UserError, printable
from resnet_jax.files import atomic_write
from resnet_jax.paper.analysis.report import write_report
from resnet_jax.run.workdir import create_workdir, load_inputs
from resnet_jax.trainer import Trainer

# --- pickles


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


@pytest.fixture
def mark(tmp_path: pathlib.Path) -> pathlib.Path:
    """A file that an attack makes where it is unpickled."""
    return tmp_path / "executed"


def touch(mark: pathlib.Path) -> Call:
    return Call(os.system, f"touch {mark}")


def test_the_attack_works(mark: pathlib.Path) -> None:
    pickle.loads(pickle.dumps(touch(mark)))
    assert mark.exists()


def test_a_pickle_in_place_of_cifar10(mark: pathlib.Path, tmp_path: pathlib.Path) -> None:
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    write(tmp_path / "data", {name: pickle.dumps({b"data": touch(mark), b"labels": [1]}) for name in names})
    with pytest.raises(UserError, match="data_batch_1") as caught:
        load_dataset("cifar10", tmp_path / "data")
    assert "\n" not in str(caught.value)
    assert not mark.exists()


@pytest.mark.parametrize("form", ["legacy", "zip"])
def test_a_pickle_in_place_of_pytorch_weights(form: str, mark: pathlib.Path, tmp_path: pathlib.Path) -> None:
    torch = pytest.importorskip("torch", reason="reading PyTorch files needs torch")
    path = tmp_path / "weights.pth"
    if form == "legacy":
        path.write_bytes(pickle.dumps({"conv1.weight": touch(mark)}, 2))
    else:
        torch.save({"conv1.weight": torch.zeros(1), "attack": touch(mark)}, path)
    with pytest.raises(UserError, match=r"^/.*weights\.pth is (refused|damaged)[^\n]*$"):
        read_tensors(path)
    assert not mark.exists()


def test_an_old_torch_is_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 2.6 weights_only could be got around: CVE-2025-32434."""
    (tmp_path / "weights.pth").write_bytes(b"")
    for version, refused in (("2.5.1+cu121", True), ("1.13.0", True), ("2.6.0", False), ("10.0", False)):
        monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__=version))
        with pytest.raises(UserError, match="needs torch 2.6 or later" if refused else "damaged or not a PyTorch"):
            read_tensors(tmp_path / "weights.pth")


def test_pickles_in_place_of_arrays(mark: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def save_objects(path: pathlib.Path, *names: str) -> None:
        hostile = np.array([touch(mark)], dtype=object)
        np.savez(path, **dict.fromkeys(names, hostile))  # type: ignore[arg-type]

    run = write(tmp_path / "run", {"inputs.json": b'{"image_shape": [8, 8, 3], "class_names": ["a"]}'})
    save_objects(run / "preprocessing.npz", "mean", "std")
    with pytest.raises(UserError, match=r"cannot read .*preprocessing\.npz"):
        load_inputs(run)
    (run / "preprocessing.npz").write_bytes(pickle.dumps(touch(mark)))
    with pytest.raises(UserError, match=r"cannot read .*preprocessing\.npz"):
        load_inputs(run)

    root = write_folder(tmp_path / "images")
    save_objects(root / "statistics.npz", "mean", "eigenvalues", "eigenvectors", "images", "broken")
    dataset: Any = load_dataset("folder", root)
    with pytest.raises(UserError, match=r"cannot read .*statistics\.npz \("):
        load_statistics(dataset, root)
    assert not mark.exists()


# --- what is shown


def test_templates_escape_everything() -> None:
    templates = list((ROOT / "resnet_jax").rglob("*.jinja"))
    assert templates
    for path in templates:
        text = path.read_text()
        for word in ("|safe", "| safe", "autoescape", "Markup", "href", "<script", "javascript:"):
            assert word not in text
        for unquoted in ("={{", "= {{"):  # a space in the value would begin another attribute
            assert unquoted not in text


NASTY = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "javascript:alert(1)",
    "--></style><script>alert(1)</script>",
    "{{ 7 * 7 }}{% include '/etc/passwd' %}",
    "</title></svg><svg onload=alert(1)>",
    "$\\frac{1}$",
    "\x1b]0;title\x07\u202etxt.exe",
)


class Page(HTMLParser):
    """Collects elements, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def report_page(workdir: pathlib.Path, names: tuple[str, ...], everywhere: str) -> Page:
    """Write the report of a made-up run whose every text is `everywhere`, with these classes; return the page."""
    config = Config(
        data=DataConfig(name=everywhere, dir=everywhere), run=RunConfig(steps=10, workdir=everywhere)
    )  # fmt: skip
    train = {"kind": "train", "loss": 1.0, "images": 8, "error": 50.0, "learning_rate": 0.1, "images_per_second": 9.0}
    records: list[dict[str, Any]] = [
        {"kind": "start", "step": 0, "time": 1e9, "device": everywhere, everywhere: everywhere},
        *({**train, "step": step, "time": 1e9 + step} for step in (1, 2, 3)),
    ]
    write(
        workdir,
        {
            "config.json": to_json(config).encode(),
            "metrics.jsonl": "".join(json.dumps(record) + "\n" for record in records).encode(),
            "import.json": json.dumps({"file": everywhere}).encode(),
        },
    )
    count = len(names)
    labels = np.arange(count, dtype=np.int32)
    test = types.SimpleNamespace(
        name=everywhere,
        class_names=names,
        labels=labels,
        ids=[everywhere] * count,
        images=np.zeros((count, 4, 4, 3), np.uint8),
    )
    evaluation: Any = types.SimpleNamespace(
        test=test, probabilities=np.eye(count)[::-1], protocol="single", step=3, count=count,
        top1_error=90.0, top5_error=5.0, loss=1.0, class_errors=np.full(count, 100.0),
    )  # fmt: skip
    write_report(workdir, evaluation, workdir / "report.html")
    return Page((workdir / "report.html").read_text("utf-8"))


@pytest.mark.parametrize("number", range(len(NASTY)))
def test_the_report_shows_names_as_text(number: int, tmp_path: pathlib.Path) -> None:
    nasty, many = NASTY[number], number % 2
    names = (*NASTY, *(f"class {i} {nasty}" for i in range(20 * many)))  # more than 20: another table of confusions
    page = report_page(tmp_path / nasty.replace("/", "\u2215"), names, nasty)
    plain = report_page(tmp_path / "plain", tuple(f"class {i}" for i in range(len(names))), "plain")
    assert page.tags == plain.tags
    assert {name for name, _ in page.attributes} == {name for name, _ in plain.attributes}
    assert len(page.attributes) == len(plain.attributes)
    assert page.tags.isdisjoint({"script", "a", "iframe", "object", "embed", "form", "base", "link"})
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href", "srcset", "action", "data", "formaction"):
            assert (value or "").startswith(("#", "data:image/png;base64,"))
    assert page.text.count(nasty) > 10
    (policy,) = (value for name, value in page.attributes if name == "content" and "default-src" in str(value))
    assert str(policy).startswith("default-src 'none';")  # of a page whose text got through nothing would run
    assert "script" not in str(policy)


def test_printable() -> None:
    assert printable("\x1b]0;x\x07 \r\n\t é 图 \x9b2J \x7f") == "\\x1b]0;x\\x07 \\r\\n\\t é 图 \\x9b2J \\x7f"
    assert printable("\u202eexe.txt \u2066 \u2028") == "\\u202eexe.txt \\u2066 \\u2028"
    assert printable(os.fsdecode(b"\xff.png")) == "\\xff.png"
    printable("".join(map(chr, range(0x3000)))).encode()  # half a character would raise


ESCAPE = "\x1b]0;owned\x07\n"


def test_names_of_files_do_not_command_the_terminal(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are printed by `data check` and `data pack`, in errors, and by eval.py as names of classes."""
    picture = encoded("x")
    root = write(tmp_path / "in", {f"{split}/a{ESCAPE}/b{ESCAPE}.jpeg": picture for split in ("train", "val")})
    write(root, {f"train/a{ESCAPE}/{ESCAPE}\udcff.png": b"broken"})

    def printed(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["resnet_jax", "data", *arguments])
        with pytest.raises(SystemExit):
            run_command(main)
        output = capsys.readouterr()
        return harmless(output.out + output.err)

    assert "\\x1b]0;owned\\x07\\n" in printed("check", str(root), "--workers", "1")
    assert "left out train/a\\x1b]0;owned" in printed("pack", str(root), str(tmp_path / "out"), "--workers", "1")
    assert check(root).class_names == (f"a{ESCAPE}",)  # in the data itself they are what they are
    (root / f"val/z{ESCAPE}").mkdir()
    assert "z\\x1b]0;owned" in (output := printed("check", str(root), "--workers", "1"))
    assert output.startswith("error: ")


def harmless(text: str) -> str:
    """Return what was printed, having checked that there is nothing in it that a terminal obeys."""
    assert not set(text) & set(map(chr, [*range(10), *range(11, 32), 0x9B])), repr(text)
    text.encode()  # half a character would raise
    return text


def run(*arguments: str, cwd: pathlib.Path = ROOT, **environment: str) -> str:
    """Run Python; return what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, env={**os.environ, **environment}, timeout=100
    )
    text = harmless((done.stdout + done.stderr).decode())
    assert "Traceback" not in text, text
    return text


# --- work directories of others


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A work directory for the images beside it, with the least network that there is."""
    folder = tmp_path_factory.mktemp("others")
    names = [f"a{ESCAPE}", "b"]
    for split in ("train", "val"):
        write(folder / "images", {f"{split}/{name}/1.png": encoded(name, 32, 32, format="PNG") for name in names})
    data = DataConfig(name="folder", dir=str(folder / "images"), mean=(0.5, 0.5, 0.5), batch_size=2)
    config = Config(model=ModelConfig(depth=8, bn_group_size=2), data=data)
    inputs = Inputs((32, 32, 3), tuple(names), Preprocessing(np.full(3, 0.5, np.float32), np.ones(3, np.float32)))
    shapes = Trainer(config, inputs, load_dataset("folder", folder / "images")).abstract_state()
    create_workdir(folder / "run", config, inputs, jax.tree.map(lambda x: jnp.full(x.shape, 0.1, x.dtype), shapes))
    return folder / "run"


MODULES = (
    "sitecustomize",
    "config",
    "get_config",
    "__init__",
    "__main__",
    "conftest",
    "jax",
    "numpy",
    "train",
    "inputs",
)


def test_nothing_in_a_work_directory_is_run(workdir: pathlib.Path, mark: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Python files, pickles, and Python in the strings of the JSON are left alone by every command that reads it."""
    code = f"open({str(mark)!r}, 'w')"
    attack = pickle.dumps(touch(mark))
    saved = workdir / "checkpoints" / "0"
    assert saved.is_dir()
    for folder in (workdir, workdir / "checkpoints", saved, *(path for path in saved.iterdir() if path.is_dir())):
        write(folder, {f"{name}.py": code.encode() for name in MODULES} | {"state.pkl": attack, "x.pth": code.encode()})
    config = json.loads((workdir / "config.json").read_text())
    python = f"__import__('os').system('touch {mark}')"
    config["run"]["workdir"] = f"$(touch {mark}); `touch {mark}`; {python}"
    (workdir / "config.json").write_text(json.dumps(config))
    inputs = json.loads((workdir / "inputs.json").read_text())
    (workdir / "inputs.json").write_text(json.dumps({**inputs, "note": python}))
    start = {"kind": "start", "step": 0, "time": 1e9, "device": python, "!!python/object/apply:os.system": [python]}
    (workdir / "metrics.jsonl").write_text(json.dumps(start) + "\n")
    victim = write(tmp_path, {"victim": b"as before"}) / "victim"
    for name in ("report.html.new", "evaluations.jsonl"):
        (workdir / name).symlink_to(victim)

    # In one process, which is what takes the time; eval.py and the sub-commands are called as they are by a shell.
    program = f"""
import runpy, sys
def command(*arguments):
    sys.argv = list(arguments)
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as stop:
        print("code", stop.code)
command({str(ROOT / "eval.py")!r}, {str(workdir)!r})
main = {str(ROOT / "resnet_jax" / "__main__.py")!r}
command(main, "report", {str(workdir)!r})
command(main, "export", {str(workdir)!r}, "--format", "safetensors", "--out", {str(tmp_path / "out.safetensors")!r})
files = [str(getattr(module, "__file__", "")) for module in sys.modules.values()]
print("imported", [file for file in files if file.startswith({str(workdir)!r})])
"""
    output = run("-c", program, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert output.count("code 0\n") == 3, output
    assert "imported []" in output
    assert "\\x1b]0;owned" in output  # the name of a class
    assert "warning: cannot record the evaluation in" in output  # as that is a link
    assert victim.read_bytes() == b"as before"
    assert not mark.exists()


def test_a_link_is_not_written_through(tmp_path: pathlib.Path) -> None:
    victim = write(tmp_path, {"victim": b"as before"}) / "victim"
    for name in ("file", "file.new"):
        (tmp_path / name).symlink_to(victim)
    with atomic_write(tmp_path / "file") as partial:
        partial.write_bytes(b"new")
    assert victim.read_bytes() == b"as before"
    assert (tmp_path / "file").read_bytes() == b"new"
    assert not (tmp_path / "file").is_symlink()
