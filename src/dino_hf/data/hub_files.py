"""Parquet, arrow and jsonl files of a folder -> rows of its splits."""

from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from ..common.regular_files import LARGEST_YAML, check_depth, open_regular, parse_json, parse_yaml, read_bytes
from ..common.values import short_repr
from .files import DataFolder
from .hub_features import join_rows
from .hub_layout import Layout, dtype_name, find_layout
from .split_names import SplitNames

FILE_KINDS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json"}
_DEEPEST = 64  # levels of lists and objects in a line of a jsonl; pyarrow crashes Python at some thousand
_SUSPICIOUS = 256  # brackets in a line, from which on its depth is measured


class Part(NamedTuple):
    """Rows of one split."""

    rows: Dataset
    beside: Path | None = None  # the folder that relative paths of images are from


def load_files(paths: list[Path]) -> Dataset:
    """
    Args:
        paths: of one kind.
    Raises:
        ValueError: they cannot be read.
    """
    kind = FILE_KINDS[paths[0].suffix.lower()]
    for path in paths if kind == "json" else ():
        _check_lines(path)
    try:
        return datasets.load_dataset(kind, data_files=[str(path) for path in paths], split="train")
    except Exception as error:  # of many libraries
        text = one_line(error)
        raise ValueError(f"{paths[0]} cannot be read as a data set, {type(error).__name__}: {text}") from error


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") + "."


def _check_lines(path: Path) -> None:
    """Raises ValueError for a line of json that is nested so deeply that its reader would crash."""
    with open_regular(path) as file:
        for number, line in enumerate(file, start=1):
            if line.count(b"[") + line.count(b"{") > _SUSPICIOUS:
                name = f"{path}, line {number},"
                check_depth(parse_json(line, name), _DEEPEST, name)


def load_folder(folder: Path, files: DataFolder) -> tuple[dict[str, Part], list[str]]:
    """Split's word -> its rows, and what was passed over: files without images or boxes.

    The split of a file is told by its name, or by the nearest of its folders that tells one; else it is train.

    Raises:
        ValueError: no file has images and boxes, or files of two kinds have those of one split.
    """
    _check_card(folder)
    groups: dict[tuple, list[Path]] = {}
    paths = list(files.files(folder, set(FILE_KINDS)))
    names = SplitNames(folder, paths, files_tell=True)
    for path in paths:
        groups.setdefault((names.of_file(path) or "train", *_kind(path)), []).append(path)
    parts: dict[str, Part] = {}
    first: dict[str, tuple[Path, Layout]] = {}
    passed_over, reasons = [], []
    for (word, *_), paths in groups.items():
        rows = load_files(paths)
        try:
            layout, _ = find_layout(rows, str(paths[0]))
        except ValueError as error:
            passed_over.append(paths[0])
            reasons.append(error)
            continue
        if dtype_name(rows.features[layout.image]) == "string":
            rows = _from_folder(rows, layout.image, paths[0].parent.relative_to(folder).as_posix())
        if word in parts:
            first_path, first_layout = first[word]
            needed = [column for column in layout if column in rows.column_names]
            joined = join_rows(parts[word].rows, rows, needed) if layout == first_layout else None
            if joined is None:
                raise ValueError(
                    f"{first_path} and {paths[0]} both have {word} data, with images, boxes or classes in different columns or of "
                    "different types; give the path of one of them."
                )
            rows = joined
        parts[word] = Part(rows, folder.absolute())
        first.setdefault(word, (paths[0], layout))
    if not parts:
        raise reasons[0]
    notes = [f"{path} has no images with boxes, and is passed over." for path in passed_over[:8]]
    notes += [f"So are {len(passed_over) - 8} other files."] if len(passed_over) > 8 else []
    return parts, notes + names.notes()


def _kind(path: Path) -> tuple:
    """What files must share to be read together: kind, columns, and for lists of images their folder."""
    kind = FILE_KINDS[path.suffix.lower()]
    try:
        if kind == "parquet":
            columns = pq.read_schema(path).names
        elif kind == "arrow":
            with open_regular(path) as file:
                try:
                    columns = pa.ipc.open_stream(file).schema.names
                except pa.ArrowInvalid:
                    file.seek(0)
                    columns = pa.ipc.open_file(file).schema.names
        else:
            with open_regular(path) as file:
                line = parse_json(file.readline(2**26) or b"{}", f"{path}, line 1,")
            columns = list(line) if isinstance(line, dict) else []
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as a data set, {type(error).__name__}: {one_line(error)}") from error
    return kind, tuple(sorted(columns)), path.parent


def _from_folder(rows: Dataset, column: str, prefix: str) -> Dataset:
    """With paths of images from the data set's folder instead of from that of their list."""
    if prefix == ".":
        return rows
    names = [f"{prefix}/{name}" if name and not Path(name).is_absolute() else name for name in rows[column][:]]
    return rows.remove_columns(column).add_column(column, names)


def _check_card(folder: Path) -> None:
    """Raises ValueError where the card of a data set tells several configurations: they may have one split each."""
    path = folder / "README.md"
    if not path.is_file():
        return
    try:
        text = read_bytes(path, LARGEST_YAML).decode("utf-8", "replace")
        head = text.split("---", 2)[1] if text.startswith("---") else ""
        card = parse_yaml(head, str(path))
    except (ValueError, OSError, IndexError):
        return  # it is for people, and its data can be read without it
    configurations = card.get("configs") if isinstance(card, dict) else None
    if not isinstance(configurations, list):
        return
    names = {
        one.get("config_name")
        for one in configurations
        if isinstance(one, dict) and isinstance(one.get("config_name"), str)
    }
    if len(names) > 1:
        raise ValueError(
            f"{folder} has several configurations by its README.md: {short_repr(sorted(names))}; "
            "give the folder or file of one of them."
        )
