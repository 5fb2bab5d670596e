import pytest
import torch

from dino_hf.model.box_ops import cxcywh_to_xyxy
from dino_hf.model.denoising import DinoDetrDenoising, count_groups, denoising_attention_mask
from dino_hf.model.targets import collect_targets
from helpers import NUM_LABELS, tiny_config, tiny_labels


def denoise(*counts, num_queries=6, **changes):
    module = DinoDetrDenoising(tiny_config(**changes))
    targets = collect_targets(tiny_labels(*counts), len(counts), NUM_LABELS, "cpu")
    return module, targets, module(targets, num_queries)


def places(targets, groups, largest):
    """(group, image, target, query of the positive, query of the negative) by the release's layout."""
    return [
        (group, image, target, group * 2 * largest + j, group * 2 * largest + largest + j)
        for group in range(groups)
        for target, (image, j) in enumerate(zip(targets.image.tolist(), targets.position.tolist(), strict=True))
    ]


@pytest.mark.parametrize(
    ("num_denoising", "largest", "groups"),
    [
        (100, 0, 1),  # no boxes
        (100, 1, 100),
        (100, 3, 33),  # 200 // 6
        (100, 100, 1),
        (100, 250, 1),  # at least one
        (50, 7, 7),  # 100 // 14
        (49, 7, 98),  # below 50 pairs the number counts groups
        (1, 40, 2),
    ],
)
def test_groups_are_counted_as_in_the_release(num_denoising, largest, groups):
    assert count_groups(num_denoising, largest) == groups


def test_every_image_gets_all_groups_of_its_fullest_image():
    _, _, denoising = denoise(3, 0, 2)
    assert denoising.targets.num_groups == 100 // 6
    total = denoising.targets.num_groups * 2 * 3
    assert denoising.content.shape == (3, total, 64)
    assert denoising.references.shape == (3, total, 4)
    assert denoising.attention_mask.shape == (total, total + 6)


def test_without_noise_positives_and_negatives_are_the_boxes_and_labels():
    module, targets, denoising = denoise(3, 0, 2, box_noise_scale=0, label_noise_ratio=0)
    for _, image, target, positive, negative in places(targets, denoising.targets.num_groups, 3):
        label = module.label_embedding.weight[targets.class_labels[target]]
        for query in (positive, negative):
            assert torch.equal(denoising.content[image, query], label)
            # there and back through the logit
            torch.testing.assert_close(denoising.references[image, query], targets.boxes[target])


def test_queries_without_a_box_are_empty_boxes_in_the_middle():
    _, targets, denoising = denoise(3, 0, 2)
    used = torch.zeros(denoising.content.shape[:2], dtype=torch.bool)
    for _, image, _, positive, negative in places(targets, denoising.targets.num_groups, 3):
        used[image, [positive, negative]] = True
    assert not used[1].any()
    assert not denoising.content[~used].any()
    assert (denoising.references[~used] == 0.5).all()
    assert denoising.content[used].any(-1).all()


def test_matches_give_each_positive_its_own_target():
    _, targets, denoising = denoise(3, 0, 2)
    matches = denoising.targets.matches
    found = list(zip(*(index.tolist() for index in matches), strict=True))
    expected = [
        (0, image, positive, target)
        for _, image, target, positive, _ in places(targets, denoising.targets.num_groups, 3)
    ]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("scale", [0.4, 0.3])
def test_sides_of_positives_move_less_than_those_of_negatives(scale):
    """With a scale below 0.5, a side never crosses its box, and boxes well inside are not cut at the border."""
    _, targets, denoising = denoise(3, 0, 2, box_noise_scale=scale, num_denoising=300)
    shares = {"positive": [], "negative": []}
    signs = set()
    for _, image, target, positive, negative in places(targets, denoising.targets.num_groups, 3):
        half_size = targets.boxes[target, 2:].repeat(2) / 2
        for name, query in (("positive", positive), ("negative", negative)):
            shift = cxcywh_to_xyxy(denoising.references[image, query]) - cxcywh_to_xyxy(targets.boxes[target])
            shares[name].append((shift / half_size / scale).abs())
            signs.add(tuple(shift.sign().tolist()))
    positive, negative = (torch.stack(shares[name]) for name in ("positive", "negative"))
    rounding = 2e-3  # of float32, through the logit and divided by small sizes
    assert positive.min() >= 0
    assert positive.max() <= 1 + rounding
    assert negative.min() >= 1 - rounding
    assert negative.max() <= 2 + rounding
    # 500 boxes with 4 sides each, uniform: the mean of 2000 draws is within 5 standard errors of 0.0065
    assert positive.mean().item() == pytest.approx(0.5, abs=0.04)
    assert negative.mean().item() == pytest.approx(1.5, abs=0.04)
    assert len(signs) == 2**4  # each side has a sign of its own


