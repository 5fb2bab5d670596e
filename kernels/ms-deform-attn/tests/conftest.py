"""Builds the kernel by kernels/build.py, once for all test processes, and loads it."""

import importlib.util
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]


def load(name: str, file: Path):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def builder():
    return load("_kernels_build", PROJECT.parent / "build.py")


@pytest.fixture(scope="session")
def build_folder(tmp_path_factory):
    """One folder for all workers of a parallel run."""
    folder = tmp_path_factory.getbasetemp()
    return (folder.parent if "popen-gw" in folder.name else folder) / "kernel"


def load_variant(builder, build_folder: Path, native: bool):
    variant = builder.build_variant(PROJECT, build_folder, native)
    return load(builder.kernel_id(PROJECT, native), variant / "__init__.py")


@pytest.fixture(scope="session")
def native(builder, build_folder):
    if builder.find_compiler() is None:
        pytest.skip("there is no C++ compiler")
    return load_variant(builder, build_folder, native=True)


@pytest.fixture(scope="session")
def universal(builder, build_folder):
    return load_variant(builder, build_folder, native=False)
