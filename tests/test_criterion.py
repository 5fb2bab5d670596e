import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from dino_hf.model import criterion
from dino_hf.model.criterion import (
    DenoisingPredictions,
    DinoDetrLoss,
    box_losses,
    cardinality_errors,
    class_error,
    mean_over_processes,
)
from dino_hf.model.matcher import CostWeights, DenoisingTargets, Matches, NonFinitePredictionsError, match
from dino_hf.model.quality_losses import focal_losses
from dino_hf.model.targets import collect_targets
from helpers import NUM_LABELS, tiny_config, tiny_labels
from loss import their_loss
from test_matcher import slow_costs, slow_giou

NAMES = ["loss_ce", "loss_bbox", "loss_giou", "loss_xy", "loss_hw", "cardinality_error"]
NO_MATCHES = Matches(*torch.zeros(4, 0, dtype=torch.long))


def random_predictions(layers, images, queries, dtype=torch.float32):
    logits = torch.randn(layers, images, queries, NUM_LABELS, dtype=dtype)
    boxes = 0.2 + 0.5 * torch.rand(layers, images, queries, 4, dtype=dtype)
    return logits.requires_grad_(), boxes.requires_grad_()


def random_targets(*counts):
    return collect_targets(tiny_labels(*counts), len(counts), NUM_LABELS, "cpu")


def random_denoising(counts, groups=2, layers=3):
    """Positives of each group answer for the targets of their image, in order."""
    largest = max(counts)
    ends = [sum(counts[: image + 1]) for image in range(len(counts))]
    pairs = [
        (0, image, group * 2 * largest + j, ends[image] - count + j)
        for group in range(groups)
        for image, count in enumerate(counts)
        for j in range(count)
    ]
    matches = Matches(*torch.tensor(pairs).reshape(-1, 4).T)
    predictions = random_predictions(layers, len(counts), groups * 2 * largest)
    return DenoisingPredictions(*predictions, DenoisingTargets(matches, groups))


def slow_losses(logits, boxes, targets, matched, normalizer):
    """The losses of one output set (B, Q, ...), with `matched` {(image, query): target}, in Python's doubles."""
    focal = xy = hw = giou = 0.0
    for image, queries in enumerate(logits.tolist()):
        for query, row in enumerate(queries):
            target = matched.get((image, query))
            for label, logit in enumerate(row):
                prob = 1 / (1 + math.exp(-logit))
                if target is not None and int(targets.class_labels[target]) == label:
                    focal += 0.25 * (1 - prob) ** 2 * -math.log(prob)
                else:
                    focal += 0.75 * prob**2 * -math.log(1 - prob)
    for (image, query), target in matched.items():
        box, truth = boxes[image, query].tolist(), targets.boxes[target].tolist()
        difference = [abs(a - b) for a, b in zip(box, truth, strict=True)]
        xy += sum(difference[:2])
        hw += sum(difference[2:])
        giou += 1 - slow_giou(box, truth)
    names = NAMES[:5]
    return {name: x / normalizer for name, x in zip(names, (focal, xy + hw, giou, xy, hw), strict=True)}


def by_layer(matches: Matches, layer: int) -> dict:
    return {
        (image, query): target
        for found, image, query, target in zip(*(index.tolist() for index in matches), strict=True)
        if found == layer
    }


