"""Low-rank adapters (LoRA, arXiv:2106.09685) with peft: fine-tune 3 % of the parameters of an R50 model."""

import copy
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from ..common.installation import with_install_command
from .detector import check_detector
from .ema import ADAPTER_FOLDER

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

# All linear layers of attention and feed-forward blocks, by their names in a DinoDetrForObjectDetection or DinoDetrModel. They
# include sampling offsets and attention weights, because in deformable attention only these decide which positions are read.
# Backbones have other names for their layers, so they do not match.
TARGET_MODULES = r"(model\.)?(encoder|decoder)\.layers\.\d+\.(self_attn|cross_attn|mlp)\.\w+"


def lora_config(
    model: PreTrainedModel, r: int = 16, lora_alpha: int = 32, lora_dropout: float = 0.0, **settings
) -> "LoraConfig":
    """Configuration of adapters on the attention and feed-forward layers of encoder and decoder, for `peft.get_peft_model`.

    Class heads and the label embedding of denoising are trained in full and saved with the adapters, so the model can learn new
    classes. Call `transfer_classes` before. All other weights are frozen, including the backbone.

    Args:
        model: `DinoDetrForObjectDetection`.
        r: rank of the adapters.
        lora_alpha: the adapters' output is multiplied by `lora_alpha` / `r`.
        lora_dropout: dropout probability of the adapters' input.
        settings: fields of `peft.LoraConfig`, which replace the defaults here, e.g. `target_modules=[]`.
    Raises:
        ImportError: peft is not installed.
        ValueError: the model is not a DINO detector or is wrapped, or a module that must be trained in full is quantised.
    """
    config_class = lora_config_class()
    check_detector(
        model,
        "DinoDetrForObjectDetection",
        "Add adapters before the model is wrapped for distributed training or compilation, and only once.",
    )
    trained_in_full = ["class_head"] + ([] if model.base_model.denoising is None else ["label_embedding"])
    defaults = {"target_modules": TARGET_MODULES, "modules_to_save": trained_in_full}
    config = config_class(r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, **defaults | settings)
    _check_trained_in_full(model, config.modules_to_save or [])
    return config


def lora_config_class() -> type["LoraConfig"]:
    """`peft.LoraConfig`. Raises ImportError with the command to install, if peft is missing."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise with_install_command(error, "peft", "LoRA adapters", "lora") from error
    return LoraConfig


def _check_trained_in_full(model: PreTrainedModel, trained_in_full: list[str]) -> None:
    """
    Raises:
        ValueError: the weights of a module are integers, which cannot have gradients.
    """
    for name, module in model.named_modules():
        own_name = name.rpartition(".")[2]
        if own_name in trained_in_full and not all(weights.is_floating_point() for weights in module.parameters()):
            raise ValueError(
                f"{name} is quantized, but it is trained in full beside the adapters. Load the model with "
                f"BitsAndBytesConfig(..., llm_int8_skip_modules={sorted(trained_in_full)})."
            )


def add_lora(model: PreTrainedModel, **settings) -> "PeftModel":
    """Add adapters to a model, in place, and freeze its other weights.

    Train the result in place of the model. Its `save_pretrained` saves adapters and class heads, 6 MB for an R50.
    `peft.PeftModel.from_pretrained(model, folder)` adds them to a model with the weights and classes they were trained with.
    `merge_and_unload()` adds them to the weights and returns the plain model, which saves, loads and predicts like any other. Its
    frozen weights stay frozen until it is loaded again.

    Args:
        settings: see `lora_config`.
    """
    config = lora_config(model, **settings)
    from peft import get_peft_model

    with warnings.catch_warnings():  # peft reads a property that transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, config)


def merge_adapters(model: "PeftModel", checkpoint: str | Path) -> PreTrainedModel:
    """A detector with the adapters of a checkpoint merged into its weights. `model` is unchanged.

    Args:
        model: the trained model. Only its frozen weights are used.
        checkpoint: folder with adapters: a checkpoint of `DinoDetrTrainer`, or the folder `ema` in it.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    folder = Path(checkpoint)
    adapters = folder / ADAPTER_FOLDER if (folder / ADAPTER_FOLDER).is_dir() else folder
    copied = copy.deepcopy(model)
    set_peft_model_state_dict(copied, load_peft_weights(str(adapters), device="cpu"))
    merged = copied.merge_and_unload()
    merged.config = type(merged.config).from_pretrained(folder, trust_remote_code=False)
    merged.base_model.config = merged.config
    return merged
