"""Ids of images and categories, numbers or texts, as whole numbers."""

import pytest

from dino_hf.data.keys import KeyNumbers


@pytest.mark.parametrize(
    ("key", "number"),
    [
        (7, 7),
        (-3, -3),
        (0, 0),
        (2**63 - 1, 2**63 - 1),
        (-(2**63), -(2**63)),
        (2**63, None),
        (-(2**63) - 1, None),
        (7.0, 7),
        (7.5, None),
        (True, None),
        (None, None),
        ("", None),
        ([7], None),
        ("12", 12),
        ("-12", -12),
        ("0", 0),
        ({"$oid": "12"}, 12),
        ({"$oid": "12", "name": "x"}, None),
    ],
)
def test_whole_numbers_and_their_texts_stay_and_other_values_are_no_keys(key, number):
    assert KeyNumbers([], "id").number(key) == number


def test_other_texts_are_numbered_after_the_largest_number_in_their_order():
    keys = KeyNumbers([{"id": "b"}, {"id": 4}, "no entry", {"id": "a"}, {"id": "b"}, {"id": {"$oid": "007"}}], "id")
    assert [keys.number(key) for key in ("b", "a", {"$oid": "007"}, "007", 4)] == [5, 6, 7, 7, 4]
    assert keys.notes("image ids") == [
        "image ids are texts, such as 'b', and become numbers: 3 of them, from 5.",
    ]


def test_without_numbers_texts_begin_at_1_and_huge_numbers_do_not_count():
    keys = KeyNumbers([{"name": "b", "id": 9}, {"name": 2**62}, {"name": "a"}], "name")
    assert [keys.number(key) for key in ("b", "a")] == [1, 2]
    below = KeyNumbers([{"id": 2**62 - 1}, {"id": "a"}], "id")
    assert below.number("a") == 2**62


def test_an_unknown_text_gets_a_negative_number_of_its_own():
    keys = KeyNumbers([{"id": "a"}], "id")
    unknown = [keys.number(key) for key in ("x", "y", "x")]
    assert unknown == [-(2**62) - 1, -(2**62) - 2, -(2**62) - 1]
    assert keys.notes("ids") == ["ids are texts, such as 'a', and become numbers: 1 of them, from 1."]


def test_numbers_need_no_note_and_a_long_text_is_cut():
    assert KeyNumbers([{"id": 3}, {"id": "4"}], "id").notes("ids") == []
    [note] = KeyNumbers([{"id": "n" * 41}], "id").notes("ids")
    assert note == f"ids are texts, such as '{'n' * 40}', and become numbers: 1 of them, from 1."


@pytest.mark.parametrize(
    ("text", "number"), [("9" * 18, int("9" * 18)), ("9" * 19, None), ("9" * 20, 41), ("01", 41), ("1 ", 41)]
)
def test_texts_of_numbers_have_no_leading_zero_and_19_digits_at_most(text, number):
    assert KeyNumbers([{"id": 40}, {"id": text}], "id").number(text) == number
