"""Curves show what the records say."""

import json

import matplotlib.image
from matplotlib.figure import Figure

from resnet_jax.run.curves import plot_curves


def test_lines_labels_and_limits(tmp_path, monkeypatch):
    records = [
        {"kind": "start", "step": 0},
        {"kind": "train", "step": 10, "error": 80.0, "learning_rate": 0.1},
        {"kind": "train", "step": 20, "error": 60.0, "learning_rate": 0.01},
        {"kind": "test", "step": 20, "error": 65.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k)))
    path = plot_curves(tmp_path, "a run")
    (axes,) = figures[0].axes
    lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert list(lines) == ["train error", "test error"]
    assert lines["train error"].get_xydata().tolist() == [[10, 80], [20, 60]]
    assert lines["train error"].get_linestyle() == "--"  # as in Fig. 6
    assert lines["test error"].get_xydata().tolist() == [[20, 65]]
    assert [line.get_xdata()[0] for line in axes.lines if line.get_label().startswith("_")] == [10]  # rate changed
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("step", "error (%)", "a run")
    assert axes.get_ylim()[0] == 0
    assert path == tmp_path / "curves.png"
    assert matplotlib.image.imread(path).shape == (540, 840, 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]
