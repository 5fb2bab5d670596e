"""Layers for the second implementation of DINO in source_arithmetic.py."""

from collections.abc import Iterator
from itertools import count, takewhile

import torch
import torch.nn.functional as F
from torch import Tensor


class SourceLayers:
    """Small layers that take their weights by name. Everything is computed in float32.

    Args:
        tensors: by the names of the original release.
    """

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = {
            name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def numbered(self, name: str, mark: str) -> Iterator[str]:
        """`name.0`, `name.1`, ... as long as they have the tensor `mark`."""
        return takewhile(lambda part: f"{part}.{mark}" in self, (f"{name}.{number}" for number in count()))

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def layer_norm(self, x: Tensor, name: str, eps: float = 1e-5) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self[f"{name}.weight"], self[f"{name}.bias"], eps)

    def mlp(self, x: Tensor, name: str, depth: int) -> Tensor:
        for layer in range(depth):
            x = self.linear(x, f"{name}.layers.{layer}")
            x = x.relu() if layer < depth - 1 else x
        return x

    def conv(self, x: Tensor, name: str, **options) -> Tensor:
        return F.conv2d(x, self[f"{name}.weight"], self.tensors.get(f"{name}.bias"), **options)

    def channel_norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return self.layer_norm(x.movedim(1, -1), name, eps).movedim(-1, 1)

    @staticmethod
    def sample(value: Tensor, height: int, width: int, places: Tensor) -> Tensor:
        """Bilinear samples, zero outside. (B, h * w, H, D) at (B, Q, H, P, 2) -> (B, Q, H, P, D)."""
        x, y = places[..., 0] * width - 0.5, places[..., 1] * height - 0.5
        left, top = x.floor(), y.floor()
        batch = torch.arange(len(value))[:, None, None, None]
        head = torch.arange(value.shape[2])[None, None, :, None]
        total = 0
        for column, row in ((left, top), (left + 1, top), (left, top + 1), (left + 1, top + 1)):
            share = (1 - (x - column).abs()) * (1 - (y - row).abs())
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            index = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).long()
            total = total + value[batch, index, head] * (share * inside)[..., None]
        return total
