"""Weights by name, from servers on this machine that answer as those of the publishers do."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
import safetensors.numpy
from paths import ROOT

import resnet_jax
from resnet_jax.cli.commands import main
from resnet_jax.convert import hub
from resnet_jax.convert.names import tensors_from_variables
from resnet_jax.errors import UserError
from resnet_jax.models import abstract_variables, create_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_tensors(name, layout, **options):
    model, random = create_model(name, **options), np.random.default_rng(0)
    shapes = abstract_variables(model, (32, 32, 3))
    variables = jax.tree.map(lambda leaf: random.uniform(0.05, 0.1, leaf.shape).astype(np.float32), shapes)
    return variables, tensors_from_variables(variables, model, layout)


@pytest.fixture
def serve():
    """Return a function that serves content by path, with headers; it returns the address and what was asked."""
    servers = []

    def start(files, headers=lambda path: {}):
        asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self, body):
                asked.append(f"{self.command} {self.path}")
                content = files.get(self.path)
                self.send_response(200 if content is not None else 404)
                content = content if content is not None else b"{}"
                given = headers(self.path) if self.path in files else {"X-Error-Code": "EntryNotFound"}
                for name, value in {"Content-Length": str(len(content)), **given}.items():
                    self.send_header(name, value)
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def do_GET(self):
                self.answer(body=True)

            def do_HEAD(self):
                self.answer(body=False)

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_files_whose_names_have_their_checksum(tmp_path, monkeypatch, capsys, serve):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    variables, tensors = make_tensors("resnet8", "cifar", zero_channels="both")
    content = safetensors.numpy.save({f"module.{name}": array for name, array in tensors.items()})
    name = f"resnet8-{hashlib.sha256(content).hexdigest()[:8]}.th"
    address, asked = serve({f"/models/{name}": content, "/models/resnet14-00000000.th": content})
    monkeypatch.setitem(hub.ADDRESSES, "cifar", f"{address}/models/")
    files = {"resnet8": hub.Published(name, 8.27), "resnet14": hub.Published("resnet14-00000000.th", 8)}
    monkeypatch.setitem(hub.PUBLISHED, "cifar", files)

    def run(source, *options):
        out = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        return main(["import", source, "--model", source[6:], "--out", str(out), *options])

    with pytest.raises(UserError, match=f"--offline: {name} is not there; put {address}/models/{name} into .*cache"):
        run("cifar:resnet8", "--offline")
    assert not asked
    assert run("cifar:resnet8") == 0
    assert "cifar:resnet8: 8.27 % top-1 error by its publisher\n" in capsys.readouterr().out
    loaded = resnet_jax.load(tmp_path / "run0")
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, variables)
    assert json.loads((tmp_path / "run0" / "import.json").read_text()) == {"file": "cifar:resnet8"}
    assert asked == [f"GET /models/{name}"]
    assert run("cifar:resnet8", "--offline") == 0  # it was kept
    with pytest.raises(UserError, match="is not the file that was published: SHA-256 .*, not 00000000"):
        run("cifar:resnet14")
    with pytest.raises(UserError, match="cifar has no resnet9: choose resnet8, resnet14; did you mean"):
        run("cifar:resnet9")
    monkeypatch.setitem(hub.ADDRESSES, "cifar", f"{address}/none/")
    (tmp_path / "cache" / "resnet_jax" / name).unlink()
    with pytest.raises(UserError, match="could not download .*404.*: put .* into"):
        run("cifar:resnet8")
    assert [file.name for file in (tmp_path / "cache" / "resnet_jax").iterdir()] == []


def test_hugging_faces_hub(tmp_path, serve):
    """The hub's own client downloads from it, into its own cache."""
    pytest.importorskip("huggingface_hub", reason="its client downloads from there")
    variables, tensors = make_tensors("resnet18", "torchvision", num_classes=3)
    config = {"architecture": "resnet18", "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.25, 0.5]}}
    of = f"/timm/resnet18.test/resolve/{COMMIT[:7]}"
    files = {
        f"{of}/model.safetensors": safetensors.numpy.save(tensors),
        f"{of}/config.json": json.dumps(config).encode(),
    }

    def headers(path):
        return {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(files[path]).hexdigest()}"'}

    address, asked = serve(files, headers)

    def run(out, *options):
        arguments = ["-m", "resnet_jax", "import", f"timm:resnet18.test@{COMMIT[:7]}", "--out", str(tmp_path / out)]
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "JAX_PLATFORMS": "cpu"}
        environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"}
        return subprocess.run(
            [sys.executable, *arguments, *options], cwd=ROOT, env=environment, capture_output=True, text=True
        )

    refused = run("run", "--offline")
    assert (refused.returncode, refused.stderr) == (
        2,
        f"error: timm:resnet18.test@{COMMIT[:7]} was not downloaded before: leave out --offline\n",
    )
    done = run("run")
    assert done.returncode == 0, done.stderr
    assert "pixels in [0, 1]: mean 0.5 0.5 0.5, std 0.5 0.25 0.5\n" in done.stdout
    jax.tree.map(np.testing.assert_array_equal, resnet_jax.load(tmp_path / "run").variables, variables)
    source = json.loads((tmp_path / "run" / "import.json").read_text())
    assert source == {"file": f"timm:resnet18.test@{COMMIT}"}
    before = len(asked)
    assert run("again", "--offline").returncode == 0
    assert len(asked) == before
    del files[f"{of}/model.safetensors"]
    (tmp_path / "hf").rename(tmp_path / "away")
    assert "has neither model.safetensors nor pytorch_model.bin" in run("none").stderr


def test_the_table_is_torchvisions_own(monkeypatch):
    from torch_networks import import_torchvision

    import_torchvision(monkeypatch)
    from torchvision.models import get_model_weights

    for name, (file, error) in hub.PUBLISHED["torchvision"].items():
        model, _, version = name.partition(".")
        weights = get_model_weights(model)[version]
        assert weights.url == hub.ADDRESSES["torchvision"] + file
        accuracy = weights.meta["_metrics"]["ImageNet-1K"]["acc@1"]
        assert error == pytest.approx(100 - accuracy, abs=1e-6)
