"""The operator on a CPU: the C++ kernel with each instruction set of this machine, and plain PyTorch.

They are compared with plain arithmetic in float64, computed sample by sample, and its gradients by autograd.
"""

import math
import subprocess
import sys

import pytest
import torch

SHAPES = ((6, 9), (3, 5), (1, 2), (1, 1), (2, 7))  # never square: a swapped x and y must fail


def samples(value, shape, x, y):
    """value (B, h * w, H, D), x and y (B, Q, H, P) in cells -> (B, Q, H, P, D). Differentiable."""
    height, width = shape
    batch, _, heads, _ = value.shape
    inside_of_reach = (x > -1) & (x < width) & (y > -1) & (y < height)  # False for NaN
    x, y = x.where(inside_of_reach, -5), y.where(inside_of_reach, -5)
    total = 0
    for right in (0, 1):
        for below in (0, 1):
            column, row = x.detach().floor() + right, y.detach().floor() + below
            share = (1 - (x - column).abs()) * (1 - (y - row).abs())
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            index = (row * width + column).where(inside, 0).long()  # (B, Q, H, P)
            b = torch.arange(batch)[:, None, None, None]
            h = torch.arange(heads)[None, None, :, None]
            total = total + (share * inside)[..., None] * value[b, index, h]
    return total


def expected(value, shapes, references, points, weights):
    """The operator, computed as it is defined."""
    num_points = points.shape[-2]
    if references is not None:
        weights = weights.flatten(-2).softmax(-1).view_as(weights)
    out, start = 0, 0
    for level, (height, width) in enumerate(shapes):
        size = points.new_tensor([width, height])
        at = points[:, :, :, level]  # (B, Q, H, P, 2)
        if references is not None:
            reference = references[:, :, None, level, None]  # (B, Q, 1, 1, 2 | 4)
            unit = 1 / size if reference.shape[-1] == 2 else reference[..., 2:] / 2 / num_points
            at = reference[..., :2] + at * unit
        x, y = (at * size - 0.5).unbind(-1)
        found = samples(value[:, start : start + height * width], (height, width), x, y)
        out = out + (found * weights[:, :, :, level, :, None]).sum(3)
        start += height * width
    return out.flatten(2)


