"""Time a training step of DINO, of DINO with the reference attention, and of transformers' Deformable DETR.

python benchmarks/training_step.py

A step is forward pass, loss, backward pass and optimizer. The share of the loss in DINO's step is measured too, and the peak memory
of each detector in its own process. DINO also trains denoising queries, which Deformable DETR does not have.
"""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ceilings import measure_arithmetic, measure_bandwidth, shares, work_of
from common import Sized, Timed, keep, parse_size, read_arguments
from detectors import (
    DEFORMABLE,
    DETECTORS,
    DINO,
    DTYPES,
    MODELS,
    MODES,
    build,
    compile_model,
    computing_in,
    random_images,
    random_labels,
)
from measuring import resident_memory, restart_peak, side_by_side, spread

LOSS = "loss of DINO alone"


@dataclass
class StepArguments(Sized):
    """Settings of a training step."""

    model: str = field(default="r50-4scale", metadata={"help": "model to train", "choices": list(MODELS)})
    size: str = field(default="480x640", metadata={"help": "image size, height x width"})
    batch_size: int = field(default=2, metadata={"help": "images per batch"})
    num_boxes: int = field(default=20, metadata={"help": "number of boxes per image"})
    dtype: str = field(default="float32", metadata={"help": "dtype; bfloat16 means autocast", "choices": list(DTYPES)})

    def __post_init__(self):
        super().__post_init__()
        if self.quick:
            self.model, self.size = "toy", "64x104"


def step_settings(arguments: StepArguments) -> dict:
    return {name: getattr(arguments, name) for name in ("model", "size", "batch_size", "num_boxes", "dtype")}


@dataclass
class TrainingArguments(StepArguments, Timed):
    """Time training steps side by side."""

    mode: str = field(
        default="eager", metadata={"help": "mode of DINO and Deformable DETR", "choices": ["eager", "compiled"]}
    )
    ceilings: bool = field(
        default=False, metadata={"help": "also measure the shares of peak arithmetic and bandwidth; always on a GPU"}
    )
    peak_of: str | None = field(
        default=None,
        metadata={"help": "only print the peak memory of a step of this detector, in MiB"},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.peak_of not in (None, *DETECTORS):
            raise SystemExit(f"error: peak_of={self.peak_of!r} must be one of {', '.join(DETECTORS)}.")
        self.ceilings |= self.device == "cuda"


class RecordingLoss:
    """Wrap a criterion and keep its last arguments, so that the loss can be timed on real predictions."""

    def __init__(self, criterion: Callable):
        self.criterion = criterion
        self.last: tuple[Any, ...] = ()

    @torch.compiler.disable
    def __call__(self, logits, boxes, targets, denoising=None, num_items_in_batch=None):
        # Copies, because a compiled model may overwrite its results in the next step.
        kept = denoising and denoising._replace(logits=_leaf(denoising.logits), boxes=_leaf(denoising.boxes))
        self.last = (_leaf(logits), _leaf(boxes), targets, kept, num_items_in_batch)
        return self.criterion(logits, boxes, targets, denoising, num_items_in_batch)

    def forward_and_backward(self) -> tuple[Tensor, ...]:
        """The loss of the last predictions, and its gradients with respect to logits and boxes."""
        logits, boxes, _, denoising, _ = self.last
        leaves = [logits, boxes] + ([] if denoising is None else [denoising.logits, denoising.boxes])
        return torch.autograd.grad(self.criterion(*self.last)[0], leaves)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-5)


