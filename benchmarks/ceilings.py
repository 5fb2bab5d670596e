"""Measure the peak arithmetic and bandwidth of a machine, and count how much of them a computation needs."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from detectors import DINO, DTYPES, computing_in
from measuring import seconds

_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class Work(NamedTuple):
    """The operations and memory traffic of one call."""

    # Matrix products, convolutions and dense attention. The sampling of deformable attention is not counted.
    flops: int
    traffic: int  # bytes, as if each operation read its inputs from memory and wrote its results to it


class _Traffic(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket.__name__ not in _ALLOCATIONS:
            leaves = tree_leaves((args, kwargs, results))
            self.bytes += sum(one.numel() * one.element_size() for one in leaves if isinstance(one, Tensor))
        return results


def work_of(function: Callable[[], object]) -> Work:
    """Count the work of one eager call, by calling it twice. Kernels that bypass PyTorch's dispatcher are not counted."""
    with FlopCounterMode(display=False) as flops:
        function()
    # A separate call, because the counter of operations hooks all modules, and then norms are not folded.
    with _Traffic() as traffic:
        function()
    return Work(flops.get_total_flops(), traffic.bytes)


def measure_arithmetic(device: str, dtype: str, size: int | None = None) -> float:
    """Floating-point operations per second of a large matrix product, best of five.

    On a CPU, the product is also computed as a 1 x 1 convolution, and the faster one counts.
    """
    size = size or (8192 if device == "cuda" else 1536)
    left, right = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
    image, kernel = left.T[None, :, :, None], right.T[:, :, None, None]
    with computing_in(dtype, DINO):
        times = _best(lambda: left @ right, device)
        if device == "cpu":
            times = min(times, _best(lambda: torch.nn.functional.conv2d(image, kernel), device))
    return 2 * size**3 / times


def measure_bandwidth(device: str, num_bytes: int | None = None) -> float:
    """Bytes per second that a copy reads and writes, best of five."""
    num_bytes = num_bytes or (2**30 if device == "cuda" else 2**27)
    source = torch.zeros(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / _best(lambda: target.copy_(source), device)


def _best(function: Callable[[], object], device: str) -> float:
    function()
    return min(seconds(function, device) for _ in range(5))


def shares(work: Work, milliseconds: float, arithmetic: float, bandwidth: float) -> dict[str, float]:
    """The shares of peak arithmetic and bandwidth that a call taking `milliseconds` reaches, as entries of a row."""
    return {
        "GFLOP": round(work.flops / 1e9, 1),
        "traffic_GB": round(work.traffic / 1e9, 2),
        "arithmetic_share": round(work.flops / (milliseconds / 1e3) / arithmetic, 3),
        "bandwidth_share": round(work.traffic / (milliseconds / 1e3) / bandwidth, 3),
    }
