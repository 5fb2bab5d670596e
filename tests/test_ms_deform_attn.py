import math
from functools import partial

import pytest
import torch

from dino_hf.model.layers import linear
from dino_hf.model.ms_deform_attn import (
    DinoDetrDeformableAttention,
    attention_weights,
    ms_deform_attn,
    ms_deform_attn_fused,
    sampling_locations,
    star_offsets,
)
from helpers import num_tokens, randomize, tiny_levels

IN_PYTORCH = ["reference", "torch", "gather"]  # the kernels have tests of their own, beside them
ODD_SHAPES = ((6, 9), (3, 5), (1, 2), (1, 1), (2, 7))  # never square: a swapped x and y must fail


def random_inputs(shapes, queries=7, heads=3, dim=4, points=2, dtype=torch.float64):
    tokens, levels = sum(h * w for h, w in shapes), len(shapes)
    value = torch.randn(2, tokens, heads, dim, dtype=dtype)
    locations = torch.rand(2, queries, heads, levels, points, 2, dtype=dtype) * 1.4 - 0.2  # some outside
    weights = torch.rand(2, queries, heads, levels * points, dtype=dtype).softmax(-1)
    return value, shapes, locations, weights.unflatten(-1, (levels, points))


def slow_ms_deform_attn(value, shapes, locations, weights):
    """One bilinear sample after the other, in plain arithmetic."""
    batch, queries, heads, levels, points = weights.shape
    out = value.new_zeros(batch, queries, heads, value.shape[-1])
    start = 0
    for level in range(levels):
        height, width = shapes[level]
        maps = value[:, start : start + height * width].unflatten(1, (height, width))
        start += height * width
        for b, q, h, p in torch.cartesian_prod(*map(torch.arange, (batch, queries, heads, points))).tolist():
            x = locations[b, q, h, level, p, 0].item() * width - 0.5
            y = locations[b, q, h, level, p, 1].item() * height - 0.5
            for row in (math.floor(y), math.floor(y) + 1):
                for column in (math.floor(x), math.floor(x) + 1):
                    if 0 <= row < height and 0 <= column < width:
                        share = (1 - abs(y - row)) * (1 - abs(x - column))
                        out[b, q, h] += weights[b, q, h, level, p] * share * maps[b, row, column, h]
    return out.flatten(2)