def random_inputs(form, levels=3, points=4, dim=8, queries=7, heads=3, batch=3, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = SHAPES[:levels]
    tokens = sum(height * width for height, width in shapes)
    value = torch.randn(batch, tokens, heads, dim, generator=generator, dtype=torch.float64)
    locations = (
        torch.rand(batch, queries, heads, levels, points, 2, generator=generator, dtype=torch.float64) * 1.6 - 0.3
    )
    weights = torch.randn(batch, queries, heads, levels, points, generator=generator, dtype=torch.float64)
    references = None
    if form:
        references = torch.rand(batch, queries, levels, form, generator=generator, dtype=torch.float64)
        locations = locations * 4 - 2
    inputs = [value, locations, weights]
    value, locations, weights = (tensor.to(dtype).requires_grad_() for tensor in inputs)
    return value, shapes, references if references is None else references.float(), locations, weights


def flat(shapes):
    return [size for shape in shapes for size in shape]


def in_float64(value, shapes, references, points, weights):
    """Copies of the tensors that are leaves of a new graph."""
    value, points, weights = (tensor.detach().double().requires_grad_() for tensor in (value, points, weights))
    return value, shapes, None if references is None else references.double(), points, weights


def compare(module, inputs, lanes=0, atol=2e-5):
    """Compare outputs and gradients with the definition.

    atol: results are sums of up to 40 float32 samples of size about 3, and slopes of samples times up to nine cells.
    """
    value, shapes, references, points, weights = inputs
    exact = in_float64(*inputs)
    if lanes:
        detached = [tensor.detach() for tensor in (value, points, weights)]
        arguments = (detached[0], flat(shapes), references, detached[1], detached[2])
        out, lse = module._operators.cpu_forward(*arguments, lanes=lanes)
    else:
        out, lse = module._operators.forward(value, flat(shapes), references, points, weights)
    want = expected(*exact)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=atol)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    leaves = (exact[0], exact[3], exact[4])
    wanted = torch.autograd.grad(want, leaves, grad_out.double())
    if lanes:
        grads = module._operators.cpu_backward(grad_out, *arguments, out, lse, lanes=lanes)
    else:
        grads = torch.autograd.grad(out, (value, points, weights), grad_out)
    for name, grad, correct, leaf in zip(
        ("value", "points", "weights"), grads, wanted, (value, points, weights), strict=True
    ):
        assert grad.dtype == leaf.dtype, name
        scale = max(1, correct.abs().max().item()) if correct.numel() else 1
        torch.testing.assert_close(
            grad.double() / scale, correct / scale, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
    if references is not None:
        torch.testing.assert_close(lse.double(), exact[4].flatten(-2).logsumexp(-1), rtol=1e-6, atol=1e-6)


forms = pytest.mark.parametrize("form", [0, 2, 4], ids=["plain", "points", "boxes"])


@pytest.fixture(params=[4, 8, 16])
def lanes(request, native):
    if request.param > native.vector_lanes():
        pytest.skip(f"this machine has no vectors of {request.param} floats")
    return request.param


@forms
@pytest.mark.parametrize(("levels", "points"), [(1, 1), (1, 9), (2, 3), (3, 8), (4, 4), (5, 4), (5, 7)])
def test_any_number_of_levels_and_points(native, lanes, form, levels, points):
    compare(native, random_inputs(form, levels, points), lanes)


@forms
@pytest.mark.parametrize("dim", [1, 8, 16, 20, 32, 48, 64, 100, 128])
def test_any_head_size(native, lanes, form, dim):
    compare(native, random_inputs(form, dim=dim, queries=5), lanes)


@forms
@pytest.mark.parametrize(("batch", "queries"), [(1, 1), (2, 300), (3, 17), (3, 0), (0, 4)])
def test_any_number_of_images_and_queries(native, form, batch, queries):
    compare(native, random_inputs(form, batch=batch, queries=queries))


@forms
def test_more_points_than_fit_a_block(native, lanes, form):
    compare(native, random_inputs(form, levels=2, points=70, queries=3), lanes)


def test_many_reads_of_few_rows_take_the_copy_by_head(native, lanes):
    """Above 4 reads of a row, the forward pass works on a copy of value; 300 queries on 84 tokens do that."""
    compare(native, random_inputs(2, queries=300, heads=5, dim=20), lanes)


@forms
def test_no_kernel_for_float64_is_plain_pytorch(native, universal, form):
    for module in (native, universal):
        assert module.device_of_kernel("cpu", torch.float64) is None
        # float64 arithmetic; references are float32
        compare(module, random_inputs(form, dtype=torch.float64), atol=1e-7)


@forms
def test_without_a_compiler_there_is_plain_pytorch(universal, form):
    assert universal.device_of_kernel("cpu", torch.float32) is None
    assert universal.vector_lanes() == 0
    compare(universal, random_inputs(form))


@pytest.mark.parametrize("form", [0, 2])
def test_gradients_are_those_of_differences(universal, form):
    value, shapes, references, points, weights = random_inputs(
        form, 2, 2, dim=2, queries=2, batch=2, dtype=torch.float64
    )

    def function(value, points, weights):
        if references is None:
            return universal.ms_deform_attn(value, shapes, points, weights)
        return universal.ms_deform_attn_fused(value, shapes, references, points, weights)

    assert torch.autograd.gradcheck(function, (value, points, weights))


@forms
@pytest.mark.parametrize("half", ["value", "points", "weights", "all"])
def test_bfloat16_is_summed_in_float32(native, lanes, form, half):
    value, shapes, references, points, weights = random_inputs(form)
    if half in ("value", "all"):
        value = value.detach().bfloat16().requires_grad_()
    if half in ("points", "all"):
        points = points.detach().bfloat16()
        if not form:
            # With few bits, some samples lie exactly on a column. Rounding may put them on different sides.
            sizes = torch.tensor([(width, height) for height, width in shapes])[:, None]
            cells = points.double() * sizes - 0.5
            points = points.where((cells - cells.round()).abs() > 1e-3, 0.3)
        points = points.requires_grad_()
    if half in ("weights", "all"):
        weights = weights.detach().bfloat16().requires_grad_()
    inputs = (value, shapes, references, points, weights)
    # Exact arithmetic computes on the same rounded numbers. Results are rounded to 8 bits; in the gradient of softmax, so
    # is `out`. Differences are relative to the largest number of a tensor, up to about 10.
    compare(native, inputs, lanes, atol=0.04)


def test_other_dtypes_of_points_and_weights_are_converted(native):
    value, shapes, references, points, weights = random_inputs(2)
    out = native.ms_deform_attn_fused(value, shapes, references, points.double(), weights.half().double())
    want = native.ms_deform_attn_fused(value, shapes, references, points, weights.half().float())
    assert torch.equal(out, want)


def test_border_integers_and_far_away(native, universal, lanes):
    value, shapes, _, locations, weights = random_inputs(0, levels=2, points=6, queries=4)
    special = [0.0, 1.0, 0.5, -1e-9, 1 + 1e-9, 1.5 / 9, 2.5 / 6, -0.5 / 9, 1e4, -1e4, 1e30, -1e30]
    with torch.no_grad():
        for i, number in enumerate(special):
            locations[:, i % 4, :, :, i // 4, i % 2] = number
    locations = locations.detach()
    out, _ = native._operators.cpu_forward(value.detach(), flat(shapes), None, locations, weights.detach(), lanes=lanes)
    want = expected(*in_float64(value, shapes, None, locations, weights))
    torch.testing.assert_close(out.double(), want, rtol=0, atol=2e-5)
    torch.testing.assert_close(
        universal.ms_deform_attn(value, shapes, locations, weights).double(), want, rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e38])
@forms
def test_what_is_no_place_gives_zero_and_no_gradient(native, universal, lanes, form, bad):
    value, shapes, references, points, weights = random_inputs(form)
    with torch.no_grad():
        points[:, 2, :, 1, 0, 0] = bad
        points[:, 3] = bad
    for module in (native, universal):
        arguments = (value.detach(), flat(shapes), references, points.detach(), weights.detach())
        if module is native:
            out, lse = module._operators.cpu_forward(*arguments, lanes=lanes)
            grads = module._operators.cpu_backward(torch.ones_like(out), *arguments, out, lse, lanes=lanes)
        else:
            out, lse = module._operators.forward(*arguments)
            grads = module._operators.backward(torch.ones_like(out), *arguments, out, lse)
        assert out.isfinite().all()
        assert not out[:, 3].any()
        assert all(grad.isfinite().all() for grad in grads)
        assert not grads[1][:, 3].any()
        assert not grads[1][:, 2, :, 1, 0].any()
        assert grads[1][:, 4].any()


def test_an_infinite_value_stays_with_those_who_sample_it(native, universal, lanes):
    value, shapes, _, locations, weights = (
        tensor.detach() if isinstance(tensor, torch.Tensor) else tensor for tensor in random_inputs(0)
    )
    value[:, 0] = math.inf  # the first cell; samples outside are moved to it as well
    locations[:, :3] = 5.0
    locations[:, 3:] = 0.51  # the middle of each map
    out, _ = native._operators.cpu_forward(value, flat(shapes), None, locations, weights, lanes=lanes)
    assert not out[:, :3].any()
    torch.testing.assert_close(out, universal.ms_deform_attn(value, shapes, locations, weights), rtol=0, atol=2e-5)


def test_nan_weights_are_not_hidden(native, lanes):
    value, shapes, references, points, weights = random_inputs(2)
    with torch.no_grad():
        weights[1, 2, 0, 0, 0] = math.nan
    arguments = (value.detach(), flat(shapes), references, points.detach(), weights.detach())
    out, _ = native._operators.cpu_forward(*arguments, lanes=lanes)
    assert out[1, 2, : value.shape[-1]].isnan().all()
    assert out.isnan().sum() == value.shape[-1]


def test_large_logits_and_a_masked_point(native):
    value, shapes, references, points, weights = random_inputs(2)
    with torch.no_grad():
        weights *= 100
        weights[:, 1, :, 0, 0] = -math.inf
    compare(native, (value, shapes, references, points, weights))


def test_inputs_may_lie_in_memory_as_they_like(native):
    value, shapes, references, points, weights = (
        tensor.detach() if isinstance(tensor, torch.Tensor) else tensor for tensor in random_inputs(4)
    )
    want = native.ms_deform_attn_fused(value, shapes, references, points, weights)
    strange = [
        value.transpose(1, 2).contiguous().transpose(1, 2),
        references.repeat(1, 1, 1, 2)[..., :4],
        points.flip(1).flip(1).transpose(0, 4).contiguous().transpose(0, 4),
        torch.stack([weights, weights], dim=-1)[..., 0],
    ]
    assert not any(tensor.is_contiguous() for tensor in strange)
    strange = [tensor.requires_grad_() if i != 1 else tensor for i, tensor in enumerate(strange)]
    out = native.ms_deform_attn_fused(strange[0], shapes, *strange[1:])
    assert torch.equal(out, want)
    out.sum().backward()  # the gradient of a sum is an expanded tensor
    assert all(strange[i].grad.isfinite().all() for i in (0, 2, 3))


def test_the_same_bits_in_every_run_and_with_every_number_of_threads(native):
    value, shapes, references, points, weights = random_inputs(4, queries=300)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 1, 5):
        torch.set_num_threads(threads)
        out = native.ms_deform_attn_fused(value, shapes, references, points, weights)
        found.append((out, *torch.autograd.grad(out.square().sum(), (value, points, weights))))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# opcheck reads `.grad` of a tensor that it made itself
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_finds_nothing_wrong_with_the_operator(native, form, dtype):
    value, shapes, references, points, weights = random_inputs(form, dtype=dtype)
    torch.library.opcheck(native._operators.forward.default, (value, flat(shapes), references, points, weights))


