"""A trained detector gets other classes; of a class that it knows under the same name, it keeps what it has learnt."""

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

_WRAPPED = "one that is wrapped, for distributed training, compilation or PEFT, gets its classes before that."


class ClassTransfer(NamedTuple):
    """What became of the classes; `print` shows it to people. "N/A" is not a class."""

    kept: dict[str, str]  # new name -> old name of the class that it starts from, in the order of the new classes
    new: list[str]  # names that the model did not know
    dropped: list[str]  # old names that no new class starts from

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

    Where a new class has the name of an old one, its rows of every class head and of denoising's label embedding are kept. Case,
    spaces, hyphens and underscores do not count, and `SYNONYMS` are one name; the most exact match wins, and of several equal ones
    the first. Where two new classes match one old class ("tv" and "television"), both start from it. "LABEL_0" and the like are
    no names. All other rows are those of a fresh model, drawn from torch's generator: seed it before.

    The parameters are new objects, with the old dtype, device and `requires_grad`: make the optimizer, and wrappers like those of
    distributed training, compilation or PEFT, afterwards.

    Args:
        model: `DinoDetrForObjectDetection` or `DinoDetrModel`; its config gets the new classes too.
        id2label: class index, 0 to K - 1, -> name; `load_coco(...).id2label`.
        category_ids: original category id of each class, in that order; `load_coco(...).category_ids`. None: there are none.
    Raises:
        ValueError: the model is none of ours, or does not fit its own config; or `id2label` is no dictionary of K different
            names; or `category_ids` are not K different whole numbers. The model is not changed then.
    """
    detector = base_detector(model, _WRAPPED)
    config = copy.deepcopy(model.config)
    config.set_classes(id2label, category_ids)
    old_names, names = list(model.config.id2label.values()), list(config.id2label.values())
    if twice := sorted({name for name in names if name != NO_CLASS and names.count(name) > 1}):
        raise ValueError(f"id2label has the names {twice} more than once; each class has its own.")
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

    # From here on nothing can fail.
    for layer, parameters in zip(layers, changed, strict=True):
        for name, parameter in parameters.items():
            setattr(layer, name, parameter)
    for head in heads:
        head.out_features = len(names)
    for embedding in embeddings:
        embedding.num_embeddings = len(embedding.weight)
        detector.denoising.num_labels = len(names)
    for owner in (model, detector):  # usually one and the same config
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
            f"A class head is a {type(head).__name__}; classes are transferred before a model is quantized or gets adapters."
        )
    if head.out_features != num_labels:
        raise ValueError(
            f"A class head has {head.out_features} outputs, but model.config.id2label names {num_labels} classes; leave the "
            "config as it was loaded, it tells which rows belong to which class."
        )


def _transferred(
    layer: nn.Module, fresh: nn.Module, sources: list[int | None], num_old: int
) -> dict[str, nn.Parameter]:
    """Parameters of a layer whose first rows belong to classes, for the classes that start from `sources`."""
    kept = [index for index, source in enumerate(sources) if source is not None]
    kept_from = [sources[index] for index in kept]
    parameters = {}
    for name, old in layer.named_parameters(recurse=False):
        rows = getattr(fresh, name).detach().to(old)  # (K, ...)
        rows[kept] = old.detach()[kept_from]
        extra = old.detach()[num_old:]  # a label embedding can have more rows, which are never looked up
        parameters[name] = nn.Parameter(torch.cat([rows, extra]), requires_grad=old.requires_grad)
    return parameters