@pytest.mark.parametrize("backend", IN_PYTORCH)
@pytest.mark.parametrize("num_levels", [1, 2, 3, 4, 5])
def test_the_operator_agrees_with_a_loop_over_samples(backend, num_levels):
    inputs = random_inputs(ODD_SHAPES[:num_levels], queries=3, heads=2)
    # the same bilinear sums in another order, in float64
    torch.testing.assert_close(ms_deform_attn(*inputs, backend), slow_ms_deform_attn(*inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", IN_PYTORCH)
def test_the_operator_agrees_with_transformers(backend):
    from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

    value, shapes, locations, weights = random_inputs(ODD_SHAPES)
    theirs = MultiScaleDeformableAttention()(value, torch.tensor(shapes), list(shapes), None, locations, weights, 64)
    # the same bilinear sums in another order, in float64
    torch.testing.assert_close(ms_deform_attn(value, shapes, locations, weights, backend), theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", IN_PYTORCH)
def test_the_gradients_of_the_operator_are_those_of_differences(backend):
    value, shapes, locations, weights = random_inputs(((3, 4), (2, 1)), queries=2, heads=2, dim=2)
    value, locations, weights = (x.requires_grad_() for x in (value, locations, weights))
    assert torch.autograd.gradcheck(
        lambda *x: ms_deform_attn(x[0], shapes, *x[1:], backend), (value, locations, weights)
    )


@pytest.mark.parametrize("backend", IN_PYTORCH)
def test_samples_on_the_border_and_far_outside(backend):
    value, shapes, _, weights = random_inputs(((2, 3),), queries=4, heads=1, points=1)
    points = torch.tensor([[0.0, 0.5], [1.0, 1.0], [1.7, 0.5], [-40.0, 1e6]], dtype=torch.float64)
    locations = points.expand(2, -1, -1)[:, :, None, None, None]
    maps = value.view(2, 2, 3, 4)
    expected = weights.view(2, 4, 1) * torch.stack(
        [
            (maps[:, 0, 0] + maps[:, 1, 0]) / 4,  # half outside, between two rows
            maps[:, 1, 2] / 4,  # three quarters outside
            torch.zeros(2, 4, dtype=torch.float64),
            torch.zeros(2, 4, dtype=torch.float64),
        ],
        dim=1,
    )
    torch.testing.assert_close(ms_deform_attn(value, shapes, locations, weights, backend), expected)


@pytest.mark.parametrize("backend", IN_PYTORCH)
def test_a_sample_at_the_centre_of_a_cell_is_its_value(backend):
    shapes = ((3, 5), (1, 2))
    value, _, _, _ = random_inputs(shapes, heads=2)
    locations = torch.zeros(2, 1, 2, 2, 1, 2, dtype=torch.float64)
    locations[..., 0, :, :] = torch.tensor([3.5 / 5, 1.5 / 3])
    weights = torch.zeros(2, 1, 2, 2, 1, dtype=torch.float64)
    weights[:, :, :, 0] = 1
    # 3.5 / 5 was rounded to float32
    torch.testing.assert_close(
        ms_deform_attn(value, shapes, locations, weights, backend)[:, 0],
        value[:, 1 * 5 + 3].flatten(1),
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize("backend", IN_PYTORCH)
def test_no_query_is_no_result(backend):
    value, shapes, locations, weights = random_inputs(ODD_SHAPES, queries=0)
    assert ms_deform_attn(value, shapes, locations, weights, backend).shape == (2, 0, 12)


@pytest.mark.parametrize("backend", IN_PYTORCH)
def test_a_bfloat16_value_is_sampled_at_float32_locations(backend):
    shapes = ((5, 167),)  # bfloat16 coordinates would be off by up to a third of a column
    value, _, locations, weights = random_inputs(shapes, dtype=torch.float32)
    result = ms_deform_attn(value.bfloat16(), shapes, locations, weights.bfloat16(), backend)
    assert result.dtype == torch.bfloat16
    expected = ms_deform_attn(value, shapes, locations, weights, backend)
    # value, weights and result are each rounded to 8 bits: relative 3 * 2 ** -9, of terms up to about 3
    torch.testing.assert_close(result.float(), expected, rtol=0, atol=0.02)


WRONG = {
    "tokens": (lambda v, s, l, w: (v[:, 1:], s, l, w), r"value \(2, 70, 3, 4\).*expected value \(B, 71, H, D\)"),
    "levels": (lambda v, s, l, w: (v, s, l[:, :, :, 1:], w[:, :, :, 1:]), r"the 3 levels \[\(6, 9\)"),
    "points": (lambda v, s, l, w: (v, s, l[..., :1, :], w), r"locations \(2, 7, 3, 3, 1, 2\)"),
    "heads": (lambda v, s, l, w: (v[:, :, :1], s, l, w), r"weights \(2, 7, 3, 3, 2\) do not match"),
    "batch": (lambda v, s, l, w: (v[:1], s, l, w), r"value \(1, 71, 3, 4\)"),
    "queries": (lambda v, s, l, w: (v, s, l[:, 1:], w), r"locations \(2, 6, 3, 3, 2, 2\)"),
    "dimensions": (lambda v, s, l, w: (v[0], s, l, w), r"value has shape \(71, 3, 4\).*expected 4 and 5"),
    "empty level": (lambda v, s, l, w: (v, ((6, 9), (3, 5), (0, 7)), l, w), r"\(0, 7\)\] must be pairs"),
    "no level": (lambda v, s, l, w: (v, (), l, w), r"levels \[\] must be pairs"),
    "no point": (lambda v, s, l, w: (v, s, l[..., :0, :], w[..., :0]), r"weights \(2, 7, 3, 3, 0\) do not match"),
    "backend": (lambda v, s, l, w: (v, s, l, w, "fast"), r"no ms_deform_attn backend 'fast'; known are \["),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_wrong_shapes_and_unknown_backends_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ms_deform_attn(*change(*random_inputs(ODD_SHAPES[:3])))


@pytest.mark.parametrize("size", [2, 4], ids=["points", "boxes"])
@pytest.mark.parametrize("backend", [*IN_PYTORCH, None])
def test_the_fused_form_is_the_plain_one_after_locations_and_softmax(backend, size):
    value, shapes, offsets, logits = random_inputs(ODD_SHAPES, dtype=torch.float32)
    references = torch.rand(2, 7, 5, size)
    expected = ms_deform_attn(
        value, shapes, sampling_locations(references, offsets, shapes), attention_weights(logits), "reference"
    )
    fused = ms_deform_attn_fused(value, shapes, references, offsets, logits, backend)
    # float32 sums of ten samples of size one, in another order
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 7, 2, 3), (1, 7, 2, 2), (2, 1, 2, 2), (2, 7, 1, 4)])
@pytest.mark.parametrize("backend", [*IN_PYTORCH, None])
def test_references_that_do_not_fit_are_refused_by_every_backend(backend, shape):
    value, shapes, offsets, logits = random_inputs(ODD_SHAPES[:2])
    with pytest.raises(ValueError, match=r"references have shape .*expected \(2, 7, 2, 2\) or \(2, 7, 2, 4\)"):
        ms_deform_attn_fused(value, shapes, torch.rand(shape), offsets, logits, backend)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e38])
