"""The user's own augmentation of a run. Its code is run only if the user names it in this call."""

from pathlib import Path
from typing import Any

from ..common.values import short_repr
from ..training.own_augmentation import OwnAugmentation, augmentation_digest, load_own_augmentation, split_name
from .record import RunRecord, full_path


def choose_augmentation(record: RunRecord, augmentation: Any) -> OwnAugmentation | None:
    """Load the augmentation of a run and record its name in `run.json`.

    The record of a run could name any code. So it is only compared: a resumed run needs the augmentation of its start again.

    Args:
        augmentation: a name, see `load_own_augmentation`, an object, see `OwnAugmentation`, or None.
    Raises:
        ValueError: it cannot be loaded, or the run started with another one, or its file has changed since then.
    """
    before = record.recorded.get("augmentation")
    if augmentation is None and (record.is_finished or before is None):
        record.values["augmentation"] = before
        return None
    if augmentation is None:
        raise ValueError(
            f"The run in {record.output_dir} started with the augmentation {short_repr(_name(before))}. Name it again to resume "
            "the run (--augmentation, in Python augmentation=...), because code is not run by the name in run.json alone."
        )
    if isinstance(augmentation, str | Path):
        name = str(augmentation)
        own, chosen, (place, attribute) = load_own_augmentation(name), {"name": name}, split_name(name)
        if (digest := augmentation_digest(name)) is not None:
            chosen = {"name": f"{full_path(place)}:{attribute}", "digest": digest}
    else:
        own, chosen = (
            OwnAugmentation(augmentation),
            {"name": f"{type(augmentation).__module__}.{type(augmentation).__name__}"},
        )
    if record.is_resumed and chosen != before:
        what = "which has changed since then" if _name(before) == chosen["name"] else f"not with {chosen['name']}"
        started = (
            "without an augmentation, " if before is None else f"with the augmentation {short_repr(_name(before))}, "
        )
        raise ValueError(
            f"The run in {record.output_dir} started {started}{what}. Resume it in the same way, or choose another --output-dir."
        )
    record.values["augmentation"] = chosen
    return own


def _name(recorded: Any) -> Any:
    return recorded.get("name") if isinstance(recorded, dict) else recorded
