"""Deformable attention without `grid_sample`, for exported graphs: every runtime has the operators that it is made of."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def finite_locations(locations: Tensor) -> Tensor:
    """NaN and infinity lie outside, as whatever is far away: they have no cell, and must not reach bilinear weights."""
    return locations.where((locations.abs() < 1e4).all(-1, keepdim=True), -1e4)


def ms_deform_attn_gather(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """The operator as sums of gathered rows; arguments and result are those of `ms_deform_attn`.

    Heights and widths may be symbolic, as they are while `torch.export` traces.
    """
    batch, tokens, heads, _ = value.shape
    dtype = torch.promote_types(value.dtype, locations.dtype)
    # Filled in, so that a traced graph computes the sizes of other images; a tensor of numbers would be a constant of it.
    sides = [torch.full((), side, device=value.device) for height, width in shapes for side in (width, height)]
    sizes = torch.stack(sides).view(-1, 2)  # (L, 2)
    locations = finite_locations(locations).to(dtype)
    # In cells, the centre of the first at 0; in a row, the upper left neighbour of a point and the lower right one.
    points = (locations * sizes[:, None] - 0.5).transpose(-1, -2)  # (B, Q, H, L, 2, P)
    first = points.detach().floor()
    cells = torch.stack([first, first + 1], dim=-2)  # (B, Q, H, L, 2, 2, P): x or y, neighbour, point
    shares = 1 - (points[..., None, :] - cells).abs()
    sides = sizes[:, :, None, None]
    shares = shares * ((cells >= 0) & (cells < sides))
    cells = torch.minimum(cells.clamp(min=0).long(), sides - 1)
    column, row = cells.unbind(-3)  # (B, Q, H, L, 2, P)
    # Each row with each column, the four neighbours: (B, Q, H, L, 2, 2, P).
    cells = row[..., :, None, :] * sizes[:, 0, None, None, None] + column[..., None, :, :]
    shares = shares[..., 1, :, None, :] * shares[..., 0, None, :, :] * weights.to(dtype)[..., None, None, :]

    # D_head numbers of one head, whole, where they lie: no map is transposed.
    rows = value.flatten(0, 2)  # (B * S * H, D_head)
    image, head = (torch.arange(count, device=value.device) for count in (batch, heads))
    start = (image[:, None] * (tokens * heads) + head)[:, None, :, None]  # (B, 1, H, 1) row of the level's first cell
    out = 0
    for level, (height, width) in enumerate(shapes):
        indices = start + cells[:, :, :, level].flatten(3) * heads  # (B, Q, H, 4 * P)
        samples = F.embedding(indices, rows).to(dtype)  # (B, Q, H, 4 * P, D_head)
        share = shares[:, :, :, level].flatten(3)[..., None, :]  # (B, Q, H, 1, 4 * P)
        out = out + (share @ samples).squeeze(-2)  # (B, Q, H, D_head)
        start = start + height * width * heads
    return out.flatten(-2).to(value.dtype)  # (B, Q, H * D_head)