@pytest.mark.parametrize("backend", [*IN_PYTORCH, None])
def test_what_is_no_place_is_zero_in_every_backend(backend, bad):
    value, shapes, locations, weights = random_inputs(ODD_SHAPES, dtype=torch.float32)
    locations[:, 2] = bad
    locations.requires_grad_()
    out = ms_deform_attn(value, shapes, locations, weights, backend)
    assert out.isfinite().all()
    assert not out[:, 2].any()
    out.sum().backward()
    assert locations.grad.isfinite().all()
    assert not locations.grad[:, 2].any()


@pytest.mark.parametrize("size", [2, 4], ids=["points", "boxes"])
def test_references_get_a_gradient_where_they_want_one(size):
    value, shapes, offsets, logits = random_inputs(ODD_SHAPES, dtype=torch.float32)
    references = torch.rand(2, 7, 5, size, requires_grad=True)
    grads = {}
    for backend in ("reference", None):
        ms_deform_attn_fused(value, shapes, references, offsets, logits, backend).square().sum().backward()
        grads[backend], references.grad = references.grad, None
    assert grads[None].abs().sum() > 0
    # sums of ten slopes of maps with up to nine cells, in float32
    torch.testing.assert_close(grads[None], grads["reference"], rtol=1e-4, atol=1e-4)


def test_heads_start_by_looking_on_a_star():
    offsets = linear(32, 8 * 3 * 4 * 2, partial(star_offsets, num_heads=8, num_levels=3, num_points=4))
    assert not offsets.weight.any()
    star = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    bias = offsets.bias.view(8, 3, 4, 2)
    for head, direction in enumerate(star):
        for point in range(4):
            expected = torch.tensor(direction, dtype=torch.float32).mul(point + 1).expand(3, 2)
            # the sine of a multiple of pi in float32
            torch.testing.assert_close(bias[head, :, point], expected, rtol=0, atol=1e-5)


