"""Networks by name and out of files, and the networks that are published."""

import hashlib
import json
import re

import jax
import numpy as np
import pytest
import safetensors
from paths import ROOT

import resnet_jax
from resnet_jax.cli.commands import main
from resnet_jax.errors import UserError
from resnet_jax.inference.load import published, read_config
from resnet_jax.run.network_file import read_description

WEIGHTS = ROOT / "weights"
NAMES = [path.stem for path in sorted(WEIGHTS.glob("*.safetensors"))]

# Of the network in PyTorch, written plainly (tests/torch_networks.py), in float64.
LOGITS = [
    [-2.63088, 1.7727, 5.11137, 0.43389, 3.01445, -3.76497, 3.03819, -1.27942, -3.82144, -1.91003],
    [-3.15454, 3.54392, 4.8553, 1.22278, 3.29264, -3.80366, 1.62593, -2.00554, -3.73396, -1.88426],
]


@pytest.mark.parametrize("scan_blocks", [False, True])
def test_the_published_resnet20_has_the_logits_that_pytorch_has_of_it(scan_blocks):
    model, variables, origin = resnet_jax.load("cifar10_resnet20", scan_blocks=scan_blocks)
    images = np.random.RandomState(0).randint(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    logits = model.apply(variables, resnet_jax.preprocess(images, origin), train=False)
    np.testing.assert_allclose(logits, LOGITS, rtol=0, atol=1e-4)
    assert origin.inputs.class_names[:3] == ("airplane", "automobile", "bird")
    assert all(leaf.devices() == {jax.local_devices()[0]} for leaf in jax.tree.leaves(variables))


def test_the_published_networks_are_those_of_the_folder():
    assert published() == {name: WEIGHTS / f"{name}.safetensors" for name in NAMES}
    assert {"cifar10_plain20", "cifar10_resnet20"} <= set(NAMES)
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) <= 10e6


@pytest.mark.parametrize("name", NAMES)
def test_a_published_network_says_how_it_was_trained(name):
    description = read_description(WEIGHTS / f"{name}.safetensors")
    trained, recorded = description.config, read_config(ROOT / "docs" / "runs" / name)
    assert (trained.model, trained.optim) == (recorded.model, recorded.optim)
    assert (trained.run.seed, description.step) == (recorded.run.seed, 64_000)
    assert description.more["license"] == "Apache-2.0"
    assert re.fullmatch("[0-9a-f]{7,40}", description.more["commit"])
    last = [json.loads(line) for line in (ROOT / "docs" / "runs" / name / "metrics.jsonl").read_text().splitlines()][-1]
    assert (last["kind"], last["step"]) == ("test", 64_000)
    assert last["error"] in [result["top1_error"] for result in description.more["results"]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("page", ["weights/{name}.md", "docs/results.md", "README.md"])
def test_the_pages_give_the_error_and_the_sha256_of_the_file(name, page):
    text = (ROOT / page.format(name=name)).read_text()
    digest = hashlib.sha256((WEIGHTS / f"{name}.safetensors").read_bytes()).hexdigest()
    assert re.search(rf"`{digest[:12]}[0-9a-f]*`", text)
    assert all(digest.startswith(found) for found in re.findall(rf"`({digest[:12]}[0-9a-f]*)`", text))
    (row,) = (line for line in text.splitlines() if digest[:12] in line)
    rows = text if page.startswith("weights") else row
    assert f"{read_description(WEIGHTS / f'{name}.safetensors').more['results'][0]['top1_error']:.2f}" in rows


def test_the_pages_of_all_networks_together_name_no_other_file():
    digests = {hashlib.sha256((WEIGHTS / f"{name}.safetensors").read_bytes()).hexdigest()[:12] for name in NAMES}
    for page in ("README.md", "docs/results.md", *(f"weights/{name}.md" for name in NAMES)):
        assert {found[:12] for found in re.findall(r"`([0-9a-f]{12,64})`", (ROOT / page).read_text())} <= digests


def test_a_name_that_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="cifar10_resnet2 is no work directory, .*; did you mean cifar10_resnet20?"):
        resnet_jax.load("cifar10_resnet2")
    with pytest.raises(UserError, match="runs/cifar10_resnet20 is not a work directory"):
        resnet_jax.load("runs/cifar10_resnet20")


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["import", str(WEIGHTS / "cifar10_resnet20.safetensors"), "--out", "cifar10_resnet20"]) == 0
    assert resnet_jax.load("cifar10_resnet20").origin.step == 0
    (tmp_path / "cifar10_plain20").mkdir()
    with pytest.raises(UserError, match="cifar10_plain20 is not a work directory"):
        resnet_jax.load("cifar10_plain20")


def test_a_file_holds_one_step(tmp_path):
    with pytest.raises(UserError, match="cifar10_resnet20.safetensors holds step 64000 alone; got --step 3"):
        resnet_jax.load("cifar10_resnet20", step=3)
    assert resnet_jax.load("cifar10_resnet20", step=64_000).origin.step == 64_000


def test_files_that_are_not_loaded_but_imported(tmp_path):
    file = tmp_path / "x.safetensors"
    assert main(["export", "cifar10_resnet20", "--format", "safetensors", "--out", str(file)]) == 0
    for path in (file, tmp_path / "other.safetensors"):
        with pytest.raises(UserError, match=f"python -m resnet_jax import {path} --out WORKDIR"):
            resnet_jax.load(path)
        with safetensors.safe_open(file, framework="numpy") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
        safetensors.numpy.save_file(tensors, tmp_path / "other.safetensors")


def test_what_was_said_of_a_network_is_said_of_its_exports(tmp_path):
    file = tmp_path / "x.safetensors"
    arguments = ["--format", "safetensors", "--out", str(file), "--names", "resnet_jax"]
    assert main(["export", "cifar10_resnet20", *arguments, "--metadata", "author=me", "commit=1=2"]) == 0
    more = read_description(file).more
    assert more["results"] == read_description(WEIGHTS / "cifar10_resnet20.safetensors").more["results"]
    assert (more["author"], more["commit"], more["license"]) == ("me", "1=2", "Apache-2.0")
    with pytest.raises(UserError, match="--metadata takes NAME=TEXT; got me"):
        main(["export", "cifar10_resnet20", *arguments, "--metadata", "me"])
