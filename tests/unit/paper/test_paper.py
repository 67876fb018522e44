"""Every table and figure from made runs: what is printed, written and drawn is what the runs hold."""

import csv
import dataclasses
import io
import json
import re
import shlex

import matplotlib.image
import pytest

from resnet_jax.cli.commands import main
from resnet_jax.config import OptimConfig, to_json
from resnet_jax.errors import UserError
from resnet_jax.paper.analysis.responses import Responses
from resnet_jax.paper.items import NAMES
from resnet_jax.paper.make import make
from resnet_jax.paper.networks import NETWORKS
from resnet_jax.paper.runs import find_runs

DAY = 1_700_000_000  # 2023-11-14


def write_run(
    root, name, *, folder=None, seed=0, train=(), test=(), source=None, evaluations=(), optim=None, data=None
):
    """Write a work directory as training, import and eval.py would; `train` and `test` are (step, error) pairs."""
    config = NETWORKS[name].config
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, name=data or config.data.name))
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=seed), optim=optim or config.optim)
    workdir = root / (folder or name)
    (workdir / "checkpoints").mkdir(parents=True)
    (workdir / "config.json").write_text(to_json(config))
    if source:
        (workdir / "import.json").write_text(json.dumps({"file": source}))
    else:
        records = [{"kind": "start", "step": 0, "time": DAY, "platform": "gpu", "device": "H100", "devices": 2}]
        records += [
            {"kind": kind, "step": step, "time": DAY, "error": error, "images": 10_000, "learning_rate": 0.1}
            for kind, points in (("train", train), ("test", test))
            for step, error in points
        ]
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (workdir / "checkpoints" / str(max(step for step, _ in test))).mkdir()
    lines = [
        {
            "time": DAY if members else DAY + i, "platform": "cpu", "device": "Xeon", "devices": 1,
            "protocol": protocol, "data": config.data.name, "count": 10_000 if name.startswith("cifar") else 50_000,
            "members": [{"workdir": member, "step": 0, "scales": scales} for member in members or [str(workdir)]],
            "top1_error": top1, "top5_error": top5,
        }
        for i, (protocol, scales, top1, top5, members) in enumerate(evaluations)
    ]  # fmt: skip
    if lines:
        (workdir / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return workdir


SCALES = [224, 256, 384, 480, 640]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished, unfinished, imported and foreign runs."""
    root = tmp_path_factory.mktemp("runs")
    curve = [(16_000, 18.0), (32_000, 16.5), (48_000, 9.0), (64_000, 8.5)]
    write_run(root, "cifar10_resnet20", train=[(32_000, 15.0), (64_000, 2.0)], test=curve)
    write_run(root, "cifar10_resnet20", folder="published", source="resnet20.th",
              evaluations=[("single", [37], 8.27, 0.2, None)])  # fmt: skip
    write_run(root, "cifar10_resnet20", folder="slow", test=[(64_000, 1.0)], optim=OptimConfig(learning_rate=0.05))
    for seed, error in enumerate((6.4, 6.8, 6.6)):
        write_run(root, "cifar10_resnet110", folder=f"deep{seed}", seed=seed, train=[(64_000, 1.0)],
                  test=[(64_000, error)])  # fmt: skip
    write_run(root, "cifar10_resnet110", folder="begun", seed=3, train=[(900, 60.0)], test=[(1_000, 61.0)])
    write_run(root, "cifar10_plain20", train=[(64_000, 4.0)], test=[(64_000, 9.5)])
    write_run(root, "cifar10_plain56", train=[(64_000, 9.0)], test=[(64_000, 13.0)])
    write_run(root, "imagenet_plain18", train=[(300_000, 35.0)], test=[(600_000, 28.5)])
    ensemble = [str(root / "imagenet_resnet50"), str(root / "imagenet_resnet34B")]
    write_run(root, "imagenet_resnet50", source="resnet50.caffemodel", evaluations=[
        ("single", [256], 24.7, 7.8, None),
        ("10crop", [256], 22.9, 6.75, None),
        ("multiscale", SCALES, 20.8, 5.3, None),
        ("multiscale", [224, 256], 1.0, 1.0, None),  # not the paper's scales
        ("multiscale", SCALES, 19.0, 4.2, ensemble),
    ])  # fmt: skip
    write_run(root, "imagenet_resnet34B", source="resnet34.pth", evaluations=[
        ("multiscale", SCALES, 19.0, 4.2, ensemble)
    ])  # fmt: skip
    for name, stds in (
        ("cifar10_resnet20", [0.5, 0.3, 0.4]),
        ("cifar10_plain20", [1.0, 1.2, 0.9]),
        ("cifar10_plain56", [1.0, 0.9, 0.8, 0.7]),
    ):
        responses = Responses(64_000, 10_000, tuple(f"layer{i}" for i in range(len(stds))), tuple(stds))
        (root / name / "responses.json").write_text(json.dumps(dataclasses.asdict(responses)))
    return root


def rows_of(artefact, *labels):
    """Return the rows that begin with these cells, as dictionaries."""
    return [dict(zip(artefact.columns, row, strict=True)) for row in artefact.rows if row[: len(labels)] == labels]


def test_table6(runs):
    table = make("table6", runs, "data")
    trained, imported = rows_of(table, "ResNet", "20")
    assert trained == {
        "method": "ResNet", "layers": "20", "parameters, paper": "0.27M", "parameters, ours": "269,722",
        "error, paper": "8.75", "error, ours": "8.50", "runs": "1", "steps": "64,000", "device": "2 x H100",
        "date": "2023-11-14",
    }  # fmt: skip
    assert imported["error, ours"] == "8.27"
    assert imported["device"] == "1 core of Xeon"
    assert imported["steps"] == "imported from resnet20.th, not trained here"
    finished, begun = rows_of(table, "ResNet", "110")
    assert finished["error, ours"] == "6.40 (6.60 ± 0.20)"
    assert finished["runs"] == "3"
    ours = [row["parameters, ours"] for row in rows_of(table, "ResNet")]
    assert list(dict.fromkeys(ours)) == ["269,722", "464,154", "658,586", "853,018", "1,727,962", "19,421,274"]
    assert (begun["error, ours"], begun["steps"]) == ("61.00", "1,000 of 64,000")
    assert [row["error, ours"] for row in rows_of(table, "ResNet", "32")] == [""]
    assert [row["error, paper"] for row in rows_of(table, "Highway", "19")] == ["7.54 (7.72 ± 0.16)"]
    assert f"{runs / 'slow'} does not count: not the paper's recipe: optim.learning_rate is 0.05" in "".join(
        table.notes
    )
    root = shlex.quote(str(runs))
    assert list(map(str, table.commands)) == [
        f"python train.py configs/cifar10_resnet32.py --run.workdir {root}/cifar10_resnet32 --data.dir data",
        f"python train.py configs/cifar10_resnet44.py --run.workdir {root}/cifar10_resnet44 --data.dir data",
        f"python train.py configs/cifar10_resnet56.py --run.workdir {root}/cifar10_resnet56 --data.dir data",
        f"python train.py configs/cifar10_resnet110.py --run.workdir {root}/begun --run.seed 3 --data.dir data",
        f"python train.py configs/cifar10_resnet110.py --run.workdir {root}/cifar10_resnet110_seed4 --run.seed 4"
        " --data.dir data",
        f"python train.py configs/cifar10_resnet1202.py --run.workdir {root}/cifar10_resnet1202 --data.dir data",
    ]


def test_tables_of_imagenet(runs):
    table2, table3, table4 = (make(f"table{number}", runs) for number in (2, 3, 4))
    assert [row["top-1 error, paper"] for row in rows_of(table2)] == ["27.94", "27.88", "28.54", "25.03"]
    assert {row["top-1 error, ours"] for row in rows_of(table2)} == {""}
    (resnet50,) = rows_of(table3, "ResNet-50")
    assert [resnet50[f"top-{k} error, {who}"] for k in (1, 5) for who in ("paper", "ours")] == [
        "22.85", "22.90", "6.71", "6.75",
    ]  # fmt: skip
    (resnet50,) = rows_of(table4, "ResNet-50")
    assert [resnet50[f"top-{k} error, {who}"] for k in (1, 5) for who in ("paper", "ours")] == [
        "20.74", "20.80", "5.25", "5.30",
    ]  # fmt: skip
    commands = [str(command) for command in table3.commands]
    assert f"python eval.py {runs / 'imagenet_resnet34B'} --protocol 10crop" in commands
    train = f"python train.py configs/imagenet_resnet101.py --run.workdir {runs / 'imagenet_resnet101'}"
    alternative = f"python -m resnet_jax import FILE --model resnet101 --out {runs / 'imagenet_resnet101_imported'}"
    assert [command for command in commands if "101" in command] == [alternative, train]
    assert [command for command in commands if "vgg16" in command] == [
        f"python -m resnet_jax import FILE --model vgg16 --out {runs / 'imagenet_vgg16_imported'}"
    ]  # the paper does not train it
    assert not any("train.py" in command for command in commands if "34B" in command)  # imported
    assert not any("resnet50" in command for command in commands)
    assert [command.complete for command in table3.commands if "FILE" in command.arguments] == [False] * 6
    order = [command.arguments[1] for command in table2.commands if command.arguments[0] == "train.py"]
    assert order == [f"configs/imagenet_{name}.py" for name in ("resnet18", "plain34", "resnet34A")]


def test_networks_trained_on_imagenet(tmp_path):
    write_run(tmp_path, "imagenet_resnet50", train=[(1_000, 80.0)], test=[(5_000, 70.0)])
    write_run(tmp_path, "imagenet_resnet50", folder="imported", source="x.pth",
              evaluations=[("10crop", [256], 22.9, 6.75, None)])  # fmt: skip
    write_run(tmp_path, "imagenet_resnet101", test=[(600_000, 24.0)])
    table = make("table3", tmp_path)
    commands = [str(command) for command in table.commands]
    assert f"python train.py configs/imagenet_resnet50.py --run.workdir {tmp_path / 'imagenet_resnet50'}" in commands
    assert [command for command in commands if "101" in command] == [
        f"python eval.py {tmp_path / 'imagenet_resnet101'} --protocol 10crop"
    ]
    assert rows_of(table, "ResNet-101")[0]["top-1 error, ours"] == ""  # 24.0 is of single views


def test_tfds_in_any_version_is_imagenet(tmp_path):
    tfds = "tfds:imagenet2012:5.1.0"
    members = [str(tmp_path / "imagenet_resnet50"), str(tmp_path / "imagenet_resnet101")]
    write_run(tmp_path, "imagenet_resnet50", data=tfds, test=[(600_000, 24.0)], evaluations=[
        ("10crop", [256], 22.9, 6.75, None), ("multiscale", SCALES, 19.0, 4.2, members)
    ])  # fmt: skip
    (resnet50,) = rows_of(make("table3", tmp_path), "ResNet-50")
    assert resnet50["top-1 error, ours"] == "22.90"
    assert rows_of(make("table5", tmp_path), "ResNet (ILSVRC'15)")[0]["top-5 error, ours (validation)"] == "4.20"
    write_run(tmp_path, "imagenet_resnet50", folder="other", data="tfds:imagenet2012_subset", test=[(600_000, 24.0)])
    left_out = "imagenet 50, shortcut B, on tfds:imagenet2012_subset is not in the paper"
    assert any(left_out in note for note in make("table3", tmp_path).notes)


def test_the_top5_error_that_a_run_records_itself(tmp_path):
    workdir = write_run(tmp_path, "imagenet_resnet50", test=[(5_000, 70.0)])
    (run,) = find_runs(tmp_path).found
    assert run.result("single").top5_error is None  # of an older version
    records = (workdir / "metrics.jsonl").read_text()
    (workdir / "metrics.jsonl").write_text(records.replace('"error": 70.0', '"error": 70.0, "top5_error": 45.0'))
    (run,) = find_runs(tmp_path).found
    assert (run.result("single").top1_error, run.result("single").top5_error) == (70.0, 45.0)


def test_table5(runs, tmp_path):
    (row,) = rows_of(make("table5", runs), "ResNet (ILSVRC'15)")
    assert row["top-5 error, ours (validation)"] == "4.20"
    assert row["networks"] == "2: imagenet_resnet50, imagenet_resnet34B"
    empty = make("table5", tmp_path)
    assert rows_of(empty, "ResNet (ILSVRC'15)")[0]["top-5 error, ours (validation)"] == ""
    # Of 18, 34 (A, B, C), 50, 101 and 152 layers: to be imported or trained.
    assert [command.complete for command in empty.commands] == [False] * 7 + [True] * 7


def test_table1():
    table = make("table1", None)
    (conv2,) = rows_of(table, "conv2_x")
    assert conv2["output size"] == "56x56"
    assert conv2["18-layer"] == "3x3 max pool, stride 2; [3x3, 64; 3x3, 64] x2"
    assert rows_of(table, "conv1")[0]["34-layer"] == "7x7, 64, stride 2"
    assert rows_of(table, "conv4_x")[0]["152-layer"] == "[1x1, 256; 3x3, 256; 1x1, 1024] x36"
    assert rows_of(table, "FLOPs, ours")[0]["50-layer"] == "3,857,973,248"
    assert rows_of(table, "FLOPs, ours")[0]["34-layer"] == "3,644,493,824"
    assert rows_of(table, "parameters, ours")[0]["101-layer"] == "44,549,160"


def lines_of(axes):
    """Return {label or "": [(color, style, points)]}; only the first bold line of a network has a label."""
    lines = {}
    for line in axes.lines:
        label = "" if line.get_label().startswith("_") else line.get_label()
        points = [(round(x, 6), y) for x, y in line.get_xydata().tolist()]
        lines.setdefault(label, []).append((line.get_color(), line.get_linestyle(), points))
    return lines


def test_figure6_has_the_papers_axes(runs):
    figure = make("figure6", runs)
    left, middle, right = figure.figure.axes
    for axes in (left, middle, right):
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("iter. (1e4)", "error (%)")
        assert (axes.get_xlim(), axes.get_ylim()) == ((0, 6.4), (0, 20))
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["plain-20", "plain-56"]
    assert [text.get_text() for text in middle.get_legend().get_texts()] == ["ResNet-20", "ResNet-110"]
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["ResNet-110"]
    ((color, style, points),) = lines_of(middle)["ResNet-20"]
    assert (style, points) == ("-", [(1.6, 18.0), (3.2, 16.5), (4.8, 9.0), (6.4, 8.5)])  # bold: test error
    assert (color, "--", [(3.2, 15.0), (6.4, 2.0)]) in lines_of(middle)[""]  # dashed: training error
    assert len(middle.lines) == 2 + 4 * 2  # four runs of 110 layers
    assert figure.figure.get_suptitle() == ""
    assert ("ResNet-20", "64,000 of 64,000", "2.00", "8.50", "0", "2 x H100", "2023-11-14") in figure.rows
    assert not any("resnet110" in str(command) for command in figure.commands)  # one seed is enough


def test_figure1_and_figure4(runs):
    left, right = make("figure1", runs).figure.axes
    assert (left.get_ylabel(), right.get_ylabel()) == ("training error (%)", "test error (%)")
    assert lines_of(left)["plain-56"] == [("C3", "--", [(6.4, 9.0)])]
    assert lines_of(right)["plain-56"] == [("C3", "-", [(6.4, 13.0)])]
    left, right = make("figure4", runs).figure.axes
    assert left.get_xlim() == (0, 60)
    assert left.get_ylim() == (20, 60)
    assert lines_of(left)["plain-18"] == [("C0", "-", [(60, 28.5)])]
    assert [text.get_text() for text in right.texts] == ["no run"]
    commands = make("figure4", runs).commands
    assert [command.arguments[1] for command in commands] == [
        f"configs/imagenet_{name}.py" for name in ("resnet18", "plain34", "resnet34A")
    ]  # imported weights would have no curves


def test_unfinished_runs_are_marked(tmp_path):
    write_run(tmp_path, "cifar10_plain20", train=[(500, 60.0), (1_000, 50.0)], test=[(1_000, 55.0)])
    figure = make("figure6", tmp_path)
    caveat = "he first 1,000 of 64,000 steps only: not the paper's axes, no result"
    assert figure.figure.get_suptitle() == "T" + caveat
    assert any(caveat in note for note in figure.notes)
    axes = figure.figure.axes[0]
    assert (axes.get_xlabel(), axes.get_xlim(), axes.get_ylim()) == ("iter.", (0, 1000), (0, 100))
    assert figure.commands[0].arguments[:2] == ("train.py", "configs/cifar10_plain20.py")


def test_figure7_and_its_statements(runs):
    figure = make("figure7", runs)
    top, bottom = figure.figure.axes
    assert (top.get_xlabel(), bottom.get_xlabel()) == ("layer index (original)", "layer index (sorted by magnitude)")
    assert top.get_ylabel() == bottom.get_ylabel() == "std"
    ((_, style, points),) = lines_of(top)["plain-20"]
    assert (style, points) == ("--", [(1, 1.0), (2, 1.2), (3, 0.9)])
    assert lines_of(bottom)["plain-20"][0][2] == [(1, 1.2), (2, 1.0), (3, 0.9)]
    assert lines_of(bottom)["ResNet-20"][0][2] == [(1, 0.5), (2, 0.4), (3, 0.3)]
    (statement,) = [note for note in figure.notes if "responses" in note]
    assert "ResNets have generally smaller responses than their plain counterparts" in statement
    numbers = "mean over the layers 0.400 (resnet20), 1.033 (plain20), median 0.400, 1.000; smaller in 3 of 3 layers"
    assert statement.endswith(f"holds here: {numbers}.")
    assert f"python -m resnet_jax responses {runs / 'deep0'}" in map(str, figure.commands)
    assert not any("responses" in str(c) and "resnet20" in str(c) for c in figure.commands)
    path = runs / "cifar10_resnet20" / "responses.json"
    before = path.read_text()
    for stds, verdict in (("[9.0, 0.3, 0.4]", "holds in part here"), ("[9.0, 2.3, 0.4]", "does not hold here")):
        path.write_text(before.replace("[0.5, 0.3, 0.4]", stds))
        assert f"{verdict}: mean over the layers" in "".join(make("figure7", runs).notes)
    path.write_text(before)


@pytest.mark.parametrize("name", NAMES)
def test_the_command_writes_what_it_prints(name, runs, tmp_path, capsys):
    assert main(["paper", name, "--runs", str(runs), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    artefact = make(name, runs)
    assert printed.startswith(artefact.to_text())
    is_figure = name.startswith("figure")
    suffixes = ["csv", "md", "png", "svg"] if is_figure else ["csv", "md"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{name}.{suffix}" for suffix in suffixes]
    markdown = (tmp_path / "out" / f"{name}.md").read_text()
    assert markdown.startswith(f"# {artefact.title}\n")
    assert "| " + " | ".join(artefact.rows[-1]) + " |" in markdown
    assert all(f"    {command}\n" in markdown for command in artefact.commands)
    table = list(csv.reader(io.StringIO((tmp_path / "out" / f"{name}.csv").read_text())))
    assert len({len(row) for row in table}) == 1
    if not is_figure:
        assert table == [list(artefact.columns), *map(list, artefact.rows)]
        return
    assert f"![{artefact.title}]({name}.png)" in markdown
    assert table[1:] == list(map(list, artefact.points[1:]))
    pixels = matplotlib.image.imread(tmp_path / "out" / f"{name}.png")
    assert pixels.shape[1] > 1000
    assert pixels[..., :3].std() > 0.05  # something is drawn
    svg = (tmp_path / "out" / f"{name}.svg").read_text()
    assert svg.startswith("<?xml")
    for axes in artefact.figure.axes:
        assert re.search(rf"<!-- {re.escape(axes.get_xlabel())} -->", svg)
    (tmp_path / "again").mkdir()
    make(name, runs).write(tmp_path / "again")
    assert (tmp_path / "again" / f"{name}.svg").read_text() == svg  # the same runs make the same file


def test_no_runs(tmp_path):
    for name in NAMES:
        artefact = make(name, tmp_path)
        assert artefact.to_text()
        if name != "table1":
            assert artefact.commands
    with pytest.raises(UserError, match="no folder .*none: --runs must name"):
        make("table6", tmp_path / "none")


def test_a_damaged_work_directory_is_named_and_left_out(tmp_path):
    workdir = write_run(tmp_path, "cifar10_plain20", test=[(64_000, 9.0)])
    (workdir / "config.json").write_text("{")
    assert any(f"{workdir} does not count: " in note for note in make("table6", tmp_path).notes)


def test_two_runs_of_one_seed_and_evaluations_of_some_images_do_not_count(tmp_path):
    for folder, step in (("a", 32_000), ("b", 64_000), ("c", 64_000)):
        write_run(tmp_path, "cifar10_plain20", folder=folder, test=[(step, 9.0)])
    workdir = write_run(tmp_path, "imagenet_resnet50", source="x.pth", evaluations=[("10crop", [256], 1.0, 1.0, None)])
    records = (workdir / "evaluations.jsonl").read_text()
    (workdir / "evaluations.jsonl").write_text(records.replace("50000", "100"))
    figure, table = make("figure1", tmp_path), make("table3", tmp_path)
    assert [row[0] for row in figure.rows] == ["plain-20"]
    assert f"{tmp_path / 'a'} does not count: {tmp_path / 'b'} has the same seed" in figure.notes
    assert rows_of(table, "ResNet-50")[0]["top-1 error, ours"] == ""
    assert f"an evaluation of {workdir} does not count: 100 of 50,000 test images" in table.notes
