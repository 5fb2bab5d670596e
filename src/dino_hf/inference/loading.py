"""Load detectors and image processors: from folders, by names of published checkpoints, and from the Hub.

Each error is one sentence with the reason.
"""

import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

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

from ..common.hub_access import reach_hub
from ..common.paths import expand_home
from ..common.regular_files import check_model_folder
from ..common.text import first_line
from ..conversion.by_name import fetch
from ..conversion.published import find_published, lookup_published, similar_titles

# Errors that damaged files raise: in json, in settings, in the shapes or the format of weights.
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


def from_published(name: str | Path, mirror: str | None = None) -> tuple[PreTrainedModel, Any]:
    """Load a published checkpoint of DINO by its name. The first call downloads and converts it into the cache.

        model, image_processor = dino_hf.from_published("detrex/dino_r50_4scale_12ep")

    `dino-hf models` lists the names.

    Args:
        name: PROJECT/NAME.
        mirror: address of a folder that has the file as PROJECT/FILE. None: the environment variable DINO_HF_MIRROR, or else the
            addresses of the project.
    Returns:
        the model in evaluation mode, in float32 on the CPU, and its image processor.
    Raises:
        ValueError: there is no published checkpoint of this name, its backbone is not supported, or the file is not this
            checkpoint.
        OSError: the file cannot be downloaded or written. The message tells how to download it by hand.
    """
    name = _title(name)
    folder = fetch(name, mirror)
    return _with_title(load_detector(folder), name).eval(), load_image_processor(folder)


def pipeline(model: str | Path, **settings):
    """The pipeline "object-detection" of transformers with a detector and its image processor.

        detector = dino_hf.pipeline("mmdet/dino-4scale_r50_8xb2-12e_coco")
        detector("street.jpg", threshold=0.4)

    Args:
        model: folder, name of a published checkpoint, or id on the Hub.
        settings: arguments of `transformers.pipeline`, such as `device`.
    Raises:
        ValueError, OSError: see `load_detector`.
    """
    from transformers import pipeline as make_pipeline

    settings = {"model": load_detector(model), **settings}
    if "image_processor" not in settings:
        settings["image_processor"] = load_image_processor(model)
    return make_pipeline("object-detection", **settings)


