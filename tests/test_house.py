"""The shipped files import downwards, and only what a machine that loads them from the Hub has."""

import ast
import re
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_import_files

import dino_hf
from dino_hf.model.own_backbones import OWN_MODEL_TYPES
from dino_hf.model.sharing import AUTO_MAP, auto_map_for, shipped_files

FLOORS = [
    {"package_warning", "backend_trial", "backbone_trials", "run_mode", "frozen_batch_norm", "own_backbones"},
    {
        "box_ops",
        "position_embedding",
        "feature_levels",
        "targets",
        "layers",
        "coco_classes",
        "config_checks",
        "timm_backbones",
        "attention_backends",
        "sharing",
    },
    {"backbone_stages"},
    {"configuration_dino_detr", "attention_operators", "heads", "matcher", "nms", "canvas"},
    {"configuration_focalnet", "configuration_internimage", "configuration_vit_pyramid"},
    {"ms_deform_attn", "quality_losses", "post_processing_mixin"},
    {"backbone", "encoder", "query_selection", "denoising", "decoder", "criterion", "image_processing_mixin"},
    {"backbone_focalnet", "backbone_internimage", "backbone_vit_pyramid"},
    {"modeling_dino_detr", "image_processing_dino_detr", "image_processing_pil_dino_detr"},
    {"dino_detr"},
    set(OWN_MODEL_TYPES),
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
PACKAGES = {"torch", "torchvision", "transformers", "huggingface_hub"} | sys.stdlib_module_names
GUARDED_PACKAGES = {"scipy"}

FOLDER = Path(dino_hf.__file__).parent
MODEL = FOLDER / "model"
SHIPPED = sorted(file for file in MODEL.glob("*.py") if file.stem != "__init__")

REFERENCES = [one for entry in AUTO_MAP.values() for one in (entry.values() if isinstance(entry, dict) else [entry])]

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


def code_of_own_backbones(*model_types: str) -> set[str]:
    names = [model_type.removeprefix("dino_detr_") for model_type in model_types]
    return {f"{part}_{name}" for name in names for part in ("dino_detr", "configuration", "backbone")}


def test_auto_map_names_one_file_that_imports_all_others():
    """The loader of the Hub copies what it finds from that file on."""
    assert {reference.split(".")[0] for reference in REFERENCES} == {"dino_detr"}
    found = {Path(name).stem for name in get_relative_import_files(MODEL / "dino_detr.py")} | {"dino_detr"}
    assert found == set(FLOOR_OF) - code_of_own_backbones(*OWN_MODEL_TYPES)


@pytest.mark.parametrize("model_type", OWN_MODEL_TYPES)
def test_a_detector_on_an_own_backbone_ships_the_code_of_this_backbone_only(model_type):
    shared = {file.stem for file in shipped_files()}
    assert {file.stem for file in shipped_files(model_type)} - shared == code_of_own_backbones(model_type)
    auto_map = auto_map_for(model_type)
    assert auto_map.keys() == AUTO_MAP.keys()
    assert {auto_map[name].split(".")[0] for name in AUTO_MAP if name != "AutoImageProcessor"} == {model_type}


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


# A room imports only rooms of lower floors. The files beside the rooms, `__init__.py` and `__main__.py`, stand above all.
ROOMS = {
    "model": 0,
    "common": 1,
    "runtime": 2,
    "data": 3,
    "conversion": 3,
    "doctor": 4,
    "inference": 4,
    "evaluation": 5,
    "training": 6,
    "export": 7,
    "run": 8,
    "cli": 9,
}
EVERY_FILE = sorted(file for file in FOLDER.rglob("*.py") if "_kernels" not in file.parts)


def own_imports(parts: tuple[str, ...], text: str) -> list[tuple[str, ...]]:
    """What a module imports of this package, each as a path below it: ("data", "load").

    Args:
        parts: path of the module below the package; of an `__init__.py`, with that name.
    """
    found = []
    for node, _ in imports(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [tuple(alias.name.split("."))[1:] for alias in node.names if alias.name.split(".")[0] == "dino_hf"]
            continue
        if node.level:
            module = (*parts[: len(parts) - node.level], *(node.module.split(".") if node.module else ()))
        elif node.module.split(".")[0] == "dino_hf":
            module = tuple(node.module.split("."))[1:]
        else:
            continue
        # "from . import x" names a file, if there is one of that name.
        files = [(*module, alias.name) for alias in node.names]
        found += [one if FOLDER.joinpath(*one).with_suffix(".py").is_file() else module for one in files]
    return found


def upward_imports(parts: tuple[str, ...], text: str) -> list[str]:
    """Imports of a room's file that go to its own floor or higher, or to the package itself."""
    room = parts[0]
    return [
        f"{'.'.join(parts)} imports dino_hf.{'.'.join(one)}"
        for one in own_imports(parts, text)
        if not one or (one[0] != room and ROOMS.get(one[0], 99) >= ROOMS[room])
    ]


def circles(imported: dict[str, set[str]]) -> list[str]:
    """Names that lead back to themselves."""

    def reached(name: str) -> set[str]:
        seen, waiting = set(), [name]
        while waiting:
            for other in imported.get(waiting.pop(), ()):
                if other not in seen:
                    seen.add(other)
                    waiting.append(other)
        return seen

    return sorted(name for name in imported if name in reached(name))


def module_parts(file: Path) -> tuple[str, ...]:
    return file.relative_to(FOLDER).with_suffix("").parts


def imports_inside(room: str) -> dict[str, set[str]]:
    """File of a room -> files of the same room that it imports. Files have their paths below the room."""
    found = {}
    for file in sorted((FOLDER / room).rglob("*.py")):
        parts = module_parts(file)
        names = [one for one in own_imports(parts, file.read_text(encoding="utf-8")) if one[:1] == (room,)]
        files = [(*one, "__init__") if FOLDER.joinpath(*one).is_dir() else one for one in names]
        found["/".join(parts[1:])] = {"/".join(one[1:]) for one in files}
    return found


def test_every_room_has_a_floor():
    rooms = {file.parent.name for file in FOLDER.glob("*/__init__.py")}
    assert rooms == set(ROOMS)


@pytest.mark.parametrize(
    "file", [file for file in EVERY_FILE if file.parent != FOLDER], ids=lambda file: "/".join(module_parts(file))
)
def test_rooms_import_only_lower_rooms(file):
    assert upward_imports(module_parts(file), file.read_text(encoding="utf-8")) == []


def test_the_page_about_the_architecture_has_the_same_floors():
    page = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert {room: int(floor) for floor, room in re.findall(r"^\| (\d) \| `(\w+)/` \|", page, re.MULTILINE)} == ROOMS


@pytest.mark.parametrize("room", ROOMS)
def test_files_of_a_room_form_no_circle(room):
    assert circles(imports_inside(room)) == []


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        ("from .keys import KeyNumbers", True),
        ("from ..common.text import printable", True),
        ("from ..model import box_ops", True),
        ("import rich.console", True),
        ("from dino_hf.common import images", True),
        ("from ..training.trainer import DinoDetrTrainer", False),
        ("from ..doctor import inspect", False),
        ("from .. import doctor", False),
        ("from .. import DinoDetrConfig", False),
        ("import dino_hf", False),
        ("import dino_hf.cli.app", False),
        ("def f():\n    from dino_hf.training import x", False),
        ("def f():\n    from ..run import train", False),
    ],
)
def test_a_planted_arrow_upwards_is_found(text, is_right):
    assert (upward_imports(("data", "load"), text) == []) is is_right


def test_a_planted_circle_is_found():
    imported = imports_inside("data") | {"raw": {"load"}}
    assert {"raw", "load"} <= set(circles(imported))
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize(
    "text",
    [
        "from .decoder import DinoDetrDecoder",  # the same floor
        "from .modeling_dino_detr import DinoDetrModel",  # a higher one
        "from . import box_ops",
        "from .parts.recipe import x",
        "from ..box_ops import x",
        "import dino_hf",
        "from dino_hf.model.box_ops import x",
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
