"""The output folder of a conversion. It is written completely or not at all, and replaces only a model."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..common.output_folders import replace_folder
from ..model.configuration_dino_detr import DinoDetrConfig
from ..model.sharing import shipped_files
from ..runtime.model_card import is_ours, read_card
from .errors import ConversionError

_MODEL_FILES = {"config.json", "preprocessor_config.json", "model.safetensors", "model.safetensors.index.json"}


def check_output(folder: Path, force: bool, inputs: list[Path]) -> None:
    """Check that a folder can be written or replaced.

    Args:
        inputs: input files. They must not lie in the replaced folder.
    Raises:
        ConversionError: files would be lost, or the folder is a link.
    """
    if folder.is_symlink():
        raise ConversionError(f"{folder} is a symbolic link; name the folder itself, or another output.")
    if not folder.exists():
        return
    here = folder.resolve()
    if not folder.is_dir() or here == Path.cwd() or here in Path.cwd().parents:
        raise ConversionError(f"{folder} is a file, or the current folder or a folder above it; choose another output.")
    if inside := [path for path in inputs if here in path.resolve().parents]:
        raise ConversionError(f"{inside[0]} lies in {folder} and would be replaced; choose another output.")
    entries = list(folder.iterdir())
    if not entries:
        return
    if not force:
        raise ConversionError(f"{folder} is not empty; choose another output, or --force to replace the model in it.")
    config = _config_of(folder)
    if config.get("model_type") != DinoDetrConfig.model_type:
        raise ConversionError(
            f"{folder} does not hold a model of dino_hf, so it is not replaced; choose another output."
        )
    if others := sorted(entry.name for entry in entries if not _is_of_a_model(entry, config)):
        raise ConversionError(f"{folder} holds {others[:5]}, which would be lost; move them, or choose another output.")


def _config_of(folder: Path) -> dict:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _is_of_a_model(entry: Path, config: dict) -> bool:
    """Whether a file was written by saving a model. An edited model card does not count."""
    if entry.is_symlink() or not entry.is_file():
        return False
    name = entry.name
    if name == "README.md":
        return is_ours(read_card(entry.parent) or "")
    if name.endswith(".py"):  # saved with the model, if the model says so
        backbone = config.get("backbone_config")
        backbone_type = backbone.get("model_type") if isinstance(backbone, dict) else None
        return "auto_map" in config and name in {file.name for file in shipped_files(backbone_type)}
    return name in _MODEL_FILES or (name.startswith("model-") and name.endswith(".safetensors"))


@contextmanager
def scratch_beside(folder: Path, force: bool, inputs: list[Path]) -> Iterator[Path]:
    """Yield a hidden folder. At the end, it replaces `folder` in one step.

    Raises:
        ConversionError: `folder` cannot be written, or may not be replaced.
    """
    check_output(folder, force, inputs)
    try:
        with replace_folder(folder) as scratch:
            yield scratch
            check_output(folder, force, inputs)  # the folder may have changed meanwhile
    except (OSError, SafetensorError) as error:
        raise ConversionError(f"{folder} cannot be written ({error}); choose another output.") from error
