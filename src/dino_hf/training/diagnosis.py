"""Diagnosis of training: stability of matches, distance of anchors and gradient norms of parts, as scalars in the logs."""

import contextlib
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..common.output_folders import replace_file
from ..common.regular_files import is_regular, read_json
from ..model.box_ops import cxcywh_to_xyxy, generalized_iou
from ..model.criterion import DinoDetrLoss
from ..model.matcher import Matches, match
from ..model.targets import PADDING_LABEL, collect_targets
from .detector import find_detector

_SMALL_AREA = 32**2  # square pixels; COCO's bound of small objects
_SAME_PLACE = (
    0.5  # two anchors with a GIoU above this count as the same place; 0.5 is also COCO's lowest IoU of a match
)
_DEAD_SCORE = 0.05  # every class starts at 0.01, the focal prior; a learnt class reaches five times that

HISTORY_NAME = "training_doctor.json"
_LARGEST_HISTORY = 2**30  # bytes; COCO's 36,000 held-out boxes have 1.8 MB

_LABEL_NAMES = {"class_labels", "boxes", "image_id", "orig_size"}

logger = logging.getLogger(__name__)


class Match(NamedTuple):
    """Query matched with a box, and the anchor that this query started from: (4) cxcywh in [0, 1]."""

    query: int
    anchor: list[float]


class BoxPrediction(NamedTuple):
    """Prediction of the last decoder layer for a held-out box."""

    match: Match
    distance: float  # L1 distance of anchor and box, in [0, 4]
    is_small: bool
    label: int  # class of the box
    score: float  # score of this class, in [0, 1]


BoxKey = tuple[int, int]  # image id, and index of the box in its image


class MatchHistory:
    """Matches of the last evaluation. A file in each checkpoint keeps them."""

    def __init__(self):
        self.matches: dict[BoxKey, Match] = {}

    def remember(self, matches: Mapping[BoxKey, Match]) -> None:
        """Keep matches. Anchors are rounded to 4 digits, as in the file, so a resumed run compares with the same numbers."""
        self.matches = {
            key: Match(query, [round(value, 4) for value in anchor]) for key, (query, anchor) in matches.items()
        }

    def save(self, folder: Path) -> None:
        """Write the file into a checkpoint, one row for each box."""
        rows = [[*key, match.query, *match.anchor] for key, match in self.matches.items()]
        with replace_file(folder / HISTORY_NAME) as path:
            path.write_text(json.dumps(rows), encoding="utf-8")

    def load(self, folder: Path | None) -> None:
        """Read the file of a checkpoint. Without a file, comparisons start after the next evaluation."""
        self.matches = {}
        if folder is None or not is_regular(folder / HISTORY_NAME):
            return
        try:
            rows = read_json(folder / HISTORY_NAME, _LARGEST_HISTORY)
            self.matches = {(int(i), int(p)): Match(int(q), [float(x) for x in anchor]) for i, p, q, *anchor in rows}
            if any(len(match.anchor) != 4 for match in self.matches.values()):
                raise ValueError("an anchor does not have 4 numbers")
        except (OSError, ValueError, TypeError, OverflowError) as error:
            self.matches = {}
            logger.warning("%s cannot be read (%s): comparisons of matches start again.", folder / HISTORY_NAME, error)


