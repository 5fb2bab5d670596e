"""Losses for logs: the parts of the training loss, and the loss of a whole evaluation."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..model.criterion import DinoDetrLoss
from ..model.modeling_dino_detr import DinoDetrModelOutput
from ..model.targets import PADDING_LABEL, collect_targets

NAMES = ("loss_ce", "loss_bbox", "loss_giou")  # class, L1 and GIoU loss, as the original calls them


def weighted_parts(loss_dict: Mapping[str, Tensor], criterion: DinoDetrLoss) -> Tensor:
    """Weighted losses of the last decoder layer, and the whole loss.

    Args:
        loss_dict: second result of `criterion`.
    Returns:
        (4,) class, L1, GIoU and whole loss.
    """
    last = [criterion.weights[name] * loss_dict[name] for name in NAMES]
    whole = [
        (criterion.denoising_weights if "_dn" in key else criterion.weights)[name] * value
        for key, value in loss_dict.items()
        for name in NAMES
        if key.startswith(name)
    ]
    return torch.stack([*last, torch.stack(whole).sum()]).detach()


def count_boxes(labels: Mapping[str, Tensor]) -> Tensor:
    """Number of boxes in labels from `DetectionCollator`, as a tensor ()."""
    return (labels["class_labels"] != PADDING_LABEL).sum()


class TrainingParts:
    """Parts of the training loss since the last log.

    Each part is reported as a share of the logged loss, so accumulation and processes need no separate bookkeeping.
    """

    def __init__(self):
        self._sum: Tensor | None = None

    def add(self, parts: Tensor) -> None:
        """Add the (4,) losses of one batch, from `weighted_parts`."""
        self._sum = parts if self._sum is None else self._sum + parts

    def take(self, loss: float, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the parts and start again from zero.

        Args:
            loss: the logged loss.
            reduce: sums a tensor over the processes.
        """
        if self._sum is None:
            return {}
        *parts, whole = reduce(self._sum).tolist()
        self._sum = None
        return {name: loss * part / whole if whole else 0.0 for name, part in zip(NAMES, parts, strict=True)}


class HeldOutLoss:
    """Loss of an evaluation: the sum over all images divided by the number of boxes, independent of the batches.

    `Trainer` divides the loss of each batch by its boxes and averages over batches. Boxes of images with few boxes then count
    more, and the result depends on the batch size.

    Args:
        keeps_non_finite: whether losses that are NaN or infinite are added. `Trainer` leaves them out by default.
    """

    def __init__(self, keeps_non_finite: bool):
        self.keeps_non_finite = keeps_non_finite
        self.sums: Tensor | None = None  # (5,) float64: four losses and the number of boxes

    def add(self, losses: Tensor, num_boxes: Tensor) -> None:
        """Add one batch of this process.

        Args:
            losses: (4,) from `weighted_parts`, not divided by boxes.
            num_boxes: ()
        """
        new = torch.cat([losses.detach().cpu().double(), num_boxes.cpu().double()[None]])
        if self.keeps_non_finite or new.isfinite().all():
            self.sums = new if self.sums is None else self.sums + new

    def means(self, accelerator) -> dict[str, float]:
        """Losses per box over all processes. Each process must call it. Without any box, the divisor is 1, as in training."""
        sums = torch.zeros(len(NAMES) + 2, dtype=torch.float64) if self.sums is None else self.sums
        # Send float64 as two float32 numbers: not every device has float64.
        high = sums.float()
        parts = torch.stack([high, (sums - high.double()).float()]).to(accelerator.device)
        *losses, num_boxes = accelerator.reduce(parts, "sum").cpu().double().sum(0).tolist()
        return {name: loss / max(num_boxes, 1.0) for name, loss in zip((*NAMES, "loss"), losses, strict=True)}


def num_own_images(accelerator, batch_size: int) -> int:
    """Number of images of this batch to count. With several processes, accelerate fills the last batches with repeated images."""
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return batch_size
    return min(batch_size, max(0, state.remainder - accelerator.process_index * batch_size))


def score_first_images(
    detector: nn.Module, outputs: ModelOutput, labels: Mapping[str, Tensor], count: int
) -> Mapping[str, Any]:
    """`loss` and `loss_dict` of the first `count` images of an evaluated batch, not divided by boxes.

    Args:
        outputs: outputs of the model for the whole batch.
    """
    if not count:
        return {name: _zeros(outputs[name]) for name in ("loss", "loss_dict")}
    names = ("enc_topk_logits", "enc_topk_bboxes", "intermediate_logits", "intermediate_pred_boxes")
    parts = DinoDetrModelOutput(**{name: outputs[name][:count] for name in names})
    labels = {name: labels[name][:count] for name in ("class_labels", "boxes")}
    targets = collect_targets(labels, count, detector.config.num_labels, parts.enc_topk_logits.device)
    return detector.score(parts, targets, num_items_in_batch=1)


def _zeros(value: Tensor | Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
    return {name: _zeros(part) for name, part in value.items()} if isinstance(value, Mapping) else value.new_zeros(())
