"""Settings of the training, and class names, in the content of a checkpoint file."""

import argparse
import ast
from pathlib import Path
from typing import Any

from .errors import ConversionError
from .plain_values import plain_value

_MAX_CLASSES = 100_000
_MAX_CONFIG = 2**21  # characters


def settings_of(content: dict, path: Path) -> tuple[dict, list[str] | None]:
    """Settings of the training and names of the classes, if the file has them.

    Raises:
        ConversionError: the settings have a wrong form.
    """
    args, meta = content.get("args"), content.get("meta")
    if args is not None and not isinstance(args, argparse.Namespace | dict):
        raise ConversionError(f"{path} has a {type(args).__name__} under 'args', not the settings of a training.")
    if isinstance(meta, dict):
        names = meta.get("CLASSES")  # mmdetection 2
        if isinstance(data_set := meta.get("dataset_meta"), dict):
            data_set = dict(dict.items(data_set))
            names = data_set.get("classes", data_set.get("CLASSES", names))
        names = [names] if isinstance(names, str) else names
        is_list = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
        is_list = is_list and len(names) <= _MAX_CLASSES
        return read_config_text(meta.get("cfg", meta.get("config"))), list(names) if is_list else None
    settings = vars(args) if isinstance(args, argparse.Namespace) else dict.items(args or {})
    return {str(name): plain_value(value) for name, value in dict(settings).items()}, None


def read_config_text(text) -> dict:
    """Read an mmengine configuration, which is Python code. Literals and calls of `dict` are read; nothing is run."""
    if not isinstance(text, str) or len(text) > _MAX_CONFIG:
        return {}
    try:
        statements = [statement for statement in ast.parse(text).body if isinstance(statement, ast.Assign)]
        return {
            statement.targets[0].id: _literal(statement.value)
            for statement in statements
            if isinstance(statement.targets[0], ast.Name)
        }
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}


def _literal(node: ast.expr):
    """Value of an expression of literals and `dict(...)`; None for any other expression."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {keyword.arg: _literal(keyword.value) for keyword in node.keywords if keyword.arg}
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {key.value: _literal(value) for key, value in pairs if isinstance(key, ast.Constant)}
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(element) for element in node.elts]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        return None


def value_at(settings: Any, path: str) -> Any:
    """The value at a path such as "train_cfg.0.assigner"; None if there is none. A number is a place in a list."""
    for name in path.split("."):
        if isinstance(settings, list) and name.isdecimal():
            settings = settings[int(name)] if int(name) < len(settings) else None
        else:
            settings = settings.get(name) if isinstance(settings, dict) else None
    return settings
