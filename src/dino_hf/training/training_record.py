"""Record of a training run in `config.provenance["training"]`, from which the model card is written."""

import copy
import logging
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..common.regular_files import read_settings
from ..data.image_digests import (
    DIGEST_SIZE,
    FINGERPRINT_SIZE,
    MOST_DECODED,
    image_digests,
    image_fingerprints,
    pack,
    unpack,
)
from ..data.tiled_data import tiled_images, whole_images
from ..evaluation.seen_images import SeenImages
from ..runtime.model_card import digest_to_compare, read_card, write_card_for_upload, write_model_card
from ..runtime.weights_digest import weights_digest
from .coco_data import CocoData

logger = logging.getLogger(__name__)

_MOST_EARLIER = 50_000  # images of earlier runs
_MOST_RECORDED = 20_000  # images; each digest takes 7 bytes in the configuration
_METRICS = ("AP", "AR_")  # prefixes of the metrics of CocoEvaluator


def record_training(
    trainer: Trainer,
    train: CocoData,
    held_out: CocoData | Mapping[str, CocoData] | None = None,
    base_model: str | None = None,
    license: str | None = None,
) -> None:
    """Record data, recipe and AP of a `Trainer` for the model card. Call it before `train()`.

    The record is in `model.config.provenance`, so it is saved with the model and in checkpoints. `Trainer.push_to_hub` then writes
    our model card instead of the library's.

    Args:
        trainer: trainer of a DINO model. Evaluations are recorded as long as `compute_metrics` is not replaced.
        train, held_out: the data, or tiles of them. The card shows their `name`; `train._replace(name="Birds of Hamburg")` changes
            it. If there are several held-out data sets by name, as for `Trainer`, the card shows the first.
        base_model: repository or folder that training starts from. None: the source of the model.
        license: licence of the weights, by its name on the Hub ("apache-2.0").
    """
    record_origin(trainer.model, base_model, license)
    trainer.add_callback(_TrainingRecord(trainer, train, held_out))

    def create_model_card(tags=None, model_name=None, **others):
        """Replaces `Trainer.create_model_card`: our card, with tags."""
        if ignored := sorted(name for name, value in others.items() if value is not None):
            logger.warning(
                "The model card is written from config.provenance, not from %s; see record_training.", ignored
            )
        if trainer.is_world_process_zero():
            _write(trainer, [tags] if isinstance(tags, str) else tags or [])

    trainer.create_model_card = create_model_card  # on the instance, so any Trainer can be recorded


def record_origin(model, base_model: str | None = None, license: str | None = None) -> None:
    """Record the source and the licence of a model in its configuration, see `record_training`."""
    config = model.config
    provenance = copy.deepcopy(config.provenance) if isinstance(config.provenance, dict) else {}
    if base_model := base_model or _origin(model):
        provenance["base_model"] = base_model
    if license:
        provenance["license"] = license
    config.provenance = provenance


def train_record(data: Any, rows: Any) -> CocoData:
    """The training data, for `record_training`. Rows that a user has prepared have no name."""
    return data if isinstance(data, CocoData) else CocoData(rows, {}, [], None)


def recorded_images(train: CocoData, held_out: Sequence[CocoData], earlier: SeenImages | None = None) -> dict[str, str]:
    """Digests and fingerprints of the images, so that `dino_hf.evaluate` recognises training images and copies of them.

    They are not recorded for data sets of more than 20,000 images. Fingerprints are recorded for at most `MOST_DECODED` images,
    because each image has to be decoded.

    Args:
        earlier: record of the model that training starts from. Its training images are recorded as training images too.
    """
    # An image counts once, not its tiles.
    train, held_out = whole_images(train), [whole_images(data) for data in held_out]
    parts = {"trained": [train], "held_out": held_out}
    images = {
        name: pack(chain.from_iterable(map(image_digests, sets)))
        for name, sets in parts.items()
        if sets and sum(len(data.dataset) for data in sets) <= _MOST_RECORDED
    }
    for name, sets in parts.items():
        if sets and sum(len(data.dataset) for data in sets) <= MOST_DECODED:
            images[f"{name}_looks"] = pack(chain.from_iterable(map(image_fingerprints, sets)))
    earlier = earlier or SeenImages()
    for name, known, size in (
        ("trained", earlier.trained, DIGEST_SIZE),
        ("trained_looks", earlier.trained_fingerprints, FINGERPRINT_SIZE),
    ):
        if known and len(known) <= _MOST_EARLIER:
            images[name] = pack(known | unpack(images.get(name), size))
        elif known:
            logger.warning("%d images of earlier runs are too many to be recorded as training images.", len(known))
    return images


