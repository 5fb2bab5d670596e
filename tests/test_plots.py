"""Pictures of a report: lines, colours and texts are what the numbers say."""

from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from dino_hf.evaluation import plots


@pytest.fixture
def figures(monkeypatch):
    """Figures instead of files."""
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **settings: saved.append(figure))
    return saved


def difference(name, value, is_shown):
    return SimpleNamespace(name=name, difference=value, interval=(value - 0.01, value + 0.01), is_shown=is_shown)


def test_better_is_blue_worse_is_orange_and_what_may_be_noise_is_grey(figures):
    rows = [difference("AP", 0.2, True), difference("AP50", -0.2, True), difference("AP75", 0.005, False)]
    comparison = SimpleNamespace(differences=rows, verdict="B is better", model_a="a", model_b="b" * 71)
    plots.save_comparison_plot("compare.png", comparison)
    [figure] = figures
    points = [line for line in figure.axes[0].lines if line.get_marker() not in ("None", "|")]
    colours = (plots.COLOURS[0], plots.COLOURS[1], plots._GREY)
    assert [to_rgba(point.get_color()) for point in points] == [to_rgba(colour) for colour in colours]
    assert [point.get_marker() for point in points] == ["o", "s", "D"]
    [title] = figure.texts
    assert title.get_text() == "B is better\nA: a\nB: …" + "b" * 69
    box = title.get_window_extent(FigureCanvasAgg(figure).get_renderer())
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width


@pytest.mark.parametrize(("length", "text"), [(5, "abcde"), (4, "…cde"), (3, "…de")])
def test_the_end_of_a_long_name_is_kept(length, text):
    assert plots.path_end("abcde", length) == text


@pytest.mark.parametrize(
    ("names", "turn"),
    [(["short", "names ok!"], 0), (["short", "ten letter"], 90), ([f"c{number}" for number in range(9)], 90)],
)
def test_names_of_columns_lie_flat_where_there_is_room(figures, names, turn):
    side = len(names) + 1
    evaluation = SimpleNamespace(
        confusion=np.arange(side**2).reshape(side, side), class_names=dict(enumerate(names)), threshold=0.3
    )
    plots.save_confusion("confusion.png", evaluation)
    labels = figures[0].axes[0].get_xticklabels()
    assert [label.get_text() for label in labels] == [*names, "missed"]
    assert {label.get_rotation() for label in labels} == {turn}


@pytest.mark.parametrize("num_classes", [plots._NUM_LABELLED, plots._NUM_LABELLED + 1, plots._NUM_LABELLED + 5])
def test_each_class_has_a_line(num_classes):
    axes = Figure().subplots()
    lines = np.arange(num_classes)[:, None] + np.zeros(3)
    ranks = np.append(np.linspace(1, 0, num_classes), np.nan)
    labels = [f"class {number}" for number in range(num_classes + 1)]
    plots._class_lines(axes, np.arange(3), np.concatenate([lines, lines[:1]]), labels, ranks)
    drawn = sorted(line.get_ydata()[0] for line in axes.lines if len(line.get_ydata()))
    assert drawn == list(range(num_classes))
    named = [text for text in axes.get_legend_handles_labels()[1] if text.startswith("class ")]
    assert len(named) == plots._NUM_LABELLED
    others = num_classes - plots._NUM_LABELLED
    assert (f"{others} classes in between" in axes.get_legend_handles_labels()[1]) is (others > 0)
    assert "without objects: 1" in axes.get_legend_handles_labels()[1]


@pytest.mark.parametrize(("samples", "label"), [([], "AP"), ([[0.5]], "AP, with 95 % bootstrap intervals over images")])
def test_intervals_are_named_where_there_are_any(samples, label):
    axes = Figure().subplots()
    plots._title_rows(axes, "title", "class", SimpleNamespace(samples=np.array(samples)))
    assert axes.get_xlabel() == label
