"""Folders of images: what is listed and in which order, label files, and one clear line for whatever is wrong."""

from __future__ import annotations

import io
import os
import pathlib
import pickle
import shutil
from collections.abc import Callable

import pytest
from image_files import CLASSES, encoded, write, write_folder
from PIL import Image

from resnet_jax.data import StreamedDataset, load_dataset, load_test_images
from resnet_jax.data.decode import BrokenImageError, decode
from resnet_jax.data.sources.image_folder import ImageFolder, load_image_folder
from resnet_jax.data.types import EncodedImages
from resnet_jax.errors import UserError


def ids(images: EncodedImages) -> list[str]:
    return [images.id(index) for index in range(len(images))]


def contents(images: EncodedImages) -> list[tuple[str, tuple[bytes, int]]]:
    return [(images.id(index), images.read(index)) for index in range(len(images))]


def test_lists_by_class_and_name(tmp_path: pathlib.Path) -> None:
    jpeg = encoded("x")
    names = ["b/2.jpeg", "b/10.JPG", "b/1.png", "B/x.webp", "a/y.JPEG", "a/.DS_Store", "a/notes.txt", "a/.hidden.png"]
    write(tmp_path / "train", {name: name.encode() for name in names} | {".cache/x.png": b"", "README": b""})
    write(tmp_path / "elsewhere", {"z.png": b"linked"})
    (tmp_path / "train/a/link.tiff").symlink_to(tmp_path / "elsewhere/z.png")
    (tmp_path / "train/a/folder.png").mkdir()
    for name in "Bab":
        write(tmp_path / "val", {f"{name}/1.png": jpeg})
    dataset = load_dataset("folder", tmp_path)
    assert isinstance(dataset, StreamedDataset)
    assert (dataset.name, dataset.folder, dataset.class_names) == ("folder", tmp_path, ("B", "a", "b"))
    assert ids(dataset.train) == ["B/x.webp", "a/link.tiff", "a/y.JPEG", "b/1.png", "b/10.JPG", "b/2.jpeg"]
    assert dataset.train.labels.tolist() == [0, 1, 1, 2, 2, 2]
    assert dataset.train.labels.dtype == "int32"
    copy = pickle.loads(pickle.dumps(dataset.train))
    for images in (dataset.train, copy):
        assert images.read(0) == (b"B/x.webp", 0)
        assert images.read(1) == (b"linked", 1)
        assert images.read(5) == (b"b/2.jpeg", 2)
    assert ids(dataset.test) == ["B/1.png", "a/1.png", "b/1.png"]
    assert (load_test_images("folder", tmp_path).images[2] == decode(jpeg)).all()


def test_images_in_folders_of_a_class_are_of_the_class(tmp_path: pathlib.Path) -> None:
    names = [
        "ant/b.png",
        "ant/more/2.png",
        "ant/more/deep/1.jfif",
        "ant/a.jpe",
        "bee/all/here/x.pgm",
        "bee/all/.x/y.png",
    ]
    write(tmp_path, {f"{split}/{name}": name.encode() for name in names for split in ("train", "val")})
    (tmp_path / "train/ant/up").symlink_to("../..")
    (tmp_path / "train/ant/again").symlink_to("more")
    expected = ["ant/a.jpe", "ant/again/2.png", "ant/again/deep/1.jfif", "ant/b.png", "bee/all/here/x.pgm"]
    dataset = load_dataset("folder", tmp_path)
    assert isinstance(dataset, StreamedDataset)
    assert ids(dataset.test) == ["ant/a.jpe", "ant/b.png", "ant/more/2.png", "ant/more/deep/1.jfif", expected[4]]
    assert ids(dataset.train) == expected  # of the two names of a folder the first
    assert dataset.train.labels.tolist() == [0, 0, 0, 0, 1]
    assert dataset.train.read(4) == (b"bee/all/here/x.pgm", 1)


