"""Streams of the library datasets. One process of each machine reads them, once."""

import os
import socket
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import TrainingArguments

from ..data.hub_files import drain


def read_streams(data: Any, output_dir: str, use_cpu: bool) -> Any:
    """Replace each `IterableDataset` by a `Dataset`. Other data are returned unchanged.

    A stream may yield other rows each time. So only the first process of a machine reads it, and the others open the Arrow files
    that the first one wrote.

    Args:
        data: the argument of `train`.
        output_dir, use_cpu: settings of the run, needed to connect its processes.
    """
    parts = data if isinstance(data, dict) else {"": data}
    if not any(isinstance(part, IterableDataset) for part in parts.values()):
        return data
    parts = _shared(parts, output_dir, use_cpu)
    return parts if isinstance(data, dict) else parts[""]


def _shared(parts: dict[str, Any], output_dir: str, use_cpu: bool) -> dict[str, Any]:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return _read(parts)
    args = TrainingArguments(output_dir, use_cpu=use_cpu, report_to="none")  # connects the processes
    own = _read(parts) if args.local_process_index == 0 else None
    gathered: list = [None] * args.world_size
    torch.distributed.all_gather_object(gathered, (socket.gethostname(), own))
    return next(read for host, read in gathered if host == socket.gethostname() and read is not None)


def _read(parts: dict[str, Any]) -> dict[str, Dataset]:
    return {name: drain(part) if isinstance(part, IterableDataset) else part for name, part in parts.items()}