@pytest.mark.parametrize("extra", [0, 1, 4])
def test_the_label_embedding_has_rows_beyond_those_of_classes_that_are_never_looked_up(extra):
    denoising, _, queries = denoise(5, 3, num_extra_label_embeddings=extra, label_noise_ratio=2.0)
    assert len(denoising.label_embedding.weight) == NUM_LABELS + extra
    queries.content.sum().backward()
    seen = denoising.label_embedding.weight.grad.abs().sum(1) > 0
    assert not seen[NUM_LABELS:].any()
    assert seen[:NUM_LABELS].all()


def test_groups_are_noised_independently():
    _, _, denoising = denoise(3, 2)
    first, second = denoising.references.unflatten(1, (denoising.targets.num_groups, 6))[:, :2, :2].unbind(1)
    assert (first != second).any(-1).all()


def test_noised_boxes_are_cut_off_at_the_border_of_the_image():
    module = DinoDetrDenoising(tiny_config(box_noise_scale=1.0))
    boxes = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.02, 0.95, 0.04, 0.1], [0.5, 0.5, 0.1, 0.2]]).expand(2, 40, 3, 4)
    far_inside = boxes / 4 + torch.tensor([0.375, 0.375, 0, 0])  # the same boxes in a quarter of the image
    noised = []
    for given in (boxes, far_inside):
        torch.manual_seed(3)  # the same noise
        noised.append(cxcywh_to_xyxy(module._noised_boxes(given)))
    uncut = (noised[1] - 0.375) * 4
    by_hand = [[min(max(side, 0.0), 1.0) for side in box] for box in uncut.reshape(-1, 4).tolist()]
    torch.testing.assert_close(noised[0], torch.tensor(by_hand).view_as(uncut), rtol=0, atol=1e-6)
    # every side that can leave the image did
    outside = ((uncut < -1e-6) | (uncut > 1 + 1e-6)).flatten(0, 1).any(0)
    assert outside.tolist() == [[True] * 4, [True, False, False, True], [False] * 4]


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_half_the_ratio_of_the_labels_is_drawn_anew_from_all_classes(ratio):
    module, targets, _ = denoise(3, 0, 2, num_denoising=600, label_noise_ratio=ratio)
    with torch.no_grad():  # the embedding tells which label was looked up
        module.label_embedding.weight.copy_(torch.eye(NUM_LABELS + 1, 64))
    denoising = module(targets, 6)
    drawn = []
    for _, image, target, positive, negative in places(targets, denoising.targets.num_groups, 3):
        true = int(targets.class_labels[target])
        drawn += [(int(denoising.content[image, query].argmax()) - true) % NUM_LABELS for query in (positive, negative)]
        assert denoising.content[image, positive].sum() == 1  # and the spare row never is
        assert denoising.content[image, positive, NUM_LABELS:].sum() == 0
    counts = torch.bincount(torch.tensor(drawn), minlength=NUM_LABELS) / len(drawn)
    redrawn = 0.5 * ratio
    expected = torch.full((NUM_LABELS,), redrawn / NUM_LABELS)
    expected[0] += 1 - redrawn
    # 2000 draws: the standard error of a share is at most 0.011
    torch.testing.assert_close(counts, expected, rtol=0, atol=0.045)


@pytest.mark.parametrize(("groups", "size", "queries"), [(3, 4, 5), (2, 0, 4), (16, 6, 15)])
@pytest.mark.parametrize("padded", [False, True])
def test_the_attention_mask_agrees_with_a_loop_over_pairs(groups, size, queries, padded):
    num_denoising = groups * size
    is_padding = torch.rand(2, num_denoising) < 0.3 if padded else None
    mask = denoising_attention_mask(groups, size, queries, is_padding)
    assert mask.dtype == torch.bool
    assert mask.shape == ((2,) if padded else ()) + (num_denoising, num_denoising + queries)
    for image, of_image in enumerate(mask if padded else [mask]):
        for row in range(num_denoising):
            for column in range(num_denoising + queries):
                allowed = column >= num_denoising or row // size == column // size  # matching queries, or its own group
                hidden = padded and column < num_denoising and is_padding[image, column]
                assert of_image[row, column] == (allowed and not hidden), (image, row, column)


def test_one_group_needs_no_mask_but_for_padding():
    assert denoising_attention_mask(1, 6, 4) is None
    is_padding = torch.tensor([[False, True], [False, False]])
    expected = [[[True, False, True, True, True]], [[True] * 5]]
    assert denoising_attention_mask(1, 2, 3, is_padding).tolist() == expected  # for all rows


