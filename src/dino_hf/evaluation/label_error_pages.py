"""Draw the first suspects of `find_label_errors`: annotations at the left, the detection that contradicts them at the right."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ..common.drawing import COLOURS, plot_style
from ..common.text import abbreviate
from ..data.rows import CocoData
from .label_errors import LabelError
from .mistakes_page import crop_around, draw_panel, panel_title

PAGE_NAME = "label-errors.png"
_ANNOTATED, _DETECTED = COLOURS[0], COLOURS[1]
_COLUMNS, _ROWS = 4, 6  # suspects of a page
_NO_BOXES = np.zeros((0, 4))


@plot_style()
def save_label_errors(
    path: Path, suspects: Sequence[LabelError], parts: Mapping[str, CocoData], class_names: Mapping[int, str]
) -> None:
    """Draw a page of the first 24 suspects. The suspicious annotation and the detection have thick lines.

    Args:
        parts: the data of each split.
        class_names: category id -> name.
    """
    drawn = suspects[: _COLUMNS * _ROWS]
    num_rows = max(1, -(-len(drawn) // _COLUMNS))
    figure = Figure(figsize=(12.4, 2.05 * num_rows + 0.35), layout="constrained", dpi=120)
    grid = figure.subplots(num_rows, 2 * _COLUMNS, squeeze=False)
    for axes in grid.ravel():
        axes.set_axis_off()
    for place, suspect in enumerate(drawn):
        row, column = divmod(place, _COLUMNS)
        pair = grid[row, 2 * column : 2 * column + 2]
        _draw_pair(pair, place + 1, suspect, parts[suspect.split], class_names)
    title = "Suspicious labels: annotations left, the detection that contradicts them right"
    figure.suptitle(title, x=0.005, ha="left", fontsize=10)
    figure.savefig(path, facecolor="white")


def _draw_pair(pair, rank: int, suspect: LabelError, data: CocoData, class_names: Mapping[int, str]) -> None:
    row = data.dataset[suspect.index]
    sizes = np.array(row["objects"]["bbox"], dtype=np.float64).reshape(-1, 4)
    boxes = np.concatenate([sizes[:, :2], sizes[:, :2] + sizes[:, 2:]], axis=1)
    texts = [abbreviate(data.id2label[label], 16) for label in row["objects"]["category"]]
    labels = np.array([data.category_ids[label] for label in row["objects"]["category"]], dtype=np.int64)
    is_it = np.zeros(len(boxes), dtype=bool)
    if suspect.box is not None:
        is_it = np.isclose(boxes, suspect.box).all(axis=1) & (labels == suspect.category_id)
    crop = crop_around(row["image"], [box for box in (suspect.box, suspect.model_box) if box is not None])
    draw_panel(pair[0], row["image"], crop, boxes, texts, is_it, _ANNOTATED)
    found, found_texts = _NO_BOXES, []
    if suspect.model_box is not None:
        found = np.array([suspect.model_box])
        found_texts = [f"{abbreviate(class_names[suspect.model_category_id], 12)} {suspect.model_score:.2f}"]
    draw_panel(pair[1], row["image"], crop, found, found_texts, np.ones(len(found), dtype=bool), _DETECTED)
    style = {"fontsize": 7, "loc": "left", "color": "#555555"}
    pair[0].set_title(f"{rank}. {suspect.kind} {suspect.score:.2f}", **style)
    pair[1].set_title(panel_title(Path(suspect.file_name).name, ""), **style)
