"""Time inference of DINO, of DINO with the reference attention, and of transformers' Deformable DETR.

python benchmarks/inference.py
python benchmarks/inference.py --models swin-t --sizes 800x1333 --batch_sizes 1 4 --dtypes float32 bfloat16
python benchmarks/inference.py --device cuda

Without options, a selection is measured that takes minutes on two CPU cores. --full measures all combinations, which takes more
than an hour. Weights are random. Images have one size, so nothing is padded.
"""

from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

import torch

from ceilings import measure_arithmetic, measure_bandwidth, shares, work_of
from common import Timed, keep, parse_size, read_arguments
from detectors import (
    DEFORMABLE,
    DETECTORS,
    DINO,
    DTYPES,
    MODELS,
    MODES,
    REFERENCE,
    build,
    detection,
    random_images,
)
from measuring import side_by_side


class Candidate(NamedTuple):
    detector: str
    dtype: str
    mode: str

    def __str__(self):
        return ", ".join(self)


class Case(NamedTuple):
    """Candidates that run side by side, and their inputs."""

    model: str
    size: str
    batch_size: int
    rounds: int
    candidates: tuple[Candidate, ...]


@dataclass
class InferenceArguments(Timed):
    """Time inference side by side."""

    rounds: int = field(
        default=5,
        metadata={"help": "number of times that each candidate is timed; fewer in large cases of the selection"},
    )
    models: list[str] = field(default_factory=list, metadata={"help": "models: " + ", ".join(MODELS)})
    sizes: list[str] = field(default_factory=list, metadata={"help": "image sizes, height x width, such as 800x1333"})
    batch_sizes: list[int] = field(default_factory=list, metadata={"help": "images per batch"})
    dtypes: list[str] = field(default_factory=list, metadata={"help": "dtypes: " + ", ".join(DTYPES)})
    modes: list[str] = field(default_factory=list, metadata={"help": "modes: " + ", ".join(MODES)})
    detectors: list[str] = field(default_factory=lambda: list(DETECTORS), metadata={"help": "detectors to compare"})
    full: bool = field(default=False, metadata={"help": "all models, sizes, batch sizes, dtypes and modes"})
    ceilings: bool = field(
        default=False, metadata={"help": "also measure the shares of peak arithmetic and bandwidth; always on a GPU"}
    )

    def __post_init__(self):
        super().__post_init__()
        known = {"models": MODELS, "dtypes": DTYPES, "modes": MODES, "detectors": DETECTORS}
        for name, choices in known.items():
            if unknown := [one for one in getattr(self, name) if one not in choices]:
                raise SystemExit(f"error: {name}={unknown[0]!r} must be one of {', '.join(choices)}.")
        if self.quick and self.full:
            raise SystemExit("error: --quick and --full exclude each other; use one of them.")
        self.ceilings |= self.device == "cuda"


def grid(arguments: InferenceArguments) -> list[Case]:
    """All combinations of the chosen settings. The reference attention only runs eagerly."""
    on_gpu = arguments.device == "cuda"
    everything = {
        "models": ["r50-4scale", "r50-5scale", "swin-t"],
        "sizes": ["800x1333", "640x640"],
        "batch_sizes": [1, 8, 16] if on_gpu else [1, 4],
        "dtypes": ["float32", "tf32", "bfloat16"] if on_gpu else ["float32", "bfloat16"],
        "modes": ["eager", "compiled", "graphs"] if on_gpu else ["eager", "compiled"],
    }
    first = {name: values[:1] for name, values in everything.items()}
    if on_gpu:
        first |= {name: everything[name] for name in ("batch_sizes", "dtypes", "modes")}
    unnamed = everything if arguments.full else first
    models, sizes, batch_sizes, dtypes, modes = (getattr(arguments, name) or unnamed[name] for name in everything)
    candidates = tuple(
        Candidate(detector, dtype, mode)
        for detector, dtype, mode in product(arguments.detectors, dtypes, modes)
        if detector != REFERENCE or mode == "eager"
    )
    return [Case(*one, arguments.rounds, candidates) for one in product(models, sizes, batch_sizes)]


