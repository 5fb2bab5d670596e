"""Read and write checkpoint files of other projects. Code in a file is never run."""

import argparse
import ast
import hashlib
import pickle
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..common.output_folders import write_beside
from .plain_values import MOST_PARTS, TooLarge, check_pickle, plain_value


class ConversionError(ValueError):
    """A file or folder cannot be converted. The message says why and what to do."""


@dataclass
class Checkpoint:
    """Content of a checkpoint file: tensors by name, without prefixes of wrappers, and settings of the training."""

    path: Path
    tensors: dict[str, Tensor]
    settings: dict = field(default_factory=dict)  # `args` of the release, or the configuration in mmdetection's `meta`
    class_names: list[str] | None = None  # mmdetection


class UnreadObject:
    """Placeholder for an object in a checkpoint that the conversion does not need. It ignores all data."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


# Objects that mmdetection saves in checkpoints: its log, and numbers and random states of NumPy.
_HARMLESS = [
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",  # the log refers to its methods with it
    *(
        f"numpy.{core}.multiarray.{name}"
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar", "_frombuffer")
    ),
    *(f"numpy.{name}" for name in ("ndarray", "dtype", "float64", "float32", "int64")),
    *(f"numpy.dtypes.{name}DType" for name in ("Float64", "Float32", "Int64", "UInt32", "Bool")),
]


def load_checkpoint(path: Path, ema: bool = False) -> Checkpoint:
    """Read a `.pth` or `.safetensors` of any of the three projects.

    The only class that is created is `argparse.Namespace`. Other objects that trainings are known to save become placeholders.
    Everything unknown is refused.

    Args:
        ema: take the averaged weights.
    Raises:
        ConversionError: the file is missing, damaged, no checkpoint, or may hold code.
    """
    if path.is_dir():
        raise ConversionError(f"{path} is a folder; name the checkpoint file in it.")
    if not path.is_file():
        raise ConversionError(f"There is no file {path}.")
    content = _read_safetensors(path) if _is_safetensors(path) else _read_pickle(path)
    if not isinstance(content, dict):
        raise ConversionError(
            f"{path} holds a {type(content).__name__}, not a dictionary with 'model' or 'state_dict'."
        )
    if not content:
        raise ConversionError(f"{path} holds nothing.")
    content = _plain(content)
    settings, class_names = _training_of(content, path)
    tensors = _tensors_of(content, ema, path)
    for name, value in tensors.items():
        _check_tensor(name, value)
    return Checkpoint(path, tensors, settings, class_names)


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Files without an archive start with pickles of: magic number, version, machine, content. The keys of storages follow.
_LEGACY_PICKLES = 4
_COUNTERS = ("relative_position_index", "num_batches_tracked")  # buffers of integers


def _check_tensor(name: str, value) -> None:
    """Check that a value can be a weight of a training.

    Raises:
        ConversionError: it cannot.
    """
    if not isinstance(value, Tensor):
        kind = "an object that is not read" if isinstance(value, UnreadObject) else f"a {type(value).__name__}"
        raise ConversionError(
            f"{name!r} is {kind}, where only tensors belong; if it is no weight, save the file without it."
        )
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        raise ConversionError(f"{name!r} is a sparse, quantized or empty (meta) tensor; save the file with plain ones.")
    if value.dtype not in _FLOATS and not name.endswith(_COUNTERS):
        raise ConversionError(
            f"{name!r} is of {value.dtype}, where weights are floating-point numbers of 16 bits at least."
        )
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ConversionError(
            f"{name!r} claims {value.numel()} numbers, but the file has fewer: it is damaged or made up."
        )
    if not value.isfinite().all():
        raise ConversionError(
            f"{name!r} has values that are NaN or infinite: the training had diverged; take an earlier checkpoint."
        )


def _plain(content: dict) -> dict:
    """Replace subclasses of dict by plain dictionaries, at the depths that are read. Subclasses may have methods of their own."""
    return {name: dict(dict.items(value)) if isinstance(value, dict) else value for name, value in dict.items(content)}


def _is_safetensors(path: Path) -> bool:
    """Whether a file starts as safetensors files do: with the length of a json header, then the header."""
    with path.open("rb") as file:
        beginning = file.read(9)
    of_torch = beginning.startswith((b"PK", b"\x80\x02"))  # an archive, or the pickle of older files
    return beginning[8:] == b"{" or (path.suffix.lower() == ".safetensors" and not of_torch)


# Bytes of the table of contents of an archive, and of the header of safetensors. Ours have 2**18.
_LARGEST_DIRECTORY = 2**24


def _check_archive(path: Path) -> None:
    """Check the checksums of an archive.

    Raises:
        ConversionError: a part of the archive is damaged, or was not written by torch.
    """
    try:
        if (size := _directory_size(path)) > _LARGEST_DIRECTORY:
            raise ConversionError(
                f"{path} has a table of contents of {size:,} bytes, at most {_LARGEST_DIRECTORY:,} are read."
            )
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            if len(parts) > MOST_PARTS:
                raise ConversionError(
                    f"{path} has {len(parts):,} tensors; a training checkpoint of DINO has fewer than 10,000."
                )
            # parts that lie over each other would be read again and again
            if sum(entry.file_size for entry in parts) > path.stat().st_size:
                raise ConversionError(f"{path} claims to hold more bytes than it has: it is damaged or made up.")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in parts):
                raise ConversionError(f"{path} has compressed parts, which torch never writes; save it by torch.save.")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(f"{path} is truncated or damaged ({error}). Download it again.") from error
    if damaged is not None:
        raise ConversionError(
            f"{path} is truncated or damaged (the checksum of {damaged} is wrong). Download it again."
        )


def _directory_size(path: Path) -> int:
    """Bytes from the beginning of the table of contents of an archive to its end, 0 if it has none.

    `zipfile` reads the table wholly when it opens an archive, however long it is.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        start = file.seek(max(0, size - 2**16 - 22))  # a comment has 2**16 bytes at most
        end = file.read()
        position = end.rfind(b"PK\5\6")
        if position < 0 or len(end) < position + 22:
            return 0
        length = int.from_bytes(end[position + 12 : position + 16], "little")
        if end[position - 20 : position - 16] == b"PK\6\7":  # 64 bit: the true length is in the record before
            file.seek(max(0, start + position - 20 - 56))
            record = file.read(56)
            length = int.from_bytes(record[40:48], "little") if record.startswith(b"PK\6\6") else length
    return length


