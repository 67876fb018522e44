"""Boxes of TFDS, as its builder of VOC writes them: the numbers of the files, from 1 on, by the size of the image."""

import numpy as np
import pytest
from voc_sets import write_image

from resnet_jax.config import Config, DataConfig
from resnet_jax.data.detection import load_annotated
from resnet_jax.data.sources import tfds_boxes
from resnet_jax.errors import UserError


def objects_of(boxes, labels, difficult, height, width):
    """What tensorflow_datasets.object_detection.voc yields of annotations."""
    bbox = [[y1 / height, x1 / width, y2 / height, x2 / width] for x1, y1, x2, y2 in boxes]
    return {
        "bbox": np.array(bbox, np.float32).reshape(-1, 4),
        "label": np.array(labels, np.int64),
        "is_difficult": np.array(difficult, bool),
    }


def test_boxes_are_those_of_the_files():
    boxes = [(48, 240, 195, 371), (8, 12, 352, 498), (1, 1, 353, 500)]
    found = tfds_boxes.annotation_of(objects_of(boxes, [11, 14, 2], [0, 0, 1], 500, 353), 500, 353)
    np.testing.assert_allclose(found.boxes, np.array(boxes) - 1, atol=1e-3)
    np.testing.assert_array_equal(found.classes, [11, 14, 2])
    np.testing.assert_array_equal(found.difficult, [False, False, True])


def test_an_empty_box_is_left_out_and_an_image_may_have_none():
    found = tfds_boxes.annotation_of(objects_of([(5, 5, 5, 9), (1, 1, 9, 9)], [0, 1], [0, 0], 20, 20), 20, 20)
    assert found.classes.tolist() == [1]
    assert found.problems == ("object 1: its box is empty",)
    assert tfds_boxes.annotation_of(objects_of([], [], [], 20, 20), 20, 20).boxes.shape == (0, 4)


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """Stand in for a prepared set of three splits of one image each."""
    records = {}
    for number, split in enumerate(("train", "validation", "test")):
        write_image(tmp_path, split, (40, 60), [("dog", (1, 1, 10 + number, 20), False)])
        content = (tmp_path / "JPEGImages" / f"{split}.jpg").read_bytes()
        objects = objects_of([(1, 1, 10 + number, 20)], [11], [False], 40, 60)
        records[split] = [{"image": content, "image/filename": f"00000{number}.jpg".encode(), "objects": objects}]

    class Builder:
        class info:
            splits = records
            features = None

    monkeypatch.setattr(tfds_boxes, "open_prepared", lambda name, data_dir, check: (tmp_path, Builder))
    monkeypatch.setattr(tfds_boxes, "open_source", lambda folder, split: records[split])
    monkeypatch.setattr(tfds_boxes, "_check_features", lambda name, features: tuple("abcdefghijklmnopqrst"))


def test_by_default_train_and_validation_are_trained_on(prepared):
    dataset = load_annotated(Config(data=DataConfig(name="tfds:voc/2007")))
    assert [dataset.train.id(i) for i in range(2)] == ["000000", "000001"]
    assert [dataset.test.id(0), len(dataset.test)] == ["000002", 1]
    np.testing.assert_allclose(dataset.train.annotations[1].boxes, [[0, 0, 10, 19]], atol=1e-3)
    assert dataset.train.read(0)[:2] == b"\xff\xd8"


def test_an_unknown_split_is_refused(prepared):
    with pytest.raises(UserError, match="no split trainval; there are: train, validation, test"):
        load_annotated(Config(data=DataConfig(name="tfds:voc/2007", train_sets=("trainval",))))
