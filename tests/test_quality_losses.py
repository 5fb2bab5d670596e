import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy

from dino_hf.model import matcher
from dino_hf.model.config_checks import CLASS_LOSSES as NAMES
from dino_hf.model.criterion import DinoDetrLoss
from dino_hf.model.denoising import DinoDetrDenoising
from dino_hf.model.matcher import CostWeights, Matches, match, matching_cost, repeat_matches
from dino_hf.model.quality_losses import CLASS_LOSSES, Pairs, class_losses, position_target, rank_weights, soft_targets
from dino_hf.model.targets import Targets, collect_targets
from dino_hf.training.diagnosis import weighted_losses
from dino_hf.training.losses import weighted_parts
from helpers import NUM_LABELS, tiny_config, tiny_labels
from test_criterion import by_layer, random_denoising, random_predictions, random_targets
from test_matcher import random_case, slow_cost, slow_giou

ALPHA = 0.3
QUALITY = [name for name in NAMES if name != "focal"]
MATCHES = Matches(*torch.tensor([[0, 0, 2, 0], [0, 0, 1, 1], [1, 0, 6, 1], [1, 2, 0, 2]]).T)


def make_case(num_labels=NUM_LABELS, dtype=torch.float64):
    """Two layers, three images, seven queries. The second image has no box."""
    logits = 4 * torch.randn(2, 3, 7, num_labels, dtype=dtype)
    boxes = 0.4 + 0.2 * torch.rand(2, 3, 7, 4, dtype=dtype)
    targets = Targets(
        torch.arange(3) % num_labels, torch.tensor([[0.5, 0.5, 0.4, 0.5]] * 3, dtype=dtype), counts=(2, 0, 1)
    )
    return logits, boxes, targets


def iou_of(a, b):
    """From the GIoU of a box around both, in Python's doubles."""
    sides = [[(c - s / 2, c + s / 2) for c, s in zip(box[:2], box[2:], strict=True)] for box in (a, b)]
    overlap = math.prod(max(0.0, min(p[1], q[1]) - max(p[0], q[0])) for p, q in zip(*sides, strict=True))
    return overlap / (a[2] * a[3] + b[2] * b[3] - overlap)


def plain_targets(name, logits, boxes, targets):
    """Target of each pair of `MATCHES`, one after the other."""
    found = []
    for layer, image, query, target in zip(*(index.tolist() for index in MATCHES), strict=True):
        iou = iou_of(boxes[layer, image, query].tolist(), targets.boxes[target].tolist())
        prob = logits[layer, image, query, targets.class_labels[target]].sigmoid().item()
        value = {
            "quality_focal": iou,
            "varifocal": iou,
            "matchability_aware": iou**1.5,
            "stable_dino": iou**2,
            "align_detr": max(0.01, prob**ALPHA * iou ** (1 - ALPHA)),
        }[name]
        found.append(((layer, image), value))
    if name == "stable_dino":
        best = {key: max(value for other, value in found if other == key) for key, _ in found}
        found = [(key, value * max(1, 1 / (best[key] + 1e-8))) for key, value in found]
    return torch.tensor([value for _, value in found], dtype=torch.float64)


def plain_loss(name, logits, place, target):
    """The formulas of the papers, for autograd: loss of each layer."""
    is_pair = torch.zeros_like(logits)
    is_pair[place] = 1
    goal = torch.zeros_like(logits)
    goal[place] = target
    prob = logits.sigmoid()
    error = binary_cross_entropy(prob, goal, reduction="none")
    if name == "quality_focal":
        factor = (goal - prob).abs() ** 2
    elif name == "stable_dino":
        factor = (goal - prob) ** 2 * (ALPHA * is_pair + (1 - ALPHA) * (1 - is_pair))
    elif name == "align_detr":
        factor = is_pair + (1 - is_pair) * prob**2
    elif name == "varifocal":
        factor = goal + (1 - is_pair) * 0.75 * prob.detach() ** 2
    else:
        factor = is_pair + (1 - is_pair) * prob.detach() ** 1.5
    return (factor * error).sum((1, 2, 3))


