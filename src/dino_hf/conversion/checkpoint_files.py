"""Read and write checkpoint files of other projects. Code in a file is never run."""

import argparse
import pickle
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..common.output_folders import replace_file
from ..common.text import first_line
from .errors import ConversionError
from .file_checks import check_pickle_file, check_safetensors_file
from .saved_settings import settings_of


@dataclass
class Checkpoint:
    """Content of a checkpoint file.

    Attributes:
        tensors: by the project's names, without prefixes of wrappers.
        settings: settings of the training: `args` of the release, or the configuration in mmdetection's `meta`.
        class_names: names of the classes, if the file has them.
        note: which of the raw and the averaged weights `tensors` are, if there is a choice.
    """

    path: Path
    tensors: dict[str, Tensor]
    settings: dict = field(default_factory=dict)
    class_names: list[str] | None = None
    note: str = ""


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


def load_checkpoint(path: Path, ema: bool = False, prefer_ema: bool = False) -> Checkpoint:
    """Read a `.pth` or `.safetensors` file of any project.

    The only class that is created is `argparse.Namespace`. Other objects that trainings are known to save become placeholders.
    Everything unknown is refused.

    Args:
        ema: read the averaged weights.
        prefer_ema: read the averaged weights if the file has them beside others.
    Raises:
        ConversionError: the file is missing, damaged, not a checkpoint, or may contain code.
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
    settings, class_names = settings_of(content, path)
    average = next((name for name in _AVERAGES if name in content), None)
    is_average = ema or (prefer_ema and average is not None)
    tensors = _tensors_of(content, is_average, path)
    for name, value in tensors.items():
        _check_tensor(name, value)
    return Checkpoint(path, tensors, settings, class_names, _note_on_average(average, is_average, ema, prefer_ema))


def _note_on_average(average: str | None, is_average: bool, ema: bool, prefer_ema: bool) -> str:
    """Say which weights were read. `average` is the name of the averaged weights in the file, if it has them."""
    if is_average and not ema:
        return f"the averaged weights ({average!r}) are converted, because the published AP was measured with them"
    if average is not None and not is_average:
        return f"the raw weights are converted; the file also has averaged weights ({average!r}), which --ema converts"
    if prefer_ema and average is None:
        return (
            "the file has one set of weights, which is converted; the published AP was measured with averaged weights"
        )
    return ""


def _is_safetensors(path: Path) -> bool:
    """Whether a file starts as safetensors files do: with the length of a json header, then the header."""
    with path.open("rb") as file:
        beginning = file.read(9)
    of_torch = beginning.startswith((b"PK", b"\x80\x02"))  # an archive, or the pickle of older files
    return beginning[8:] == b"{" or (path.suffix.lower() == ".safetensors" and not of_torch)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        check_safetensors_file(path)
        return safetensors.torch.load_file(path)
    except ConversionError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise ConversionError(f"{path} is truncated or damaged ({str(error)[:200]}). Download it again.") from error


def _read_pickle(path: Path):
    check_pickle_file(path)
    allowed = [argparse.Namespace, *((UnreadObject, name) for name in _HARMLESS)]
    try:
        # an open file, because torch would choose the format by the suffix of a path
        with torch.serialization.safe_globals(allowed), path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or forged file can raise errors of any type
        if not isinstance(error, pickle.UnpicklingError):
            raise ConversionError(
                f"{path} is truncated or damaged ({first_line(error, 200)}). Download it again."
            ) from error
        lines = str(error).splitlines()
        detail = next((line for line in lines if "GLOBAL" in line or "Unsupported" in line), first_line(error))
        raise ConversionError(
            f"{path} was refused, and nothing in it was run: it is not a PyTorch checkpoint, or it holds more than tensors, "
            f"plain values and argparse.Namespace ({detail.strip()[:200]}). Download it again, or ask its "
            "author for a file of tensors only."
        ) from error


def _plain(content: dict) -> dict:
    """Replace subclasses of dict by plain dictionaries at the depths that are read. A subclass may have methods of its own."""
    return {name: dict(dict.items(value)) if isinstance(value, dict) else value for name, value in dict.items(content)}


_CONTAINERS = ("model", "state_dict")
_AVERAGES = ("ema_model", "ema_state")  # the release, detrex
_MAX_TENSORS = 20_000  # of a model; the largest published DINO has 1,500
_WRAPPERS = re.compile(r"(?:module\.|_orig_mod\.)*")  # of distributed training and of torch.compile, in any order


def _tensors_of(content: dict, ema: bool, path: Path) -> dict[str, Tensor]:
    """Tensors of the model, or its averaged tensors, without prefixes of wrappers."""
    part = next((name for name in (_AVERAGES if ema else _CONTAINERS) if name in content), None)
    if ema and part is None and "ema_state_dict" in content:
        raise ConversionError(
            f"{path} was written by mmengine, which saves the averaged weights as 'state_dict'; leave --ema out."
        )
    if ema and part is None:
        raise ConversionError(
            f"{path} has no {' or '.join(map(repr, _AVERAGES))} (its parts: {sorted(map(str, content))[:10]}); leave --ema out."
        )
    tensors = (
        content[part] if part else {name: value for name, value in content.items() if name not in ("args", "meta")}
    )
    if not isinstance(tensors, dict):
        raise ConversionError(f"{path} has a {type(tensors).__name__} under {part!r}, not a dictionary of tensors.")
    if len(tensors) > _MAX_TENSORS:
        raise ConversionError(
            f"{path} has {len(tensors):,} tensors; at most {_MAX_TENSORS:,} are read, and a DINO has fewer than 2,000."
        )
    plain = {_WRAPPERS.sub("", str(name), count=1): value for name, value in tensors.items()}
    if len(plain) < len(tensors):
        raise ConversionError(
            f"{path} has tensors both with and without the prefix 'module.' or '_orig_mod.'; save all of them without it."
        )
    return plain


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGER_BUFFERS = ("relative_position_index", "num_batches_tracked")


def _check_tensor(name: str, value) -> None:
    """Check that a value can be a weight of a training.

    Raises:
        ConversionError: it cannot.
    """
    if not isinstance(value, Tensor):
        kind = "an object that is not read" if isinstance(value, UnreadObject) else f"a {type(value).__name__}"
        raise ConversionError(f"{name!r} is {kind}, where only tensors belong; save the file without it.")
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        raise ConversionError(f"{name!r} is a sparse, quantized or empty (meta) tensor; save the file with plain ones.")
    if value.dtype not in _FLOATS and not name.endswith(_INTEGER_BUFFERS):
        raise ConversionError(
            f"{name!r} has the type {value.dtype}, where weights are floating-point numbers of at least 16 bits."
        )
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ConversionError(
            f"{name!r} claims {value.numel()} numbers, but the file has fewer: it is damaged or forged."
        )
    if not value.isfinite().all():
        raise ConversionError(
            f"{name!r} has values that are NaN or infinite, so the training had diverged; choose an earlier checkpoint."
        )


def save_checkpoint(content: dict, path: Path, force: bool = False) -> None:
    """Write a checkpoint file completely or not at all.

    Raises:
        ConversionError: the file exists, or cannot be written.
    """
    if path.suffix == ".safetensors":
        raise ConversionError(f"{path}: the other projects read files of torch.save; name it .pth.")
    if path.is_symlink() or path.is_dir() or (path.exists() and not force):
        raise ConversionError(f"{path} exists; choose another output, or --force to replace a checkpoint.")
    if path.exists() and not _is_checkpoint(path):
        raise ConversionError(f"{path} is not a file of torch.save, so it is not replaced; choose another output.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as scratch, scratch.open("xb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError if the disk is full
        reason = error if isinstance(error, OSError) else "is the disk full?"
        raise ConversionError(f"{path} cannot be written ({reason}); choose another output.") from error


def _is_checkpoint(path: Path) -> bool:
    """Whether a file has the parts of a file of torch.save."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return False
