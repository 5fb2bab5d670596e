"""Folders of checkpoints: which there are, whether they are whole, and how they come and go at once."""

import json
import logging
import os
import re
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import EarlyStoppingCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

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


def check_checkpoint(checkpoint: Path) -> None:
    """What is damaged is named before anything is loaded; what is missing begins anew, with a warning."""
    for path in sorted(checkpoint.rglob("*")):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
                raise ValueError("it is cut off")
        except (OSError, ValueError, SafetensorError) as error:
            others = [one for one in _checkpoints(checkpoint.parent).values() if one != checkpoint]
            after = f"the newest of {sorted(one.name for one in others)}" if others else "the beginning"
            raise ValueError(
                f"{path} is damaged ({error}). Delete the folder {checkpoint} and resume again (--resume, of a Trainer "
                f"resume_from_checkpoint=True): training then goes on from {after}."
            ) from error
    if missing := [name for name in (OPTIMIZER_NAME, SCHEDULER_NAME) if not (checkpoint / name).is_file()]:
        logger.warning("%s has no %s: what they would tell begins anew.", checkpoint, " and ".join(missing))


def was_stopped_early(checkpoint: str | Path, patience: int | None) -> bool:
    """By the patience of this run, or, if its early stopping is the user's own, by that of the run that is resumed."""
    state = json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
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
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
