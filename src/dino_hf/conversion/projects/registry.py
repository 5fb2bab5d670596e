"""The projects whose checkpoints can be converted.

To add a project, write a subclass of `Project` in a file of its own, and list it here and in
conversion/options.py.
"""

from collections.abc import Iterable

from ..errors import ConversionError
from .aligndetr import AlignDetr
from .codetr import CoDetr, CoDetrMmdet
from .detrex import Detrex
from .mmdet import Mmdet
from .original import Original
from .project import Project
from .stabledino import StableDino

# The first project that recognises a file is taken: Stable-DINO has all tensors of detrex, and more. The tensors do not tell
# Align-DETR and detrex apart.
_ALL = (Original(), StableDino(), Detrex(), AlignDetr(), Mmdet(), CoDetrMmdet(), CoDetr())
PROJECTS: dict[str, Project] = {project.name: project for project in _ALL}


def recognise(names: Iterable[str]) -> Project | None:
    """The project of a checkpoint with these tensors; None if it is not a known DINO."""
    names = set(names)
    return next((project for project in PROJECTS.values() if project.recognises(names)), None)


def find_project(name: str) -> Project:
    """The project with this name.

    Raises:
        ConversionError: there is none.
    """
    if name not in PROJECTS:
        raise ConversionError(f"There is no project {name!r}; choose one of {', '.join(PROJECTS)}.")
    return PROJECTS[name]
