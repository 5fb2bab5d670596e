import pytest
import torch
from torchvision.ops import generalized_box_iou

from dino_hf.model.box_ops import cxcywh_to_xyxy, generalized_iou, inverse_sigmoid, refine_boxes, xyxy_to_cxcywh


def random_boxes(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, 4, dtype=torch.float64) + torch.tensor([0.0, 0.0, 0.05, 0.05])


def test_corner_form_of_a_known_box():
    boxes = torch.tensor([[0.5, 0.4, 0.2, 0.6]], dtype=torch.float64)
    torch.testing.assert_close(cxcywh_to_xyxy(boxes), torch.tensor([[0.4, 0.1, 0.6, 0.7]], dtype=torch.float64))


def test_corner_form_and_back_is_the_same_box():
    boxes = random_boxes(2, 3)
    torch.testing.assert_close(xyxy_to_cxcywh(cxcywh_to_xyxy(boxes)), boxes)


def test_generalized_iou_of_all_pairs_agrees_with_torchvision():
    a, b = cxcywh_to_xyxy(random_boxes(7)), cxcywh_to_xyxy(random_boxes(5))
    torch.testing.assert_close(generalized_iou(a[:, None], b), generalized_box_iou(a, b), rtol=0, atol=1e-12)


def test_generalized_iou_of_pairs_is_the_diagonal_of_all_pairs():
    a, b = cxcywh_to_xyxy(random_boxes(6)), cxcywh_to_xyxy(random_boxes(6))
    torch.testing.assert_close(generalized_iou(a, b), generalized_iou(a[:, None], b).diagonal())


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([0, 0, 2, 1], [0, 0, 2, 1], 1.0),
        ([0, 0, 2, 1], [1, 0, 3, 1], 1 / 3),  # the hull has no gap
        ([0, 0, 1, 1], [3, 0, 4, 1], -0.5),  # half of the hull belongs to neither
        ([0, 0, 1, 1], [0, 0, 0, 0], 0.0),  # an empty box inside another
    ],
)
def test_generalized_iou_of_known_pairs(a, b, expected):
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    assert generalized_iou(a, b).item() == pytest.approx(expected)


def test_generalized_iou_of_two_empty_boxes_on_one_spot_is_finite_with_its_gradient():
    boxes = torch.full((2, 4), 0.3, requires_grad=True)
    result = generalized_iou(boxes, boxes.detach())
    result.sum().backward()
    assert result.isfinite().all()
    assert boxes.grad.isfinite().all()


def test_generalized_iou_of_boxes_with_negative_size_is_finite():
    inverted = torch.tensor([0.6, 0.6, 0.2, 0.4])  # corners swapped: no prediction is so, for sizes are sigmoids
    assert generalized_iou(inverted, torch.tensor([0.1, 0.2, 0.7, 0.9])).isfinite()


def test_inverse_sigmoid_is_the_logit_away_from_the_ends():
    x = torch.linspace(0.001, 0.999, 50, dtype=torch.float64)
    torch.testing.assert_close(inverse_sigmoid(x), torch.logit(x))


def test_inverse_sigmoid_clips_at_one_thousandth():
    bound = torch.tensor(1000.0, dtype=torch.float64).log()  # log(1 / 1e-3): the release's eps, not its siblings' 1e-5
    x = torch.tensor([-0.5, 0.0, 1.0, 1.5], dtype=torch.float64)
    torch.testing.assert_close(inverse_sigmoid(x), torch.stack([-bound, -bound, bound, bound]))


def test_boxes_refined_by_nothing_stay():
    boxes = 0.01 + 0.98 * torch.rand(3, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(refine_boxes(boxes, torch.zeros_like(boxes)), boxes)


def test_boxes_are_refined_in_logit_space():
    boxes, delta = torch.tensor([0.25, 0.5, 0.8, 0.1]), torch.tensor([1.0, -2.0, 0.5, 0.0])
    expected = 1 / (1 + (1 - boxes) / boxes * (-delta).exp())
    torch.testing.assert_close(refine_boxes(boxes, delta), expected)


def test_refined_boxes_stay_inside_and_in_float32():
    refined = refine_boxes(torch.rand(2, 3, 4), 50 * torch.randn(2, 3, 4, dtype=torch.bfloat16))
    assert refined.dtype == torch.float32
    assert ((refined >= 0) & (refined <= 1)).all()