# torch 2.11's inductor calls deprecated functions of torch
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_a_compiled_function_gives_the_same_bits(native):
    inputs = random_inputs(2)
    compiled = torch.compile(native.ms_deform_attn_fused, fullgraph=True)
    assert torch.equal(compiled(*inputs), native.ms_deform_attn_fused(*inputs))
    grads = [
        torch.autograd.grad(f(*inputs).square().sum(), inputs[3])[0] for f in (compiled, native.ms_deform_attn_fused)
    ]
    torch.testing.assert_close(*grads)


def test_autocast_changes_nothing_inside(native):
    value, shapes, references, points, weights = random_inputs(2)
    with torch.autocast("cpu", torch.bfloat16):
        out = native.ms_deform_attn_fused(value.bfloat16(), shapes, references, points, weights.bfloat16())
    assert out.dtype == torch.bfloat16
    without = native.ms_deform_attn_fused(value.bfloat16(), shapes, references, points, weights.bfloat16())
    assert torch.equal(out, without)  # nothing inside is cast


def test_a_second_derivative_is_refused(native):
    value, shapes, _, points, weights = random_inputs(0)
    out = native.ms_deform_attn(value, shapes, points, weights)
    (grad,) = torch.autograd.grad(out.sum(), points, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use the reference backend"):
        grad.sum().backward()


WRONG = {
    "tokens": (lambda v, s, r, p, w: (v[:, 1:], s, r, p, w), r"value \(3, 70, 3, 8\).*expected value \(B, 71, H, D\)"),
    "levels": (lambda v, s, r, p, w: (v, s, r, p[:, :, :, 1:], w[:, :, :, 1:]), r"do not fit the 3 levels \[\(6, 9\)"),
    "points": (lambda v, s, r, p, w: (v, s, r, p[..., :1, :], w), r"points \(3, 7, 3, 3, 1, 2\)"),
    "no points": (lambda v, s, r, p, w: (v, s, r, p[..., :0, :], w[..., :0]), r"weights \(3, 7, 3, 3, 0\)"),
    "heads": (lambda v, s, r, p, w: (v[:, :, :1], s, r, p, w), r"weights \(3, 7, 3, 3, 4\) do not fit"),
    "batch": (lambda v, s, r, p, w: (v[:1], s, r, p, w), r"value \(1, 71, 3, 8\)"),
    "dimensions": (lambda v, s, r, p, w: (v[0], s, r, p, w), r"value has shape \(71, 3, 8\).*need 4 and 5"),
    "references": (lambda v, s, r, p, w: (v, s, r[:, :1], p, w), r"references have shape \(3, 1, 3, 2\); expected"),
    "three": (lambda v, s, r, p, w: (v, s, torch.zeros(3, 7, 3, 3), p, w), r"references have shape \(3, 7, 3, 3\)"),
    "integers": (lambda v, s, r, p, w: (v, s, r, p, w.long()), r"must be floating-point, but are .*int64"),
    "an empty level": (
        lambda v, s, r, p, w: (v, ((6, 9), (3, 5), (0, 7)), r, p, w),
        r"levels \[.*\(0, 7\)\] must be.*at least 1",
    ),
    "a negative level": (lambda v, s, r, p, w: (v, ((6, 9), (3, 7), (-2, 2)), r, p, w), r"\(-2, 2\)\] must be pairs"),
    "device": (lambda v, s, r, p, w: (v, s, r, p, w.to("meta")), r"different devices: \['cpu', 'cpu', 'meta'"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused(native, change, message):
    value, shapes, references, points, weights = (
        tensor.detach() if isinstance(tensor, torch.Tensor) else tensor for tensor in random_inputs(2)
    )
    value, shapes, references, points, weights = change(value, shapes, references, points, weights)
    with pytest.raises(ValueError, match=message):
        native.ms_deform_attn_fused(value, shapes, references, points, weights)


def test_the_bare_kernel_refuses_wrong_sizes_too(native):
    value, shapes, _, points, weights = (
        tensor.detach() if isinstance(tensor, torch.Tensor) else tensor for tensor in random_inputs(0)
    )
    out, lse, none = torch.empty(3, 7, 24), torch.empty(0), torch.empty(0)
    sizes = torch.tensor(flat(shapes))
    ops = native._ops.ops
    for arguments, message in (
        (
            (value, sizes, none, points[:, 1:].contiguous(), weights, out, lse, 0),
            "locations has 1296 numbers where 1512",
        ),
        ((value, sizes[:4].contiguous(), none, points, weights, out, lse, 0), "shapes has 4 numbers where 6"),
        ((value[:, 1:].contiguous(), sizes, none, points, weights, out, lse, 0), "do not add up to the tokens"),
        ((value, sizes, none, points, weights, out[:, 1:].contiguous(), lse, 0), "out has 432 numbers where 504"),
        ((value, sizes, none, points, weights, out.double(), lse, 0), "out must be float32 or bfloat16"),
        ((value, sizes, none, points, weights, out, lse, 5), "no vectors of 5 lanes"),
        ((value, torch.tensor([6, 9, 5, 5, -4, 2]), none, points, weights, out, lse, 0), "must be at least 1"),
        ((value, torch.tensor([6, 9, 17, 1, 0, 7]), none, points, weights, out, lse, 0), "must be at least 1"),
        ((value, torch.tensor([2**31, 2**31, 17, 1, 1, 7]), none, points, weights, out, lse, 0), "must be at least 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.cpu_forward(*arguments)


def test_it_stands_in_for_the_layer_of_transformers(native):
    modeling = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    value, shapes, _, locations, weights = random_inputs(0)
    arguments = (value, torch.tensor(shapes), list(shapes), None, locations, weights, 64)
    theirs = modeling.MultiScaleDeformableAttention()(*arguments)
    torch.testing.assert_close(native.layers.MultiScaleDeformableAttention()(*arguments), theirs, rtol=0, atol=2e-5)


BUILD_AT_ONCE = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("build", sys.argv[1])
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
print(build.build_variant(Path(sys.argv[2]), Path(sys.argv[3]), native=True))
"""


def test_two_processes_build_at_the_same_moment(builder, tmp_path):
    project = builder.Path(__file__).parents[1]
    command = [sys.executable, "-c", BUILD_AT_ONCE, builder.__file__, str(project), str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    results = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], results
    assert results[0][0] == results[1][0]
    assert [path.name for path in tmp_path.iterdir()] == [builder.variant_name(project, native=True)]
    # A third build finds the variant and writes nothing.
    library = next(tmp_path.glob("*/*.so"))
    before = library.stat().st_mtime_ns
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == results[0][0]
    assert library.stat().st_mtime_ns == before


def test_no_compiler_is_one_sentence_and_leaves_nothing(builder, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    project = builder.Path(__file__).parents[1]
    with pytest.raises(
        builder.BuildError, match=r"no C\+\+ compiler \(no c\+\+, g\+\+ or clang\+\+ on the path\); install g\+\+"
    ):
        builder.build_variant(project, tmp_path / "build", native=True)
    monkeypatch.setenv("CXX", "ccache g++")
    with pytest.raises(builder.BuildError, match=r"CXX='ccache g\+\+' is not on the path"):
        builder.build_variant(project, tmp_path / "build", native=True)
    assert not list((tmp_path / "build").iterdir())
    assert builder.build_variant(project, tmp_path / "build", native=False).name == "torch-universal"


@pytest.mark.parametrize("damage", ["cut", "gone", "empty"])
def test_a_damaged_build_is_built_again(builder, tmp_path, damage):
    project = builder.Path(__file__).parents[1]
    variant = builder.build_variant(project, tmp_path, native=False)
    file = variant / "_operators.py"
    whole = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(whole[:100] if damage == "cut" else b"")
    assert builder.find_variant(project, tmp_path, native=False) is None
    assert builder.build_variant(project, tmp_path, native=False) == variant
    assert file.read_bytes() == whole


@pytest.mark.parametrize(("named", "reason"), [("  ", "install g"), ('g++ "', "is not on the path")])
def test_a_compiler_that_is_named_badly_is_one_sentence_too(builder, tmp_path, monkeypatch, named, reason):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", named)
    with pytest.raises(builder.BuildError, match=reason):
        builder.build_variant(builder.Path(__file__).parents[1], tmp_path / "build", native=True)


def test_a_compiler_that_fails_is_quoted(builder, tmp_path, monkeypatch):
    compiler = tmp_path / "broken"
    compiler.write_text(
        "#!/bin/sh\necho 'In file included from io_error.h:3'\necho 'op.cpp:1: error: out of ideas'\nexit 3\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(builder.BuildError, match=r"exit 3\): op.cpp:1: error: out of ideas"):
        builder.build_variant(builder.Path(__file__).parents[1], tmp_path / "build", native=True)
    assert not list((tmp_path / "build").iterdir())


KERNELS_LIBRARY = """
import torch
from pathlib import Path
from kernels import Device, LayerRepository, LocalLayerRepository, Mode, get_local_kernel, kernelize, use_kernel_mapping
import sys
folder = Path(sys.argv[1])
kernel = get_local_kernel(folder)
print(kernel.__name__, kernel.vector_lanes())
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection
from kernels import use_kernel_forward_from_hub
from transformers.models.deformable_detr import modeling_deformable_detr as modeling
use_kernel_forward_from_hub("MultiScaleDeformableAttention")(modeling.MultiScaleDeformableAttention)
torch.manual_seed(0)
config = DeformableDetrConfig(
    backbone_config={"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1],
        "out_features": ["stage2", "stage3", "stage4"]}, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
    d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=32,
    decoder_ffn_dim=32, num_queries=5)
model = DeformableDetrForObjectDetection(config).eval()
images = torch.rand(2, 3, 70, 90)
with torch.no_grad():
    before = model(images).logits
    repository = LocalLayerRepository(repo_path=folder, layer_name="MultiScaleDeformableAttention")
    with use_kernel_mapping({"MultiScaleDeformableAttention": {sys.argv[2]: repository}}, inherit_mapping=False):
        model = kernelize(model, mode=Mode.INFERENCE, device=sys.argv[2], use_fallback=False)
    layer = model.model.encoder.layers[0].self_attn.attn
    print(type(layer).forward is not layer.forward.__func__)
    print((model(images).logits - before).abs().max().item() < 1e-4)
"""


def test_the_kernels_library_loads_both_builds_and_puts_them_into_models_of_transformers(builder, tmp_path):
    pytest.importorskip("kernels")
    project = builder.Path(__file__).parents[1]
    for native in (False, True):
        builder.build_variant(project, tmp_path / str(native) / "build", native)
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", KERNELS_LIBRARY, str(tmp_path / str(native)), "cpu"],
            capture_output=True,
            text=True,
            env={**builder.os.environ, "HF_HUB_OFFLINE": "1"},
        )
        assert run.returncode == 0, run.stderr
        name, replaced, equal = run.stdout.splitlines()
        identity, lanes = name.split()
        assert identity == builder.kernel_id(project, native)
        assert (int(lanes) > 0) == native
        assert (replaced, equal) == ("True", "True")
