"""Progress of a training run: a bar with the time left on terminals, and one line for each evaluation."""

import time

from rich.console import Console
from transformers import TrainerCallback

from ..common.progress import ProgressBar
from ..training.kept_classes import ClassGroups

_SILENCE = 60  # seconds between lines without a terminal
BEST_AP = "best_AP"  # a name for `metric_for_best_model`
_SHOWN = (
    ("eval_loss", "held-out loss", 2),
    ("eval_AP", "AP", 3),
    ("eval_AP50", "AP50", 3),
    ("eval_ema_AP", "AP of the average", 3),
)


def ap_of(metrics: dict, prefix: str, groups: ClassGroups | None = None) -> float:
    """The AP by which weights are chosen: the mean over all classes, or, in a run that keeps old classes, the balanced AP.

    Args:
        prefix: "eval_" for the raw weights, "eval_ema_" for the averaged ones.
        groups: classes of a run that keeps old classes.
    Returns:
        -1 without an evaluation.
    """
    return metrics.get(f"{prefix}AP", -1.0) if groups is None else groups.balanced_ap(metrics, prefix)


def best_ap(metrics: dict, groups: ClassGroups | None = None) -> float:
    """The higher `ap_of` of the raw and the averaged weights."""
    return max(ap_of(metrics, prefix, groups) for prefix in ("eval_", "eval_ema_"))


class BestApMetric(TrainerCallback):
    """Adds the metric `eval_best_AP`, the higher AP of the raw and the averaged weights, by which the best weights are chosen.

    Args:
        groups: classes of a run that keeps old classes.
    """

    def __init__(self, groups: ClassGroups | None = None):
        self.groups = groups

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if "eval_AP" in metrics:
            metrics[f"eval_{BEST_AP}"] = best_ap(metrics, self.groups)


class TrainingProgress(TrainerCallback):
    """Shows the progress of the first process.

    The time left includes evaluations and checkpoints. It is estimated from the mean times of steps, evaluations and checkpoints
    so far.

    Args:
        console: where progress is shown. Without a terminal, lines are printed instead of a bar.
        groups: classes of a run that keeps old classes. Lines then also show the AP of the old and of the other classes.
    """

    def __init__(self, console: Console, groups: ClassGroups | None = None):
        self.console, self.groups = console, groups
        self._bar: ProgressBar | None = None
        self._timer = _Timer()
        self._loss: float | None = None
        self._losses: list[float] = []  # since the last line
        self._best = -1.0
        self._last_line = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self._timer = _Timer()
        self._best = max((best_ap(entry, self.groups) for entry in state.log_history), default=-1.0)  # resumed
        if state.is_world_process_zero and self.console.is_terminal:
            # The bar does not estimate the time left: `seconds_left` includes evaluations.
            self._bar = ProgressBar(self.console, estimate=False)
            self._bar("training", state.global_step, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        self._timer.lap("step")
        self._show(args, state, "training")

    def on_prediction_step(self, args, state, control, **kwargs):
        self._show(args, state, "evaluating")

    def on_save(self, args, state, control, **kwargs):
        self._timer.lap("saving")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self._loss = logs["loss"]
            self._losses.append(self._loss)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self._timer.lap("evaluation")
        self._line(args, state, metrics)
        self._show(args, state, "training")

    def on_epoch_end(self, args, state, control, **kwargs):
        if args.eval_strategy == "no":
            self._line(args, state, {})

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Remove the bar. Call it after an interrupted run too."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def seconds_left(self, args, state) -> float | None:
        """Estimated seconds to the end of the run, or None before the first step."""
        step = self._timer.mean("step")
        if step is None:
            return None
        others = sum(self._timer.mean(name) or 0.0 for name in ("evaluation", "saving"))
        return (state.max_steps - state.global_step) * step + _evaluations_left(args, state) * others

    def _show(self, args, state, description: str) -> None:
        if self._bar is None:
            if time.perf_counter() - self._last_line >= _SILENCE:
                self._line(args, state, {}, description)
            return
        left = self.seconds_left(args, state)
        parts = [] if self._loss is None else [f"loss {self._loss:.2f}"]
        parts += [] if left is None else [f"{_duration(left)} left"]
        self._bar("training", state.global_step, state.max_steps, title=description, note=", ".join(parts))

    def _line(self, args, state, metrics: dict, description: str | None = None) -> None:
        """Print one line.

        Args:
            description: "training" or "evaluating", for a line between two evaluations.
        """
        self._last_line = time.perf_counter()
        losses = self._losses
        if description is None:
            self._losses = []
        if not state.is_world_process_zero:
            return
        where = f"step {state.global_step} of {state.max_steps}"
        if description is not None:
            where = f"{description}, {where}"
        elif args.max_steps <= 0 and args.eval_strategy != "steps":
            where = f"epoch {state.epoch:.0f} of {args.num_train_epochs:g}"
        parts = [f"loss {sum(losses) / len(losses):.2f}"] if losses else []
        for name, label, digits in _SHOWN:
            if name in metrics:
                parts.append(f"{label} {metrics[name]:.{digits}f}")
        if self.groups is not None and "eval_AP" in metrics:
            is_average = ap_of(metrics, "eval_ema_", self.groups) > ap_of(metrics, "eval_", self.groups)
            old, others = self.groups.mean_aps(metrics, "eval_ema_" if is_average else "eval_")
            parts += [f"of old classes {old:.3f}"] if old >= 0 else []
            parts += [f"of the others {others:.3f}"] if others >= 0 else []
        if (ap := best_ap(metrics, self.groups)) > self._best:
            self._best = ap
            parts.append("best so far")
        if (left := self.seconds_left(args, state)) is not None and state.global_step < state.max_steps:
            parts.append(f"{_duration(left)} left")
        self.console.print(f"{where}: {', '.join(parts)}", soft_wrap=True, highlight=False, markup=False)


class _Timer:
    """Mean durations by name. A lap is the time since the previous lap of any name."""

    def __init__(self):
        # Number of laps, their sum in seconds, and seconds of the first lap.
        self._laps: dict[str, tuple[int, float, float]] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        lap = now - self._last
        count, total, first = self._laps.get(name, (0, 0.0, lap))
        self._laps[name] = count + 1, total + lap, first
        self._last = now

    def mean(self, name: str) -> float | None:
        count, total, first = self._laps.get(name, (0, 0.0, 0.0))
        # The first step also builds kernels and starts workers. It is left out as soon as there is a second step.
        if name == "step" and count > 1:
            count, total = count - 1, total - first
        return total / count if count else None


def _evaluations_left(args, state) -> int:
    if args.eval_strategy == "no" or not state.max_steps:
        return 0
    if args.eval_strategy == "steps":
        return state.max_steps // state.eval_steps - state.global_step // state.eval_steps
    epochs = state.num_train_epochs
    return max(0, round(epochs - (state.epoch or 0)))


def _duration(seconds: float) -> str:
    """A duration in the largest unit in which it is at least 1.5."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.0f} {unit}" if seconds >= 9.5 * length else f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
