"""The packages that pyproject.toml declares are those that the code imports."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}  # imported name -> name in a package index, if they differ
WITH_TORCH = {"triton"}  # installed by torch where there is a CUDA build
NOT_IMPORTED_BY_US = {"tensorboard"}  # transformers' Trainer imports it


def name_of(requirement: str) -> str:
    return re.match(r"[\w-]+", requirement)[0]


def imported_packages(code: str) -> set[str]:
    """Distributions of all absolute imports, wherever they stand."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return {DISTRIBUTIONS.get(name, name) for name in names - sys.stdlib_module_names - {"dino_hf"}}


@pytest.fixture(scope="module")
def imported() -> set[str]:
    files = (ROOT / "src").rglob("*.py")
    return set().union(*(imported_packages(file.read_text(encoding="utf-8")) for file in files))


def of_extras(*names: str) -> set[str]:
    return {name_of(requirement) for name in names for requirement in EXTRAS[name]}


# Read only if a user brings objects of these packages. So the user has them already.
OF_USERS = {"albumentations"}


def test_what_is_imported_is_declared(imported):
    needed = {name_of(requirement) for requirement in PROJECT["dependencies"]}
    optional = of_extras("timm", "video", "kernels", "onnx", "lora", "tensorboard")
    assert sorted(imported - needed - optional - WITH_TORCH - OF_USERS) == []


def test_what_is_declared_is_imported(imported):
    needed = {name_of(requirement) for requirement in PROJECT["dependencies"]}
    optional = of_extras("timm", "video", "onnx", "lora", "tensorboard")
    assert sorted((needed | optional) - imported - NOT_IMPORTED_BY_US - REASONS.keys()) == []


# Declared though no import statement of ours names them.
REASONS = {
    "timm": "transformers' timm backbones import it",
    "onnxscript": "torch.onnx.export imports it",
}


def test_an_undeclared_import_would_be_found():
    assert imported_packages(
        "import numpy as np\ntry:\n    from requests import get\nexcept ImportError:\n    pass"
    ) == {
        "numpy",
        "requests",
    }


def test_each_dependency_has_a_lower_bound():
    requirements = [*PROJECT["dependencies"], *(one for extra in EXTRAS.values() for one in extra)]
    assert [one for one in requirements if not re.search(r">=\d", one) and not one.startswith("dino_hf[")] == []


def test_the_extra_of_the_documentation_is_what_make_docs_installs():
    lines = (ROOT / "requirements/docs.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(line for line in lines if not line.startswith("#")) == sorted(EXTRAS["docs"])


def test_the_version_is_the_same_everywhere():
    assert f"version: {PROJECT['version']}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
