"""Find the detector in a model that may be wrapped, and check that a model is a detector."""

from torch import nn
from transformers import PreTrainedModel


def check_detector(model: nn.Module, expected: str, cure: str) -> None:
    """Check that a model is a DINO detector and is not wrapped.

    Args:
        expected: the classes that `model` may have, for the message.
        cure: the user's remedy, for the message.
    Raises:
        ValueError: the model is of another type, or is wrapped.
    """
    # By model type, not by class: a model loaded with its own code from the Hub has other classes.
    if not isinstance(model, PreTrainedModel) or model.config.model_type != "dino_detr":
        raise ValueError(f"model is a {type(model).__name__}, but must be a {expected}. {cure}")


def base_detector(model: nn.Module, cure: str) -> PreTrainedModel:
    """The `DinoDetrModel` of a detector. Raises ValueError if the detector is wrapped, see `check_detector`."""
    check_detector(model, "DinoDetrForObjectDetection or DinoDetrModel", cure)
    return model.base_model


def find_detector(model: nn.Module) -> nn.Module:
    """The `DinoDetrForObjectDetection` in a model that may be wrapped.

    Raises:
        ValueError: there is no detector.
    """
    for module in model.modules():
        # Not by class, see above. Not by hasattr, because PEFT passes attributes of the wrapped model on.
        is_ours = getattr(getattr(module, "config", None), "model_type", None) == "dino_detr"
        if is_ours and "criterion" in vars(module):
            return module
    raise ValueError(f"The trained model, a {type(model).__name__}, has no DinoDetrForObjectDetection in it.")