class TrainingDoctor(TrainerCallback):
    """Logs scalars about every training step and evaluation of a `Trainer`, in `trainer.state.log_history` and in its trackers.
    (TensorBoard shows `doctor/x` as `train/doctor/x`.)

        trainer.add_callback(TrainingDoctor(trainer))

    It adds no forward pass and does not change a bit of training. In training, it waits for the device only when logs
    are written. Values are over all processes. "Small run" below means: 0.3 M parameters, 12 epochs on 240 drawn scenes.

    With each training log:

    - `doctor/loss_matching`, `doctor/loss_denoising`: the two parts of the logged `loss`. Their sum is `loss`.
    - `doctor/denoising_ratio`: denoising loss divided by matching loss, of the last decoder layer. Its level depends on the data
      (0.7 in a log of the original, issue 152 of IDEA-Research/DINO; 1.0 to 1.25 in the small run), so watch its trend. If it falls
      while `loss_matching` stays the same, the decoder restores noised boxes, but has no good anchors for other boxes: check ATD.
      If it rises because `loss_denoising` stays the same, the noise may be too strong.
    - `doctor/grad_norm_<part>`: gradient norm before clipping, in the logged step, of backbone, encoder, query_selection, denoising
      (its label embedding, always small) and decoder (with its heads). The root of the sum of their squares is the logged
      `grad_norm`. A frozen part has no value. With DeepSpeed, no part has a value. A part with a norm of zero no longer learns. A
      part with a much larger norm than the others determines how strongly all gradients are clipped.

    With each evaluation, over the boxes of the held-out images (of the first data set, if there are several) and the matches of
    the last decoder layer:

    - `doctor/match_changed`: share of boxes matched with another query than at the last evaluation. This is the instability of
      DN-DETR (arXiv:2203.01305, sec. 3), by boxes instead of queries. In DINO a query is a rank among the selected tokens, so the
      value stays near 1 until the learning rate is low (small run: 0.97 to 0.41).
    - `doctor/match_moved`: share of boxes with a matched query that starts from another place than at the last evaluation. Its
      anchor then has a GIoU below 0.5 with the earlier anchor. The share should fall (small run: 0.60 to 0.13). If it grows,
      boxes move between queries and each query must learn again: the learning rate may be too high.
    - `doctor/atd_100`, `doctor/atd_100_small`: ATD(100) of the paper (sec. 3.3, fig. 4), in [0, 4]. It is the mean of the 100
      largest L1 distances between a box and the initial anchor of its query, both cxcywh in [0, 1]. Lower is better. The second
      value is for boxes smaller than 32 x 32 pixels in the original image. With fewer than 100 boxes it is the mean of all.
    - `doctor/dead_classes`: number of classes of held-out boxes to which no matched query gives a score above 0.05. It should fall
      to 0. A class that stays dead is too rare, mislabelled, or missing in the training data. The attribute `dead_classes` has the
      names.

    A resumed run continues the comparison. Each checkpoint in the trainer's output folder has the matches in
    `training_doctor.json`. This file has 1.8 MB for the 36,000 boxes of COCO's validation images.

    To exclude an evaluation of other weights, such as their average, use `with doctor.paused(): trainer.evaluate(...)`.

    Args:
        trainer: the trainer that the doctor is added to.
        k: number of boxes averaged in `atd_<k>`.
    """

    def __init__(self, trainer: Trainer, k: int = 100):
        self.trainer = trainer
        self.k = k
        self.dead_classes: list[str] = []  # dead classes of the last evaluation
        self._hook = None
        self._is_paused = False
        self._history = MatchHistory()
        self.resumed_from: Path | None = None  # checkpoint; None: the checkpoint of this step in the output folder

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore everything the model does inside the context."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.on_train_end(args, state, control)  # removes the hook of an interrupted run
        self._detector = find_detector(model)
        self._parts = {name: list(part.parameters()) for name, part in self._detector.model.named_children()}
        self._losses, self._norms, self._box_predictions = None, {}, {}
        checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        self._history.load((self.resumed_from or checkpoint) if state.global_step else None)

        @torch.compiler.disable
        def observe(module: nn.Module, args: tuple, kwargs: dict, outputs) -> None:
            # A copy of the model has a copy of the hook, so check that this is the model itself.
            if module is model and not self._is_paused:
                self._observe(module.training, kwargs.get("labels"), outputs)

        self._hook = model.register_forward_hook(observe, with_kwargs=True)

    def on_train_end(self, args, state, control, **kwargs):
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _observe(self, is_training: bool, labels, outputs) -> None:
        criterion = self._detector.criterion
        if is_training:
            losses = weighted_losses(outputs.loss_dict, criterion)  # (4,)
            self._losses = losses if self._losses is None else self._losses + losses
            self._box_predictions = {}  # batches seen since the last evaluation did not belong to an evaluation
        elif isinstance(labels, Mapping) and set(labels) >= _LABEL_NAMES:
            targets = collect_targets(labels, len(outputs.logits), outputs.logits.shape[-1], outputs.logits.device)
            layer = outputs.logits.detach().float()[None], outputs.pred_boxes.detach().float()[None]  # one layer
            matches, _ = match(*layer, targets, criterion.cost, criterion.alpha, skip_non_finite=True)
            box_units = getattr(self.trainer.processing_class, "box_units", None)
            sizes = labels["orig_size"] if box_units is None else box_units(labels["orig_size"])
            for key, prediction in find_box_predictions(labels, outputs, matches, sizes).items():
                self._box_predictions.setdefault(key, prediction)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._norms = gradient_norms(self._parts)

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" not in logs or self._losses is None:
            return
        losses = self.trainer.accelerator.reduce(self._losses).tolist()
        norms = {part: norm.item() for part, norm in self._norms.items()}
        self._losses, self._norms = None, {}

        matching, denoising, last_matching, last_denoising = losses
        share = _ratio(matching, matching + denoising)
        values = {"loss_matching": logs["loss"] * share}
        if denoising:
            values["loss_denoising"] = logs["loss"] * (1 - share)
            values["denoising_ratio"] = _ratio(last_denoising, last_matching)
        # Gradients are clipped by now, all by one factor. Only the logged norm is from before clipping.
        scale = _ratio(logs["grad_norm"], math.hypot(*norms.values())) if norms else 1.0
        self._report(values | {f"grad_norm_{part}": norm * scale for part, norm in norms.items()})

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if self._hook is None or self._is_paused:
            return
        predictions, self._box_predictions = self._box_predictions, {}
        data = self.trainer.eval_dataset
        prefix = f"eval_{next(iter(data))}" if isinstance(data, dict) else "eval"
        if f"{prefix}_runtime" not in metrics:  # another data set
            return
        predictions = merge(gather_object([predictions]))
        if not predictions:
            logger.warning(
                "TrainingDoctor saw no boxes in this evaluation. Either the images have no boxes, or labels is not a dictionary "
                "with the keys %s. DetectionCollator returns this dictionary.",
                sorted(_LABEL_NAMES),
            )
            return
        matches = {key: prediction.match for key, prediction in predictions.items()}
        values = changes(self._history.matches, matches)
        self._history.remember(matches)

        values[f"atd_{self.k}"] = average_largest([prediction.distance for prediction in predictions.values()], self.k)
        if small := [prediction.distance for prediction in predictions.values() if prediction.is_small]:
            values[f"atd_{self.k}_small"] = average_largest(small, self.k)
        dead = find_dead_classes(predictions.values())
        values["dead_classes"] = len(dead)
        self.dead_classes = [self._detector.config.id2label[label] for label in dead]
        logger.info("Dead classes: %s", self.dead_classes)
        self._report(values)

    def save(self, checkpoint: Path) -> None:
        """Write the matches into the folder of a checkpoint, in the first process."""
        if self.trainer.is_world_process_zero():
            self._history.save(checkpoint)

    def on_save(self, args, state, control, **kwargs):
        checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if checkpoint.is_dir() and not (checkpoint / HISTORY_NAME).is_file():  # DinoDetrTrainer has written it already
            self.save(checkpoint)

    def on_predict(self, args, state, control, metrics, **kwargs):
        self._box_predictions = {}

    def _report(self, values: dict[str, float]) -> None:
        self.trainer.log({f"doctor/{name}": value for name, value in values.items()})


