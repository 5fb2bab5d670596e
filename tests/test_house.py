"""The shipped files import downwards, and only what a machine that loads them from the Hub has."""

import ast
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_import_files

import dino_hf
from dino_hf.sharing import AUTO_MAP

FLOORS = [
    {"package_warning", "backend_trial", "backbone_trials", "cpu_speed"},
    {
        "box_ops",
        "card_text",
        "position_embedding",
        "feature_levels",
        "gather_attention",
        "targets",
        "layers",
        "coco_classes",
        "config_checks",
        "timm_backbones",
        "attention_backends",
        "sharing",
    },
    {"configuration_dino_detr", "ms_deform_attn", "heads", "matcher", "model_card"},
    {"recording"},
    {"backbone", "encoder", "query_selection", "denoising", "decoder", "criterion", "box_processing"},
    {"modeling_dino_detr", "image_processing_dino_detr", "image_processing_pil_dino_detr"},
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
PACKAGES = {"torch", "torchvision", "transformers", "huggingface_hub"} | sys.stdlib_module_names
GUARDED_PACKAGES = {"scipy"}

FOLDER = Path(dino_hf.__file__).parent
SHIPPED = sorted(file for file in FOLDER.glob("*.py") if file.stem not in ("__init__", "__main__"))

REFERENCES = [one for entry in AUTO_MAP.values() for one in (entry.values() if isinstance(entry, dict) else [entry])]

every_shipped_file = pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)


def is_guard(node: ast.AST) -> bool:
    """`try:` or `if is_..._available():`, below which the loader of the Hub does not require a package."""
    if isinstance(node, ast.Try):
        return True
    test = node.test if isinstance(node, ast.If) else None
    return isinstance(test, ast.Call) and ast.unparse(test.func).endswith("_available")


def is_never_run(node: ast.AST) -> bool:
    """What sharing.py names, so that it travels."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(node: ast.AST, guarded: bool = False, also_never_run: bool = False):
    """Every import statement below `node`, and whether a guard stands above it."""
    for child in ast.iter_child_nodes(node):
        if is_never_run(child) and not also_never_run:
            continue
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, guarded
        yield from imports(child, guarded or is_guard(child), also_never_run)


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
    statements = {node.lineno for node, _ in imports(ast.parse(text), also_never_run=True)}
    lines = {
        number for number, line in enumerate(text.splitlines(), 1) if line.strip().startswith(("from .", "import ."))
    }
    assert lines <= statements


@every_shipped_file
def test_only_sharing_names_files_that_it_does_not_import(file):
    assert any(map(is_never_run, ast.walk(ast.parse(file.read_text())))) == (file.stem == "sharing")


@pytest.mark.parametrize("stem", sorted({ref.split(".")[0] for ref in REFERENCES} | {"sharing"}))
def test_whatever_is_loaded_first_has_every_file_beside_it(stem):
    """The loader of the Hub copies what it finds from one file on; what is saved again from there must be whole."""
    found = {Path(name).stem for name in get_relative_import_files(FOLDER / f"{stem}.py")} | {stem}
    assert found == set(FLOOR_OF)


@pytest.mark.parametrize("file", sorted(FOLDER.rglob("*.py")), ids=lambda file: str(file.relative_to(FOLDER)))
def test_our_warnings_have_our_category(file):
    """By it the test suite, and users, tell them from those of other packages."""
    calls = [
        node
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn"
    ]
    categories = {ast.unparse(call.args[1]) if len(call.args) > 1 else "none" for call in calls}
    assert categories <= {"DinoDetrWarning"}, f"{file.name}: warnings.warn(message, DinoDetrWarning, stacklevel=...)"


COMMON = sorted((FOLDER / "common").glob("*.py"))


def wrong_imports_of_common(text: str) -> list[str]:
    """Imports of ours that are neither in `common` nor on the lowest shipped floors."""
    low = {f"..{name}" for floor in FLOORS[:2] for name in floor}
    found = [
        "." * node.level + (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node, _ in imports(ast.parse(text))
    ]
    return [
        name
        for name in found
        if name.split(".")[0] == "dino_hf"
        or (name.startswith(".") and not name.startswith("..") and "." in name[1:])
        or (name.startswith("..") and name not in low)
    ]


@pytest.mark.parametrize("file", COMMON, ids=lambda file: file.stem)
def test_common_imports_only_what_is_below(file):
    assert wrong_imports_of_common(file.read_text()) == []


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        ("from .text import printable", True),
        ("from ..card_text import one_line", True),
        ("import rich.console", True),
        ("from ..data.load import load_data", False),
        ("from ..modeling_dino_detr import DinoDetrModel", False),
        ("from .. import data", False),
        ("import dino_hf", False),
        ("def f():\n    from dino_hf.data import x", False),
    ],
)
def test_an_import_of_a_higher_floor_in_common_is_found(text, is_right):
    assert (wrong_imports_of_common(text) == []) is is_right


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
