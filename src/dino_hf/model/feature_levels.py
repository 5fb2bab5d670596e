"""Conversion between L feature maps and one sequence of S tokens, and the geometry of the maps."""

from typing import NamedTuple

import torch
from torch import Tensor


class FeatureLevels(NamedTuple):
    """Geometry of the L feature maps that were flattened into S tokens. It contains no trainable tensor."""

    shapes: tuple[tuple[int, int], ...]  # (height, width) of each level
    padding_mask: Tensor | None  # (B, S) True on padding; None where nothing is padded
    valid_ratios: Tensor  # (B, L, 2) share of each map that shows the image, as (x, y)

    def split(self, tokens: Tensor) -> list[Tensor]:
        """(B, S, ...) -> L tensors (B, h * w, ...)."""
        # Not `Tensor.split`: with variable sizes, an exported graph would contain a sequence.
        parts, start = [], 0
        for height, width in self.shapes:
            parts.append(tokens[:, start : start + height * width])
            start += height * width
        return parts


def flatten_maps(maps: list[Tensor]) -> Tensor:
    """L maps (B, C, h, w) -> tokens (B, S, C), ordered by level, row and column."""
    return torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)


def resize_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """(B, h, w) -> (B, height, width): the values at the nearest pixels, exactly as `F.interpolate` chooses them.

    We index by hand because some runtimes of exported graphs round the coordinates of the resize operator differently.
    """

    def nearest(size: int, num_cells: int) -> Tensor:
        cells = torch.arange(num_cells, device=mask.device, dtype=torch.float32)
        scale = cells.new_full((), size) / num_cells
        return (cells * scale).long().clamp(max=size - 1)

    return mask.index_select(1, nearest(mask.shape[1], height)).index_select(2, nearest(mask.shape[2], width))


def describe_levels(masks: list[Tensor]) -> FeatureLevels:
    """Geometry of L maps, from their padding masks (B, h, w), True on padding."""
    ratios = []
    for mask in masks:
        width_ratio = (~mask[:, 0, :]).float().mean(1)  # share of columns that are not padding, in the first row
        height_ratio = (~mask[:, :, 0]).float().mean(1)
        ratios.append(torch.stack([width_ratio, height_ratio], dim=-1))  # (B, 2)
    return FeatureLevels(
        shapes=tuple(tuple(mask.shape[1:]) for mask in masks),
        padding_mask=torch.cat([mask.flatten(1) for mask in masks], dim=1),
        valid_ratios=torch.stack(ratios, dim=1),
    )


def describe_whole_levels(maps: list[Tensor]) -> FeatureLevels:
    """Geometry of L maps (B, C, h, w) of images without padding."""
    ratios = torch.ones(maps[0].shape[0], len(maps), 2, dtype=torch.float32, device=maps[0].device)
    return FeatureLevels(shapes=tuple(tuple(level.shape[2:]) for level in maps), padding_mask=None, valid_ratios=ratios)


def cell_centers(levels: FeatureLevels) -> Tensor:
    """Centre of every cell, (B, S, 2) as (x, y), relative to the valid part of its level. Centres on padding are above 1."""

    def along_side(size: int, ratio: Tensor) -> Tensor:
        # Rounded to whole cells. Otherwise the rounding error of the ratio decides if a centre at exactly 0.01 is a proposal.
        valid_size = (ratio * size).round()  # (B)
        return (torch.arange(size, device=ratio.device, dtype=torch.float32) + 0.5) / valid_size[:, None]  # (B, size)

    centers = []
    for (height, width), ratio in zip(levels.shapes, levels.valid_ratios.unbind(1), strict=True):
        x = along_side(width, ratio[:, 0])[:, None].expand(-1, height, -1)  # (B, h, w)
        y = along_side(height, ratio[:, 1])[:, :, None].expand(-1, -1, width)
        centers.append(torch.stack([x, y], dim=-1).flatten(1, 2))  # (B, h * w, 2)
    return torch.cat(centers, dim=1)  # (B, S, 2)
