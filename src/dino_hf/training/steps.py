"""What a `DinoDetrTrainer` does at the ends of epochs and steps: gradients without numbers, averages, rates of a resumed run."""

import logging
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

logger = logging.getLogger("dino_hf.training.trainer")

# More in a row are no accident of the data: weights that are broken spoil every step. At the start of float16 training, the
# loss scale may need 16 of them, from 65,536 down to 1.
MOST_SKIPPED_IN_A_ROW = 20


class _Step(NamedTuple):
    """A step whose gradient has not been looked at by the host."""

    is_finite: Tensor  # () bool, on the device
    image_ids: list[Tensor]
    when: str


def waits_for_device(gradients: list[Tensor]) -> bool:
    """Whether the host would have to wait for a number that is made of these gradients."""
    return bool(gradients) and gradients[0].device.type != "cpu"


class StepCallback(TrainerCallback):
    """Of one `DinoDetrTrainer`.

    A gradient that is NaN or infinite never reaches the weights. On a CPU, and where such steps are skipped, the host looks at
    each gradient. Otherwise the optimizer itself leaves such a step out, on the device, and the host asks when it writes logs,
    evaluates or saves: it does not wait in each step.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.unseen: deque[_Step] = deque()
        self.epoch = 0
        self.is_dropped = False
        self.num_skipped_in_a_row = 0

    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        trainer = self.trainer
        self.epoch = state.global_step // trainer._steps_per_epoch
        self.num_skipped_in_a_row = 0
        self.unseen.clear()
        if trainer.ema is not None:
            trainer.ema.module.to(trainer.model.device)
            if state.global_step == 0:
                trainer.ema.restart()
        # Trainer cannot save the state of a callback that the checkpoint it resumes from did not know.
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
            if isinstance(callback, EarlyStoppingCallback) and trainer._patience is not None:
                callback.early_stopping_patience = trainer._patience  # Trainer restores that of the run that is resumed
        if state.global_step and not trainer.is_deepspeed_enabled:
            self._take_up_rates(args, optimizer, lr_scheduler)
        self._record_recipe()

    def _take_up_rates(self, args, optimizer, lr_scheduler) -> None:
        """A run that is resumed has the learning rates and weight decay of the checkpoint: those of the recipe go first, as its
        schedule does."""
        wanted = self.trainer.recipe.make_optimizer(self.trainer.model, args).param_groups
        scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)  # accelerate wraps it
        scheduler.base_lrs = [group["lr"] for group in wanted]
        for group, new, factor in zip(optimizer.param_groups, wanted, scheduler.lr_lambdas, strict=True):
            group.update({name: new[name] for name in ("weight_decay", "betas", "eps")})
            group["initial_lr"] = new["lr"]
            group["lr"] = new["lr"] * factor(scheduler.last_epoch)

    def _record_recipe(self) -> None:
        record = self.trainer.model.config.provenance["training"]["recipe"]  # of record_training
        self.trainer.model.config.provenance["training"]["images"] = self.trainer._image_record()
        record["recipe"], record["schedule"] = self.trainer.recipe.name, self.trainer.recipe.lr_scheduler
        if self.trainer.departures:
            record["departures_from_the_recipe"] = "; ".join(self.trainer.departures)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._record_recipe()  # also in the record of a user who called record_training once more
        self.trainer._train_transform.set_epoch(self.epoch)
        self.epoch += 1

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        trainer = self.trainer
        self.is_dropped = False
        if (
            getattr(trainer.accelerator, "scaler", None) is not None
            or trainer.is_fsdp_enabled
            or trainer.is_deepspeed_enabled
        ):
            return  # the scaler of float16 looks itself
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        is_finite = torch.nn.utils.get_total_norm(gradients).isfinite()  # of the sum over processes: all see the same
        step = _Step(is_finite, list(trainer._image_ids), trainer._when())
        if trainer.recipe.on_non_finite == "raise":
            self.unseen.append(step)
            if waits_for_device(gradients):
                # Fused optimizers leave out a step of which this is not zero, as for a gradient scaler.
                getattr(optimizer, "optimizer", optimizer).found_inf = is_finite.logical_not().float()
            else:
                self.look()
        elif not is_finite:
            logger.warning("%s: the step is skipped.", _what(step))
            optimizer.zero_grad()
            self.is_dropped = True

    def look(self) -> None:
        """Ask the device about the gradients of the steps since the last time.

        Raises:
            ValueError: one was NaN or infinite; with the images of its step.
        """
        while self.unseen:
            step = self.unseen.popleft()
            if not step.is_finite:
                self.unseen.clear()
                raise ValueError(
                    f"{_what(step)}: training has diverged, or an image has extreme values. Look at them, lower the learning "
                    "rate, or leave such steps out by a recipe with on_non_finite='skip'."
                )

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            self.look()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.look()

    def on_optimizer_step(self, args, state, control, **kwargs):
        trainer = self.trainer
        if self.is_dropped or trainer.accelerator.optimizer_step_was_skipped:
            trainer._num_skipped += 1
            self.num_skipped_in_a_row += 1
            if self.num_skipped_in_a_row > MOST_SKIPPED_IN_A_ROW:
                raise ValueError(
                    f"{self.num_skipped_in_a_row} steps in a row had a gradient that is NaN or infinite, {trainer._when()}: the "
                    "weights must be broken, not the data. Resume from an earlier checkpoint with a lower learning rate."
                )
            return
        self.num_skipped_in_a_row = 0
        if trainer.ema is not None:
            trainer.ema.update()


def _what(step: _Step) -> str:
    image_ids = [image_id for batch in step.image_ids for image_id in batch.tolist()]
    return f"The gradient of the images {image_ids} is NaN or infinite, {step.when}"
