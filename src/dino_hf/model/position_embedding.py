"""Sine embedding of positions, used for the cells of feature maps and for boxes."""

import math

import torch
from torch import Tensor


def sine_embedding(positions: Tensor, dim: int, temperature: float) -> Tensor:
    """Interleaved sine and cosine of each position, as in "Attention Is All You Need" (arXiv:1706.03762, sec. 3.5).

    Args:
        positions: (...) in radians.
        dim: even number of features per position.
    Returns:
        (..., dim)
    """
    exponent = torch.arange(0, dim, 2, device=positions.device) / dim  # (dim / 2)
    angles = positions[..., None] / temperature**exponent  # (..., dim / 2)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)  # (..., dim)


def embed_boxes(boxes: Tensor, dim: int, temperature: float = 10_000.0) -> Tensor:
    """Positional query of a box (arXiv:2201.12329, DAB-DETR, sec. 4.2). DINO orders the parts y, x, w, h.

    Args:
        boxes: (..., 4) cxcywh in [0, 1].
        dim: features per part.
    Returns:
        (..., 4 * dim)
    """
    x, y, w, h = (boxes * 2 * math.pi).unbind(-1)
    return torch.cat([sine_embedding(part, dim, temperature) for part in (y, x, w, h)], dim=-1)


def embed_map(padding_mask: Tensor, dim: int, temperature: float, offset: float) -> Tensor:
    """Position of each cell of a feature map, counted over its valid part only.

    Args:
        padding_mask: (B, h, w) True on padding.
        dim: number of features, half of them for y, half for x.
        temperature: 20 in the original release, 10000 in detrex.
        offset: added to the cell number, which starts at 1: 0 in the original release, -0.5 in detrex.
    Returns:
        (B, dim, h, w) always float32, because bfloat16 cannot count beyond 256.
    """
    y, x = (sine_embedding(_count(padding_mask, axis, offset), dim // 2, temperature) for axis in (1, 2))
    return torch.cat([y, x], dim=-1).permute(0, 3, 1, 2)  # (B, dim, h, w)


def embed_whole_map(height: int, width: int, dim: int, temperature: float, offset: float, device) -> Tensor:
    """`embed_map` for images without padding, (1, dim, h, w). It computes a sine per row and per column, not per cell."""
    rows = torch.zeros(1, height, 1, dtype=torch.bool, device=device)
    columns = torch.zeros(1, 1, width, dtype=torch.bool, device=device)
    y = sine_embedding(_count(rows, 1, offset), dim // 2, temperature)  # (1, h, 1, dim / 2)
    x = sine_embedding(_count(columns, 2, offset), dim // 2, temperature)  # (1, 1, w, dim / 2)
    return torch.cat([y.expand(-1, -1, width, -1), x.expand(-1, height, -1, -1)], dim=-1).permute(0, 3, 1, 2)


def _count(padding_mask: Tensor, axis: int, offset: float) -> Tensor:
    """Number of each cell along an axis, counted without padding, scaled so that the valid part spans 2 pi: (B, h, w)."""
    count = (~padding_mask).float().cumsum(axis)
    last = count.narrow(axis, count.shape[axis] - 1, 1)
    return (count + offset) / (last + 1e-6) * 2 * math.pi
