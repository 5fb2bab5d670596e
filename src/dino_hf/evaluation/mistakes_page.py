"""Draw a page of the worst mistakes, each with its annotations at the left and its detections at the right."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from PIL import Image

from ..common.drawing import COLOURS, outline, write_label
from ..common.text import abbreviate
from ..data.rows import CocoData
from .columns import image_name
from .mistakes import KINDS, NUM_MISTAKES, Mistake
from .plots import path_end
from .result import Evaluation

_TITLES = {
    "wrong class": "Wrong class: an object of another class (IoU of at least 0.5)",
    "poor localisation": "Poor localisation: the right class, but an IoU of 0.1 to 0.5",
    "duplicate": "Duplicate: another detection of the object has a higher score",
    "background": "Background: no object there (IoU below 0.1)",
    "miss": "Missed: the largest objects that were not found",
}
_TRUE, _FOUND = COLOURS[0], COLOURS[1]
_PIXELS = 260  # longer side of a panel
_LINE = 24  # height of a line of text, in pixels of a panel
_PER_POINT = 2.5  # pixels of a panel per point of font size
_FONT_SIZE = 6.5  # points
_TITLE = 25  # characters of a panel's title
_MOST_OTHERS = 4  # further boxes drawn in a panel

_Box = tuple[float, float, float, float]  # (x0, y0, x1, y1) in pixels


def save_mistakes(path: Path, evaluation: Evaluation, data: CocoData) -> None:
    """Draw the false positives with the highest scores, by kind, and the largest misses.

    Annotations are at the left, detections above the threshold at the right. The mistaken box has thick lines.
    """
    index_of = {image_id: index for index, image_id in enumerate(data.dataset["image_id"])}
    rows = {kind: [mistake for mistake in evaluation.mistakes if mistake.kind == kind] for kind in (*KINDS, "miss")}
    heights = [2.05 if mistakes else 0.35 for mistakes in rows.values()]
    figure = Figure(figsize=(12.4, sum(heights) + 0.35), layout="constrained", dpi=120)
    parts = figure.subfigures(len(rows), 1, height_ratios=heights)
    for part, (kind, mistakes) in zip(parts, rows.items(), strict=True):
        part.suptitle(
            _TITLES[kind] + ("" if mistakes else " - none"), x=0.005, ha="left", fontsize=9.5, fontweight="bold"
        )
        if not mistakes:
            continue
        grid = part.subplots(1, 2 * NUM_MISTAKES)
        for axes in grid:
            axes.set_axis_off()
        for number, mistake in enumerate(mistakes):
            index = index_of[mistake.image_id]
            _draw_pair(grid[2 * number : 2 * number + 2], mistake, evaluation, data, index)
    title = (
        f"{path_end(evaluation.model)}: annotations left, detections with scores above {evaluation.threshold:.3f} right"
    )
    figure.suptitle(title, x=0.005, ha="left", fontsize=10)
    figure.savefig(path, facecolor="white")


def _draw_pair(pair, mistake: Mistake, evaluation: Evaluation, data: CocoData, index: int) -> None:
    image, names = data.dataset[index]["image"], evaluation.class_names
    true_rows = np.flatnonzero(evaluation.truth["image_id"] == mistake.image_id)
    found_rows = np.flatnonzero(
        (evaluation.found["image_id"] == mistake.image_id) & (evaluation.found["scores"] > evaluation.threshold)
    )
    sizes = evaluation.truth["boxes"][true_rows]
    true_boxes = np.concatenate([sizes[:, :2], sizes[:, :2] + sizes[:, 2:]], axis=1)
    true_texts = [
        abbreviate(names[label], 16) + (" (crowd)" if is_crowd else "")
        for label, is_crowd in zip(
            evaluation.truth["labels"][true_rows].tolist(), evaluation.truth["iscrowd"][true_rows], strict=True
        )
    ]
    found_boxes = evaluation.found["boxes"][found_rows]
    labels, scores = (evaluation.found[name][found_rows].tolist() for name in ("labels", "scores"))
    found_texts = [f"{abbreviate(names[label], 12)} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
    is_it = (found_boxes == np.array(mistake.box)).all(axis=1) & (np.array(labels) == mistake.category_id)
    crop = crop_around(image, [mistake.box, *true_boxes[true_rows == mistake.truth]])
    num_hidden = draw_panel(pair[0], image, crop, true_boxes, true_texts, true_rows == mistake.truth, _TRUE)
    num_hidden_found = draw_panel(pair[1], image, crop, found_boxes, found_texts, is_it, _FOUND)
    style = {"fontsize": 7, "loc": "left", "color": "#555555"}
    pair[0].set_title(panel_title(Path(image_name(data, index)).name, _more(num_hidden)), **style)
    score = "" if mistake.score is None else f" {mistake.score:.2f}"
    pair[1].set_title(panel_title(names[mistake.category_id], score + _more(num_hidden_found)), **style)


def _more(num_hidden: int) -> str:
    """A text that counts the boxes that a panel does not show."""
    return f" (+{num_hidden} more)" if num_hidden else ""


def panel_title(name: str, end: str) -> str:
    """A title cut to the width of a panel, so that neighbouring titles do not overlap."""
    return abbreviate(name, max(4, _TITLE - len(end))) + end


def crop_around(image: Image.Image, boxes: list) -> tuple[int, int, int, int]:
    """(x0, y0, x1, y1) of a part of the image with the boxes and a margin, not much longer than wide."""
    corners = np.array(boxes)
    low, high = corners[:, :2].min(axis=0), corners[:, 2:].max(axis=0)
    middle, extent = (low + high) / 2, np.maximum(high - low, 24)
    half = np.maximum(extent, 0.6 * extent.max())
    size = np.array(image.size)
    low, high = np.clip(np.floor(middle - half), 0, size - 1), np.clip(np.ceil(middle + half), 1, size)
    high = np.maximum(high, low + 1)
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])


def draw_panel(
    axes: Axes,
    image: Image.Image,
    crop: tuple[int, int, int, int],
    boxes: np.ndarray,
    texts: list[str],
    is_it: np.ndarray,
    colour: str,
) -> int:
    """Draw a part of an image with the mistaken boxes and the largest of the others.

    Returns:
        number of boxes in this part that are not drawn. A weak detector has dozens, which would hide each other.
    """
    part = image.convert("RGB").crop(crop)
    scale = _PIXELS / max(part.size)
    part = part.resize([max(1, round(side * scale)) for side in part.size])
    axes.imshow(np.asarray(part))
    boxes = (boxes - np.array([crop[0], crop[1]] * 2)) * scale  # (N, 4)
    visible = np.maximum(0, np.minimum(boxes[:, 2:], part.size) - np.maximum(boxes[:, :2], 0)).prod(axis=1)
    texted: list[_Box] = []
    order = [index for index in np.lexsort((-visible, ~is_it)).tolist() if visible[index] > 0]
    drawn = order[: _MOST_OTHERS + int(is_it.sum())]  # the mistaken boxes come first, so they get their texts first
    for index in drawn:
        outline(axes, boxes[index], colour, width=2.4 if is_it[index] else 1.1, clip=part.size)
        if place := _place(boxes[index], texts[index], part.size, texted):
            texted.append(place)
            write_label(axes, place[0] + 3, place[3] - 5, texts[index], colour, fontsize=_FONT_SIZE, zorder=4)
    # All panels have the same scale. A narrow or low part leaves the rest of the square white.
    axes.set_xlim(-0.5, _PIXELS - 0.5)
    axes.set_ylim(_PIXELS - 0.5, -0.5)
    return len(order) - len(drawn)


def _text_width(text: str) -> float:
    """Width of a text in pixels of a panel."""
    return TextPath((0, 0), text, size=_FONT_SIZE).get_extents().width * _PER_POINT


def _place(box: np.ndarray, text: str, size: tuple[int, int], taken: list[_Box]) -> _Box | None:
    """A free place for a text: above the box, inside at its upper or lower edge, or below. None if there is none."""
    width, height = _text_width(text) + 8, _LINE
    x0 = min(max(box[0], 0), max(0, size[0] - width))
    for bottom in (box[1], box[1] + height, box[3], box[3] + height):
        place = (x0, bottom - height, x0 + width, bottom)
        is_free = all(place[0] >= b[2] or b[0] >= place[2] or place[1] >= b[3] or b[1] >= place[3] for b in taken)
        if place[1] >= 0 and bottom <= size[1] and is_free:
            return place
    return None
