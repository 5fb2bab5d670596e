"""Multi-scale deformable attention (arXiv:2010.04159, sec. 4.1): the operator, its backends, and the attention module."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .feature_levels import FeatureLevels
from .layers import XavierLinear, ZeroLinear


def ms_deform_attn_reference(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """The operator as a composite of `grid_sample`s. Every backend must agree with it; see `ms_deform_attn`."""
    batch, _, heads, _ = value.shape
    # Half precision is too coarse for coordinates (0.3 pixels on a map of 167 columns): they keep theirs, values follow.
    dtype = torch.promote_types(value.dtype, locations.dtype)
    maps = value.to(dtype).permute(0, 2, 3, 1).flatten(0, 1)  # (B * H, D_head, S)
    maps = maps.split([height * width for height, width in shapes], dim=-1)  # L x (B * H, D_head, h * w)
    # Queries go last and levels are summed as soon as they are sampled: on a CPU three to four times faster (docs/log.md).
    grid = (2 * locations.to(dtype) - 1).permute(0, 2, 3, 4, 1, 5).flatten(0, 1)  # (B * H, L, P, Q, 2)
    weights = weights.to(dtype).permute(0, 2, 3, 4, 1).flatten(0, 1)[:, :, None]  # (B * H, L, 1, P, Q)
    out = 0
    for i, (level, shape) in enumerate(zip(maps, shapes, strict=True)):
        level = level.unflatten(-1, shape)  # (B * H, D_head, h, w)
        samples = F.grid_sample(level, grid[:, i], padding_mode="zeros", align_corners=False)  # (B * H, D_head, P, Q)
        out = out + (samples * weights[:, i]).sum(2)  # (B * H, D_head, Q)
    return out.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(-2).to(value.dtype)  # (B, Q, H * D_head)


BACKENDS: dict[str, Callable] = {"reference": ms_deform_attn_reference}  # kernels register themselves here by name


def ms_deform_attn(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor, backend: str | None = None
) -> Tensor:
    """Sample L feature maps at Q x L x P points per head, bilinearly, and sum the samples with weights.

    Args:
        value: (B, S, H, D_head) all maps, flattened level after level.
        shapes: L pairs (height, width), the sum of products is S.
        locations: (B, Q, H, L, P, 2) as (x, y); [0, 1] spans the level, and what lies outside is zero.
        weights: (B, Q, H, L, P)
        backend: name of an implementation; None takes the default.
    Returns:
        (B, Q, H * D_head) in the dtype of `value`.
    Raises:
        ValueError: shapes that do not fit each other, or an unknown backend.
    """
    name = backend or "reference"
    if name not in BACKENDS:
        raise ValueError(f"There is no ms_deform_attn backend {name!r}; available: {sorted(BACKENDS)}.")
    tokens = sum(height * width for height, width in shapes)
    batch, sequence, heads, _ = value.shape
    expected = (batch, weights.shape[1], heads, len(shapes), weights.shape[-1])
    if sequence != tokens or weights.shape != expected or locations.shape != (*expected, 2):
        raise ValueError(
            f"value {tuple(value.shape)}, locations {tuple(locations.shape)} and weights {tuple(weights.shape)} do not fit "
            f"the {len(shapes)} levels {list(shapes)}: expected value (B, {tokens}, H, D), locations (B, Q, H, "
            f"{len(shapes)}, P, 2) and weights (B, Q, H, {len(shapes)}, P)."
        )
    return BACKENDS[name](value, shapes, locations, weights)


class SamplingOffsets(nn.Linear):
    """Where each head looks, in cells of each level, before it has learnt to depend on the query: on a star around it.

    A class of its own because its initial values belong to its parameters: the library calls `_init_weights` only for
    modules that own some.
    """

    def __init__(self, d_model: int, num_heads: int, num_levels: int, num_points: int):
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        super().__init__(d_model, num_heads * num_levels * num_points * 2)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        angle = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)  # (H, 2)
        direction = direction / direction.abs().amax(-1, keepdim=True)  # on the square with half-side 1
        distance = torch.arange(1, self.num_points + 1, dtype=torch.float32)  # (P)
        star = direction[:, None, None, :] * distance[:, None]  # (H, 1, P, 2)
        star = star.expand(-1, self.num_levels, -1, -1).flatten()  # (H * L * P * 2)
        init.copy_(
            self.bias, star.to(self.bias.device)
        )  # the library's copy_: leaves a bias alone that was just loaded


class DinoDetrDeformableAttention(nn.Module):
    """Each query looks at P points per head and level around its reference.

    Args:
        d_model: C
        num_heads, num_levels, num_points: H, L, P
    """

    def __init__(self, d_model: int, num_heads: int, num_levels: int, num_points: int):
        super().__init__()
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.sampling_offsets = SamplingOffsets(d_model, num_heads, num_levels, num_points)
        self.attention_weights = ZeroLinear(d_model, num_heads * num_levels * num_points)
        self.value_proj = XavierLinear(d_model, d_model)
        self.output_proj = XavierLinear(d_model, d_model)

    def forward(
        self, queries: Tensor, references: Tensor, memory: Tensor, levels: FeatureLevels
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            queries: (B, Q, C), position included.
            references: (B, Q, 2) points or (B, Q, 4) cxcywh boxes in [0, 1] of the valid image, float32.
            memory: (B, S, C) tokens of all levels, laid out as `levels` says.
        Returns:
            (B, Q, C) and the attention weights (B, Q, H, L, P).
        """
        value = self.value_proj(memory).masked_fill(levels.padding_mask[..., None], 0)  # (B, S, C)
        value = value.unflatten(-1, (self.num_heads, -1))  # (B, S, H, D_head)
        per_point = (self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(queries).unflatten(-1, (*per_point, 2))  # (B, Q, H, L, P, 2)
        weights = self.attention_weights(queries).unflatten(-1, (self.num_heads, -1))  # (B, Q, H, L * P)
        weights = weights.softmax(-1).unflatten(-1, per_point[1:])  # (B, Q, H, L, P)
        locations = self._locations(offsets.float(), references, levels)
        output = ms_deform_attn(value, levels.shapes, locations, weights)  # (B, Q, C)
        return self.output_proj(output), weights

    def _locations(self, offsets: Tensor, references: Tensor, levels: FeatureLevels) -> Tensor:
        """Offsets around points are counted in cells, around boxes in half boxes per P: (B, Q, H, L, P, 2) in [0, 1]."""
        ratios = levels.valid_ratios[:, None]  # (B, 1, L, 2)
        points = references[:, :, None, :2] * ratios  # (B, Q, L, 2) of the padded map
        if references.shape[-1] == 2:
            size = torch.tensor([(width, height) for height, width in levels.shapes], device=offsets.device)  # (L, 2)
            return points[:, :, None, :, None] + offsets / size[:, None]
        box_size = references[:, :, None, 2:] * ratios  # (B, Q, L, 2)
        return points[:, :, None, :, None] + offsets / self.num_points * box_size[:, :, None, :, None] * 0.5