def test_without_boxes_there_are_no_queries_but_the_label_embedding_gets_a_gradient():
    module, _, denoising = denoise(0, 0)
    assert denoising.content.shape == (2, 0, 64)
    assert denoising.references.shape == (2, 0, 4)
    assert denoising.attention_mask is None
    assert all(len(index) == 0 for index in denoising.targets.matches)
    denoising.content.sum().backward()
    assert module.label_embedding.weight.grad is not None


@pytest.mark.parametrize(
    ("counts", "limit", "groups", "largest"),
    [
        ((3, 0, 2), 100, 16, 3),  # the release's own number
        ((3, 0, 2), 96, 16, 3),
        ((3, 0, 2), 95, 15, 3),
        ((3, 0, 2), 6, 1, 3),
        ((3, 0, 2), 5, 1, 2),  # not all boxes
        ((40, 0, 7), 20, 1, 10),
        ((2, 1), 2, 1, 1),
        ((0, 0), 2, 1, 0),
    ],
    ids=str,
)
def test_a_limit_takes_groups_first_and_then_boxes(counts, limit, groups, largest):
    _, targets, denoising = denoise(*counts, max_denoising_queries=limit)
    assert denoising.targets.num_groups == groups
    assert denoising.content.shape[1] == 2 * groups * largest <= limit
    kept = [min(count, largest) for count in counts]
    assert denoising.targets.share == pytest.approx(sum(kept) / sum(counts) if any(counts) else 1.0)
    found = [
        denoising.targets.matches.image[denoising.targets.matches.query < 2 * largest].tolist().count(i)
        for i in range(len(counts))
    ]
    assert found == kept
    images, chosen = denoising.targets.matches.image, denoising.targets.matches.target
    assert torch.equal(targets.image[chosen], images)
    pairs = set(zip(chosen.tolist(), (denoising.targets.matches.query // (2 * max(largest, 1))).tolist(), strict=True))
    assert len(pairs) == len(chosen)  # no box twice in a group


def test_boxes_beyond_the_limit_are_drawn_at_random_and_restored_as_the_others():
    module, targets, _ = denoise(9, 2, max_denoising_queries=8, box_noise_scale=0, label_noise_ratio=0)
    seen = torch.zeros(11)
    for _ in range(60):
        denoising = module(targets, 6)
        positive = denoising.references[denoising.targets.matches.image, denoising.targets.matches.query]
        # there and back through the logit
        torch.testing.assert_close(positive, targets.boxes[denoising.targets.matches.target])
        label = module.label_embedding.weight[targets.class_labels[denoising.targets.matches.target]]
        assert torch.equal(denoising.content[denoising.targets.matches.image, denoising.targets.matches.query], label)
        seen[denoising.targets.matches.target] += 1
    assert seen[9:].tolist() == [60, 60]
    assert seen[:9].sum() == 4 * 60
    # 60 draws of 4 of 9: 26.7 each, with a standard deviation of 3.8
    assert 11 < seen[:9].min() <= seen[:9].max() < 43


def test_a_limit_that_is_not_reached_changes_nothing():
    results = []
    for limit in (None, 96):
        module = DinoDetrDenoising(tiny_config(max_denoising_queries=limit))
        torch.manual_seed(3)
        module.label_embedding.weight.data.normal_()
        results.append(module(collect_targets(tiny_labels(3, 0, 2), 3, NUM_LABELS, "cpu"), 6))
    first, second = ({**one._asdict(), **one.targets.matches._asdict()} for one in results)
    for name in set(first) - {"targets"}:
        assert torch.equal(torch.as_tensor(first[name]), torch.as_tensor(second[name])), name


def test_padding_is_hidden_on_request_where_there_is_any():
    _, _, shown = denoise(3, 1)
    assert shown.attention_mask.ndim == 2
    _, targets, hidden = denoise(3, 1, mask_denoising_padding=True)
    used = torch.zeros(hidden.content.shape[:2], dtype=torch.bool)
    for _, image, _, positive, negative in places(targets, hidden.targets.num_groups, 3):
        used[image, [positive, negative]] = True
    num_denoising = used.shape[1]
    expected = shown.attention_mask[None] & torch.cat([used, torch.ones(2, 6, dtype=torch.bool)], dim=1)[:, None]
    assert torch.equal(hidden.attention_mask, expected)
    assert (~used).sum() == num_denoising * 2 // 3  # two of three boxes are missing in one of two images
    _, _, full = denoise(2, 2, mask_denoising_padding=True)
    assert full.attention_mask.ndim == 2


def test_the_gradient_reaches_the_labels_that_were_looked_up():
    module, targets, denoising = denoise(3, 0, 2, label_noise_ratio=0)
    denoising.content.sum().backward()
    touched = module.label_embedding.weight.grad.any(-1).nonzero().flatten().tolist()
    assert touched == sorted(set(targets.class_labels.tolist()))


def test_references_carry_no_gradient():
    _, _, denoising = denoise(3, 0, 2)
    assert not denoising.references.requires_grad
