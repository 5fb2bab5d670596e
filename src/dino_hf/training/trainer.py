"""`DinoDetrTrainer`: trains by a recipe, with averaged weights, exact resume, whole checkpoints and exact loss normalisation."""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainerCallback, TrainingArguments

from ..common.random_numbers import forked_random_numbers
from ..data.tiled_data import id_name, image_rows, whole_images
from ..evaluation.seen_images import seen_images
from ..model.matcher import NonFinitePredictionsError
from .augmentation import mix_seeds
from .checkpoint_files import (
    UNFINISHED,
    check_checkpoint,
    newest_checkpoint,
    was_stopped_early,
)
from .checks import check_same_classes, check_sharding, check_trainer
from .coco_data import CocoData, DetectionTransform
from .departures import find_departures, save_recipe
from .diagnosis import TrainingDoctor
from .ema import EMA_FOLDER
from .losses import HeldOutLoss, TrainingParts, count_boxes, weighted_parts
from .own_augmentation import OwnAugmentation
from .readable_images import ReadableImages
from .recipe import Recipe
from .recipe_trainer import RecipeTrainer
from .run_lock import locked_run
from .steps import StepCallback
from .tile_sampler import make_sampler
from .trainer_inputs import read_inputs
from .training_record import record_training, recorded_images, train_record

logger = logging.getLogger(__name__)