def test_attention_starts_uniform_and_projections_xavier():
    attention = DinoDetrDeformableAttention(32, num_heads=4, num_levels=3, num_points=2)
    levels = tiny_levels()
    references = torch.rand(2, 5, 2)
    _, points = attention(torch.randn(2, 5, 32), references, torch.randn(2, num_tokens(levels), 32), levels, True)
    torch.testing.assert_close(points.weights, torch.full((2, 5, 4, 3, 2), 1 / 6))
    for projection in (attention.value_proj, attention.output_proj):
        assert not projection.bias.any()
        assert 0.95 < projection.weight.abs().max() / math.sqrt(6 / 64) <= 1


@pytest.mark.parametrize("size", [2, 4], ids=["points", "boxes"])
def test_the_module_agrees_with_its_formula(size):
    heads, points = 4, 3
    attention = randomize(DinoDetrDeformableAttention(32, heads, num_levels=3, num_points=points)).double()
    levels = tiny_levels()
    levels = levels._replace(valid_ratios=levels.valid_ratios.double())
    queries, references = torch.randn(2, 5, 32).double(), torch.rand(2, 5, size).double()
    memory = torch.randn(2, num_tokens(levels), 32).double()
    output, points_seen = attention(queries, references, memory, levels, need_weights=True)
    # the same, but for the kernel's or the fallback's order of steps, in float64
    torch.testing.assert_close(attention(queries, references, memory, levels)[0], output, rtol=0, atol=1e-12)

    value = attention.value_proj(memory) * ~levels.padding_mask[..., None]
    offsets = attention.sampling_offsets(queries).view(2, 5, heads, 3, points, 2)
    expected_weights = attention.attention_weights(queries).view(2, 5, heads, 3 * points).softmax(-1)
    torch.testing.assert_close(points_seen.weights, expected_weights.view(2, 5, heads, 3, points))
    locations = torch.empty_like(offsets)
    for level, (height, width) in enumerate(levels.shapes):
        for axis, cells in enumerate((width, height)):
            ratio = levels.valid_ratios[:, level, axis, None, None, None]
            center = references[:, :, axis, None, None] * ratio
            if size == 2:
                shift = offsets[..., level, :, axis] / cells
            else:
                box_size = references[:, :, 2 + axis, None, None] * ratio
                shift = offsets[..., level, :, axis] / points * box_size * 0.5
            locations[..., level, :, axis] = center + shift
    sampled = slow_ms_deform_attn(value.unflatten(-1, (heads, -1)), levels.shapes, locations, points_seen.weights)
    # the module rounds its offsets to float32
    torch.testing.assert_close(output, attention.output_proj(sampled), rtol=0, atol=1e-5)


def test_padded_tokens_say_nothing():
    attention = randomize(DinoDetrDeformableAttention(32, 4, num_levels=3, num_points=2))
    levels = tiny_levels()
    queries, references = torch.randn(2, 5, 32), torch.rand(2, 5, 4)
    memory = torch.randn(2, num_tokens(levels), 32)
    changed = torch.where(levels.padding_mask[..., None], 100.0, memory)
    before, _ = attention(queries, references, memory, levels)
    after, _ = attention(queries, references, changed, levels)
    assert torch.equal(before, after)
    assert not torch.equal(memory, changed)


def test_a_bfloat16_module_is_close_to_its_float32_self():
    attention = randomize(DinoDetrDeformableAttention(32, 4, num_levels=3, num_points=2), scale=0.1)
    levels = tiny_levels()
    queries, memory = torch.randn(2, 5, 32).bfloat16(), torch.randn(2, num_tokens(levels), 32).bfloat16()
    references = torch.rand(2, 5, 2)
    expected, _ = attention(queries.float(), references, memory.float(), levels)
    result, _ = attention.bfloat16()(queries, references, memory, levels)
    assert result.dtype == torch.bfloat16
    # offsets of about 0.5 cells are rounded to 8 bits, and so are five tensors on the way: a few times 2 ** -9
    torch.testing.assert_close(result.float(), expected, rtol=0, atol=0.03)
