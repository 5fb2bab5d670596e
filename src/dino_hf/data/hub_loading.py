"""From the forms in which `datasets` has data to `Dataset`s, one for each split. Nothing of a data set is ever run."""

import atexit
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import datasets
import PIL.Image
from datasets import Dataset, DatasetDict, IterableDataset

from .hub_access import reach_hub
from .raw import split_in

FILE_KINDS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json"}


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` wrote it."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def load_datasets(source) -> tuple[Path | str, dict[str, Dataset]]:
    """Where the data are from, and the split's own word -> rows.

    Raises:
        ValueError, OSError: it is nothing that can be loaded.
    """
    origin = source if isinstance(source, str | Path) else type(source).__name__
    if isinstance(source, str | Path):
        source = _load_from_files(Path(source)) if Path(source).exists() else _load_from_hub(str(source))
    if isinstance(source, Dataset | IterableDataset):
        source = {split_in(str(source.split)) or "train": source}  # of "train[:80%]" too
    values = list(source.values()) if isinstance(source, dict) else []
    if not values or not all(isinstance(value, Dataset | IterableDataset) for value in values):
        kind = " of ".join(dict.fromkeys(type(value).__name__ for value in (source, *values)))
        raise ValueError(
            f"The data are of type {kind}; give a path, an id of the Hub, or a Dataset or DatasetDict of the library datasets."
        )
    parts = {}
    for word, dataset in source.items():
        parts[str(word)] = _drain(dataset) if isinstance(dataset, IterableDataset) else dataset.with_format(None)
    return origin, parts


def _load_from_files(path: Path) -> Dataset | DatasetDict:
    if path.is_dir() and is_saved_dataset(path):
        return datasets.load_from_disk(str(path))
    try:
        if path.is_dir():
            return datasets.load_dataset(str(path))
        data = datasets.load_dataset(FILE_KINDS[path.suffix.lower()], data_files=str(path), split="train")
    except Exception as error:  # of many libraries
        raise ValueError(f"{path} cannot be read as a data set, {type(error).__name__}: {_one_line(error)}") from error
    return DatasetDict({split_in(path.stem) or "train": data})


def _load_from_hub(name: str) -> DatasetDict:
    try:
        reach_hub(name, is_dataset=True)
        return datasets.load_dataset(name)
    except (
        Exception
    ) as error:  # of several libraries, for a name that is none, a network that is not there, a choice to be made
        raise OSError(
            f"There is no file or folder {name}, and as a data set of the Hub it cannot be loaded, {type(error).__name__}: "
            f"{_one_line(error)} Correct the path or id, or load it with datasets.load_dataset and pass the result."
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") + "."


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


def _drain(stream: IterableDataset) -> Dataset:
    """A stream as Arrow files, its images as the bytes that they come in, if it says what are images: after a `map` it does not."""
    if stream.features is not None:
        stream = stream.decode(False)
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix="stream-", dir=cache)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Dataset.from_generator(_Rows(stream), features=stream.features, cache_dir=folder)