def test_every_name_of_the_configuration_has_a_loss():
    assert set(CLASS_LOSSES) == set(NAMES)


@pytest.mark.parametrize("num_labels", [NUM_LABELS, 1])
@pytest.mark.parametrize("name", QUALITY)
def test_targets_losses_and_gradients_are_those_of_the_papers(name, num_labels):
    logits, boxes, targets = make_case(num_labels)
    soft, _ = soft_targets(logits, boxes, targets, MATCHES, CLASS_LOSSES[name], ALPHA)
    torch.testing.assert_close(soft, plain_targets(name, logits, boxes, targets), rtol=1e-9, atol=1e-12)
    place = (*MATCHES[:3], targets.class_labels[MATCHES.target])
    results = []
    for loss in (
        lambda x: plain_loss(name, x, place, soft),
        lambda x: class_losses(x, targets.class_labels, MATCHES, CLASS_LOSSES[name], ALPHA, soft),
    ):
        x = logits.clone().requires_grad_()
        values = loss(x)
        results.append((values.detach(), *torch.autograd.grad((values * torch.tensor([1.0, -2])).sum(), x)))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in NAMES if CLASS_LOSSES[name].factor_has_gradient])
def test_gradients_are_those_of_differences(name):
    logits, boxes, targets = make_case()
    soft, _ = soft_targets(logits, boxes, targets, MATCHES, CLASS_LOSSES[name], ALPHA)
    loss = lambda x: class_losses(x, targets.class_labels, MATCHES, CLASS_LOSSES[name], ALPHA, soft)  # noqa: E731
    assert torch.autograd.gradcheck(loss, (logits / 2).requires_grad_())


@pytest.mark.parametrize("name", NAMES)
def test_sure_predictions_have_finite_losses_and_gradients(name):
    logits, boxes, targets = make_case(dtype=torch.float32)
    logits[0, :, ::2], logits[0, :, 1::2] = 90.0, -90.0
    boxes[0, 0, 1] = torch.tensor([0.1, 0.1, 0.0, 0.0])  # no overlap, no size
    boxes[0, 0, 2] = targets.boxes[0]  # IoU 1
    logits.requires_grad_()
    soft, _ = soft_targets(logits, boxes, targets, MATCHES, CLASS_LOSSES[name], ALPHA)
    losses = class_losses(logits, targets.class_labels, MATCHES, CLASS_LOSSES[name], ALPHA, soft)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert logits.grad.isfinite().all()


def test_the_best_pair_of_each_layer_and_image_has_the_target_1():
    pairs = Pairs(torch.zeros(4), torch.tensor([0.5, 0.25, 0.0, 0.8]), torch.tensor([0, 0, 3, 5]), torch.arange(4), 6)
    torch.testing.assert_close(position_target(pairs, ALPHA), torch.tensor([1.0, 0.25, 0.0, 1.0]))


def test_queries_of_a_box_are_weighted_by_their_rank():
    quality = torch.tensor([0.2, 0.9, 0.5, 0.1, 0.7, 0.3, 0.7])
    box = torch.tensor([4, 1, 4, 1, 0, 4, 0])
    query = torch.tensor([8, 1, 2, 3, 5, 0, 4])
    ranks = torch.tensor([2.0, 0, 0, 1, 1, 1, 0])  # the last and third but last are equal: the first query is the best
    torch.testing.assert_close(rank_weights(quality, box, query), torch.exp(-ranks / 1.5))
    assert rank_weights(torch.zeros(0), *[torch.zeros(0).long()] * 2).shape == (0,)


def test_one_query_for_each_box_has_the_weight_1():
    assert rank_weights(torch.tensor([0.2, 0.9, 0.5]), torch.tensor([2, 0, 1]), torch.tensor([4, 2, 7])).tolist() == [
        1,
        1,
        1,
    ]


