"""Everything that is particular to a project stands in the file of that project."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

import dino_hf.conversion
from dino_hf.conversion.errors import ConversionError
from dino_hf.conversion.options import PROJECT_NAMES
from dino_hf.conversion.projects.registry import PROJECTS, find_project, recognise
from toy_checkpoints import original_tensors

FOLDER = Path(dino_hf.conversion.__file__).parent


def compared_names(text: str) -> set[str]:
    """Names of projects in comparisons."""
    return {
        part.value
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Compare)
        for operand in (node.left, *node.comparators)
        for part in ast.walk(operand)
        if isinstance(part, ast.Constant) and part.value in PROJECT_NAMES
    }


def test_the_options_name_every_project():
    assert tuple(PROJECTS) == PROJECT_NAMES
    assert [project.name for project in PROJECTS.values()] == list(PROJECT_NAMES)


@pytest.mark.parametrize("name", PROJECT_NAMES)
def test_a_published_checkpoint_belongs_to_its_project(name):
    assert {row.project for row in import_module(f"dino_hf.conversion.published_{name}").PUBLISHED} == {name}
    assert (FOLDER / "projects" / f"{name}.py").is_file()


@pytest.mark.parametrize("file", sorted(FOLDER.rglob("*.py")), ids=lambda file: file.stem)
def test_no_file_compares_the_name_of_a_project(file):
    assert compared_names(file.read_text(encoding="utf-8")) == set()


def test_a_planted_comparison_is_found():
    assert compared_names("if project == 'detrex' or name in ('mmdet', 'x'):\n    pass") == {"detrex", "mmdet"}


def test_only_the_own_project_recognises_a_file():
    names = original_tensors()
    assert recognise(names) is PROJECTS["original"]
    assert [project.name for project in PROJECTS.values() if project.recognises(names)] == ["original"]
    assert recognise(["backbone.cls_token"]) is None


def test_an_unknown_project_is_refused_with_the_choices():
    with pytest.raises(ConversionError, match="no project 'detectron'; choose one of original, detrex, mmdet"):
        find_project("detectron")
