"""List every point where a training step waits for the GPU, with the lines of code that cause it.

python benchmarks/host_syncs.py

Only synchronisations that PyTorch reports are listed. One is expected: the matcher copies the costs to the CPU once per step.
"""

import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from common import parse_size, read_arguments
from detectors import DINO, build, random_images, random_labels
from measuring import append_rows
from training_step import StepArguments, make_optimizer, step_settings, training_step

_MESSAGE = "synchronizing CUDA operation"


@dataclass
class SyncArguments(StepArguments):
    """List the synchronisations of a training step."""

    device: str = field(default="cuda", metadata={"help": "device to measure on", "choices": ["cuda"]})


def stacks_of_syncs(function: Callable[[], object]) -> Counter[tuple[str, ...]]:
    """Count the synchronisations of a call by their stacks ("file:line function", outermost first, from `function` on).

    PyTorch reports them as warnings while the causing Python code is running. The backward pass runs in another thread. Its stacks
    lead to the forward code only if the gradient is computed in Python.
    """
    found, depth, show = Counter(), len(traceback.extract_stack()), warnings.showwarning

    def collect(message, *about, **more):
        if _MESSAGE not in str(message):
            return show(message, *about, **more)
        frames = traceback.extract_stack()[:-1]  # without this function
        frames = [one for one in frames[depth:] if not one.filename.endswith("warnings.py")] or frames
        found[tuple(f"{one.filename}:{one.lineno} {one.name}" for one in frames)] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = collect
        function()
    return found


def main() -> None:
    arguments = read_arguments(SyncArguments)
    model = build(DINO, arguments.model, arguments.device)
    images = random_images(arguments.batch_size, *parse_size(arguments.size), arguments.device)
    labels = random_labels(arguments.batch_size, arguments.num_boxes, arguments.device)
    step = training_step(DINO, model, make_optimizer(model), images, labels, arguments.dtype)
    for _ in range(3):  # until kernels are built and chosen
        step()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        found = stacks_of_syncs(step)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    print(f"{sum(found.values())} synchronisations in a step, from {len(found)} places")
    for stack, count in found.most_common():
        ours = [line for line in stack if "dino_hf" in line]
        print(f"{count} x {ours[-1] if ours else stack[-1]}")
        print("".join(f"      {line}\n" for line in stack), end="")
    row = {"synchronisations": [{"count": count, "stack": stack} for stack, count in found.most_common()]}
    path = arguments.output_dir / "host_syncs.jsonl"
    append_rows(path, [{"case": step_settings(arguments), **row}], arguments.device, quick=arguments.quick)


if __name__ == "__main__":
    main()