class _TrainingRecord(TrainerCallback):
    """Keeps `config.provenance["training"]` up to date. It draws no random numbers."""

    def __init__(self, trainer: Trainer, train: CocoData, held_out: CocoData | Mapping[str, CocoData] | None):
        self.prefix = "eval_"  # of Trainer's metrics
        if isinstance(held_out, Mapping):
            name = next(iter(held_out))
            self.prefix, held_out = f"eval_{name}_", held_out[name]
        self.tiles = tiled_images(train)
        self.has_held_out_tiles = held_out is not None and tiled_images(held_out) is not None
        self.trainer, self.train = trainer, whole_images(train)
        self.held_out = None if held_out is None else whole_images(held_out)
        self.compute_metrics = trainer.compute_metrics
        self.has_own_schedule = trainer.lr_scheduler is not None
        self.training: dict | None = None
        self.digests: dict[int, str] = {}  # step -> digest of the weights evaluated there, if known

    def on_train_begin(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        self.training = {
            "dataset": self.train.name,
            "num_images": len(self.train.dataset) if hasattr(self.train.dataset, "__len__") else None,
            "steps": state.global_step,
            "recipe": self._recipe(args, state, model, optimizer, lr_scheduler),
        }
        if self.tiles is not None:
            self.training["tiles"] = self.tiles.tiling.as_dict() | {"count": self.tiles.counts.tiles}
        model.config.provenance = {**(model.config.provenance or {}), "training": self.training}
        # Thresholds of the weights before training.
        model.config.score_threshold = model.config.class_score_thresholds = None
        self.digests = {}
        if state.global_step:  # resumed: the log of the checkpoint has earlier evaluations
            checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            self.digests = _evaluated_digest(state.best_model_checkpoint) | _evaluated_digest(checkpoint)
            self._take(next((entry for entry in reversed(state.log_history) if f"{self.prefix}AP" in entry), None))

    def on_step_end(self, args, state, control, **kwargs):
        if self.training is not None:
            self.training["steps"] = state.global_step  # before this step's checkpoint is saved

    def on_evaluate(self, args, state, control, metrics=None, eval_dataloader=None, **kwargs):
        if self.training is None or self.trainer.compute_metrics is not self.compute_metrics:
            return  # an evaluation on another data set
        # After training with load_best_model_at_end, `steps` is the step of the best weights, which are evaluated then.
        step = self.training["steps"]
        if state.is_world_process_zero and (digest := weights_digest(self.trainer.model)):
            self.digests[step] = digest
        self._take({**metrics, "step": step}, eval_dataloader)

    def on_train_end(self, args, state, control, **kwargs):
        if (
            args.load_best_model_at_end
            and state.best_model_checkpoint is not None
            and state.best_global_step is not None
        ):
            best = state.best_global_step
            self.training["steps"] = best
            entries = (entry for entry in state.log_history if f"{self.prefix}AP" in entry and entry["step"] == best)
            self._take(next(entries, None))

    def on_push_begin(self, args, state, control, model=None, **kwargs):
        # Between checkpoints, Trainer uploads configuration and weights, but not the code and the card.
        if state.is_world_process_zero:
            model.config.save_pretrained(args.output_dir)
            _write(self.trainer, [])

    def _take(self, metrics: dict | None, eval_dataloader=None) -> None:
        """The metrics of one evaluation, from `evaluate` or from the log."""
        if metrics is None or f"{self.prefix}AP" not in metrics:
            return
        before = self.training.get("evaluation", {})
        count = before.get("num_images") if self.held_out is None else len(self.held_out.dataset)
        if eval_dataloader is not None and hasattr(eval_dataloader.dataset, "__len__") and not self.has_held_out_tiles:
            count = len(eval_dataloader.dataset)  # it may have only a part of the data
        self.training["evaluation"] = {
            "dataset": None if self.held_out is None else self.held_out.name,
            "num_images": count,
            "step": metrics["step"],
            "metrics": {
                name.removeprefix(self.prefix): float(value)
                for name, value in metrics.items()
                if name.startswith(tuple(self.prefix + metric for metric in _METRICS))
            },
        }
        if digest := self.digests.get(metrics["step"]):
            self.training["evaluation"]["weights"] = digest

    def _recipe(self, args, state, model, optimizer, lr_scheduler) -> dict:
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps both
        lr_scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)
        rates = {group.get("initial_lr", group["lr"]) for group in optimizer.param_groups}
        precision = "bfloat16 autocast" if args.bf16 else "float16 autocast" if args.fp16 else None
        recipe = {
            "optimizer": type(optimizer).__name__,
            "learning_rate": max(rates),
            "lowest_group_learning_rate": min(rates) if len(rates) > 1 else None,
            "schedule": type(lr_scheduler).__name__ if self.has_own_schedule else str(args.lr_scheduler_type.value),
            "warmup_steps": None if self.has_own_schedule else args.get_warmup_steps(state.max_steps),
            "weight_decay": max(group.get("weight_decay", 0.0) for group in optimizer.param_groups),
            "max_grad_norm": args.max_grad_norm,
            "images_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "images_per_batch": args.train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "processes": args.world_size,
            "epochs": args.num_train_epochs if args.max_steps <= 0 else None,
            "planned_steps": state.max_steps,
            "precision": precision or str(model.dtype).removeprefix("torch."),
            "tiles": None if self.tiles is None else self.tiles.tiling.text,
            "seed": args.seed,
            "data_seed": args.data_seed,
        }
        return {name: value for name, value in recipe.items() if value is not None}


def _write(trainer: Trainer, tags: list[str]) -> None:
    folder, model = Path(trainer.args.output_dir), trainer.model
    folder.mkdir(parents=True, exist_ok=True)
    parts, weights = (model.config, model.num_parameters()), digest_to_compare(model)
    if trainer.hub_model_id is None:
        write_model_card(folder, *parts, tags, weights=weights)
    else:
        own, token = read_card(folder), trainer.args.hub_token
        write_card_for_upload(folder, *parts, trainer.hub_model_id, own, tags, token, weights)


def _evaluated_digest(checkpoint: str | Path | None) -> dict[int, str]:
    """Step and digest of the evaluation recorded in a checkpoint."""
    try:
        config = read_settings(Path(checkpoint, "config.json"))
        evaluation = config["provenance"]["training"]["evaluation"]
        return {evaluation["step"]: evaluation["weights"]}
    except (OSError, ValueError, LookupError, TypeError):  # no checkpoint, or no record in it
        return {}


def _origin(model) -> str | None:
    """Source of a model. For a folder only its name, because the card may be published."""
    name = getattr(model.config, "_name_or_path", None)
    return PurePath(name).name if name and Path(name).exists() else name or None
