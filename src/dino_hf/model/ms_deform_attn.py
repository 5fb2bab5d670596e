"""Multi-scale deformable attention (arXiv:2010.04159, sec. 4.1): the call of a backend, and the attention module."""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .attention_backends import choose_backend, load_backend
from .attention_operators import Shapes
from .feature_levels import FeatureLevels
from .layers import linear, xavier, zero


def ms_deform_attn(
    value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, backend: str | None = None
) -> Tensor:
    """Sample L feature maps at Q x L x P points per head, bilinearly, and sum the samples with weights.

    Args:
        value: (B, S, H, D_head) all maps, flattened level after level.
        shapes: L pairs (height, width), whose areas sum to S.
        locations: (B, Q, H, L, P, 2) as (x, y); [0, 1] spans the level. Points outside, NaN and infinity count as zero.
        weights: (B, Q, H, L, P)
        backend: name of an implementation; None for an automatic choice, see `choose_backend`.
    Returns:
        (B, Q, H * D_head) in the dtype of `value`.
    Raises:
        ValueError: the shapes do not match, or the backend is unknown.
        BackendUnavailable: the named backend cannot run here.
    """
    _check_shapes(value, shapes, locations, weights)
    name = choose_backend(backend, value.device.type, value.dtype, value.device.index, must_run=True)
    return load_backend(name).plain(value, shapes, locations, weights)


def ms_deform_attn_fused(
    value: Tensor, shapes: Shapes, references: Tensor, offsets: Tensor, logits: Tensor, backend: str | None = None
) -> Tensor:
    """`ms_deform_attn` from the outputs of a layer's projections. A kernel need not write locations and weights to memory.

    Args:
        value, shapes: as in `ms_deform_attn`.
        references: (B, Q, L, 2) points as (x, y), or (B, Q, L, 4) boxes as (cx, cy, w, h), in [0, 1] of each level.
        offsets: (B, Q, H, L, P, 2). For a point, offsets from the point in cells of the level. For a box, offsets from its centre;
            the unit is half the box size divided by P.
        logits: (B, Q, H, L, P); weights are their softmax over L * P.
        backend, returns, raises: as in `ms_deform_attn`.
    """
    _check_shapes(value, shapes, offsets, logits, references)
    name = choose_backend(backend, value.device.type, value.dtype, value.device.index, must_run=True)
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
        # Filled in on the device: copying numbers from the host would synchronise with a GPU.
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
            f"value has shape {tuple(value.shape)} and weights {tuple(weights.shape)}; expected 4 and 5 dimensions, "
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
            f"value {tuple(value.shape)}, locations {tuple(points.shape)} and weights {tuple(weights.shape)} do not match "
            f"the {len(shapes)} levels {list(shapes)}: expected value (B, {tokens}, H, D), locations (B, Q, H, "
            f"{len(shapes)}, P, 2) and weights (B, Q, H, {len(shapes)}, P)."
        )
    if references is not None and tuple(references.shape) not in ((batch, queries, len(shapes), n) for n in (2, 4)):
        raise ValueError(
            f"references have shape {tuple(references.shape)}; expected ({batch}, {queries}, {len(shapes)}, 2) or "
            f"({batch}, {queries}, {len(shapes)}, 4)."
        )


def star_offsets(layer: nn.Linear, num_heads: int, num_levels: int, num_points: int) -> None:
    """Initial values of sampling offsets, in cells of each level: the points of each head lie on one ray of a star."""
    nn.init.zeros_(layer.weight)
    angle = torch.arange(num_heads, dtype=torch.float32) * (2 * math.pi / num_heads)
    direction = torch.stack([angle.cos(), angle.sin()], dim=-1)  # (H, 2)
    direction = direction / direction.abs().amax(-1, keepdim=True)  # on the square with half-side 1
    distance = torch.arange(1, num_points + 1, dtype=torch.float32)  # (P)
    star = direction[:, None, None, :] * distance[:, None]  # (H, 1, P, 2)
    star = star.expand(-1, num_levels, -1, -1).flatten()  # (H * L * P * 2)
    init.copy_(layer.bias, star.to(layer.bias.device))  # the library's copy_ skips a bias that was just loaded


class SamplingPoints(NamedTuple):
    """Sampling points of a deformable attention layer, for outputs."""

    weights: Tensor  # (B, Q, H, L, P), sum 1 over L and P
    locations: Tensor  # (B, Q, H, L, P, 2) as (x, y) in [0, 1] of the padded map of each level; points may lie outside


class DinoDetrDeformableAttention(nn.Module):
    """Deformable attention: each query samples P points per head and level around its reference.

    Args:
        d_model: C
        num_heads, num_levels, num_points: H, L, P
        backend: preferred implementation of the operator, used where it can run; None for an automatic choice.
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
            need_weights: also return the sampling points. Without them, the fused form of the operator is used.
        Returns:
            (B, Q, C), and the sampling points or None.
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
