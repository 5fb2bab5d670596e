"""Leave parts of a detector out of training: by the name of a part, a stage of its backbone, or a pattern."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from .detector import base_detector

_WRAPPED = "one that is wrapped, for distributed training, compilation or PEFT, is frozen before that."


class Changed(NamedTuple):
    """What `freeze` or `unfreeze` changed."""

    names: list[str]  # of parameters, as in `model.named_parameters()`
    num_parameters: int  # numbers in them

    def __repr__(self) -> str:
        return f"Changed({len(self.names)} tensors, {self.num_parameters:,} parameters)"


def freeze(model: PreTrainedModel, what: str | Iterable[str]) -> Changed:
    """Leave parameters out of training.

    Make the optimizer, and wrappers like those of distributed training or peft, afterwards. It is not saved: a model that is loaded
    has nothing frozen but the first stages of its backbone, by `config.num_frozen_backbone_stages`. Norms need no care: those of
    the backbone that have running statistics are constants in every detector, and the others have none. Stochastic depth (Swin)
    goes on where it is frozen.

    Args:
        model: `DinoDetrForObjectDetection` or `DinoDetrModel`.
        what: one or more of
            - "backbone", "projections" (of its maps), "encoder", "query_selection", "denoising", "decoder";
            - "backbone.stem", "backbone.stage1", ... of a ResNet, Swin, ConvNeXt or BiT;
            - regular expressions that the names of parameters in a `DinoDetrModel` begin with: r"decoder\\.layers\\.[01]\\.",
              r".*\\.sampling_offsets\\.".
    Returns:
        the parameters that were trained before.
    Raises:
        ValueError: the model is none of ours; or one of `what` is no part, stage or pattern of it, or empty. Nothing is changed
            then.
    """
    return _set_trainable(model, what, False)


def unfreeze(model: PreTrainedModel, what: str | Iterable[str]) -> Changed:
    """The opposite of `freeze`, also of the stages that a model is loaded with frozen. What no gradient reaches, the stages of a
    backbone after the last that gives a feature map, stays frozen: distributed training would wait for it.

    Args, returns (the parameters that were frozen before) and raises: as in `freeze`.
    """
    return _set_trainable(model, what, True)


def backbone_stages(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Stages of the backbone, "backbone.stem" first; none where they are not known, as those of timm."""
    backbone = base_detector(model, _WRAPPED).backbone.model
    body = getattr(backbone, "swin", getattr(backbone, "bit", backbone))
    stem = getattr(body, "embedder", getattr(body, "embeddings", None))
    encoder = getattr(body, "encoder", None)
    stages = getattr(encoder, "stages", getattr(encoder, "layers", None))
    if stem is None or stages is None:
        return {}
    return {"backbone.stem": stem} | {f"backbone.stage{number}": stage for number, stage in enumerate(stages, 1)}


def _set_trainable(model: PreTrainedModel, what: str | Iterable[str], trainable: bool) -> Changed:
    patterns = list(what) if isinstance(what, Iterable) and not isinstance(what, str) else [what]
    chosen = [parameter for pattern in patterns for parameter in _find(model, pattern)]
    was_trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for parameter in chosen:
        parameter.requires_grad_(trainable)
    if trainable:
        backbone = base_detector(model, _WRAPPED).backbone
        num_stages, backbone.num_frozen_stages = backbone.num_frozen_stages, 0
        backbone.freeze_stages()  # with none of the first, it freezes what no gradient reaches
        backbone.num_frozen_stages = num_stages
    changed = {name: p for name, p in model.named_parameters() if p.requires_grad != was_trained[name]}
    return Changed(list(changed), sum(parameter.numel() for parameter in changed.values()))


def _find(model: PreTrainedModel, pattern: str) -> list[nn.Parameter]:
    """The parameters of a part, of a stage, or whose names a pattern matches."""
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
            f"{pattern!r} names nothing of the model; give one of the parts {sorted(parts)} or a regular expression that names of "
            "parameters begin with."
        )
    if pattern in parts:
        return [parameter for module in parts[pattern] for parameter in module.parameters()]
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no part of the model, and no regular expression: {error}.") from None
    # Names are known with the prefix of DinoDetrForObjectDetection too.
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
                f"{pattern!r} matches nothing: names of parameters must match from the beginning; {containing[0]!r} has it further "
                f'on, one of {len(containing)}: write r"{anywhere}".'
            )
        unknown = "" if stages else f" (the stages of {type(detector.backbone.model).__name__} are not known here)"
        raise ValueError(
            f"{pattern!r} matches nothing: there are the parts {sorted(parts)}{unknown}, and {len(names)} parameters from "
            f"{names[0]!r} to {names[-1]!r}, whose names a regular expression must match from the beginning."
        )
    return found