class DinoDetrTrainer(RecipeTrainer):
    """`Trainer` that follows a recipe, on COCO data. All other `TrainingArguments` work as usual.

    - The recipe sets augmentation, optimizer, schedule and model settings. Arguments that depart from the recipe are logged.
      `recipe.json` in the output folder keeps the recipe and the departures.
    - `evaluate` gives COCO's numbers, as `eval_AP` and so on. If weights are averaged (`recipe.ema_decay`), it also evaluates the
      averaged weights, as `eval_ema_AP` and so on. All metrics are in one dictionary, so `metric_for_best_model="ema_AP"` works.
      The averaged model is saved in the folder `ema` of every checkpoint, and of the folder that `save_model` writes.
    - With `recipe.normalize_over_window`, losses are divided by the number of boxes in all batches of a step and all processes.
      The result matches one large batch.
    - A run that is killed at any moment and resumed ends with the same weights as an uninterrupted run: bit by bit on a CPU; on a
      GPU, if its operators are deterministic. Random numbers of a step depend only on seed, epoch, image, step and process. A
      checkpoint gets its name when it is complete. `train(resume_from_checkpoint=True)` also starts a run without any
      checkpoint, so one command starts and continues a run. A run that was stopped early stays stopped, unless the recipe now
      has more patience.
    - Predictions that are NaN or infinite raise an error that names layer, image and epoch. A gradient that is NaN or infinite
      raises an error that names the images of the step; in float16, the loss scaler skips the step instead. With
      `recipe.on_non_finite="skip"`, these steps are skipped and counted in the logs.

    `predict` uses the model's own weights. To use the averaged weights, call it inside `with trainer.ema.applied():`.

    Args:
        model: `DinoDetrForObjectDetection` with the classes of the data. It may be partly frozen, or come from `add_lora`.
        args: from `recipe.training_arguments`.
        recipe: from `get_recipe`. It configures the model.
        train: training data. Or `train_dataset`: `CocoData`, or a data set whose rows are inputs of the collator already.
        held_out: data to evaluate on, loaded with `like=train`. Several data sets are given by name: their metrics are
            `eval_<name>_AP` and so on, and the model card shows the first one. None: no evaluation. Or `eval_dataset`, in
            the same forms as `train_dataset`.
        image_processor: a `DinoDetrImageProcessor`. It is saved with the model. Evaluation uses its size. Or
            `processing_class`.
        model_init: function that returns a new model for each training, in place of `model`. It may take the trial of a
            hyperparameter search.
        data_collator, compute_metrics, preprocess_logits_for_metrics, optimizers, optimizer_cls_and_kwargs: as in `Trainer`.
            A given argument replaces the part of the recipe, and the departures say so. `compute_metrics` gets detections
            from `CocoEvaluator.keep_top`. An optimizer class gets the parameter groups of the recipe. Its `lr` replaces the
            learning rate of the recipe, and the rates of backbone and sampling offsets change by the same factor.
        callbacks: more `TrainerCallback`s.
        doctor: log the findings of `TrainingDoctor`, and save its matches in `training_doctor.json` of each checkpoint.
        on_bad_image: "skip": another image takes the place of one that cannot be read, see `ReadableImages`. "raise": training
            stops with one sentence. None: training stops with the error of the data set.
        augmentation: your own augmentation of training images, applied before the recipe's, see `OwnAugmentation`. None: only
            the augmentation of the recipe.
        max_detections: number of detections that count in evaluation, see `CocoEvaluator`.

    Attributes:
        ema: `ModelEma`, or None.
        readable_images: `ReadableImages` with the bad images; None with `on_bad_image=None`.
        evaluator: the `CocoEvaluator` of the first held-out data set, or None.

    Raises:
        ValueError: classes, arguments, devices and recipe do not fit together.
    """

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable | None = None,
        *,
        recipe: Recipe | None = None,
        train: CocoData | None = None,
        held_out: CocoData | Mapping[str, CocoData] | None = None,
        image_processor: Any = None,
        doctor: bool = True,
        on_bad_image: str | None = None,
        augmentation: Any = None,
        max_detections: int | None = None,
    ):
        inputs = read_inputs(
            model=model,
            args=args,
            recipe=recipe,
            train=train,
            held_out=held_out,
            image_processor=image_processor,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_loss_func=compute_loss_func,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            data_collator=data_collator,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        check_trainer(args, recipe, inputs.coco_train, inputs.held_out)
        self.recipe, self._inputs, self._held_out = recipe, inputs, inputs.coco_held_out
        self._train_data, self._is_built = inputs.coco_train, False
        if model is not None:
            self._configure(model)
        check_same_classes(self._train_data, self._held_out)
        self._data_seed = args.seed if args.data_seed is None else args.data_seed
        if augmentation is not None and self._train_data is None:
            raise ValueError("augmentation needs train=load_coco(...): train_dataset prepares its images itself.")
        is_ready = augmentation is None or isinstance(augmentation, OwnAugmentation)
        own = augmentation if is_ready else OwnAugmentation(augmentation)
        self._train_transform = DetectionTransform(inputs.image_processor, recipe.augmentation, self._data_seed, own)
        self._evaluators = inputs.evaluators(max_detections)
        self.evaluator = next(iter(self._evaluators.values()), None)
        self._metrics = inputs.metrics(self._evaluators)
        train_rows, held_out_rows = inputs.rows(self._train_transform)
        self.readable_images = None
        if on_bad_image is not None:
            train_rows = self.readable_images = _skip_bad_images(self._train_data, train_rows, on_bad_image)
        first = next(iter(self._metrics), "")
        metrics, preprocess = self._metrics.get(first, (None, None))
        super().__init__(
            model=model,
            args=args,
            data_collator=inputs.collator(),
            train_dataset=train_rows,
            eval_dataset=held_out_rows,
            processing_class=inputs.image_processor,
            model_init=model_init,
            compute_metrics=metrics,
            preprocess_logits_for_metrics=preprocess,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        self._is_built = True
        self.model_accepts_loss_kwargs = recipe.normalize_over_window
        check_sharding(self, recipe)
        is_own = self._train_data is None
        self._repeat_sampler = (
            None if is_own else make_sampler(self._train_data, recipe.repeat_threshold, self._data_seed)
        )
        self._main_prefix = f"eval_{first}" if first else "eval"  # prefix of the metrics of the first held-out data set
        self._training_parts = TrainingParts()
        self._images: dict[str, str] | None = None  # digests, see recorded_images
        self._seen_before = seen_images(self.model)  # by the runs that the model comes from
        self._resumed_from: str | None = None  # checkpoint of the running training
        self._stopped_early = False  # whether the resumed run had been stopped early
        self._steps_per_epoch = 1
        self._image_ids: list[Tensor] = []  # image ids of this step, one tensor per batch
        self._batch_in_step = 0
        self._num_skipped = 0  # since the last log
        self._held_out_loss: HeldOutLoss | None = None  # sums of the running evaluation
        self._adopt(self.model)
        num_images = self._repeat_sampler or train_rows
        num_images = len(num_images) if hasattr(num_images, "__len__") else None
        self.departures = find_departures(recipe, args, self.model.config, num_images) + inputs.departures(recipe)
        held_out = self._held_out.get("", self._held_out or None)
        record_training(self, train_record(inputs.train, train_rows), held_out)
        self._add_callbacks(callbacks or [], doctor)

    def _add_callbacks(self, from_user: list[TrainerCallback], doctor: bool) -> None:
        self._patience = None  # patience of the EarlyStoppingCallback added here
        if not any(isinstance(callback, EarlyStoppingCallback) for callback in from_user):
            self._patience = self.recipe.early_stopping_patience
        if self._patience is not None:
            self.add_callback(EarlyStoppingCallback(self._patience))
        self._step_callback = StepCallback(self)
        self.add_callback(self._step_callback)
        self._doctor = TrainingDoctor(self) if doctor else None
        if self._doctor is not None:
            self.add_callback(self._doctor)  # last: after StepCallback has removed the gradients of a skipped step

    def _image_record(self) -> dict[str, str]:
        if self._images is None:
            held_out = list(self._held_out.values())
            self._images = (
                {} if self._train_data is None else recorded_images(self._train_data, held_out, self._seen_before)
            )
        return self._images

    def set_initial_training_values(self, args: TrainingArguments, dataloader) -> tuple:
        """As in `Trainer`. The steps per epoch are kept, and a run that was stopped early gets zero epochs."""
        num_epochs, self._steps_per_epoch, *others = super().set_initial_training_values(args, dataloader)
        return (0 if self._stopped_early else num_epochs, self._steps_per_epoch, *others)

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As in `Trainer`. True resumes from the newest whole checkpoint, or starts from the beginning if there is none."""
        with locked_run(Path(self.args.output_dir), self.args.should_save):
            return self._train(resume_from_checkpoint, *args, **kwargs)

    def _train(self, resume_from_checkpoint, *args, **kwargs):
        output_dir = Path(self.args.output_dir)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_checkpoint(output_dir)
            if resume_from_checkpoint is None and self.is_world_process_zero():
                logger.warning("There is no checkpoint in %s yet: training starts from the beginning.", output_dir)
        if resume_from_checkpoint:
            check_checkpoint(Path(resume_from_checkpoint))
        self.accelerator.wait_for_everyone()  # all processes have chosen the checkpoint
        if self.args.should_save:
            shutil.rmtree(output_dir / UNFINISHED, ignore_errors=True)  # left by a killed run
            save_recipe(output_dir, self.recipe, self.departures, is_resumed=bool(resume_from_checkpoint))
        self.accelerator.wait_for_everyone()
        self._stopped_early = False
        self._resumed_from = resume_from_checkpoint
        if self._doctor is not None:
            self._doctor.resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        if resume_from_checkpoint:
            self._stopped_early = self.args.restore_callback_states_from_checkpoint and was_stopped_early(
                resume_from_checkpoint, self._patience
            )
            if self._stopped_early:
                logger.warning(
                    "The run of %s had been stopped early and is not continued. To continue it, set "
                    "restore_callback_states_from_checkpoint=False.",
                    resume_from_checkpoint,
                )
            self._load_ema(resume_from_checkpoint)
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        if best is not None and (Path(best) / EMA_FOLDER).is_dir():
            self._load_ema(best)
        return output

    def get_train_dataloader(self):
        """As in `Trainer`. The order of images depends only on the seed, not on other uses of the random generator."""
        with _seeded((self._data_seed,), self.args.device):
            return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset=None):
        return super()._get_train_sampler(train_dataset) if self._repeat_sampler is None else self._repeat_sampler

    def num_examples(self, dataloader) -> int:
        """As in `Trainer`: the images of an epoch, with repeated ones."""
        is_repeated = self._repeat_sampler is not None and dataloader.dataset is self.train_dataset
        return len(self._repeat_sampler) if is_repeated else super().num_examples(dataloader)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """As in `Trainer`, but counts boxes.

        Returns:
            the batches of a step, and the number of their boxes in all processes, at least 1.
        """
        batches, num_boxes = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._image_ids, self._batch_in_step = (
            [batch["labels"]["image_id"] for batch in batches if "image_id" in batch["labels"]],
            0,
        )
        if self.recipe.normalize_over_window:
            counts = [count_boxes(batch["labels"]) for batch in batches]
            num_boxes = torch.zeros((), device=device) + sum(counts)
            num_boxes = self.accelerator.reduce(num_boxes, "sum")  # every process must call this in every step
            if not self.args.average_tokens_across_devices:
                # Trainer then averages the gradients of the processes, but they must be summed.
                num_boxes = num_boxes / self.args.world_size
            num_boxes = num_boxes.clamp(min=1)
        return batches, num_boxes

    def training_step(self, model, inputs: dict, num_items_in_batch: Tensor | None = None) -> Tensor:
        """As in `Trainer`. Randomness depends only on seed, step, batch and process. The caller's generators stay as they are."""
        where = (self.args.seed, self.state.global_step, self._batch_in_step, self.args.process_index)
        self._batch_in_step += 1
        with _seeded(where, self.args.device):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        """As in `Trainer`.

        Raises:
            NonFinitePredictionsError: the message names image id, step and epoch.
        """
        try:
            if self._held_out_loss is not None and return_outputs and "labels" in inputs:
                return self._loss_in_evaluation(model, inputs)
            loss, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        except NonFinitePredictionsError as error:
            # If an earlier step had a bad gradient, it is the cause. Its error is then raised instead.
            self._step_callback.check_gradients()
            evaluated = getattr(self.compute_metrics, "data", self._train_data)
            data, ids = self._train_data if model.training else evaluated, inputs["labels"].get("image_id")
            if ids is None or data is None:
                image = f"The image {error.image} of its batch is"
            else:
                image = f"The image has the id {id_name(data, int(ids[error.image]))},"
            where = f"{image} {'in training' if model.training else 'in evaluation'} {self._when()}."
            error.args = (f"{error} {where} A recipe with on_non_finite='skip' skips these steps.",)
            raise
        if model.training:
            self._training_parts.add(weighted_parts(outputs["loss_dict"], self._criterion))
        return (loss, outputs) if return_outputs else loss

    def _when(self) -> str:
        return f"after step {self.state.global_step}, in epoch {(self.state.epoch or 0.0):.2f}"

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As in `Trainer`, with the parts of the loss since the last log. If steps may be skipped, `skipped_steps` counts them."""
        if "loss" in logs:
            logs.update(self._training_parts.take(logs["loss"], self.accelerator.reduce))
        if "loss" in logs and self.recipe.on_non_finite == "skip":
            logs["skipped_steps"] = self._num_skipped
            self._num_skipped = 0
        super().log(logs, *args, **kwargs)


def _skip_bad_images(data: CocoData | None, rows, on_bad_image: str) -> ReadableImages:
    if data is None:
        raise ValueError(
            f"on_bad_image={on_bad_image!r} needs train=load_coco(...): train_dataset reads its images itself."
        )
    names = list(whole_images(data).dataset.with_format(None)["file_name"])
    return ReadableImages(rows, names, 0 if on_bad_image == "raise" else None, image_rows(data))


@contextmanager
def _seeded(where: tuple[int, ...], device: torch.device) -> Iterator[None]:
    with forked_random_numbers(device):
        torch.manual_seed(mix_seeds(where))
        yield
