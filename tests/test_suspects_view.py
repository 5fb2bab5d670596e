"""What of an image a picture of a suspicious box shows."""

import numpy as np
import pytest

from dino_hf.doctor.suspects import _view

SIZE = (120, 80)


@pytest.mark.parametrize(
    ("box", "low", "high"),
    [
        ((130, 10, 20, 30), (0, 0), (150, 80)),  # outside, but near: all of both
        ((-30, 10, 60, 30), (-30, 0), (120, 80)),
        ((10, -5000, 20, 30), (0, -40), (120, 80)),  # far out: the image stays most of the picture
        ((9e9, 10, 20, 30), (0, 0), (180, 80)),
        ((10, 10, 60, 50), (0, 0), (120, 80)),
        ((60, 40, 1, 1), (50.5, 30.5), (70.5, 50.5)),  # small: its surroundings
    ],
)
def test_the_image_and_the_box_are_in_the_view(box, low, high):
    shown = _view(np.array(box, dtype=float), SIZE, is_enlarged=False)
    np.testing.assert_allclose(shown, (low, high))