def _check_pickles(path: Path) -> None:
    """Check the pickles in a file before they are read.

    Raises:
        ConversionError: the file is damaged, or reading it would take too much time or memory.
    """
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path)
            with zipfile.ZipFile(path) as archive:
                pickles = [entry for entry in archive.infolist() if entry.filename.endswith("data.pkl")]
                if len(pickles) > 1:
                    raise ConversionError(f"{path} has {len(pickles):,} parts data.pkl, where torch writes one.")
                for entry in pickles:
                    with archive.open(entry) as stream:
                        check_pickle(stream)
        else:
            with path.open("rb") as stream:
                if stream.peek(2).startswith(b"\x80"):  # else the reader refuses it at its first byte
                    contents = [check_pickle(stream) for _ in range(_LEGACY_PICKLES)]
                    _check_storages(contents[-1].storages, check_pickle(stream).texts, path)
    except ConversionError:
        raise
    except TooLarge as error:
        raise ConversionError(f"{path} was refused, and nothing in it was run: {error}.") from error
    except (ValueError, LookupError, OSError, EOFError, zipfile.BadZipFile, MemoryError) as error:
        raise ConversionError(
            f"{path} is truncated or damaged ({(str(error) or type(error).__name__).splitlines()[0][:200]}). Download it again."
        ) from error


def _check_storages(sizes: dict[str, int], keys: set[str], path: Path) -> None:
    """Torch sets memory aside for all numbers that a file without an archive claims, and fills it for keys that it lists.

    Raises:
        ConversionError: the file has fewer numbers than its tensors, which would hold whatever was in memory.
    """
    if missing := sorted(set(sizes) - keys):
        raise ConversionError(f"{path} has no numbers for {len(missing):,} of its tensors: it is damaged or made up.")
    if (claimed := sum(sizes.values())) > path.stat().st_size:  # a number has one byte at least
        raise ConversionError(f"{path} claims {claimed:,} numbers, but has fewer bytes: it is damaged or made up.")