@pytest.mark.parametrize("counts", [(3, 0), (2, 4), (0, 0), (9, 1)], ids=str)
def test_the_loss_agrees_with_a_loop_over_layers_images_and_queries(counts):
    config = tiny_config(cls_loss_coefficient=1.5)
    logits, boxes = random_predictions(4, 2, 6)
    targets, denoising = random_targets(*counts), random_denoising(counts) if any(counts) else None
    loss, logs = DinoDetrLoss(config)(logits, boxes, targets, denoising)

    matches, _ = match(logits.detach(), boxes.detach(), targets, CostWeights(2, 5, 2), 0.25)
    num_boxes, expected = max(sum(counts), 1), {}
    for layer, suffix in enumerate(["_interm", "_0", "_1", ""]):
        losses = slow_losses(logits[layer], boxes[layer], targets, by_layer(matches, layer), num_boxes)
        expected |= {name + suffix: value for name, value in losses.items()}
    if denoising is not None:
        for layer, suffix in enumerate(["_dn_0", "_dn_1", "_dn"]):
            matched = by_layer(denoising.targets.matches, 0)
            losses = slow_losses(denoising.logits[layer], denoising.boxes[layer], targets, matched, num_boxes * 2)
            expected |= {name + suffix: value for name, value in losses.items()}
    for name, value in expected.items():
        # float32 against Python's doubles
        assert logs[name].item() == pytest.approx(value, rel=1e-4, abs=1e-6), name
    weights = {"loss_ce": 1.5, "loss_bbox": 5.0, "loss_giou": 2.0}
    total = sum(weights.get("_".join(name.split("_")[:2]), 0) * value for name, value in expected.items())
    assert loss.item() == pytest.approx(total, rel=1e-4)


def test_the_matching_of_the_loss_is_the_cheapest_by_the_weights_of_the_config():
    logits, boxes = random_predictions(2, 2, 4)
    targets = random_targets(1, 0)
    _, logs = DinoDetrLoss(tiny_config(class_cost=0, giou_cost=0, bbox_cost=1))(logits, boxes, targets)
    nearest = (boxes[1, 0] - targets.boxes[0]).abs().sum(-1).min()
    torch.testing.assert_close(logs["loss_bbox"], nearest.detach())
    _, logs = DinoDetrLoss(tiny_config(class_cost=2, giou_cost=2, bbox_cost=5))(logits, boxes, targets)
    costs = [row[0] for row in slow_costs(logits, boxes, targets)[1, 0]]
    best = (boxes[1, 0, costs.index(min(costs))] - targets.boxes[0]).abs().sum()
    torch.testing.assert_close(logs["loss_bbox"], best.detach())


def test_the_boxes_that_losses_are_divided_by_can_be_given():
    """Those of a whole accumulation window: then the sum over its batches is the loss of one large batch."""
    logits, boxes = random_predictions(4, 2, 6)
    targets, denoising, loss = random_targets(3, 1), random_denoising((3, 1)), DinoDetrLoss(tiny_config())
    own, own_logs = loss(logits, boxes, targets, denoising)
    for number in (10, torch.tensor(10), torch.tensor(10.0)):
        value, logs = loss(logits, boxes, targets, denoising, number)
        torch.testing.assert_close(value, own * 4 / 10)
        torch.testing.assert_close(logs["loss_giou_dn_1"], own_logs["loss_giou_dn_1"] * 4 / 10)
    assert torch.equal(loss(logits, boxes, targets, denoising, 0)[0], loss(logits, boxes, targets, denoising, 1)[0])


def test_boxes_without_denoising_queries_are_stood_for_by_the_others():
    logits, boxes = random_predictions(4, 2, 6)
    targets, denoising, loss = random_targets(3, 1), random_denoising((3, 1)), DinoDetrLoss(tiny_config())
    _, whole = loss(logits, boxes, targets, denoising)
    _, part = loss(logits, boxes, targets, denoising._replace(targets=replace(denoising.targets, share=0.5)))
    for name, value in whole.items():
        expected = 2 * value if "_dn" in name and "cardinality" not in name else value
        torch.testing.assert_close(part[name], expected)


