import itertools
import math

import pytest
import torch

from dino_hf.model import matcher
from dino_hf.model.matcher import CostWeights, Matches, NonFinitePredictionsError, match, matching_cost, repeat_matches
from dino_hf.model.targets import Targets, collect_targets
from helpers import NUM_LABELS, tiny_labels

WEIGHTS = CostWeights(2.0, 5.0, 2.0)
ALPHA = 0.25


def random_case(*counts, layers=2, queries=4):
    logits = torch.randn(layers, len(counts), queries, NUM_LABELS)
    boxes = 0.2 + 0.5 * torch.rand(layers, len(counts), queries, 4)
    return logits, boxes, collect_targets(tiny_labels(*counts), len(counts), NUM_LABELS, "cpu")


def slow_giou(a, b):
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = (
        (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2) for cx, cy, w, h in (a, b)
    )
    overlap = max(0.0, min(ax1, bx1) - max(ax0, bx0)) * max(0.0, min(ay1, by1) - max(ay0, by0))
    union = a[2] * a[3] + b[2] * b[3] - overlap
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    return overlap / union - (hull - union) / hull


def slow_cost(logits, box, label, target_box):
    """One query against one target, in Python's doubles."""
    prob = 1 / (1 + math.exp(-logits[label]))
    positive = ALPHA * (1 - prob) ** 2 * -math.log(prob + 1e-8)
    negative = (1 - ALPHA) * prob**2 * -math.log(1 - prob + 1e-8)
    l1 = sum(abs(p - q) for p, q in zip(box, target_box, strict=True))
    return 2 * (positive - negative) + 5 * l1 - 2 * slow_giou(box, target_box)


def slow_costs(logits, boxes, targets):
    """{(layer, image): rows of queries over the image's targets}"""
    ends = list(itertools.accumulate(targets.counts))
    return {
        (layer, image): [
            [
                slow_cost(
                    logits[layer, image, query].tolist(),
                    boxes[layer, image, query].tolist(),
                    int(targets.class_labels[target]),
                    targets.boxes[target].tolist(),
                )
                for target in range(end - count, end)
            ]
            for query in range(logits.shape[2])
        ]
        for layer in range(len(logits))
        for image, (count, end) in enumerate(zip(targets.counts, ends, strict=True))
    }


def test_the_cost_agrees_with_a_loop_over_pairs():
    logits, boxes, targets = random_case(3, 0, 2)
    cost = matching_cost(logits, boxes, targets, WEIGHTS, ALPHA)
    assert cost.shape == (2, 3, 3 + 1, 4)
    for (layer, image), rows in slow_costs(logits, boxes, targets).items():
        expected = torch.tensor(rows).reshape(4, targets.counts[image])
        # float32 against Python's doubles
        torch.testing.assert_close(cost[layer, image, : targets.counts[image]].T, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("counts", [(3, 0), (0, 4), (6, 1), (2, 5)], ids=str)
def test_matches_are_the_cheapest_of_all_assignments(counts):
    logits, boxes, targets = random_case(*counts)
    matches, left_out = match(logits, boxes, targets, WEIGHTS, ALPHA)
    assert left_out.tolist() == [[False, False]] * 2
    offsets = [0, counts[0]]
    found = set(zip(*(index.tolist() for index in matches), strict=True))
    expected = set()
    for (layer, image), rows in slow_costs(logits, boxes, targets).items():
        count = counts[image]
        if count <= 4:
            options = [
                list(zip(queries, range(count), strict=True)) for queries in itertools.permutations(range(4), count)
            ]
        else:  # more targets than queries: some stay unmatched
            options = [list(zip(range(4), picked, strict=True)) for picked in itertools.permutations(range(count), 4)]
        best = min(options, key=lambda pairs: sum(rows[query][target] for query, target in pairs))
        expected |= {(layer, image, query, target + offsets[image]) for query, target in best}
    assert found == expected
    assert len(matches.layer) == len(found) == 2 * sum(min(count, 4) for count in counts)


def test_a_batch_without_targets_has_no_matches():
    matches, _ = match(*random_case(0, 0), WEIGHTS, ALPHA)
    assert all(index.shape == (0,) and index.dtype == torch.int64 for index in matches)


def test_matching_follows_its_weights():
    logits = torch.full((1, 2, 2, NUM_LABELS), -5.0)
    targets = collect_targets(
        [{"class_labels": [3], "boxes": [[0.5, 0.5, 0.2, 0.4]]}, *tiny_labels(0)], 2, NUM_LABELS, "cpu"
    )
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.4]).repeat(1, 2, 2, 1)
    logits[0, 0, 0, 3] = 5.0  # query 0 has the right class, query 1 the right box
    boxes[0, 0, 0] = torch.tensor([0.2, 0.3, 0.2, 0.4])
    assert match(logits, boxes, targets, CostWeights(1.0, 0.0, 0.0), ALPHA)[0].query.tolist() == [0]
    assert match(logits, boxes, targets, CostWeights(0.0, 1.0, 0.0), ALPHA)[0].query.tolist() == [1]
    assert match(logits, boxes, targets, CostWeights(0.0, 0.0, 1.0), ALPHA)[0].query.tolist() == [1]


