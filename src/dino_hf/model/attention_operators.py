"""Multi-scale deformable attention in PyTorch, in three forms that compute the same, registered as backends."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_backends import Backend, register_backend

Shapes = Sequence[tuple[int, int]]  # (height, width) of each level


def finite_locations(locations: Tensor) -> Tensor:
    """Move NaN, infinity and far points outside of all maps, where they count as zero. They must not reach bilinear weights."""
    return locations.where((locations.abs() < 1e4).all(-1, keepdim=True), -1e4)


def ms_deform_attn_reference(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """The operator as one `grid_sample` per level. Every backend must agree with it. Arguments: see `ms_deform_attn`."""
    batch, _, heads, _ = value.shape
    # Values follow the precision of the coordinates: half precision is too coarse for them (0.3 pixels on a map of 167 columns).
    dtype = torch.promote_types(value.dtype, locations.dtype)
    maps = value.to(dtype).permute(0, 2, 3, 1).flatten(0, 1)  # (B * H, D_head, S)
    maps = maps.split([height * width for height, width in shapes], dim=-1)  # L x (B * H, D_head, h * w)
    grid = (2 * finite_locations(locations).to(dtype) - 1).transpose(1, 2).flatten(0, 1)  # (B * H, Q, L, P, 2)
    samples = [
        F.grid_sample(level.unflatten(-1, shape), grid[:, :, i], padding_mode="zeros", align_corners=False)
        for i, (level, shape) in enumerate(zip(maps, shapes, strict=True))
    ]  # L x (B * H, D_head, Q, P)
    weights = weights.to(dtype).transpose(1, 2).flatten(0, 1).flatten(-2)  # (B * H, Q, L * P)
    out = torch.einsum("ndqp,nqp->nqd", torch.cat(samples, dim=-1), weights)  # (B * H, Q, D_head)
    return out.unflatten(0, (batch, heads)).transpose(1, 2).flatten(-2).to(value.dtype)  # (B, Q, H * D_head)


def ms_deform_attn_torch(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """The reference with queries as the last axis and each level summed as soon as it is sampled.

    On a CPU the forward pass is 1.3 to 1.7 times as fast and needs a third of the memory. The backward pass is about as fast
    (docs/log.md).
    """
    batch, _, heads, _ = value.shape
    dtype = torch.promote_types(value.dtype, locations.dtype)
    maps = value.to(dtype).permute(0, 2, 3, 1).flatten(0, 1)  # (B * H, D_head, S)
    maps = maps.split([height * width for height, width in shapes], dim=-1)  # L x (B * H, D_head, h * w)
    grid = 2 * finite_locations(locations).to(dtype) - 1
    grid = grid.permute(0, 2, 3, 4, 1, 5).flatten(0, 1)  # (B * H, L, P, Q, 2)
    weights = weights.to(dtype).permute(0, 2, 3, 4, 1).flatten(0, 1)[:, :, None]  # (B * H, L, 1, P, Q)
    out = 0
    for i, (level, shape) in enumerate(zip(maps, shapes, strict=True)):
        level = level.unflatten(-1, shape)  # (B * H, D_head, h, w)
        samples = F.grid_sample(level, grid[:, i], padding_mode="zeros", align_corners=False)  # (B * H, D_head, P, Q)
        out = out + (samples * weights[:, i]).sum(2)  # (B * H, D_head, Q)
    return out.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(-2).to(value.dtype)  # (B, Q, H * D_head)


def ms_deform_attn_gather(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """The operator as sums of gathered rows, without `grid_sample`: every runtime of exported graphs has these operators.

    Heights and widths may be symbolic, as they are while `torch.export` traces. Arguments: see `ms_deform_attn`.
    """
    batch, tokens, heads, _ = value.shape
    dtype = torch.promote_types(value.dtype, locations.dtype)
    # `full` keeps the sizes variable in a traced graph. A tensor made from numbers would be a constant in it.
    # The dtype is given, because the ONNX exporter of torch 2.11 writes float32 without it.
    whole = {"dtype": torch.int64, "device": value.device}
    sides = [torch.full((), side, **whole) for height, width in shapes for side in (width, height)]
    sizes = torch.stack(sides).view(-1, 2)  # (L, 2)
    locations = finite_locations(locations).to(dtype)
    # Coordinates in cells, with the centre of the first cell at 0. Each point has a lower and an upper neighbour on either axis.
    points = (locations * sizes[:, None] - 0.5).transpose(-1, -2)  # (B, Q, H, L, 2, P)
    first = points.detach().floor()
    cells = torch.stack([first, first + 1], dim=-2)  # (B, Q, H, L, 2, 2, P): x or y, neighbour, point
    shares = 1 - (points[..., None, :] - cells).abs()
    sides = sizes[:, :, None, None]
    shares = shares * ((cells >= 0) & (cells < sides))
    cells = torch.minimum(cells.clamp(min=0).long(), sides - 1)
    column, row = cells.unbind(-3)  # (B, Q, H, L, 2, P)
    # The four neighbours, as pairs of a row and a column: (B, Q, H, L, 2, 2, P).
    cells = row[..., :, None, :] * sizes[:, 0, None, None, None] + column[..., None, :, :]
    shares = shares[..., 1, :, None, :] * shares[..., 0, None, :, :] * weights.to(dtype)[..., None, None, :]

    # A row is one token of one head. Rows are read in place, so no map is transposed.
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


register_backend("torch", lambda: Backend(ms_deform_attn_torch))
register_backend("reference", lambda: Backend(ms_deform_attn_reference), automatic=False)
# For exported programs, and for devices on which `grid_sample` has no backward pass.
register_backend("gather", lambda: Backend(ms_deform_attn_gather))
