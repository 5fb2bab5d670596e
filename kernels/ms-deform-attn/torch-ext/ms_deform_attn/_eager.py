"""The operator in plain PyTorch, for devices and dtypes without a kernel. It also defines the fused form."""

from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor


def pairs(sizes: Sequence[int]) -> List[Tuple[int, int]]:
    """[h0, w0, h1, w1, ...] -> [(h0, w0), (h1, w1), ...]"""
    return list(zip(sizes[0::2], sizes[1::2]))


def location_scale(references: Tensor, shapes: Sequence[Tuple[int, int]], num_points: int) -> Tensor:
    """Length of one unit of an offset, in [0, 1] of its level: (B or 1, Q or 1, 1, L, 1, 2)."""
    if references.shape[-1] == 2:
        cells = torch.tensor([(width, height) for height, width in shapes], dtype=references.dtype)  # (L, 2)
        return (1 / cells.to(references.device, non_blocking=True))[None, None, None, :, None]
    return references[:, :, None, :, None, 2:] * (0.5 / num_points)


def sampling_locations(references: Tensor, offsets: Tensor, shapes: Sequence[Tuple[int, int]]) -> Tensor:
    """(B, Q, L, 2 | 4), (B, Q, H, L, P, 2) -> (B, Q, H, L, P, 2) in [0, 1] of each level."""
    return references[:, :, None, :, None, :2] + offsets * location_scale(references, shapes, offsets.shape[-2])


class _Problem(NamedTuple):
    maps: List[Tensor]  # L x (B * H, D, h, w)
    grid: Tensor  # (B * H, Q, L, P, 2) in [-1, 1]
    weights: Tensor  # (B, Q, H, L, P) after the softmax
    lse: Tensor  # (B, Q, H), or (0) without references


def _prepare(
    value: Tensor, sizes: Sequence[int], references: Optional[Tensor], points: Tensor, weights: Tensor
) -> _Problem:
    shapes = pairs(sizes)
    dtype = torch.promote_types(value.dtype, torch.float32)
    points, weights = points.to(dtype), weights.to(dtype)
    lse = weights.new_zeros(0)
    if references is not None:
        points = sampling_locations(references.to(dtype), points, shapes)
        lse = weights.flatten(-2).logsumexp(-1)
        weights = weights.flatten(-2).softmax(-1).view_as(weights)
    # Move NaN and infinity outside of the map: they must not reach the bilinear weights.
    points = points.where((points.abs() < 1e4).all(-1, keepdim=True), -1e4)
    maps = value.to(dtype).permute(0, 2, 3, 1).flatten(0, 1)  # (B * H, D, S)
    maps = maps.split([height * width for height, width in shapes], dim=-1)
    maps = [level.unflatten(-1, shape) for level, shape in zip(maps, shapes)]
    return _Problem(maps, (2 * points - 1).transpose(1, 2).flatten(0, 1), weights, lse)


def eager_forward(
    value: Tensor, sizes: Sequence[int], references: Optional[Tensor], points: Tensor, weights: Tensor
) -> Tuple[Tensor, Tensor]:
    """Output (B, Q, H * D), and the log of the softmax's sum, (B, Q, H), or (0) without references."""
    problem = _prepare(value, sizes, references, points, weights)
    shares = problem.weights.transpose(1, 2).flatten(0, 1)[:, None]  # (B * H, 1, Q, L, P)
    out = torch.zeros((), dtype=problem.grid.dtype, device=value.device)
    for i, level in enumerate(problem.maps):
        samples = F.grid_sample(level, problem.grid[:, :, i], padding_mode="zeros", align_corners=False)
        out = out + (samples * shares[..., i, :]).sum(-1)  # (B * H, D, Q)
    out = out.unflatten(0, (value.shape[0], value.shape[2])).permute(0, 3, 1, 2).flatten(-2)  # (B, Q, H * D)
    return out.to(value.dtype).contiguous(), problem.lse


def eager_backward(
    grad_out: Tensor,
    value: Tensor,
    sizes: Sequence[int],
    references: Optional[Tensor],
    points: Tensor,
    weights: Tensor,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, points and weights, written by hand: autograd does not record inside an operator."""
    batch, _, heads, dim = value.shape
    problem = _prepare(value, sizes, references, points, weights)
    grad_out = (
        grad_out.to(problem.grid.dtype).unflatten(-1, (heads, dim)).permute(0, 2, 3, 1).flatten(0, 1)
    )  # (B * H, D, Q)
    shares = problem.weights.transpose(1, 2).flatten(0, 1)[:, None]  # (B * H, 1, Q, L, P)
    grad_maps, grad_grid, grad_shares = [], [], []
    for i, level in enumerate(problem.maps):
        grid = problem.grid[:, :, i]  # (B * H, Q, P, 2)
        samples = F.grid_sample(level, grid, padding_mode="zeros", align_corners=False)  # (B * H, D, Q, P)
        grad_shares.append((samples * grad_out[..., None]).sum(1))  # (B * H, Q, P)
        grad_samples = (grad_out[..., None] * shares[..., i, :]).contiguous()  # (B * H, D, Q, P)
        grad_level, grad_points = torch.ops.aten.grid_sampler_2d_backward(
            grad_samples, level, grid, 0, 0, False, [True, True]
        )
        grad_maps.append(grad_level.flatten(-2))
        grad_grid.append(grad_points)

    def by_query(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (batch, heads)).transpose(1, 2)  # (B * H, Q, ...) -> (B, Q, H, ...)

    grad_value = torch.cat(grad_maps, -1).unflatten(0, (batch, heads)).permute(0, 3, 1, 2)  # (B, S, H, D)
    grad_points = 2 * by_query(torch.stack(grad_grid, dim=2))  # (B, Q, H, L, P, 2)
    grad_weights = by_query(torch.stack(grad_shares, dim=2))  # (B, Q, H, L, P)
    if references is not None:
        scale = location_scale(references.to(problem.grid.dtype), pairs(sizes), points.shape[-2])
        grad_points = grad_points * scale
        mean = (grad_weights * problem.weights).sum((-2, -1), keepdim=True)
        grad_weights = problem.weights * (grad_weights - mean)
    return (
        grad_value.to(value.dtype).contiguous(),
        grad_points.to(points.dtype).contiguous(),
        grad_weights.to(weights.dtype).contiguous(),
    )
