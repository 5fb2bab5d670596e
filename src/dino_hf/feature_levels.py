"""L feature maps and their geometry <-> one sequence of S tokens."""

from typing import NamedTuple

import torch
from torch import Tensor


class FeatureLevels(NamedTuple):
    """Geometry of the L feature maps that were flattened into S tokens. Holds no trainable tensor."""

    shapes: tuple[tuple[int, int], ...]  # (height, width) of each level
    padding_mask: Tensor  # (B, S) True on padding
    valid_ratios: Tensor  # (B, L, 2) share of each map that shows the image, as (x, y)

    def split(self, tokens: Tensor) -> list[Tensor]:
        """(B, S, ...) -> L tensors (B, h * w, ...)."""
        return list(tokens.split([height * width for height, width in self.shapes], dim=1))


def flatten_maps(maps: list[Tensor]) -> Tensor:
    """L maps (B, C, h, w) -> tokens (B, S, C), level after level, row after row."""
    return torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)


def describe_levels(masks: list[Tensor]) -> FeatureLevels:
    """Geometry of L maps, from their padding masks (B, h, w), True on padding."""
    ratios = []
    for mask in masks:
        width_ratio = (~mask[:, 0, :]).float().mean(1)  # first row: share of columns that are not padding
        height_ratio = (~mask[:, :, 0]).float().mean(1)
        ratios.append(torch.stack([width_ratio, height_ratio], dim=-1))  # (B, 2)
    return FeatureLevels(
        shapes=tuple(tuple(mask.shape[1:]) for mask in masks),
        padding_mask=torch.cat([mask.flatten(1) for mask in masks], dim=1),
        valid_ratios=torch.stack(ratios, dim=1),
    )


def cell_centers(levels: FeatureLevels) -> Tensor:
    """Centre of every cell, relative to the valid part of its own level: (B, S, 2) as (x, y); above 1 on padding."""
    device = levels.valid_ratios.device
    centers = []
    for (height, width), ratio in zip(levels.shapes, levels.valid_ratios.unbind(1), strict=True):
        y = torch.arange(height, device=device, dtype=torch.float32) + 0.5
        x = torch.arange(width, device=device, dtype=torch.float32) + 0.5
        y, x = torch.meshgrid(y, x, indexing="ij")
        grid = torch.stack([x, y], dim=-1).flatten(0, 1)  # (h * w, 2) in cells
        # A whole number of cells, or the rounding of the ratio decides whether a centre at exactly 0.01 is a proposal.
        valid_size = (ratio * torch.tensor([width, height], device=device)).round()  # (B, 2)
        centers.append(grid / valid_size[:, None])  # (B, h * w, 2)
    return torch.cat(centers, dim=1)  # (B, S, 2)