def _check_header(path: Path) -> None:
    """
    Raises:
        ConversionError: a file of safetensors has so many tensors that reading their names takes long.
        SafetensorError: it is damaged.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if _LARGEST_DIRECTORY < size <= path.stat().st_size:  # a larger one is damaged, which the reader says
        raise ConversionError(f"{path} has a header of {size:,} bytes; at most {_LARGEST_DIRECTORY:,} are read.")
    with safe_open(path, "pt") as file:
        if (count := len(file.keys())) > MOST_PARTS:
            raise ConversionError(f"{path} has {count:,} tensors; a training checkpoint of DINO has fewer than 10,000.")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        _check_header(path)
        return safetensors.torch.load_file(path)
    except ConversionError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise ConversionError(f"{path} is truncated or damaged ({str(error)[:200]}). Download it again.") from error


def _read_pickle(path: Path):
    _check_pickles(path)
    allowed = [argparse.Namespace, *((UnreadObject, name) for name in _HARMLESS)]
    try:
        # for a path, torch would trust the suffix
        with torch.serialization.safe_globals(allowed), path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or forged file can raise errors of any type
        reason = str(error).strip().splitlines() or [type(error).__name__]
        if not isinstance(error, pickle.UnpicklingError):
            raise ConversionError(f"{path} is truncated or damaged ({reason[0][:200]}). Download it again.") from error
        detail = next((line for line in reason if "GLOBAL" in line or "Unsupported" in line), reason[0])
        raise ConversionError(
            f"{path} was refused, and nothing in it was run: it is not a PyTorch checkpoint, or it holds more than tensors, "
            f"plain values and argparse.Namespace ({detail.strip()[:200]}). Download it again, or ask its "
            "author for a file of tensors only."
        ) from error


_CONTAINERS = ("model", "state_dict")
_MOST_CLASSES = 100_000
_MOST_TENSORS = 20_000  # the largest published DINO has 1,500
_LONGEST_CONFIG = 2**21  # characters
_WRAPPERS = re.compile(r"(?:module\.|_orig_mod\.)*")  # of distributed training and of torch.compile, in any order
_AVERAGES = ("ema_model", "ema_state")  # the release, detrex


def _tensors_of(content: dict, ema: bool, path: Path) -> dict[str, Tensor]:
    part = next((name for name in _CONTAINERS if name in content), None)
    if ema:
        part = next((name for name in _AVERAGES if name in content), None)
        if part is None and "ema_state_dict" in content:
            raise ConversionError(
                f"{path} is of mmengine, which already saves the averaged weights as 'state_dict'; leave --ema out."
            )
        if part is None:
            raise ConversionError(
                f"{path} has no {' or '.join(map(repr, _AVERAGES))} (its parts: {sorted(map(str, content))[:10]}); leave --ema out."
            )
    tensors = (
        content[part] if part else {name: value for name, value in content.items() if name not in ("args", "meta")}
    )
    if not isinstance(tensors, dict):
        raise ConversionError(f"{path} has a {type(tensors).__name__} under {part!r}, not a dictionary of tensors.")
    if len(tensors) > _MOST_TENSORS:
        raise ConversionError(
            f"{path} has {len(tensors):,} tensors; at most {_MOST_TENSORS:,} are read, and a DINO has fewer than 2,000."
        )
    plain = {_WRAPPERS.sub("", str(name), count=1): value for name, value in tensors.items()}
    if len(plain) < len(tensors):
        raise ConversionError(
            f"{path} has tensors both with and without the prefix 'module.' or '_orig_mod.'; save it with one of the two."
        )
    return plain


def _training_of(content: dict, path: Path) -> tuple[dict, list[str] | None]:
    """Settings of the training and names of the classes, if the file has them."""
    args, meta = content.get("args"), content.get("meta")
    if args is not None and not isinstance(args, argparse.Namespace | dict):
        raise ConversionError(f"{path} has a {type(args).__name__} under 'args', not the settings of a training.")
    if isinstance(meta, dict):
        names = meta.get("CLASSES")  # mmdetection 2
        if isinstance(of_data := meta.get("dataset_meta"), dict):
            of_data = dict(dict.items(of_data))
            names = of_data.get("classes", of_data.get("CLASSES", names))
        names = [names] if isinstance(names, str) else names
        is_list = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
        is_list = is_list and len(names) <= _MOST_CLASSES
        return read_config_text(meta.get("cfg", meta.get("config"))), list(names) if is_list else None
    settings = vars(args) if isinstance(args, argparse.Namespace) else dict.items(args or {})
    return {str(name): plain_value(value) for name, value in dict(settings).items()}, None


def read_config_text(text) -> dict:
    """Read settings from an mmengine configuration, which is Python: literals and calls of `dict` are read, nothing is run."""
    if not isinstance(text, str) or len(text) > _LONGEST_CONFIG:
        return {}
    try:
        statements = [statement for statement in ast.parse(text).body if isinstance(statement, ast.Assign)]
        return {
            statement.targets[0].id: _literal(statement.value)
            for statement in statements
            if isinstance(statement.targets[0], ast.Name)
        }
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}


def _literal(node: ast.expr):
    """Value of an expression of literals and `dict(...)`; None for any other."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {keyword.arg: _literal(keyword.value) for keyword in node.keywords if keyword.arg}
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {key.value: _literal(value) for key, value in pairs if isinstance(key, ast.Constant)}
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(element) for element in node.elts]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        return None


def save_checkpoint(content: dict, path: Path, force: bool = False) -> None:
    """Write a checkpoint file completely or not at all.

    Raises:
        ConversionError: the file exists, or cannot be written.
    """
    if path.suffix == ".safetensors":
        raise ConversionError(f"{path}: the other projects read files of torch.save; name it .pth.")
    if path.is_symlink() or path.is_dir() or (path.exists() and not force):
        raise ConversionError(f"{path} exists; choose another --output, or --force to replace a checkpoint.")
    if path.exists() and not _is_checkpoint(path):
        raise ConversionError(f"{path} is not a file of torch.save, so it is not replaced; choose another --output.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_beside(path) as scratch, scratch.open("xb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch's own, where a disk is full
        reason = error if isinstance(error, OSError) else "is the disk full?"
        raise ConversionError(f"{path} cannot be written ({reason}); choose another --output.") from error


def _is_checkpoint(path: Path) -> bool:
    """Whether a file has the parts of a file of torch.save."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return False


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
