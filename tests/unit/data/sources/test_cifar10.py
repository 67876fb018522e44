"""CIFAR-10: all official forms give the same images, and every damaged file is one clear line."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import os
import pathlib
import pickle
import struct
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from image_files import write

from resnet_jax.data import Dataset, load_dataset
from resnet_jax.data.sources import cifar10
from resnet_jax.errors import UserError

RECORDS = 20  # a file, instead of 10,000
BATCHES = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
Files = dict[str, bytes]


@pytest.fixture(autouse=True)
def small_files(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have files of 20 records (except beside the real data), and never use the network."""
    if "cifar10_dir" not in request.fixturenames:
        monkeypatch.setattr(cifar10, "RECORDS_PER_FILE", RECORDS)
        sums = {name: hashlib.md5(content).hexdigest() for name, content in python_files().items()}
        monkeypatch.setattr(cifar10, "PICKLES", sums)
        archives = {name: hashlib.sha256(content).hexdigest() for name, content in archive_files().items()}
        monkeypatch.setattr(cifar10, "SHA256", archives)
    monkeypatch.setattr(cifar10, "URL", "http://127.0.0.1:1/no-test-downloads.tar.gz")


@functools.cache
def batch(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Made-up planes [20, 3072] and labels [20] of file `index`."""
    random = np.random.RandomState(index)
    return random.randint(0, 256, (RECORDS, 3072)).astype(np.uint8), random.randint(0, 10, RECORDS)


def binary_files() -> Files:
    records = {name: np.column_stack([batch(i)[1].astype(np.uint8), batch(i)[0]]) for i, name in enumerate(BATCHES)}
    return {f"{name}.bin": array.tobytes() for name, array in records.items()}


def python2_pickle(planes: np.ndarray, labels: np.ndarray) -> bytes:
    """The opcodes of the official files, which cPickle of Python 2 wrote in protocol 2."""

    def text(value: bytes) -> bytes:  # SHORT_BINSTRING or BINSTRING: Python 3 never writes these
        return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<i", len(value)) + value

    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85" + text(b"b") + b"\x87R"
    dtype = b"cnumpy\ndtype\nq\x04" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNN"
    dtype += 2 * (b"J" + struct.pack("<i", -1)) + b"K\x00tb"
    shape = b"K" + bytes([len(planes)]) + b"M" + struct.pack("<H", 3072) + b"\x86"
    array += b"(K\x01" + shape + dtype + b"\x89" + text(planes.tobytes()) + b"tb"
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    items = text(b"batch_label") + text(b"testing batch 1 of 1") + text(b"labels") + listed + text(b"data") + array
    return b"\x80\x02}q\x01(" + items + b"u."


@functools.cache
def python_files() -> Files:
    return {name: python2_pickle(*batch(i)) for i, name in enumerate(BATCHES)}


def pack(folder: str, files: Files) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in ({"readme.html": b"hello"} | files).items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


@functools.cache
def archive_files() -> Files:
    return {
        "cifar-10-binary.tar.gz": pack("cifar-10-batches-bin", binary_files()),
        "cifar-10-python.tar.gz": pack("cifar-10-batches-py", python_files()),
    }


def check(dataset: Any) -> None:
    """Compare with `batch`, pixel by pixel and by its own arithmetic."""
    assert isinstance(dataset, Dataset)
    assert dataset.name == "cifar10"
    assert dataset.class_names[::9] == ("airplane", "truck")
    assert len(dataset.train) == 5 * RECORDS
    np.testing.assert_array_equal(dataset.train.labels, np.concatenate([batch(i)[1] for i in range(5)]))
    np.testing.assert_array_equal(dataset.test.labels, batch(5)[1])
    for split, first in ((dataset.train, 0), (dataset.test, 5)):
        assert split.images.shape[1:] == (32, 32, 3)
        assert split.images.dtype == np.uint8
        assert split.images.flags.c_contiguous
        for image in range(len(split)):
            planes = batch(first + image // RECORDS)[0][image % RECORDS]
            for row, column, channel in ((0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1), (31, 30, 2)):
                assert split.images[image, row, column, channel] == planes[1024 * channel + 32 * row + column]


@pytest.mark.parametrize("folder", [".", "cifar-10-batches"])
@pytest.mark.parametrize(("form", "files"), [("bin", binary_files), ("py", python_files)])
def test_folders(folder: str, form: str, files: Callable[[], Files], tmp_path: pathlib.Path) -> None:
    write(tmp_path / (folder if folder == "." else f"{folder}-{form}"), files())
    check(load_dataset("cifar10", str(tmp_path)))


@pytest.mark.parametrize("name", ["cifar-10-binary.tar.gz", "cifar-10-python.tar.gz"])
def test_archives(name: str, tmp_path: pathlib.Path) -> None:
    write(tmp_path, {name: archive_files()[name]})
    check(load_dataset("cifar10", tmp_path))
    check(load_dataset("cifar10", (tmp_path / name).rename(tmp_path / "other")))
    assert os.listdir(tmp_path) == ["other"]  # nothing is unpacked


def test_order(tmp_path: pathlib.Path) -> None:
    """The binary folder, then the python one, then archives; a damaged one is never passed over."""
    write(tmp_path, {"cifar-10-python.tar.gz": b"", "cifar-10-binary.tar.gz": b""})
    write(tmp_path / "cifar-10-batches-py", python_files())
    check(load_dataset("cifar10", tmp_path))
    (tmp_path / "cifar-10-batches-bin").mkdir()
    with pytest.raises(UserError, match=r"bin/data_batch_1\.bin: could not be read \(No such file or directory\)"):
        load_dataset("cifar10", tmp_path)


def test_the_folder_may_be_a_link(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "elsewhere", binary_files())
    (tmp_path / "data").mkdir()
    (tmp_path / "data/cifar-10-batches-bin").symlink_to(tmp_path / "elsewhere")
    check(load_dataset("cifar10", tmp_path / "data"))


TAKE_ANEW = r"; take it anew from cifar-10-binary\.tar\.gz \(https://www\.cs\.tor"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test_batch.bin", None, r"/test_batch\.bin: could not be read \(No such file or directory\)" + TAKE_ANEW),
        ("data_batch_3.bin", b"short", r"/data_batch_3\.bin: expected 61,460 bytes, found 5" + TAKE_ANEW),
        ("test_batch.bin", bytes(61_461), r"/test_batch\.bin: expected 61,460 bytes, found 61,461" + TAKE_ANEW),
        ("data_batch_2.bin", bytes(6146) + b"\x0a" + bytes(55_313), r"_2\.bin: label 10 of image 2 "),
    ],
)
def test_damaged_binary(name: str, content: bytes | None, message: str, tmp_path: pathlib.Path) -> None:
    write(tmp_path, binary_files() | ({name: content} if content is not None else {}))
    if content is None:
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match=message):
        load_dataset("cifar10", tmp_path)


class Attack:
    """Pickles as a call that makes a file."""

    def __init__(self, mark: pathlib.Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def test_only_the_official_pickles_are_unpickled(tmp_path: pathlib.Path) -> None:
    mark = tmp_path / "executed"
    attack = pickle.dumps({b"data": Attack(mark), b"labels": [1]})
    same_arrays = pickle.dumps({b"data": batch(5)[0], b"labels": batch(5)[1].tolist()})
    for content in (attack, same_arrays, b"", python_files()["test_batch"][:-1], python_files()["data_batch_1"]):
        write(tmp_path, python_files() | {"test_batch": content})
        message = r"test_batch: is not the official file; take it anew from cifar-10-python\.tar\.gz"
        with pytest.raises(UserError, match=message):
            load_dataset("cifar10", tmp_path)
    assert not mark.exists()
    pickle.loads(attack)  # it is a real one
    assert mark.exists()


@pytest.mark.parametrize("name", ["cifar-10-binary.tar.gz", "cifar-10-python.tar.gz"])
def test_only_the_official_archives_are_read(name: str, tmp_path: pathlib.Path) -> None:
    official = archive_files()[name]
    packed_again = pack("cifar-10-batches-bin", binary_files() | {"more": b""})
    for content in (b"", b"no gzip", official[:-1], official + b"\0", packed_again):
        write(tmp_path, {name: content})
        with pytest.raises(UserError, match=rf"{name}: is no official archive, or damaged" + TAKE_ANEW):
            load_dataset("cifar10", tmp_path)


@pytest.fixture
def server(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve the small binary archive under the URL and with the checksum that are set; yield the address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

    content = archive_files()["cifar-10-binary.tar.gz"]
    folder = write(tmp_path / "served", {"cifar-10-binary.tar.gz": content})
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=httpd.serve_forever, args=(0.02,))
    thread.start()
    address = f"http://127.0.0.1:{httpd.server_port}"
    monkeypatch.setattr(cifar10, "URL", f"{address}/cifar-10-binary.tar.gz")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield address
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.mark.parametrize("terminal", [False, True])
def test_download(
    server: str,
    terminal: bool,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    folder = tmp_path / "new" / "data"
    check(load_dataset("cifar10", folder))
    assert [path.name for path in folder.iterdir()] == ["cifar-10-batches-bin"]
    files = {path.name: path.read_bytes() for path in folder.glob("*/*")}
    assert files == binary_files() | {"readme.html": b"hello"}
    output = capsys.readouterr()
    assert output.out == ""
    assert ("100%" in output.err) == terminal
    monkeypatch.setattr(cifar10, "URL", "http://127.0.0.1:1/")
    check(load_dataset("cifar10", folder))  # not downloaded again


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    ("constant", "value", "reason"),
    [
        ("SHA256", {"cifar-10-binary.tar.gz": "0" * 64}, r"does not match the known hash: expected .*0{64}"),
        ("URL", "{server}/other.tar.gz", "404 Client Error: File not found"),
        ("URL", "http://127.0.0.1:1/x", "Connection refused"),
        ("URL", "file:///etc/hostname", "file"),
    ],
)
def test_failed_download(
    server: str,
    constant: str,
    value: str | dict[str, str],
    reason: str,
    existing: bool,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cifar10, constant, value.format(server=server) if isinstance(value, str) else value)
    folder = tmp_path / "new" / "data"
    if existing:
        write(folder, {"mine.txt": b"kept"})
    way_out = rf"put cifar-10-binary\.tar\.gz from https://.* into {folder}, or pass --data\.dir FOLDER"
    with pytest.raises(UserError, match=rf"could not download CIFAR-10 \(.*{reason}.*\): {way_out}") as caught:
        load_dataset("cifar10", folder)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "new").exists() == existing  # nothing is left behind
    assert [path.name for path in folder.glob("*")] == ["mine.txt"] * existing


def test_stopped_download_leaves_nothing(server: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pooch

    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pooch, "retrieve", stop)
    with pytest.raises(KeyboardInterrupt):
        load_dataset("cifar10", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_download_into_no_folder(server: str, tmp_path: pathlib.Path) -> None:
    write(tmp_path, {"file": b""})
    with pytest.raises(UserError, match=r"could not download CIFAR-10 .*Not a directory.*pass --data\.dir FOLDER"):
        load_dataset("cifar10", tmp_path / "file" / "data")


def test_download_without_pooch(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(UserError, match=r"needs pooch, of the extra \[download\]"):
        load_dataset("cifar10", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_real_data(cifar10_dir: pathlib.Path) -> None:
    dataset = load_dataset("cifar10", cifar10_dir)
    assert isinstance(dataset, Dataset)
    assert dataset.train.images.shape == (50_000, 32, 32, 3)
    assert np.bincount(dataset.train.labels).tolist() == [5000] * 10
    assert np.bincount(dataset.test.labels).tolist() == [1000] * 10
    mean = dataset.train.images.reshape(-1, 3).mean(0, dtype=np.float64)
    np.testing.assert_allclose(mean, (125.31, 122.95, 113.87), atol=0.01)  # R, G, B
    first = (cifar10_dir / "cifar-10-batches-bin" / "data_batch_1.bin").read_bytes()[:3073]
    assert dataset.train.labels[0] == first[0]
    assert tuple(dataset.train.images[0, 0, 0]) == (first[1], first[1025], first[2049])
