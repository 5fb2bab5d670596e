"""The public functions: they flatten the user's shapes and call the operator."""

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
        locations: (B, Q, H, L, P, 2) as (x, y); [0, 1] spans the level. Samples outside, at NaN or infinity are zero.
        weights: (B, Q, H, L, P)
    Returns:
        (B, Q, H * D) in the dtype of `value`, summed in float32 at least.
    Raises:
        ValueError: shapes, devices or dtypes do not fit together.
        RuntimeError: for a second derivative, which is not implemented. Forward-mode autograd gives no tangent.
    """
    return forward(value, [size for shape in shapes for size in shape], None, locations, weights)[0]


def ms_deform_attn_fused(
    value: Tensor, shapes: Sequence[Tuple[int, int]], references: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """`ms_deform_attn` with offsets and logits, which a layer's projections give.

    Sampling locations and weights are not written to memory.

    Args:
        value, shapes: as in `ms_deform_attn`.
        references: (B, Q, L, 2) points as (x, y) or (B, Q, L, 4) boxes as (cx, cy, w, h), in [0, 1] of each level.
        offsets: (B, Q, H, L, P, 2). With points, in cells of the level; with boxes, from the centre in sizes / (2 P).
        logits: (B, Q, H, L, P); the weights are their softmax over L * P.
    Returns, raises:
        as in `ms_deform_attn`. If references need a gradient, the plain form computes it.
    """
    if references.requires_grad and torch.is_grad_enabled():
        locations = sampling_locations(references, offsets.to(references.dtype), shapes)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return ms_deform_attn(value, shapes, locations, logits.to(dtype).flatten(-2).softmax(-1).view_as(logits))
    return forward(value, [size for shape in shapes for size in shape], references, offsets, logits)[0]


def device_of_kernel(device: torch.device, dtype: torch.dtype) -> Optional[str]:
    """'cpu' or 'cuda' if a kernel computes values of this dtype on this device, None if PyTorch does."""
    return choose(torch.device(device).type, dtype)


def vector_lanes() -> int:
    """Floats per vector of the CPU kernel on this machine: 16 with AVX-512, 8 with AVX2, 4 otherwise; 0: no kernel."""
    return ops.cpu_lanes() if HAS_CPU_KERNEL else 0
