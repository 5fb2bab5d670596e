"""Plots of an evaluation: curves, intervals, confusion matrix."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from ..common.drawing import COLOURS
from ..common.text import abbreviate
from .bootstrap import STATISTICS
from .compare import Comparison
from .result import Evaluation

_DPI = 130
_NUM_LABELLED = 6  # classes with their own colour; black is for all classes together
_MOST_ROWS = 100  # classes with their own bar
_MOST_CONFUSED = 100  # classes up to which the whole confusion matrix is drawn
_FEWER_CONFUSED = 50  # classes in the matrix if there are more than that
_GREY, _PALE = "#666666", "#c4c4c4"
_LINES = ("-", "--", "-.")
_BLUES = LinearSegmentedColormap.from_list("", ["#ffffff", COLOURS[5], COLOURS[0], "#00324f"])
SIZE_NAMES = {
    "AP": "AP",
    "AP50": "AP at IoU 0.50",
    "AP75": "AP at IoU 0.75",
    "AP_small": "small, up to 32²",
    "AP_medium": "medium",
    "AP_large": "large, from 96²",
}


def save_precision_recall(path: Path, evaluation: Evaluation) -> None:
    """Plot precision over recall at an IoU of 0.5: the mean over classes, and each class.

    If there are many classes, only the best and the worst have colours.
    """
    curves, names = evaluation.curves, list(evaluation.class_names.values())
    figure, axes = _figure_with_legend()
    averages = curves.precision.mean(axis=1)
    labels = [f"{abbreviate(name, 24)}  {average:.3f}" for name, average in zip(names, averages, strict=True)]
    _class_lines(axes, curves.recalls, curves.precision, labels, averages)
    mean = curves.mean_precision
    if not np.isnan(mean).any():
        label = f"mean of classes  {mean.mean():.3f}"
        axes.plot(curves.recalls, mean, color=COLOURS[6], linewidth=3, label=label, zorder=5)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.02))
    _legend(axes, "AP50")
    axes.set_title("Precision and recall at IoU 0.5", loc="left", fontsize=11)
    figure.savefig(path, facecolor="white")


def save_f1(path: Path, evaluation: Evaluation) -> None:
    """Plot F1 over the score threshold at an IoU of 0.5, for all classes together and for each class, with the best point."""
    curves, names = evaluation.curves, list(evaluation.class_names.values())
    figure, axes = _figure_with_legend()
    heights = np.array([np.nan if np.isnan(line[0]) else line.max() for line in curves.class_f1])
    labels = [
        f"{abbreviate(name, 24)}  " + ("0.00" if best is None else f"{best.f1:.2f} at {best.threshold:.2f}")
        for name, best in zip(names, curves.class_best, strict=True)
    ]
    _class_lines(axes, curves.thresholds, curves.class_f1, labels, heights)
    title = "F1 over score threshold: nothing was found"
    if not np.isnan(curves.f1[0]):
        axes.plot(curves.thresholds, curves.f1, color=COLOURS[6], linewidth=3, label="all together", zorder=5)
    if curves.best is not None:
        title = f"F1 over score threshold: best {curves.best.f1:.2f} at {curves.best.threshold:.3f}"
        axes.axvline(curves.best.threshold, color=COLOURS[6], linewidth=1, linestyle=":")
        axes.plot(curves.best.threshold, curves.best.f1, "o", color=COLOURS[6], markersize=9, zorder=6)
    axes.set(xlabel="score threshold", ylabel="F1 at IoU 0.5", xlim=(0, 1), ylim=(0, 1.02))
    _legend(axes, "best F1 and where")
    axes.set_title(title, loc="left", fontsize=11)
    figure.savefig(path, facecolor="white")


def save_confusion(path: Path, evaluation: Evaluation) -> None:
    """Plot the confusion matrix, with colours for the share of a row. Of many classes, those with most mistakes are drawn."""
    counts, names, left_out = _most_confused(evaluation)
    cell = min(0.95, max(0.27, 5 / len(counts)))
    side = cell * len(counts)
    figure = Figure(
        figsize=(max(side, 2.4) + 2.5, max(side, 2) + 1.3 + 0.06 * max(map(len, names))),
        layout="constrained",
        dpi=100 if side > 12 else _DPI,
    )
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    picture = axes.imshow(shares, cmap=_BLUES, vmin=0, vmax=1)
    is_large = side > 12  # large pictures are first seen scaled down, so titles are larger
    for (row, column), count in np.ndenumerate(counts):
        if count:
            colour = readable_on(_BLUES(shares[row, column]))
            size = 10 if cell > 0.6 else 8 if count < 100 or cell > 0.35 else 6
            text = axes.text(column, row, _count(count), ha="center", va="center", fontsize=size, color=colour)
            text.set_in_layout(False)  # it lies inside the axes, and measuring thousands of texts is slow
    ticks = range(len(counts))
    label_size = 9 if cell > 0.35 else 8.5
    turn = 0 if cell > 0.6 and max(map(len, names)) < 10 else 90
    axes.set_xticks(ticks, [*names, "missed"], rotation=turn, fontsize=label_size)
    axes.set_yticks(ticks, [*names, "background"], fontsize=label_size)
    edges = np.arange(len(counts) + 1) - 0.5
    axes.hlines(edges, -0.5, len(counts) - 0.5, color="#e2e2e2", linewidth=0.5)
    axes.vlines(edges, -0.5, len(counts) - 0.5, color="#e2e2e2", linewidth=0.5)
    for line in (axes.axhline, axes.axvline):
        line(len(counts) - 1.5, color=_GREY, linewidth=1.2)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlabel("predicted", fontsize=20 if is_large else 10)
    axes.set_ylabel("annotated", fontsize=20 if is_large else 10)
    title = f"Confusions at IoU 0.5, scores above {evaluation.threshold:.3f}"
    if left_out:
        title += f"\nthe {len(names)} classes with the most mistakes; {left_out} are left out"
    axes.set_title(title, loc="left", fontsize=22 if is_large else 11)
    bar = figure.colorbar(picture, ax=axes, shrink=0.5 if is_large else 0.9, aspect=18)
    bar.set_label("share of the row", fontsize=16 if is_large else 10)
    bar.ax.tick_params(labelsize=14 if is_large else 9)
    bar.outline.set_visible(False)
    figure.savefig(path, facecolor="white", bbox_inches="tight", pad_inches=0.15)


def _most_confused(evaluation: Evaluation) -> tuple[np.ndarray, list[str], int]:
    """The counts and names of the drawn classes, and the number of classes left out."""
    counts = evaluation.confusion
    names = [abbreviate(name, 22) for name in evaluation.class_names.values()]
    if len(names) <= _MOST_CONFUSED:
        return counts, names, 0
    inner = counts[:-1, :-1]
    mistakes = inner.sum(axis=0) + inner.sum(axis=1) - 2 * inner.diagonal() + counts[:-1, -1] + counts[-1, :-1]
    kept = np.sort(np.argsort(-mistakes, kind="stable")[:_FEWER_CONFUSED])
    rows = [*kept, len(names)]
    return counts[np.ix_(rows, rows)], [names[index] for index in kept], len(names) - len(kept)


def readable_on(colour: tuple[float, ...]) -> str:
    """Black or white, whichever has the higher contrast (WCAG 2.2, relative luminance).

    Args:
        colour: red, green and blue in [0, 1]; further values are ignored.
    """
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3]]
    luminance = float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
    return "white" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "black"


def save_ap_per_class(path: Path, evaluation: Evaluation) -> None:
    """Plot the AP of each class with its interval, best first, and classes without objects last."""
    everything = sorted(evaluation.per_class, key=lambda row: -row["AP"])
    rows = _first_and_last(everything)
    figure, axes = _figure_for_rows(len(rows))
    labels = [f"{abbreviate(row['name'], 30)}  ({row['num_objects']})" for row in rows]
    _bars(axes, labels, [row["AP"] for row in rows], [row["intervals"].get("AP") for row in rows])
    if (overall := evaluation.metrics["AP"]) >= 0:
        axes.axvline(overall, color=COLOURS[1], linewidth=1.2, linestyle="--", zorder=1)
    note = " (dashed: mean)" if overall >= 0 else ""
    if left_out := len(everything) - len(rows):
        note += f"; the best and the worst; {left_out} in between are left out"
    _title_rows(axes, f"AP of each class{note}", "class (objects)", evaluation)
    figure.savefig(path, facecolor="white")


def save_ap_per_size(path: Path, evaluation: Evaluation) -> None:
    """Plot AP, AP50, AP75 and AP by object size, with intervals."""
    figure, axes = _figure_for_rows(len(STATISTICS))
    values = [evaluation.metrics[name] for name in STATISTICS]
    counts = evaluation.counts
    labels = [
        f"{text}  ({counts.get(name.replace('AP', 'objects'), counts['objects'])})" for name, text in SIZE_NAMES.items()
    ]
    _bars(axes, labels, values, [evaluation.intervals.get(name) for name in STATISTICS])
    _title_rows(axes, "AP of all classes, and by size (area in pixels)", "number (objects)", evaluation)
    figure.savefig(path, facecolor="white")


def save_comparison_plot(path: Path, comparison: Comparison) -> None:
    """Plot differences with intervals. B is better to the right of zero."""
    fixed = [entry for entry in comparison.differences if not entry.name.startswith("AP_class_")]
    classes = sorted(comparison.differences[len(fixed) :], key=lambda entry: -entry.difference)
    drawn = _first_and_last(classes)
    rows = [*fixed, *drawn]
    figure, axes = _figure_for_rows(len(rows))
    for y, entry in enumerate(rows):
        low, high = entry.interval
        better = entry.is_shown and entry.difference > 0
        colour, marker = (COLOURS[0], "o") if better else (COLOURS[1], "s") if entry.is_shown else (_GREY, "D")
        axes.plot([low, high], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot(entry.difference, y, marker, color=colour, markersize=6)
        text = f"{entry.difference:+.3f} [{low:+.3f}, {high:+.3f}]"
        axes.text(1.02, y, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    labels = [SIZE_NAMES.get(entry.name, abbreviate(entry.name.removeprefix("AP_class_"), 30)) for entry in rows]
    _set_rows(axes, labels)
    axes.axvline(0, color="black", linewidth=1)
    if classes:
        axes.axhline(len(fixed) - 0.5, color=_PALE, linewidth=1)
    bounds = [bound for entry in rows for bound in (*entry.interval, 0.0)]
    margin = max(0.01, 0.06 * (max(bounds) - min(bounds)))
    label = "AP of B minus AP of A, with 95 % intervals"
    if left_out := len(classes) - len(drawn):
        label += f"; {left_out} classes in between are left out"
    axes.set(xlabel=label, xlim=(min(bounds) - margin, max(bounds) + margin))
    title = [comparison.verdict, f"A: {path_end(comparison.model_a)}", f"B: {path_end(comparison.model_b)}"]
    figure.suptitle("\n".join(title), x=0.01, ha="left", fontsize=10)
    figure.savefig(path, facecolor="white")


def path_end(name: str, length: int = 70) -> str:
    """The end of a long path, which says more than its beginning."""
    return name if len(name) <= length else "…" + name[-length + 1 :]


def _count(count: int) -> str:
    return str(count) if count < 10_000 else f"{round(count / 1000)}k"


def _figure_with_legend() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8.4, 4.8), layout="constrained", dpi=_DPI)
    axes = figure.subplots()
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _class_lines(axes: Axes, x: np.ndarray, lines: np.ndarray, labels: Sequence[str], ranks: np.ndarray) -> None:
    """Draw a thin line for each class with objects: coloured and in the legend, or grey if there are too many."""
    known = np.flatnonzero(~np.isnan(ranks))
    known = known[np.argsort(-ranks[known], kind="stable")]
    half = _NUM_LABELLED // 2
    coloured = known if len(known) <= _NUM_LABELLED else np.concatenate([known[:half], known[-half:]])
    grey = np.setdiff1d(known, coloured)
    for number, index in enumerate(coloured):
        style = {"color": COLOURS[number], "linestyle": _LINES[number % len(_LINES)]}
        axes.plot(x, lines[index], linewidth=1.3, label=labels[index], zorder=3, **style)
        if len(grey) and number == half - 1:
            axes.plot(x, lines[grey[0]], color=_PALE, linewidth=0.7, label=f"{len(grey)} classes in between", zorder=1)
            axes.plot(x, lines[grey[1:]].T, color=_PALE, linewidth=0.7, zorder=1)
    if missing := len(ranks) - len(known):
        axes.plot([], [], " ", label=f"without objects: {missing}")


def _legend(axes: Axes, title: str) -> None:
    handles, labels = axes.get_legend_handles_labels()
    bold = [number for number, handle in enumerate(handles) if handle.get_linewidth() > 2]
    order = bold + [number for number in range(len(handles)) if number not in bold]
    axes.legend(
        [handles[number] for number in order],
        [labels[number] for number in order],
        title=title,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        frameon=False,
        fontsize=8.5,
        title_fontsize=8.5,
        alignment="left",
    )


def _first_and_last(rows: list) -> list:
    """The part of a sorted list that fits into a picture: all rows, or the first and the last."""
    return rows if len(rows) <= _MOST_ROWS else rows[: _MOST_ROWS // 2] + rows[-(_MOST_ROWS // 2) :]


def _figure_for_rows(count: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8.2, 1.5 + 0.24 * max(count, 3)), layout="constrained", dpi=_DPI if count < 50 else 110)
    axes = figure.subplots()
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure, axes


def _bars(axes: Axes, labels: Sequence[str], values: Sequence[float], intervals: Sequence[tuple | None]) -> None:
    for y, (value, bounds) in enumerate(zip(values, intervals, strict=True)):
        text = "none"
        if value >= 0:
            axes.barh(y, value, height=0.68, color=COLOURS[5], zorder=2)
            text = f"{value:.3f}"
            if bounds is not None:
                low, high = bounds
                axes.plot([low, high], [y, y], color=COLOURS[6], linewidth=1.4, zorder=3)
                axes.plot([low, high], [y, y], "|", color=COLOURS[6], markersize=6, zorder=3)
                text += f"  [{low:.3f}, {high:.3f}]"
        axes.text(
            1.02,
            y,
            text,
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=8,
            color=_GREY if value < 0 else "black",
        )
    _set_rows(axes, labels)
    axes.set_xlim(0, 1)


def _set_rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels, fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(labels) - 0.4, -0.6)


def _title_rows(axes: Axes, title: str, y_label: str, evaluation: Evaluation) -> None:
    axes.set_xlabel("AP" + (", with 95 % bootstrap intervals over images" if len(evaluation.samples) else ""))
    axes.set_ylabel(y_label, fontsize=8.5)
    axes.figure.suptitle(title, x=0.01, ha="left", fontsize=11)
