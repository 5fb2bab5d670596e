"""The parts of the loss for logs, by the original's names: class, L1 and GIoU loss of the last decoder layer."""

from collections.abc import Mapping

import torch
from torch import Tensor

NAMES = ("loss_ce", "loss_bbox", "loss_giou")


def weighted_parts(loss_dict: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """(4,) the three losses of the last layer with their weights, as they are part of the loss; and the whole loss."""
    last = [weights[name] * loss_dict[name] for name in NAMES]
    whole = [weights[name] * value for key, value in loss_dict.items() for name in NAMES if key.startswith(name)]
    return torch.stack([*last, torch.stack(whole).sum()]).detach()


class TrainingParts:
    """Since the last log. A share is taken of the logged loss, so accumulation and processes need no account of their own."""

    def __init__(self):
        self._sum: Tensor | None = None

    def add(self, parts: Tensor) -> None:
        self._sum = parts if self._sum is None else self._sum + parts

    def take(self, loss: float, reduce) -> dict[str, float]:
        """
        Args:
            loss: that is logged.
            reduce: sums a tensor over the processes.
        """
        if self._sum is None:
            return {}
        *parts, whole = reduce(self._sum).tolist()
        self._sum = None
        return {name: loss * part / whole if whole else 0.0 for name, part in zip(NAMES, parts, strict=True)}
