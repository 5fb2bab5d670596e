"""Speed and memory of the backends of deformable attention, side by side in one process: `make bench-kernels`.

Ratios are what counts: on a shared machine, times vary and ratios of neighbouring runs hardly do. Each round runs every backend
once; a ratio is the median over the rounds, its spread the smallest and the largest.
"""

import ctypes
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import isnan
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from transformers import HfArgumentParser

from ..attention_backends import describe_backends, use_backend
from ..configuration_dino_detr import DinoDetrConfig
from ..feature_levels import cell_centers, describe_levels
from ..modeling_dino_detr import DinoDetrForObjectDetection
from ..ms_deform_attn import attention_weights, ms_deform_attn, ms_deform_attn_fused, sampling_locations

# An image of 800 x 1333 at strides 8 to 64, and the heads and points of all released models.
SHAPES = ((100, 167), (50, 84), (25, 42), (13, 21))
NUM_HEADS, HEAD_DIM, NUM_POINTS = 8, 32, 4


@dataclass
class Arguments:
    rounds: int = field(default=7, metadata={"help": "times that each backend runs"})
    batch_size: int = field(default=1, metadata={"help": "images"})
    dtype: str = field(default="float32", metadata={"help": "of values", "choices": ["float32", "bfloat16"]})
    device: str = field(default="cpu", metadata={"help": "where", "choices": ["cpu", "cuda"]})
    model: bool = field(default=True, metadata={"help": "also time the whole R50 4-scale model"})
    output: Path = field(
        default=Path("outputs/kernels.jsonl"), metadata={"help": "results, one JSON object per line, added"}
    )

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def inputs_of(queries: str, arguments: Arguments) -> tuple[Tensor, tuple, Tensor, Tensor, Tensor]:
    """Random inputs of the fused form: 'encoder', each token a query that looks about 3 cells around itself, or 'decoder',
    900 boxes anywhere."""
    torch.manual_seed(0)
    batch, num_levels = arguments.batch_size, len(SHAPES)
    value = torch.randn(batch, sum(h * w for h, w in SHAPES), NUM_HEADS, HEAD_DIM)
    if queries == "encoder":
        centers = cell_centers(describe_levels([torch.zeros(batch, *shape, dtype=torch.bool) for shape in SHAPES]))
        references = centers[:, :, None].repeat(1, 1, num_levels, 1)  # (B, S, L, 2)
    else:
        references = torch.rand(batch, 900, 1, 4).repeat(1, 1, num_levels, 1) * 0.5 + 0.2
    per_point = (batch, references.shape[1], NUM_HEADS, num_levels, NUM_POINTS)
    offsets, logits = 3 * torch.randn(*per_point, 2), torch.randn(per_point)
    value, offsets, logits = (tensor.to(arguments.device, arguments.torch_dtype) for tensor in (value, offsets, logits))
    return value, SHAPES, references.to(arguments.device), offsets, logits


def seconds(function: Callable[[], object], device: str) -> float:
    """Of one call; on a GPU of ten, which a queue needs to be full."""
    if device == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(10):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e4


