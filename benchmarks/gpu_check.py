"""Check that the CUDA kernels are correct and fast on this machine's GPU, in at most 8 minutes: `make gpu-check`.

python benchmarks/gpu_check.py

Its parts are a trial of the kernels in each dtype, the tests that need a GPU, benchmarks (kernels, inference, training), and
the list of synchronisations with the GPU. Each part runs in its own process with a time limit. Output and results are saved in
one JSON file. The file is rewritten after each part, so that nothing is lost if a part hangs.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from common import parse
from measuring import machine

ROOT = Path(__file__).parents[1]
LONGEST_OUTPUT = 8000  # characters kept from the end of a part's output

TRIAL = """
import sys, torch
from dino_hf.model.attention_backends import BackendUnavailable, choose_backend, use_backend
reasons = []
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    try:
        with use_backend("triton"):
            choose_backend(None, "cuda", dtype)
        print(dtype, "agrees with PyTorch")
    except BackendUnavailable as error:
        reasons.append(error)
        print(dtype, error)
sys.exit(len(reasons))
"""


@dataclass
class Arguments:
    """Check the CUDA kernels on this machine's GPU."""

    output: Path = field(
        default=Path("outputs/gpu_check.json"), metadata={"help": "JSON file for the results; it is replaced"}
    )
    seconds: int = field(default=470, metadata={"help": "time limit for all parts together, in seconds"})


class Part(NamedTuple):
    name: str
    seconds: int  # time limit
    command: Sequence[str]  # arguments of the Python interpreter
    rows: str | None = None  # file in the results folder to which the part adds JSON lines


def parts(folder: Path) -> list[Part]:
    """The parts, most important first. The last ones are left out if time runs out."""
    kernels = ["benchmarks/kernel_benchmark.py", "--device", "cuda", "--rounds", "3"]
    here = ["--device", "cuda", "--output_dir", str(folder), "--rounds", "2"]
    return [
        Part("trial", 90, ["-c", TRIAL]),
        Part("tests", 180, ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--durations=5"]),
        *(
            Part(f"kernels, {dtype}", 70, [*kernels, "--dtype", dtype, "--output", str(folder / file)], file)
            for dtype, file in (("float32", "kernels_float32.jsonl"), ("bfloat16", "kernels_bfloat16.jsonl"))
        ),
        Part("host waits", 60, ["benchmarks/host_syncs.py", "--output_dir", str(folder)], "host_syncs.jsonl"),
        Part("training", 90, ["benchmarks/training_step.py", *here], "training_step.jsonl"),
        Part(
            "inference",
            120,
            ["benchmarks/inference.py", *here, "--sizes", "800x1333", "--batch_sizes", "1", "8", "--modes", "eager"],
            "inference.jsonl",
        ),
    ]


def run(part: Part, seconds: float, folder: Path) -> dict:
    """Run a part and return its result. A process that hangs is killed with all its children."""
    start, log = time.monotonic(), folder / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *part.command],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            code = process.poll()
            if code is None:
                os.killpg(process.pid, 9)
                process.wait()
    return {
        "name": part.name,
        "command": ["python", *part.command],
        "exit_code": code,
        "timed_out": code is None,
        "seconds": round(time.monotonic() - start, 1),
        "rows": read_rows(folder / part.rows) if part.rows else [],
        "output": log.read_text(encoding="utf-8", errors="replace")[-LONGEST_OUTPUT:],
    }


def read_rows(path: Path) -> list[dict]:
    """Read JSON lines. A killed process may have left an incomplete line, which is skipped."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def check(arguments: Arguments) -> dict:
    """Run all parts that fit into the time limit, and save the results."""
    folder = arguments.output.with_name(arguments.output.stem + "_parts").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + arguments.seconds
    report = {"machine": machine("cuda"), "parts": [], "left_out": [], "passed": False}
    for part in parts(folder):
        left = end - time.monotonic()
        if left < 10:
            report["left_out"].append(part.name)
            continue
        if part.rows:
            (folder / part.rows).unlink(missing_ok=True)
        result = run(part, min(left, part.seconds), folder)
        report["parts"].append(result)
        outcome = "passed" if result["exit_code"] == 0 else "ran out of time" if result["timed_out"] else "failed"
        print(f"{part.name:<20} {outcome:<16} {result['seconds']:6.1f} s  {len(result['rows'])} rows", flush=True)
        report["passed"] = not report["left_out"] and all(one["exit_code"] == 0 for one in report["parts"])
        scratch = arguments.output.with_name(f".{arguments.output.name}.partial")
        scratch.write_text(json.dumps(report, indent=1), encoding="utf-8")
        scratch.replace(arguments.output)
    print(f"{'all passed' if report['passed'] else 'not all passed'}; written to {arguments.output}")
    return report


def main() -> None:
    arguments = parse(Arguments)
    if not torch.cuda.is_available():
        raise SystemExit("error: torch finds no CUDA device, and this check needs one; run it on a machine with a GPU.")
    sys.exit(0 if check(arguments)["passed"] else 1)


if __name__ == "__main__":
    main()
