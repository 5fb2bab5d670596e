"""Load a Hugging Face data set as one `Dataset` for each split. Code of a data set is never run."""

import atexit
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import datasets
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, IterableDataset

from ..common import regular_files
from ..common.hub_access import reach_hub
from ..common.output_folders import new_scratch, remove_leftovers
from ..common.regular_files import (
    LARGEST_YAML,
    check_depth,
    is_regular,
    open_regular,
    parse_json,
    parse_yaml,
    read_bytes,
)
from ..common.text import abbreviate
from ..common.values import short_repr
from .file_names import SplitNames, split_in
from .files import DataFolder, is_saved_dataset
from .hub_layout import Layout, dtype_name, find_layout, join_rows

FILE_KINDS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json"}
_DEEPEST = 64  # levels of lists and objects in a line of a jsonl; pyarrow crashes at some thousand
_SUSPICIOUS = 256  # the depth of a line with more brackets is measured


class Part(NamedTuple):
    """Rows of one split."""

    rows: Dataset
    beside: Path | None = None  # folder that contains relative paths of images


def load_files(paths: list[Path]) -> Dataset:
    """Rows of parquet, arrow or jsonl files.

    Args:
        paths: files of one kind.
    Raises:
        ValueError: the files cannot be read.
    """
    kind = FILE_KINDS[paths[0].suffix.lower()]
    for path in paths if kind == "json" else ():
        _check_lines(path)
    try:
        return datasets.load_dataset(kind, data_files=[str(path) for path in paths], split="train")
    except Exception as error:  # the libraries have no common type of error
        text = _sentence(error)
        raise ValueError(f"{paths[0]} cannot be read as a data set, {type(error).__name__}: {text}") from error


def _sentence(error: Exception) -> str:
    return abbreviate(str(error), 300).rstrip(".…") + "."


def _check_lines(path: Path) -> None:
    """Raise ValueError for a line of json whose depth would crash the reader."""
    with open_regular(path) as file:
        for number, line in enumerate(file, start=1):
            if line.count(b"[") + line.count(b"{") > _SUSPICIOUS:
                name = f"{path}, line {number},"
                check_depth(parse_json(line, name), _DEEPEST, name)


def load_folder(folder: Path, files: DataFolder) -> tuple[dict[str, Part], list[str]]:
    """Map the word of each split to its rows. The notes name skipped files, which have no images or boxes.

    The split of a file is in its name, or in the name of the nearest folder. Without a split in these names, it is train.

    Raises:
        ValueError: no file has images and boxes, or files of one split have different columns.
    """
    _check_card(folder)
    groups: dict[tuple, list[Path]] = {}
    paths = list(files.files(folder, set(FILE_KINDS)))
    names = SplitNames(folder, paths, files_name_splits=True)
    for path in paths:
        groups.setdefault((names.split_of_file(path) or "train", *_kind(path)), []).append(path)
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
    notes = [f"{path} has no images with boxes, and is skipped." for path in passed_over[:8]]
    notes += [f"{len(passed_over) - 8} other files are skipped for the same reason."] if len(passed_over) > 8 else []
    return parts, notes + names.notes()


def _kind(path: Path) -> tuple:
    """Kind, columns and folder of a file. Files are read together if these are equal."""
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
        raise ValueError(f"{path} cannot be read as a data set, {type(error).__name__}: {_sentence(error)}") from error
    return kind, tuple(sorted(columns)), path.parent


def _from_folder(rows: Dataset, column: str, prefix: str) -> Dataset:
    """Make paths of images relative to the data set's folder instead of the folder of their list."""
    if prefix == ".":
        return rows
    names = [f"{prefix}/{name}" if name and not Path(name).is_absolute() else name for name in rows[column][:]]
    return rows.remove_columns(column).add_column(column, names)


def _check_card(folder: Path) -> None:
    """Raise ValueError if the card of a data set lists several configurations, because each may have the same splits."""
    path = folder / "README.md"
    if not path.is_file():
        return
    try:
        text = read_bytes(path, LARGEST_YAML).decode("utf-8", "replace")
        head = text.split("---", 2)[1] if text.startswith("---") else ""
        card = parse_yaml(head, str(path))
    except (ValueError, OSError, IndexError):
        return  # the card is for readers; the data can be loaded without it
    configurations = card.get("configs") if isinstance(card, dict) else None
    if not isinstance(configurations, list):
        return
    names = {
        configuration.get("config_name")
        for configuration in configurations
        if isinstance(configuration, dict) and isinstance(configuration.get("config_name"), str)
    }
    if len(names) > 1:
        raise ValueError(
            f"{folder} has several configurations by its README.md: {short_repr(sorted(names))}; "
            f"give the folder or file of one of them."
        )


