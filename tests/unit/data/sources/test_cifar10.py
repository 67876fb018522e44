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
import tarfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from resnet_jax.data import Dataset, cifar10, download, load_dataset
from resnet_jax.errors import UserError

RECORDS = 20  # a file, instead of 10,000
BATCHES = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
Files = dict[str, bytes]


@pytest.fixture(autouse=True)
def small_files(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have files of 20 records (except beside the real data), and never use the network."""
    if "cifar10_dir" not in request.fixturenames:
        monkeypatch.setattr(cifar10, "RECORDS_PER_FILE", RECORDS)
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


def todays_pickle(planes: np.ndarray, labels: np.ndarray, protocol: int = 4, **changes: Any) -> bytes:
    return pickle.dumps({b"data": planes, b"labels": labels.tolist()} | changes, protocol)


def text_keys(planes: np.ndarray, labels: np.ndarray) -> bytes:
    return pickle.dumps({"data": planes, "labels": labels})


def python_files(write: Callable[[np.ndarray, np.ndarray], bytes] = python2_pickle) -> Files:
    return {name: write(*batch(i)) for i, name in enumerate(BATCHES)}


def put(folder: pathlib.Path, files: Files) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def pack(folder: str, files: Files) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in ({"readme.html": b"hello"} | files).items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def check(dataset: Dataset) -> None:
    """Compare with `batch`, pixel by pixel and by its own arithmetic."""
    assert dataset.name == "cifar10"
    assert dataset.class_names[0] == "airplane"
    assert dataset.class_names[9] == "truck"
    assert dataset.num_classes == 10
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


def protocol(number: int) -> Callable[[np.ndarray, np.ndarray], bytes]:
    return functools.partial(todays_pickle, protocol=number)


@pytest.mark.parametrize(
    ("folder", "files"),
    [
        (".", binary_files),
        ("cifar-10-batches-bin", binary_files),
        (".", python_files),
        ("cifar-10-batches-py", python_files),
        (".", lambda: python_files(protocol(0))),
        (".", lambda: python_files(protocol(2))),
        (".", lambda: python_files(protocol(4))),
        (".", lambda: python_files(protocol(5))),
        (".", lambda: python_files(text_keys)),
    ],
)
def test_folders(folder: str, files: Callable[[], Files], tmp_path: pathlib.Path) -> None:
    put(tmp_path / folder, files())
    check(load_dataset("cifar10", str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "folder", "files"),
    [
        ("cifar-10-binary.tar.gz", "cifar-10-batches-bin", binary_files),
        ("cifar-10-python.tar.gz", "cifar-10-batches-py", python_files),
    ],
)
def test_archives(name: str, folder: str, files: Callable[[], Files], tmp_path: pathlib.Path) -> None:
    put(tmp_path, {name: pack(folder, files())})
    check(load_dataset("cifar10", tmp_path))
    check(load_dataset("cifar10", tmp_path / name))
    assert os.listdir(tmp_path) == [name]  # nothing is unpacked


def test_order(tmp_path: pathlib.Path) -> None:
    """The binary folder, then the python one, then archives; a damaged one is never passed over."""
    put(tmp_path, {"cifar-10-python.tar.gz": b"", "cifar-10-binary.tar.gz": b""})
    put(tmp_path / "cifar-10-batches-py", python_files())
    check(load_dataset("cifar10", tmp_path))
    (tmp_path / "cifar-10-batches-bin").mkdir()
    with pytest.raises(UserError, match=r"cifar-10-batches-bin/data_batch_1\.bin: expected 61,460 bytes, found none"):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "data_batch_1.bin",
            None,
            r"/data_batch_1\.bin: expected 61,460 bytes, found none; .*cifar-10-binary",
        ),
        ("test_batch.bin", None, r"/test_batch\.bin: expected 61,460 bytes, found none"),
        (
            "data_batch_3.bin",
            b"short",
            r"/data_batch_3\.bin: expected 61,460 bytes, found 5; .*cifar-10-binary",
        ),
        ("test_batch.bin", bytes(61_461), r"/test_batch\.bin: expected 61,460 bytes, found 61,461"),
        (
            "data_batch_2.bin",
            bytes(2 * 3073) + b"\x0a" + bytes(61_459 - 2 * 3073),
            r"_2\.bin: label 10 of image 2 ",
        ),
    ],
)
def test_damaged_binary(name: str, content: bytes | None, message: str, tmp_path: pathlib.Path) -> None:
    put(tmp_path, binary_files())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_dataset("cifar10", tmp_path)


PLANES, LABELS = batch(0)
MANY = python2_pickle(PLANES, LABELS)


class _Nested:
    """Pickles as a call of numpy.dtype, which refuses the argument."""

    def __reduce__(self) -> tuple[Any, ...]:
        return np.dtype, ("no such type",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (MANY[: len(MANY) // 2], "not a pickled CIFAR-10 batch"),
        (MANY[:-1], "not a pickled CIFAR-10 batch"),
        (b"", "not a pickled CIFAR-10 batch"),
        (b"garbage", "not a pickled CIFAR-10 batch"),
        (pickle.dumps([1, 2]), "not a pickled CIFAR-10 batch"),
        (pickle.dumps(_Nested()), "not a pickled CIFAR-10 batch"),
        (pickle.dumps({b"data": PLANES}), "KeyError: 'labels'"),
        (pickle.dumps({b"data": PLANES, b"fine_labels": [1]}), "KeyError: 'labels'"),
        (
            todays_pickle(PLANES[:19], LABELS),
            r"expected data uint8 \(20, 3072\) .*found data uint8 \(19, 3072\)",
        ),
        (todays_pickle(PLANES.astype(np.int16), LABELS), "found data int16"),
        (todays_pickle(PLANES, LABELS[:19]), r"found .* labels int64 \(19,\)"),
        (todays_pickle(PLANES, LABELS / 2), "found .* labels float64"),
        (pickle.dumps({b"data": PLANES, b"labels": [[1], [2, 3]]}), "not a pickled CIFAR-10 batch"),
        (todays_pickle(PLANES, LABELS - 20), r"label -\d+ of image 0 is outside 0\.\.9 \(20 such"),
        (None, "expected a file, found none"),
    ],
)
def test_damaged_pickle(content: bytes | None, message: str, tmp_path: pathlib.Path) -> None:
    put(tmp_path, python_files())
    if content is None:
        (tmp_path / "data_batch_4").unlink()
    else:
        (tmp_path / "data_batch_4").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_dataset("cifar10", tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "data_batch_4"))


def test_huge_pickle_is_not_read(tmp_path: pathlib.Path) -> None:
    put(tmp_path, python_files())
    with (tmp_path / "data_batch_5").open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    with pytest.raises(UserError, match=r"data_batch_5: expected at most 67,108,864 bytes, found 1,099,511,627,776"):
        load_dataset("cifar10", tmp_path)


class _Malicious:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_malicious_pickle(protocol: int, tmp_path: pathlib.Path) -> None:
    put(tmp_path, python_files())
    mark = tmp_path / "executed"
    attack = _Malicious(os.system, f"touch {mark}")
    content = pickle.dumps({b"data": attack, b"labels": [1]}, protocol)
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(UserError, match=r"test_batch: .*refused the pickled global posix\.system") as caught:
        load_dataset("cifar10", tmp_path)
    assert "cifar-10-python.tar.gz" in str(caught.value)
    assert not mark.exists()
    pickle.loads(content)  # the attack is a real one
    assert mark.exists()


@pytest.mark.parametrize("function", [eval, getattr, np.load, np.ndarray.tofile, __import__])
def test_refused_globals(function: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    content = pickle.dumps({b"data": function, b"labels": [1]})
    put(tmp_path, python_files(lambda planes, labels: content))
    with pytest.raises(UserError, match=r"data_batch_1: .*refused the pickled global"):
        load_dataset("cifar10", tmp_path)


def tar_with(info: tarfile.TarInfo, content: bytes = b"") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_archive_members_must_be_files(kind: bytes, tmp_path: pathlib.Path) -> None:
    target = put(tmp_path / "elsewhere", binary_files()) / "data_batch_1.bin"
    info = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
    info.type, info.linkname = kind, str(target)
    put(tmp_path, {"cifar-10-binary.tar.gz": tar_with(info)})
    with pytest.raises(UserError, match=r"tar\.gz \(.*/data_batch_1\.bin\): not a regular file"):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize("prefix", ["../", "/", "cifar-10-batches-bin/../"])
def test_archive_members_of_other_names(prefix: str, tmp_path: pathlib.Path) -> None:
    info = tarfile.TarInfo(f"{prefix}cifar-10-batches-bin/data_batch_1.bin")
    folder = put(tmp_path / "data", {"cifar-10-binary.tar.gz": tar_with(info, binary_files()["data_batch_1.bin"])})
    with pytest.raises(UserError, match=r"tar\.gz: has no cifar-10-batches-bin/data_batch_1\.bin"):
        load_dataset("cifar10", folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "cifar-10-binary.tar.gz"]


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content[:-4],
        lambda content: b"",
        lambda content: b"no gzip",
        flip,
        lambda content: content[:-8] + bytes(4) + content[-4:],  # the check sum
    ],
)
def test_damaged_archive(damage: Callable[[bytes], bytes], tmp_path: pathlib.Path) -> None:
    put(tmp_path, {"cifar-10-binary.tar.gz": damage(pack("cifar-10-batches-bin", binary_files()))})
    message = r"cifar-10-binary\.tar\.gz: truncated, damaged or no \.tar\.gz .*; take .* anew \(https://www\.cs\.tor"
    with pytest.raises(UserError, match=message):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_batch_2.bin": b"short"}, r"\(.*/data_batch_2\.bin\): expected 61,460 bytes, found 5"),
        (
            {"data_batch_2.bin": b"\xff" * 61_460},
            r"\(.*/data_batch_2\.bin\): label 255 of image 0 is outside",
        ),
    ],
)
def test_wrong_member(change: Files, message: str, tmp_path: pathlib.Path) -> None:
    put(tmp_path, {"cifar-10-binary.tar.gz": pack("cifar-10-batches-bin", binary_files() | change)})
    with pytest.raises(UserError, match=message):
        load_dataset("cifar10", tmp_path)


def test_archive_without_a_member(tmp_path: pathlib.Path) -> None:
    files = python_files()
    del files["data_batch_3"]
    put(tmp_path, {"cifar-10-python.tar.gz": pack("cifar-10-batches-py", files)})
    with pytest.raises(UserError, match=r"python\.tar\.gz: has no cifar-10-batches-py/data_batch_3; take it anew from"):
        load_dataset("cifar10", tmp_path)


def test_archive_that_unpacks_to_too_much(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "MAX_UNPACKED_BYTES", 100_000)
    put(tmp_path, {"cifar-10-binary.tar.gz": pack("cifar-10-batches-bin", binary_files())})
    with pytest.raises(UserError, match=r"tar\.gz: unpacks to more than 100,000 bytes"):
        load_dataset("cifar10", tmp_path)


@pytest.fixture
def server(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve the small binary archive under the URL and with the MD5 that are set; yield the address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

    content = pack("cifar-10-batches-bin", binary_files())
    folder = put(tmp_path / "served", {"cifar-10-binary.tar.gz": content})
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=httpd.serve_forever, args=(0.02,))
    thread.start()
    address = f"http://127.0.0.1:{httpd.server_port}"
    monkeypatch.setattr(cifar10, "URL", f"{address}/cifar-10-binary.tar.gz")
    monkeypatch.setattr(cifar10, "ARCHIVE_BYTES", len(content))
    monkeypatch.setattr(cifar10, "MD5", hashlib.md5(content).hexdigest())
    monkeypatch.setattr(cifar10, "SHA256", hashlib.sha256(content).hexdigest())
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
    assert {path.name: path.read_bytes() for path in folder.glob("*/*")} == binary_files()
    output = capsys.readouterr()
    assert output.out == ""
    assert ("CIFAR-10" in output.err) == terminal
    monkeypatch.setattr(cifar10, "URL", "http://127.0.0.1:1/")
    check(load_dataset("cifar10", folder))  # not downloaded again


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    ("constant", "value", "reason"),
    [
        ("MD5", "0" * 32, r"http://127.* of MD5 [0-9a-f]{32}, not 0{32}"),
        ("SHA256", "0" * 64, r"http://127.* of SHA256 [0-9a-f]{64}, not 0{64}"),
        ("URL", "{server}/other.tar.gz", "HTTP Error 404: File not found"),
        ("URL", "http://127.0.0.1:1/x", "Connection refused"),
        ("ARCHIVE_BYTES", 1000, "larger than 1,000 bytes"),
        ("ARCHIVE_BYTES", 1 << 30, r"the connection ended after [\d,]+ of 1,073,741,824 bytes"),
    ],
)
def test_failed_download(
    server: str,
    constant: str,
    value: str | int,
    reason: str,
    existing: bool,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cifar10, constant, value.format(server=server) if isinstance(value, str) else value)
    folder = tmp_path / "new" / "data"
    if existing:
        put(folder, {"mine.txt": b"kept"})
    way_out = rf"put cifar-10-binary\.tar\.gz from https://.* into {folder}, or pass --data\.dir FOLDER"
    message = rf"could not download CIFAR-10 \(.*{reason}.*\): {way_out}"
    with pytest.raises(UserError, match=message) as caught:
        load_dataset("cifar10", folder)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "new").exists() == existing  # nothing is left behind
    assert [path.name for path in folder.glob("*")] == ["mine.txt"] * existing


def test_stopped_download_leaves_nothing(server: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "_with_progress", stop)
    with pytest.raises(KeyboardInterrupt):
        load_dataset("cifar10", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_download_into_no_folder(server: str, tmp_path: pathlib.Path) -> None:
    put(tmp_path, {"file": b""})
    with pytest.raises(UserError, match=r"could not download CIFAR-10 .*Not a directory.*pass --data\.dir FOLDER"):
        load_dataset("cifar10", tmp_path / "file" / "data")


def test_official_constants() -> None:
    assert cifar10.MD5 == "c32a1d4ab5d03f1284b67883e8d87530"
    assert cifar10.SHA256.startswith("c4a38c50a1bc5f3a1c5537f2155ab9d6")
    assert cifar10.ARCHIVE_BYTES == 170_052_171
    assert cifar10.RECORD_BYTES == 3073


def test_real_data(cifar10_dir: pathlib.Path) -> None:
    dataset = load_dataset("cifar10", cifar10_dir)
    assert dataset.train.images.shape == (50_000, 32, 32, 3)
    assert dataset.test.images.shape == (10_000, 32, 32, 3)
    assert np.bincount(dataset.train.labels).tolist() == [5000] * 10
    assert np.bincount(dataset.test.labels).tolist() == [1000] * 10
    mean = dataset.train.images.reshape(-1, 3).mean(0, dtype=np.float64)
    np.testing.assert_allclose(mean, (125.31, 122.95, 113.87), atol=0.01)  # R, G, B
    path = cifar10_dir / "cifar-10-batches-bin" / "data_batch_1.bin"
    path_size = path.stat().st_size
    assert path_size == 30_730_000
    first = path.read_bytes()[:3073]
    assert dataset.train.labels[0] == first[0]
    assert tuple(dataset.train.images[0, 0, 0]) == (first[1], first[1025], first[2049])