def test_images_are_turned_upright_in_every_split(tmp_path: pathlib.Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.new("RGB", (30, 20)).save(file, "JPEG", exif=exif)
    write(tmp_path, {f"{split}/{name}/1.jpeg": file.getvalue() for split in ("train", "val") for name in ("a", "b")})
    for upright, shape in ((False, (20, 30, 3)), (True, (30, 20, 3))):
        dataset = load_dataset("folder", tmp_path, upright=upright)
        assert isinstance(dataset, StreamedDataset)
        assert [decode(images.read(0)[0]).shape for images in (dataset.train, dataset.test)] == [shape, shape]
        assert load_test_images("folder", tmp_path, upright=upright).images[1].shape == shape


def test_classes_without_images_to_test_on(tmp_path: pathlib.Path) -> None:
    write_folder(tmp_path)
    shutil.rmtree(tmp_path / "val/bee")
    dataset = load_image_folder("folder", tmp_path)
    assert (dataset.class_names, dataset.untested) == (CLASSES, ("bee",))
    assert dataset.test.labels.tolist() == [0, 2]
    test = load_test_images("folder", tmp_path)
    assert (test.class_names, test.labels.tolist()) == (CLASSES, [0, 2])
    shutil.rmtree(tmp_path / "val/ant")
    shutil.rmtree(tmp_path / "val/cow")
    with pytest.raises(UserError, match=f"no images in {tmp_path}/val: expected"):
        load_image_folder("folder", tmp_path)


@pytest.mark.parametrize("name", ["valid", "validation", "test"])
def test_other_names_of_val(tmp_path: pathlib.Path, name: str) -> None:
    expected = contents(load_image_folder("folder", write_folder(tmp_path)).test)
    (tmp_path / "val").rename(tmp_path / name)
    assert contents(load_image_folder("folder", tmp_path).test) == expected
    (tmp_path / "val").mkdir()  # which is the first to be looked into
    with pytest.raises(UserError, match=f"no images in {tmp_path}/val"):
        load_image_folder("folder", tmp_path)


def test_any_file_name(tmp_path: pathlib.Path) -> None:
    write_folder(tmp_path)
    name = os.fsdecode(b"train/ant/\xff \xc3\xa9\n.jpeg")  # the first byte is not UTF-8
    write(tmp_path, {name: b"content"})
    train = load_image_folder("folder", tmp_path).train
    assert train.id(2) == "ant/\\xff é\\n.jpeg"
    assert train.read(2) == (b"content", 0)


def test_links_lead_anywhere(tmp_path: pathlib.Path) -> None:
    """Clusters link their data: a split, a class, an image, a label file, and the folder itself."""
    elsewhere = write_folder(tmp_path / "elsewhere")
    expected = load_image_folder("folder", elsewhere)
    for name in ("train", "val", "train/bee", "val/bee", "train/bee/1.jpeg", "val/bee/0.jpeg"):
        for relative in (False, True):
            root = write_folder(tmp_path / f"{name} {relative}".replace("/", "-"))
            path = root / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            path.symlink_to(os.path.relpath(elsewhere / name, path.parent) if relative else elsewhere / name)
            dataset = load_image_folder("folder", root)
            for images, of in ((dataset.train, expected.train), (dataset.test, expected.test)):
                assert contents(images) == contents(of)
    (tmp_path / "link").symlink_to(elsewhere)
    assert contents(load_image_folder("folder", tmp_path / "link").train) == contents(expected.train)
    flat = write_flat(tmp_path / "flat", {})
    write(tmp_path, {"labels": b"y.png ant\nz.JPEG cow\nx 1.jpeg bee\n"})
    (flat / "val.txt").symlink_to(tmp_path / "labels")
    assert load_image_folder("folder", flat).test.labels.tolist() == [1, 0, 2]


def test_loops_of_links(tmp_path: pathlib.Path) -> None:
    root = write_folder(tmp_path)
    (root / "train/bee/self.jpeg").symlink_to("self.jpeg")
    (root / "train/bee/up.jpeg").symlink_to("..")  # a folder
    (root / "train/loop").symlink_to("loop")
    (root / "train/ping").symlink_to("pong")
    (root / "train/pong").symlink_to("ping")
    (root / "train/cow/again").symlink_to("../..")
    train = load_image_folder("folder", root).train
    assert [name for name in ids(train) if name.startswith("bee")] == ["bee/0.jpeg", "bee/1.jpeg", "bee/self.jpeg"]
    assert len(train) == 7
    with pytest.raises(BrokenImageError, match="Too many levels of symbolic links"):
        train.read(ids(train).index("bee/self.jpeg"))


def test_a_file_that_is_gone(tmp_path: pathlib.Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "train/bee/1.jpeg").unlink()
    (tmp_path / "train/bee/1.jpeg").symlink_to(tmp_path / "nowhere")  # listed all the same, so that it is reported
    train = load_image_folder("folder", tmp_path).train
    assert ids(train)[3] == "bee/1.jpeg"
    with pytest.raises(BrokenImageError, match=r"^No such file or directory$"):
        train.read(3)
    (tmp_path / "val/bee/0.jpeg").unlink()
    (tmp_path / "val/bee/0.jpeg").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BrokenImageError, match="^No such file or directory$"):
        load_test_images("folder", tmp_path).images[1]


