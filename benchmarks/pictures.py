"""Plots of the benchmark results."""

import json
import re
from pathlib import Path

from matplotlib.figure import Figure

from detectors import DEFORMABLE
from dino_hf.common.drawing import COLOURS

_DPI = 130


def by_case(rows: list[dict]) -> list[tuple[dict, dict[str, dict]]]:
    """Group rows by case. Returns pairs of a case and its rows by candidate."""
    cases: dict[str, tuple[dict, dict[str, dict]]] = {}
    for row in rows:
        cases.setdefault(json.dumps(row["case"]), (row["case"], {}))[1][row["candidate"]] = row
    return list(cases.values())


def save_inference(path: Path, rows: list[dict]) -> None:
    """Plot the speedup of all candidates of each case over Deformable DETR in float32, as bars."""
    base = f"{DEFORMABLE}, float32, eager"
    cases = [one for one in by_case(rows) if base in one[1]]
    names = list(dict.fromkeys(name for _, candidates in cases for name in candidates if name != base))
    colours = dict(zip(names, [COLOURS[index % len(COLOURS)] for index in range(len(names))], strict=True))
    num_bars = sum(len(candidates) - 1 for _, candidates in cases)
    figure = Figure(figsize=(8.5, 1.6 + 0.26 * num_bars + 0.22 * len(cases)), layout="constrained")
    axes = figure.subplots()
    y, ticks, shown = 0.0, [], set()
    for case, candidates in cases:
        start = y
        for name in (one for one in names if one in candidates):
            median, lowest, highest = candidates[name]["times_faster_than"][base]
            label = None if name in shown else name.removesuffix(", eager")
            shown.add(name)
            axes.barh(y, median, height=0.82, color=colours[name], label=label)
            axes.plot([lowest, highest], [y, y], color="black", linewidth=1)
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # hides the line at 1 behind the text
            axes.annotate(
                f"{median:.1f}" if median >= 1 else f"{median:.2f}",
                (highest, y),
                xytext=(4, 0),
                textcoords="offset points",
                verticalalignment="center",
                fontsize=8,
                bbox=box,
            )
            y += 1
        ticks.append(((start + y - 1) / 2, f"{case['model']}\n{case['size']}, batch {case['batch_size']}"))
        y += 0.9
    axes.set_yticks([place for place, _ in ticks], [text for _, text in ticks], fontsize=9)
    axes.invert_yaxis()
    axes.axvline(1, color="#666666", linewidth=1, linestyle=":")
    axes.set_xlabel("times faster than transformers' Deformable DETR in float32, eager (line: smallest to largest)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=2, fontsize=8, frameon=False)
    figure.savefig(path, dpi=_DPI, facecolor="white")


def save_scaling(path: Path, rows: list[dict]) -> None:
    """Plot time over pixels, queries and boxes, each relative to its first point."""
    parts = {}
    for case, candidates in by_case(rows):
        parts[case["over"]] = case, candidates
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    all_axes = figure.subplots(1, len(parts), squeeze=False)[0]
    for axes, (over, (case, candidates)) in zip(all_axes, parts.items(), strict=True):
        size = _spaced(case.get("size", ""))
        key, unit, scale = {
            "pixels": ("pixels", "megapixels", 1e6),
            "queries": ("num_queries", f"queries, at {size}", 1),
            "boxes": ("num_boxes", f"boxes per image, 2 x {size}", 1),
        }[over]
        group = "part" if over == "boxes" else "detector"
        base = next(iter(candidates))
        for index, line in enumerate(dict.fromkeys(row[group] for row in candidates.values())):
            points = sorted((row[key] / scale, *_cost(row, base)) for row in candidates.values() if row[group] == line)
            x, median, lowest, highest = zip(*points, strict=True)
            label = {"step": "training step", "loss": "its loss"}.get(line, line)
            axes.plot(x, median, "o-", color=COLOURS[index], markersize=4, label=label)
            axes.fill_between(x, lowest, highest, color=COLOURS[index], alpha=0.2, linewidth=0)
        axes.set(xlabel=unit, xlim=(0, None), ylim=(0, None))
        axes.set_title(f"Time over {over}; 1 is {_spaced(base)}", loc="left", fontsize=10)
        axes.grid(color="#e4e4e4")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if len(axes.lines) > 1:
            axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=_DPI, facecolor="white")


def _spaced(text: str) -> str:
    return re.sub(r"(\d)x(\d)", r"\1 x \2", text)


def _cost(row: dict, base: str) -> tuple[float, float, float]:
    """Time relative to that of `base`: median, smallest, largest."""
    if row["candidate"] == base:
        return 1.0, 1.0, 1.0
    median, lowest, highest = row["times_faster_than"][base]
    return 1 / median, 1 / highest, 1 / lowest
