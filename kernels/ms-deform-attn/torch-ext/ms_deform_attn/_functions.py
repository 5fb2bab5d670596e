"""The public functions: one sequence of shapes in the user's form, then the operator."""

from typing import Optional, Sequence, Tuple

import torch
from torch import Tensor

from ._eager import sampling_locations
from ._operators import HAS_CPU_KERNEL, choose, forward
from ._ops import ops


def ms_deform_attn(value: Tensor, shapes: Sequence[Tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Sample L feature maps at L x P points per query and head, bilinearly, and sum the samples with weights.

    Args:
        value: (B, S, H, D) all maps, flattened level after level.
        shapes: L pairs (height, width), the sum of products is S.
        locations: (B, Q, H, L, P, 2) as (x, y); [0, 1] spans the level. What lies outside, NaN and infinity count as zero.
        weights: (B, Q, H, L, P)
    Returns:
        (B, Q, H * D) in the dtype of `value`, summed in float32 at least.
    Raises:
        ValueError: shapes, devices or dtypes that do not fit each other.
        RuntimeError: from a second derivative, which is not implemented. Nor is forward mode: tangents end here.
    """
    return forward(value, [size for shape in shapes for size in shape], None, locations, weights)[0]


def ms_deform_attn_fused(
    value: Tensor, shapes: Sequence[Tuple[int, int]], references: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """The same from what a layer's projections give: neither sampling locations nor weights are ever written to memory.

    Args:
        value, shapes: as in `ms_deform_attn`.
        references: (B, Q, L, 2) points as (x, y) or (B, Q, L, 4) boxes as (cx, cy, w, h), in [0, 1] of each level.
        offsets: (B, Q, H, L, P, 2) from the point in cells of the level, or from the box's centre in half boxes per P.
        logits: (B, Q, H, L, P); the weights are their softmax over L * P.
    Returns, raises:
        as in `ms_deform_attn`. References that need a gradient get it, by way of the unfused form.
    """
    if references.requires_grad and torch.is_grad_enabled():
        locations = sampling_locations(references, offsets.to(references.dtype), shapes)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return ms_deform_attn(value, shapes, locations, logits.to(dtype).flatten(-2).softmax(-1).view_as(logits))
    return forward(value, [size for shape in shapes for size in shape], references, offsets, logits)[0]


def device_of_kernel(device: torch.device, dtype: torch.dtype) -> Optional[str]:
    """'cpu' or 'cuda' where a kernel of ours computes values of this dtype on this device, None where PyTorch does."""
    return choose(torch.device(device).type, dtype)


def vector_lanes() -> int:
    """Floats per vector of the instruction set that the CPU kernel uses here: 16 AVX-512, 8 AVX2, 4 other, 0 no kernel."""
    return ops.cpu_lanes() if HAS_CPU_KERNEL else 0
