"""Runs of `dino_hf.train` that kill themselves with SIGKILL, for test_training_run.py: kill_train.py <folder with data> [recipe].

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
    "recipe": "finetune",
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
# A recipe of another detector: 7 batches of 2 images are 7 steps in an epoch, and the learning rates fall in the second one.
SHORT_CHAIN = [
    (lambda: after_step(3), ["checkpoint-2"]),
    (lambda: after_step(9), []),  # the checkpoint with the best AP stays, and the newest one
    (while_evaluating, []),
]
OF_RECIPES = {
    "num_train_epochs": 2,
    "batch_size": 2,
    "gradient_accumulation_steps": 1,
    "lr_drop_epochs": [1.2],
    "save_strategy": "steps",
    "eval_strategy": "steps",
    "save_steps": 2,
    "eval_steps": 2,
}


def fork(data: Path, name: str, settings: dict, prepare: Callable[[], None] | None = None) -> int:
    def call() -> None:
        if prepare is not None:
            prepare()
        run.train(data / "data", model=data / "untrained", output_dir=data / name, resume=True, **settings)

    return exit_code_of_fork(call)


def main(data: Path, recipe: str | None = None) -> None:
    chain, settings = (CHAIN, SETTINGS) if recipe is None else (SHORT_CHAIN, SETTINGS | OF_RECIPES | {"recipe": recipe})
    os.fsync = lambda descriptor: None  # for a machine that stops; here only processes do
    assert fork(data, "whole", settings) == 0
    for number, (prepare, expected) in enumerate(chain):
        assert fork(data, "killed", settings, prepare) == -signal.SIGKILL, number
        found = sorted(path.name for path in (data / "killed").glob("checkpoint-*"))
        assert not expected or found == expected, (number, found)
        assert '"finished"' not in (data / "killed/run.json").read_text(), number
    assert fork(data, "killed", settings) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
