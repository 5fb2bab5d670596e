"""`transformers.Trainer` for a recipe: average of the weights, exact resume, whole checkpoints, losses of a whole window."""

import copy
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, ModelOutput

from ..common.output_folders import write_beside
from ..common.regular_files import read_settings
from ..data.image_digests import image_digests, pack
from ..matcher import NonFinitePredictionsError
from ..model_card import weights_digest
from ..targets import PADDING_LABEL
from .augmentation import mix_seeds
from .checkpoints import (
    UNFINISHED,
    check_checkpoint,
    check_moments,
    checkpoints_by_age,
    discard,
    flush,
    loaded_from,
    newest_checkpoint,
    was_stopped_early,
)
from .coco_data import CocoData, DetectionCollator, DetectionTransform
from .coco_metric import CocoEvaluator
from .detector import find_detector
from .doctor import TrainingDoctor
from .ema import EMA_FOLDER, ModelEma
from .held_out_loss import HeldOutLoss, num_boxes_of, num_own_images, score_of_first
from .loss_parts import TrainingParts, weighted_parts
from .model_card import record_training
from .readable_images import ReadableImages
from .recipes import Recipe
from .run_lock import locked_run
from .steps import StepCallback
from .trainer_checks import check_trainer

logger = logging.getLogger(__name__)

RECIPE_NAME = "recipe.json"
_MOST_RECORDED = 20_000  # images whose digests are kept in the configuration, 7 bytes each


