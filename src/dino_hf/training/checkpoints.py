"""Folders of checkpoints: list them, check that they are whole, and create and delete them in one step."""

import dataclasses
import logging
import math
import os
import pickle
import re
import shutil
import zipfile
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

from ..common.regular_files import DEEPEST_SETTINGS, check_depth, is_regular, read_json
from ..common.text import printable
from ..common.values import short_repr
from .checksums import CHECKSUMS_NAME, check_checksum, read_checksums

logger = logging.getLogger(__name__)

_LARGEST_JSON = 2**30  # bytes; the log of a long run has some 100 MiB
_LONGEST_REASON = 200  # characters of an error of a library

# Folder for unfinished checkpoints in the output folder. Uploads skip names that begin with an underscore.
UNFINISHED = "_unfinished"


def newest_checkpoint(output_dir: Path) -> str | None:
    checkpoints = _checkpoints(output_dir)
    return str(checkpoints[max(checkpoints)]) if checkpoints else None


def _checkpoints(output_dir: Path) -> dict[int, Path]:
    """Checkpoints by step. The state of the run marks a whole one, because it is written last, also by `Trainer` itself."""
    return {
        int(match[1]): folder
        for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name))
        and (folder / TRAINER_STATE_NAME).is_file()
    }


def checkpoints_by_age(output_dir: Path, newest_step: int) -> list[Path]:
    """Oldest first. Age is determined by step, because a clock may be set back. Checkpoints beyond the newest step are left from
    before the run was resumed at an earlier step, so they are the oldest."""
    checkpoints = _checkpoints(output_dir)
    return [checkpoints[step] for step in sorted(checkpoints, key=lambda step: (step <= newest_step, step))]


def check_checkpoint(checkpoint: Path) -> None:
    """Name a damaged file before anything is loaded. A missing file is a warning: its part begins from the start.

    Checkpoints that `write_checksums` has completed are compared byte by byte with what was written.

    Raises:
        ValueError: a file is damaged; the message says what to do.
    """
    try:
        checksums = read_checksums(checkpoint)
    except (OSError, ValueError) as error:
        raise _damaged(checkpoint / CHECKSUMS_NAME, checkpoint, error) from error
    for path in sorted(checkpoint.rglob("*")):
        try:
            if not path.is_dir() and not is_regular(path):
                raise ValueError("it is no regular file")
            if path.suffix == ".json":
                _check_json(path)
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix in (".pt", ".pth"):
                _check_archive(path)
            if recorded := checksums.get(path.relative_to(checkpoint).as_posix()):
                check_checksum(path, recorded)
        except (OSError, ValueError, SafetensorError, RecursionError) as error:
            raise _damaged(path, checkpoint, error) from error
    if missing := [name for name in (OPTIMIZER_NAME, SCHEDULER_NAME) if not (checkpoint / name).is_file()]:
        logger.warning("%s has no %s: training continues with their initial states.", checkpoint, " and ".join(missing))


@contextmanager
def loaded_from(checkpoint: Path, name: str) -> Iterator[None]:
    """Turn errors of loading a file into one sentence.

    Args:
        name: file in the checkpoint.
    Raises:
        ValueError: the file does not fit.
    """
    try:
        yield
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError, OSError, SafetensorError) as error:
        raise _damaged(checkpoint / name, checkpoint, error) from error


def _damaged(path: Path, checkpoint: Path, error: BaseException) -> ValueError:
    others = [one for one in _checkpoints(checkpoint.parent).values() if one != checkpoint]
    after = f"the newest of {sorted(one.name for one in others)}" if others else "the beginning"
    reason = printable(" ".join(str(error).split()).removeprefix(f"{path} "), _LONGEST_REASON) or type(error).__name__
    if isinstance(error, KeyError):
        reason = f"it has no {reason}"
    return ValueError(
        f"{path} is damaged ({reason}). Delete the folder {checkpoint} and resume again (--resume, of a Trainer "
        f"resume_from_checkpoint=True): training then goes on from {after}."
    )


