"""Files of checkpoints: list folders, write checksums, and find damaged files before they are loaded."""

import dataclasses
import json
import logging
import math
import os
import pickle
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import EarlyStoppingCallback, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..common.regular_files import (
    DEEPEST_SETTINGS,
    check_depth,
    is_regular,
    open_regular,
    read_json,
    read_settings,
)
from ..common.text import first_line, printable
from ..common.values import short_repr

logger = logging.getLogger(__name__)

CHECKSUMS_NAME = "checksums.json"
_LARGEST_JSON = 2**30  # bytes; the log of a long run has about 100 MiB
_LONGEST_REASON = 200  # characters kept of a library's error
_CHUNK = 2**22  # bytes read at once

# Folder for unfinished checkpoints in the output folder. Uploads skip names that begin with an underscore.
UNFINISHED = "_unfinished"


def newest_checkpoint(output_dir: Path) -> str | None:
    """Path of the whole checkpoint with the highest step, or None if there is no checkpoint."""
    checkpoints = _checkpoints(output_dir)
    return str(checkpoints[max(checkpoints)]) if checkpoints else None


def _checkpoints(output_dir: Path) -> dict[int, Path]:
    """Whole checkpoints by step. The trainer state marks a whole checkpoint, because `Trainer` writes this file last."""
    return {
        int(match[1]): folder
        for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name))
        and (folder / TRAINER_STATE_NAME).is_file()
    }


def checkpoints_by_age(output_dir: Path, newest_step: int) -> list[Path]:
    """Whole checkpoints, the oldest first.

    Age is determined by step, because a clock may be set back. Checkpoints beyond `newest_step` are left over from before the run
    was resumed at an earlier step, so they are the oldest.
    """
    checkpoints = _checkpoints(output_dir)
    return [checkpoints[step] for step in sorted(checkpoints, key=lambda step: (step <= newest_step, step))]


def check_checkpoint(checkpoint: Path) -> None:
    """Find a damaged file before any file is loaded.

    If the checkpoint has checksums, all bytes of all files are checked. A missing optimizer or scheduler is a warning: it starts
    from its initial state.

    Raises:
        ValueError: a file is damaged. The message names the file and a remedy.
    """
    try:
        checksums = _read_checksums(checkpoint)
    except (OSError, ValueError) as error:
        raise _damaged(checkpoint / CHECKSUMS_NAME, checkpoint, error) from error
    for path in sorted(checkpoint.rglob("*")):
        try:
            if not path.is_dir() and not is_regular(path):
                raise ValueError("it is not a regular file")
            if path.suffix == ".json":
                _check_json(path)
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix in (".pt", ".pth"):
                _check_archive(path)
            if recorded := checksums.get(path.relative_to(checkpoint).as_posix()):
                _check_checksum(path, recorded)
        except (OSError, ValueError, SafetensorError, RecursionError) as error:
            raise _damaged(path, checkpoint, error) from error
    if missing := [name for name in (OPTIMIZER_NAME, SCHEDULER_NAME) if not (checkpoint / name).is_file()]:
        logger.warning("%s has no %s: training continues with their initial states.", checkpoint, " and ".join(missing))


@contextmanager
def describe_load_errors(checkpoint: Path, name: str) -> Iterator[None]:
    """Turn any error of loading a file into one sentence that names the file.

    Args:
        name: file in the checkpoint.
    Raises:
        ValueError: the file cannot be loaded.
    """
    try:
        yield
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError, OSError, SafetensorError) as error:
        raise _damaged(checkpoint / name, checkpoint, error) from error


def _damaged(path: Path, checkpoint: Path, error: BaseException) -> ValueError:
    others = sorted(folder.name for folder in _checkpoints(checkpoint.parent).values() if folder != checkpoint)
    restart = f"the newest of {others}" if others else "the beginning"
    reason = printable(" ".join(str(error).split()).removeprefix(f"{path} "), _LONGEST_REASON) or type(error).__name__
    if isinstance(error, KeyError):
        reason = f"it has no {reason}"
    return ValueError(
        f"{path} is damaged ({reason}). Delete the folder {checkpoint} and resume again (--resume; with a Trainer, "
        f"resume_from_checkpoint=True). Training then continues from {restart}."
    )


def check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Check that each optimizer state has the shape of its parameter. Fused kernels would read past its end.

    Raises:
        ValueError: a state has another shape.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for name, value in optimizer.state.get(parameter, {}).items():
                is_scalar = isinstance(value, torch.Tensor) and value.numel() == 1
                if isinstance(value, torch.Tensor) and not is_scalar and value.shape != parameter.shape:
                    raise ValueError(
                        f"{name} of a parameter with shape {tuple(parameter.shape)} has shape {tuple(value.shape)}"
                    )
                if name != "step" and (not isinstance(value, torch.Tensor) or value.numel() != parameter.numel()):
                    raise ValueError(f"{name} of a parameter with shape {tuple(parameter.shape)} has another size")


def _check_json(path: Path) -> None:
    content = read_json(path, _LARGEST_JSON)
    check_depth(content, DEEPEST_SETTINGS, str(path))
    if path.name == TRAINER_STATE_NAME:
        found = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.parent.name)
        _check_state(content, int(found[1]) if found else None)


