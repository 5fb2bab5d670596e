import math

import pytest
import torch

from dino_hf.model.feature_levels import cell_centers
from dino_hf.model.query_selection import DinoDetrQuerySelection, grid_anchors
from helpers import NUM_LABELS, num_tokens, randomize, tiny_config, tiny_levels

LEVELS = tiny_levels()


def tiny_selection(**changes) -> DinoDetrQuerySelection:
    return randomize(DinoDetrQuerySelection(tiny_config(num_feature_levels=3, **changes)))


def random_memory(levels=LEVELS) -> torch.Tensor:
    return torch.randn(2, num_tokens(levels), 64)


@pytest.mark.parametrize("levels", [LEVELS, tiny_levels(((5, 60), (3, 30)), valid=((5, 60), (4, 51)))])
def test_anchors_agree_with_a_loop_over_cells(levels):
    anchors, is_anchor = grid_anchors(levels)
    centers = cell_centers(levels)
    start, none = 0, 0
    for level, (height, width) in enumerate(levels.shapes):
        size = 0.05 * 2**level
        for token in range(start, start + height * width):
            for image in range(2):
                box = [*centers[image, token].tolist(), size, size]
                valid = all(0.01 < side < 0.99 for side in box) and not levels.padding_mask[image, token]
                none += not valid
                assert is_anchor[image, token] == valid
                if valid:
                    expected = torch.tensor([math.log(side / (1 - side)) for side in box])
                    # float32 against Python's doubles
                    torch.testing.assert_close(anchors[image, token], expected, rtol=0, atol=1e-4)
                else:
                    assert (anchors[image, token] == math.inf).all()
        start += height * width
    assert none > 0


def test_centers_nearer_than_a_hundredth_to_the_border_have_no_anchor():
    levels = tiny_levels(((3, 60),), valid=((3, 60), (3, 45)))
    _, is_anchor = grid_anchors(levels)
    is_anchor = is_anchor.view(2, 3, 60)
    assert not is_anchor[0, :, [0, 59]].any()  # 0.5 / 60 < 0.01
    assert is_anchor[0, :, 1:59].all()
    assert is_anchor[1, :, :45].all()  # 0.5 / 45 > 0.01
    assert not is_anchor[1, :, 45:].any()


def test_the_selection_agrees_with_refining_all_tokens_first():
    selection, memory = tiny_selection(), random_memory()
    proposals = selection(memory, LEVELS)
    anchors, is_anchor = grid_anchors(LEVELS)
    tokens = selection.memory_norm(selection.memory_proj(memory * is_anchor[..., None]))
    logits = selection.head.class_head(tokens)
    boxes = (selection.head.box_head(tokens) + anchors).sigmoid()
    for image in range(2):
        best = sorted(range(len(tokens[image])), key=lambda token: -logits[image, token].max().item())[:15]
        # ties: tokens without an anchor are all alike, so their order says nothing, and neither does their selection
        torch.testing.assert_close(proposals.logits[image], logits[image, best])
        torch.testing.assert_close(proposals.boxes[image], boxes[image, best])


def test_who_watches_the_selection_sees_all_tokens_scored_in_one_call():
    levels, seen = tiny_levels(((30, 40), (15, 20), (8, 10))), []
    selection = tiny_selection()
    selection.memory_proj.register_forward_hook(
        lambda layer, _, output: seen.append((output.shape, output.requires_grad))
    )
    selection(random_memory(levels), levels)
    # nothing is kept for a backward pass of the scores, which have none
    assert seen == [((2, num_tokens(levels), 64), False), ((2, 15, 64), True)]


def test_references_are_the_boxes_without_gradient():
    proposals = tiny_selection()(random_memory(), LEVELS)
    assert torch.equal(proposals.references, proposals.boxes)
    assert not proposals.references.requires_grad
    assert proposals.boxes.requires_grad
    assert proposals.references.dtype == torch.float32


def test_content_is_learnt_and_the_same_for_every_image():
    selection = tiny_selection()
    content = selection(random_memory(), LEVELS).content
    assert content.shape == (2, 15, 64)
    assert torch.equal(content, selection.content.weight.expand(2, -1, -1))


def test_pure_selection_takes_the_content_of_the_selected_tokens():
    selection, memory = tiny_selection(mixed_query_selection=False), random_memory()
    assert selection.content is None
    proposals = selection(memory, LEVELS)
    assert proposals.content.shape == (2, 15, 64)
    assert not proposals.content.requires_grad  # as the original's
    # The class head scores the same tokens.
    torch.testing.assert_close(selection.head.classify(proposals.content), proposals.logits)


def test_fewer_tokens_than_queries_give_as_many_proposals_as_there_are_tokens():
    levels = tiny_levels(((2, 3), (1, 2), (1, 1)), valid=((2, 3), (1, 2)))
    proposals = tiny_selection()(random_memory(levels), levels)
    assert proposals.content.shape == (2, 9, 64)
    assert proposals.references.shape == proposals.boxes.shape == (2, 9, 4)
    assert proposals.logits.shape == (2, 9, NUM_LABELS)
    assert proposals.boxes.isfinite().all()


def test_what_padding_holds_does_not_matter():
    selection, memory = tiny_selection(), random_memory()
    changed = torch.where(LEVELS.padding_mask[..., None], 50.0, memory)
    for before, after in zip(selection(memory, LEVELS), selection(changed, LEVELS), strict=True):
        assert torch.equal(before, after)


def test_the_losses_of_proposals_reach_every_parameter_and_the_memory():
    selection, memory = tiny_selection(), random_memory().requires_grad_()
    proposals = selection(memory, LEVELS)
    (proposals.logits.sum() + proposals.boxes.sum() + proposals.content.sum()).backward()
    assert [name for name, parameter in selection.named_parameters() if parameter.grad is None] == []
    assert memory.grad.any()
    assert not memory.grad[LEVELS.padding_mask].any()


def test_boxes_are_float32_in_a_model_of_half_precision():
    proposals = tiny_selection().bfloat16()(random_memory().bfloat16(), LEVELS)
    assert proposals.logits.dtype == torch.bfloat16
    assert proposals.boxes.dtype == proposals.references.dtype == torch.float32


def test_gradients_are_those_of_scoring_all_tokens():
    selection, memory = tiny_selection().double(), random_memory().double().requires_grad_()
    leaves = [memory, *selection.memory_proj.parameters(), *selection.head.parameters()]
    proposals = selection(memory, LEVELS)
    anchors, is_anchor = grid_anchors(LEVELS)
    tokens = selection.memory_norm(selection.memory_proj(memory * is_anchor[..., None]))
    logits = selection.head.class_head(tokens)
    best = logits.amax(-1).topk(15).indices[..., None]
    logits, boxes, anchors = (
        x.gather(1, best.expand(-1, -1, x.shape[-1])) for x in (logits, selection.head.box_head(tokens), anchors)
    )
    expected = (logits, (anchors + boxes).sigmoid())
    weights = [torch.randn_like(x) for x in expected]
    ours = torch.autograd.grad((proposals.logits, proposals.boxes.double()), leaves, weights)
    theirs = torch.autograd.grad(expected, leaves, weights)
    for our, their in zip(ours, theirs, strict=True):
        # the box head's result is float32
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-5)