def load_datasets(source, files: DataFolder | None = None) -> tuple[Path | str, dict[str, Part], list[str]]:
    """Load data of any form of the library `datasets`.

    Args:
        files: the folder or file of `source`. None: `source` is an object or an id on the Hub.
    Returns:
        the origin, a map from the word of each split to its rows, and notes for the user.
    Raises:
        ValueError, OSError: the data cannot be loaded.
    """
    origin, notes = source if isinstance(source, str | Path) else type(source).__name__, []
    if files is not None:
        path = Path(source)
        if path.is_dir() and not is_saved_dataset(path):
            return origin, *load_folder(path, files)
        source = (
            _load_saved(path, files)
            if path.is_dir()
            else {split_in(path.stem, at_end=True) or "train": load_files([path])}
        )
    elif isinstance(source, str | Path):
        source = _load_from_hub(str(source))
    if isinstance(source, Dataset | IterableDataset):
        source = {split_in(str(source.split), at_end=True) or "train": source}  # "train[:80%]" is train too
    values = list(source.values()) if isinstance(source, dict) else []
    if not values or not all(isinstance(value, Dataset | IterableDataset) for value in values):
        kind = " of ".join(dict.fromkeys(type(value).__name__ for value in (source, *values)))
        raise ValueError(
            f"The data are of type {kind}; give a path, an id on the Hub, or a Dataset or DatasetDict of the library datasets."
        )
    beside = None if files is None else path.absolute() if path.is_dir() else path.absolute().parent
    parts = {}
    for word, dataset in source.items():
        rows = drain(dataset) if isinstance(dataset, IterableDataset) else dataset.with_format(None)
        parts[str(word)] = Part(rows, beside)
    return origin, parts, notes


def _load_saved(folder: Path, files: DataFolder) -> Dataset | DatasetDict:
    """Load a folder of `save_to_disk`. Its lists of files are checked first.

    Raises:
        ValueError: the lists are broken, or lead out of the folder.
    """
    folders = [folder]
    if is_regular(folder / "dataset_dict.json"):
        names = _listed(regular_files.read_json(folder / "dataset_dict.json"), "splits")
        if wrong := [name for name in names if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name)]:
            raise ValueError(
                f"{folder / 'dataset_dict.json'} names a split {short_repr(wrong[0])}, which is not the name of a folder."
            )
        folders = [folder / name for name in names]
    for place in folders:
        entries = _listed(regular_files.read_json(place / "state.json"), "_data_files")
        names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
        for name in [*names, "dataset_info.json"]:
            if not isinstance(name, str) or not files.is_file(place / name):
                raise ValueError(f"{place / 'state.json'} names {short_repr(name)}, which is not a file of {folder}.")
    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # the libraries have no common type of error
        raise ValueError(
            f"{folder} cannot be read as a data set, {type(error).__name__}: {_sentence(error)}"
        ) from error


def _listed(content, field: str) -> list:
    value = content.get(field) if isinstance(content, dict) else None
    return value if isinstance(value, list) else []


def _load_from_hub(name: str) -> DatasetDict:
    name, _, configuration = name.partition(":")
    try:
        reach_hub(name, is_dataset=True)
        return datasets.load_dataset(name, *filter(None, [configuration]))
    except Exception as error:  # an unknown name, no network, or several configurations, from several libraries
        if "Config name is missing" in str(error):
            choices = re.search(r"\[.*?\]", str(error))
            raise ValueError(
                f"{name} has several configurations: {choices[0][:300] if choices else 'see its page'}. Write one after a "
                f"colon, as in {name}:configuration."
            ) from error
        raise OSError(
            f"There is no file or folder {name}, and loading it as a data set of the Hub failed with {type(error).__name__}: "
            f"{_sentence(error)} Correct the path or id, or load it with datasets.load_dataset and pass the result."
        ) from error


class _Rows:
    """A generator function over a stream. Each has a new fingerprint, because the content of a stream may change."""

    def __init__(self, stream: IterableDataset):
        self.stream = stream

    def __call__(self) -> Iterator[dict]:
        for row in self.stream:
            # The copy of a decoded image has no format, so it is encoded without loss.
            yield {name: value.copy() if isinstance(value, PIL.Image.Image) else value for name, value in row.items()}

    def __reduce__(self):
        return str, (uuid.uuid4().hex,)


def drain(stream: IterableDataset) -> Dataset:
    """Write a stream to Arrow files. Images keep their bytes if the stream states their column; after `map` it does not."""
    if stream.features is not None:
        stream = stream.decode(False)
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    remove_leftovers(cache)  # files of processes that were killed
    folder = new_scratch(cache / "stream")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Dataset.from_generator(_Rows(stream), features=stream.features, cache_dir=str(folder))
