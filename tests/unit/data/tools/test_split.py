"""`data split`: every image is in one of two splits, by seed, a share of each class."""

import pytest
from image_files import encoded, write

from resnet_jax.cli.commands import main
from resnet_jax.data import load_dataset
from resnet_jax.data.tools.split import split_folder
from resnet_jax.errors import UserError

COUNTS = {"ant": 10, "bee": 25, "cow": 2}


@pytest.fixture
def source(tmp_path):
    names = [f"{name}/{'deep/' * (i % 2)}{i}.png" for name, count in COUNTS.items() for i in range(count)]
    return write(tmp_path / "all", {name: encoded(name, format="PNG") for name in names})


def listed(folder):
    dataset = load_dataset("folder", folder)
    return [[images.id(i) for i in range(len(images))] for images in (dataset.train, dataset.test)]


@pytest.mark.parametrize("copy", [False, True])
def test_a_share_of_each_class_by_seed(tmp_path, source, copy, capsys):
    arguments = ["data", "split", str(source), "--test", "20", *(["--copy"] if copy else [])]
    assert main([*arguments, str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a'}: 29 images to train on, 8 to test on\n"
    train, val = listed(tmp_path / "a")
    assert [sum(name.startswith(label) for name in val) for label in COUNTS] == [2, 5, 1]
    everything = [path.relative_to(source).as_posix() for path in source.rglob("*.png")]
    assert sorted(train + val) == sorted(everything)
    for name in train:
        path = tmp_path / "a" / "train" / name
        assert path.read_bytes() == (source / name).read_bytes()
        assert path.is_symlink() is not copy
    split_folder(source, tmp_path / "again", test_percent=20)
    assert listed(tmp_path / "again") == [train, val]
    split_folder(source, tmp_path / "other", test_percent=20, seed=1)
    assert listed(tmp_path / "other") != [train, val]


def test_mistakes(tmp_path, source):
    with pytest.raises(UserError, match=f"{source} exists; choose another folder"):
        split_folder(source, source, test_percent=10)
    with pytest.raises(UserError, match="--test must be between 0 and 100; got 100"):
        main(["data", "split", str(source), str(tmp_path / "out"), "--test", "100"])
    write(source, {"dog/1.png": b""})
    with pytest.raises(UserError, match="the class dog has a single image"):
        split_folder(source, tmp_path / "out", test_percent=10)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=f"for {source}/CLASS/FILE: python -m resnet_jax data split {source} OUT"):
        load_dataset("folder", source)
