"""Detectors and image processors from folders and the Hub; what cannot be loaded is said in one sentence."""

import os
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

from ..common.paths import expand_home
from ..common.regular_files import check_model_folder
from ..data.hub_access import reach_hub

# Of json, checks of settings, shapes of weights, their formats.
_DAMAGES = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    EOFError,
    SafetensorError,
    StrictDataclassError,
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_detector(source: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """What `AutoModelForObjectDetection` loads, on the CPU; without code from the repository, and with every weight.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is no detector, its files are broken, or some of its weights are missing.
    """
    source = _find(source)
    config = _load(AutoConfig, source, CONFIG_NAME)
    if config.model_type not in MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES:
        raise ValueError(f"{source} is a model of type {config.model_type!r}, which is no object detector.")
    model, loading = _load(
        AutoModelForObjectDetection, source, "model.safetensors", config=config, dtype=dtype, output_loading_info=True
    )
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"{source} has no object detector's weights, or not all: {len(missing)} are missing, the first is {missing[0]}; save "
            "the whole detector with save_pretrained."
        )
    return model


def load_image_processor(source: str | Path):
    """The image processor that was saved beside a model.

    Raises:
        FileNotFoundError: there is no such folder, or no image processor in it.
        ValueError: its file is broken, or it is none of a detector.
    """
    source = _find(source)
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME)):
        raise FileNotFoundError(
            f"{source} has no {IMAGE_PROCESSOR_NAME}; save the image processor beside the model, with its save_pretrained."
        )
    processor = _load(AutoImageProcessor, source, IMAGE_PROCESSOR_NAME)
    if not hasattr(processor, "post_process_object_detection"):
        raise ValueError(f"{source} has a {type(processor).__name__}, which is no image processor of a detector.")
    return processor


def _find(source: str | Path) -> str:
    """A folder that exists, or what may be an id on the Hub: "name" or "owner/name"."""
    folder = expand_home(source)
    if folder.is_dir():
        if not (folder / CONFIG_NAME).is_file():
            newest = get_last_checkpoint(folder)
            cure = f"; a checkpoint lies in it: {newest}" if newest else "; give the folder that save_pretrained wrote"
            raise FileNotFoundError(f"{source} is no model: it has no {CONFIG_NAME}{cure}.")
        check_model_folder(folder)
        return str(folder)
    text = str(source)
    if folder.exists():
        raise ValueError(f"{source} is a file; give the folder that it lies in.")
    if (isinstance(source, Path) and source.parts[:-2]) or text.startswith((".", "~", os.sep)) or text.count("/") > 1:
        raise FileNotFoundError(f"There is no folder {source}; give that of a model, or an id on the Hub.")
    return text


def _has_weights(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors*", "*.bin*"))


def _load(auto_class, source: str, file: str, **settings):
    try:
        if not Path(source).is_dir():
            reach_hub(source)
        return auto_class.from_pretrained(source, trust_remote_code=False, **settings)
    except ImportError:
        raise
    except OSError as error:
        if Path(source).is_dir():
            if file != IMAGE_PROCESSOR_NAME and not _has_weights(Path(source)):
                raise FileNotFoundError(
                    f"{source} has a configuration and no weights: train it first, with dino-hf train DATASET --model {source}."
                ) from error
            raise FileNotFoundError(f"{source} has no {file} that can be read: {_first_line(error)}") from error
        raise FileNotFoundError(
            f"There is no folder {source}, and no model of that name that the Hub gives: {_first_line(error)}"
        ) from error
    except UnpicklingError as error:  # its own text advises to load the file all the same
        raise ValueError(
            f"{source} has weights in a pickle that is damaged or would run code, which is never done; give a model that was saved "
            "as model.safetensors."
        ) from error
    except _DAMAGES as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{source} is of a type that this version of transformers has not, and code that comes with a model is never run; "
                "use a newer version, or another model."
            ) from error
        raise ValueError(f"{source} cannot be loaded, its {file} may be damaged: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__  # what is wrong with a setting; the error itself names the function that found it
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}, {lines[0] if lines else 'without a message'}"


def read_device(device: str | torch.device | None) -> torch.device:
    """None: CUDA if there is one, else Apple's GPU, else the CPU."""
    if device is None:
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    cure = "or leave it out for the best there is"
    try:
        device = torch.device(device)
    except RuntimeError as error:  # its message lists some 20 types of devices
        raise ValueError(
            f"device={str(device)!r} cannot be used here: no device has that name; use 'cuda', 'cuda:1', 'mps' or 'cpu', {cure}."
        ) from error
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device={str(device)!r} cannot be used here: {_first_line(error)}; use 'cpu', {cure}."
        ) from error
    return device


def read_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    found = DTYPES.get(dtype, dtype)
    if found is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}.")
    return found