class DinoDetrTrainer(Trainer):
    """`Trainer` that does what a recipe says, on COCO data. Whatever else `TrainingArguments` ask for is done as usual.

    - Training images are augmented, the optimizer, schedule and model settings are the recipe's; where arguments depart from the
      recipe, that is logged. `recipe.json` in the output folder keeps both.
    - `evaluate` gives COCO's numbers, as `eval_AP` and so on. With an average of the weights (`recipe.ema_decay`), it runs a
      second time with these, as `eval_ema_AP` and so on; all are in one dictionary, so `metric_for_best_model="ema_AP"` works. The
      average is saved as a model of its own in the folder `ema` of every checkpoint, and beside what `save_model` saves.
    - With gradient accumulation, losses are divided by the boxes of all batches of a step (`recipe.normalize_over_window`), also
      of all processes: batches of many and of few boxes then weigh as they would in one large batch.
    - A run that is killed, at any moment, and resumed ends with the weights of one that was not: bit by bit on a CPU, on a GPU as
      far as its operators repeat themselves. Everything random in a step depends on seed, epoch, image, step and process, and
      on nothing drawn before. A checkpoint gets its name when all of it is written. `train(resume_from_checkpoint=True)` also
      starts a run of which there is no checkpoint yet, so one command starts and continues it; one that was stopped early stays
      stopped, unless the recipe now has more patience.
    - Predictions that are NaN or infinite raise an error that names layer, image and epoch; a gradient that is raises one that
      names the images of the step (in float16, the loss scaler looks at gradients, and skips). Or such a step is skipped, as
      `recipe.on_non_finite` says, and counted in the logs.

    `predict` uses the model's own weights; the average's do with `with trainer.ema.applied():`.

    Args:
        model: `DinoDetrForObjectDetection`, with the classes of the data; frozen as wanted, or of `add_lora`.
        args: of `recipe.training_arguments`.
        recipe: of `get_recipe`. It configures the model.
        train: to train on.
        held_out: to evaluate on, loaded with `like=train`; several by name: the metrics of each are then `eval_<name>_AP` and so
            on, and the first one is that of the model card. None: there is no evaluation.
        image_processor: a `DinoDetrImageProcessor`; saved with the model. Its size is that of evaluation.
        callbacks: more `TrainerCallback`s.
        doctor: log what `TrainingDoctor` sees. Each checkpoint has its matches in `training_doctor.json`.
        on_bad_image: "skip": another image takes the place of one that cannot be read, see `ReadableImages`; "raise": training
            stops in one sentence; None: with the error of the data set.

    Attributes:
        ema: `ModelEma`, None without.
        readable_images: `ReadableImages`, which knows the bad images; None with `on_bad_image=None`.
        evaluator: the `CocoEvaluator`, of several held-out data sets that of the first; None without.

    Raises:
        ValueError: classes, arguments or devices that do not go with the recipe or each other.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        recipe: Recipe,
        train: CocoData,
        held_out: CocoData | Mapping[str, CocoData] | None = None,
        image_processor,
        callbacks: list[TrainerCallback] | None = None,
        doctor: bool = True,
        on_bad_image: str | None = None,
    ):
        sets = _held_out_sets(held_out)
        check_trainer(model, args, recipe, train, sets)
        detector = find_detector(model)
        recipe.configure(detector)
        self.recipe = recipe
        self._data_seed = args.seed if args.data_seed is None else args.data_seed
        self._train_transform = DetectionTransform(image_processor, recipe.augmentation, self._data_seed)
        self._evaluators = {name: CocoEvaluator(data, image_processor) for name, data in sets.items()}
        self.evaluator = next(iter(self._evaluators.values()), None)
        evaluated = {
            name: data.dataset.with_transform(DetectionTransform(image_processor)) for name, data in sets.items()
        }
        rows = train.dataset.with_transform(self._train_transform)
        self.readable_images = None
        if on_bad_image is not None:
            names = list(train.dataset.with_format(None)["file_name"])
            rows = self.readable_images = ReadableImages(rows, names, most=0 if on_bad_image == "raise" else None)
        super().__init__(
            model=model,
            args=args,
            data_collator=DetectionCollator(),
            train_dataset=rows,
            eval_dataset=evaluated.get("", evaluated or None),
            processing_class=image_processor,
            compute_metrics=self.evaluator,
            preprocess_logits_for_metrics=None if self.evaluator is None else self.evaluator.keep_top,
            callbacks=callbacks,
        )
        self.model_accepts_loss_kwargs = recipe.normalize_over_window
        detector.criterion.skip_non_finite = recipe.on_non_finite == "skip"
        self._check_sharding()
        self.ema = None
        if recipe.ema_decay is not None:
            self.ema = ModelEma(model, recipe.ema_decay, recipe.ema_warmup_steps)
        self.departures = recipe.departures(args, detector.config, len(train.dataset))
        self._train_data, self._held_out = train, sets
        first = next(iter(sets), "")
        self._main_prefix = f"eval_{first}" if first else "eval"  # of the metrics of the first data set
        self._training_parts = TrainingParts()
        self._loss_weights = detector.criterion.weights
        self._images: dict[str, str] | None = None  # for the record
        self._ema_evaluation: dict | None = None  # for the card of the averaged model
        self._stopped_early = False  # the run that is resumed
        self._steps_per_epoch = 1
        self._image_ids: list[Tensor] = []  # of the batches of this step
        self._batch_in_step = 0
        self._num_skipped = 0  # since the last log
        self._held_out_loss: HeldOutLoss | None = None  # of the evaluation that is going on
        self._unfinished: Path | None = None  # where a checkpoint is being written
        record_training(self, train, held_out)
        self._patience = None  # of a callback of ours
        if not any(isinstance(one, EarlyStoppingCallback) for one in callbacks or ()):
            self._patience = recipe.early_stopping_patience
        if self._patience is not None:
            self.add_callback(EarlyStoppingCallback(self._patience))
        self._step_callback = StepCallback(self)
        self.add_callback(self._step_callback)
        self._doctor = TrainingDoctor(self) if doctor else None
        if self._doctor is not None:
            self.add_callback(self._doctor)  # after the gradients of a step that is skipped are gone

    def _image_record(self) -> dict[str, str]:
        """Digests of the images, by which `dino_hf.evaluate` knows what was trained on; none of very many images."""
        if self._images is None:
            parts = {"trained": [self._train_data], "held_out": list(self._held_out.values())}
            self._images = {
                name: pack(chain.from_iterable(map(image_digests, sets)))
                for name, sets in parts.items()
                if sets and sum(len(data.dataset) for data in sets) <= _MOST_RECORDED
            }
        return self._images

    def _check_sharding(self) -> None:
        if (self.is_fsdp_enabled or self.is_deepspeed_enabled) and (
            self.recipe.ema_decay is not None or self.recipe.on_non_finite == "skip"
        ):
            raise ValueError(
                "FSDP and DeepSpeed shard weights and gradients, which can then neither be averaged nor looked at as a whole: use "
                f"get_recipe({self.recipe.name!r}, ema_decay=None, on_non_finite='raise'), or train without them."
            )

    # The recipe

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The recipe's."""
        if self.optimizer is None:
            self.optimizer = self.recipe.make_optimizer(self.model if model is None else model, self.args)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer=None) -> torch.optim.lr_scheduler.LRScheduler:
        """The recipe's, anew in each `train`."""
        optimizer = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = self.recipe.make_scheduler(optimizer, num_training_steps, self._steps_per_epoch)
        return self.lr_scheduler

    def set_initial_training_values(self, args: TrainingArguments, dataloader) -> tuple:
        """As in `Trainer`, whose steps per epoch are kept. A run that was stopped early has no epochs left."""
        num_epochs, self._steps_per_epoch, *others = super().set_initial_training_values(args, dataloader)
        return (0 if self._stopped_early else num_epochs, self._steps_per_epoch, *others)

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As in `Trainer`, but True begins anew where there is no checkpoint yet, and goes on from the newest that is whole."""
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
        self.accelerator.wait_for_everyone()  # all have looked
        if self.args.should_save:
            shutil.rmtree(output_dir / UNFINISHED, ignore_errors=True)  # of a run that was killed
            self._save_recipe(output_dir, is_resumed=bool(resume_from_checkpoint))
        self.accelerator.wait_for_everyone()
        self._stopped_early = False
        if self._doctor is not None:
            self._doctor.resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        if resume_from_checkpoint:
            self._stopped_early = self.args.restore_callback_states_from_checkpoint and was_stopped_early(
                resume_from_checkpoint, self._patience
            )
            if self._stopped_early:
                logger.warning(
                    "The run of %s had been stopped early and is not continued; restore_callback_states_from_checkpoint=False "
                    "forgets that.",
                    resume_from_checkpoint,
                )
            self._load_ema(resume_from_checkpoint)
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        if best is not None and (Path(best) / EMA_FOLDER).is_dir():
            self._load_ema(best)
        return output

    def _save_recipe(self, output_dir: Path, is_resumed: bool) -> None:
        for line in self.departures:
            logger.warning("Departs from the recipe %s: %s", self.recipe.name, line)
        content = {"recipe": self.recipe.as_dict(), "departures": self.departures}
        path = output_dir / RECIPE_NAME
        if is_resumed and (before := _recorded_recipe(path)):
            changed = [name for name, value in content["recipe"].items() if before.get(name) != value]
            if changed:
                old, new = ({name: one.get(name) for name in changed} for one in (before, content["recipe"]))
                logger.warning("The run that is resumed had another recipe, %s; it goes on with %s.", old, new)
        output_dir.mkdir(parents=True, exist_ok=True)
        with write_beside(path) as unfinished:
            unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def get_train_dataloader(self):
        """As in `Trainer`; the order of images depends on the seed only, not on what was seeded since."""
        with _random_numbers_of((self._data_seed,), self.args.device):
            return super().get_train_dataloader()

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """As in `Trainer`, which cannot count boxes: the batches of a step, and their boxes in all processes, at least 1."""
        batches, num_boxes = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._image_ids, self._batch_in_step = [batch["labels"]["image_id"] for batch in batches], 0
        if self.recipe.normalize_over_window:
            counts = [(batch["labels"]["class_labels"] != PADDING_LABEL).sum() for batch in batches]
            num_boxes = torch.zeros((), device=device) + sum(counts)
            num_boxes = self.accelerator.reduce(num_boxes, "sum")  # every process must come here in every step
            if not self.args.average_tokens_across_devices:
                # Trainer then leaves the mean of the processes' gradients, where it is to be their sum.
                num_boxes = num_boxes / self.args.world_size
            num_boxes = num_boxes.clamp(min=1)
        return batches, num_boxes

    def training_step(self, model, inputs: dict, num_items_in_batch: Tensor | None = None) -> Tensor:
        """As in `Trainer`, with random numbers that depend on seed, step, batch and process only. Those of the caller go on as if
        nothing had been drawn."""
        where = (self.args.seed, self.state.global_step, self._batch_in_step, self.args.process_index)
        self._batch_in_step += 1
        with _random_numbers_of(where, self.args.device):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        """As in `Trainer`.

        Raises:
            NonFinitePredictionsError: with the image's id, step and epoch.
        """
        try:
            if self._held_out_loss is not None and return_outputs and "labels" in inputs:
                return self._loss_in_evaluation(model, inputs)
            loss, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        except NonFinitePredictionsError as error:
            self._step_callback.look()  # a gradient may have come first
            image_id = int(inputs["labels"]["image_id"][error.image])
            where = f"It is the image of id {image_id}, {'in training' if model.training else 'in evaluation'} {self._when()}."
            error.args = (f"{error} {where} A recipe with on_non_finite='skip' leaves out what it spoils.",)
            raise
        if model.training:
            self._training_parts.add(weighted_parts(outputs["loss_dict"], self._loss_weights))
        return (loss, outputs) if return_outputs else loss

    def _loss_in_evaluation(self, model, inputs: dict) -> tuple[Tensor, ModelOutput]:
        """The loss of a batch and its outputs. The loss is also added to that of the whole evaluation."""
        labels = inputs["labels"]
        loss, outputs = super().compute_loss(model, inputs | {"num_items_in_batch": 1}, return_outputs=True)
        num_boxes = num_boxes_of(labels)
        batch_size = len(labels["boxes"])
        count = num_own_images(self.accelerator, batch_size)
        own = {name: value[:count] for name, value in labels.items()}
        scored = outputs if count == batch_size else score_of_first(find_detector(model), outputs, labels, count)
        parts = weighted_parts(scored["loss_dict"], self._loss_weights)
        parts[-1] = scored["loss"]  # NaN where something was skipped
        self._held_out_loss.add(parts, num_boxes_of(own))
        return loss / num_boxes.clamp(min=1), outputs

    def _when(self) -> str:
        return f"after step {self.state.global_step}, in epoch {(self.state.epoch or 0.0):.2f}"

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As in `Trainer`, with the parts of the loss since the last log; where steps may be skipped, with their number as
        `skipped_steps`."""
        if "loss" in logs:
            logs.update(self._training_parts.take(logs["loss"], self.accelerator.reduce))
        if "loss" in logs and self.recipe.on_non_finite == "skip":
            logs["skipped_steps"] = self._num_skipped
            self._num_skipped = 0
        super().log(logs, *args, **kwargs)

    # Evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """As in `Trainer`; each of several held-out data sets has its own evaluator."""
        evaluator = self._evaluators.get(eval_dataset) if isinstance(eval_dataset, str) else None
        if evaluator is None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        before = self.compute_metrics, self.preprocess_logits_for_metrics
        self.compute_metrics, self.preprocess_logits_for_metrics = evaluator, evaluator.keep_top
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self.compute_metrics, self.preprocess_logits_for_metrics = before

    def evaluation_loop(
        self, dataloader, description: str, prediction_loss_only=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ):
        """As in `Trainer`, and for `evaluate` once more with the averaged weights, whose metrics are named `eval_ema_...`. The
        loss is the sum of all images by the number of all boxes, whatever the batches."""
        arguments = (dataloader, description, prediction_loss_only, ignore_keys)
        output = self._evaluate_once(*arguments, metric_key_prefix)
        if self.ema is None or description == "Prediction":
            return output
        prefix = f"{metric_key_prefix}_ema"
        if self.ema.num_updates == 0:  # nothing is averaged yet
            averaged = {prefix + name.removeprefix(metric_key_prefix): value for name, value in output.metrics.items()}
            return output._replace(metrics=output.metrics | averaged)
        with self.ema.applied(), nullcontext() if self._doctor is None else self._doctor.paused():
            averaged = self._evaluate_once(*arguments, prefix)
        if metric_key_prefix == self._main_prefix and self.compute_metrics is self.evaluator is not None:
            self._record_ema_evaluation(averaged.metrics, len(dataloader.dataset))
        # The number of samples is only used for their rate, and there were twice as many.
        return output._replace(
            metrics=output.metrics | averaged.metrics, num_samples=output.num_samples + averaged.num_samples
        )

    def _evaluate_once(self, *arguments):
        self._held_out_loss = HeldOutLoss(keeps_non_finite=not self.args.logging_nan_inf_filter)
        try:
            output = super().evaluation_loop(*arguments)
            means = self._held_out_loss.means(self.accelerator)
        finally:
            self._held_out_loss = None
        if f"{arguments[-1]}_loss" not in output.metrics:
            return output
        losses = {f"{arguments[-1]}_{name}": mean for name, mean in means.items()}
        return output._replace(metrics=output.metrics | losses)

    def _record_ema_evaluation(self, metrics: dict[str, float], num_images: int) -> None:
        training = (self.model.config.provenance or {}).get("training", {})
        scores = {name.removeprefix(f"{self._main_prefix}_ema_"): value for name, value in metrics.items()}
        self._ema_evaluation = {
            "dataset": next(iter(self._held_out.values())).name,
            "num_images": num_images,
            "step": training.get("steps", self.state.global_step),  # of the best weights, after training
            "metrics": {name: float(value) for name, value in scores.items() if name.startswith(("AP", "AR_"))},
        }
        if self.is_world_process_zero() and (digest := weights_digest(self.ema.module)):
            self._ema_evaluation["weights"] = digest

    # Saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`, and the averaged model in the folder `ema` of that."""
        folder = Path(self.args.output_dir if output_dir is None else output_dir) / EMA_FOLDER
        if self.args.should_save and self.ema is not None and self.ema.num_updates:
            find_detector(self.ema.module).config = self._ema_config()
            self.ema.save(folder)
            self.processing_class.save_pretrained(folder)
        elif self.args.should_save and ModelEma.is_saved(folder):
            logger.warning("%s is the average of an earlier run and is deleted: this one has none.", folder)
            shutil.rmtree(folder)
        super().save_model(output_dir, _internal_call)

    def _ema_config(self):
        """The model's, with what was measured with the averaged weights."""
        config = copy.deepcopy(self.model.config)
        training = (config.provenance or {}).get("training")
        if training is not None:
            training["evaluation"] = self._ema_evaluation
            training["recipe"]["average_of_weights"] = (
                f"exponential, decay {self.ema.decay}, {self.ema.warmup_steps} warm-up steps"
            )
        return config

    def _load_ema(self, checkpoint: str | Path) -> None:
        if self.ema is None:
            return
        folder = Path(checkpoint) / EMA_FOLDER
        if not folder.is_dir():
            logger.warning("There is no average of the weights in %s: a new one begins with its weights.", checkpoint)
            self.ema.restart()
            return
        with loaded_from(Path(checkpoint), EMA_FOLDER):
            self.ema.load(folder)
        if (folder / CONFIG_NAME).is_file():  # adapters have none
            config = read_settings(folder / CONFIG_NAME)
            provenance = config.get("provenance") if isinstance(config, dict) else None
            training = provenance.get("training") if isinstance(provenance, dict) else None
            self._ema_evaluation = training.get("evaluation") if isinstance(training, dict) else None

    # What a checkpoint has may be whole and still not fit: Trainer's own errors do not name the file.

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        with loaded_from(Path(checkpoint), OPTIMIZER_NAME):
            super()._load_optimizer_and_scheduler(checkpoint)
            check_moments(self.optimizer)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with nullcontext() if checkpoint is None else loaded_from(Path(checkpoint), "rng_state.pth"):
            super()._load_rng_state(checkpoint)

    # Trainer writes a checkpoint under its final name, file by file, and deletes old ones in place: a run that is killed then
    # leaves half of one, which looks whole. There is no public method to change that in.

    def _save_checkpoint(self, model, trial) -> None:
        run_dir, name = Path(self._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        best = self.state.best_global_step
        best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{best}" if best else None
        if best is None or not (best.name == name or best.is_dir()):
            best = self.state.best_model_checkpoint
        unfinished = run_dir / UNFINISHED
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._unfinished = unfinished
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._unfinished = None
        self.state.best_model_checkpoint = None if best is None else str(best)
        self.accelerator.wait_for_everyone()  # every process has written its part
        if self.args.should_save:
            self.state.save_to_json(str(unfinished / name / TRAINER_STATE_NAME))
            if self._doctor is not None:
                self._doctor.save(unfinished / name)
            flush(unfinished / name)
            if (run_dir / name).exists():
                discard(run_dir / name)
            (unfinished / name).rename(run_dir / name)
            self._rotate_checkpoints(run_dir)
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / name))

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._unfinished is not None:
            return  # it is done when the folder has its name
        averaged = Path(checkpoint_folder) / EMA_FOLDER
        if averaged.is_dir() and self.is_world_process_zero():
            shutil.copytree(averaged, Path(self.args.output_dir) / EMA_FOLDER, dirs_exist_ok=True)
        super()._push_from_checkpoint(checkpoint_folder)

    def _rotate_checkpoints(self, run_dir: Path) -> None:
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        if limit is None or limit <= 0:
            return
        checkpoints = checkpoints_by_age(run_dir, self.state.global_step)
        others = [one for one in checkpoints[:-1] if best is None or one.name != Path(best).name]
        has_best = len(others) < len(checkpoints) - 1
        num_kept = max(0, limit - 1 - has_best)  # beside the newest and the best, which always stay
        for checkpoint in others[: len(others) - num_kept]:
            discard(checkpoint)

    def _finalize_training(self, trial, *args, **kwargs):
        best = self.state.best_model_checkpoint
        if self.args.save_total_limit == 1 and best is not None and self.args.should_save:
            for checkpoint in checkpoints_by_age(Path(self._get_output_dir(trial)), self.state.global_step):
                if not os.path.samefile(checkpoint, best):
                    discard(checkpoint)
            shutil.rmtree(Path(self._get_output_dir(trial)) / UNFINISHED, ignore_errors=True)
        return super()._finalize_training(trial, *args, **kwargs)


def _held_out_sets(held_out: CocoData | Mapping[str, CocoData] | None) -> dict[str, CocoData]:
    """By name; one that has no name is "". (A `CocoData` is a tuple, and no mapping.)"""
    if held_out is None:
        return {}
    return dict(held_out) if isinstance(held_out, Mapping) else {"": held_out}


def _recorded_recipe(path: Path) -> dict | None:
    """The recipe of the run that is resumed, for a comparison; None if its file is missing or damaged."""
    if not path.is_file():
        return None
    try:
        return dict(read_settings(path)["recipe"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("%s is damaged (%s) and is written again; changes of the recipe are not reported.", path, error)
        return None


@contextmanager
def _random_numbers_of(where: tuple[int, ...], device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(mix_seeds(where))
        yield
