"""Folders of checkpoints: which there are, whether they are whole, and how they come and go at once."""

import logging
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import EarlyStoppingCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..common.regular_files import read_settings

logger = logging.getLogger(__name__)

# In the output folder, for what is not whole. Uploads leave out what begins with an underscore.
UNFINISHED = "_unfinished"


def newest_checkpoint(output_dir: Path) -> str | None:
    checkpoints = _checkpoints(output_dir)
    return str(checkpoints[max(checkpoints)]) if checkpoints else None


def _checkpoints(output_dir: Path) -> dict[int, Path]:
    """By step. The state of the run is what is written last, by `Trainer` itself too."""
    return {
        int(match[1]): folder
        for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name))
        and (folder / TRAINER_STATE_NAME).is_file()
    }


def checkpoints_by_age(output_dir: Path, newest_step: int) -> list[Path]:
    """Oldest first, by step: the clock of a machine may be set back. Those of more steps than the newest one are of an earlier
    run, which was resumed before them, and are the oldest."""
    checkpoints = _checkpoints(output_dir)
    return [checkpoints[step] for step in sorted(checkpoints, key=lambda step: (step <= newest_step, step))]


def check_checkpoint(checkpoint: Path) -> None:
    """Name a damaged file before anything is loaded. A missing file is a warning: its part begins from the start.

    Raises:
        ValueError: a file is damaged; the message says what to do.
    """
    for path in sorted(checkpoint.rglob("*")):
        try:
            if path.suffix == ".json":
                _check_json(path)
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix in (".pt", ".pth"):
                _check_archive(path)
        except (OSError, ValueError, SafetensorError) as error:
            others = [one for one in _checkpoints(checkpoint.parent).values() if one != checkpoint]
            after = f"the newest of {sorted(one.name for one in others)}" if others else "the beginning"
            raise ValueError(
                f"{path} is damaged ({error}). Delete the folder {checkpoint} and resume again (--resume, of a Trainer "
                f"resume_from_checkpoint=True): training then goes on from {after}."
            ) from error
    if missing := [name for name in (OPTIMIZER_NAME, SCHEDULER_NAME) if not (checkpoint / name).is_file()]:
        logger.warning("%s has no %s: what they would tell begins anew.", checkpoint, " and ".join(missing))


def _check_json(path: Path) -> None:
    content = read_settings(path)
    if path.name != TRAINER_STATE_NAME:
        return
    is_state = isinstance(content, dict) and isinstance(content.get("global_step"), int)
    if not is_state or not isinstance(content.get("log_history"), list):
        raise ValueError("it has no global_step or no log_history")


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
    state = read_settings(Path(checkpoint) / TRAINER_STATE_NAME)
    stoppers = state["stateful_callbacks"].get(EarlyStoppingCallback.__name__, [])
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
