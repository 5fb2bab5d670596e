import math

import pytest
import torch
from torch import nn

from dino_hf.model.decoder import DinoDetrDecoder, DinoDetrDecoderLayer, DinoDetrSelfAttention
from dino_hf.model.denoising import denoising_attention_mask
from dino_hf.model.layers import attention_xavier, linear
from helpers import NUM_LABELS, num_tokens, randomize, tiny_config, tiny_levels

LEVELS = tiny_levels()


def tiny_decoder(attention="sdpa", **changes) -> DinoDetrDecoder:
    config = tiny_config(num_feature_levels=3, **changes)
    config._attn_implementation = attention
    return randomize(DinoDetrDecoder(config), scale=0.1).eval()


def random_inputs(num_queries=6):
    """queries, references, memory, levels"""
    references = 0.2 + 0.6 * torch.rand(2, num_queries, 4)
    return torch.randn(2, num_queries, 64), references, torch.randn(2, num_tokens(LEVELS), 64), LEVELS


def masked_attention(layer, queries, position, mask):
    """Attention of all pairs with one mask (N + Q, N + Q), True where the row may attend to the column."""
    theirs = nn.MultiheadAttention(64, 4, batch_first=True)
    names = ("q_proj", "k_proj", "v_proj")
    weights = {
        "in_proj_weight": torch.cat([getattr(layer, name).weight for name in names]),
        "in_proj_bias": torch.cat([getattr(layer, name).bias for name in names]),
        "out_proj.weight": layer.o_proj.weight,
        "out_proj.bias": layer.o_proj.bias,
    }
    placed = queries + position
    blocked = None if mask is None else ~mask
    inputs = {"query": placed, "key": placed, "value": queries}
    return torch.func.functional_call(theirs, weights, (), inputs | {"attn_mask": blocked, "need_weights": False})[0]


def mask_of_all_pairs(num_groups, group_size, num_queries):
    """The mask of the original release: each group sees itself and the matching queries, which see each other only."""
    num_denoising = num_groups * group_size
    mask = torch.zeros(num_denoising + num_queries, num_denoising + num_queries, dtype=torch.bool)
    mask[:, num_denoising:] = True
    for start in range(0, num_denoising, group_size):
        mask[start : start + group_size, start : start + group_size] = True
    return mask


def transcribed_decoder(decoder, queries, references, memory, levels, mask):
    """The loop of the original release, its position embedding and the head loop of its outer model."""
    ratios = torch.cat([levels.valid_ratios] * 2, dim=-1)
    outputs, starts = [], [references]
    for index, layer in enumerate(decoder.layers):
        first_level = references * ratios[:, None, 0]
        frequency = 10_000 ** (2 * torch.div(torch.arange(32), 2, rounding_mode="floor") / 32)
        parts = []
        for axis in (1, 0, 2, 3):
            angle = first_level[..., axis, None] * 2 * math.pi / frequency
            parts.append(torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-2))
        first, second = decoder.position_mlp.layers
        position = second(first(torch.cat(parts, dim=-1)).relu())
        queries = layer.self_attn_norm(queries + masked_attention(layer.self_attn, queries, position, mask))
        attended = layer.cross_attn(queries + position, references, memory, levels, True)[0]
        queries = layer.cross_attn_norm(queries + attended)
        queries = layer.mlp_norm(queries + layer.mlp(queries))
        head = decoder.heads[index % len(decoder.heads)]
        moved = (head.box_head(queries) + torch.special.logit(references, eps=1e-3)).sigmoid()
        references = moved.detach()
        starts.append(moved)
        outputs.append(decoder.norm(queries))
    boxes, logits = [], []
    for index, (start, output) in enumerate(zip(starts[:-1], outputs, strict=True)):
        head = decoder.heads[index % len(decoder.heads)]
        boxes.append((head.box_head(output) + torch.special.logit(start, eps=1e-3)).sigmoid())
        logits.append(head.class_head(output))
    return torch.stack(outputs), torch.stack(logits), torch.stack(boxes)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("groups", [0, 1, 2])
