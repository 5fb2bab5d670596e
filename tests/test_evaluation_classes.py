"""Classes of a model are found in the data by name, and never guessed."""

import numpy as np
import pytest

from dino_hf.evaluation.classes import map_classes
from dino_hf.training import CocoData


def data_of(*names, ids=None):
    return CocoData(None, dict(enumerate(names)), ids or list(range(10, 10 + len(names))), "toy")


def test_names_are_read_like_those_of_a_transfer():
    data = data_of("Dining_Table", "sofa", "cat")
    classes = map_classes({0: "N/A", 1: "couch", 4: "dining table", 7: "cat", 9: "horse"}, None, data)
    assert classes.category_ids == {1: 11, 4: 10, 7: 12}
    known, ids = classes.apply(np.array([4, 9, 0, 1, 1]))
    assert known.tolist() == [True, False, False, True, True]
    assert ids.tolist() == [10, 11, 11]
    assert not classes.notes


def test_two_classes_of_the_model_can_be_one_of_the_data():
    assert map_classes({0: "television", 1: "TV"}, None, data_of("tv", "cat")).category_ids == {0: 10, 1: 10}


def test_classes_that_the_model_does_not_know_are_told_in_one_line():
    classes = map_classes({0: "cat"}, None, data_of("cat", *[f"thing {i}" for i in range(7)]), "a/model")
    assert classes.unknown == [f"thing {i}" for i in range(7)]
    wanted = (
        "a/model does not know 7 of 8 classes of the data. Their AP is 0: "
        "'thing 0', 'thing 1', 'thing 2', 'thing 3', 'thing 4' and 2 more."
    )
    assert classes.notes == [wanted]


def test_placeholders_go_by_category_id_or_else_by_order():
    unnamed = {index: f"LABEL_{index}" for index in range(3)}
    data = data_of("cat", "dog", "eel", ids=[2, 5, 9])
    by_id, by_order = map_classes(unnamed, [5, 9, 2], data), map_classes(unnamed, None, data)
    assert by_id.category_ids == {0: 5, 1: 9, 2: 2}
    assert not by_id.notes
    assert by_order.category_ids == {0: 2, 1: 5, 2: 9}
    assert "Its 3 classes are matched by order with the classes of the data: 'cat', 'dog', 'eel'" in by_order.notes[0]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["a", "b"],
            r"The model knows none .* has 2 classes: 'a', 'b'. The data have 2: 'cat', 'dog'. Use the same names",
        ),
        (["a"], r"The model knows none .* has 1 classes: 'a'. The data have 2: 'cat', 'dog'. Use the same names"),
        (["LABEL_0"], r"The model knows none .* has 1 classes: 'LABEL_0'. The data have 2"),
    ],
)
def test_a_model_of_other_classes_is_refused(names, message):
    with pytest.raises(ValueError, match=message):
        map_classes(dict(enumerate(names)), None, data_of("cat", "dog"))
