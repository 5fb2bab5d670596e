"""Whether two versions of a model are told apart by what matters, and by nothing else."""

import pytest
import torch

from dino_hf.export.comparison import TOLERANCES, Difference, check_difference, compare_predictions


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
    with pytest.raises(ValueError, match=r"^it differs from the model by 0\.\d+ in scores and .* 0\.001 is allowed\.$"):
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


def test_the_worst_in_several_folders_batches_counts():
    total = Difference(0.1, 0.3, 4, 1) + Difference(0.2, 0.1, 5, 2)
    assert total == Difference(0.2, 0.3, 9, 3)
    check_difference(total, 0.3, "it")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("is_found_too", [False, True])
def test_a_model_of_values_that_are_no_numbers_is_never_equal(predictions, value, part, is_found_too):
    broken = [x.clone() for x in predictions]
    broken[part][1, 2, 0] = value
    with pytest.raises(ValueError, match="NaN or infinite values, so it cannot be compared"):
        compare_predictions(broken, broken if is_found_too else predictions)


def test_a_difference_of_nan_is_refused():
    with pytest.raises(ValueError, match="differs from the model"):
        check_difference(Difference(0.0, float("nan"), 3, 1), 0.01, "it")
    check_difference(Difference(0.01, 0.01, 3, 1), 0.01, "it")
    with pytest.raises(ValueError, match="differs from the model"):
        check_difference(Difference(0.0101, 0.0, 3, 1), 0.01, "it")


def test_what_has_a_score_of_030_counts_and_what_has_less_does_not():
    """An image of 12 detections: 11 above 0.3, so that the 10 best are not all, and one at the border."""
    for score, counted in ((0.3001, 12), (0.2999, 11)):
        logits = torch.full((2, 12, 1), 3.0)
        logits[:, 11] = torch.tensor(score).logit()
        boxes = torch.rand(2, 12, 4, generator=torch.Generator().manual_seed(0))
        assert compare_predictions((logits, boxes), (logits, boxes)).num_detections == 2 * counted


def test_at_least_the_ten_best_of_an_image_count():
    logits = torch.linspace(-5, -3, 40).reshape(1, 20, 2).repeat(2, 1, 1)
    boxes = torch.full((2, 20, 4), 0.5)
    assert compare_predictions((logits, boxes), (logits, boxes)).num_detections == 20


@pytest.mark.parametrize(("rank", "is_found"), [(299, True), (300, False)])
def test_a_partner_is_looked_for_among_the_300_best(rank, is_found):
    """In the other version the same detection has fallen to this rank, by scores that are all but equal."""
    logits = torch.linspace(0.0, -1e-4, 400).double().reshape(1, 400, 1).repeat(2, 1, 1)
    boxes = torch.rand(2, 400, 4, generator=torch.Generator().manual_seed(0)).double()
    order = [*range(1, rank + 1), 0, *range(rank + 1, 400)]
    wanted = logits.clone()
    wanted[:, 10:] -= 5  # only the ten best count
    moved = compare_predictions((wanted, boxes), (logits, boxes[:, order]))
    assert (moved.box < 1e-3) is is_found


@pytest.mark.parametrize(("score", "count"), [(0.301, 12), (0.299, 11)])
def test_detections_count_from_a_score_of_0_3(score, count):
    logits = torch.full((1, 30, 2), -6.0)
    logits[0, :11, 0] = 2.0
    logits[0, 11, 1] = torch.tensor(score).logit()
    one = logits, torch.full((1, 30, 4), 0.5)
    assert compare_predictions(one, one).num_detections == count


@pytest.mark.parametrize(("num_better", "is_found"), [(299, True), (300, False)])
def test_a_partner_is_among_the_300_best_of_the_other_version(num_better, is_found):
    logits = torch.full((1, 400, 2), -30.0)
    logits[0, 1:, 0] = torch.arange(399, 0, -1) / 100 - 8
    logits[0, 0, 1] = 2.0
    weaker = logits.clone()
    weaker[0, 0, 1] = logits[0, num_better : num_better + 2, 0].mean()  # after the better ones of the other class
    boxes = torch.full((1, 400, 4), 0.5)
    difference = compare_predictions((logits, boxes), (weaker, boxes))
    assert (difference.score < 1) == is_found


def test_versions_may_differ_by_a_hundredth_and_in_half_precision_by_a_quarter():
    for dtype, allowed in ((torch.float32, 0.01), (torch.float16, 0.25)):
        check_difference(Difference(allowed, allowed, 10, 1), TOLERANCES[dtype], "it")
        for score, box in ((allowed + 1e-6, 0.0), (0.0, allowed + 1e-6)):
            with pytest.raises(ValueError, match="it differs from the model"):
                check_difference(Difference(score, box, 10, 1), TOLERANCES[dtype], "it")
