"""Properties of the readers: what was written is read back."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import pathlib
import struct
import tempfile
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from resnet_jax.config import Config, check_config, difference, from_json, to_json
from resnet_jax.convert.files import read_tensors
from resnet_jax.data import load_dataset, load_test_images
from resnet_jax.data.decode import BrokenImageError, decode, encode_raw
from resnet_jax.data.sources import cifar10
from resnet_jax.data.tools.pack import PackOptions, pack
from resnet_jax.data.tools.reencode import reencode
from resnet_jax.errors import UserError, printable
from resnet_jax.run.records import read_records


def folder() -> tempfile.TemporaryDirectory[str]:
    """A new folder: pytest's tmp_path is the same one for all examples of a test."""
    return tempfile.TemporaryDirectory(prefix="properties-")


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of a type of a configuration's field."""
    if hasattr(hint, "__metadata__"):
        return values(hint.__origin__)
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is tuple:
        inner = [argument for argument in get_args(hint) if argument is not ...]
        if len(inner) < len(get_args(hint)):
            return st.lists(values(inner[0]), max_size=5).map(tuple)
        return st.tuples(*map(values, inner))
    if args := [argument for argument in get_args(hint) if argument is not type(None)]:
        return st.none() | values(args[0])
    numbers = {int: st.integers(0, 2**33), float: st.floats(0, 1.2) | st.floats()}
    return {**numbers, bool: st.booleans(), str: st.text(max_size=20)}[hint]


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """A configuration with a few fields that are not the usual ones."""
    config = Config()
    for group in dataclasses.fields(Config):
        part = getattr(config, group.name)
        hints = get_type_hints(type(part))
        names = draw(st.lists(st.sampled_from(sorted(hints)), max_size=2, unique=True))
        part = dataclasses.replace(part, **{name: draw(values(hints[name])) for name in names})
        config = dataclasses.replace(config, **{group.name: part})
    return config


@given(configs())
@settings(max_examples=80)
def test_a_configuration_is_read_back_or_was_never_one(config: Config) -> None:
    try:
        check_config(config)
    except UserError:
        with pytest.raises(UserError, match="^here is not a configuration"):
            from_json(to_json(config), "here")
        return
    read = from_json(to_json(config), "here")
    assert read == config
    assert difference(read, config) is None
    assert to_json(read) == to_json(config)


RECORD = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["train", "test", "validation"]),
        "step": st.integers(0, 64_000),
        "time": st.floats(0, 2e9),
        "loss": st.floats(0, 1e6),
        "error": st.floats(0, 100),
        "images": st.integers(0, 10**9),
        "learning_rate": st.floats(0, 10),
        "images_per_second": st.floats(0, 1e6),
    }
)


@given(st.lists(RECORD, max_size=6), st.data())
def test_records_before_any_cut_are_all_there_in_order(records: list[dict[str, Any]], data: st.DataObject) -> None:
    lines = [(json.dumps(record) + "\n").encode() for record in records]
    content = b"".join(lines)
    cut = data.draw(st.integers(0, len(content)))
    tail = data.draw(st.sampled_from([b"", b"\0" * 100, b"\xff\xfe", b"\n{", b"[" * 5000, b"\n" + b"9" * 5000]))
    whole = 0
    while whole < len(lines) and sum(map(len, lines[: whole + 1])) - 1 <= cut:  # its newline may be missing
        whole += 1
    partial = content[:cut]
    if tail and partial and not partial.endswith(b"\n"):
        partial = partial[: partial.rfind(b"\n") + 1]
        whole = partial.count(b"\n")
    with folder() as temporary:
        (pathlib.Path(temporary) / "metrics.jsonl").write_bytes(partial + tail)
        assert read_records(pathlib.Path(temporary)) == records[:whole]


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0/\n\r\t "), min_size=1, max_size=20)
TENSORS = st.dictionaries(
    NAMES.filter(lambda name: name != "__metadata__" and not name.startswith("module.")),
    st.lists(st.integers(0, 4), max_size=3).map(lambda shape: np.arange(math.prod(shape), dtype="f4").reshape(shape)),
    max_size=4,
)