_NUMBER, _NOTHING = (int, float), type(None)
_STATE_KINDS = {
    "epoch": (*_NUMBER, _NOTHING),
    "global_step": int,
    "max_steps": int,
    "logging_steps": _NUMBER,
    "eval_steps": _NUMBER,
    "save_steps": _NUMBER,
    "train_batch_size": (int, _NOTHING),
    "num_train_epochs": _NUMBER,
    "num_input_tokens_seen": int,
    "total_flos": _NUMBER,
    "log_history": list,
    "best_metric": (*_NUMBER, _NOTHING),
    "best_global_step": (int, _NOTHING),
    "best_model_checkpoint": (str, _NOTHING),
    "trial_name": (str, _NOTHING),
    "trial_params": (dict, _NOTHING),
    "stateful_callbacks": (dict, _NOTHING),
}


def _check_state(content: Any, step: int | None) -> None:
    """
    Args:
        content: content of trainer_state.json.
        step: step in the checkpoint's name, or None.
    Raises:
        ValueError: `Trainer` cannot have written this content at this step.
    """
    if not isinstance(content, dict) or not {"global_step", "log_history"} <= set(content):
        raise ValueError("it has no global_step or no log_history")
    known = {field.name for field in dataclasses.fields(TrainerState)}
    if unknown := sorted(set(content) - known):
        raise ValueError(f"a Trainer has no state {short_repr(unknown[0])}")
    for name, kinds in _STATE_KINDS.items():
        value = content.get(name)
        is_infinite = name == "epoch" and isinstance(value, float) and not math.isfinite(value)
        if name in content and (isinstance(value, bool) or not isinstance(value, kinds) or is_infinite):
            raise ValueError(f"its {name} is {short_repr(value)}")
    if step is not None and content["global_step"] != step:
        raise ValueError(
            f"its global_step is {short_repr(content['global_step'])}, but its folder is named after step {step}"
        )
    for entry in content["log_history"]:
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            raise ValueError(f"log_history has the entry {short_repr(entry)}")
        for name, value in entry.items():
            if re.fullmatch(r"eval_(\w+_)?(AP|loss)", name) and not isinstance(value, _NUMBER):
                raise ValueError(f"log_history has {short_repr(value)} as {short_repr(name)}")
    for name, states in (content.get("stateful_callbacks") or {}).items():
        for state in states if isinstance(states, list) else [states]:
            if not isinstance(state, dict) or not all(
                isinstance(state.get(part), dict) for part in ("args", "attributes")
            ):
                raise ValueError(f"the state of the callback {short_repr(name)} is {short_repr(state)}")


def _check_archive(path: Path) -> None:
    """Read all of a file from `torch.save`, which checks its checksums, and unpickle it as `Trainer` will.

    Raises:
        ValueError: the file is cut off or damaged, or holds other objects than tensors and plain values.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError("it is cut off")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of its part {damaged} is wrong")
        with safe_globals():
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"it cannot be read, {type(error).__name__}: {first_line(error)}") from error


def was_stopped_early(checkpoint: str | Path, patience: int | None) -> bool:
    """Whether early stopping ended the run of a checkpoint.

    Args:
        patience: patience of this run. None: the early stopping callback is the user's own; then the patience of the earlier run
            counts.
    """
    state = read_json(Path(checkpoint) / TRAINER_STATE_NAME, _LARGEST_JSON)
    stoppers = (state.get("stateful_callbacks") or {}).get(EarlyStoppingCallback.__name__, [])
    with describe_load_errors(Path(checkpoint), TRAINER_STATE_NAME):
        return any(
            stopper["attributes"]["early_stopping_patience_counter"]
            >= (patience or stopper["args"]["early_stopping_patience"])
            for stopper in (stoppers if isinstance(stoppers, list) else [stoppers])
        )


def delete_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint. Its name disappears in one step, so a killed run leaves no half-deleted checkpoint."""
    doomed = checkpoint.parent / UNFINISHED / f"discarded-{checkpoint.name}"
    doomed.parent.mkdir(exist_ok=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sync_to_disk(folder: Path) -> None:
    """Write all files of a folder to the disk. Call it before the folder is renamed to its final name.

    Otherwise a power failure could leave a folder with its final name and incomplete files.
    """
    for path in (*folder.rglob("*"), folder):
        if path.is_dir() and os.name == "nt":
            continue  # Windows cannot open folders
        # Windows cannot flush a file that is open for reading only.
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_checksums(folder: Path) -> None:
    """Write the CRC-32 of all files of a folder into `checksums.json`. Call it after the last file is written."""
    paths = (path for path in sorted(folder.rglob("*")) if is_regular(path) and path != folder / CHECKSUMS_NAME)
    sums = {path.relative_to(folder).as_posix(): _checksum(path) for path in paths}
    (folder / CHECKSUMS_NAME).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def _read_checksums(folder: Path) -> dict[str, str]:
    """Name of a file in the folder -> its checksum. Empty if the folder has no record, as in checkpoints of older versions.

    Raises:
        ValueError: the record is damaged.
    """
    path = folder / CHECKSUMS_NAME
    if not path.exists():
        return {}
    sums = read_settings(path)
    if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
        raise ValueError(f"it holds {short_repr(sums)}, not checksums")
    return sums


def _check_checksum(path: Path, recorded: str) -> None:
    """
    Raises:
        ValueError: the checksum of the file is not the recorded one.
    """
    found = _checksum(path)
    if found != recorded:
        raise ValueError(
            f"its checksum is {found}, but was {short_repr(recorded)} when it was written; if you changed it on purpose, delete "
            f"{CHECKSUMS_NAME} instead"
        )


def _checksum(path: Path) -> str:
    checksum = 0
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return f"{checksum:08x}"
