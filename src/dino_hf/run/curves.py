"""Plot the curves of a training run."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from transformers import TrainerState

from ..common.drawing import COLOURS


def save_curves(path: Path, state: TrainerState) -> None:
    """Plot losses, AP and learning rate over epochs, from the log of `Trainer`. A star marks the best AP."""
    figure = Figure(figsize=(13, 3.8), layout="constrained", dpi=110)
    loss_axes, ap_axes, rate_axes = figure.subplots(1, 3)

    def curve(axes: Axes, name: str, label: str, colour: str, **style) -> list[tuple[float, float]]:
        points = [(entry["epoch"], entry[name]) for entry in state.log_history if name in entry]
        if points:
            if len(points) == 1:  # a line of one point would not be visible
                style = {"marker": "o", "markersize": 4} | style
            axes.plot(*zip(*points, strict=True), label=label, color=colour, linewidth=1.6, **style)
        return points

    curve(loss_axes, "loss", "training (with denoising)", COLOURS[0])
    curve(loss_axes, "eval_loss", "held-out (matching only)", COLOURS[1], marker="o", markersize=4)
    curve(loss_axes, "eval_ema_loss", "held-out, averaged", COLOURS[2], marker="s", markersize=4)
    loss_axes.set_title("Loss", loc="left", fontsize=11)
    curve(ap_axes, "eval_AP50", "AP50", COLOURS[5], linestyle="--", marker="o", markersize=3)
    curve(ap_axes, "eval_ema_AP50", "AP50, averaged", COLOURS[4], linestyle="--", marker="s", markersize=3)
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
    rate_axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:g}")  # no common factor above
    last = max((entry["epoch"] for entry in state.log_history if "epoch" in entry), default=0)
    for axes in (loss_axes, ap_axes, rate_axes):
        if last > 0:  # the same range for all plots; otherwise a plot of a single evaluation would have a narrow range
            axes.set_xlim(0, 1.03 * last)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))  # labels of more ticks would overlap
        if rates and rates[-1][0] >= 2:
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, facecolor="white")