def selection(rounds: int) -> list[Case]:
    """The most informative cases that a CPU measures in minutes.

    Deformable DETR runs in bfloat16 in one case only, because it is slower than in float32.
    """
    both, fewer = ("float32", "bfloat16"), min(rounds, 2)
    ours = tuple(Candidate(DINO, dtype, "eager") for dtype in both)
    compiled = tuple(Candidate(DINO, dtype, "compiled") for dtype in both)
    reference, theirs = (Candidate(detector, "float32", "eager") for detector in (REFERENCE, DEFORMABLE))
    return [
        Case("r50-4scale", "800x1333", 1, rounds, (*ours, reference, theirs)),
        Case(
            "r50-4scale",
            "640x640",
            1,
            fewer,
            (*ours, *compiled, reference, theirs, Candidate(DEFORMABLE, "bfloat16", "eager")),
        ),
        Case("r50-4scale", "640x640", 4, fewer, (*ours, theirs)),
        Case("r50-5scale", "640x640", 1, fewer, (*ours, theirs)),
        Case("swin-t", "640x640", 1, fewer, (*ours, theirs)),
    ]


def toys(arguments: InferenceArguments) -> list[Case]:
    candidates = tuple(
        Candidate(detector, dtype, "eager") for detector in arguments.detectors for dtype in ("float32", "bfloat16")
    )
    return [Case("toy", "64x104", 2, arguments.rounds, candidates)]


def cases_of(arguments: InferenceArguments) -> list[Case]:
    named = arguments.models or arguments.sizes or arguments.batch_sizes or arguments.dtypes or arguments.modes
    if arguments.quick and not named:
        return toys(arguments)
    if named or arguments.full or arguments.device == "cuda" or arguments.detectors != list(DETECTORS):
        return grid(arguments)
    return selection(arguments.rounds)


def measure(case: Case, arguments: InferenceArguments) -> list[dict]:
    """Measure one case. A candidate that fails, for example for lack of memory, is left out, and its row holds the error."""
    torch.compiler.reset()
    device = arguments.device
    images = random_images(case.batch_size, *parse_size(case.size), device)
    small = images[:, :, :256, :320]  # large enough for 900 tokens, which Deformable DETR needs for its 900 queries
    models, calls, failed = {}, {}, []
    for candidate in case.candidates:
        detector, dtype, mode = candidate
        kind = (DEFORMABLE if detector == DEFORMABLE else DINO, dtype)
        if kind not in models:
            models[kind] = build(kind[0], case.model, device, dtype)
        call = detection(detector, models[kind], images, dtype, mode)
        try:
            # Load libraries before memory is measured. Compiled code depends on the shape, so it needs the real images.
            (call if mode != "eager" else detection(detector, models[kind], small, dtype, mode))()
            if device == "cuda":
                call()
        except Exception as error:
            failed.append({"candidate": str(candidate), "error": f"{type(error).__name__}: {str(error)[:300]}"})
            print(f"  {candidate} is left out: {failed[-1]['error']}", flush=True)
        else:
            calls[candidate] = call
    if not calls:
        return failed
    rows = side_by_side({str(one): call for one, call in calls.items()}, case.rounds, device, warm_ups=0)
    for candidate, row in zip(calls, rows, strict=True):
        row |= candidate._asdict()
        row["images_per_second"] = round(1e3 * case.batch_size / row["milliseconds"], 2)
    if arguments.ceilings:
        _add_shares(rows, models, images, device)
    return rows + failed


def _add_shares(rows: list[dict], models: dict, images: torch.Tensor, device: str) -> None:
    bandwidth, work = measure_bandwidth(device), {}
    arithmetic = {dtype: measure_arithmetic(device, dtype) for dtype in {row["dtype"] for row in rows}}
    for row in rows:
        detector, dtype = row["detector"], row["dtype"]
        kind = (DEFORMABLE if detector == DEFORMABLE else DINO, dtype)
        if (detector, dtype) not in work:
            work[detector, dtype] = work_of(detection(detector, models[kind], images, dtype))
        row |= shares(work[detector, dtype], row["milliseconds"], arithmetic[dtype], bandwidth)
        row |= {"ceiling_TFLOPS": round(arithmetic[dtype] / 1e12, 3), "ceiling_GBps": round(bandwidth / 1e9, 1)}


def main() -> None:
    arguments = read_arguments(InferenceArguments)
    for case in cases_of(arguments):
        rows = measure(case, arguments)
        settings = {"model": case.model, "size": case.size, "batch_size": case.batch_size}
        keep("inference", settings, rows, arguments)


if __name__ == "__main__":
    main()
