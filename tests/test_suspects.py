"""Pictures of the doctor: each suspicious box is drawn where the files put it, with its name; histograms have the counts."""

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from broken_data import CASES, as_raw, break_data, make_data
from dino_hf.doctor import suspects
from dino_hf.doctor.checks import inspect
from dino_hf.doctor.suspects import save_histograms, save_suspects

BLUE, VERMILION, GREEN = "#0072b2", "#d55e00", "#009e73"


@pytest.fixture
def figures(monkeypatch):
    """Those that are saved."""
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (saved.append(self), save(self, *args, **kw))[1])
    return saved


def case_of(kind: str):
    return next(case for case in CASES if case.kind == kind)


def rectangles(axes, colour: str) -> list[list[float]]:
    """(x, y, w, h) of those in a colour."""
    patches = [patch for patch in axes.patches if to_hex(patch.get_edgecolor()) == colour]
    return [[patch.get_x() + 0.5, patch.get_y() + 0.5, patch.get_width(), patch.get_height()] for patch in patches]


def draw(kind: str, folder, figures, **arguments) -> list:
    """The cells of the first page that are filled."""
    raw = break_data(case_of(kind), folder / "data")
    pages = save_suspects(folder / "pictures", raw, inspect(raw), **arguments)
    assert [page.name for page in pages] == [f"suspects-{number + 1}.png" for number in range(len(figures))]
    return [axes for axes in figures[0].axes if axes.images]


@pytest.mark.parametrize("kind", ["box-outside", "box-sticks-out", "box-negative", "unknown-category", "box-tiny"])
def test_the_box_is_drawn_where_the_files_put_it(kind, tmp_path, figures):
    raw = break_data(case_of(kind), tmp_path / "expected")
    (axes,) = draw(kind, tmp_path, figures)
    boxes = raw.splits["train"].annotations.bbox[:4].tolist()
    assert rectangles(axes, VERMILION) == [boxes[1]]
    assert rectangles(axes, BLUE) == [boxes[0], *boxes[2:]]
    (x0, x1), (y1, y0) = axes.get_xlim(), axes.get_ylim()
    x, y, w, h = boxes[1]
    assert x0 <= min(x, x + w) and max(x, x + w) <= x1 and y0 <= y and y + h <= y1  # noqa: PT018
    assert axes.get_title(loc="left").split("\n")[2] == "train: 000.png, annotations[1]"
    (heading,) = axes.texts
    assert heading.get_text().endswith(f": {kind}")


def test_a_tiny_box_is_enlarged(tmp_path, figures):
    (axes,) = draw("box-tiny", tmp_path, figures)
    assert np.ptp(axes.get_ylim()) < 64  # the image's height


def test_boxes_of_another_layout_are_drawn_both_ways(tmp_path, figures):
    cells = draw("boxes-are-corners", tmp_path, figures, max_examples=2)
    assert len(cells) == 2
    x, y, w, h = make_data(tmp_path / "sound")["train"]["annotations"][0]["bbox"]
    assert rectangles(cells[0], GREEN) == [[x, y, w, h]]
    assert rectangles(cells[0], VERMILION) == [[x, y, x + w, y + h]]


def test_copies_are_shown_side_by_side(tmp_path, figures):
    (axes,) = draw("leak", tmp_path, figures)
    pixels = axes.images[0].get_array()
    width = 104  # of each
    np.testing.assert_array_equal(pixels[:, :width], pixels[:, -width:])
    assert pixels.shape[:2] == (70, 2 * width + 70 // 20)


def test_what_cannot_be_seen_is_not_drawn_and_nothing_is_deleted(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "suspects-2.png").touch()
    for number, kind in enumerate(("image-missing", "image-broken", "duplicate-category-name", "crowd")):
        raw = break_data(case_of(kind), tmp_path / str(number))
        assert save_suspects(tmp_path / "pictures", raw, inspect(raw)) == []
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["suspects-2.png"]


def test_broken_images_do_not_stop_pictures_where_nobody_looked_at_them(tmp_path, figures):
    contents = make_data(tmp_path / "data")
    contents["train"]["annotations"][0]["bbox"] = [200, 3, 5, 6]
    (tmp_path / "data/train/000.png").write_text("this is no image")
    raw = as_raw(tmp_path / "data", contents)
    save_suspects(tmp_path / "pictures", raw, inspect(raw, check_images=False))
    assert "cannot be decoded" in figures[0].axes[0].texts[0].get_text()


def test_many_suspects_fill_several_pages(tmp_path, figures):
    contents = make_data(tmp_path / "data")
    for number, entry in enumerate(contents["train"]["annotations"]):
        entry["bbox"][2] = -entry["bbox"][2] if number % 2 else 0
    raw = as_raw(tmp_path / "data", contents)
    pages = save_suspects(tmp_path / "pictures", raw, inspect(raw), max_examples=7)
    assert len(pages) == 2
    assert [sum(bool(axes.images) for axes in figure.axes) for figure in figures] == [9, 5]
    with Image.open(pages[0]) as page:
        assert min(page.size) > 1000


def test_histograms_have_the_counts(tmp_path, figures):
    report = inspect(as_raw(tmp_path / "data", make_data(tmp_path / "data")))
    save_histograms(tmp_path / "histograms.png", report)
    (figure,) = figures
    classes, sizes, *_ = figure.axes
    assert [label.get_text() for label in classes.get_yticklabels()] == ["dog", "cat", "cow"]  # commonest first
    assert [line.get_xdata().tolist() for line in classes.lines] == [[10, 5, 5], [6, 3, 3]]
    counts = report.statistics["sizes"]["train"]
    assert [bar.get_height() for bar in sizes.containers[0]] == [100 * count / 20 for count in counts.values()]


def test_of_many_classes_the_commonest_and_the_rarest_are_drawn():
    classes = [{"id": number, "name": f"class {number}", "boxes": {"train": number}} for number in range(80)]
    drawn = suspects._drawn_classes(classes, ["train"])
    assert [entry and entry["id"] for entry in drawn] == [*range(79, 59, -1), None, *range(9, -1, -1)]
