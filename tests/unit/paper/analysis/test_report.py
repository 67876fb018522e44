"""The report page shows the numbers of the records and the evaluation, and needs nothing else."""

import base64
import io
import json
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from resnet_jax.config import Config, ModelConfig, RunConfig, to_json
from resnet_jax.errors import UserError
from resnet_jax.paper.analysis.report import write_report

VOID = {"meta", "img", "br"}
NASTY = '<b>cat</b> & "dog" <script>'
START = {"kind": "start", "step": 0, "time": 1e9, "jax": "0.10.2", "devices": 2, "compile_seconds": 6.9}


class Node:
    """An element: tag, attributes, children (elements and strings)."""

    def __init__(self, tag, attributes=()):
        self.tag, self.attributes, self.children = tag, dict(attributes), []

    def find(self, tag, **attributes):
        """Return the elements below it with that tag and those attributes, in order."""
        found = []
        for child in self.children:
            if isinstance(child, Node):
                if child.tag == tag and attributes.items() <= child.attributes.items():
                    found.append(child)
                found += child.find(tag, **attributes)
        return found

    @property
    def text(self):
        texts = [child if isinstance(child, str) else child.text for child in self.children]
        return " ".join("".join(texts).split())

    def rows(self):
        """Return the texts of the cells of a table's body."""
        (body,) = self.find("tbody")
        return [[c.text for c in row.children if isinstance(c, Node)] for row in body.find("tr")]


class Tree(HTMLParser):
    """Builds Nodes; fails where elements are not well nested."""

    def __init__(self, page):
        super().__init__()
        self.open = [Node("document")]
        self.feed(page)
        self.close()
        assert [node.tag for node in self.open] == ["document"]

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs)), f"an attribute of {tag} is given twice"
        node = Node(tag, attrs)
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag, attrs):
        self.open[-1].children.append(Node(tag, attrs))

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.open[-1].children.append(data)


def make_evaluation(num_classes=5, count=80, size=8, step=200, **options):
    """Return random predictions for random images; class 3 has no images."""
    random = np.random.default_rng(0)
    labels = random.integers(0, num_classes, count).astype(np.int32)
    labels[labels == 3] = 4
    logits = random.normal(size=(count, num_classes))
    logits[np.arange(count), labels] += 1
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    wrong = probabilities.argmax(1) != labels
    counts = np.bincount(labels, minlength=num_classes)
    with np.errstate(invalid="ignore"):
        class_errors = 100 * np.bincount(labels, wrong, num_classes) / counts
    names = ("airplane", NASTY, *(f"class {i}" for i in range(2, num_classes)))
    test = SimpleNamespace(
        name="made up",
        class_names=names,
        labels=labels,
        ids=[f"{i}.png" for i in range(count)],
        images=list(random.integers(0, 256, (count, size, size, 3), np.uint8)),
    )
    fields = {
        "test": test, "probabilities": probabilities, "protocol": "10crop", "step": step, "count": 12_345,
        "top1_error": 100 * wrong.mean(), "top5_error": 5.0, "loss": 1.23456, "class_errors": class_errors,
    }  # fmt: skip
    return SimpleNamespace(**fields | options)


