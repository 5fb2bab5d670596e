"""The parts of a detector that a run trains: all, all but frozen parts, or LoRA adapters and class heads."""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..common.text import list_some
from ..common.values import numbers_by_name, short_repr
from ..training.freezing import freeze
from ..training.lora import add_lora, lora_config_class
from .starting_model import Start, align_memory, seeded

_DEFAULT_RANK = 16
_COMMON_LORA = ("r", "lora_alpha", "lora_dropout")


def read_freeze(value: str | Sequence[str] | None) -> list[str] | None:
    """Names for `freeze`, as a list for `run.json`. None freezes no further part.

    Raises:
        ValueError: the value is not text or a sequence of texts.
    """
    names = [value] if isinstance(value, str) else value
    if names is not None and not (isinstance(names, Sequence) and all(isinstance(name, str) for name in names)):
        raise ValueError(
            f'freeze={short_repr(value)} must be names of parts, such as "backbone" or ["backbone", "encoder"].'
        )
    return list(names) if names else None


def split_names(text: str) -> list[str]:
    """Names in text: "backbone,encoder" -> ["backbone", "encoder"]. Commas inside braces belong to a regular expression."""
    return [name.strip() for name in re.split(r",(?![^{]*})", text) if name.strip()]


def parse_lora(text: str) -> int | dict[str, float]:
    """The rank or the settings in text: "16" -> 16, "r=16,lora_alpha=32" -> settings by name. Raises ValueError for other text."""
    example = "16, or r=16,lora_alpha=32,lora_dropout=0.1"
    return numbers_by_name(text, "--lora", example) if not text.isdecimal() else int(text)


def read_lora(value: int | Mapping[str, Any] | bool | None) -> dict[str, Any] | None:
    """Settings for `add_lora`, as a dictionary for `run.json`. None trains without adapters.

    Args:
        value: the rank, or settings by name. `lora_alpha` is twice the rank, if it is not given. True: rank 16.
    Raises:
        ValueError: an unknown name, or a value of a wrong type or range.
        ImportError: peft is not installed.
    """
    if value is None or value is False:
        return None
    settings = {} if value is True else dict(value) if isinstance(value, Mapping) else {"r": value}
    _check_lora_names(settings)
    rank = settings.setdefault("r", _DEFAULT_RANK)
    if isinstance(rank, float) and rank.is_integer():  # from a command line
        rank = settings["r"] = int(rank)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(
            f"The rank of LoRA adapters, r={short_repr(rank)}, must be a whole number above 0, such as 16."
        )
    alpha, dropout = settings.setdefault("lora_alpha", 2 * rank), settings.get("lora_dropout", 0.0)
    for name, number, is_valid, valid in (
        ("lora_alpha", alpha, lambda number: number > 0, "a number above 0"),
        ("lora_dropout", dropout, lambda number: 0 <= number < 1, "at least 0 and below 1"),
    ):
        if isinstance(number, bool) or not isinstance(number, int | float) or not is_valid(number):
            raise ValueError(f"{name}={short_repr(number)} must be {valid}.")
    return settings


def _check_lora_names(settings: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(lora_config_class())]
    for name in settings:
        if name not in known:
            close = {"rank": ["r"], "alpha": ["lora_alpha"], "dropout": ["lora_dropout"]}.get(
                name, difflib.get_close_matches(str(name), known, n=2)
            )
            hint = f"did you mean {' or '.join(close)}?" if close else f"use {', '.join(_COMMON_LORA)}."
            raise ValueError(f"LoRA adapters have no setting {name!r}; {hint}")


def limit_training(
    start: Start, parts: Sequence[str] | None, lora: Mapping[str, Any] | None, seed: int
) -> tuple[Start, list[str]]:
    """Freeze parts of the model of a start, or add adapters to it.

    Args:
        parts: see `freeze`.
        lora: see `add_lora`.
        seed: of the first values of the adapters.
    Returns:
        the start, with a note for the plan; warnings.
    Raises:
        ValueError: both are given, a part is unknown, or nothing is left to train.
        ImportError: peft is not installed.
    """
    if not parts and not lora:
        return start, []
    option = f"--freeze {','.join(parts)} (in Python, freeze=...)" if parts else ""
    if parts and lora:
        raise ValueError(f"--lora freezes everything except adapters and class heads, so leave out {option}.")
    warnings = _random_weights_warnings(start, parts or [], lora)
    if lora:
        with seeded(seed):
            model = add_lora(start.model, **lora)
        align_memory(model)
        note = (
            f"LoRA adapters of rank {lora['r']} and the class heads are trained. The finished folder has them merged into the "
            "weights"
        )
        return start._replace(model=model, notes=[*start.notes, note]), warnings
    changed = freeze(start.model, parts)
    if not num_trained(start.model):
        raise ValueError(f"{option} leaves nothing to train.")
    note = f"Frozen: {list_some(parts, 6)}, {count_parameters(changed.num_parameters)} parameters"
    return start._replace(notes=[*start.notes, note]), warnings


def _random_weights_warnings(start: Start, parts: Sequence[str], lora: Mapping[str, Any] | None) -> list[str]:
    """Warnings about frozen random weights, which never learn."""
    if start.pretrained == "detector":
        return []
    random = [part for part in parts if not (start.pretrained == "backbone" and part.startswith("backbone"))]
    if not lora and not random:
        return []
    option = "--lora" if lora else f"--freeze {','.join(random)}"
    return [
        f"{option} freezes weights that are random, which then never learn. Start from a trained detector (--model), or leave out "
        f"{option}."
    ]


def count_parameters(number: int) -> str:
    """A number of parameters as text: "47.7 M", or "9,120" for small numbers."""
    return f"{number / 1e6:.1f} M" if number >= 100_000 else f"{number:,}"


def num_trained(model: nn.Module) -> int:
    """Number of values in the parameters that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def saved_bytes(model: nn.Module) -> int:
    """Bytes of the weights in a checkpoint: of the whole model, or of adapters and what is trained beside them."""
    tensors = [*model.parameters(), *model.buffers()]
    if not isinstance(model, PreTrainedModel):
        tensors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return sum(tensor.nbytes for tensor in tensors)
