"""From the forms in which `datasets` has data to `Dataset`s, one for each split. Nothing of a data set is ever run."""

import atexit
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import datasets
import PIL.Image
from datasets import Dataset, DatasetDict, IterableDataset

from ..common import regular_files
from ..common.output_folders import new_scratch, remove_leftovers
from ..common.regular_files import is_regular
from ..common.values import short_repr
from .files import DataFolder
from .hub_access import reach_hub
from .hub_files import Part, load_files, load_folder, one_line
from .split_names import split_in


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` wrote it."""
    return is_regular(folder / "dataset_dict.json") or is_regular(folder / "state.json")


def load_datasets(source, files: DataFolder | None = None) -> tuple[Path | str, dict[str, Part], list[str]]:
    """Where the data are from, the split's own word -> its rows, and what was passed over.

    Args:
        files: of the folder or file that `source` is.
    Raises:
        ValueError, OSError: it is nothing that can be loaded.
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
        source = {split_in(str(source.split), at_end=True) or "train": source}  # of "train[:80%]" too
    values = list(source.values()) if isinstance(source, dict) else []
    if not values or not all(isinstance(value, Dataset | IterableDataset) for value in values):
        kind = " of ".join(dict.fromkeys(type(value).__name__ for value in (source, *values)))
        raise ValueError(
            f"The data are of type {kind}; give a path, an id of the Hub, or a Dataset or DatasetDict of the library datasets."
        )
    beside = None if files is None else path.absolute() if path.is_dir() else path.absolute().parent
    parts = {}
    for word, dataset in source.items():
        rows = drain(dataset) if isinstance(dataset, IterableDataset) else dataset.with_format(None)
        parts[str(word)] = Part(rows, beside)
    return origin, parts, notes


def _load_saved(folder: Path, files: DataFolder) -> Dataset | DatasetDict:
    """What `save_to_disk` wrote, after its own lists of files were checked.

    Raises:
        ValueError: they lead elsewhere, or are broken.
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
    except Exception as error:  # of many libraries
        raise ValueError(f"{folder} cannot be read as a data set, {type(error).__name__}: {one_line(error)}") from error


def _listed(content, field: str) -> list:
    value = content.get(field) if isinstance(content, dict) else None
    return value if isinstance(value, list) else []


def _load_from_hub(name: str) -> DatasetDict:
    name, _, configuration = name.partition(":")
    try:
        reach_hub(name, is_dataset=True)
        return datasets.load_dataset(name, *filter(None, [configuration]))
    except (
        Exception
    ) as error:  # of several libraries, for a name that is none, a network that is not there, a choice to be made
        if "Config name is missing" in str(error):
            choices = re.search(r"\[.*?\]", str(error))
            raise ValueError(
                f"{name} has several configurations: {choices[0][:300] if choices else 'see its page'}. Name one of them behind a "
                f"colon, as in {name}:configuration."
            ) from error
        raise OSError(
            f"There is no file or folder {name}, and as a data set of the Hub it cannot be loaded, {type(error).__name__}: "
            f"{one_line(error)} Correct the path or id, or load it with datasets.load_dataset and pass the result."
        ) from error


class _Rows:
    """A generator function over a stream, with a fingerprint of its own: what a stream yields may change."""

    def __init__(self, stream: IterableDataset):
        self.stream = stream

    def __call__(self) -> Iterator[dict]:
        for row in self.stream:
            # of images that were decoded a copy, which knows no format, is encoded without loss
            yield {name: value.copy() if isinstance(value, PIL.Image.Image) else value for name, value in row.items()}

    def __reduce__(self):
        return str, (uuid.uuid4().hex,)


def drain(stream: IterableDataset) -> Dataset:
    """A stream as Arrow files, its images as the bytes that they come in, if it says what are images: after a `map` it does not."""
    if stream.features is not None:
        stream = stream.decode(False)
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    remove_leftovers(cache)  # a killed process may have left gigabytes
    folder = new_scratch(cache / "stream")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Dataset.from_generator(_Rows(stream), features=stream.features, cache_dir=str(folder))
