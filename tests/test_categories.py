"""Splits whose categories are numbered one by one."""

from dino_hf.data.categories import merge_categories
from dino_hf.data.raw import RawSplit

FIRST = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]


def split_of(*category_ids: int) -> RawSplit:
    return RawSplit("validation", "val.json", [], [{"category_id": one} for one in category_ids])


def merged(split: RawSplit, own: list[dict]) -> tuple[list[int], list[dict], list[str]]:
    categories = [dict(entry) for entry in FIRST]
    split, notes = merge_categories(categories, split, own)
    return [entry["category_id"] for entry in split.annotations], categories, notes


def test_the_same_numbers_stay():
    ids, categories, notes = merged(split_of(2, 5, 9), [{"id": 2, "name": "dog"}, {"id": 5, "name": "cow"}])
    assert ids == [2, 5, 9]  # 9 is unknown, and remains so
    assert [entry["name"] for entry in categories] == ["cat", "dog", "cow"]
    assert notes == []


def test_other_numbers_are_changed_by_name():
    own = [{"id": 1, "name": "cow"}, {"id": 2, "name": "cat"}, {"id": 3, "name": "dog"}]
    ids, categories, notes = merged(split_of(1, 2, 3), own)
    assert ids == [3, 1, 2]
    assert {entry["id"]: entry["name"] for entry in categories} == {1: "cat", 2: "dog", 3: "cow"}
    assert "numbered otherwise than in the first split" in notes[0]


def test_an_unknown_number_does_not_become_a_class_of_the_first_split():
    ids, categories, _ = merged(split_of(1, 2, 7), [{"id": 1, "name": "dog"}])
    assert ids[0] == 2
    assert not {ids[1], ids[2]} & {entry["id"] for entry in categories}
