"""Recognise the format of a data set by its files, and read it."""

import os
import re
from itertools import islice
from pathlib import Path

from ..common.images import IMAGE_SUFFIXES
from ..common.paths import expand_home
from ..common.regular_files import is_folder, open_regular
from ..common.text import list_some
from ..common.values import short_repr
from .coco_format import read_coco, read_json
from .files import DataFolder, is_saved_dataset, unread_note
from .hub_files import FILE_KINDS
from .hub_format import read_hub
from .raw import RawDataset
from .voc_format import read_voc, why_no_voc
from .yolo_format import read_yaml, read_yolo, read_yolo_without_yaml, why_no_yolo

_YAML_NAMES = ("data", "dataset")
_ANNOTATION_SUFFIXES = (".json", ".yaml", ".yml", ".xml", ".txt", ".csv", ".zip", ".tar", ".gz", ".7z")

_FORMATS = (
    "a json in COCO format, a YOLO yaml with `names` and `train` (or a classes.txt), xml files in Pascal VOC format, or parquet, "
    "arrow or jsonl files of a Hugging Face data set"
)


def read_raw(source, *, box_format: str | None = None, allow_outside: bool = False) -> RawDataset:
    """Read a data set without checks, so that broken data can be inspected. Its format is recognised by its files.

    Only regular files inside the data set's folder are read, after all links are followed. URLs in the data are never opened.

    Args:
        source: a folder with annotations at any depth, a COCO json, a YOLO yaml, a parquet, arrow or jsonl file, or an id on the
            Hub; or a `Dataset`, `DatasetDict`, `IterableDataset` or `IterableDatasetDict` of the library `datasets`.
        box_format: layout of the boxes of a Hugging Face data set: "xywh" (default), "xyxy" or "cxcywh" in pixels, or "xywhn",
            "xyxyn" or "cxcywhn" relative to the image. The other formats define their layout.
        allow_outside: also read files outside the data set's folder to which its links and paths lead.
    Raises:
        ValueError, OSError: no format is recognised, or the given annotation file cannot be read.
    """
    if not isinstance(source, str | Path):
        return read_hub(source, box_format)
    if not str(source).strip():
        raise ValueError("The path of the data is empty; give a folder, a file or an id of the Hub.")
    path = expand_home(source)
    if not is_folder(path) and not os.path.lexists(path):
        return _read_id(source, path, box_format)
    read = _read_folder if path.is_dir() else _read_file
    raw = read(path, box_format, allow_outside)
    if box_format is not None and raw.format != "huggingface":
        raise ValueError(
            f"{source} is in {raw.format} format, which defines the layout of boxes; leave box_format out."
        )
    return raw


def _read_id(source: str | Path, path: Path, box_format: str | None) -> RawDataset:
    """Read a data set of the Hub. An id may contain a dot, but does not end like the name of an annotation file."""
    parts = str(source).split("/")
    is_file_name = path.suffix.lower() in (*FILE_KINDS, *_ANNOTATION_SUFFIXES, *IMAGE_SUFFIXES)
    is_id = (
        not path.is_absolute()
        and len(parts) <= 2
        and all(re.fullmatch(r"\w[\w.-]*(:[\w.-]+)?", part) for part in parts)
    )
    if isinstance(source, Path) or is_file_name or not is_id:
        raise FileNotFoundError(f"There is no file or folder {source}.")
    return read_hub(source, box_format)


def _read_file(path: Path, box_format: str | None, allow_outside: bool) -> RawDataset:
    open_regular(path).close()
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        return read_yolo(find_yaml(path), path, allow_outside)
    if suffix in FILE_KINDS:
        return read_hub(path, box_format, allow_outside)
    if suffix == ".json":
        return read_coco(path, allow_outside)
    raise ValueError(f"{path} is not a data set; give a folder, or {_FORMATS}.")


def _read_folder(folder: Path, box_format: str | None, allow_outside: bool) -> RawDataset:
    if is_saved_dataset(folder):
        return read_hub(folder, box_format, allow_outside)
    files = DataFolder(folder, allow_outside=allow_outside)
    if yaml_file := find_yaml(folder, files):
        raw = read_yolo(yaml_file, folder, allow_outside)
    else:
        raw = read_coco(folder, allow_outside) or read_voc(folder, files) or read_yolo_without_yaml(folder, files)
    if raw:
        return raw._replace(notes=[*raw.notes, *unread_note(folder, files)])
    if any(files.files(folder, set(FILE_KINDS))):
        return read_hub(folder, box_format, allow_outside)
    for path in islice(files.files(folder, {".json"}), 100):
        read_json(path)  # raises an error if the json is broken, which may be the reason
    for explain in (why_no_voc, why_no_yolo):
        if reason := explain(folder, files):
            raise ValueError(f"{folder} cannot be read as a data set: {reason}")
    found = sorted(path.name for path in folder.iterdir())
    reasons = " ".join(["", *files.notes(), *unread_note(folder, files)])
    raise ValueError(
        f"{folder} is not a data set: it needs {_FORMATS}; it has {list_some(found, 8) or 'nothing'}.{reasons}"
    )


def find_yaml(source: Path, files: DataFolder | None = None) -> Path | None:
    """The given yaml, or the yaml in a folder that describes a YOLO data set.

    Args:
        files: files of the folder. None: `source` is a yaml that the user named.
    Raises:
        ValueError: several yaml files describe a YOLO data set, and none is called data.yaml or dataset.yaml; or the given yaml
            does not describe one.
    """
    files = files or DataFolder(source, allow_outside=True)
    if not source.is_dir():
        if not _is_yolo(source, files):
            raise ValueError(
                f"{source} is not the yaml of a YOLO data set: it needs `names`, and `train` or `val` folders."
            )
        return source
    found = []
    for patterns in (("*.yaml", "*.yml"), ("*/*.yaml", "*/*.yml")):  # an archive often contains a single folder
        paths = sorted(path for pattern in patterns for path in source.glob(pattern) if files.is_file(path))
        found = found or [path for path in paths if _is_yolo(path, files, must_be_yaml=path.stem in _YAML_NAMES)]
    named = [path for path in found if path.stem in _YAML_NAMES]
    if len(found) > 1 and len(named) != 1:
        names = [path.relative_to(source).as_posix() for path in found]
        raise ValueError(f"{source} has several yaml files of YOLO data sets: {short_repr(names)}; give one of them.")
    return (named or found or [None])[0]


def _is_yolo(path: Path, files: DataFolder, must_be_yaml: bool = True) -> bool:
    try:
        content = read_yaml(path, files)
    except (ValueError, OSError):
        if must_be_yaml:
            raise
        return False
    return (
        isinstance(content, dict)
        and {"names", "nc"} & set(content)
        and {"train", "val", "test"} & set(content) != set()
    )
