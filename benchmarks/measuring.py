"""Measure speed and memory side by side in one process, as ratios of runs made back to back.

On a shared machine, times vary, but ratios of runs made back to back hardly do. Each round runs every candidate once, in rotating
order. A ratio is the median over the rounds; its spread is the smallest and the largest ratio.
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
        candidates: name -> function to time. On a GPU it is called ten times in a row.
        rounds: number of times that each candidate is timed, at least 1.
        device: "cpu" or "cuda".
        warm_ups: number of calls of each candidate before the first measured call.
        memory: whether to measure temporary memory too.
        apart: measure memory in an extra call before the rounds. False: in the first round. Use it for calls that take so long
            that the measurement does not affect their time.
    Returns:
        a dictionary for each candidate: `candidate`, `rounds`, `milliseconds` with `_min` and `_max`, and `times_faster_than`
        (name of each other candidate -> median, smallest and largest ratio). With `memory`, it also has `temporary_MiB`, None if
        unknown.
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
    """Median, smallest and largest value."""
    return [_short(one) for one in (median(values), min(values), max(values))]


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def seconds(function: Callable[[], object], device: str) -> float:
    """Time of one call. On a GPU, ten calls are timed, because fewer do not fill its queue."""
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
    """Peak memory during a call, in MiB, without memory used before and the returned tensors. NaN if the system does not tell."""
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
    """Reset the peak memory of this process, `resident_memory("VmHWM")`.

    Raises:
        OSError, AttributeError: this system is not Linux.
    """
    resident_memory()  # without /proc, this raises before a function of glibc is called
    ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory, and would hide that it is used again
    Path("/proc/self/clear_refs").write_text("5")


def resident_memory(key: str = "VmRSS") -> int:
    """Memory of this process in bytes, on Linux: current ("VmRSS") or peak ("VmHWM").

    Raises:
        OSError: this system is not Linux.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def machine(device: str) -> dict:
    """The machine and the versions of a measurement."""
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
    """Append each row as a line of JSON, with settings, date and machine. The file is created if it does not exist."""
    about = {**settings, "date": time.strftime("%Y-%m-%d"), **machine(device)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**row, **about}) + "\n" for row in rows)