@given(TENSORS)
def test_safetensors_are_read_back(tensors: dict[str, np.ndarray]) -> None:
    with folder() as temporary:
        path = pathlib.Path(temporary, "x.safetensors")
        safetensors.numpy.save_file(tensors, path)
        read = read_tensors(path).arrays
    assert read.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(read[name], array)


@given(st.dictionaries(NAMES, st.sampled_from(["ant", "bee", "cow"]), min_size=1, max_size=6), st.booleans())
def test_label_files_are_read_back(labels: dict[str, str], tabs: bool) -> None:
    names = [f"{name}.png" for name in labels]
    assume(not any(name != name.strip() or name.startswith(("val/", "\ufeff", ".")) for name in names))
    lines = [f"{name}{chr(9) if tabs else ' '}{label}\n" for name, label in zip(names, labels.values(), strict=True)]
    assume(all(len(line.splitlines()) == 1 for line in lines))
    with folder() as temporary:
        root = pathlib.Path(temporary)
        for name in [f"train/{label}/x.png" for label in ("ant", "bee", "cow")] + [f"val/{name}" for name in names]:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b"")
        (root / "val.txt").write_text("".join(lines), encoding="utf-8")
        images = load_test_images("folder", root)
    found = {name: images.class_names[label] for name, label in zip(images.ids, images.labels, strict=True)}
    assert found == {printable(name): label for name, label in zip(names, labels.values(), strict=True)}


@given(st.lists(st.tuples(st.integers(0, 10), st.integers(0, 255)), min_size=12, max_size=12))
@example([(number % 10, 20 * number) for number in range(12)])
def test_cifar10_records_are_read_back_or_refused(records: list[tuple[int, int]]) -> None:
    """Six files of two records: a label and a value of all pixels."""
    names = [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]
    with folder() as temporary, pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar10, "RECORDS_PER_FILE", 2)
        for name, pair in zip(names, zip(records[::2], records[1::2], strict=True), strict=True):
            content = b"".join(bytes([label]) + bytes([value]) * 3072 for label, value in pair)
            pathlib.Path(temporary, name).write_bytes(content)
        if any(label > 9 for label, _ in records):
            with pytest.raises(UserError, match=r"is outside 0\.\.9"):
                load_dataset("cifar10", temporary)
            return
        dataset = load_dataset("cifar10", temporary)
    found = np.concatenate([dataset.train.labels, dataset.test.labels])  # type: ignore[union-attr]
    assert found.tolist() == [label for label, _ in records]
    assert dataset.train.images[:, 31, 5, 2].tolist() == [value for _, value in records[:10]]  # type: ignore[union-attr]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 255)), min_size=1, max_size=5))
@settings(max_examples=15)
def test_packed_images_are_read_back(sizes: list[tuple[int, int, int]]) -> None:
    expected = []
    with folder() as temporary:
        source, out = pathlib.Path(temporary, "in"), pathlib.Path(temporary, "out")
        for split in ("train", "val"):
            (source / split / "ant").mkdir(parents=True)
            for number, (height, width, value) in enumerate(sizes):
                file = io.BytesIO()
                Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(file, "PNG")
                (source / split / "ant" / f"{number}.png").write_bytes(file.getvalue())
                expected.append(file.getvalue())
        pack(source, out, PackOptions(format="raw"), shard_images=2)
        images: Any = load_dataset("folder", out).train
        assert len(images) == len(sizes)
        for number, (height, width, value) in enumerate(sizes):
            content, label = images.read(number)
            assert (content, label) == (reencode(expected[number], PackOptions(format="raw")), 0)
            np.testing.assert_array_equal(decode(content), np.full((height, width, 3), value, np.uint8))


@given(st.integers(0, 5), st.integers(0, 5), st.binary(max_size=80))
def test_raw_images_are_decoded_or_broken(height: int, width: int, content: bytes) -> None:
    data = b"RGB8" + struct.pack("<II", height, width) + content
    try:
        image = decode(data)
    except BrokenImageError:
        assert len(content) < 3 * height * width or 0 in (height, width)
    else:
        assert image.shape == (height, width, 3)
        assert encode_raw(image) == data[: 12 + 3 * height * width]