def test_the_decoder_agrees_in_values_and_gradients_with_a_transcription_of_the_original_loop(share, groups):
    decoder = tiny_decoder(share_decoder_heads=share)
    inputs, num_queries = random_inputs(), 6 - 2 * groups
    masks = (None, None)
    if groups:
        masks = denoising_attention_mask(groups, 2, num_queries), mask_of_all_pairs(groups, 2, num_queries)
    results = []
    for decoded in (
        decoder(*inputs, 2 * groups, masks[0])[0],
        transcribed_decoder(decoder, *inputs, masks[1]),
    ):
        decoder.zero_grad()
        sum(part.square().sum() for part in decoded).backward()
        results.append([*decoded, *(parameter.grad for parameter in decoder.parameters())])
    # float32, in another order of operations; gradients are sums over all queries and layers
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eps", [1e-3, 1e-5])
def test_the_bound_under_predicted_boxes_is_not_that_of_the_next_start(eps):
    """mmdetection bounds the first by 1e-5 and the second, as everyone, by 1e-3: it shows on boxes at the border."""
    decoder = tiny_decoder(pred_boxes_eps=eps, decoder_layers=2).double()
    queries, references, memory, levels = random_inputs()
    references[:, :3] = torch.tensor([0.0, 1.0, 4e-4, 0.9997])
    levels = levels._replace(valid_ratios=levels.valid_ratios.double())
    inputs = queries.double(), references.double(), memory.double(), levels
    with torch.no_grad():
        decoded = decoder(*inputs, 0, None)[0]
        start = inputs[1]
        for layer, boxes in enumerate(decoded.boxes):
            head = decoder.heads[0]
            bounded = torch.log(start.clamp(min=eps) / (1 - start).clamp(min=eps))
            moved = head.box_head(decoded.hidden_states[layer]).float() + bounded
            torch.testing.assert_close(boxes, moved.sigmoid(), rtol=0, atol=1e-7)
            if layer == 0:
                _, states = decoder(*inputs, 0, None, output_hidden_states=True)
                bounded = torch.log(start.clamp(min=1e-3) / (1 - start).clamp(min=1e-3))
                start = (head.box_head(states.hidden_states[1]).float() + bounded).sigmoid()


def test_predictions_of_all_layers_have_one_form():
    decoded = tiny_decoder()(*random_inputs(), 0, None)[0]
    assert decoded.hidden_states.shape == (3, 2, 6, 64)
    assert decoded.logits.shape == (3, 2, 6, NUM_LABELS)
    assert decoded.boxes.shape == (3, 2, 6, 4)
    assert ((decoded.boxes >= 0) & (decoded.boxes <= 1)).all()


def test_split_gives_the_first_queries_and_the_others():
    decoded = tiny_decoder()(*random_inputs(), 0, None)[0]
    first, others = decoded.split(2)
    for whole, a, b in zip(decoded, first, others, strict=True):
        assert a.shape[2] == 2
        assert torch.equal(torch.cat([a, b], dim=2), whole)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("twice", [True, False])
def test_look_forward_twice_trains_the_box_head_of_a_layer_and_of_the_one_before(layer, twice):
    decoder = tiny_decoder(share_decoder_heads=False, look_forward_twice=twice)
    decoder(*random_inputs(), 0, None)[0].boxes[layer].sum().backward()
    reached = [
        index
        for index, head in enumerate(decoder.heads)
        if any(parameter.grad is not None and parameter.grad.any() for parameter in head.box_head.parameters())
    ]
    assert reached == sorted({max(layer - 1, 0) if twice else layer, layer})


def test_look_forward_twice_is_a_matter_of_gradients_only():
    once, twice = (tiny_decoder(look_forward_twice=value) for value in (False, True))
    once.load_state_dict(twice.state_dict())
    inputs = random_inputs()
    for a, b in zip(*(decoder(*inputs, 0, None)[0] for decoder in (once, twice)), strict=True):
        assert torch.equal(a, b)


def test_where_queries_look_carries_no_gradient_to_boxes():
    decoder = tiny_decoder(share_decoder_heads=False)
    decoder(*random_inputs(), 0, None)[0].logits[-1].sum().backward()
    for head in decoder.heads:
        assert all(parameter.grad is None or not parameter.grad.any() for parameter in head.box_head.parameters())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("groups", [1, 3])
def test_matching_queries_do_not_notice_denoising_queries(attention, groups):
    decoder = tiny_decoder(attention)
    queries, references, memory, levels = random_inputs()
    num_denoising = groups * 4
    more_queries = torch.cat([torch.randn(2, num_denoising, 64), queries], dim=1)
    more_references = torch.cat([torch.rand(2, num_denoising, 4), references], dim=1)
    mask = denoising_attention_mask(groups, 4, 6)
    alone = decoder(queries, references, memory, levels, 0, None)[0]
    _, beside = decoder(more_queries, more_references, memory, levels, num_denoising, mask)[0].split(num_denoising)
    for a, b in zip(alone, beside, strict=True):
        # sums of another length in float32
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_denoising_queries_notice_their_own_group_only():
    decoder = tiny_decoder()
    queries, references, memory, levels = random_inputs(2 * 4 + 6)
    mask = denoising_attention_mask(2, 4, 6)
    changed = queries.clone()
    changed[:, 5] += 1  # of the second group
    before = decoder(queries, references, memory, levels, 8, mask)[0].logits
    after = decoder(changed, references, memory, levels, 8, mask)[0].logits
    moved = (before - after).abs().amax((0, 1, 3)) > 1e-6  # far below what a change of 1 does, far above rounding
    assert moved.tolist() == [False] * 4 + [True] * 4 + [False] * 6