@pytest.mark.parametrize(("broken", "value"), [("logits", math.nan), ("boxes", math.nan), ("boxes", math.inf)])
def test_predictions_that_are_not_finite_are_an_error_with_a_cure(broken, value):
    logits, boxes, targets = random_case(2, 3)
    {"logits": logits, "boxes": boxes}[broken][1, 1, 2] = value
    with pytest.raises(ValueError, match=r"predictions of layer 1 for image 1 are NaN or infinite.*learning rate"):
        match(logits, boxes, targets, WEIGHTS, ALPHA)


@pytest.mark.parametrize(("broken", "value"), [("logits", math.nan), ("logits", -math.inf), ("boxes", math.inf)])
def test_predictions_that_are_not_finite_are_left_out_on_request(broken, value):
    logits, boxes, targets = random_case(2, 3)
    expected, _ = match(logits, boxes, targets, WEIGHTS, ALPHA)
    {"logits": logits, "boxes": boxes}[broken][1, 0, 2] = value
    matches, left_out = match(logits, boxes, targets, WEIGHTS, ALPHA, skip_non_finite=True)
    assert left_out.tolist() == [[False, False], [True, False]]
    kept = ~((expected.layer == 1) & (expected.image == 0))
    assert [index.tolist() for index in matches] == [index[kept].tolist() for index in expected]


def test_other_predictions_that_are_not_finite_count_too():
    logits, boxes, targets = random_case(2, 3)
    is_finite = torch.tensor([[True, True], [False, True]])
    with pytest.raises(NonFinitePredictionsError) as caught:
        match(logits, boxes, targets, WEIGHTS, ALPHA, is_finite)
    assert (caught.value.layer, caught.value.image) == (1, 0)
    assert match(logits, boxes, targets, WEIGHTS, ALPHA, is_finite, True)[1].tolist() == [[False, False], [True, False]]


def test_layers_are_taken_one_by_one_where_there_are_many_pairs(monkeypatch):
    case = random_case(3, 2, layers=5)
    expected = matching_cost(*case, WEIGHTS, ALPHA)
    for largest in (1, 60):  # 24 pairs in a layer: one layer, and two, at a time
        monkeypatch.setattr(matcher, "_LARGEST_COST", largest)
        assert torch.equal(matching_cost(*case, WEIGHTS, ALPHA), expected)


def test_matching_has_no_gradient():
    logits, boxes, targets = random_case(2, 3)
    assert not matching_cost(logits.requires_grad_(), boxes.requires_grad_(), targets, WEIGHTS, ALPHA).requires_grad


def test_repeated_matches_are_the_same_in_each_layer():
    one = Matches(torch.zeros(3).long(), *(torch.randint(5, (3,)) for _ in range(3)))
    repeated = repeat_matches(one, 4)
    assert repeated.layer.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    for index, original in zip(repeated[1:], one[1:], strict=True):
        assert torch.equal(index.view(4, 3), original.expand(4, 3))


@pytest.mark.parametrize("where", ["logits", "boxes"])
def test_nan_is_noticed_in_an_image_without_boxes_too(where):
    predictions = {"logits": torch.randn(2, 2, 6, 5), "boxes": torch.rand(2, 2, 6, 4)}
    predictions[where][1, 1, 3, 2] = torch.nan
    targets = Targets(torch.tensor([0, 3]), torch.rand(2, 4), counts=(2, 0))
    with pytest.raises(ValueError, match="predictions of layer 1 for image 1 are NaN or infinite"):
        match(**predictions, targets=targets, weights=CostWeights(2.0, 5.0, 2.0), alpha=0.25)
