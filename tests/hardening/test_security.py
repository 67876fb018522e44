"""Files of others run nothing, write nothing outside of their folder, and show nothing but text."""

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

import code_scan
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
from resnet_jax.data.sources.shards import sha256_of
from resnet_jax.data.tools.check import check
from resnet_jax.data.tools.pack import pack
from resnet_jax.data.tools.reencode import PackOptions
from resnet_jax.data.tools.statistics import load_statistics
from resnet_jax.data.types import Inputs, Preprocessing
from resnet_jax.errors import UserError, printable
from resnet_jax.files import atomic_write
from resnet_jax.models import build_model
from resnet_jax.optim import build_optimizer
from resnet_jax.paper.analysis.report import write_report
from resnet_jax.run.workdir import create_workdir, load_inputs
from resnet_jax.steps import TrainState

# --- what the code calls

ALLOWED = {
    # The official files of CIFAR-10, by their checksums.
    "resnet_jax/data/sources/cifar10.py": {"pickle.loads"},
    # Configuration files are Python, as the README says; it is the user who names one.
    "resnet_jax/command_line.py": {
        "importlib.util.spec_from_file_location",
        "importlib.util.module_from_spec",
        "~spec.loader.exec_module",
    },
    # import_optional(): the packages that an export needs, by names in the code.
    "resnet_jax/convert/verify.py": {"importlib.import_module"},
    # The readers that are tried with damaged files: modules of reliability/, by their names.
    "reliability/fuzz/fuzzer.py": {"importlib.import_module"},
    "reliability/fuzz/worker.py": {"importlib.import_module"},
    # The SVG that matplotlib has drawn; its only texts are the names of the axes and of the three curves.
    "resnet_jax/analysis/report.py": {"markupsafe.Markup"},
}


def test_nothing_in_the_code_runs_files_of_others() -> None:
    files = [ROOT / "train.py", ROOT / "eval.py"]
    for folder in ("resnet_jax", "benchmarks", "reliability", "configs"):
        files += sorted((ROOT / folder).rglob("*.py"))
    assert len(files) > 100
    found: dict[str, set[str]] = {}
    for path in files:
        name = str(path.relative_to(ROOT))
        for line, what in code_scan.scan(path.read_text()):
            print(f"{name}:{line}: {what}")
            found.setdefault(name, set()).add(what)
    assert {name: what - ALLOWED.get(name, set()) for name, what in found.items()} == {name: set() for name in found}
    # No permission outlives its use.
    ours = {name: what for name, what in ALLOWED.items() if name.startswith("resnet_jax/")}
    assert {name: what - found.get(name, set()) for name, what in ours.items()} == {name: set() for name in ours}


def test_templates_escape_everything() -> None:
    templates = list((ROOT / "resnet_jax").rglob("*.jinja"))
    assert templates
    for path in templates:
        text = path.read_text()
        for word in ("|safe", "| safe", "autoescape", "Markup", "href", "<script", "javascript:"):
            assert word not in text
        for unquoted in ("={{", "= {{"):  # a space in the value would begin another attribute
            assert unquoted not in text


