"""Runs of `dino_hf.train` that kill themselves with SIGKILL, for test_training_run.py: python kill_train.py <folder with data>.

Each run is a fork of this process, as in kill_run.py.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from dino_hf.run import results
from dino_hf.run import training_run as run
from dino_hf.run.progress import BestApMetric
from processes import exit_code_of_fork

# 14 images in windows of 2 batches of 4 are 2 steps in an epoch.
SETTINGS = {
    "num_train_epochs": 3,
    "batch_size": "auto",
    "report_to": "none",
    "learning_rate": 1e-3,
    "ema_decay": 0.5,
    "ema_warmup_steps": 0,
    "num_denoising": 10,
    "use_cpu": True,
}


def kill(*args, **kwargs) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Kill(BestApMetric):
    """In the place of a callback of every run."""

    step = 0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            kill()


def after_step(step: int) -> None:
    Kill.step = step
    run.BestApMetric = Kill


def while_evaluating() -> None:
    results.evaluate_model = kill


def while_saving() -> None:
    results.load_image_processor = kill


# What happens to the run, one after the other, and the checkpoints that are there then.
CHAIN: list[tuple[Callable[[], None], list[str]]] = [
    (lambda: after_step(1), []),
    (lambda: after_step(3), ["checkpoint-2"]),
    (lambda: after_step(5), ["checkpoint-2", "checkpoint-4"]),
    (while_saving, []),
    (while_evaluating, []),
]


def fork(data: Path, name: str, prepare: Callable[[], None] | None = None) -> int:
    def call() -> None:
        if prepare is not None:
            prepare()
        run.train(data / "data", model=data / "untrained", output_dir=data / name, resume=True, **SETTINGS)

    return exit_code_of_fork(call)


def main(data: Path) -> None:
    os.fsync = lambda descriptor: None  # for a machine that stops; here only processes do
    assert fork(data, "whole") == 0
    for number, (prepare, expected) in enumerate(CHAIN):
        assert fork(data, "killed", prepare) == -signal.SIGKILL, number
        found = sorted(path.name for path in (data / "killed").glob("checkpoint-*"))
        assert not expected or found == expected, (number, found)
        assert '"finished"' not in (data / "killed/run.json").read_text(), number
    assert fork(data, "killed") == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