def weighted_losses(loss_dict: dict[str, Tensor], criterion: DinoDetrLoss) -> Tensor:
    """(4,) matching and denoising loss of all output sets, then both of the last decoder layer; 0 without denoising."""
    suffixes = [name.removeprefix("loss_ce") for name in loss_dict if name.startswith("loss_ce")]

    def weighted(suffixes: list[str], weights: dict[str, float]) -> Tensor:
        """(len(suffixes),)"""
        return sum(w * torch.stack([loss_dict[name + suffix] for suffix in suffixes]) for name, w in weights.items())

    matching = [suffix for suffix in suffixes if not suffix.startswith("_dn")]
    losses, last = weighted(matching, criterion.weights), matching.index("")
    if "_dn" not in suffixes:
        return torch.stack([losses.sum(), losses.new_zeros(()), losses[last], losses.new_zeros(())])
    denoising = [suffix for suffix in suffixes if suffix.startswith("_dn")]
    noised_losses, noised_last = weighted(denoising, criterion.denoising_weights), denoising.index("_dn")
    return torch.stack([losses.sum(), noised_losses.sum(), losses[last], noised_losses[noised_last]])


def gradient_norms(parts: dict[str, list[nn.Parameter]]) -> dict[str, Tensor]:
    """L2 norm () of the gradients of each part with gradients."""
    norms = {}
    for part, parameters in parts.items():
        if gradients := [parameter.grad for parameter in parameters if parameter.grad is not None]:
            norm = get_total_norm(gradients)
            norms[part] = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return norms


