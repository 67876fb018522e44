"""`data check`: what it counts, what it complains of, and its exit codes."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
from image_files import CLASSES, encoded, write, write_folder
from paths import SHARED
from PIL import Image

from resnet_jax.cli.commands import main
from resnet_jax.data.tools.check import check
from resnet_jax.data.tools.pack import pack
from resnet_jax.data.tools.reencode import PackOptions
from resnet_jax.errors import UserError

SAMPLE = SHARED / "data" / "imagenet_sample"
KINDS = (
    "unreadable", "empty", "cmyk", "grey", "deep", "transparent", "turned", "other_format", "damaged_shards",
    "left_out",
)  # fmt: skip
NOTHING: dict[str, Any] = {**{kind: [] for kind in KINDS}, "ignored": {}}

UNREADABLE = ["ant/cut.jpeg", "ant/empty.jpg", "ant/text.png", "cow/gone.jpeg"]


def write_mixed(root: pathlib.Path) -> pathlib.Path:
    """Write a folder with one of everything."""
    write_folder(root)
    odd = {
        "ant/cut.jpeg": encoded("cut", 50, 50)[:-100],
        "ant/empty.jpg": b"",
        "ant/text.png": b"no image",
        "bee/cmyk.JPEG": encoded("cmyk", 64, 30, mode="CMYK"),
        "bee/grey.jpeg": encoded("grey", 12, 13, mode="L"),
        "bee/grey.png": encoded("grey", mode="LA", format="PNG"),
        "cow/link.jpeg": encoded("png", 30, 48, format="PNG"),
        "cow/palette.gif": encoded("gif", mode="P", format="GIF"),
        "cow/alpha.tif": encoded("tif", mode="RGBA", format="TIFF"),
    }
    write(root / "train", odd)
    (root / "train/cow/gone.jpeg").symlink_to("nowhere")
    return write(root, {"val/ant/picture.JPEG": encoded("two", format="MPO")})


def test_finds_everything(tmp_path: pathlib.Path) -> None:
    report = check(write_mixed(tmp_path))
    assert not report.readable
    assert (report.folder, report.kind, report.class_names) == (str(tmp_path), "folder", CLASSES)
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["readable"] is False
    reasons = [finding.pop("detail") for finding in plain["splits"]["train"]["unreadable"]]
    assert reasons[0].startswith("image file is truncated")
    assert reasons[1:] == ["the file is empty", "no image", "No such file or directory"]
    assert plain["splits"] == {
        "train": NOTHING | {
            "images": 16,
            "per_class": [5, 5, 6],
            "smallest": [12, 13],
            "largest": [64, 48],
            "unreadable": [{"id": name} for name in UNREADABLE],
            "empty": [{"id": "ant/empty.jpg", "detail": ""}],
            "cmyk": [{"id": "bee/cmyk.JPEG", "detail": ""}],
            "grey": [{"id": "bee/grey.jpeg", "detail": ""}, {"id": "bee/grey.png", "detail": ""}],
            "transparent": [{"id": "bee/grey.png", "detail": ""}, {"id": "cow/alpha.tif", "detail": ""}],
            "other_format": [{"id": "cow/link.jpeg", "detail": "PNG"}],
        },
        "val": NOTHING | {"images": 4, "per_class": [1, 1, 2], "smallest": [20, 16], "largest": [20, 16]},
    }  # fmt: skip


def test_text_and_exit_code(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mixed(tmp_path)
    write(tmp_path / "train/bee", {f"{i:02}.png": encoded("x", mode="L") for i in range(12)})
    assert main(["data", "check", str(tmp_path), "--workers", "1"]) == 1
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert lines[3].startswith("train: 28 images, 5 to 17 of a class (median 6)")
    del lines[6]  # how truncated it is
    greys = ", ".join(f"bee/{i:02}.png is JPEG" for i in range(10))
    assert lines == [
        f"{tmp_path}: a folder of images",
        "3 classes: ant, bee, cow",
        "",
        "train: 28 images, 5 to 17 of a class (median 6)",
        "  12 to 64 pixels wide, 13 to 48 high",
        "  4 cannot be read:",
        "    train/ant/empty.jpg: the file is empty",
        "    train/ant/text.png: no image",
        "    train/cow/gone.jpeg: No such file or directory",
        "  1 of these are empty files: ant/empty.jpg",
        "  1 in CMYK, converted to RGB when they are read: bee/cmyk.JPEG",
        f"  14 grey, converted to RGB when they are read: {greys.replace(' is JPEG', '')}, and 4 more",
        "  2 with transparent pixels, which show white: bee/grey.png, cow/alpha.tif",
        f"  13 of another format than the name says, which does not matter: {greys}, and 3 more",
        "",
        "val: 4 images, 1 to 2 of a class (median 1)",
        "  20 to 20 pixels wide, 16 to 16 high",
    ]


def test_what_cameras_and_microscopes_write_and_what_is_no_image(tmp_path: pathlib.Path) -> None:
    write_folder(tmp_path)
    folder, exif = tmp_path / "train/ant/more", Image.Exif()
    write(folder, {"a.heic": b"", "b.heic": b"", "c.avif": b"", "README": b"", ".hidden": b""})
    exif[0x0112] = 6
    Image.new("RGB", (20, 30)).save(folder / "turned.jpeg", exif=exif)
    Image.fromarray(np.zeros((20, 30), np.uint16)).save(folder / "deep.png")
    Image.fromarray(np.zeros((20, 30), np.float32)).save(folder / "float.tiff")
    report = check(tmp_path)
    train = report.splits["train"]
    assert train.ignored == {".heic": 2, ".avif": 1, "without an ending": 1}
    assert "  ignored: 2 .heic, 1 .avif, 1 without an ending" in report.to_text().splitlines()
    named = {kind: [finding.id for finding in found] for kind, found in train.findings.items() if found}
    assert named == {
        "unreadable": ["ant/more/float.tiff"],
        "grey": ["ant/more/deep.png"],
        "deep": ["ant/more/deep.png"],
        "turned": ["ant/more/turned.jpeg"],
    }


def test_json_and_no_val(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path, val=0)
    assert main(["data", "check", str(tmp_path), "--json", "--workers", "1"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    content = json.loads(line)
    assert content["readable"] is True
    assert list(content["splits"]) == ["train"]
    assert main(["data", "check", str(tmp_path), "--workers", "1"]) == 0
    assert capsys.readouterr().out.endswith("\n\nval: not there; training needs images to test on\n")


def test_packed(tmp_path: pathlib.Path) -> None:
    write_mixed(tmp_path / "in")
    out = tmp_path / "out"
    pack(tmp_path / "in", out, PackOptions(), shard_images=4)
    report = check(out)
    assert report.readable
    assert report.kind == "packed"
    plain = report.to_dict()["splits"]
    left_out = [finding["id"] for finding in plain["train"].pop("left_out")]
    assert left_out == UNREADABLE
    assert plain["train"] == {
        **{kind: nothing for kind, nothing in NOTHING.items() if kind != "left_out"},
        "images": 12, "per_class": (2, 5.0, 5), "smallest": (12, 13), "largest": (64, 48),
    }  # fmt: skip

    # One byte of an image is changed, and one behind all images of another shard.
    first, second = (out / f"train-0000{i}-of-00004.array_record" for i in (1, 2))
    content = first.read_bytes()
    at = content.index(encoded("train/bee/1.jpeg"))
    undamaged = content
    first.write_bytes(content[: at + 50] + bytes([content[at + 50] ^ 1]) + content[at + 51 :])
    content = second.read_bytes()
    padding = content.rindex(bytes(1000)) + 500
    second.write_bytes(content[:padding] + b"\x01" + content[padding + 1 :])
    report = check(out)
    assert [finding.id for finding in report.splits["train"].findings["damaged_shards"]] == [first.name, second.name]
    assert [finding.id for finding in report.splits["train"].findings["unreadable"]] == ["bee/1.jpeg"]
    assert f"    train/{first.name}: its SHA-256 is not that of the manifest" in report.to_text().splitlines()
    first.write_bytes(undamaged)
    report = check(out)
    assert not report.splits["train"].findings["unreadable"]
    assert not report.readable  # all the same


def test_a_wrong_folder(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=f"no folder {tmp_path}/train"):
        main(["data", "check", str(tmp_path)])
    write_folder(tmp_path)
    shutil.rmtree(tmp_path / "train/bee")
    with pytest.raises(UserError, match=f"{tmp_path}/val/bee: there is no such class in {tmp_path}/train"):
        main(["data", "check", str(tmp_path)])
    with pytest.raises(UserError, match="--workers must be at least 1; got -1"):
        main(["data", "check", str(tmp_path), "--workers", "-1"])


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the ImageNet photographs (../shared/data) are not here")
def test_photographs() -> None:
    train = check(SAMPLE).splits["train"]
    assert (train.images, train.per_class) == (100, (1, 1, 1))
    assert [finding.id for finding in train.findings["grey"]] == ["n03908714/n03908714_pencil_sharpener.JPEG"]
    assert not train.findings["unreadable"]
    assert not train.findings["other_format"]
