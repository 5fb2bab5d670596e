"""Which format a data set is in is seen from its files."""

from itertools import islice
from pathlib import Path

from ..common.paths import expand_home
from .coco_format import read_coco, read_json
from .files import files_below
from .hub_format import read_hub
from .hub_loading import FILE_KINDS, is_saved_dataset
from .raw import RawDataset
from .voc_format import read_voc
from .yolo_format import find_yaml, read_yolo, read_yolo_without_yaml

_LOOKED_FOR = (
    "a json in COCO format, a YOLO yaml with `names` and `train` or a classes.txt, xml files in Pascal VOC format, or parquet, "
    "arrow or jsonl files of a Hugging Face data set"
)


def read_raw(source, *, box_format: str | None = None) -> RawDataset:
    """Read a data set in whatever format it is, unchecked: broken data can be looked at.

    Args:
        source: folder at any depth of which the annotations are, a json in COCO format, a yaml of YOLO, a parquet, arrow or jsonl
            file, an id of the Hub; or a `Dataset`, `DatasetDict`, `IterableDataset` or `IterableDatasetDict` of `datasets`.
        box_format: how boxes of a Hugging Face data set are written, which nothing in it tells: "xywh" (default), "xyxy",
            "cxcywh", in pixels, or "xywhn", "xyxyn", "cxcywhn", relative to the image. The other formats say it themselves.
    Raises:
        ValueError, OSError: nothing is recognised, or the annotation file given cannot be read.
    """
    if not isinstance(source, str | Path):
        return read_hub(source, box_format)
    if not str(source).strip():
        raise ValueError("The path of the data is empty; give a folder, a file or an id of the Hub.")
    path = expand_home(source)
    if not path.exists():
        return _read_id(source, path, box_format)
    raw = _read_folder(path, box_format) if path.is_dir() else _read_file(path, box_format)
    if box_format is not None and raw.format != "huggingface":
        raise ValueError(f"{source} is in {raw.format} format, which says how boxes are written; leave box_format out.")
    return raw


def _read_id(source: str | Path, path: Path, box_format: str | None) -> RawDataset:
    parts = str(source).split("/")
    if isinstance(source, Path) or path.suffix or path.is_absolute() or len(parts) > 2 or not all(parts):
        raise FileNotFoundError(f"There is no file or folder {source}.")
    return read_hub(source, box_format)


def _read_file(path: Path, box_format: str | None) -> RawDataset:
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        return read_yolo(find_yaml(path))
    if suffix in FILE_KINDS:
        return read_hub(path, box_format)
    if suffix == ".json":
        return read_coco(path)
    raise ValueError(f"{path} is no data set; give a folder, or {_LOOKED_FOR}.")


def _read_folder(folder: Path, box_format: str | None) -> RawDataset:
    if is_saved_dataset(folder):
        return read_hub(folder, box_format)
    if yaml_file := find_yaml(folder):
        return read_yolo(yaml_file)
    if raw := read_coco(folder) or read_voc(folder) or read_yolo_without_yaml(folder):
        return raw
    if any(files_below(folder, set(FILE_KINDS))):
        return read_hub(folder, box_format)
    for path in islice(files_below(folder, {".json"}), 100):
        read_json(path)  # one that is broken may be the reason
    found = sorted(path.name for path in folder.iterdir())
    shown = ", ".join(found[:8]) + (f" and {len(found) - 8} others" if len(found) > 8 else "")
    raise ValueError(f"{folder} is no data set: looked for {_LOOKED_FOR}; there is {shown or 'nothing'}.")