def temporary_memory(function: Callable[[], object], device: str) -> float:
    """Largest growth during a call beyond what it returns, in MiB. NaN where the system does not tell."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before - _size(results)) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed, and would hide what is taken again
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak counts from here
        before = _resident("VmRSS")
        results = function()
        return max(0.0, _resident("VmHWM") - before - _size(results) / 2**10) / 2**10
    except (OSError, AttributeError):
        return float("nan")


def _size(results: Tensor | tuple[Tensor, ...]) -> int:
    tensors = [results] if isinstance(results, Tensor) else results
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def compare(name: str, run: Callable[[], object], backends: list[str], arguments: Arguments) -> list[dict]:
    """Time `run` within each backend; the first one is what the others are compared with."""
    times, memory = {backend: [] for backend in backends}, {}
    for backend in backends:
        with use_backend(backend):
            run()  # compiles, and warms the allocator
            memory[backend] = temporary_memory(run, arguments.device)
    for _ in range(arguments.rounds):
        for backend in backends:
            with use_backend(backend):
                times[backend].append(seconds(run, arguments.device))
    results = []
    for backend in backends:
        ratios = [base / own for base, own in zip(times[backends[0]], times[backend], strict=True)]
        results.append(
            {
                "what": name,
                "backend": backend,
                "ratio": round(median(ratios), 2),
                "ratio_min": round(min(ratios), 2),
                "ratio_max": round(max(ratios), 2),
                "milliseconds": round(1e3 * median(times[backend]), 3),
                "temporary_MiB": None if isnan(memory[backend]) else round(memory[backend], 1),
            }
        )
        row = results[-1]
        print(
            f"  {name:<38} {backend:<10} {row['ratio']:7.2f} x  ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
            f"  {row['milliseconds']:10.2f} ms  {memory[backend]:8.1f} MiB",
            flush=True,
        )
    return results


def run_operator(queries: str, backends: list[str], arguments: Arguments) -> list[dict]:
    value, shapes, references, offsets, logits = inputs_of(queries, arguments)
    locations, weights = sampling_locations(references, offsets, shapes), attention_weights(logits)
    fused = (value, shapes, references, offsets, logits)
    grad_out = torch.randn_like(value.flatten(2)[:, :1]).expand(-1, offsets.shape[1], -1).contiguous()

    @torch.no_grad()
    def forward():
        return ms_deform_attn_fused(*fused)

    @torch.no_grad()
    def plain_forward():
        return ms_deform_attn(value, shapes, locations, weights)

    def training():
        leaves = [tensor.detach().requires_grad_() for tensor in (value, offsets, logits)]
        out = ms_deform_attn_fused(leaves[0], shapes, references, *leaves[1:])
        return torch.autograd.grad(out, leaves, grad_out)

    return [
        *compare(f"{queries}, forward", forward, backends, arguments),
        *compare(f"{queries}, forward of the plain form", plain_forward, backends, arguments),
        *compare(f"{queries}, forward and backward", training, backends, arguments),
    ]


def run_model(backends: list[str], arguments: Arguments) -> list[dict]:
    model = DinoDetrForObjectDetection(DinoDetrConfig()).eval().to(arguments.device, arguments.torch_dtype)
    pixels = torch.randn(arguments.batch_size, 3, 800, 1333).to(arguments.device, arguments.torch_dtype)

    @torch.no_grad()
    def detect():
        return model(pixels).logits

    fewer = replace(arguments, rounds=max(3, arguments.rounds // 2))
    return compare("whole R50 4-scale model, 800 x 1333", detect, backends, fewer)


def machine(device: str) -> dict:
    """What the numbers were measured on."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if device == "cpu" and info.exists():
        models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0] if models else name
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def main(arguments: Arguments | None = None) -> list[dict]:
    arguments = arguments or HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    if arguments.rounds < 1 or arguments.batch_size < 1:
        raise SystemExit(f"error: rounds={arguments.rounds} and batch_size={arguments.batch_size} must be at least 1.")
    described = describe_backends()
    kernel = "triton" if arguments.device == "cuda" else "cpu"
    if described[kernel]:
        raise SystemExit(f"error: the {kernel} backend cannot run here: {described[kernel]}")
    backends = ["reference", "torch", kernel]
    about = machine(arguments.device)
    print(
        f"{about['device']}, {about['threads']} threads, torch {about['torch']}, {arguments.dtype}, batch {arguments.batch_size}"
    )
    print("  times faster than the reference (spread), median time, temporary memory")
    results = [row for queries in ("encoder", "decoder") for row in run_operator(queries, backends, arguments)]
    if arguments.model:
        results += run_model(backends, arguments)
    settings = {"dtype": arguments.dtype, "batch_size": arguments.batch_size, "date": time.strftime("%Y-%m-%d")}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**row, **settings, **about}) + "\n" for row in results)
    print(f"written to {arguments.output}")
    return results


if __name__ == "__main__":
    main()