@pytest.mark.parametrize(
    "code",
    [
        "import pickle; pickle.loads(b'')",
        "import pickle as p",
        "from pickle import loads",
        "from pickle import *",
        "import pickle; use(pickle)",
        "import pickle\nclass Mine(pickle.Unpickler): pass",
        "import _pickle",
        "import cPickle",
        "import dill",
        "import cloudpickle",
        "import shelve",
        "import marshal",
        "from joblib import load",
        "import torch; torch.load('x')",
        "import torch; torch.load('x', weights_only=False)",
        "import torch; torch.load('x', weights_only=flag)",
        "from torch import load as read; read('x')",
        "import torch; torch.hub.load('x')",
        "import numpy as np; np.load('x', allow_pickle=True)",
        "import numpy as np; np.load('x', None, True)",
        "import numpy as np; np.load('x', allow_pickle=flag)",
        "import numpy as np; np.load('x', **options)",
        "from numpy import load; load('x', allow_pickle=True)",
        "eval('1')",
        "run = eval",
        "map(exec, lines)",
        "compile('1', '', 'eval')",
        "__import__('os')",
        "import builtins; builtins.eval('1')",
        "import importlib; importlib.import_module(name)",
        "from importlib import import_module",
        "import importlib.util; importlib.util.spec_from_file_location('x', path)",
        "loader.exec_module(module)",
        "import runpy; runpy.run_path('x')",
        "import yaml; yaml.load(text)",
        "import yaml; yaml.load(text, Loader=yaml.Loader)",
        "from yaml import unsafe_load",
        "import os; os.system('x')",
        "from os import popen",
        "import subprocess; subprocess.run('x', shell=True)",
        "from subprocess import Popen; Popen('x', shell=1)",
        "import subprocess; subprocess.run('x', **options)",
        "import subprocess; subprocess.getoutput('x')",
        "import tarfile; tarfile.open('x').extractall('y')",
        "archive.extract(member)",
        "archive.extractall('y', filter='tar')",
        "archive.extractall('y', filter=chosen)",
        "import zipfile; zipfile.ZipFile('x').extractall()",
        "import shutil; shutil.unpack_archive('x')",
        "import jinja2; jinja2.Environment()",
        "from jinja2 import Environment; Environment(autoescape=False)",
        "from jinja2 import Template; Template('x')",
        "from markupsafe import Markup; Markup(name)",
        "import tempfile; tempfile.mktemp()",
        "import urllib.request; urllib.request.urlopen(url)",
        "import requests; requests.get(url, verify=False)",
        "def f():\n    if True:\n        return [eval(x) for x in y]",
    ],
)
def test_the_scan_finds(code: str) -> None:
    assert list(code_scan.scan(code))


@pytest.mark.parametrize(
    "code",
    [
        "import pickle; pickle.dumps(x)",
        "code.decode(); imp.x",
        "import pickle\ntry: pass\nexcept pickle.UnpicklingError: pass",
        "import pickletools; pickletools.genops(b'')",
        "import torch; torch.load('x', weights_only=True); torch.compile(f)",
        "import numpy as np; np.load('x'); np.load('x', allow_pickle=False)",
        "import re; re.compile('x'); model.eval(); lowered.compile()",
        "import subprocess; subprocess.run(['x'], check=True)",
        "import yaml; yaml.safe_load('x')",
        "archive.extractall('y', filter='data'); archive.extractfile(member)",
        "from jinja2 import Environment; Environment(autoescape=True)",
        "import importlib.metadata; importlib.metadata.version('x')",
        "from importlib.util import find_spec; find_spec('x')",
    ],
)
def test_the_scan_passes(code: str) -> None:
    assert not list(code_scan.scan(code))


# --- pickles


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def attacks(mark: pathlib.Path) -> dict[str, bytes]:
    """Return pickles that make a file `mark` where they are unpickled."""
    touch = Call(os.system, f"touch {mark}")
    attack = {f"protocol {number}": pickle.dumps({b"data": touch, b"labels": [1]}, number) for number in (2, 4)}
    attack["nested"] = pickle.dumps({b"data": np.zeros(3), b"labels": [[{"x": (1, [touch])}]]})
    attack["objects"] = pickle.dumps({b"data": np.array([touch, None]), b"labels": [1]})
    attack["getattr"] = pickle.dumps(Call(getattr, np.ndarray, "tofile"))
    return attack


@pytest.mark.parametrize("name", attacks(pathlib.Path("/mark")))
@pytest.mark.parametrize("form", ["legacy", "zip"])
def test_hostile_pickles_as_pytorch_files(name: str, form: str, tmp_path: pathlib.Path) -> None:
    torch = pytest.importorskip("torch", reason="reading PyTorch files needs torch")
    mark, path = tmp_path / "executed", tmp_path / "weights.pth"
    if form == "legacy":
        path.write_bytes(attacks(mark)[name])
    else:
        touch = Call(os.system, f"touch {mark}")
        torch.save({"conv1.weight": torch.zeros(1), "attack": touch}, path)
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


