"""Give a trained detector other classes. Classes it already knows by name keep their weights."""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ..common.class_names import NO_CLASS, match_names
from ..common.text import list_some
from ..model.heads import class_head
from .detector import base_detector

_WRAPPED = "Transfer classes before the model is wrapped for distributed training, compilation or PEFT."


class ClassTransfer(NamedTuple):
    """Result of `transfer_classes`. `print` shows it as text. "N/A" is not a class."""

    kept: dict[str, str]  # new name -> old name of the class it starts from, in the order of the new classes
    new: list[str]  # new names the model did not know
    dropped: list[str]  # old names from which no new class starts

    def __repr__(self) -> str:
        return f"ClassTransfer({len(self.kept)} kept, {len(self.new)} new, {len(self.dropped)} dropped)"

    def __str__(self) -> str:
        known = [new if new == old else f"{new} (was {old})" for new, old in self.kept.items()]
        lines = {f"Kept {len(known)} of {len(known) + len(self.new)} classes": known, "New": self.new}
        lines["Dropped"] = self.dropped
        return "\n".join(f"{title}: {list_some(names, 10) or 'none'}" for title, names in lines.items())


def transfer_classes(
    model: PreTrainedModel, id2label: dict[int, str], category_ids: Sequence[int] | None = None
) -> ClassTransfer:
    """Give a model other classes, in place.

    If a new class has the name of an old class, its rows in every class head and in the label embedding of denoising are kept.
    Case, spaces, hyphens and underscores are ignored, and `SYNONYMS` count as one name. The most exact match wins; among equal
    matches, the first. If two new classes match one old class ("tv" and "television"), both start from it. Placeholders such as
    "LABEL_0" never match. All other rows are drawn from torch's generator, as in a new model: seed it before.

    Parameters are replaced by new ones with the old dtype, device and `requires_grad`. So create the optimizer, and wrap the
    model for distributed training, compilation or PEFT, after this call.

    Args:
        model: `DinoDetrForObjectDetection` or `DinoDetrModel`. Its configuration gets the new classes too.
        id2label: class index, 0 to K - 1, -> name, as in `load_coco(...).id2label`.
        category_ids: original category id of each class, as in `load_coco(...).category_ids`. None: no ids.
    Raises:
        ValueError: the model is not a DINO detector, is wrapped or does not fit its configuration; `id2label` does not have K
            different names; or `category_ids` are not K different integers. Then the model is not changed.
    """
    detector = base_detector(model, _WRAPPED)
    config = copy.deepcopy(model.config)
    config.set_classes(id2label, category_ids)
    old_names, names = list(model.config.id2label.values()), list(config.id2label.values())
    if twice := sorted({name for name in names if name != NO_CLASS and names.count(name) > 1}):
        raise ValueError(f"id2label has the names {twice} more than once; each class needs its own name.")
    sources = match_names(old_names, names)

    heads = [head.class_head for head in (detector.query_selection.head, *detector.decoder.heads)]
    embeddings = [] if detector.denoising is None else [detector.denoising.label_embedding]
    for head in heads:
        _check_head(head, len(old_names))
    on_cpu = {"device": "cpu", "dtype": torch.float32}  # the same values for a model of any device and dtype
    fresh = [class_head(head.in_features, len(names), **on_cpu) for head in heads]
    fresh += [nn.Embedding(len(names), embedding.embedding_dim, **on_cpu) for embedding in embeddings]
    layers = [*heads, *embeddings]
    changed = [
        _transferred(layer, initial, sources, len(old_names)) for layer, initial in zip(layers, fresh, strict=True)
    ]

    # Nothing below can fail.
    for layer, parameters in zip(layers, changed, strict=True):
        for name, parameter in parameters.items():
            setattr(layer, name, parameter)
    for head in heads:
        head.out_features = len(names)
    for embedding in embeddings:
        embedding.num_embeddings = len(embedding.weight)
        detector.denoising.num_labels = len(names)
    for owner in (model, detector):  # they usually share one configuration
        owner.config.set_classes(config.id2label, config.category_ids)

    used = set(sources)
    return ClassTransfer(
        kept={name: old_names[source] for name, source in zip(names, sources, strict=True) if source is not None},
        new=[name for name, source in zip(names, sources, strict=True) if source is None and name != NO_CLASS],
        dropped=[name for index, name in enumerate(old_names) if index not in used and name != NO_CLASS],
    )


def _check_head(head: nn.Module, num_labels: int) -> None:
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        raise ValueError(
            f"A class head is a {type(head).__name__}. Transfer classes before the model is quantized or gets adapters."
        )
    if head.out_features != num_labels:
        raise ValueError(
            f"A class head has {head.out_features} outputs, but model.config.id2label names {num_labels} classes. Do not change "
            "the classes in the configuration before this call: they say which rows belong to which class."
        )


def _transferred(
    layer: nn.Module, fresh: nn.Module, sources: list[int | None], num_old: int
) -> dict[str, nn.Parameter]:
    """New parameters of a layer whose first rows belong to classes.

    Args:
        fresh: a new layer for the new classes.
        sources: for each new class, the index of the old class it starts from, or None.
        num_old: number of old classes.
    """
    kept = [index for index, source in enumerate(sources) if source is not None]
    kept_from = [sources[index] for index in kept]
    parameters = {}
    for name, old in layer.named_parameters(recurse=False):
        rows = getattr(fresh, name).detach().to(old)  # (K, ...)
        rows[kept] = old.detach()[kept_from]
        extra = old.detach()[num_old:]  # a label embedding can have more rows, which are never read
        parameters[name] = nn.Parameter(torch.cat([rows, extra]), requires_grad=old.requires_grad)
    return parameters
