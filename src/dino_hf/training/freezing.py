"""Freeze parts of a detector: by the name of a part, by a stage of its backbone, or by a pattern."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from .detector import base_detector

_WRAPPED = "Freeze parameters before the model is wrapped for distributed training, compilation or PEFT."


class ParameterChange(NamedTuple):
    """Parameters that `freeze` or `unfreeze` changed."""

    names: list[str]  # as in `model.named_parameters()`
    num_parameters: int  # total number of values in them

    def __repr__(self) -> str:
        return f"ParameterChange({len(self.names)} tensors, {self.num_parameters:,} parameters)"


def freeze(model: PreTrainedModel, what: str | Iterable[str]) -> ParameterChange:
    """Exclude parameters from training.

    Create the optimizer, and wrap the model for distributed training or peft, after this call. Frozen parts are not saved: in a
    loaded model, only the first stages of the backbone are frozen, by `config.num_frozen_backbone_stages`. Norms need no special
    care: backbone norms with running statistics are constant in every detector, and other norms have no statistics. Stochastic
    depth (Swin) stays active in frozen stages.

    Args:
        model: `DinoDetrForObjectDetection` or `DinoDetrModel`.
        what: one or more of
            - "backbone", "projections" (of its maps), "encoder", "query_selection", "denoising", "decoder";
            - "backbone.stem", "backbone.stage1", ... of a ResNet, Swin, ConvNeXt, BiT, FocalNet or InternImage;
            - regular expressions that match the start of parameter names of a `DinoDetrModel`: r"decoder\\.layers\\.[01]\\.",
              r".*\\.sampling_offsets\\.".
    Returns:
        the parameters that were trainable before.
    Raises:
        ValueError: the model is not a DINO detector or is wrapped, or an entry of `what` is not a part, stage or pattern of the
            model. Then nothing is changed.
    """
    return _set_trainable(model, what, False)


def unfreeze(model: PreTrainedModel, what: str | Iterable[str]) -> ParameterChange:
    """Include frozen parameters in training again, also stages that are frozen in a loaded model.

    Backbone stages after the last used feature map stay frozen: no gradient reaches them, and distributed training would wait for
    their gradients.

    Arguments and errors are the same as in `freeze`.

    Returns:
        the parameters that were frozen before.
    """
    return _set_trainable(model, what, True)


def backbone_stages(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Stages of the backbone by name, "backbone.stem" first. Empty for backbones of timm, whose stages are not known."""
    backbone = base_detector(model, _WRAPPED).backbone.model
    body = getattr(backbone, "swin", getattr(backbone, "bit", backbone))
    stem = getattr(body, "embedder", getattr(body, "embeddings", None))
    encoder = getattr(body, "encoder", None)
    stages = getattr(encoder, "stages", getattr(encoder, "layers", None))
    if stem is None or stages is None:
        return {}
    return {"backbone.stem": stem} | {f"backbone.stage{number}": stage for number, stage in enumerate(stages, 1)}


def _set_trainable(model: PreTrainedModel, what: str | Iterable[str], trainable: bool) -> ParameterChange:
    patterns = list(what) if isinstance(what, Iterable) and not isinstance(what, str) else [what]
    matched = [parameter for pattern in patterns for parameter in _find(model, pattern)]
    was_trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for parameter in matched:
        parameter.requires_grad_(trainable)
    if trainable:
        backbone = base_detector(model, _WRAPPED).backbone
        num_stages, backbone.num_frozen_stages = backbone.num_frozen_stages, 0
        backbone.freeze_stages()  # with num_frozen_stages=0, it only freezes stages that no gradient reaches
        backbone.num_frozen_stages = num_stages
    changed = {name: p for name, p in model.named_parameters() if p.requires_grad != was_trained[name]}
    return ParameterChange(list(changed), sum(parameter.numel() for parameter in changed.values()))


def _find(model: PreTrainedModel, pattern: str) -> list[nn.Parameter]:
    """Parameters of a part or of a stage, or parameters whose names match a pattern."""
    detector = base_detector(model, _WRAPPED)
    stages = backbone_stages(model)
    parts = {
        "backbone": [detector.backbone.model],
        "projections": [detector.backbone.projections, detector.backbone.norms],
        **{name: [getattr(detector, name)] for name in ("encoder", "query_selection", "decoder")},
        **({} if detector.denoising is None else {"denoising": [detector.denoising]}),
        **{name: [stage] for name, stage in stages.items()},
    }
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(
            f"{pattern!r} does not name a part of the model. Use one of the parts {sorted(parts)}, or a regular expression that "
            "matches the start of parameter names."
        )
    if pattern in parts:
        return [parameter for module in parts[pattern] for parameter in module.parameters()]
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is neither a part of the model nor a regular expression: {error}.") from None
    # Names with the prefix of DinoDetrForObjectDetection match too.
    found = [
        parameter
        for name, parameter in detector.named_parameters()
        if expression.match(name) or expression.match(f"model.{name}")
    ]
    if not found:
        names = [name for name, _ in detector.named_parameters()]
        if containing := [name for name in names if expression.search(name)]:
            anywhere = f".*({pattern})" if "|" in pattern else f".*{pattern}"
            raise ValueError(
                f"{pattern!r} matches no parameter, because it must match from the start of a name. {len(containing)} names "
                f'contain it, such as {containing[0]!r}: write r"{anywhere}".'
            )
        unknown = "" if stages else f" (the stages of {type(detector.backbone.model).__name__} are not known here)"
        raise ValueError(
            f"{pattern!r} matches no parameter. The parts are {sorted(parts)}{unknown}. A regular expression must match from the "
            f"start of one of the {len(names)} parameter names, from {names[0]!r} to {names[-1]!r}."
        )
    return found
