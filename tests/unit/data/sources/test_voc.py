"""Sets in the layout of VOC: what is read, what is left out and named, what is refused."""

import numpy as np
import pytest
from voc_sets import make_set, write_image, write_set

from resnet_jax.data.sources.voc import VOC_CLASSES, load_voc
from resnet_jax.errors import UserError


def load(folder, train=("trainval",), test=("test",)):
    return load_voc(folder, train, test)


def test_boxes_count_from_0_and_difficult_ones_are_marked(tmp_path):
    write_image(tmp_path, "a", (60, 80), [("dog", (1, 1, 10, 20), False), ("cat", (30, 5, 80, 60), True)])
    dataset = load(write_set(tmp_path, {"trainval": ["a"], "test": ["a"]}))
    annotation = dataset.train.annotations[0]
    np.testing.assert_array_equal(annotation.boxes, [[0, 0, 9, 19], [29, 4, 79, 59]])
    assert annotation.boxes.dtype == np.float32
    assert (annotation.height, annotation.width) == (60, 80)
    assert dataset.class_names == VOC_CLASSES
    assert [VOC_CLASSES[k] for k in annotation.classes] == ["dog", "cat"]
    np.testing.assert_array_equal(annotation.difficult, [False, True])
    assert dataset.problems == ()


def test_other_classes_are_sorted_by_name(tmp_path):
    assert load(make_set(tmp_path)).class_names == ("blue", "green", "red")


@pytest.mark.parametrize("devkit", ["", "VOCdevkit"])
def test_sets_of_several_years_are_joined(tmp_path, devkit):
    for year, ids in (("2007", ["000001", "000002"]), ("2012", ["2008_000001"])):
        folder = tmp_path / devkit / f"VOC{year}"
        for id in ids:
            write_image(folder, id, (50, 60), [("person", (1, 1, 20, 20), False)])
        write_set(folder, {"trainval": ids, "test": ids[:1]})
    dataset = load(tmp_path, ("2007_trainval", "2012_trainval"), ("2007_test",))
    assert [dataset.train.id(i) for i in range(3)] == ["000001", "000002", "2008_000001"]
    assert len(dataset.test) == 1


def test_a_folder_named_for_its_year_is_the_set_itself(tmp_path):
    folder = make_set(tmp_path / "VOC2007")
    assert len(load(folder, ("2007_trainval",), ("2007_test",)).train) == 8


@pytest.mark.parametrize(
    ("box", "problem"),
    [
        ((20, 10, 20, 30), "empty"),
        ((30, 10, 20, 30), "empty"),
        ((100, 10, 120, 30), "outside"),
        (("x", 10, 20, 30), "cannot be read"),
        (("nan", 10, 20, 30), "not finite"),
        (("", 10, 20, 30), "cannot be read"),
    ],
)
def test_a_wrong_box_is_left_out_and_named(tmp_path, box, problem):
    write_image(tmp_path, "a", (60, 80), [("dog", (1, 1, 10, 20), False)])
    xml = tmp_path / "Annotations" / "a.xml"
    sides = "".join(f"<{side}>{v}</{side}>" for side, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    wrong = f"<object><name>cat</name><bndbox>{sides}</bndbox></object></annotation>"
    xml.write_text(xml.read_text().replace("</annotation>", wrong))
    dataset = load(write_set(tmp_path, {"trainval": ["a"], "test": ["a"]}))
    assert len(dataset.train.annotations[0].boxes) == 1
    assert any(line.startswith("a: object 2 (cat)") and problem in line for line in dataset.problems)


def test_a_box_over_the_border_is_moved_into_the_image(tmp_path):
    write_image(tmp_path, "a", (60, 80), [("dog", (-5, 0, 90, 61), False)])
    dataset = load(write_set(tmp_path, {"trainval": ["a"], "test": ["a"]}))
    np.testing.assert_array_equal(dataset.train.annotations[0].boxes, [[0, 0, 79, 59]])


def test_an_image_without_objects_stays(tmp_path):
    write_image(tmp_path, "a", (60, 80), [])
    write_image(tmp_path, "b", (60, 80), [("dog", (1, 1, 10, 20), False)])
    dataset = load(write_set(tmp_path, {"trainval": ["a", "b"], "test": ["b"]}))
    assert [len(a.boxes) for a in dataset.train.annotations] == [0, 1]


@pytest.mark.parametrize("content", [None, "", "<annotation><size><width>80</width>", "<annotation></annotation>"])
def test_an_image_whose_annotation_cannot_be_read_is_left_out_and_named(tmp_path, content):
    for id in ("a", "b"):
        write_image(tmp_path, id, (60, 80), [("dog", (1, 1, 10, 20), False)])
    xml = tmp_path / "Annotations" / "a.xml"
    xml.unlink() if content is None else xml.write_text(content)
    dataset = load(write_set(tmp_path, {"trainval": ["a", "b"], "test": ["b"]}))
    assert [dataset.train.id(i) for i in range(len(dataset.train))] == ["b"]
    assert dataset.problems[0].startswith("a: cannot read its annotation")


def test_test_images_without_annotations_have_no_objects(tmp_path):
    """As those of VOC 2012 come, whose annotations only the test server has."""
    make_set(tmp_path / "VOC2007")
    make_set(tmp_path / "VOC2012")
    annotations = tmp_path / "VOC2012" / "Annotations"
    for path in annotations.iterdir():
        path.unlink()
    annotations.rmdir()
    dataset = load(tmp_path, ("2007_trainval",), ("2012_test",))
    assert [len(a.boxes) for a in dataset.test.annotations] == [0] * 8
    assert (dataset.test.annotations[0].height, dataset.test.annotations[0].width) == (72, 96)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (("trainvall",), ("test",), "did you mean trainval"),
        (("2007_trainval",), ("test",), "has no ImageSets"),
        (("trainval", "trainval"), ("test",), "more than once"),
        (("trainval",), (), "no set is named"),
        (("empty",), ("test",), "is empty"),
        (("outside",), ("test",), "no name of an image"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, train, test, message):
    make_set(tmp_path)
    write_set(tmp_path, {"empty": [], "outside": ["../a"]})
    with pytest.raises(UserError, match=message):
        load(tmp_path, train, test)


def test_a_class_that_only_test_images_have_is_refused(tmp_path):
    write_image(tmp_path, "a", (60, 80), [("red", (1, 1, 10, 20), False)])
    write_image(tmp_path, "b", (60, 80), [("green", (1, 1, 10, 20), False)])
    write_set(tmp_path, {"trainval": ["a"], "test": ["b"]})
    with pytest.raises(UserError, match="the class green"):
        load(tmp_path)
