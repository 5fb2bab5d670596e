"""Tables of tensor names, which are read in both directions.

A rule gives the name of a tensor in the source and in the target. Names are templates: `{i}`, `{j}` and `{k}` stand for
a number, any other field for one word (`weight`, `running_mean`). A table is complete: every name matches exactly one rule.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import ConversionError


class Rule(NamedTuple):
    """One row of a table.

    Attributes:
        source: template of the name in the source.
        target: template of the name in the target; several templates split the tensor along its first axis; None drops it.
        reason: reason for dropping the tensor.
        convert: changes the values, if the two sides order them differently.
        convert_back: inverse of `convert`.
    """

    source: str
    target: str | tuple[str, ...] | None
    reason: str = ""
    convert: Callable[[Tensor], Tensor] | None = None
    convert_back: Callable[[Tensor], Tensor] | None = None


class UnknownName(KeyError):
    """A tensor name (`name`) that does not match exactly one rule."""

    def __init__(self, name: str, matching: str):
        self.name = name
        super().__init__(
            f"{name!r} must match exactly one rule, but matches {matching}. Add a rule to its table. A rule with the target "
            "None and a reason drops the tensor."
        )


_FIELD = {"i": r"\d+", "j": r"\d+", "k": r"\d+", "kind": "class|bbox", "tail": ".+"}


@cache
def _compile(template: str) -> re.Pattern:
    parts = re.split(r"\{(\w+)\}", template)
    pieces = [
        f"(?P<{part}>{_FIELD.get(part, '[A-Za-z_][A-Za-z_0-9]*')})" if number % 2 else re.escape(part)
        for number, part in enumerate(parts)
    ]
    return re.compile("".join(pieces))


def _find_rule(name: str, rules: list[Rule], templates: Callable[[Rule], tuple[str, ...]]) -> tuple[Rule, int, dict]:
    """The only rule that matches a name, the index of the matching template, and the values of its fields."""
    found = [
        (rule, number, match.groupdict())
        for rule in rules
        for number, template in enumerate(templates(rule))
        if (match := _compile(template).fullmatch(name))
    ]
    if len(found) != 1:
        raise UnknownName(name, ", ".join(rule.source for rule, _, _ in found) or "none")
    return found[0]


def _sources(rule: Rule) -> tuple[str, ...]:
    return (rule.source,)


def _targets(rule: Rule) -> tuple[str, ...]:
    return (rule.target,) if isinstance(rule.target, str) else rule.target or ()


def renamed(name: str, rules: list[Rule]) -> tuple[str, ...]:
    """Target names of a source tensor: one name, several if the tensor is split, or none if it is dropped.

    Raises:
        UnknownName: no rule matches, or more than one.
    """
    rule, _, fields = _find_rule(name, rules, _sources)
    return tuple(template.format(**fields) for template in _targets(rule))


def translate(tensors: Iterable[tuple[str, Tensor]], rules: list[Rule]) -> tuple[dict[str, Tensor], Counter]:
    """Rename tensors.

    Args:
        tensors: pairs of source name and tensor.
    Returns:
        the tensors by target name, and the number of dropped tensors by reason.
    Raises:
        UnknownName: no rule matches a name, or more than one.
    """
    state, dropped = {}, Counter()
    for name, tensor in tensors:
        rule, _, fields = _find_rule(name, rules, _sources)
        names = [template.format(**fields) for template in _targets(rule)]
        if not names:
            dropped[rule.reason] += 1
            continue
        tensor = rule.convert(tensor) if rule.convert else tensor
        # clone: views of one fused tensor would be saved as shared memory
        parts = [tensor] if len(names) == 1 else [part.clone() for part in tensor.chunk(len(names))]
        state |= dict(zip(names, parts, strict=True))
    return state, dropped


def translate_back(state: dict[str, Tensor], rules: list[Rule]) -> dict[str, Tensor]:
    """Rename tensors from target to source names. Tensors that `translate` drops are missing in the result.

    Raises:
        UnknownName: no rule leads to a name, or more than one.
        KeyError: parts of a split tensor are missing.
    """
    parts: dict[str, dict[int, Tensor]] = {}
    back = {}
    for name, tensor in state.items():
        rule, number, fields = _find_rule(name, rules, _targets)
        source = rule.source.format(**fields)
        parts.setdefault(source, {})[number] = rule.convert_back(tensor) if rule.convert_back else tensor
        if len(parts[source]) == len(_targets(rule)):
            whole = parts.pop(source)
            back[source] = whole[0] if len(whole) == 1 else torch.cat([whole[i] for i in sorted(whole)])
    if parts:
        raise KeyError(f"parts are missing of {sorted(parts)[:3]}")
    return back


def count_indices(names: Iterable[str], pattern: str) -> int:
    """Number of different indices that the group of `pattern` has at the start of names.

    Raises:
        ConversionError: the indices are not 0, 1, 2, ... without gaps.
    """
    found = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    if found and max(found) >= len(found):
        raise ConversionError(
            f"The tensor names that match {pattern!r} have gaps in their numbers; the checkpoint is incomplete."
        )
    return len(found)
