"""Callback of `DinoDetrTrainer`: checks gradients, averages weights, and sets the learning rates of a resumed run."""

import logging
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from ..data.tiled_data import id_name
from .class_balance import weights_text

logger = logging.getLogger(__name__)

# More skipped steps in a row mean broken weights, not bad data. At the start of float16 training, the loss scale may need 16
# skipped steps to fall from 65,536 to 1.
MOST_SKIPPED_IN_A_ROW = 20


class _Step(NamedTuple):
    """A step whose gradient the host has not checked yet."""

    is_finite: Tensor  # () bool, on the device
    image_ids: list[Tensor]
    when: str


def waits_for_device(gradients: list[Tensor]) -> bool:
    """Whether reading a number computed from these gradients makes the host wait for the device."""
    return bool(gradients) and gradients[0].device.type != "cpu"


class StepCallback(TrainerCallback):
    """Callback of one `DinoDetrTrainer`.

    A gradient that is NaN or infinite never reaches the weights. On a CPU, and with `on_non_finite="skip"`, the host checks each
    gradient. Otherwise the optimizer skips the step on the device, and the host checks only before it logs, evaluates or saves.
    So it does not wait in each step.
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
        # Trainer cannot save the state of a callback that is missing in the checkpoint it resumes from.
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
            if isinstance(callback, EarlyStoppingCallback) and trainer._patience is not None:
                # Trainer has restored the patience of the earlier run.
                callback.early_stopping_patience = trainer._patience
        is_own = {"optimizer", "schedule"} & trainer._inputs.replaced.keys()  # the checkpoint has their values
        if state.global_step and not trainer.is_deepspeed_enabled and not is_own:
            self._set_rates(args, optimizer, lr_scheduler)
        self._record_recipe()

    def _set_rates(self, args, optimizer, lr_scheduler) -> None:
        """Set the learning rates and weight decay of this recipe. Trainer has loaded the checkpoint's values before."""
        recipe_groups = self.trainer.recipe.make_optimizer(self.trainer.model, args).param_groups
        scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)  # accelerate wraps it
        scheduler.base_lrs = [group["lr"] for group in recipe_groups]
        for group, new, factor in zip(optimizer.param_groups, recipe_groups, scheduler.lr_lambdas, strict=True):
            group.update({name: new[name] for name in ("weight_decay", "betas", "eps")})
            group["initial_lr"] = new["lr"]
            group["lr"] = new["lr"] * factor(scheduler.last_epoch)

    def _record_recipe(self) -> None:
        record = self.trainer.model.config.provenance["training"]["recipe"]  # from `record_training`
        self.trainer.model.config.provenance["training"]["images"] = self.trainer._image_record()
        record["recipe"] = self.trainer.recipe.name
        if "schedule" not in self.trainer._inputs.replaced:
            record["schedule"] = self.trainer.recipe.lr_scheduler
        if (repeats := self.trainer._repeat_sampler) is not None:
            record["repeat_threshold"], record["images_per_epoch"] = self.trainer.recipe.repeat_threshold, len(repeats)
        if self.trainer.recipe.class_weights is not None:
            record["class_weights"] = weights_text(self.trainer._train_data, self.trainer.recipe.class_weights)
        if self.trainer.departures:
            record["departures_from_the_recipe"] = "; ".join(self.trainer.departures)

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self._record_recipe()  # again, because a user may have called record_training in between
        self.trainer._train_transform.set_epoch(self.epoch)
        set_sampler_epoch(train_dataloader, self.epoch)
        self.epoch += 1

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        trainer = self.trainer
        self.is_dropped = False
        if (
            getattr(trainer.accelerator, "scaler", None) is not None
            or trainer.is_fsdp_enabled
            or trainer.is_deepspeed_enabled
        ):
            return  # a gradient scaler does its own check; sharded gradients cannot be checked here
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        # Gradients are already summed over the processes, so all processes agree.
        is_finite = torch.nn.utils.get_total_norm(gradients).isfinite()
        step = _Step(is_finite, list(trainer._image_ids), trainer._when())
        if trainer.recipe.on_non_finite == "raise":
            self.unseen.append(step)
            if waits_for_device(gradients) and "optimizer" not in trainer._inputs.replaced:
                # A fused optimizer skips the step if this attribute, made for gradient scalers, is not zero.
                getattr(optimizer, "optimizer", optimizer).found_inf = is_finite.logical_not().float()
            else:
                self.check_gradients()
        elif not is_finite:
            logger.warning("%s: the step is skipped.", self._problem(step))
            optimizer.zero_grad()
            self.is_dropped = True

    def check_gradients(self) -> None:
        """Check the gradients of all steps since the last call.

        Raises:
            ValueError: a gradient was NaN or infinite. The message names the images of its step.
        """
        while self.unseen:
            step = self.unseen.popleft()
            if not step.is_finite:
                self.unseen.clear()
                raise ValueError(
                    f"{self._problem(step)}. Training has diverged, or an image has extreme values. Check the images, lower the "
                    "learning rate, or skip these steps by a recipe with on_non_finite='skip'."
                )

    def _name(self, image_id: int) -> str:
        data = self.trainer._train_data
        return str(image_id) if data is None else id_name(data, image_id)

    def _problem(self, step: _Step) -> str:
        image_ids = [image_id for batch in step.image_ids for image_id in batch.tolist()]
        names = ", ".join(self._name(image_id) for image_id in image_ids)
        return f"The gradient of the images [{names}] is NaN or infinite, {step.when}"

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            self.check_gradients()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.check_gradients()

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


def set_sampler_epoch(dataloader, epoch: int) -> None:
    """Set the epoch of the sampler, which determines the order of the images.

    `Trainer` does so too, except in several processes that resume in the middle of an epoch: accelerate does not reach the sampler
    through the batch samplers that share and skip batches.
    """
    sampler = getattr(dataloader, "batch_sampler", None)
    while hasattr(sampler, "batch_sampler"):
        sampler = sampler.batch_sampler
    sampler = getattr(sampler, "sampler", None)
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)
