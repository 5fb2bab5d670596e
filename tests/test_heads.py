import math

import pytest
import torch

from dino_hf.model.heads import DetectionHead, class_head
from helpers import randomize


def test_classes_start_at_a_probability_of_one_percent():
    head = class_head(32, 7)
    torch.testing.assert_close(head.bias, torch.full((7,), -math.log(99)))
    torch.testing.assert_close(head(torch.zeros(2, 3, 32)).sigmoid(), torch.full((2, 3, 7), 0.01))
    assert head.weight.any()


def test_boxes_start_where_they_are():
    assert not DetectionHead(32, 7).box_delta(torch.randn(2, 3, 32)).any()


def test_box_refinement_is_a_mlp_of_three_layers():
    head, x = randomize(DetectionHead(32, 7)), torch.randn(2, 3, 32)
    first, second, third = head.box_head.layers
    expected = third(second(first(x).relu()).relu())
    assert expected.shape == (2, 3, 4)
    torch.testing.assert_close(head.box_delta(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_boxes_are_refined_in_float32_and_classes_stay_in_the_precision_of_the_model(dtype):
    head, x = DetectionHead(32, 7).to(dtype), torch.randn(2, 3, 32, dtype=dtype)
    assert head.box_delta(x).dtype == torch.float32
    assert head.classify(x).dtype == dtype
    assert head.classify(x).shape == (2, 3, 7)