def load_detector(source: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a detector with `AutoModelForObjectDetection`, on the CPU. Code in the repository is never run.

    Args:
        source: see `find_model`.
    Raises:
        FileNotFoundError: the folder or repository does not exist.
        ValueError: the model is not a detector, its files are damaged, or weights are missing.
    """
    title = _title(source) if _is_published(source) else None
    source = find_model(source)
    config = _load(AutoConfig, source, CONFIG_NAME)
    if config.model_type not in MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES:
        raise ValueError(f"{source} is a model of type {config.model_type!r}, which is not an object detector.")
    model, loading = _load(
        AutoModelForObjectDetection, source, "model.safetensors", config=config, dtype=dtype, output_loading_info=True
    )
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"{source} lacks weights of the detector: {len(missing)} are missing, the first is {missing[0]}; save the whole "
            "detector with save_pretrained."
        )
    return _with_title(model, title) if title else model


def load_image_processor(source: str | Path):
    """Load the image processor that was saved beside a model.

    Raises:
        FileNotFoundError: the folder or repository does not exist, or has no image processor.
        ValueError: the file is damaged, or the image processor is not made for detectors.
    """
    source = find_model(source)
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME)):
        raise FileNotFoundError(
            f"{source} has no {IMAGE_PROCESSOR_NAME}; save the image processor beside the model, with its save_pretrained."
        )
    processor = _load(AutoImageProcessor, source, IMAGE_PROCESSOR_NAME)
    if not hasattr(processor, "post_process_object_detection"):
        raise ValueError(f"{source} has a {type(processor).__name__}, which is not an image processor of a detector.")
    return processor


def _with_title(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Record a published checkpoint as the source of a model, instead of a folder in the cache."""
    model.name_or_path = model.config._name_or_path = find_published(name).title
    return model


def _title(source: str | Path) -> str:
    """A source as a name of a published checkpoint, which has a "/" on all systems."""
    return source.as_posix() if isinstance(source, Path) else source


def _is_published(source: str | Path) -> bool:
    """Whether a text is the name of a published checkpoint, and not of an existing file or folder."""
    return lookup_published(_title(source)) is not None and not Path(source).exists()


def fetch_published(source: str | Path) -> str | Path:
    """The folder of a published checkpoint, if `source` is the name of one. Other sources are returned unchanged."""
    return fetch(_title(source)) if _is_published(source) else source


def find_model(source: str | Path) -> str:
    """Find a model: first a folder, then the name of a published checkpoint, then an id on the Hub.

    A published checkpoint is downloaded and converted if it is not in the cache.

    Returns:
        an existing folder, or a text that may be an id on the Hub: "name" or "owner/name".
    Raises:
        FileNotFoundError, ValueError: the source is none of these.
        OSError: a published checkpoint cannot be downloaded or written.
    """
    folder = expand_home(fetch_published(source))
    if folder.is_dir():
        if not (folder / CONFIG_NAME).is_file():
            newest = get_last_checkpoint(folder)
            cure = f"; it has a checkpoint: {newest}" if newest else "; give the folder that save_pretrained wrote"
            raise FileNotFoundError(f"{source} is not a model: it has no {CONFIG_NAME}{cure}.")
        check_model_folder(folder)
        return str(folder)
    text = str(source)
    if folder.exists():
        raise ValueError(f"{source} is a file; give its folder.")
    if (isinstance(source, Path) and source.parts[:-2]) or text.startswith((".", "~", os.sep)) or text.count("/") > 1:
        raise FileNotFoundError(
            f"There is no folder {source}; give the folder of a model, or an id on the Hub.{similar_names(source)}"
        )
    return text


def similar_names(name: str | Path) -> str:
    """A sentence with names of published checkpoints that resemble a wrong name."""
    titles = similar_titles(str(name))
    return f" Published checkpoints have similar names: {', '.join(titles)}." if titles else ""


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
                    f"{source} has a configuration but no weights; train it first with dino-hf train DATASET --model {source}."
                ) from error
            raise FileNotFoundError(f"{source} has no readable {file}: {_reason(error)}") from error
        raise FileNotFoundError(
            f"There is no folder {source}, and the Hub gives no model of that name ({_reason(error)}).{similar_names(source)}"
        ) from error
    except UnpicklingError as error:  # its own message advises to load the file without checks
        raise ValueError(
            f"{source} has weights in a pickle that is damaged or would run code; code in weights is never run. Use a model that "
            "was saved as model.safetensors."
        ) from error
    except _DAMAGES as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{source} has a model type that this version of transformers does not have, and code in a model's repository is "
                "never run; use a newer version, or another model."
            ) from error
        raise ValueError(f"{source} cannot be loaded; its {file} may be damaged: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Type and first line of an error."""
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__  # the cause describes the wrong setting; the error only names a function
    return f"{type(error).__name__}, {first_line(error)}"


def read_device(device: str | torch.device | None) -> torch.device:
    """The device of a name. None: CUDA if it is available, else Apple's GPU, else the CPU.

    Raises:
        ValueError: there is no device of this name, or it cannot be used.
    """
    if device is None:
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    cure = "or leave it out to choose the fastest device"
    try:
        device = torch.device(device)
    except RuntimeError as error:  # its own message lists about 20 types of devices
        raise ValueError(
            f"device={str(device)!r} cannot be used here: no device has that name; use 'cuda', 'cuda:1', 'mps' or 'cpu', {cure}."
        ) from error
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={str(device)!r} cannot be used here: {_reason(error)}; use 'cpu', {cure}.") from error
    return device


def read_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The floating-point dtype of a name of `DTYPES`. A dtype or None is returned unchanged."""
    found = DTYPES.get(dtype, dtype)
    if found is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}.")
    return found
