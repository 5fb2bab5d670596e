"""The mutation run finds the tests that reach a changed line."""

import ast
import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parent / "scripts" / "forked_tests.py"

MODULE = """
LIMIT = 3
_SHARE = 2


def half(text):
    try:
        number = int(text)
    except ValueError:
        return None
    if number > LIMIT:
        return number
    return number / _SHARE
"""
TESTS = {
    "number": (0.1, [6, 7, 8, 11, 13]),
    "large": (0.2, [6, 7, 8, 11, 12]),
    "text": (0.3, [6, 7, 8, 9, 10]),
    "other": (0.0, []),
}


@pytest.fixture(scope="module")
def forked_tests():
    spec = importlib.util.spec_from_file_location("forked_tests", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("old", "new", "chosen"),
    [
        ("except ValueError", "except KeyError", ["text"]),
        ("return None", "return 0", ["text"]),
        ("number > LIMIT", "number < LIMIT", ["number", "large"]),
        ("return number\n", "return 0\n", ["large"]),
        ("number / _SHARE", "number * _SHARE", ["number"]),
        ("_SHARE = 2", "_SHARE = 3", ["number"]),
        ("LIMIT = 3", "LIMIT = 4", ["other", "number", "large", "text"]),
        ("half(text)", "half(text=0)", ["other", "number", "large", "text"]),
    ],
)
def test_a_change_is_tried_by_the_tests_that_reach_it(forked_tests, old, new, chosen):
    assert MODULE.count(old) == 1
    found = forked_tests.choose(MODULE, MODULE.replace(old, new), TESTS)
    assert found == chosen


def test_slow_tests_are_not_chosen(forked_tests):
    tests = TESTS | {"text": (forked_tests.LONGEST_TEST + 1, TESTS["text"][1])}
    assert forked_tests.choose(MODULE, MODULE.replace("None", "0"), tests) == []


def test_each_statement_and_handler_has_its_lines(forked_tests):
    lines = [list(some) for some in forked_tests.statements(ast.parse(MODULE))]
    assert sorted(lines) == [[2], [3], [6], [7], [8], [9], [10], [11], [12], [13]]
