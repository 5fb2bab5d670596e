"""run.json: the settings of a run, so that it can be resumed with the same settings."""

import hashlib
import json
from pathlib import Path, PurePath
from typing import Any

from ..common.output_folders import check_output_folder, write_beside
from ..common.paths import expand_home
from ..common.regular_files import read_settings
from ..training.coco_data import CocoData
from ..training.run_lock import LOCK_NAME

RUN_NAME = "run.json"
_ROWS = 1000  # rows hashed at a time


class RunRecord:
    """The record in one output folder.

    Attributes:
        recorded: the content of run.json when the run was started; {} in a new run.
        values: the new content.
    """

    def __init__(self, output_dir: Path, recorded: dict[str, Any]):
        self.output_dir, self.recorded = output_dir, recorded
        self.values = dict(recorded)

    @property
    def is_resumed(self) -> bool:
        return bool(self.recorded)

    @property
    def is_finished(self) -> bool:
        return bool(self.recorded.get("finished"))

    @classmethod
    def take_up(cls, output_dir: Path, resume: bool) -> "RunRecord":
        """The record of a new or empty folder, or of a run to resume.

        Raises:
            FileExistsError: the folder has a run and `resume` is False, or it has other files.
            OSError: it cannot be written.
            ValueError: the record of its run is damaged.
        """
        path = output_dir / RUN_NAME
        cure = "go on with it by --resume (in Python, resume=True)"
        has_run = check_output_folder(output_dir, resume, _has_run, "a run", cure, ignored=LOCK_NAME)
        if not has_run:
            return cls(output_dir, {})
        try:
            return cls(output_dir, _checked(read_settings(path)))
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged ({error}), so the run cannot be resumed; its checkpoints are whole folders: start a run in "
                "another --output-dir with the newest of them as --model."
            ) from error

    def settle(self, name: str, given: Any, default: Any) -> Any:
        """Choose a setting and keep it in `values`: the given value, else the recorded one, else the default."""
        self.values[name] = self.recorded.get(name, default) if given is None else given
        return self.values[name]

    def settle_model(self, given: str | Path | None) -> None:
        """
        Raises:
            ValueError: the resumed run started from another model.
        """
        before = self.recorded.get("model")
        given = None if given is None else place(given)
        if self.is_resumed and given is not None and given != (before and place(before)):
            raise ValueError(
                f"The run in {self.output_dir} started from {before or 'no model'}, not from {given}: leave out the model to "
                "resume it, or choose another --output-dir."
            )
        self.settle("model", given, None)

    def settle_settings(self, given: dict[str, Any]) -> dict[str, Any]:
        self.values["settings"] = self.recorded.get("settings", {}) | given
        return self.values["settings"]

    def check_data(self, train: CocoData, held_out: CocoData | None) -> None:
        """
        Raises:
            ValueError: the resumed run had other data.
        """
        data = {
            "train": len(train.dataset),
            "held_out": None if held_out is None else len(held_out.dataset),
            "classes": list(train.id2label.values()),
        }
        before = self.recorded.get("data", data)
        digests = {"train": data_digest(train), "held_out": None if held_out is None else data_digest(held_out)}
        changed = [name for name, digest in digests.items() if before.get("digests", digests).get(name) != digest]
        if changed and {name: before.get(name) for name in data} == data:
            what = " and ".join(
                {"train": "images to train on", "held_out": "held-out images"}[name] for name in changed
            )
            raise ValueError(
                f"The {what} are not those that the run in {self.output_dir} had: as many, but with other names, sizes or boxes. "
                "Resume it with its own data, or start another in a new --output-dir."
            )
        if {name: before.get(name) for name in data} != data:
            raise ValueError(
                f"The run in {self.output_dir} had {before['train']} images to train on and {before['held_out']} held out, of "
                f"{len(before['classes'])} classes, these data have {data['train']} and {data['held_out']}, of "
                f"{len(data['classes'])}: resume it with its own data, or start another in a new --output-dir."
            )
        self.values["data"] = data | {"digests": digests}

    def changes(self) -> list[str]:
        """Sentences about settings that a resumed run changes."""
        lines = []
        for name in _CHOICES:
            if name in self.recorded and self.recorded[name] != self.values.get(name):
                lines.append(_change(name, self.values.get(name), self.recorded[name]))
        before, now = self.recorded.get("settings", {}), self.values["settings"]
        if self.is_resumed:
            lines += [
                _change(name, value, before.get(name)) for name, value in now.items() if before.get(name) != value
            ]
        return lines

    def write(self) -> None:
        """Replace run.json in one step: a killed run has the old file or the new one."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with write_beside(self.output_dir / RUN_NAME) as path:
            path.write_text(json.dumps(self.values, indent=2) + "\n", encoding="utf-8")


_CHOICES = (
    "recipe",
    "seed",
    "validation_fraction",
    "box_format",
    "report_to",
    "batch_size",
    "on_bad_image",
    "allow_outside",
)
_CHOICES += ("trust_boxes", "training_doctor")
_KINDS = {"settings": dict, "data": dict, "start": str, "start_notes": list, "seed": int, "recipe": str}


def _checked(content: Any) -> dict[str, Any]:
    """The content of a record. Raises ValueError if no run can have written it."""
    if not isinstance(content, dict) or not content:
        raise ValueError("it is no record of a run")
    for name, kind in _KINDS.items():
        if not isinstance(content.get(name), kind):
            raise ValueError(f"its {name} is {str(content.get(name))[:80]}")
    if not {"train", "held_out", "classes"} <= set(content["data"]):
        raise ValueError("its data lack numbers of images or classes")
    return content


def _has_run(folder: Path) -> bool:
    return (folder / RUN_NAME).is_file()


def place(source: str | Path) -> str:
    """The full path of a file or folder, so that a run can be resumed from any working directory. Ids are returned unchanged."""
    path = expand_home(source)
    return str(path.resolve()) if path.exists() else str(source)


def data_digest(data: CocoData) -> str:
    """Digest of the names, sizes and boxes of the images, in their order. Images are not read, and folders do not matter."""
    digest = hashlib.sha256()
    table = data.dataset.select_columns(["file_name", "width", "height", "objects"]).with_format("arrow")
    for start in range(0, len(table), _ROWS):
        rows = table[start : start + _ROWS].to_pylist()
        for row in rows:
            row["file_name"] = PurePath(row["file_name"] or "").name
        digest.update(json.dumps(rows).encode())
    return digest.hexdigest()


def _change(name: str, now: Any, before: Any) -> str:
    return f"the run goes on with {name} {now}; it was {'not set' if before is None else before} so far."
