"""Values of any type."""

import math

import pytest

from dino_hf.common.values import is_number, short_repr


@pytest.mark.parametrize("value", [0, -3, 1.5, 10**300, 1e308])
def test_finite_numbers_are_numbers(value):
    assert is_number(value)


@pytest.mark.parametrize("value", [True, None, "1", math.nan, math.inf, -math.inf, 10**400, [1]])
def test_other_values_are_not_numbers(value):
    assert not is_number(value)


def test_any_value_has_a_short_repr():
    deep = []
    for _ in range(10**5):
        deep = [deep]
    for value in (deep, ["x" * 10**6] * 10**4, {n: n for n in range(10**5)}, 10**4000):
        assert len(short_repr(value)) < 1000
    assert short_repr({"$oid": "5"}) == "{'$oid': '5'}"
    assert short_repr("\ud800") == r"'\ud800'"
