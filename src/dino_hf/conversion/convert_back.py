"""Write a checkpoint file of another project from a dino_hf folder."""

from pathlib import Path

from torch import Tensor
from transformers import AutoConfig
from transformers.utils import IMAGE_PROCESSOR_NAME

from ..common.regular_files import check_model_folder
from ..common.text import first_line
from ..model.configuration_dino_detr import DinoDetrConfig
from ..model.image_processing_dino_detr import DinoDetrImageProcessor
from ..model.modeling_dino_detr import DinoDetrForObjectDetection
from .backbones import backbone_settings, unusual_settings
from .checkpoint_files import save_checkpoint
from .errors import ConversionError
from .projects.registry import find_project
from .release_names import rules_for
from .rules import UnknownName, translate_back


def convert_back(folder: Path, project: str, output: Path, force: bool = False) -> list[str]:
    """Write a checkpoint file.

    Args:
        project: name of the project that the file is for.
        force: replace an existing checkpoint file.
    Returns:
        settings that the other project's configuration needs, and notes for the user.
    Raises:
        ConversionError: the folder does not hold a DINO, or the other project cannot compute it.
    """
    target = find_project(project)
    if folder.resolve() in output.resolve().parents:
        raise ConversionError(f"{output} lies in {folder}, the model that is read; choose another output.")
    model = load_folder(folder)
    config = model.config
    processor = _load_processor(folder)
    target.check_expressible(config)
    try:
        tensors = to_release(model.state_dict(), config)
        _check_backbone(tensors, config)
        content = target.file_content(tensors, config)
    except UnknownName as error:
        raise ConversionError(f"{project} has no name for the tensor {error.name!r} of this model.") from error
    save_checkpoint(content, output, force)
    return [*target.settings_to_make(config), *(target.test_settings(processor) if processor else [])]


def _load_processor(folder: Path) -> DinoDetrImageProcessor | None:
    """The image processor in a folder; None if there is none.

    Raises:
        ConversionError: it cannot be loaded.
    """
    if not (folder / IMAGE_PROCESSOR_NAME).is_file():
        return None
    try:
        return DinoDetrImageProcessor.from_pretrained(folder)
    except Exception as error:  # the library raises errors of many types
        raise ConversionError(f"The image processor of {folder} cannot be loaded: {first_line(error)}") from error


def to_release(state: dict[str, Tensor], config: DinoDetrConfig) -> dict[str, Tensor]:
    """Rename tensors of dino_hf to the names of the original release. A shared head appears once."""
    return {name: tensor.contiguous() for name, tensor in translate_back(state, rules_for(config)).items()}


def _check_backbone(tensors: dict[str, Tensor], config: DinoDetrConfig) -> None:
    """Check that the backbone has no settings beyond those that its tensors show. The other projects have no such settings.

    Raises:
        ConversionError: it has.
    """
    usual = DinoDetrConfig(backbone_config=backbone_settings(tensors)).backbone_config
    ours, theirs = unusual_settings(config.backbone_config, usual)
    if ours:
        raise ConversionError(f"The backbone has {ours}, where the other projects have {theirs}.")


def load_folder(folder: Path) -> DinoDetrForObjectDetection:
    """Load a model of dino_hf. Code in the folder is never run.

    Raises:
        ConversionError: the folder does not hold a complete model of dino_hf.
    """
    if not (folder / "config.json").is_file():
        raise ConversionError(f"{folder} does not hold a model of dino_hf: it has no config.json.")
    try:
        check_model_folder(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if not isinstance(config, DinoDetrConfig):
            raise ConversionError(
                f"{folder} holds a model of type {config.model_type!r}, not {DinoDetrConfig.model_type!r}."
            )
        model, report = DinoDetrForObjectDetection.from_pretrained(folder, config=config, output_loading_info=True)
    except ConversionError:
        raise
    except Exception as error:  # the library raises errors of many types
        if "trust_remote_code" in str(error):
            raise ConversionError(
                f"{folder} names its own code for its model. This code is never run here; only models of dino_hf are converted."
            ) from error
        raise ConversionError(f"{folder} cannot be loaded: {first_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise ConversionError(f"{folder} lacks {len(missing)} tensors, e.g. {missing[:3]}.")
    if unknown := sorted(report["unexpected_keys"]):
        raise ConversionError(f"{folder} has {len(unknown)} tensors that a DINO does not have, e.g. {unknown[:3]}.")
    return model.eval()
