"""The loss against that of transformers' Deformable DETR, on the same predictions: same value, and how many times faster.

python benchmarks/loss.py

Shapes of an R50 4-scale DINO: 7 output sets (encoder and 6 decoder layers), 2 images of 20 boxes, 900 queries, 91 classes. Forward
and backward, side by side in one run.
"""

import statistics
import time
from dataclasses import dataclass, field

import torch
from transformers import DeformableDetrConfig, HfArgumentParser
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss

from dino_hf import DinoDetrConfig
from dino_hf.criterion import DinoDetrLoss
from dino_hf.targets import collect_targets


@dataclass
class LossArguments:
    """Time both losses side by side."""

    rounds: int = field(default=15, metadata={"help": "rounds; each runs both losses three times"})
    num_boxes: int = field(default=20, metadata={"help": "boxes of each of the two images"})


def random_case(num_boxes: int, output_sets: int = 7, images: int = 2, queries: int = 900, classes: int = 91):
    """logits, boxes with gradient, and labels."""
    logits = (torch.randn(output_sets, images, queries, classes) - 3).requires_grad_()
    boxes = (0.2 + 0.5 * torch.rand(output_sets, images, queries, 4)).requires_grad_()
    labels = [
        {
            "class_labels": torch.randint(classes, (num_boxes,)),
            "boxes": torch.cat([0.3 + 0.4 * torch.rand(num_boxes, 2), 0.05 + 0.3 * torch.rand(num_boxes, 2)], dim=1),
        }
        for _ in range(images)
    ]
    return logits, boxes, labels


def our_loss(logits, boxes, labels, criterion=DinoDetrLoss(DinoDetrConfig())):  # noqa: B008  (settings only)
    targets = collect_targets(labels, len(labels), logits.shape[-1], logits.device)
    return criterion(logits, boxes, targets)[0]


def their_config(num_labels: int, output_sets: int) -> DeformableDetrConfig:
    """With DINO's weights; the class cost of the library is 1. Every output set but the last is an auxiliary output to it, the
    encoder's proposals too: in a sum they are no special case."""
    return DeformableDetrConfig(auxiliary_loss=True, num_labels=num_labels, decoder_layers=output_sets, class_cost=2)


def their_loss(logits, boxes, labels, config=their_config(91, 7)):  # noqa: B008
    return DeformableDetrForObjectDetectionLoss(
        logits[-1], labels, logits.device, boxes[-1], config, outputs_class=logits, outputs_coord=boxes
    )[0]


def step(loss, logits, boxes, labels) -> float:
    started = time.perf_counter()
    torch.autograd.grad(loss(logits, boxes, labels), (logits, boxes))
    return time.perf_counter() - started


def main() -> None:
    arguments = HfArgumentParser(LossArguments).parse_args_into_dataclasses()[0]
    torch.manual_seed(0)
    case = random_case(arguments.num_boxes)
    ours, theirs = our_loss(*case).item(), their_loss(*case).item()
    print(f"values {ours:.6f} and {theirs:.6f}, relative difference {abs(ours - theirs) / theirs:.1e}")
    ratios, times = [], []
    for _ in range(arguments.rounds):
        our_time, their_time = (min(step(loss, *case) for _ in range(3)) for loss in (our_loss, their_loss))
        ratios.append(their_time / our_time)
        times.append(our_time)
    print(
        f"{statistics.median(ratios):.2f} times faster ({min(ratios):.2f} to {max(ratios):.2f}), "
        f"{1000 * statistics.median(times):.1f} ms on {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
