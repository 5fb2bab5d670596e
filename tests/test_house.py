"""The shipped files import downwards, and only what a machine that loads them from the Hub has."""

import ast
import sys
from pathlib import Path

import pytest

import dino_hf

FLOORS = [
    {
        "box_ops",
        "position_embedding",
        "feature_levels",
        "targets",
        "layers",
        "recording",
        "coco_classes",
        "attention_backends",
    },
    {"configuration_dino_detr", "ms_deform_attn", "heads", "matcher"},
    {"backbone", "encoder", "query_selection", "denoising", "decoder", "criterion", "box_processing"},
    {"modeling_dino_detr", "image_processing_dino_detr", "image_processing_pil_dino_detr"},
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
PACKAGES = {"torch", "torchvision", "transformers", "huggingface_hub"} | sys.stdlib_module_names
GUARDED_PACKAGES = {"scipy"}

FOLDER = Path(dino_hf.__file__).parent
SHIPPED = sorted(file for file in FOLDER.glob("*.py") if file.stem != "__init__")

every_shipped_file = pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)


def is_guard(node: ast.AST) -> bool:
    """`try:` or `if is_..._available():`, below which the loader of the Hub does not require a package."""
    if isinstance(node, ast.Try):
        return True
    test = node.test if isinstance(node, ast.If) else None
    return isinstance(test, ast.Call) and ast.unparse(test.func).endswith("_available")


def imports(node: ast.AST, guarded: bool = False):
    """Every import statement below `node`, and whether a guard stands above it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, guarded
        yield from imports(child, guarded or is_guard(child))


def wrong_imports(stem: str, text: str) -> list[str]:
    wrong = []
    for node, guarded in imports(ast.parse(text)):
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and node.level:
            module = node.module or ""  # "from . import x": the loader would not copy x
            if node.level > 1 or FLOOR_OF.get(module, 99) >= FLOOR_OF[stem]:
                wrong.append(f"{stem}:{node.lineno} imports {'.' * node.level}{module}")
            continue
        if isinstance(node, ast.ImportFrom):
            if node.module == "__future__" and "annotations" in names:
                wrong.append(f"{stem}:{node.lineno} turns annotations into strings, which configurations cannot check")
            names = [node.module]
        allowed = PACKAGES | GUARDED_PACKAGES if guarded else PACKAGES
        wrong += [f"{stem}:{node.lineno} imports {name}" for name in names if name.split(".")[0] not in allowed]
    return wrong


def test_every_shipped_file_has_a_floor_and_every_floor_its_files():
    assert {file.stem for file in SHIPPED} == set(FLOOR_OF)


@every_shipped_file
def test_imports_go_down_and_to_what_the_hub_has(file):
    assert wrong_imports(file.stem, file.read_text()) == []


@every_shipped_file
def test_no_line_of_text_looks_like_an_import(file):
    """The loader of the Hub searches lines, not statements: one in a docstring would be followed too."""
    text = file.read_text()
    statements = {node.lineno for node, _ in imports(ast.parse(text))}
    lines = {
        number for number, line in enumerate(text.splitlines(), 1) if line.strip().startswith(("from .", "import ."))
    }
    assert lines <= statements


@pytest.mark.parametrize(
    "text",
    [
        "from .decoder import DinoDetrDecoder",  # the same floor
        "from .modeling_dino_detr import DinoDetrModel",  # a higher one
        "from . import box_ops",
        "from .training.recipe import x",
        "from ..box_ops import x",
        "import dino_hf",
        "from dino_hf.box_ops import x",
        "import numpy as np",
        "def f():\n    import numpy",
        "import scipy",
        "def f():\n    from scipy.optimize import linear_sum_assignment",
        "from __future__ import annotations",
        "try:\n    import timm\nexcept ImportError:\n    pass",
    ],
)
def test_a_wrong_import_is_found(text):
    assert wrong_imports("encoder", text) != []


@pytest.mark.parametrize(
    "text",
    [
        "from .box_ops import x",
        "from .heads import x",
        "import math",
        "from collections.abc import Sequence",
        "import torch.nn.functional as F",
        "if is_scipy_available():\n    from scipy.optimize import linear_sum_assignment",
        "try:\n    import scipy\nexcept ImportError:\n    scipy = None",
    ],
)
def test_a_right_import_passes(text):
    assert wrong_imports("encoder", text) == []
