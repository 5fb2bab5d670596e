"""The torch operators `forward` and `backward`: checks, choice of the kernel by device, fake and autograd registration."""

import importlib.util
from typing import Optional, Sequence, Tuple

import torch
from torch import Tensor

from ._cpu import DTYPES, cpu_backward, cpu_forward
from ._eager import eager_backward, eager_forward, pairs
from ._ops import add_op_namespace_prefix, ops

HAS_CPU_KERNEL = hasattr(ops, "cpu_forward")
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def choose(device_type: str, dtype: torch.dtype) -> Optional[str]:
    """Type of the device ("cpu" or "cuda") whose kernel computes this, or None for plain PyTorch."""
    if device_type == "cpu" and HAS_CPU_KERNEL and dtype in DTYPES:
        return "cpu"
    if device_type == "cuda" and _HAS_TRITON and dtype in (torch.float32, torch.float16, torch.bfloat16):
        return "cuda"
    return None


def check(value: Tensor, sizes: Sequence[int], references: Optional[Tensor], points: Tensor, weights: Tensor) -> None:
    """Check shapes, devices and dtypes before any memory is touched.

    Raises:
        ValueError: they do not fit together. The message has the shapes.
    """
    if value.dim() != 4 or weights.dim() != 5:
        raise ValueError(
            f"value has shape {tuple(value.shape)} and weights {tuple(weights.shape)}, but need 4 and 5 dimensions: "
            "(B, S, H, D) and (B, Q, H, L, P)."
        )
    shapes = pairs(sizes)
    if len(sizes) % 2 or any(size < 1 for size in sizes):
        raise ValueError(f"The levels {shapes} must be pairs of a height and a width of at least 1 each.")
    tokens = sum(height * width for height, width in shapes)
    batch, queries, heads, num_points = value.shape[0], weights.shape[1], value.shape[2], weights.shape[4]
    expected = (batch, queries, heads, len(shapes), num_points)
    if (
        not shapes
        or not num_points
        or value.shape[1] != tokens
        or tuple(weights.shape) != expected
        or tuple(points.shape) != (*expected, 2)
    ):
        raise ValueError(
            f"value {tuple(value.shape)}, points {tuple(points.shape)} and weights {tuple(weights.shape)} do not fit the "
            f"{len(shapes)} levels {shapes}: expected value (B, {tokens}, H, D), points (B, Q, H, {len(shapes)}, P, 2) and "
            f"weights (B, Q, H, {len(shapes)}, P)."
        )
    if references is not None and tuple(references.shape) not in ((batch, queries, len(shapes), n) for n in (2, 4)):
        raise ValueError(
            f"references have shape {tuple(references.shape)}; expected ({batch}, {queries}, {len(shapes)}, 2) or "
            f"({batch}, {queries}, {len(shapes)}, 4)."
        )
    tensors = [value, points, weights] + ([] if references is None else [references])
    if len({tensor.device for tensor in tensors}) > 1:
        raise ValueError(f"The tensors lie on different devices: {[str(tensor.device) for tensor in tensors]}.")
    if not all(tensor.is_floating_point() for tensor in tensors):
        raise ValueError(f"The tensors must be floating-point, but are {[str(tensor.dtype) for tensor in tensors]}.")


def _forward(
    value: Tensor, sizes: Sequence[int], references: Optional[Tensor], points: Tensor, weights: Tensor
) -> Tuple[Tensor, Tensor]:
    """Sample `value` at the points and sum the samples with weights.

    Plain form (no references): points are locations in [0, 1]. Fused form: points are offsets around the references,
    and weights are logits.

    Returns:
        out (B, Q, H * D), and the log of the softmax's sum for the backward pass: (B, Q, H), or (0) in the plain form.
    """
    check(value, sizes, references, points, weights)
    kernel = choose(value.device.type, value.dtype)
    if kernel == "cpu":
        return cpu_forward(value, sizes, references, points, weights)
    if kernel == "cuda":
        from ._triton import forward as triton_forward

        return triton_forward(value, sizes, points, weights, references)
    return eager_forward(value, sizes, references, points, weights)


def _forward_fake(value, sizes, references, points, weights):
    check(value, sizes, references, points, weights)
    batch, _, heads, dim = value.shape
    queries = weights.shape[1]
    dtype = torch.float32 if choose(value.device.type, value.dtype) else torch.promote_types(value.dtype, torch.float32)
    lse = value.new_empty((batch, queries, heads) if references is not None else (0,), dtype=dtype)
    return value.new_empty(batch, queries, heads * dim), lse


def _backward(
    grad_out: Tensor,
    value: Tensor,
    sizes: Sequence[int],
    references: Optional[Tensor],
    points: Tensor,
    weights: Tensor,
    out: Tensor,
    lse: Tensor,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, points and weights, each in the dtype of its tensor."""
    kernel = choose(value.device.type, value.dtype)
    if kernel == "cpu":
        return cpu_backward(grad_out, value, sizes, references, points, weights, out, lse)
    if kernel == "cuda":
        from ._triton import backward as triton_backward

        return triton_backward(grad_out, value, sizes, points, weights, references, out, lse)
    return eager_backward(grad_out, value, sizes, references, points, weights)


def _backward_fake(grad_out, value, sizes, references, points, weights, out, lse):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (value, points, weights))


def _save(ctx, inputs, output):
    value, ctx.sizes, references, points, weights = inputs
    ctx.save_for_backward(value, references, points, weights, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad_out, _grad_lse):
    value, references, points, weights, out, lse = ctx.saved_tensors
    grads = ops.backward(grad_out, value, ctx.sizes, references, points, weights, out, lse)
    return grads[0], None, None, grads[1], grads[2]


def _refuse(ctx, *grads):
    raise RuntimeError(
        "ms_deform_attn has no second derivative; use the reference backend where you need one, for instance for a "
        "gradient penalty."
    )


# If dino_hf and the kernels library both load this build, they share one set of operators.
if not hasattr(ops, "forward"):
    _forward_op = torch.library.custom_op(add_op_namespace_prefix("forward"), _forward, mutates_args=())
    _backward_op = torch.library.custom_op(add_op_namespace_prefix("backward"), _backward, mutates_args=())
    _forward_op.register_fake(_forward_fake)
    _backward_op.register_fake(_backward_fake)
    _forward_op.register_autograd(_differentiate, setup_context=_save)
    _backward_op.register_autograd(_refuse)

forward, backward = ops.forward, ops.backward