def training_step(
    detector: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: list[dict],
    dtype: str = "float32",
    mode: str = "eager",
) -> Callable[[], None]:
    """A function that makes one training step. images: (B, 3, h, w)."""
    model.train()
    inputs = {"pixel_values": images, "labels": labels}
    if detector == DEFORMABLE:
        inputs["pixel_mask"] = torch.ones(len(images), *images.shape[2:], dtype=torch.long, device=images.device)
    forward = compile_model(model, mode)

    def step() -> None:
        with computing_in(dtype, detector):
            with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = forward(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


def step_of(detector: str, arguments: TrainingArguments) -> tuple[nn.Module, Callable[[], None]]:
    """A model with float32 weights, and its training step."""
    model = build(detector, arguments.model, arguments.device)
    images = random_images(arguments.batch_size, *parse_size(arguments.size), arguments.device)
    labels = random_labels(arguments.batch_size, arguments.num_boxes, arguments.device)
    mode = arguments.mode if MODES[arguments.mode] and detector in (DINO, DEFORMABLE) else "eager"
    return model, training_step(detector, model, make_optimizer(model), images, labels, arguments.dtype, mode)


def peak_of(detector: str, arguments: TrainingArguments) -> float:
    """Peak memory of a later step in MiB, beyond the memory before the model was built.

    It includes weights, gradients, the optimizer's state and activations.
    """
    if arguments.device == "cuda":
        _, step = step_of(detector, arguments)
        for _ in range(_warm_ups(arguments)):
            step()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 2**20
    step_of(detector, toy(arguments))[1]()  # loads libraries that are loaded at first use
    restart_peak()
    before = resident_memory()
    _, step = step_of(detector, arguments)
    for _ in range(_warm_ups(arguments)):
        step()
    restart_peak()
    step()
    return (resident_memory("VmHWM") - before) / 2**20


def _warm_ups(arguments: TrainingArguments) -> int:
    return 1 if MODES[arguments.mode] is None else 3  # the second step still compiles


def toy(arguments: TrainingArguments) -> TrainingArguments:
    return TrainingArguments(quick=True, device=arguments.device, dtype=arguments.dtype, mode=arguments.mode)


def peak_in_own_process(detector: str, arguments: TrainingArguments) -> float | None:
    """Peak memory in MiB, measured in a new process. None if the system does not report it."""
    if arguments.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        return None
    settings = step_settings(arguments)
    settings |= {name: getattr(arguments, name) for name in ("mode", "device", "quick", "output_dir")}
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, __file__, "--peak_of", detector, *options]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def measure(arguments: TrainingArguments) -> list[dict]:
    """Measure a row for each detector, and one for the loss."""
    models, steps = {}, {}
    for detector in DETECTORS:
        models[detector], steps[detector] = step_of(detector, arguments)
    models[DINO].criterion = loss = RecordingLoss(models[DINO].criterion)
    candidates = steps | {LOSS: loss.forward_and_backward}  # in this order: a step comes before its loss
    rows = side_by_side(candidates, arguments.rounds, arguments.device, _warm_ups(arguments), memory=False)
    row_of = {row["candidate"]: row for row in rows}
    row_of[LOSS]["share_of_step"] = spread([1 / ratio for ratio in row_of[LOSS]["times_faster_than"][DINO]])
    if arguments.ceilings:
        bandwidth = measure_bandwidth(arguments.device)
        arithmetic = measure_arithmetic(arguments.device, arguments.dtype)
        for detector in DETECTORS:
            eager = step_of(detector, TrainingArguments(**vars(arguments) | {"mode": "eager"}))[1]
            row_of[detector] |= shares(work_of(eager), row_of[detector]["milliseconds"], arithmetic, bandwidth)
    return rows


def main() -> None:
    arguments = read_arguments(TrainingArguments)
    if arguments.peak_of is not None:
        print(f"{peak_of(arguments.peak_of, arguments):.1f}")
        return
    rows = measure(arguments)
    for row in rows:
        if row["candidate"] in DETECTORS:
            row["peak_MiB"] = peak_in_own_process(row["candidate"], arguments)
    rows = keep("training_step", step_settings(arguments) | {"mode": arguments.mode}, rows, arguments)
    share, lowest, highest = (100 * one for one in rows[-1]["share_of_step"])
    print(f"  the loss, forward and backward, is {share:.1f} % ({lowest:.1f} to {highest:.1f}) of DINO's step")


if __name__ == "__main__":
    main()
