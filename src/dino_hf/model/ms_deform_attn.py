"""Multi-scale deformable attention (arXiv:2010.04159, sec. 4.1): the operator in PyTorch, and the attention module."""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .attention_backends import Backend, choose_backend, load_backend, register_backend
from .feature_levels import FeatureLevels
from .gather_attention import finite_locations, ms_deform_attn_gather
from .layers import linear, xavier, zero

Shapes = Sequence[tuple[int, int]]  # (height, width) of each level


def ms_deform_attn_reference(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """The operator as a composite of `grid_sample`s. Every backend must agree with it; see `ms_deform_attn`."""
    batch, _, heads, _ = value.shape
    # Half precision is too coarse for coordinates (0.3 pixels on a map of 167 columns): they keep theirs, values follow.
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
    """The reference rearranged for where there is no kernel: queries last, and levels summed as soon as they are sampled. On a
    CPU 1.3 to 1.7 times as fast forward, in a third of the memory, and about as fast backward (docs/log.md)."""
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


register_backend("torch", lambda: Backend(ms_deform_attn_torch))
register_backend("reference", lambda: Backend(ms_deform_attn_reference), automatic=False)
# What exported programs get, and devices on which `grid_sample` has no backward pass.
register_backend("gather", lambda: Backend(ms_deform_attn_gather))


def ms_deform_attn(
    value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, backend: str | None = None
) -> Tensor:
    """Sample L feature maps at Q x L x P points per head, bilinearly, and sum the samples with weights.

    Args:
        value: (B, S, H, D_head) all maps, flattened level after level.
        shapes: L pairs (height, width), the sum of products is S.
        locations: (B, Q, H, L, P, 2) as (x, y); [0, 1] spans the level. What lies outside, NaN and infinity count as zero.
        weights: (B, Q, H, L, P)
        backend: name of an implementation; None chooses (see `choose_backend`).
    Returns:
        (B, Q, H * D_head) in the dtype of `value`.
    Raises:
        ValueError: shapes that do not fit each other, or an unknown backend.
        BackendUnavailable: a backend was named that cannot run here.
    """
    _check_shapes(value, shapes, locations, weights)
    name = choose_backend(backend, value.device.type, value.dtype, value.device.index, is_order=True)
    return load_backend(name).plain(value, shapes, locations, weights)


def ms_deform_attn_fused(
    value: Tensor, shapes: Shapes, references: Tensor, offsets: Tensor, logits: Tensor, backend: str | None = None
) -> Tensor:
    """The same from what a layer's projections give. A kernel then never writes locations and weights to memory.

    Args:
        value, shapes: as in `ms_deform_attn`.
        references: (B, Q, L, 2) points as (x, y), or (B, Q, L, 4) boxes as (cx, cy, w, h), in [0, 1] of each level.
        offsets: (B, Q, H, L, P, 2) from the point in cells of the level, or from the box's centre in half boxes per P.
        logits: (B, Q, H, L, P); weights are their softmax over L * P.
        backend, returns, raises: as in `ms_deform_attn`.
    """
    _check_shapes(value, shapes, offsets, logits, references)
    name = choose_backend(backend, value.device.type, value.dtype, value.device.index, is_order=True)
    fused = load_backend(name).fused
    if fused is not None:
        return fused(value, shapes, references, offsets, logits)
    locations = sampling_locations(references, offsets, shapes)
    return load_backend(name).plain(value, shapes, locations, attention_weights(logits))


def sampling_locations(references: Tensor, offsets: Tensor, shapes: Shapes) -> Tensor:
    """(B, Q, L, 2 | 4), (B, Q, H, L, P, 2) -> (B, Q, H, L, P, 2) in [0, 1] of each level, float32 at least."""
    offsets = offsets.to(references.dtype)
    centers = references[:, :, None, :, None, :2]  # (B, Q, 1, L, 1, 2)
    if references.shape[-1] == 2:
        # Filled in where they are: a tensor from numbers of the host would have to be waited for on a GPU.
        sizes = [offsets.new_full((), side) for height, width in shapes for side in (width, height)]
        return centers + offsets / torch.stack(sizes).view(-1, 1, 2)
    return centers + offsets / offsets.shape[-2] * references[:, :, None, :, None, 2:] * 0.5


def attention_weights(logits: Tensor) -> Tensor:
    """(B, Q, H, L, P) -> their softmax over L * P."""
    return logits.flatten(-2).softmax(-1).view_as(logits)


def _check_shapes(
    value: Tensor, shapes: Shapes, points: Tensor, weights: Tensor, references: Tensor | None = None
) -> None:
    if value.ndim != 4 or weights.ndim != 5:
        raise ValueError(
            f"value has shape {tuple(value.shape)} and weights {tuple(weights.shape)}, but need 4 and 5 dimensions: "
            "(B, S, H, D) and (B, Q, H, L, P)."
        )
    if not len(shapes) or any(height < 1 or width < 1 for height, width in shapes):
        raise ValueError(f"The levels {list(shapes)} must be pairs of a height and a width of at least 1 each.")
    tokens = sum(height * width for height, width in shapes)
    batch, sequence, heads, _ = value.shape
    _, queries, _, _, num_points = weights.shape
    expected = (batch, queries, heads, len(shapes), num_points)
    if not num_points or sequence != tokens or weights.shape != expected or points.shape != (*expected, 2):
        raise ValueError(
            f"value {tuple(value.shape)}, locations {tuple(points.shape)} and weights {tuple(weights.shape)} do not fit "
            f"the {len(shapes)} levels {list(shapes)}: expected value (B, {tokens}, H, D), locations (B, Q, H, "
            f"{len(shapes)}, P, 2) and weights (B, Q, H, {len(shapes)}, P)."
        )
    if references is not None and tuple(references.shape) not in ((batch, queries, len(shapes), n) for n in (2, 4)):
        raise ValueError(
            f"references have shape {tuple(references.shape)}; expected ({batch}, {queries}, {len(shapes)}, 2) or "
            f"({batch}, {queries}, {len(shapes)}, 4)."
        )


def star_offsets(layer: nn.Linear, num_heads: int, num_levels: int, num_points: int) -> None:
    """Initial values of sampling offsets: where each head looks, in cells of each level, before it has learnt to depend on the
    query. The points of a head lie on a ray of a star around the reference."""
    nn.init.zeros_(layer.weight)
    angle = torch.arange(num_heads, dtype=torch.float32) * (2 * math.pi / num_heads)
    direction = torch.stack([angle.cos(), angle.sin()], dim=-1)  # (H, 2)
    direction = direction / direction.abs().amax(-1, keepdim=True)  # on the square with half-side 1
    distance = torch.arange(1, num_points + 1, dtype=torch.float32)  # (P)
    star = direction[:, None, None, :] * distance[:, None]  # (H, 1, P, 2)
    star = star.expand(-1, num_levels, -1, -1).flatten()  # (H * L * P * 2)
    init.copy_(layer.bias, star.to(layer.bias.device))  # the library's copy_: leaves a bias alone that was just loaded


class SamplingPoints(NamedTuple):
    """Where the queries of a layer looked, and how much each point counted."""

    weights: Tensor  # (B, Q, H, L, P), they sum to 1 over L and P
    locations: (
        Tensor  # (B, Q, H, L, P, 2) as (x, y) in [0, 1] of the padded map of each level; outside of it there is nothing
    )


class DinoDetrDeformableAttention(nn.Module):
    """Each query looks at P points per head and level around its reference.

    Args:
        d_model: C
        num_heads, num_levels, num_points: H, L, P
        backend: name of the operator's implementation, which is taken where it can run; None chooses.
    """

    def __init__(self, d_model: int, num_heads: int, num_levels: int, num_points: int, backend: str | None = None):
        super().__init__()
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.backend = backend
        per_point = num_heads * num_levels * num_points
        star = partial(star_offsets, num_heads=num_heads, num_levels=num_levels, num_points=num_points)
        self.sampling_offsets = linear(d_model, per_point * 2, star)
        self.attention_weights = linear(d_model, per_point, zero)
        self.value_proj = linear(d_model, d_model, xavier)
        self.output_proj = linear(d_model, d_model, xavier)

    def forward(
        self, queries: Tensor, references: Tensor, memory: Tensor, levels: FeatureLevels, need_weights: bool = False
    ) -> tuple[Tensor, SamplingPoints | None]:
        """
        Args:
            queries: (B, Q, C), position included.
            references: (B, Q, 2) points or (B, Q, 4) cxcywh boxes in [0, 1] of the valid image, float32.
            memory: (B, S, C) tokens of all levels, laid out as `levels` says.
            need_weights: whether the sampling points are wanted; without them the operator can do more by itself.
        Returns:
            (B, Q, C) and the sampling points or None.
        """
        value = self.value_proj(memory)  # (B, S, C)
        if levels.padding_mask is not None:
            value = value.masked_fill(levels.padding_mask[..., None], 0)
        value = value.unflatten(-1, (self.num_heads, -1))  # (B, S, H, D_head)
        per_point = (self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(queries).unflatten(-1, (*per_point, 2))  # (B, Q, H, L, P, 2)
        logits = self.attention_weights(queries).unflatten(-1, per_point)  # (B, Q, H, L, P)
        ratios = levels.valid_ratios[:, None].repeat(1, 1, 1, references.shape[-1] // 2)  # (B, 1, L, 2 | 4)
        references = references[:, :, None] * ratios  # (B, Q, L, 2 | 4) of the padded map
        backend = choose_backend(self.backend, value.device.type, value.dtype, value.device.index)
        if need_weights:
            weights = attention_weights(logits)
            locations = sampling_locations(references, offsets, levels.shapes)
            output = ms_deform_attn(value, levels.shapes, locations, weights, backend)  # (B, Q, C)
            points = SamplingPoints(weights, locations)
        else:
            points = None
            output = ms_deform_attn_fused(value, levels.shapes, references, offsets, logits, backend)
        return self.output_proj(output), points
