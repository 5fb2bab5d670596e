"""Low-rank adapters (LoRA, arXiv:2106.09685) through peft: fine-tuning with 3 % of the parameters of an R50 model."""

from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from ..common.installation import missing
from .detector import check_detector

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

# All linears of attention and feed-forward blocks, by their names in a DinoDetrForObjectDetection or DinoDetrModel. Sampling
# offsets and attention weights are among them: other images want other places to be looked at, and in deformable attention nothing
# else says where. Backbones have their own names for what they have of this.
TARGET_MODULES = r"(model\.)?(encoder|decoder)\.layers\.\d+\.(self_attn|cross_attn|mlp)\.\w+"


def lora_config(
    model: PreTrainedModel, r: int = 16, lora_alpha: int = 32, lora_dropout: float = 0.0, **settings
) -> "LoraConfig":
    """Settings of adapters on the attention and feed-forward linears of encoder and decoder, for `peft.get_peft_model`.

    Class heads and the label embedding of denoising are trained whole and saved with the adapters, so that new classes
    (`transfer_classes`, before this) can be learnt; everything else stays as it is, the backbone too.

    Args:
        model: `DinoDetrForObjectDetection`.
        r: rank of the adapters.
        lora_alpha: the adapters' output is multiplied by `lora_alpha` / `r`.
        lora_dropout: probability, of what enters the adapters.
        settings: of `peft.LoraConfig`; they go first, e.g. `target_modules=[]`.
    Raises:
        ImportError: peft is not there.
        ValueError: the model is none of ours, or a module that is to be trained whole is quantized.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise missing(error, "peft", "LoRA adapters", "lora") from error
    check_detector(
        model,
        "DinoDetrForObjectDetection",
        "adapters come before it is wrapped for distributed training or compilation, and once.",
    )
    trained_whole = ["class_head"] + ([] if model.base_model.denoising is None else ["label_embedding"])
    defaults = {"target_modules": TARGET_MODULES, "modules_to_save": trained_whole}
    config = LoraConfig(r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, **defaults | settings)
    _check_trained_whole(model, config.modules_to_save or [])
    return config


def _check_trained_whole(model: PreTrainedModel, trained_whole: list[str]) -> None:
    """
    Raises:
        ValueError: the weights of a module are integers, which have no gradients.
    """
    for name, module in model.named_modules():
        own_name = name.rpartition(".")[2]
        if own_name in trained_whole and not all(weights.is_floating_point() for weights in module.parameters()):
            raise ValueError(
                f"{name} is quantized, but it is trained whole beside the adapters: load the model with "
                f"BitsAndBytesConfig(..., llm_int8_skip_modules={sorted(trained_whole)})."
            )


def add_lora(model: PreTrainedModel, **settings) -> "PeftModel":
    """Put adapters into a model, in place, and freeze the rest; see `lora_config` for `settings`.

    What is returned goes to `Trainer` in the place of the model. `save_pretrained` saves adapters and class heads, 6 MB for an R50,
    and `peft.PeftModel.from_pretrained(model, folder)` puts them into a model with the weights and classes that they were trained
    on. `merge_and_unload()` adds them to the weights and gives the plain model back, which saves, loads and predicts like any
    other; what was frozen stays so until it is loaded.
    """
    config = lora_config(model, **settings)
    from peft import get_peft_model

    return get_peft_model(model, config)
