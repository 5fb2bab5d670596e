"""The release's optimizer: AdamW, with a lower learning rate for the backbone (DINO app. D.3)."""

import torch
from torch import nn
from transformers import TrainingArguments


def parameter_groups(model: nn.Module, learning_rate: float, backbone_scale: float = 0.1) -> list[dict]:
    """Trainable parameters in two groups, each with its learning rate.

    Args:
        model: `DinoDetrForObjectDetection` or `DinoDetrModel`.
        learning_rate: of everything but the backbone; the projections of its maps count as transformer.
        backbone_scale: learning rate of the backbone as a share of `learning_rate`. A tenth for a pretrained backbone.
    """
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["backbone.model." in name].append(parameter)
    return [
        {"params": groups[False], "lr": learning_rate},
        {"params": groups[True], "lr": learning_rate * backbone_scale},
    ]


def make_optimizer(model: nn.Module, args: TrainingArguments, backbone_scale: float = 0.1) -> torch.optim.AdamW:
    """AdamW for `Trainer(optimizers=(make_optimizer(model, args), None))`; weight decay applies to every parameter, as in the
    release. The schedule stays `Trainer`'s: it scales both learning rates alike."""
    return torch.optim.AdamW(
        parameter_groups(model, args.learning_rate, backbone_scale),
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
        fused=True,  # the same update in one pass over memory: a tenth of a small model's step on a CPU
    )
