"""Draw suspicious images of a data set, and histograms of its boxes by class, size and shape."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from PIL import Image

from ..common.drawing import COLOURS, outline, plot_style
from ..common.text import abbreviate
from ..data.image_facts import open_upright
from ..data.raw import RawDataset, make_box_table
from .checks import Report
from .data_statistics import SIZE_NAMES, aspect_texts, count_texts, relative_texts
from .findings import Finding, Offender

_BLUE, _VERMILION, _GREEN = COLOURS[:3]
# Findings that cannot be seen in a picture, or that are no errors.
_NOT_DRAWN = {
    "image-missing", "image-broken", "image-size-wrong", "image-size-unknown", "image-without-boxes", "duplicate-file",
    "duplicate-image-id", "duplicate-annotation-id", "box-not-numbers", "box-whole-image", "crowd",
}  # fmt: skip
_COLUMNS, _ROWS = 3, 3
_CELL = (3.9, 3.6)  # inches
_LINE = 54  # characters of a caption that fit above a picture
_SMALL = 0.06  # share of the image's sides; a smaller box is shown enlarged
_MOST_OTHERS = 400  # boxes drawn beside the suspicious one
_MOST_CLASSES = 30  # drawn classes
_FEWEST_ROWS = 9  # the plot has room for at least this many classes, so the marks of few classes stay together
_MOST_SPLITS = 6  # drawn splits
_PANEL = 0.78  # height / width of a picture
_GREY = "#e4e4e4"  # around an image

_MARKERS = "os^Dvp"


@plot_style()
def save_suspects(folder: Path, raw: RawDataset, report: Report, max_examples: int = 3) -> list[Path]:
    """Draw the first offenders of each kind, worst first, on pages suspects-1.png, ...

    The suspicious box is vermilion, at its place in the files, also outside the image. A ring marks a box that is too small to be
    seen, and an arrow points to a box that is far away. Other boxes of the image are blue. If the boxes probably have another
    layout, a green box shows the place in that layout.

    Args:
        folder: created if needed.
        max_examples: most examples of each kind.
    Returns:
        paths of the pages; empty if nothing can be drawn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    album = _Album(raw, report)
    offenders = [
        (finding, offender)
        for finding in report.findings
        if finding.kind not in _NOT_DRAWN
        for offender in [item for item in finding.offenders if album.can_draw(item)][:max_examples]
    ]
    pages, num_columns = [], min(_COLUMNS, len(offenders))
    for start in range(0, len(offenders), _COLUMNS * _ROWS):
        of_page = offenders[start : start + _COLUMNS * _ROWS]
        num_rows = -(-len(of_page) // num_columns)
        figure = Figure(figsize=(num_columns * _CELL[0], num_rows * _CELL[1]), layout="constrained", dpi=110)
        grid = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
        for axes in grid:
            axes.set_axis_off()
        for axes, (finding, offender) in zip(grid, of_page, strict=False):
            album.draw(axes, finding, offender)
        pages.append(folder / f"suspects-{len(pages) + 1}.png")
        figure.savefig(pages[-1], facecolor="white")
    return pages


class _Album:
    def __init__(self, raw: RawDataset, report: Report):
        self.raw, self.report = raw, report
        self.tables = {name: make_box_table(split, raw.categories) for name, split in raw.splits.items()}
        self.means = {name: report.readings[name].to_xywh(table, raw.format) for name, table in self.tables.items()}

    def can_draw(self, offender: Offender) -> bool:
        if offender.image is None:
            return False
        fact = self.report.facts[offender.split][offender.image]
        return not fact.is_missing and fact.error is None

    def draw(self, axes: Axes, finding: Finding, offender: Offender) -> None:
        try:
            image = open_upright(self.raw.splits[offender.split].images[offender.image])
            if offender.other is not None:
                other, place = offender.other
                image = _beside(image, open_upright(self.raw.splits[other].images[place]))
        except Exception as error:  # an image that was not decoded before
            axes.text(0.5, 0.5, f"cannot be decoded:\n{type(error).__name__}", ha="center", va="center", fontsize=8)
        else:
            _show(axes, image)
            if offender.other is None:
                self._draw_boxes(axes, image, offender, is_enlarged=finding.kind == "near-duplicate-box")
        colour = {"error": _VERMILION, "warning": "#8a5a00", "note": _BLUE}[finding.severity]
        where = "" if offender.annotation is None else f", {offender.where}"
        # The empty lines leave room for the heading.
        place = abbreviate(f"{offender.split}: {offender.file}{where}", _LINE, keep_end=True)
        title = f"\n\n{place}\n{abbreviate(offender.value, _LINE)}"
        axes.set_title(title, loc="left", fontsize=8)
        heading = {"fontsize": 9, "fontweight": "bold", "color": colour, "textcoords": "offset points"}
        axes.annotate(f"{finding.severity}: {finding.kind}", (0, 1), (0, 29), "axes fraction", **heading)

    def _draw_boxes(self, axes: Axes, image: Image.Image, offender: Offender, is_enlarged: bool) -> None:
        """Draw the boxes of the files, without correcting them for an image that was resized or turned."""
        table, means = self.tables[offender.split], self.means[offender.split]
        reading = self.report.readings[offender.split]
        places = np.flatnonzero((table.image == offender.image) & table.is_number)
        others = [place for place in places if place != offender.annotation][:_MOST_OTHERS]
        for place in others:
            _outline(axes, means[place], _BLUE, 1.0)
        if offender.annotation not in places.tolist():
            return
        box = table.boxes[offender.annotation]
        if not reading.is_as_read:
            _outline(axes, means[offender.annotation], _GREEN, 1.8)
        _outline(axes, box, _VERMILION, 1.8)
        low, high = _view(box, image.size, is_enlarged)
        _set_view(axes, low, high)
        _point_at(axes, box, low, high)


def _show(axes: Axes, image: Image.Image) -> None:
    """Show an image on grey, in a panel whose size does not depend on the image."""
    axes.imshow(np.asarray(image))
    axes.set_axis_on()
    axes.set(xticks=[], yticks=[], facecolor=_GREY)
    axes.spines[:].set_visible(False)
    _set_view(axes, np.zeros(2), np.array(image.size, dtype=float))


def _outline(axes: Axes, box: np.ndarray, colour: str, width: float) -> None:
    """Draw an xywh box."""
    x, y, w, h = box
    outline(axes, (x, y, x + w, y + h), colour, width)


def _view(box: np.ndarray, size: tuple[int, int], is_enlarged: bool) -> tuple[np.ndarray, np.ndarray]:
    """(2,), (2,) corners of the view: the image and parts of the box outside, or for a small box only its surroundings."""
    size = np.array(size, dtype=float)
    ends = np.stack([box[:2], box[:2] + box[2:]])  # (2, 2)
    low, high = np.minimum(0, ends.min(0)), np.maximum(size, ends.max(0))
    low, high = np.maximum(low, -size / 2), np.minimum(high, 1.5 * size)  # the image must stay recognisable
    is_small = (np.abs(box[2:]) < _SMALL * size).any()
    if (is_small or is_enlarged) and (low == 0).all() and (high == size).all():
        half = np.minimum(max(0.7 * np.abs(box[2:]).max(), size.min() / 8), size / 2)
        centre = np.clip(ends.mean(0), half, size - half)
        low, high = centre - half, centre + half
    return low, high


def _set_view(axes: Axes, low: np.ndarray, high: np.ndarray) -> None:
    """Set the limits of the axes, with margins so that all panels have the same shape."""
    centre, half = (low + high) / 2, 0.53 * (high - low)
    width = max(half[0], half[1] / _PANEL)
    axes.set_xlim(centre[0] - width, centre[0] + width)
    axes.set_ylim(centre[1] + _PANEL * width, centre[1] - _PANEL * width)


def _point_at(axes: Axes, box: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
    """Draw a ring around a box that is too small to be seen, or an arrow towards a box outside the view."""
    centre, span = box[:2] + box[2:] / 2, high - low
    ends = np.sort(np.stack([box[:2], box[:2] + box[2:]]), axis=0)
    is_beyond = (ends[1] < low) | (ends[0] > high)  # (2,)
    if is_beyond.any():
        tip = np.clip(centre, low, high)
        start = tip + np.where(is_beyond, 0.3 * ((low + high) / 2 - tip), 0)
        arrow = {"arrowstyle": "-|>", "color": _VERMILION, "linewidth": 2.5}
        axes.annotate("", tip, start, arrowprops=arrow)
        box_style = {"facecolor": "white", "edgecolor": "none", "pad": 2}
        axes.text(
            0.5, 0.03, "the box is further out", color=_VERMILION, fontsize=8, ha="center", bbox=box_style, transform=axes.transAxes
        )  # fmt: skip
    elif np.abs(box[2:]).min() < 0.02 * span.max():
        axes.plot(*centre, "o", markersize=18, markerfacecolor="none", color="white", markeredgewidth=3.5)
        axes.plot(*centre, "o", markersize=18, markerfacecolor="none", color=_VERMILION, markeredgewidth=2)


def _beside(first: Image.Image, second: Image.Image) -> Image.Image:
    """Two images side by side at the same height, with a white gap."""
    height = min(max(first.height, second.height), 400)
    scaled = [
        picture.resize((max(1, round(picture.width * height / picture.height)), height)) for picture in (first, second)
    ]
    gap = height // 20
    both = Image.new("RGB", (scaled[0].width + gap + scaled[1].width, height), "white")
    both.paste(scaled[0], (0, 0))
    both.paste(scaled[1], (scaled[0].width + gap, 0))
    return both


@plot_style()
def save_histograms(path: Path, report: Report) -> None:
    """Draw histograms with one colour for each split.

    They show the number of boxes of each class, the share of images by number of boxes, and the share of boxes by size, relative
    size and shape.
    """
    statistics = report.statistics
    splits = [name for name, counts in statistics["splits"].items() if counts["images"]][:_MOST_SPLITS]
    classes = _drawn_classes(statistics["classes"], splits)
    figure = Figure(figsize=(13, max(7.0, 1.8 + 0.22 * len(classes))), layout="constrained", dpi=120)
    axes = figure.subplot_mosaic([["classes", "sizes", "relative"], ["classes", "aspect", "count"]])
    _draw_classes(axes["classes"], classes, splits, len(statistics["classes"]))
    sizes = {name: [counts[size] for size in SIZE_NAMES] for name, counts in statistics["sizes"].items()}
    size_texts = ["small\n< 32²", "medium\n32² to 96²", "large\n> 96² pixels"]
    _draw_shares(axes["sizes"], sizes, splits, size_texts, "boxes by area (COCO's sizes)")
    edges = statistics["edges"]
    relative = relative_texts(edges["relative_sizes"])
    title = "boxes by √(box area / image area)"
    _draw_shares(axes["relative"], statistics["relative_sizes"], splits, relative, title)
    aspect_title = "boxes by width : height"
    _draw_shares(
        axes["aspect"], statistics["aspect_ratios"], splits, aspect_texts(edges["aspect_ratios"]), aspect_title
    )
    counts = count_texts(edges["boxes_per_image"])
    _draw_shares(axes["count"], statistics["boxes_per_image"], splits, counts, "images by number of boxes", "images")
    handles, labels = axes["sizes"].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(splits) or 1, frameon=False, fontsize=9)
    figure.savefig(path, facecolor="white")


def _drawn_classes(classes: list[dict], splits: list[str]) -> list[dict | None]:
    """Classes by decreasing number of boxes. Of many classes, the most frequent and, after a gap, the rarest."""
    ordered = sorted(classes, key=lambda entry: -sum(entry["boxes"][name] for name in splits))
    if len(ordered) <= _MOST_CLASSES:
        return ordered
    num_rare = _MOST_CLASSES // 3
    return [*ordered[: _MOST_CLASSES - num_rare], None, *ordered[-num_rare:]]


def _class_name(name: str) -> str:
    text = " ".join(name[:200].split())
    return text if len(text) <= 26 else f"{text[:25]}…"


def _draw_classes(axes: Axes, classes: list[dict | None], splits: list[str], num_classes: int) -> None:
    rows = [row for row, entry in enumerate(classes) if entry is not None]
    most = 1
    for number, name in enumerate(splits):
        counts = [classes[row]["boxes"][name] for row in rows]
        most = max([most, *counts])
        heights = [
            row + 0.24 * (number - (len(splits) - 1) / 2) for row in rows
        ]  # so that equal counts do not hide each other
        axes.plot(
            counts,
            heights,
            _MARKERS[number % len(_MARKERS)],
            color=COLOURS[number % len(COLOURS)],
            markersize=5.5,
            label=abbreviate(name, 26, keep_end=True),
        )
    axes.set_yticks(rows, [_class_name(classes[row]["name"]) for row in rows], fontsize=8)
    axes.set_ylim(max(len(classes), _FEWEST_ROWS) - 0.4, -0.6)
    if most > 50:
        axes.set_xscale("symlog", linthresh=1)
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:,.0f}")
        )  # the default formatter writes TeX
        axes.set_xlim(-0.2, most * 1.6)
    else:
        axes.set_xlim(-0.03 * most, most * 1.08)
    if None in classes:
        gap = classes.index(None)
        axes.text(
            0.5,
            gap,
            f"{num_classes - len(rows)} more",
            transform=axes.get_yaxis_transform(),
            ha="center",
            va="center",
            fontsize=8,
        )
    axes.set_xlabel("boxes")
    axes.set_title(f"boxes by class ({num_classes:,})", loc="left", fontsize=10)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_shares(
    axes: Axes, counts: dict[str, list[int]], splits: list[str], texts: list[str], title: str, of="boxes"
) -> None:
    width = 0.8 / max(len(splits), 1)
    for number, name in enumerate(splits):
        shares = 100 * np.array(counts[name]) / max(sum(counts[name]), 1)
        places = np.arange(len(texts)) + (number - (len(splits) - 1) / 2) * width
        axes.bar(
            places,
            shares,
            0.92 * width,
            color=COLOURS[number % len(COLOURS)],
            label=abbreviate(name, 26, keep_end=True),
        )
    axes.set_xticks(
        range(len(texts)),
        texts,
        fontsize=8,
        rotation=0 if len(texts) < 5 else 40,
        ha="center" if len(texts) < 5 else "right",
        rotation_mode="anchor",
    )
    axes.set_ylabel(f"% of {of}")
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
