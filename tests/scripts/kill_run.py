"""Training runs that kill themselves with SIGKILL at a given moment, and what they end with, for test_resume.py to compare.

Each run is a fork of this process, which has imported everything and computed nothing: a new interpreter takes seconds.
"""

import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import torch
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed
from transformers.utils import logging

from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.training import checkpoints, load_coco
from dino_hf.training.augmentation import Augmentation
from dino_hf.training.recipes import get_recipe
from dino_hf.training.trainer import DinoDetrTrainer
from helpers import QUIET, tiny_config
from processes import exit_code_of_fork

PROCESSOR = DinoDetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 64})
RECIPE = get_recipe(
    "finetune",
    augmentation=Augmentation(
        short_sides=(40, 48, 56), longest_side=72, crop_short_sides=(48, 56), crop_sizes=(32, 44), photometric=0.5
    ),
    ema_decay=0.9,
    ema_warmup_steps=3,
    early_stopping_patience=9,
    model_settings={"num_denoising": 10},
    learning_rate=1e-3,
)
# 11 images in batches of 2 and windows of 2 batches are 3 steps in an epoch. Checkpoints at 2, 4 and 8 are within an epoch,
# those at 6 and 9 between two.
NUM_STEPS = 9
SETTINGS = {
    "max_steps": NUM_STEPS,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
    "save_total_limit": 2,
    "logging_steps": 1,
    "load_best_model_at_end": False,
    "metric_for_best_model": "step",
}


class LastIsBest(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_step"] = state.global_step


def make_trainer(data: Path, output_dir: Path, **settings) -> DinoDetrTrainer:
    train = load_coco(data / "train/annotations.json", data / "train")
    held_out = load_coco(data / "eval/annotations.json", data / "eval", like=train)
    set_seed(0)
    model = DinoDetrForObjectDetection(tiny_config(num_denoising=10, id2label=train.id2label))
    args = RECIPE.training_arguments(output_dir, **QUIET | SETTINGS | settings)
    return DinoDetrTrainer(
        model,
        args,
        recipe=RECIPE,
        train=train,
        held_out=held_out,
        image_processor=PROCESSOR,
        callbacks=[LastIsBest()],
    )


def result(trainer: DinoDetrTrainer) -> dict:
    """Everything that training leaves behind, but durations."""
    log = trainer.state.log_history
    patience = next(one for one in trainer.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback))
    return {
        "weights": trainer.model.state_dict(),
        "average": trainer.ema.module.state_dict(),
        "num_updates": trainer.ema.num_updates,
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "log": [
            {name: value for name, value in entry.items() if not name.endswith(("_runtime", "_per_second", "_time"))}
            for entry in log
            if "train_loss" not in entry  # of this process only
        ],
        "patience": patience.early_stopping_patience_counter,
        "best": Path(trainer.state.best_model_checkpoint).name,
        "checkpoints": checkpoint_names(Path(trainer.args.output_dir)),
    }


def checkpoint_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


# The moments


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_event(event: str, trainer: DinoDetrTrainer, step: int, num_before: int = 0) -> None:
    """At an event after a number of steps, and after other events of the kind there."""
    left = [num_before]

    def happen(args, state, control, **kwargs):
        if state.global_step == step:
            if not left[0]:
                kill()
            left[0] -= 1

    callback = TrainerCallback()
    setattr(callback, event, happen)
    trainer.add_callback(callback)


def while_writing(trainer: DinoDetrTrainer, step: int) -> None:
    """Half of the optimizer's state is on the disk, and nothing of what comes after it."""
    save = trainer._save_optimizer_and_scheduler

    def save_half(folder: str) -> None:
        save(folder)
        if trainer.state.global_step == step:
            os.truncate(Path(folder, "optimizer.pt"), 1000)
            kill()

    trainer._save_optimizer_and_scheduler = save_half


def before_naming(trainer: DinoDetrTrainer, step: int) -> None:
    """All is written, under another name."""
    checkpoints.sync_to_disk = lambda folder: kill() if trainer.state.global_step == step else None


def while_deleting(trainer: DinoDetrTrainer, step: int) -> None:
    """Of the checkpoint that makes room for another, one file is gone."""
    delete = shutil.rmtree

    def rmtree(folder, **kwargs):
        if trainer.state.global_step == step and Path(folder, "optimizer.pt").exists():
            Path(folder, "optimizer.pt").unlink()
            kill()
        delete(folder, **kwargs)

    shutil.rmtree = rmtree


MOMENTS = {
    "after step": partial(at_event, "on_step_end"),
    "between batches": partial(at_event, "on_substep_end"),
    "in evaluation": partial(at_event, "on_prediction_step"),
    "while writing": while_writing,
    "before naming": before_naming,
    "while deleting": while_deleting,
}
# What happens to a run, one after the other, and the checkpoints that are there then.
CHAIN = [
    (("after step", 1), []),
    (("before naming", 2), []),
    (("between batches", 3), ["checkpoint-2"]),
    (("while writing", 4), ["checkpoint-2"]),
    (("after step", 5), ["checkpoint-2", "checkpoint-4"]),
    (("while deleting", 6), ["checkpoint-4", "checkpoint-6"]),
    (("in evaluation", 8, 4), ["checkpoint-4", "checkpoint-6"]),  # three batches before: the average is in place
    (("after step", 9), ["checkpoint-6", "checkpoint-8"]),
]
WORKERS = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}


# The runs


def run(data: Path, output_dir: Path, settings: dict, moment: tuple | None) -> None:
    trainer = make_trainer(data, output_dir, **settings)
    if moment is not None:
        name, *where = moment
        MOMENTS[name](trainer, *where)
        torch.manual_seed(17)  # a run needs no random numbers of the one before
    trainer.train(resume_from_checkpoint=True)
    torch.save(result(trainer), output_dir / "result.pt")


def fork(data: Path, output_dir: Path, settings: dict, moment: tuple | None = None) -> int:
    """What a run that is a process of its own ends with: 0, or -9 if it was killed."""
    return exit_code_of_fork(lambda: run(data, output_dir, settings, moment))


def main(data: Path, folder: Path) -> None:
    logging.disable_progress_bar()
    os.fsync = lambda descriptor: None  # for a machine that stops; here only processes do
    determinism = {"full_determinism": True, "max_steps": 4}
    for name, settings in (("whole", {}), ("determined", determinism), ("again", determinism)):
        assert fork(data, folder / name, settings) == 0, name
    for name, settings, chain in (
        ("killed", {}, CHAIN),
        ("workers", WORKERS, [(("after step", 5), ["checkpoint-2", "checkpoint-4"])]),
    ):
        for moment, expected in chain:
            status = fork(data, folder / name, settings, moment)
            assert status == -signal.SIGKILL, (moment, status)
            assert checkpoint_names(folder / name) == expected, (moment, checkpoint_names(folder / name))
        assert fork(data, folder / name, settings) == 0, name


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