@pytest.mark.parametrize("where", ["logits", "boxes", "denoising logits", "denoising boxes"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_predictions_that_are_not_finite_are_named_or_left_out(where, value):
    logits, boxes = random_predictions(4, 2, 6)
    targets, denoising, loss = random_targets(3, 2), random_denoising((3, 2)), DinoDetrLoss(tiny_config())
    parts = {"logits": logits, "boxes": boxes}
    parts |= {"denoising logits": denoising.logits, "denoising boxes": denoising.boxes}
    layer = 2 - where.startswith("denoising")  # the encoder's proposals have no denoising queries
    with torch.no_grad():
        parts[where][layer, 1, 3] = value
    with pytest.raises(
        NonFinitePredictionsError, match="predictions of layer 2 for image 1 are NaN or infinite"
    ) as error:
        loss(logits, boxes, targets, denoising)
    assert (error.value.layer, error.value.image) == (2, 1)

    result, logs = loss(logits, boxes, targets, denoising, skip_non_finite=True)
    result.backward()
    assert result.isnan()  # and so is every gradient, whatever the prediction was a part of: the step is to be dropped
    assert all(part.grad[part.grad.isfinite()].abs().sum() == 0 for part in parts.values())
    assert logits.grad.isnan().any()
    assert all(value.isfinite() for value in logs.values())


def test_what_is_left_out_counts_in_no_log():
    logits, boxes = random_predictions(4, 2, 6)
    targets, loss = random_targets(3, 2), DinoDetrLoss(tiny_config())
    expected, expected_logs = loss(logits, boxes, targets)
    same, _ = loss(logits, boxes, targets, skip_non_finite=True)
    assert torch.equal(same, expected)  # nothing is left out
    with torch.no_grad():
        logits[2, 1, 3] = torch.inf
    _, logs = loss(logits, boxes, targets, skip_non_finite=True)
    changed = {name for name in logs if not torch.equal(logs[name], expected_logs[name])}
    assert changed - {"cardinality_error_1"} == {f"loss_{name}_1" for name in ("ce", "bbox", "giou", "xy", "hw")}


def test_the_names_are_those_of_the_original():
    loss = DinoDetrLoss(tiny_config())
    predictions = random_predictions(4, 2, 6)
    _, logs = loss(*predictions, random_targets(3, 0))
    expected = {name + suffix for name in NAMES for suffix in ("", "_0", "_1", "_interm")} | {"class_error"}
    assert set(logs) == expected
    _, logs = loss(*predictions, random_targets(3, 0), random_denoising((3, 0)))
    assert set(logs) == expected | {name + suffix for name in NAMES for suffix in ("_dn", "_dn_0", "_dn_1")}
    assert all(value.shape == () and not value.requires_grad for value in logs.values())


def test_logs_are_raw_and_the_loss_is_their_weighted_sum():
    predictions, targets, denoising = random_predictions(4, 2, 6), random_targets(3, 0), random_denoising((3, 0))
    weights = {"loss_ce": 0.5, "loss_bbox": 3.0, "loss_giou": 7.0}
    config = tiny_config(cls_loss_coefficient=0.5, bbox_loss_coefficient=3.0, giou_loss_coefficient=7.0)
    loss, logs = DinoDetrLoss(config)(*predictions, targets, denoising)
    _, usual = DinoDetrLoss(tiny_config())(*predictions, targets, denoising)
    assert logs == usual
    suffixes = ["", "_0", "_1", "_interm", "_dn", "_dn_0", "_dn_1"]
    total = sum(weight * logs[name + suffix] for name, weight in weights.items() for suffix in suffixes)
    torch.testing.assert_close(loss.detach(), total)


@pytest.mark.parametrize("counts", [(3, 0), (0, 0), (9, 1)], ids=str)
def test_loss_and_gradients_are_finite(counts):
    logits, boxes = random_predictions(3, 2, 6)
    loss, logs = DinoDetrLoss(tiny_config())(logits, boxes, random_targets(*counts))
    loss.backward()
    assert all(value.isfinite() for value in (loss, *logs.values()))
    assert logits.grad.isfinite().all()
    assert boxes.grad.isfinite().all()  # there is one, without boxes too: distributed training waits for it
    assert bool(boxes.grad.any()) == any(counts)


def test_a_target_and_a_prediction_without_size_are_finite():
    logits, _ = random_predictions(2, 2, 3)
    targets = random_targets(1, 0)
    targets = replace(targets, boxes=torch.tensor([[0.4, 0.4, 0.0, 0.0]]))
    flat = torch.tensor([0.4, 0.4, 0.0, 0.0]).repeat(2, 2, 3, 1).requires_grad_()
    loss, _ = DinoDetrLoss(tiny_config())(logits, flat, targets)
    loss.backward()
    assert loss.isfinite()
    assert flat.grad.isfinite().all()


def test_the_loss_is_float32_inside_autocast(monkeypatch):
    logits, boxes = random_predictions(3, 2, 6)
    targets, denoising = random_targets(3, 0), random_denoising((3, 0), layers=2)
    loss = DinoDetrLoss(tiny_config())
    expected, _ = loss(logits, boxes, targets, denoising)
    enabled = []

    def record(function):
        def wrapper(*args):
            enabled.append(torch.is_autocast_enabled("cpu"))
            return function(*args)

        return wrapper

    monkeypatch.setattr(criterion, "match", record(criterion.match))
    monkeypatch.setattr(criterion, "set_losses", record(criterion.set_losses))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, _ = loss(logits, boxes, targets, denoising)
        assert torch.is_autocast_enabled("cpu")
    assert enabled == [False] * 3  # matching, the losses of matched and of denoising queries
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)


def test_predictions_in_half_precision_are_scored_in_float32():
    logits, boxes = random_predictions(3, 2, 6, dtype=torch.bfloat16)
    targets = random_targets(3, 0)
    result, logs = DinoDetrLoss(tiny_config())(logits, boxes, targets)
    expected, _ = DinoDetrLoss(tiny_config())(logits.float(), boxes.float(), targets)
    assert torch.equal(result, expected)
    assert {value.dtype for value in logs.values()} == {torch.float32}


def test_the_focal_loss_without_focus_is_half_the_cross_entropy():
    logits = torch.randn(2, 2, 4, NUM_LABELS, dtype=torch.float64)
    matches = Matches(*torch.tensor([[0, 0, 1, 0], [1, 1, 3, 1]]).T)
    labels = torch.tensor([4, 2])
    target = torch.zeros_like(logits)
    target[0, 0, 1, 4] = target[1, 1, 3, 2] = 1
    expected = binary_cross_entropy_with_logits(logits, target, reduction="none").sum((1, 2, 3)) / 2
    torch.testing.assert_close(focal_losses(logits, labels, matches, alpha=0.5, gamma=0), expected)


@pytest.mark.parametrize("class_weights", [None, torch.tensor([0.5, 1, 3, 1, 7]).double()])
@pytest.mark.parametrize("gamma", [0.0, 2.0, 3.0])
def test_the_focal_loss_and_its_gradient_are_those_of_the_plain_formula(gamma, class_weights):
    logits = 4 * torch.randn(3, 2, 7, NUM_LABELS, dtype=torch.float64)
    logits[0, 0, :2] = torch.tensor([[-80.0], [80.0]])  # far out, where a probability is 0 or 1
    matches = Matches(*torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [2, 1, 6, 2]]).T)
    labels, results = torch.tensor([4, 2, 0]), []

    def plain(x, target):
        prob = x.sigmoid()
        error = (prob - target).abs()
        of_class = torch.ones(NUM_LABELS) if class_weights is None else class_weights  # of positives only
        weight = (0.3 * target * of_class + 0.7 * (1 - target)) * error**gamma
        return (weight * binary_cross_entropy_with_logits(x, target, reduction="none")).sum((1, 2, 3))

    target = torch.zeros_like(logits)
    for layer, image, query, index in zip(*(part.tolist() for part in matches), strict=True):
        target[layer, image, query, labels[index]] = 1
    for loss in (lambda x: plain(x, target), lambda x: focal_losses(x, labels, matches, 0.3, gamma, class_weights)):
        x = logits.clone().requires_grad_()
        values = loss(x)
        results.append((values.detach(), *torch.autograd.grad((values * torch.tensor([1.0, -2, 0.5])).sum(), x)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_class_weights_scale_the_class_loss_of_layers_and_denoising_queries():
    config, counts = tiny_config(), (2, 0)
    targets = random_targets(*counts)
    arguments = (*random_predictions(4, 2, 5), targets, random_denoising(counts))
    loss, logs = DinoDetrLoss(config)(*arguments)
    same, _ = DinoDetrLoss(config)(*arguments, class_weights=torch.ones(NUM_LABELS))
    assert torch.equal(loss, same)
    weights = torch.ones(NUM_LABELS)
    weights[targets.class_labels] = 2.0
    _, doubled = DinoDetrLoss(config)(*arguments, class_weights=weights)
    for name, value in logs.items():
        if name.startswith("loss_ce"):
            assert value < doubled[name] < 2 * value, name  # matched queries count twice, others once
        else:
            assert torch.equal(value, doubled[name]), name


def test_gradients_of_the_losses_are_those_of_differences():
    logits, boxes = random_predictions(2, 2, 3, dtype=torch.float64)
    matches = Matches(*torch.tensor([[0, 0, 1, 0], [1, 0, 2, 1], [1, 0, 0, 0]]).T)
    labels, target_boxes = torch.tensor([4, 2]), 0.3 + 0.4 * torch.rand(2, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: focal_losses(x, labels, matches, 0.25), logits)
    assert torch.autograd.gradcheck(lambda x: box_losses(x, target_boxes, matches), boxes)


def test_box_losses_without_matches_are_zero_for_each_layer():
    for loss in box_losses(torch.rand(3, 2, 4, 4), torch.zeros(0, 4), NO_MATCHES):
        assert loss.tolist() == [0, 0, 0]


def test_cardinality_counts_queries_whose_best_class_is_not_the_last():
    logits = torch.zeros(1, 2, 3, NUM_LABELS)
    for image, best in enumerate([(0, 2, NUM_LABELS - 1), (1, 1, 3)]):
        logits[0, image, range(3), best] = 1
    assert cardinality_errors(logits, (5, 0)).tolist() == [((5 - 2) + (3 - 0)) / 2]


@pytest.mark.parametrize(("labels", "percent"), [([1, 2, 0, 3], 25.0), ([1, 1, 1, 1], 75.0), ([1, 2, 4, 3], 0.0)])
def test_class_error_is_the_share_of_wrong_classes_of_the_last_layer(labels, percent):
    logits = torch.zeros(2, 2, 4, NUM_LABELS)
    logits[1, 0, range(4), [1, 2, 4, 3]] = 1
    matches = Matches(*torch.tensor([[1, 0, query, query] for query in range(4)] + [[0, 1, 0, 0]]).T)
    assert class_error(logits, torch.tensor(labels), matches).item() == percent


def test_class_error_without_matches_is_100():
    assert class_error(torch.zeros(2, 2, 4, NUM_LABELS), torch.zeros(0).long(), NO_MATCHES).item() == 100


@pytest.mark.parametrize(("count", "expected"), [(0, 1.0), (1, 1.0), (7, 7.0)])
def test_the_number_of_boxes_is_at_least_one(count, expected):
    assert mean_over_processes(count, "cpu").item() == expected


def test_the_number_of_boxes_is_averaged_over_processes(monkeypatch):
    """Three processes of which this has 7 boxes and the others 3 together."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.add_(3))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    assert mean_over_processes(7, "cpu").item() == pytest.approx(10 / 3)


@pytest.mark.parametrize("counts", [(3, 0), (2, 4), (0, 0)], ids=str)
def test_value_and_gradients_are_those_of_the_loss_of_transformers(counts):
    """Its Deformable DETR has the same losses, as a loop over dictionaries."""
    logits, boxes = random_predictions(4, 2, 6)
    labels = tiny_labels(*counts)
    expected = their_loss(logits, boxes, labels)
    ours, _ = DinoDetrLoss(tiny_config())(logits, boxes, collect_targets(labels, 2, NUM_LABELS, "cpu"))
    gradients = [torch.autograd.grad(loss, (logits, boxes), materialize_grads=True) for loss in (ours, expected)]
    # float32, and sums in another order
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)