@pytest.mark.parametrize("groups", [0, 1, 2])
def test_eager_attention_equals_sdpa(groups):
    eager, sdpa = tiny_decoder("eager"), tiny_decoder("sdpa")
    sdpa.load_state_dict(eager.state_dict())
    inputs = random_inputs()
    mask = denoising_attention_mask(groups, 2, 6 - 2 * groups) if groups else None
    for a, b in zip(*(decoder(*inputs, 2 * groups, mask)[0] for decoder in (eager, sdpa)), strict=True):
        # sums in another order in float32
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_self_attention_agrees_with_that_of_torch(attention, padded, groups):
    """Without weights, in two parts; with them, as one. Padding is hidden from all others in the image that has it."""
    config = tiny_config()
    config._attn_implementation = attention
    ours, theirs = randomize(DinoDetrSelfAttention(config)), nn.MultiheadAttention(64, 4, batch_first=True)
    projections = (ours.q_proj, ours.k_proj, ours.v_proj)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([projection.weight for projection in projections]))
        theirs.in_proj_bias.copy_(torch.cat([projection.bias for projection in projections]))
        theirs.out_proj.load_state_dict(ours.o_proj.state_dict())
    num_denoising = 4 * groups
    size = num_denoising + 3
    queries, position, is_padding = torch.randn(2, size, 64), torch.randn(2, size, 64), None
    whole = mask_of_all_pairs(groups, 4, 3).repeat(2, 1, 1)
    if padded:
        is_padding = torch.zeros(2, num_denoising, dtype=torch.bool)
        is_padding[1, 1::2] = True
        whole[1, :, 1:num_denoising:2] = False
    mask = denoising_attention_mask(groups, 4, 3, is_padding)
    placed = queries + position
    blocked = ~whole.repeat_interleave(4, dim=0)  # for each head
    expected, expected_weights = theirs(placed, placed, queries, attn_mask=blocked, average_attn_weights=False)
    result, weights = ours(queries, position, num_denoising, mask, need_weights=True)
    # sums in another order in float32
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=1e-5)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    unweighted, _ = ours(queries, position, num_denoising, mask, need_weights=False)
    torch.testing.assert_close(unweighted, expected, rtol=1e-5, atol=1e-5)


def test_projections_of_self_attention_start_as_parts_of_one_matrix():
    weight = linear(64, 64, attention_xavier).weight
    bound = math.sqrt(6 / (64 + 3 * 64))
    assert 0.95 * bound < weight.abs().max() <= bound
    assert not linear(64, 64, attention_xavier).bias.any()


def test_a_layer_runs_self_attention_then_cross_attention_then_feed_forward():
    layer = randomize(DinoDetrDecoderLayer(tiny_config(num_feature_levels=3)))
    queries, references, memory, levels = random_inputs()
    position = torch.randn(2, 6, 64)
    x = layer.self_attn_norm(queries + layer.self_attn(queries, position, 0, None, True)[0])
    x = layer.cross_attn_norm(x + layer.cross_attn(x + position, references, memory, levels, True)[0])
    expected = layer.mlp_norm(x + layer.mlp(x))
    actual, self_weights, points = layer(queries, position, references, memory, levels, 0, None, need_weights=True)
    torch.testing.assert_close(actual, expected)
    assert self_weights.shape == (2, 4, 6, 6)
    assert points.weights.shape == (2, 6, 4, 3, 3)
    assert points.locations.shape == (2, 6, 4, 3, 3, 2)


def test_the_states_of_each_layer_are_returned_on_request():
    queries, references, memory, levels = random_inputs()
    decoder = tiny_decoder()
    decoded, states = decoder(queries, references, memory, levels, 0, None, True, True)
    assert len(states.hidden_states) == 3 + 1
    assert torch.equal(states.hidden_states[0], queries)
    torch.testing.assert_close(decoder.norm(states.hidden_states[-1]), decoded.hidden_states[-1])
    assert [weights.shape for weights in states.attentions] == [(2, 4, 6, 6)] * 3
    assert [points.weights.shape for points in states.points] == [(2, 6, 4, 3, 3)] * 3


@pytest.mark.parametrize(("share", "num_heads"), [(True, 1), (False, 3)])
def test_heads_are_shared_or_one_for_each_layer(share, num_heads):
    assert len(tiny_decoder(share_decoder_heads=share).heads) == num_heads


@pytest.mark.parametrize("share", [True, False])
def test_every_parameter_gets_a_gradient(share):
    decoder = tiny_decoder(share_decoder_heads=share)
    decoded = decoder(*random_inputs(), 0, None)[0]
    (decoded.logits.sum() + decoded.boxes.sum()).backward()
    assert [name for name, parameter in decoder.named_parameters() if parameter.grad is None] == []


def test_boxes_are_float32_in_a_model_of_half_precision():
    queries, references, memory, levels = random_inputs()
    decoded = tiny_decoder().bfloat16()(queries.bfloat16(), references, memory.bfloat16(), levels, 0, None)[0]
    assert decoded.boxes.dtype == torch.float32
    assert decoded.logits.dtype == torch.bfloat16
