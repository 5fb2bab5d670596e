"""The detector in what users hand over: as it is, or in what something has wrapped around it."""

from torch import nn
from transformers import PreTrainedModel


def check_detector(model: nn.Module, wanted: str, cure: str) -> None:
    """
    Args:
        wanted: what `model` must be; with `cure`, for the message.
    Raises:
        ValueError: the model is none of ours, or something is wrapped around it.
    """
    # By the type's name, not its class: a model that came with its own code from the Hub has classes of its own.
    if not isinstance(model, PreTrainedModel) or model.config.model_type != "dino_detr":
        raise ValueError(f"model is a {type(model).__name__}, but must be a {wanted}; {cure}")


def base_detector(model: nn.Module, cure: str) -> PreTrainedModel:
    """The `DinoDetrModel` of a detector that nothing is wrapped around. Raises: see `check_detector`."""
    check_detector(model, "DinoDetrForObjectDetection or DinoDetrModel", cure)
    return model.base_model


def find_detector(model: nn.Module) -> nn.Module:
    """The `DinoDetrForObjectDetection` in a model that something may have been wrapped around."""
    for module in model.modules():
        # Not by its class, which is another one when the code came with the checkpoint; not by hasattr, which sees through PEFT.
        is_ours = getattr(getattr(module, "config", None), "model_type", None) == "dino_detr"
        if is_ours and "criterion" in vars(module):
            return module
    raise ValueError(f"There is no DinoDetrForObjectDetection in the {type(model).__name__} that is trained.")