@pytest.mark.parametrize(
    ("counts", "repeats"), [((2, 0, 1), (2, 1, 2)), ((1, 3, 1), (2, 1, 1)), ((1, 6, 2), (2, 1, 1))], ids=str
)
def test_several_queries_match_a_box_in_all_layers_but_the_last(counts, repeats):
    """At most half of the 9 queries: for 3 boxes, two queries each would be more. The images after it also have one each.

    6 boxes are more than half of the queries. They also have one query each, unlike in the code of Align-DETR.
    """
    case = random_case(*counts, layers=3, queries=9)
    matches, _ = match(*case, CostWeights(2.0, 5.0, 2.0), 0.25, queries_per_box=2)
    single, _ = match(*case, CostWeights(2.0, 5.0, 2.0), 0.25)
    assert by_layer(matches, 2) == by_layer(single, 2)
    numbers = [number for number, count in zip(repeats, counts, strict=True) for _ in range(count)]
    for layer in (0, 1):
        assert sorted(by_layer(matches, layer).values()) == [
            target for target, number in enumerate(numbers) for _ in range(number)
        ]


def test_two_queries_of_a_box_are_the_cheapest_two():
    logits, boxes, targets = random_case(1, 0, queries=6)
    weights = CostWeights(2.0, 5.0, 2.0)
    matches, _ = match(logits, boxes, targets, weights, 0.25, queries_per_box=3)
    cost = matching_cost(logits, boxes, targets, weights, 0.25)[0, 0, 0]
    assert set(matches.query[matches.layer == 0].tolist()) == set(cost.topk(3, largest=False).indices.tolist())


@pytest.mark.parametrize(
    ("counts", "labels"),
    [((3, 0, 2), [0, 1, 2, 3, 4]), ((3, 0, 2), [1, 3, 1, 1, 0]), ((1, 0, 4), [2] * 5), ((0, 0, 0), [])],
    ids=str,
)
def test_the_cost_of_stable_dino_is_the_published_one(counts, labels):
    """The last box of a class in the batch gives the position factor of all boxes of the class, in all images."""
    logits, boxes, targets = random_case(*counts)
    targets.class_labels[:] = torch.tensor(labels, dtype=torch.long)
    cost = matching_cost(logits, boxes, targets, CostWeights(2.0, 5.0, 2.0, position_power=0.5), 0.25)
    last = {label: targets.boxes[target].tolist() for target, label in enumerate(labels)}
    for layer in range(2):
        for image, count in enumerate(counts):
            predicted = boxes[layer, image].tolist()
            near = {label: [(slow_giou(box, other) + 1) / 2 for box in predicted] for label, other in last.items()}
            best = max((value for row in near.values() for value in row), default=0)
            for row in range(count):
                target = sum(counts[:image]) + row
                label = labels[target]
                for query, box in enumerate(predicted):
                    prob = logits[layer, image, query, label].sigmoid().item()
                    prob *= (near[label][query] / min(1, best + 1e-8)) ** 0.5
                    scored = {label: math.log(prob / (1 - prob))}
                    expected = slow_cost(scored, box, label, targets.boxes[target].tolist())
                    assert cost[layer, image, row, query].item() == pytest.approx(expected, abs=1e-4)


def test_the_cost_of_stable_dino_is_the_same_layer_by_layer(monkeypatch):
    case = random_case(3, 0, 2)
    weights = CostWeights(2.0, 5.0, 2.0, position_power=0.5)
    at_once = matching_cost(*case, weights, 0.25)
    monkeypatch.setattr(matcher, "_LARGEST_COST", 1)
    assert torch.equal(matching_cost(*case, weights, 0.25)[:, 0], at_once[:, 0])


