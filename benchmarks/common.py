"""Settings of all benchmarks, and functions to print and save their results."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from transformers import HfArgumentParser

from measuring import append_rows, machine


@dataclass
class Common:
    """Settings of every benchmark."""

    quick: ClassVar[bool] = False

    device: str = field(default="cpu", metadata={"help": "device to measure on", "choices": ["cpu", "cuda"]})
    output_dir: Path = field(
        default=Path("outputs/benchmarks"), metadata={"help": "folder to which results are added, as JSON lines"}
    )

    def __post_init__(self):
        if self.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("error: device='cuda', but torch finds no CUDA device; use cpu.")
        for name, values in vars(self).items():
            for value in values if isinstance(values, list) else [values]:
                self._check(name, value)

    def _check(self, name: str, value: object) -> None:
        """Check a setting now, not after minutes of measurements."""
        if type(value) is int and value < 1:
            raise SystemExit(f"error: {name}={value} must be at least 1.")
        if isinstance(value, str) and "size" in name:
            parse_size(value)
        if value in ("tf32", "graphs") and self.device == "cpu":
            raise SystemExit(f"error: {name}={value!r} needs --device cuda.")


@dataclass
class Sized(Common):
    """Settings of a benchmark with a toy size."""

    quick: bool = field(
        default=False,
        metadata={"help": "toy sizes and few rounds, to check that the benchmark runs; not used in the report"},
    )


@dataclass
class Timed(Sized):
    """Settings of a benchmark that times candidates in turn."""

    rounds: int = field(default=3, metadata={"help": "number of times that each candidate is timed"})

    def __post_init__(self):
        super().__post_init__()
        if self.quick:
            self.rounds = min(self.rounds, 2)


@dataclass
class CpuOnly(Timed):
    """Settings of a benchmark that only runs on a CPU."""

    def __post_init__(self):
        if self.device != "cpu":
            raise SystemExit(f"error: device={self.device!r}: this benchmark runs on the cpu only.")
        super().__post_init__()


Arguments = TypeVar("Arguments")


def parse(kind: type[Arguments]) -> Arguments:
    """Parse the command line into an object of the dataclass."""
    arguments, unknown = HfArgumentParser(kind).parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        raise SystemExit(f"error: there is no option {unknown[0]!r}; --help lists all options.")
    return arguments


def read_arguments(kind: type[Arguments]) -> Arguments:
    """Parse the settings of a benchmark (a subclass of `Common`), create its output folder and print the machine."""
    arguments = parse(kind)
    try:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"error: results cannot be saved, choose another --output_dir: {error}") from error
    about = machine(arguments.device)
    print(
        f"{about['device']}, threads: {about['threads']}, torch {about['torch']}, transformers {about['transformers']}"
        + (", toy sizes" if arguments.quick else "")
    )
    return arguments


def parse_size(text: str) -> tuple[int, int]:
    """ "800x1333" -> (800, 1333), height and width."""
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise SystemExit(f"error: {text!r} is not a size; write height x width in pixels, such as 800x1333.")
    return int(parts[0]), int(parts[1])


def keep(benchmark: str, case: dict, rows: Sequence[dict], arguments: Common) -> list[dict]:
    """Print rows that were measured side by side, and append them to `<output_dir>/<benchmark>.jsonl`.

    Args:
        case: settings of the measurement. Rows are compared only if these are equal.
    """
    print(", ".join(f"{name} {value}" for name, value in case.items()))
    for index, row in enumerate(rows):
        text = f"  {row['candidate']:<50}"
        if "milliseconds" in row:
            text += f"{row['milliseconds']:10.2f} ms ({row['milliseconds_min']:.2f} to {row['milliseconds_max']:.2f})"
        for name in ("temporary_MiB", "peak_MiB"):
            if row.get(name) is not None:
                text += f"  {name.replace('_', ' ')} {row[name]:.0f}"
        print(text, flush=True)
        for other in rows[index + 1 :]:  # print each pair once
            if ratio := row.get("times_faster_than", {}).get(other["candidate"]):
                print("      {:7.2f} x ({:.2f} to {:.2f})  ".format(*ratio) + other["candidate"])
    rows = [{"benchmark": benchmark, "case": case, **row} for row in rows]
    append_rows(arguments.output_dir / f"{benchmark}.jsonl", rows, arguments.device, quick=arguments.quick)
    return rows
