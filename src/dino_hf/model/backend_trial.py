"""A trial of a backend of deformable attention on a device, before a model uses it."""

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SHAPES = ((3, 5), (2, 4), (1, 3), (2, 1))  # (height, width)
# The transformers of all released models have this head dimension and these levels and points, so the trial compiles the kernels
# they need.
BATCH, QUERIES, HEADS, LEVELS, POINTS, HEAD_DIM = 2, 5, 8, len(SHAPES), 4, 32

# Largest allowed difference from float64, relative to the largest value. Rounding causes a tenth of this limit. A wrong cell or
# weight causes a difference of about 1.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 8e-3, torch.bfloat16: 4e-2}

_NAMES = ("the output", "the gradient of values", "the gradient of points", "the gradient of weights")


class _Inputs(NamedTuple):
    value: Tensor  # (B, S, H, D)
    references: Tensor | None  # (B, Q, L, 2 | 4) for the fused form; None for the plain form
    points: Tensor  # (B, Q, H, L, P, 2)
    weights: Tensor  # (B, Q, H, L, P)
    grad_out: Tensor  # (B, Q, H * D)


def reason_against(
    plain: Callable[..., Tensor],
    fused: Callable[..., Tensor] | None,
    reference: Callable[..., Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> str | None:
    """Run a small forward and backward pass of each form, and compare it with the reference in float64 on the CPU.

    Args:
        plain, fused: see `attention_backends.Backend`.
        reference: a correct implementation of the plain form.
    Returns:
        None if the backend works, otherwise the exception or the difference in words.
    Raises:
        torch.OutOfMemoryError: the device has no free memory. This says nothing about the implementation.
    """
    outcome: list[str | BaseException | None] = []

    def run() -> None:
        try:
            with torch.enable_grad():
                outcome.append(_compare(plain, fused, reference, device, dtype))
        except torch.OutOfMemoryError as error:
            outcome.append(error)
        except Exception as error:
            outcome.append(f"its trial ended with {type(error).__name__}: {' '.join(str(error).split())[:300]}")

    # A new thread does not inherit the caller's inference mode, autocast, tracing or fake tensors.
    thread = threading.Thread(target=run, name="trial of deformable attention")
    thread.start()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _compare(plain, fused, reference, device, dtype) -> str | None:
    for size_of_reference in (None, 2, 4):
        if size_of_reference is not None and fused is None:
            continue
        inputs = trial_inputs(size_of_reference, dtype)
        expected = _outputs(lambda *exact: _by_hand(reference, *exact), _exact(inputs))

        def compute(value, references, points, weights):
            if references is None:
                return plain(value, SHAPES, points, weights)
            return fused(value, SHAPES, references, points, weights)

        found = _outputs(compute, _Inputs(*(None if tensor is None else tensor.to(device) for tensor in inputs)))
        for name, actual, exact in zip(_NAMES, found, expected, strict=True):
            difference = (actual.detach().cpu().double() - exact).abs().max().item() / exact.abs().max().item()
            if not difference <= TOLERANCE[dtype]:  # also true for NaN
                form = (
                    "plain form"
                    if size_of_reference is None
                    else f"fused form ({size_of_reference} numbers a reference)"
                )
                return (
                    f"its trial on {device} in {dtype} gave wrong numbers: {name} of the {form} differs by {difference:.1e} of "
                    "the largest"
                )
    return None


def trial_inputs(size_of_reference: int | None, dtype: torch.dtype) -> _Inputs:
    """Inputs that are the same on every machine and need no random generator.

    Samples are on and around the maps, at least a quarter of a cell away from positions where the derivative jumps.
    """
    tokens = sum(height * width for height, width in SHAPES)
    per_point = (BATCH, QUERIES, HEADS, LEVELS, POINTS)
    size = torch.tensor([(width, height) for height, width in SHAPES], dtype=torch.float64, device="cpu")[:, None]
    pixels = (_scattered(1, *per_point, 2) * (size + 2)).floor() - 1 + 0.3 + 0.4 * _scattered(2, *per_point, 2)
    weights = _scattered(3, *per_point)
    points_dtype = torch.promote_types(dtype, torch.float32) if size_of_reference is None else dtype
    references = None
    points = (pixels + 0.5) / size
    if size_of_reference is not None:
        references = 0.25 + 0.5 * _scattered(4, BATCH, QUERIES, LEVELS, size_of_reference).float()
        centers = references.double()[:, :, None, :, None]  # (B, Q, 1, L, 1, 2 | 4)
        points = pixels + 0.5 - centers[..., :2] * size
        if size_of_reference == 4:
            points = points / (centers[..., 2:] * size * 0.5 / POINTS)
    value = _scattered(5, BATCH, tokens, HEADS, HEAD_DIM) - 0.5
    grad_out = _scattered(6, BATCH, QUERIES, HEADS * HEAD_DIM) - 0.5
    return _Inputs(value.to(dtype), references, points.to(points_dtype), weights.to(dtype), grad_out.to(dtype))


def _scattered(seed: int, *shape: int) -> Tensor:
    """Well-mixed float64 values in [0, 1)."""
    count = torch.Size(shape).numel()
    index = torch.arange(count, dtype=torch.float64, device="cpu") + 1000 * seed
    return (index * 0.6180339887498949 + (index * index * 0.4142135623730951) % 1).remainder(1).view(shape)


def _exact(inputs: _Inputs) -> _Inputs:
    return _Inputs(*(None if tensor is None else tensor.double() for tensor in inputs))


def _by_hand(
    reference: Callable[..., Tensor], value: Tensor, references: Tensor | None, points: Tensor, weights: Tensor
) -> Tensor:
    """Compute the fused form with an implementation of the plain form."""
    if references is not None:
        centers = references[:, :, None, :, None]
        size = torch.tensor([(width, height) for height, width in SHAPES], dtype=torch.float64, device="cpu")[:, None]
        cells = size if references.shape[-1] == 2 else 2 * POINTS / centers[..., 2:]
        points = centers[..., :2] + points / cells
        weights = weights.flatten(-2).softmax(-1).view_as(weights)
    return reference(value, SHAPES, points, weights)


def _outputs(compute: Callable[..., Tensor], inputs: _Inputs) -> tuple[Tensor, ...]:
    """The output and the gradients of value, points and weights."""
    value, points, weights = (
        tensor.detach().requires_grad_() for tensor in (inputs.value, inputs.points, inputs.weights)
    )
    out = compute(value, inputs.references, points, weights)
    return out, *torch.autograd.grad(out, (value, points, weights), inputs.grad_out)
