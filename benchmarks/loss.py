"""Compare our loss with the loss of transformers' Deformable DETR: value and speed, on the same predictions.

python benchmarks/loss.py

Shapes are as in an R50 4-scale DINO: 7 output sets (encoder and 6 decoder layers), 2 images with 20 boxes, 900 queries and 91
classes. Forward and backward passes are timed.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DeformableDetrConfig
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss

from common import Timed, keep, read_arguments
from detectors import DEFORMABLE, DINO, NUM_LABELS, random_labels
from dino_hf import DinoDetrConfig
from dino_hf.model.criterion import DinoDetrLoss
from dino_hf.model.targets import collect_targets
from measuring import side_by_side

OUTPUT_SETS = 7


@dataclass
class LossArguments(Timed):
    """Time both losses side by side."""

    rounds: int = field(default=15, metadata={"help": "number of times that each loss is timed"})
    num_boxes: int = field(default=20, metadata={"help": "number of boxes in each of the two images"})
    num_queries: int = field(default=900, metadata={"help": "number of queries"})


def random_case(num_boxes: int, num_queries: int, device: str, images: int = 2):
    """Logits and boxes that require gradients, and labels."""
    labels = random_labels(images, num_boxes, device)
    logits = torch.randn(OUTPUT_SETS, images, num_queries, NUM_LABELS, device=device) - 3
    boxes = 0.2 + 0.5 * torch.rand(OUTPUT_SETS, images, num_queries, 4, device=device)
    return logits.requires_grad_(), boxes.requires_grad_(), labels


def our_loss(logits: Tensor, boxes: Tensor, labels: list[dict]) -> Tensor:
    targets = collect_targets(labels, len(labels), logits.shape[-1], logits.device)
    return _OURS(logits, boxes, targets)[0]


def their_loss(logits: Tensor, boxes: Tensor, labels: list[dict]) -> Tensor:
    return DeformableDetrForObjectDetectionLoss(
        logits[-1],
        labels,
        logits.device,
        boxes[-1],
        their_config(logits.shape[-1], len(logits)),
        outputs_class=logits,
        outputs_coord=boxes,
    )[0]


@functools.cache  # making a configuration takes a noticeable part of the time of a loss
def their_config(num_labels: int, output_sets: int) -> DeformableDetrConfig:
    """A configuration with DINO's class cost of 2; the library's default is 1.

    All output sets but the last are auxiliary outputs, including the encoder's proposals: the sum is the same.
    """
    return DeformableDetrConfig(auxiliary_loss=True, num_labels=num_labels, decoder_layers=output_sets, class_cost=2)


_OURS = DinoDetrLoss(DinoDetrConfig())


def gradients(loss: Callable[..., Tensor], case: tuple) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: torch.autograd.grad(loss(*case), case[:2])


def main() -> None:
    arguments = read_arguments(LossArguments)
    torch.manual_seed(0)
    case = random_case(arguments.num_boxes, 60 if arguments.quick else arguments.num_queries, arguments.device)
    ours, theirs = our_loss(*case).item(), their_loss(*case).item()
    print(f"values {ours:.6f} and {theirs:.6f}, relative difference {abs(ours - theirs) / theirs:.1e}")
    candidates = {DINO: gradients(our_loss, case), DEFORMABLE: gradients(their_loss, case)}
    rows = side_by_side(candidates, arguments.rounds, arguments.device)
    settings = {"num_boxes": arguments.num_boxes, "num_queries": case[0].shape[2]}
    rows = keep("loss", settings, rows, arguments)
    print("{:.2f} times as fast ({:.2f} to {:.2f})".format(*rows[0]["times_faster_than"][DEFORMABLE]))


if __name__ == "__main__":
    main()
