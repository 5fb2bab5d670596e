"""How speed and memory are measured: side by side in one process, as ratios of neighbouring runs.

On a shared machine times vary, and ratios of runs that follow each other hardly do. Each round runs every candidate once, the order
going round; a ratio is the median over the rounds, its spread the smallest and the largest.
"""

import ctypes
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from math import isnan
from pathlib import Path
from statistics import median

import torch
import transformers
from torch import Tensor


def side_by_side(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    device: str = "cpu",
    warm_ups: int = 1,
    memory: bool = True,
    apart: bool = True,
) -> list[dict]:
    """Time candidates against each other.

    Args:
        candidates: name -> what is timed. On a GPU it is called ten times in a row.
        rounds: times that each candidate is timed, at least 1.
        device: "cpu" or "cuda".
        warm_ups: calls of each candidate before the first that is measured.
        memory: whether to measure temporary memory too.
        apart: in one more call before the rounds; False: in the first round, for calls of so many seconds that it takes nothing
            away from them.
    Returns:
        for each candidate `candidate`, `rounds`, `milliseconds` and their `_min` and `_max`, `times_faster_than` (name of each
        other candidate -> median, smallest and largest ratio) and, with memory, `temporary_MiB`, None where it is not known.
    """
    growth = {}
    for name, run in candidates.items():
        for _ in range(warm_ups):
            run()
        if memory and apart:
            growth[name] = temporary_memory(run, device)
    names, times = list(candidates), {name: [] for name in candidates}
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            if memory and name not in growth:
                elapsed, growth[name] = _seconds_and_memory(candidates[name], device)
            else:
                elapsed = seconds(candidates[name], device)
            times[name].append(elapsed)
    rows = []
    for name in names:
        milliseconds = [1e3 * one for one in times[name]]
        row = {
            "candidate": name,
            "rounds": rounds,
            "milliseconds": _short(median(milliseconds)),
            "milliseconds_min": _short(min(milliseconds)),
            "milliseconds_max": _short(max(milliseconds)),
            "times_faster_than": {
                other: spread([base / own for base, own in zip(times[other], times[name], strict=True)])
                for other in names
                if other != name
            },
        }
        if memory:
            row["temporary_MiB"] = None if isnan(growth[name]) else round(growth[name], 1)
        rows.append(row)
    return rows


def spread(values: Sequence[float]) -> list[float]:
    """Median, smallest, largest."""
    return [_short(one) for one in (median(values), min(values), max(values))]


def _short(value: float) -> float:
    return float(f"{value:.4g}")


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


def _seconds_and_memory(function: Callable[[], object], device: str) -> tuple[float, float]:
    memory = []
    return seconds(lambda: memory.append(temporary_memory(function, device)), device), memory[0]


def temporary_memory(function: Callable[[], object], device: str) -> float:
    """Largest growth during a call beyond the tensors that it returns, in MiB. NaN where the system does not tell."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before - _size(results)) / 2**20
    try:
        restart_peak()
        before = resident_memory("VmRSS")
        results = function()
        return max(0.0, resident_memory("VmHWM") - before - _size(results)) / 2**20
    except (OSError, AttributeError):
        return float("nan")


def _size(results: object) -> int:
    tensors = results if isinstance(results, tuple) else (results,)
    return sum(one.numel() * one.element_size() for one in tensors if isinstance(one, Tensor))


def restart_peak() -> None:
    """Let the peak of this process, `resident_memory("VmHWM")`, count from here.

    Raises:
        OSError, AttributeError: this is no Linux.
    """
    resident_memory()  # raises where there is no /proc, before libraries of another system are asked
    ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed, and would hide what is taken again
    Path("/proc/self/clear_refs").write_text("5")


def resident_memory(key: str = "VmRSS") -> int:
    """Bytes of memory that this process has ("VmRSS") or had at most ("VmHWM"), on Linux.

    Raises:
        OSError: this is no Linux.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def machine(device: str) -> dict:
    """What is measured on."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if device == "cpu" and info.exists():
        models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0] if models else name
    return {
        "device_type": device,
        "device": name,
        "threads": torch.get_num_threads(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def append_rows(path: Path, rows: Sequence[dict], device: str, **settings) -> None:
    """Add a line of JSON for each row, with settings, date and machine, to a file that is made where there is none."""
    about = {**settings, "date": time.strftime("%Y-%m-%d"), **machine(device)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**row, **about}) + "\n" for row in rows)
