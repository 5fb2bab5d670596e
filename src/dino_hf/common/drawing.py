"""Pictures for people: boxes on images, and curves of a training run."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image
from transformers import TrainerState

# Okabe and Ito's colours, which people with any colour vision can tell apart; without the yellow, too light for thin lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def draw_boxes(
    axes: Axes, image: Image.Image, boxes: Sequence[Sequence[float]], labels: Sequence[int], texts: Sequence[str]
) -> None:
    """Show an image with boxes, coloured by class.

    Args:
        boxes: (x0, y0, x1, y1) in pixels.
        labels: class indices.
        texts: what is written at each box.
    """
    axes.imshow(np.asarray(image.convert("RGB")))
    for (x0, y0, x1, y1), label, text in zip(boxes, labels, texts, strict=True):
        colour = COLOURS[label % len(COLOURS)]
        axes.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor="white", linewidth=3))
        axes.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.6))
        axes.text(
            x0 - 0.5,
            max(y0 - 1.5, 0),
            text,
            fontsize=6.5,
            color="white",
            verticalalignment="bottom" if y0 > 8 else "top",
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.8},
        )
    axes.set_axis_off()


def save_comparison(path: Path, rows: Sequence[dict], detections_title: str) -> None:
    """A grid of images, annotations above detections.

    Args:
        rows: for each image `image`, and under `truth` and `found` a dictionary of `boxes`, `labels`, `texts`.
        detections_title: says what the detections are, for example their threshold.
    """
    figure = Figure(figsize=(2.3 * len(rows), 5.0), layout="constrained", dpi=140)
    grid = figure.subplots(2, len(rows), squeeze=False)
    for column, row in enumerate(rows):
        draw_boxes(grid[0, column], row["image"], **row["truth"])
        draw_boxes(grid[1, column], row["image"], **row["found"])
    grid[0, 0].set_title("annotated", loc="left", fontsize=9)
    grid[1, 0].set_title(detections_title, loc="left", fontsize=9)
    figure.savefig(path, facecolor="white")


def save_curves(path: Path, state: TrainerState) -> None:
    """Loss of training and evaluation, AP and its best, learning rate, over epochs, from what `Trainer` logged."""
    figure = Figure(figsize=(13, 3.8), layout="constrained", dpi=110)
    loss_axes, ap_axes, rate_axes = figure.subplots(1, 3)

    def curve(axes: Axes, name: str, label: str, colour: str, **style) -> list[tuple[float, float]]:
        points = [(entry["epoch"], entry[name]) for entry in state.log_history if name in entry]
        if points:
            style = (
                style if len(points) > 1 else {"marker": "o", "markersize": 4} | style
            )  # a line of one point is none
            axes.plot(*zip(*points, strict=True), label=label, color=colour, linewidth=1.6, **style)
        return points

    curve(loss_axes, "loss", "training (with denoising)", COLOURS[0])
    curve(loss_axes, "eval_loss", "held-out (matching only)", COLOURS[1], marker="o", markersize=4)
    curve(loss_axes, "eval_ema_loss", "held-out, averaged", COLOURS[2], marker="s", markersize=4)
    loss_axes.set_title("Loss", loc="left", fontsize=11)
    curve(ap_axes, "eval_AP50", "AP50", COLOURS[5], linestyle="--", marker="o", markersize=3)
    curve(
        ap_axes,
        "eval_ema_AP50",
        "AP50, averaged",
        COLOURS[4],
        linestyle="--",
        marker="s",
        markersize=3,
    )
    scores = curve(ap_axes, "eval_AP", "AP", COLOURS[0], marker="o", markersize=4)
    of_average = curve(ap_axes, "eval_ema_AP", "AP, averaged", COLOURS[2], marker="s", markersize=4)
    scores += of_average
    if scores:
        epoch, ap = max(scores, key=lambda point: point[1])
        ap_axes.plot(epoch, ap, marker="*", markersize=14, color=COLOURS[1], linestyle="none", label=f"best: {ap:.3f}")
    which = " (raw and averaged weights)" if of_average else ""
    ap_axes.set_title(f"AP on held-out images{which}", loc="left", fontsize=11)
    ap_axes.set_ylim(bottom=0)
    rates = curve(rate_axes, "learning_rate", "transformer", COLOURS[0])
    rate_axes.set_title("Learning rate", loc="left", fontsize=11)
    rate_axes.set_ylim(bottom=0)
    rate_axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:g}")  # a factor above the axis would push its title up
    last = max((entry["epoch"] for entry in state.log_history if "epoch" in entry), default=0)
    for axes in (loss_axes, ap_axes, rate_axes):
        if last > 0:  # the same for all: the axis of a single evaluation would show a range around it
            axes.set_xlim(0, 1.03 * last)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))  # labels of more ticks run together
        if rates and rates[-1][0] >= 2:
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, facecolor="white")