def find_box_predictions(
    labels: Mapping[str, Tensor], outputs, matches: Matches, sizes: Tensor
) -> dict[BoxKey, BoxPrediction]:
    """Predictions of the queries that are matched with the boxes of a batch.

    Args:
        labels: from `DetectionCollator`.
        outputs: outputs of the model for these labels.
        matches: matches of the last decoder layer.
        sizes: (B, 2) height and width that boxes are relative to, of the image or of its canvas, in pixels of the original image.
    """
    _, image, query, target = matches  # (M,)
    is_box = labels["class_labels"] != PADDING_LABEL  # (B, boxes of an image), in the order of the T targets
    place = is_box.nonzero()[target, 1]  # (M,)
    label = labels["class_labels"][is_box][target]  # (M,)
    box = labels["boxes"][is_box][target]  # (M, 4)
    area = box[:, 2:].prod(-1) * sizes.to(box.device)[image].prod(-1)  # (M,)
    anchor = outputs.enc_topk_bboxes[image, query].float()  # (M, 4)
    distance = (anchor - box).abs().sum(-1)  # (M,)
    score = outputs.logits[image, query, label].sigmoid()  # (M,)
    columns = labels["image_id"][image], place, query, anchor, distance, area < _SMALL_AREA, label, score
    return {
        (image_id, place): BoxPrediction(Match(query, anchor), *rest)
        for image_id, place, query, anchor, *rest in zip(*(column.tolist() for column in columns), strict=True)
    }


def merge(parts: Iterable[dict[BoxKey, BoxPrediction]]) -> dict[BoxKey, BoxPrediction]:
    """Merge the predictions of all processes. If several processes have an image (as padding), the first process counts."""
    merged = {}
    for part in reversed(list(parts)):
        merged |= part
    return dict(sorted(merged.items()))


def changes(before: dict[BoxKey, Match], now: dict[BoxKey, Match]) -> dict[str, float]:
    """`match_changed` and `match_moved` over the boxes in both evaluations; empty without any."""
    both = [key for key in now if key in before]
    if not both:
        return {}
    changed = sum(now[key].query != before[key].query for key in both)
    anchors = [cxcywh_to_xyxy(torch.tensor([matches[key].anchor for key in both])) for matches in (before, now)]
    moved = (generalized_iou(*anchors) < _SAME_PLACE).sum().item()
    return {"match_changed": changed / len(both), "match_moved": moved / len(both)}


def average_largest(values: list[float], k: int) -> float:
    """Mean of the k largest values, or of all values if there are fewer."""
    largest = sorted(values, reverse=True)[:k]
    return sum(largest) / len(largest)


def find_dead_classes(predictions: Iterable[BoxPrediction]) -> list[int]:
    """Classes to which no matched query gives a score above 0.05."""
    best = {}
    for prediction in predictions:
        best[prediction.label] = max(best.get(prediction.label, 0.0), prediction.score)
    return sorted(label for label, score in best.items() if score <= _DEAD_SCORE)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
