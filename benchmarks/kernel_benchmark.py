"""Compare speed and memory of the backends of deformable attention, side by side in one process.

python benchmarks/kernel_benchmark.py
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import HfArgumentParser

from dino_hf.model.attention_backends import describe_backends, use_backend
from dino_hf.model.configuration_dino_detr import DinoDetrConfig
from dino_hf.model.feature_levels import cell_centers, describe_levels
from dino_hf.model.modeling_dino_detr import DinoDetrForObjectDetection
from dino_hf.model.ms_deform_attn import attention_weights, ms_deform_attn, ms_deform_attn_fused, sampling_locations
from measuring import append_rows, machine, side_by_side

# Feature maps of an 800 x 1333 image at strides 8 to 64; heads and points of all released models.
SHAPES = ((100, 167), (50, 84), (25, 42), (13, 21))
NUM_HEADS, HEAD_DIM, NUM_POINTS = 8, 32, 4


@dataclass
class Arguments:
    rounds: int = field(default=7, metadata={"help": "number of rounds"})
    batch_size: int = field(default=1, metadata={"help": "images per batch"})
    dtype: str = field(default="float32", metadata={"help": "dtype of the values", "choices": ["float32", "bfloat16"]})
    device: str = field(default="cpu", metadata={"help": "device to measure on", "choices": ["cpu", "cuda"]})
    model: bool = field(default=True, metadata={"help": "also time the whole R50 4-scale model"})
    output: Path = field(
        default=Path("outputs/kernels.jsonl"),
        metadata={"help": "file to which results are added, one JSON object per line"},
    )

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def inputs_of(queries: str, arguments: Arguments) -> tuple[Tensor, tuple, Tensor, Tensor, Tensor]:
    """Random inputs of the fused operator.

    With "encoder", each token is a query that samples within about 3 cells. With "decoder", 900 boxes are queries.
    """
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


def compare(name: str, run: Callable[[], object], backends: list[str], arguments: Arguments) -> list[dict]:
    """Time `run` with each backend. The first backend is the baseline."""

    def within(backend: str) -> Callable[[], object]:
        def run_within():
            with use_backend(backend):
                return run()

        return run_within

    measured = side_by_side({backend: within(backend) for backend in backends}, arguments.rounds, arguments.device)
    results = []
    for row in measured:
        ratio, lowest, highest = row["times_faster_than"].get(backends[0], (1.0, 1.0, 1.0))
        results.append(
            {
                "what": name,
                "backend": row["candidate"],
                "ratio": round(ratio, 2),
                "ratio_min": round(lowest, 2),
                "ratio_max": round(highest, 2),
                "milliseconds": row["milliseconds"],
                "temporary_MiB": row["temporary_MiB"],
            }
        )
        memory = float("nan") if row["temporary_MiB"] is None else row["temporary_MiB"]
        print(
            f"  {name:<38} {row['candidate']:<10} {ratio:7.2f} x  ({lowest:.2f} to {highest:.2f})"
            f"  {row['milliseconds']:10.2f} ms  {memory:8.1f} MiB",
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
        *compare(f"{queries}, forward, unfused", plain_forward, backends, arguments),
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


def main(arguments: Arguments | None = None) -> list[dict]:
    arguments = arguments or HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    if arguments.rounds < 1 or arguments.batch_size < 1:
        raise SystemExit(f"error: rounds={arguments.rounds} and batch_size={arguments.batch_size} must be at least 1.")
    described = describe_backends()
    kernel = "triton" if arguments.device == "cuda" else "cpu"
    if described[kernel]:
        raise SystemExit(f"error: the {kernel} backend is not available: {described[kernel]}")
    backends = ["reference", "torch", kernel]
    about = machine(arguments.device)
    print(
        f"{about['device']}, {about['threads']} threads, torch {about['torch']}, {arguments.dtype}, batch {arguments.batch_size}"
    )
    print("  speedup over the reference (spread), median time, temporary memory")
    results = [row for queries in ("encoder", "decoder") for row in run_operator(queries, backends, arguments)]
    if arguments.model:
        results += run_model(backends, arguments)
    settings = {"dtype": arguments.dtype, "batch_size": arguments.batch_size}
    append_rows(arguments.output, results, arguments.device, **settings)
    print(f"written to {arguments.output}")
    return results


if __name__ == "__main__":
    main()