def check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError if an optimizer state has not the shape of its parameter. Fused kernels would read past its end."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for name, value in optimizer.state.get(parameter, {}).items():
                is_scalar = isinstance(value, torch.Tensor) and value.numel() == 1
                if isinstance(value, torch.Tensor) and not is_scalar and value.shape != parameter.shape:
                    raise ValueError(
                        f"{name} of a parameter of the shape {tuple(parameter.shape)} has the shape {tuple(value.shape)}"
                    )
                if name != "step" and (not isinstance(value, torch.Tensor) or value.numel() != parameter.numel()):
                    raise ValueError(f"{name} of a parameter of the shape {tuple(parameter.shape)} is of another one")


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
    """Raise ValueError if a json is not the state of a `Trainer`, or not of this step."""
    if not isinstance(content, dict) or not {"global_step", "log_history"} <= set(content):
        raise ValueError("it has no global_step or no log_history")
    known = {field.name for field in dataclasses.fields(TrainerState)}
    if unknown := sorted(set(content) - known):
        raise ValueError(f"nothing of a Trainer is called {short_repr(unknown[0])}")
    for name, kinds in _STATE_KINDS.items():
        value = content.get(name)
        is_infinite = name == "epoch" and isinstance(value, float) and not math.isfinite(value)
        if name in content and (isinstance(value, bool) or not isinstance(value, kinds) or is_infinite):
            raise ValueError(f"its {name} is {short_repr(value)}")
    if step is not None and content["global_step"] != step:
        raise ValueError(f"its global_step is {short_repr(content['global_step'])} in a folder of step {step}")
    for entry in content["log_history"]:
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            raise ValueError(f"log_history has the entry {short_repr(entry)}")
        for name, value in entry.items():
            if re.fullmatch(r"eval_(\w+_)?(AP|loss)", name) and not isinstance(value, _NUMBER):
                raise ValueError(f"log_history has {short_repr(value)} as {short_repr(name)}")
    for name, states in (content.get("stateful_callbacks") or {}).items():
        for one in states if isinstance(states, list) else [states]:
            if not isinstance(one, dict) or not all(isinstance(one.get(part), dict) for part in ("args", "attributes")):
                raise ValueError(f"the state of the callback {short_repr(name)} is {short_repr(one)}")


def _check_archive(path: Path) -> None:
    """Read a file of `torch.save` wholly, for its checksums, and unpickle it as `Trainer` will.

    Raises:
        ValueError: it is cut off or damaged, or has something else in it than tensors and plain values.
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
        raise ValueError(f"it cannot be read, {type(error).__name__}: {str(error).splitlines()[0][:200]}") from error


def was_stopped_early(checkpoint: str | Path, patience: int | None) -> bool:
    """By the patience of this run, or, if its early stopping is the user's own, by that of the run that is resumed."""
    state = read_json(Path(checkpoint) / TRAINER_STATE_NAME, _LARGEST_JSON)
    stoppers = (state.get("stateful_callbacks") or {}).get(EarlyStoppingCallback.__name__, [])
    with loaded_from(Path(checkpoint), TRAINER_STATE_NAME):
        return any(
            one["attributes"]["early_stopping_patience_counter"] >= (patience or one["args"]["early_stopping_patience"])
            for one in (stoppers if isinstance(stoppers, list) else [stoppers])
        )


def discard(checkpoint: Path) -> None:
    """Delete at once, as far as names go."""
    doomed = checkpoint.parent / UNFINISHED / f"discarded-{checkpoint.name}"
    doomed.parent.mkdir(exist_ok=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def flush(folder: Path) -> None:
    """To the disk, so that the name is not there before the content if the machine stops."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir() and os.name == "nt":
            continue  # Windows opens no folders
        # Windows flushes no file that is open for reading only.
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