FLAT = {f"val/{name}": encoded(name) for name in ("x 1.jpeg", "y.png", "z.JPEG")}


def write_flat(root: pathlib.Path, files: dict[str, str]) -> pathlib.Path:
    write_folder(root, val=0)
    return write(root, FLAT | {name: content.encode() for name, content in files.items()})


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("val.txt", "y.png ant\nz.JPEG cow\nx 1.jpeg bee\n"),
        ("val.txt", "x 1.jpeg 1\r\n\r\ny.png 0\r\nz.JPEG 2"),
        ("val_labels.txt", "\ufeffval/x 1.jpeg\tbee\ny.png\tant\nz.JPEG\t2\ny.png ant\n"),
        (
            "LOC_val_solution.csv",
            "ImageId,PredictionString\nz,cow 1 2 3 4 \nx 1,bee 1 1 1 1 bee 2 2 2 2 \ny,ant 0 0 0 0\n",
        ),
    ],
)
def test_label_file(tmp_path: pathlib.Path, file: str, content: str) -> None:
    dataset = load_dataset("imagenet", write_flat(tmp_path, {file: content}))
    assert isinstance(dataset, StreamedDataset)
    assert ids(dataset.test) == ["x 1.jpeg", "y.png", "z.JPEG"]
    assert dataset.test.labels.tolist() == [1, 0, 2]
    assert dataset.test.read(0) == (FLAT["val/x 1.jpeg"], 1)
    shutil.rmtree(tmp_path / "train")  # for testing alone the label file has to name the classes
    test = load_test_images("imagenet", tmp_path)
    numbers = "x 1.jpeg 1" in content
    assert test.class_names == (("0", "1", "2") if numbers else ("2", "ant", "bee") if "\t2" in content else CLASSES)


def test_a_class_whose_name_is_a_number(tmp_path: pathlib.Path) -> None:
    write(tmp_path, {"train/1/a.png": b"", "train/2/a.png": b"", "val/a.png": b"", "val/b.png": b""})
    write(tmp_path, {"val.txt": b"a.png 1\nb.png 2\n"})
    assert load_image_folder("folder", tmp_path).test.labels.tolist() == [0, 1]


def test_kaggle_archive(tmp_path: pathlib.Path) -> None:
    """Its table lies three folders above the images."""
    root = write_flat(tmp_path / "ILSVRC/Data/CLS-LOC", {})
    write(tmp_path, {"LOC_val_solution.csv": b"ImageId,PredictionString\ny,ant 1\nx 1,bee 1\nz,cow 1\n"})
    assert load_image_folder("imagenet", root).test.labels.tolist() == [1, 0, 2]


def test_testing_on_a_part(tmp_path: pathlib.Path) -> None:
    write_folder(tmp_path)
    shutil.rmtree(tmp_path / "val/ant")
    test = load_test_images("folder", tmp_path)
    assert (test.name, test.class_names, test.labels.tolist()) == ("folder", CLASSES, [1, 2])
    shutil.rmtree(tmp_path / "train")
    test = load_test_images("folder", tmp_path)
    assert (test.class_names, test.labels.tolist(), test.ids) == (("bee", "cow"), [0, 1], ("bee/0.jpeg", "cow/0.jpeg"))


Change = Callable[[pathlib.Path], object]


def remove(*names: str) -> Change:
    return lambda root: [shutil.rmtree(root / name) for name in names]


def add(**files: str) -> Change:
    return lambda root: write(root, {name: content.encode() for name, content in files.items()})


