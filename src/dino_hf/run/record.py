"""run.json: the settings of a run, so that it can be resumed with the same settings."""

import hashlib
import json
from pathlib import Path, PurePath
from typing import Any

from ..common.output_folders import check_output_folder, replace_file
from ..common.paths import expand_home
from ..common.regular_files import read_settings
from ..training.coco_data import CocoData
from ..training.run_lock import LOCK_NAME
from .settings import RUN_DEFAULTS

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
    def open(cls, output_dir: Path, resume: bool) -> "RunRecord":
        """Read the record of a folder: empty for a new or empty folder, otherwise the record of the run to resume.

        Raises:
            FileExistsError: the folder has a run and `resume` is False, or it has other files.
            OSError: the folder cannot be written.
            ValueError: the record is damaged.
        """
        path = output_dir / RUN_NAME
        cure = "continue it by --resume (in Python, resume=True)"
        has_run = check_output_folder(output_dir, resume, _has_run, "a run", cure, ignored=LOCK_NAME)
        if not has_run:
            return cls(output_dir, {})
        try:
            return cls(output_dir, _checked(read_settings(path)))
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged ({error}), so the run cannot be resumed. Its checkpoints are whole: start another run in a new "
                "--output-dir, with the newest of them as --model."
            ) from error

    def choose(self, given: dict[str, Any]) -> None:
        """Choose the settings in `RUN_DEFAULTS`: the given value unless it is None, else the recorded value, else the default."""
        for name, value in given.items():
            self.values[name] = self.recorded.get(name, RUN_DEFAULTS[name]) if value is None else value

    def choose_start(
        self,
        model: str | Path | None,
        backbone: str | Path | None,
        num_queries: int | None,
        freeze: list[str] | None = None,
        lora: dict[str, Any] | None = None,
        keep_classes: bool | None = None,
    ) -> None:
        """Choose the start of the run, its trained parts, and whether its classes are kept: the given, else the recorded values.

        Raises:
            ValueError: model and backbone are given, or the resumed run started from others.
        """
        if model is not None and backbone is not None:
            raise ValueError(
                f"--model {model} has a backbone of its own: leave out --backbone {backbone} (in Python, backbone=...), or leave "
                "out the model to train a new detector on this backbone."
            )
        choices = {"model": model, "backbone": backbone, "num_queries": num_queries, "freeze": freeze, "lora": lora}
        choices["keep_classes"] = keep_classes
        for name, given in choices.items():
            before = self.recorded.get(name)
            if isinstance(given, str | Path):
                given, before = full_path(given), before and full_path(before)
            if self.is_resumed and given is not None and given != before:
                raise ValueError(
                    f"The run in {self.output_dir} started with {name} {before or 'not set'}, not with {given}. To resume it, "
                    f"leave out {name}; or choose another --output-dir."
                )
            self.values[name] = self.recorded.get(name) if given is None else given

    def check_weights(self, digest: str | None) -> None:
        """Check that a resumed run with adapters starts from the same weights, which its checkpoints lack, and record them.

        Raises:
            ValueError: the weights have changed since the run started.
        """
        before = self.recorded.get("start_weights")
        if before is not None and digest != before:
            raise ValueError(
                f"The run in {self.output_dir} trains adapters on {self.recorded['start']}, whose weights have changed since then. "
                "Resume it with these weights, or choose another --output-dir."
            )
        self.values["start_weights"] = digest

    def add_settings(self, given: dict[str, Any]) -> dict[str, Any]:
        """Add settings of this call to the recorded ones.

        Returns:
            all settings.
        """
        self.values["settings"] = self.recorded.get("settings", {}) | given
        return self.values["settings"]

    def check_data(self, train: CocoData, held_out: CocoData | None) -> None:
        """Check that a resumed run has the same data, and record them.

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
            parts = " and ".join({"train": "training images", "held_out": "held-out images"}[name] for name in changed)
            raise ValueError(
                f"The {parts} differ from the run in {self.output_dir}: their number is the same, but their names, sizes or boxes "
                "are not. Resume the run with its own data, or start another run in a new --output-dir."
            )
        if {name: before.get(name) for name in data} != data:
            raise ValueError(
                f"The run in {self.output_dir} had {before['train']} training images and {before['held_out']} held-out images of "
                f"{len(before['classes'])} classes. These data have {data['train']} and {data['held_out']}, of "
                f"{len(data['classes'])} classes. Resume the run with its own data, or start another run in a new --output-dir."
            )
        self.values["data"] = data | {"digests": digests}

    def changes(self) -> list[str]:
        """Sentences about settings that a resumed run changes."""
        lines = []
        for name in (*RUN_DEFAULTS, "batch_size"):
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
        with replace_file(self.output_dir / RUN_NAME) as path:
            path.write_text(json.dumps(self.values, indent=2) + "\n", encoding="utf-8")


_KINDS = {"settings": dict, "data": dict, "start": str, "start_notes": list, "seed": int, "recipe": str}


def _checked(content: Any) -> dict[str, Any]:
    """The content of a record.

    Raises:
        ValueError: no run can have written this content.
    """
    if not isinstance(content, dict) or not content:
        raise ValueError("it is not the record of a run")
    for name, kind in _KINDS.items():
        if not isinstance(content.get(name), kind):
            raise ValueError(f"its {name} is {str(content.get(name))[:80]}")
    if not {"train", "held_out", "classes"} <= set(content["data"]):
        raise ValueError("its data have no number of images or no classes")
    return content


def _has_run(folder: Path) -> bool:
    return (folder / RUN_NAME).is_file()


def full_path(source: str | Path) -> str:
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
    return f"the run continues with {name} {now}; it was {'not set' if before is None else before} before."
