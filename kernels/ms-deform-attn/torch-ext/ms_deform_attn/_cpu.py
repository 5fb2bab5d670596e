"""Calls the C++ kernel: makes inputs contiguous, in float32 or bfloat16, and allocates the results."""

from typing import Optional, Sequence, Tuple

import torch
from torch import Tensor

from ._ops import ops

DTYPES = (torch.float32, torch.bfloat16)


def _readable(tensor: Tensor) -> Tensor:
    return (tensor if tensor.dtype in DTYPES else tensor.float()).contiguous()


def cpu_forward(
    value: Tensor,
    sizes: Sequence[int],
    references: Optional[Tensor],
    points: Tensor,
    weights: Tensor,
    lanes: int = 0,
) -> Tuple[Tensor, Tensor]:
    """See `_operators.forward`. lanes: floats per vector, which selects an instruction set; 0: the best one."""
    batch, _, heads, dim = value.shape
    queries = weights.shape[1]
    out = value.new_empty(batch, queries, heads * dim)
    lse = torch.empty((batch, queries, heads) if references is not None else 0, dtype=torch.float32)
    references = lse.new_empty(0) if references is None else references.float().contiguous()
    shapes = torch.tensor(sizes, dtype=torch.int64)
    ops.cpu_forward(value.contiguous(), shapes, references, _readable(points), _readable(weights), out, lse, lanes)
    return out, lse


def cpu_backward(
    grad_out: Tensor,
    value: Tensor,
    sizes: Sequence[int],
    references: Optional[Tensor],
    points: Tensor,
    weights: Tensor,
    out: Tensor,
    lse: Tensor,
    lanes: int = 0,
) -> Tuple[Tensor, Tensor, Tensor]:
    """See `_operators.backward`."""
    references = lse.new_empty(0) if references is None else references.float().contiguous()
    shapes = torch.tensor(sizes, dtype=torch.int64)
    readable_points, readable_weights = _readable(points), _readable(weights)
    grad_value = torch.zeros(value.shape, dtype=torch.float32)
    grad_points, grad_weights = torch.empty_like(readable_points), torch.empty_like(readable_weights)
    ops.cpu_backward(
        value.contiguous(),
        shapes,
        references,
        readable_points,
        readable_weights,
        out.contiguous(),
        lse.contiguous(),
        grad_out.contiguous(),
        grad_value,
        grad_points,
        grad_weights,
        lanes,
    )
    return grad_value.to(value.dtype), grad_points.to(points.dtype), grad_weights.to(weights.dtype)