def empty(name: str, *others: str) -> Change:
    def change(root: pathlib.Path) -> None:
        shutil.rmtree(root / name)
        (root / name).mkdir()
        write(root / name, dict.fromkeys(others, b""))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("train", "val"), r"no folder {root}/train: the data folder must hold train/CLASS/FILE"),
        (remove("train"), r"no folder {root}/train: "),
        (remove("val"), r"no folder {root}/val: --data.dir must name the folder that holds val/CLASS/FILE"),
        (empty("train"), r"no images in {root}/train: expected {root}/train/CLASS/FILE"),
        (empty("train", "a.png"), r"no images in {root}/train: expected {root}/train/CLASS/FILE"),
        (empty("val"), r"no images in {root}/val: expected"),
        (empty("train/bee"), r"no images of the class bee in {root}/train: delete the folder"),
        (empty("train/cow", "a.txt", ".b.png"), r"class cow in {root}/train \(its files are none of \.bmp \.gif"),
        (
            lambda root: [empty("train/ant")(root), empty("train/cow")(root)],
            r"class ant and of 1 more classes in {root}/train: delete the folder if there is no such class",
        ),
        (add(**{"val/dog/1.png": ""}), r"{root}/val/dog: there is no such class in {root}/train \(1 in all\)"),
        (add(**{"train/1.png": "", "train/0.png": ""}), r"{root}/train/0.png lies beside the folders .*\(2 such"),
        (add(**{"val/1.png": ""}), r"{root}/val/1.png lies beside the folders of the classes \(1 such"),
    ],
)
def test_wrong_folder(tmp_path: pathlib.Path, change: Change, message: str) -> None:
    change(write_folder(tmp_path))
    with pytest.raises(UserError, match=message.format(root=tmp_path)) as caught:
        load_dataset("imagenet", tmp_path)
    assert "\n" not in str(caught.value)


GOOD = "x 1.jpeg bee\ny.png ant\nz.JPEG cow\n"
KAGGLE = "ImageId,PredictionString\n"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("other.txt", GOOD, r"{root}/val holds images without folders of classes: put their labels into {root}/val"),
        ("val.txt", GOOD + "y.png\n", r"{root}/val.txt, line 4: expected FILE LABEL, found 'y.png'"),
        ("val.txt", GOOD + "y.png be\n", r"{root}/val.txt, line 4: unknown class 'be'; did you mean bee\?"),
        ("val.txt", GOOD + "y.png 3\n", r"{root}/val.txt, line 4: class 3 is outside 0\.\.2"),
        ("val.txt", GOOD + "y.png -1\n", r"{root}/val.txt, line 4: unknown class '-1'"),
        ("val.txt", GOOD + "y.png 1\n", r"val.txt, line 4: 'y.png' is of class '1', but a line before says 'ant'"),
        ("val.txt", GOOD + "q.png ant\n", r"{root}/val.txt, line 4: there is no image 'q.png' in {root}/val"),
        ("val.txt", GOOD[:-12], r"{root}/val.txt has no line for {root}/val/z.JPEG \(1 of 3 images have none\)"),
        ("val.txt", "", r"{root}/val.txt has no line for {root}/val/x 1.jpeg \(3 of 3"),
        ("LOC_val_solution.csv", GOOD, r"LOC_val_solution.csv, line 1: expected ImageId,PredictionString, found 'x 1"),
        ("LOC_val_solution.csv", KAGGLE + "y,ant 1\nz\n", r"csv, line 3: expected ImageId,PredictionString, found 'z'"),
        ("LOC_val_solution.csv", KAGGLE + "y.png,ant 1\n", r"csv, line 2: there is no image 'y.png' in {root}/val"),
        ("LOC_val_solution.csv", KAGGLE + "y,ant 1\ny,bee 1\n", r"line 3: 'y' is of class 'bee', but .* says 'ant'"),
    ],
)  # fmt: skip
def test_wrong_label_file(tmp_path: pathlib.Path, file: str, content: str, message: str) -> None:
    write_flat(tmp_path, {file: content})
    with pytest.raises(UserError, match=message.format(root=tmp_path)) as caught:
        load_dataset("imagenet", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_number_of_classes_that_would_fill_the_memory(tmp_path: pathlib.Path) -> None:
    write_flat(tmp_path, {"val.txt": GOOD.replace("bee", "0").replace("cow", "1").replace("ant", "999999999999")})
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(UserError, match=r"val.txt: class 999999999999 is beyond the 100,000 that there can be"):
        load_test_images("imagenet", tmp_path)


def test_the_index_of_many_names_is_small() -> None:
    """A hundredth of ImageNet's 1,281,167: its strings would take six times as much."""
    names = ((i // 13, f"n{i // 13:08}/n{i // 13:08}_{i}.JPEG") for i in range(12_811))
    images = ImageFolder.of(pathlib.Path("/imagenet/train"), names)
    assert images.id(12_810) == "n00000985/n00000985_12810.JPEG"
    assert images.labels[[0, 12, 13, 12_810]].tolist() == [0, 0, 1, 985]
    assert len(pickle.dumps(images)) < 12_811 * 45  # each process that reads gets one
