"""Whether two versions of a model are told apart by what matters, and by nothing else."""

import pytest
import torch

from dino_hf.export.comparison import Difference, check_difference, compare_predictions


@pytest.fixture
def predictions():
    """Two images, 40 queries, 5 classes: three sure detections in the first, none in the second."""
    generator = torch.Generator().manual_seed(0)
    logits = -4 + torch.rand(2, 40, 5, generator=generator)
    logits[0, [3, 17, 30], [2, 0, 2]] = torch.tensor([2.0, 1.0, 3.0])
    return logits, 0.2 + 0.4 * torch.rand(2, 40, 4, generator=generator)


def changed(predictions, query, *, logit=0.0, box=0.0, label=2):
    logits, boxes = (x.clone() for x in predictions)
    logits[0, query, label] += logit
    boxes[0, query, 0] += box
    return logits, boxes


def test_the_order_of_queries_is_no_difference(predictions):
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    shuffled = tuple(x[:, order] for x in predictions)
    # 3 sure ones are topped up to 10 in the first image; in the second, 10
    assert compare_predictions(predictions, shuffled) == Difference(0.0, 0.0, 20, 2)


def test_a_score_and_a_box_that_moved_are_measured(predictions):
    difference = compare_predictions(predictions, changed(predictions, 3, logit=0.1))
    moved = torch.tensor(2.1).sigmoid() - torch.tensor(2.0).sigmoid()
    # logits are float32
    assert difference.score == pytest.approx(moved.item(), abs=1e-6)
    assert difference.box == 0
    assert compare_predictions(predictions, changed(predictions, 3, box=0.01)).box == pytest.approx(0.01, abs=1e-6)


def test_what_is_unsure_and_not_among_the_best_does_not_count(predictions):
    least = predictions[0][0].amax(-1).argmin().item()
    assert compare_predictions(predictions, changed(predictions, least, box=0.3))[:2] == (0, 0)


@pytest.mark.parametrize("swap", [False, True])
def test_a_detection_that_only_one_version_has_is_found(predictions, swap):
    pair = predictions, changed(predictions, 3, logit=-20.0)
    difference = compare_predictions(*(pair[::-1] if swap else pair))
    assert difference.score > 0.5
    with pytest.raises(
        ValueError, match=r"^it differs from the model by 0\.\d+ in scores and .* allowed are 0\.001\.$"
    ):
        check_difference(difference, 1e-3, "it")


def test_another_class_is_another_detection(predictions):
    other = changed(changed(predictions, 3, logit=-20.0), 3, logit=6.0, label=4)
    assert compare_predictions(predictions, other).score > 0.5


def test_two_detections_may_not_have_one_partner(predictions):
    logits, boxes = (x.clone() for x in predictions)
    logits[0, 4], boxes[0, 4] = logits[0, 3], boxes[0, 3]
    assert compare_predictions((logits, boxes), predictions).score > 0.5


@pytest.mark.parametrize("part", [0, 1])
def test_what_is_not_finite_is_a_difference(predictions, part):
    broken = [x.clone() for x in predictions]
    broken[part][0] = torch.nan
    assert max(compare_predictions(predictions, tuple(broken))[:2]) > 0.5


def test_the_worst_of_several_batches_counts():
    total = Difference(0.1, 0.3, 4, 1) + Difference(0.2, 0.1, 5, 2)
    assert total == Difference(0.2, 0.3, 9, 3)
    check_difference(total, 0.3, "it")