def make_workdir(path, records):
    path.mkdir()
    config = Config(model=ModelConfig(depth=56, shortcut="none"), run=RunConfig(steps=64_000, eval_every=250))
    (path / "config.json").write_text(to_json(config))
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def report(workdir, evaluation):
    path = workdir / "report.html"
    write_report(workdir, evaluation, path)
    return Tree(path.read_text("utf-8")).open[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A work directory with two sessions, under a name that HTML must not see; its evaluation; its page."""
    train = {"kind": "train", "loss": 1.0, "images": 12_800}
    records = [
        START,
        {**train, "step": 100, "time": 1e9 + 30, "error": 80.0, "learning_rate": 0.1, "images_per_second": 400.0},
        {"kind": "start", "step": 100, "time": 2e9, "jax": "0.11.0", "devices": 8, "XLA_FLAGS": "--x"},
        {**train, "step": 200, "time": 2e9 + 3700, "error": 61.237, "learning_rate": 0.01, "images_per_second": 1400.0},
        {"kind": "validation", "step": 200, "time": 2e9 + 3700, "error": 64.0, "loss": 2.0, "images": 5},
        {"kind": "test", "step": 200, "time": 2e9 + 3705, "error": 65.0, "loss": 2.0, "images": 40},
    ]
    path = make_workdir(tmp_path_factory.mktemp("run") / 'a <run> & "more"', records)
    evaluation = make_evaluation()
    return SimpleNamespace(workdir=path, evaluation=evaluation, page=report(path, evaluation))


@pytest.fixture
def workdir(tmp_path):
    """A run that has just begun, so that no curves take time."""
    return make_workdir(tmp_path / "begun", [START])


def section(page, heading):
    """Return the innermost element whose own child is that heading."""
    everything = page.find("section") + page.find("div")
    (found,) = [n for n in everything if any(isinstance(c, Node) and c.text == heading for c in n.children)]
    return found


def test_head_and_numbers(run):
    evaluation = run.evaluation
    assert run.page.find("title")[0].text == run.page.find("h1")[0].text == run.workdir.name
    (line,) = run.page.find("header")[0].find("p")
    assert line.text == "plain-56. Data set made up. 200 of 64,000 steps. Last record 2033-05-18 04:35 UTC."
    (numbers,) = run.page.find("dl")
    cards = {card.find("dt")[0].text: [dd.text for dd in card.find("dd")] for card in numbers.find("div")}
    assert cards == {
        "test error": [f"{evaluation.top1_error:.2f} %", "10 crops, after step 200"],
        "test loss": ["1.2346 nats", "mean cross-entropy"],
        "test images": ["12,345", "5 classes"],
        "training error": ["61.24 %", "average of 12,800 augmented images up to step 200"],
        "training speed": ["900 images/s", "median of 2 log records"],
        "training time": [
            "1 h 2 min",
            "2 sessions; with evaluations, without compiling",
        ],  # 30 s and 3,705 s: 62.25 min
    }


def test_curves_are_three_svg_without_common_ids(run):
    svgs = run.page.find("svg")
    assert len(svgs) == 3
    assert all(svg.attributes["viewbox"] == "0 0 360 259.2" for svg in svgs)
    everything = list(_walk(run.page))
    ids = [node.attributes["id"] for node in everything if "id" in node.attributes]
    assert len(ids) == len(set(ids)) > 50
    targets = [value for node in everything for name, value in node.attributes.items() if name.endswith("href")]
    assert targets
    assert {target.removeprefix("#") for target in targets} <= set(ids)
    clips = {url.split(")")[0] for url in (run.workdir / "report.html").read_text("utf-8").split("url(#")[1:]}
    assert clips
    assert clips <= set(ids)


def test_errors_by_class_and_confusions(run):
    evaluation = run.evaluation
    labels, predicted = evaluation.test.labels, evaluation.probabilities.argmax(1)
    (table,) = section(run.page, "Errors by class").find("table")
    assert len(table.rows()) == 5
    for i, row in enumerate(table.rows()):
        error = "no images" if i == 3 else f"{100 * np.mean(predicted[labels == i] != i):.2f} %"
        assert row == [evaluation.test.class_names[i], str(np.sum(labels == i)), error, ""]
    bars = [float(span.attributes["style"].removeprefix("width: ").removesuffix("%")) for span in table.find("span")]
    errors = np.delete(evaluation.class_errors, 3)
    np.testing.assert_allclose(bars, 100 * errors / errors.max(), atol=0.06)

    (matrix,) = section(run.page, "Confusions").find("table")
    assert [th.text for th in matrix.find("th", scope="col")] == list(evaluation.test.class_names)
    assert len(matrix.rows()) == 5
    for i, row in enumerate(matrix.rows()):
        counts = [str(np.sum((labels == i) & (predicted == j))) for j in range(5)]
        assert row == [evaluation.test.class_names[i], *counts]
    (body,) = matrix.find("tbody")
    for i, row in enumerate(body.find("tr")):
        for j, cell in enumerate(row.find("td")):
            assert cell.attributes["class"] == ("zero" if cell.text == "0" else "right" if i == j else "wrong")
            share = int(cell.text) / max(1, np.sum(labels == i))
            assert cell.attributes["style"] == f"--opacity: {round(0.8 * share**0.5, 3)}"


def test_worst_mistakes(run):
    evaluation = run.evaluation
    names, labels = evaluation.test.class_names, evaluation.test.labels
    top = evaluation.probabilities.max(1)
    predicted = evaluation.probabilities.argmax(1)
    worst = sorted(np.flatnonzero(predicted != labels), key=lambda i: -top[i])[:24]
    assert len(worst) == 24
    figures = run.page.find("figure")
    assert len(figures) == 24
    for i, figure in zip(worst, figures, strict=True):
        (img,) = figure.find("img")
        np.testing.assert_array_equal(_pixels(img), evaluation.test.images[i])
        assert img.attributes["class"] == "pixels"
        assert img.attributes["alt"] == f"Image {i}.png: {names[labels[i]]}, predicted {names[predicted[i]]}"
        true_probability = evaluation.probabilities[i, labels[i]]
        assert figure.text == (
            f"image {i}.pngpredicted {names[predicted[i]]} {100 * top[i]:.2f} %"
            f"true {names[labels[i]]} {100 * true_probability:.2f} %"
        )


def test_large_pictures_are_made_smaller(workdir):
    evaluation = make_evaluation(size=320)
    evaluation.test.images = [image[:200] for image in evaluation.test.images]
    img = report(workdir, evaluation).find("img")[0]
    assert _pixels(img).shape == (100, 160, 3)
    assert (img.attributes["width"], img.attributes["height"]) == ("160", "100")
    assert "class" not in img.attributes


def test_rounding_claims_no_certainty(workdir):
    evaluation = make_evaluation()
    evaluation.probabilities[:] = 1e-6 / 4
    evaluation.probabilities[:, 3] = 1 - 1e-6  # always wrong: class 3 has no images
    figure = report(workdir, evaluation).find("figure")[0]
    assert ">99.99 %" in figure.text
    assert "<0.01 %" in figure.text


def test_no_mistakes(workdir):
    evaluation = make_evaluation()
    evaluation.probabilities = np.eye(5)[evaluation.test.labels]
    page = report(workdir, evaluation)
    assert "No test image was classified wrongly." in page.text
    assert not page.find("img")


def test_configuration_and_environment(run):
    groups = {name: dict(section(run.page, name).find("table")[0].rows()) for name in ("model", "data", "optim", "run")}
    assert groups["model"]["depth"] == "56 (default 20)"
    assert groups["model"]["family"] == "cifar"
    assert groups["optim"]["boundaries"] == "32000 48000"
    assert groups["run"]["eval_every"] == "250 (default 1000)"
    changed = [row.find("th")[0].text for row in run.page.find("tr", **{"class": "changed"})]
    assert changed == ["depth", "shortcut", "eval_every"]

    assert section(run.page, "Training").find("table")[0].rows() == [
        ["began", "2001-09-09 01:46 UTC", "2033-05-18 03:33 UTC"],
        ["after step", "0", "100"],
        ["jax", "0.10.2", "0.11.0"],
        ["devices", "2", "8"],
        ["compile time (s)", "6.9", ""],
        ["XLA FLAGS", "", "--x"],
    ]
    versions = dict(section(run.page, "This report").find("table")[0].rows())
    assert versions["numpy"] == np.__version__


def test_page_stands_alone_and_names_are_escaped(run):
    text = (run.workdir / "report.html").read_text("utf-8")
    assert not run.page.find("script")
    assert "cat" not in [node.text for node in run.page.find("b")]
    assert NASTY not in text
    assert "<run>" not in text
    assert "@import" not in text
    for node in _walk(run.page):
        assert not any(name.startswith("on") for name in node.attributes)
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert node.attributes.get(name, "#").startswith(("#", "data:image/png;base64,"))
    assert all(url.startswith("#") for url in text.split("url(")[1:])
    assert run.page.find("meta", name="viewport")[0].attributes["content"] == "width=device-width, initial-scale=1"
    assert sorted(path.name for path in run.workdir.iterdir()) == ["config.json", "metrics.jsonl", "report.html"]


def test_the_same_run_gives_the_same_bytes(run, tmp_path):
    again = tmp_path / "again.html"
    write_report(run.workdir, run.evaluation, again)
    assert again.read_bytes() == (run.workdir / "report.html").read_bytes()


def test_imported_weights(workdir):
    (workdir / "metrics.jsonl").unlink()
    (workdir / "import.json").write_text('{"file": "plain56.th"}')
    page = report(workdir, make_evaluation(step=0))
    (line,) = page.find("header")[0].find("p")
    assert line.text == "plain-56. Data set made up. Weights imported from plain56.th, not trained here."
    assert not page.find("svg")
    assert [node.text for node in page.find("dt")] == ["test error", "test loss", "test images"]
    assert [node.text for node in page.find("h3")] == ["model", "data", "This report"]


def test_a_run_without_log_records_yet_has_no_curves(workdir):
    page = report(workdir, make_evaluation(step=0))
    assert "0 of 64,000 steps" in page.find("header")[0].text
    assert not page.find("svg")
    assert [node.text for node in page.find("h3")][-2:] == ["Training", "This report"]


def test_many_classes(workdir):
    evaluation = make_evaluation(num_classes=30, count=200)
    labels, predicted = evaluation.test.labels, evaluation.probabilities.argmax(1)
    page = report(workdir, evaluation)
    assert "The 20 worst of 30 classes." in section(page, "Errors by class").text
    (table,) = section(page, "Errors by class").find("table")
    errors = [float(row[2].removesuffix(" %")) for row in table.rows()]
    expected = np.sort(np.delete(evaluation.class_errors, 3))[::-1][:20]  # without the class that has no images
    np.testing.assert_allclose(errors, expected, atol=0.005)

    (table,) = section(page, "Confusions").find("table")
    rows = table.rows()
    assert len(rows) == 20
    names = list(evaluation.test.class_names)
    for true, guess, images, share in rows:
        count = np.sum((labels == names.index(true)) & (predicted == names.index(guess)))
        assert true != guess
        assert int(images) == count
        assert share == f"{100 * count / np.sum(labels == names.index(true)):.2f} %"
    images = [int(row[2]) for row in rows]
    assert images == sorted(images, reverse=True)
    assert "top-5 test error5.00 %10 crops, 30 classes" in page.find("dl")[0].text


@pytest.mark.parametrize("name", ["missing/report.html", "config.json/report.html", "folder"])
def test_what_cannot_be_written_is_one_line(workdir, name):
    (workdir / "folder").mkdir()
    with pytest.raises(UserError, match=r"^cannot write .*: \w[^\n]*$"):
        write_report(workdir, make_evaluation(), workdir / name)
    assert not list(workdir.glob("*.new"))


def _walk(node):
    for child in node.children:
        if isinstance(child, Node):
            yield child
            yield from _walk(child)


def _pixels(img):
    kind, data = img.attributes["src"].split(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