@pytest.mark.parametrize("name", QUALITY)
@pytest.mark.parametrize("counts", [(3, 0), (0, 0), (5, 1)], ids=str)
def test_the_whole_loss_is_made_of_its_parts(name, counts):
    """Layers, denoising, boxes of the whole step and weights are treated as with DINO's own loss."""
    settings = {"class_loss": name, "cls_loss_coefficient": 6.0, "denoising_cls_loss_coefficient": 0.5}
    queries_per_box = 2 if name == "align_detr" else 1
    loss = DinoDetrLoss(tiny_config(**settings, queries_per_box=queries_per_box))
    logits, boxes = random_predictions(4, 2, 6)
    targets, denoising = random_targets(*counts), random_denoising(counts) if any(counts) else None
    value, logs = loss(logits, boxes, targets, denoising, num_items_in_batch=10)
    value.backward()
    assert all(part.isfinite().all() for part in (value, *logs.values(), logits.grad, boxes.grad))
    matches, _ = match(logits.detach(), boxes.detach(), targets, loss.cost, 0.25, queries_per_box=queries_per_box)
    sets = {("_interm", "_0", "_1", "")[layer]: (logits, boxes, matches, layer, 10) for layer in range(4)}
    if denoising is not None:
        repeated = repeat_matches(denoising.targets.matches, 3)
        parts = (denoising.logits, denoising.boxes, repeated)
        sets |= {("_dn_0", "_dn_1", "_dn")[layer]: (*parts, layer, 20) for layer in range(3)}
    total = 0
    for suffix, (set_logits, set_boxes, set_matches, layer, divisor) in sets.items():
        own = Matches(*(index[set_matches.layer == layer] for index in set_matches))
        soft, box = soft_targets(set_logits, set_boxes, targets, own, CLASS_LOSSES[name], 0.25)
        weights = torch.ones(len(soft))
        if queries_per_box > 1 and "_dn" not in suffix:
            weights = rank_weights(soft, box, own.query)
        classes = class_losses(set_logits, targets.class_labels, own, CLASS_LOSSES[name], 0.25, weights * soft)[layer]
        l1 = (set_boxes[own[:3]] - targets.boxes[own.target]).abs().sum(-1)
        pairs = zip(set_boxes[own[:3]].tolist(), targets.boxes[own.target].tolist(), strict=True)
        giou = torch.tensor([1 - slow_giou(*pair) for pair in pairs])
        expected = classes / divisor, (weights * l1).sum() / divisor, (weights * giou).sum() / divisor
        for kind, number in zip(("loss_ce", "loss_bbox", "loss_giou"), expected, strict=True):
            torch.testing.assert_close(logs[kind + suffix], number.detach(), rtol=1e-4, atol=1e-6)
        total += (0.5 if "_dn" in suffix else 6) * expected[0] + 5 * expected[1] + 2 * expected[2]
    torch.testing.assert_close(value, total, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", QUALITY)
def test_images_of_a_layer_that_are_left_out_change_nothing_else(name):
    logits, boxes = random_predictions(4, 2, 6)
    targets, denoising = random_targets(3, 2), random_denoising((3, 2))
    loss = DinoDetrLoss(tiny_config(class_loss=name, queries_per_box=2 if name == "align_detr" else 1))
    _, before = loss(logits, boxes, targets, denoising)
    with torch.no_grad():
        logits[2, 1, 3] = math.inf
        denoising.boxes[0, 0, 1] = math.nan
    value, logs = loss(logits, boxes, targets, denoising, skip_non_finite=True)
    assert value.isnan()
    assert all(part.isfinite() for part in logs.values())
    changed = {key for key in logs if key.startswith("loss_") and not torch.equal(logs[key], before[key])}
    # Layer 2 of the outputs is the second decoder layer; the first one is left out where its denoising queries are not finite.
    kinds = ("loss_ce", "loss_bbox", "loss_giou", "loss_xy", "loss_hw")
    assert changed == {kind + suffix for kind in kinds for suffix in ("_0", "_1", "_dn_0", "_dn_1")}


@pytest.mark.parametrize("name", QUALITY)
def test_losses_are_those_of_float32_in_half_precision(name):
    logits, boxes = random_predictions(3, 2, 6, dtype=torch.bfloat16)
    targets, loss = random_targets(3, 0), DinoDetrLoss(tiny_config(class_loss=name))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, logs = loss(logits, boxes, targets)
    expected, _ = loss(logits.float(), boxes.float(), targets)
    assert torch.equal(value, expected)
    assert {part.dtype for part in logs.values()} == {torch.float32}


def test_a_batch_is_the_sum_of_its_images():
    """With gradient accumulation, the losses of the batches of a step add up to the loss of one large batch.

    Not so with stable_dino: as in its code, the matching of an image depends on the boxes of the other images of its batch.
    """
    for name in set(QUALITY) - {"stable_dino"}:
        loss = DinoDetrLoss(tiny_config(class_loss=name, queries_per_box=2 if name == "align_detr" else 1))
        logits, boxes = random_predictions(4, 3, 9)
        labels = tiny_labels(2, 0, 3)
        whole, _ = loss(logits, boxes, collect_targets(labels, 3, NUM_LABELS, "cpu"), num_items_in_batch=5)
        parts = [
            loss(logits[:, one], boxes[:, one], collect_targets(labels[one], size, NUM_LABELS, "cpu"), None, 5)[0]
            for one, size in ((slice(0, 1), 1), (slice(1, 3), 2))
        ]
        torch.testing.assert_close(sum(parts), whole, msg=name)


def test_logs_of_training_weigh_denoising_by_its_own_weight():
    """What is logged as parts adds up to the loss."""
    loss = DinoDetrLoss(
        tiny_config(class_loss="stable_dino", cls_loss_coefficient=6.0, denoising_cls_loss_coefficient=0.5)
    )
    logits, boxes = random_predictions(4, 2, 6)
    value, logs = loss(logits, boxes, random_targets(3, 0), random_denoising((3, 0)))
    parts = weighted_parts(logs, loss)
    torch.testing.assert_close(parts[-1], value.detach())
    torch.testing.assert_close(parts[0], 6 * logs["loss_ce"])
    matching, denoising, last, last_denoising = weighted_losses(logs, loss)
    torch.testing.assert_close(matching + denoising, value.detach())
    torch.testing.assert_close(last, parts[:3].sum())
    expected = 0.5 * logs["loss_ce_dn"] + 5 * logs["loss_bbox_dn"] + 2 * logs["loss_giou_dn"]
    torch.testing.assert_close(last_denoising, expected)


@pytest.mark.parametrize("name", QUALITY)
def test_class_weights_scale_the_losses_of_pairs(name):
    logits, boxes, targets = make_case()
    soft, _ = soft_targets(logits, boxes, targets, MATCHES, CLASS_LOSSES[name], ALPHA)
    values = [
        class_losses(logits, targets.class_labels, MATCHES, CLASS_LOSSES[name], ALPHA, soft, weights)
        for weights in (None, torch.full((NUM_LABELS,), 3.0).double(), torch.zeros(NUM_LABELS).double())
    ]
    others = values[2]
    torch.testing.assert_close(values[1] - others, 3 * (values[0] - others))


@pytest.mark.parametrize(("start", "lowest", "highest"), [(1.0, 0.5, 1.0), (0.0, 0.0, 0.5), (0.5, 0.25, 0.75)])
def test_the_noise_of_negatives_starts_where_the_configuration_says(start, lowest, highest):
    denoising = DinoDetrDenoising(tiny_config(negative_noise_start=start, label_noise_ratio=0.0, num_denoising=80))
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.3]] * 400)
    noised = denoising._noised_boxes(boxes.expand(2, 3, -1, -1))
    low = (noised - boxes)[..., :2] - (noised - boxes)[..., 2:] / 2  # shift of the upper left corner
    share = (low / boxes[0, 2:]).abs()
    assert share[0].max() <= 0.5 + 1e-5
    assert share[1].min() >= lowest - 1e-5
    assert share[1].max() <= highest + 1e-5
    assert share[1].max() > highest - 0.01
