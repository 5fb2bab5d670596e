"""The release's optimizer: AdamW, with a lower learning rate for the backbone (DINO app. D.3)."""

import torch
from torch import nn
from transformers import TrainingArguments


def group_parameters(model: nn.Module, separate_sampling_offsets: bool = False) -> dict[str, list[nn.Parameter]]:
    """Trainable parameters by group, each of them once: "transformer", "backbone" and, if they are wanted on their own,
    "sampling_offsets". A group without any is left out.

    Args:
        model: `DinoDetrForObjectDetection` or `DinoDetrModel`, also wrapped by peft, for distributed training or compiled.
        separate_sampling_offsets: the linears that tell deformable attention where to look; Deformable DETR trains them at a
            tenth of the rate (arXiv:2010.04159, sec. 5). Otherwise they are transformer, as in the release of DINO.
    Raises:
        ValueError: the whole model is frozen.
    """
    groups = {"transformer": [], "backbone": [], "sampling_offsets": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if "backbone.model." in name:  # the projections of its maps count as transformer
                group = "backbone"
            elif separate_sampling_offsets and ".sampling_offsets." in name:
                group = "sampling_offsets"
            else:
                group = "transformer"
            groups[group].append(parameter)
    if not any(groups.values()):
        raise ValueError(
            f"Nothing of the {type(model).__name__} is trained: all of it is frozen; unfreeze(model, ...) a part of it, such as "
            '"decoder".'
        )
    return {group: parameters for group, parameters in groups.items() if parameters}


def parameter_groups(
    model: nn.Module, learning_rate: float, backbone_scale: float = 0.1, sampling_offsets_scale: float | None = None
) -> list[dict]:
    """Trainable parameters in groups for an optimizer, each with its `name` and learning rate `lr`; see `group_parameters`.

    Args:
        learning_rate: of everything but the backbone; the projections of its maps count as transformer.
        backbone_scale: learning rate of the backbone as a share of `learning_rate`. A tenth for a pretrained backbone.
        sampling_offsets_scale: the same of the sampling offsets; None leaves them with the transformer.
    """
    scales = {"transformer": 1.0, "backbone": backbone_scale, "sampling_offsets": sampling_offsets_scale}
    groups = group_parameters(model, separate_sampling_offsets=sampling_offsets_scale is not None)
    return [
        {"name": name, "params": parameters, "lr": learning_rate * scales[name]} for name, parameters in groups.items()
    ]


def make_optimizer(
    model: nn.Module,
    args: TrainingArguments,
    backbone_scale: float = 0.1,
    sampling_offsets_scale: float | None = None,
) -> torch.optim.AdamW:
    """AdamW for `Trainer(optimizers=(make_optimizer(model, args), None))`; weight decay applies to every parameter, as in the
    release. The schedule stays `Trainer`'s: it scales all learning rates alike. A recipe makes its own: `Recipe.make_optimizer`."""
    groups = parameter_groups(model, args.learning_rate, backbone_scale, sampling_offsets_scale)
    return adamw(groups, args.weight_decay, (args.adam_beta1, args.adam_beta2), args.adam_epsilon)


def adamw(groups: list[dict], weight_decay: float, betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    """torch's AdamW."""
    # fused: the same update in one pass over memory: a tenth of a small model's step on a CPU
    return torch.optim.AdamW(groups, weight_decay=weight_decay, betas=betas, eps=eps, fused=True)