def save_objects(path: pathlib.Path, mark: pathlib.Path, *names: str) -> None:
    hostile = np.array([Call(os.system, f"touch {mark}")], dtype=object)
    np.savez(path, **dict.fromkeys(names, hostile))


def test_hostile_pickles_as_numpy_files(tmp_path: pathlib.Path) -> None:
    mark = tmp_path / "executed"
    root = write_folder(tmp_path / "images")

    run = tmp_path / "run"
    run.mkdir()
    (run / "inputs.json").write_text('{"image_shape": [8, 8, 3], "class_names": ["a"]}')
    save_objects(run / "preprocessing.npz", mark, "mean", "std")
    with pytest.raises(UserError, match=r"cannot read .*preprocessing\.npz"):
        load_inputs(run)
    (run / "preprocessing.npz").write_bytes(pickle.dumps(Call(os.system, f"touch {mark}")))
    with pytest.raises(UserError, match=r"cannot read .*preprocessing\.npz"):
        load_inputs(run)

    save_objects(root / "statistics.npz", mark, "mean", "eigenvalues", "eigenvectors", "images", "broken")
    with pytest.raises(UserError, match=r"cannot read .*statistics\.npz \("):
        load_statistics(load_dataset("folder", root), root)

    packed = tmp_path / "packed"
    pack(root, packed, PackOptions())
    save_objects(packed / "train.index.npz", mark, "blob", "offsets", "labels", "crc32")
    change_manifest(packed, lambda train: train.update(index_sha256=sha256_of(packed / "train.index.npz")))
    with pytest.raises(UserError, match=r"^cannot read .*train\.index\.npz[^\n]*$"):
        load_dataset("folder", packed)
    assert not mark.exists()


def change_manifest(packed: pathlib.Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = packed / "manifest.json"
    content = json.loads(path.read_text())
    change(content["splits"]["train"])
    path.write_text(json.dumps(content))


# --- what is shown

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
    return Page(write_report(workdir, evaluation, workdir / "report.html").read_text("utf-8"))


@pytest.mark.parametrize("number", range(len(NASTY)))
@pytest.mark.parametrize("many", [False, True])
def test_the_report_shows_names_as_text(number: int, many: bool, tmp_path: pathlib.Path) -> None:
    nasty = NASTY[number]
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
    model_config = ModelConfig(depth=8)
    config = Config(
        model=model_config, data=DataConfig(name="folder", dir=str(folder / "images"), mean=(0.5, 0.5, 0.5))
    )
    model = build_model(model_config, 2)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))
    variables = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1, leaf.dtype), shapes)
    optimizer, _ = build_optimizer(config.optim, config.run.steps)
    params = variables["params"]
    state = TrainState(jnp.zeros((), jnp.int32), params, variables["batch_stats"], optimizer.init(params))
    inputs = Inputs((32, 32, 3), tuple(names), Preprocessing(np.full(3, 0.5, np.float32), np.ones(3, np.float32)))
    create_workdir(folder / "run", config, inputs, state)
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


def test_nothing_in_a_work_directory_is_run(workdir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Python files, pickles, and Python in the strings of the JSON are left alone by every command that reads it."""
    mark = tmp_path / "executed"
    code = f"open({str(mark)!r}, 'w')"
    touch = pickle.dumps(Call(os.system, f"touch {mark}"))
    saved = workdir / "checkpoints" / "0"
    assert saved.is_dir()
    for folder in (workdir, workdir / "checkpoints", saved, *(path for path in saved.iterdir() if path.is_dir())):
        write(folder, {f"{name}.py": code.encode() for name in MODULES} | {"state.pkl": touch, "x.pth": code.encode()})
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
