"""Which warnings fail a test: ours do, those of other packages never."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MODULES = {
    "dino_hf_of_this_test.py": """
import warnings
import numpy as np
def divide(): return np.float64(1) / np.float64(0)
def warn_as(category, stacklevel): warnings.warn("a word", category, stacklevel=stacklevel)
""",
    "other_package.py": """
import warnings
def warn_as(category, stacklevel): warnings.warn("a word", category, stacklevel=stacklevel)
""",
    "dino_hf_caller.py": """
import other_package
def call(category): other_package.warn_as(category, 2)
""",
    "test_of_them.py": """
import pytest
import dino_hf_caller, dino_hf_of_this_test, other_package
from dino_hf.model.package_warning import DinoDetrWarning

def test_ours_fails(): dino_hf_of_this_test.warn_as(DinoDetrWarning, 1)
def test_ours_fails_wherever_it_points(): dino_hf_of_this_test.warn_as(DinoDetrWarning, 3)
def test_our_arithmetic_fails(): dino_hf_of_this_test.divide()
@pytest.mark.parametrize("category", [UserWarning, DeprecationWarning, FutureWarning, RuntimeWarning])
def test_theirs_passes(category): other_package.warn_as(category, 1)
@pytest.mark.parametrize("category", [UserWarning, DeprecationWarning, FutureWarning])
def test_theirs_passes_where_it_points_to_us(category): dino_hf_caller.call(category)
""",
}


def test_our_warnings_fail_a_test_and_those_of_others_do_not(pytester):
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    filters = "".join(f"    {line}\n" for line in settings["filterwarnings"])
    pytester.makeini(f"[pytest]\npythonpath = .\nfilterwarnings =\n{filters}")
    for name, text in MODULES.items():
        (pytester.path / name).write_text(text, encoding="utf-8")
    result = pytester.inline_run("-q", "-p", "no:cacheprovider")
    passed, _, failed = result.listoutcomes()
    assert sorted(report.nodeid.partition("::")[2] for report in failed) == [
        "test_our_arithmetic_fails",
        "test_ours_fails",
        "test_ours_fails_wherever_it_points",
    ]
    assert len(passed) == 7


def test_the_lock_holds_for_any_machine():
    """No address, no path, no build of torch for one kind of machine; and everything that pyproject.toml names."""
    lines = (ROOT / "requirements/locked.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split(" ;")[0].split("==") for line in lines if not line.startswith("#"))
    assert not [line for line in lines if "://" in line or "@" in line or "+" in line or "--" in line]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: group for name, group in project["optional-dependencies"].items() if name != "docs"}  # not locked
    wanted = [*project["dependencies"], *(one for group in extras.values() for one in group)]
    wanted = [one.replace("_", "-") for one in wanted if not one.startswith("dino_hf[")]
    names = {one.split(">=")[0] for one in wanted}
    assert names <= set(pins)
    for name, lowest in (one.split(">=") for one in wanted if ">=" in one):
        assert as_numbers(pins[name]) >= as_numbers(lowest), name


def as_numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


@pytest.mark.parametrize(("target", "stamp"), [("test", "installed"), ("demo", "for-demo")])
def test_the_first_commands_install_what_is_locked(target, stamp):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"\n{target}: $(VENV)/{stamp}\n" in makefile
    recipe = makefile.partition(f"\n$(VENV)/{stamp}: ")[2].partition("\n\n")[0]
    assert recipe.startswith("pyproject.toml requirements/locked.txt\n")
    assert "--constraint requirements/locked.txt" in recipe
