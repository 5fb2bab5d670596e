"""The Triton kernels: without a GPU in Triton's interpreter and through its compiler, and on a GPU if there is one.

The interpreter must be selected before the kernels are imported, so this file runs itself in another process.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="the CUDA kernels need triton, which is not installed")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

SOURCE = Path(__file__).parents[1] / "torch-ext" / "ms_deform_attn" / "_triton.py"
SHAPES = ((6, 9), (3, 5), (1, 2), (1, 1), (2, 7))  # never square: a swapped x and y must fail
NAMES = ("out", "grad_value", "grad_points", "grad_weights")

pytestmark = pytest.mark.xdist_group("triton")  # one worker, one interpreter


def load():
    spec = importlib.util.spec_from_file_location("ms_deform_attn_triton", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- Problems


def points_at(pixels, shapes, references):
    """The points of each form that sample these pixels, counted from the centre of the first cell: (B, Q, H, L, P, 2)."""
    size = torch.tensor([(width, height) for height, width in shapes], dtype=pixels.dtype)[:, None]  # (L, 1, 2)
    if references is None:
        return (pixels + 0.5) / size
    references = references.to(pixels)[:, :, None, :, None]  # (B, Q, 1, L, 1, 2 | 4)
    offsets = pixels + 0.5 - references[..., :2] * size
    if references.shape[-1] == 4:
        offsets = offsets / (references[..., 2:] * size * 0.5 / pixels.shape[-2])
    return offsets


def problem(form, pixels, shapes, value, references="random", dtype=torch.float32, points_dtype=torch.float32):
    """The arguments of the kernel and a gradient to send back, as a dictionary."""
    batch, queries, heads, levels, points = pixels.shape[:-1]
    if isinstance(references, str):
        references = torch.rand(batch, queries, levels, form) * 0.8 + 0.1 if form else None
    weights = torch.randn(batch, queries, heads, levels, points)
    return {
        "value": value.to(dtype),
        "shapes": [cells for shape in shapes for cells in shape],
        "points": points_at(pixels, shapes, references).to(points_dtype),
        "weights": weights.to(points_dtype),
        "references": references,
        "grad_out": torch.randn(batch, queries, heads * value.shape[-1]).to(dtype),
    }


def scattered(form, dim, levels, points, batch=1, queries=5, heads=2, **dtypes):
    """Samples everywhere on the maps and one or two cells around them."""
    shapes = SHAPES[:levels]
    size = torch.tensor([(width, height) for height, width in shapes], dtype=torch.float64)[:, None]  # (L, 1, 2)
    pixels = torch.rand(batch, queries, heads, levels, points, 2, dtype=torch.float64) * (size + 3) - 2
    value = torch.randn(batch, sum(height * width for height, width in shapes), heads, dim)
    return problem(form, pixels, shapes, value, **dtypes)


EDGE_SHAPES = ((4, 8), (2, 16))  # powers of two: the pixels below are exact in every form


def on_the_edges(form):
    """Samples on integers, on the border, outside, far away and not finite, in one coordinate and in both."""
    pixels = []
    for height, width in EDGE_SHAPES:
        far = [1e9, -1e30, 3e38, torch.nan, torch.inf, -torch.inf]
        columns = [-1, -0.5, 0, 1, width - 1, width - 0.5, width, *far]
        rows = [-1, -0.5, 0, 1, height - 1, height - 0.5, height, *far]
        inside = [(column, 0.25) for column in columns] + [(1.25, row) for row in rows]
        pixels.append(inside + list(zip(columns, rows, strict=True)) + [(1.25, 0.25)])
    pixels = torch.tensor(pixels, dtype=torch.float64).transpose(0, 1)[None, :, None, :, None]  # (1, Q, 1, L, 1, 2)
    references = torch.full((1, pixels.shape[1], 2, form), 0.5) if form else None
    result = problem(form, pixels, EDGE_SHAPES, torch.randn(1, 64, 1, 8), references)
    if form:
        references[:, -1] = torch.nan  # a reference can be NaN as well
    return result


def next_to_nothing(form):
    """All samples outside of maps that hold nothing but NaN."""
    far = torch.tensor([(-1.0, 1.0), (8.0, 1.0), (16.0, 1.0), (1.0, 4.0), (torch.nan, 1.0)], dtype=torch.float64)
    far[2, 1] = 2.0
    pixels = far[None, :, None, None, None].expand(1, 5, 1, 1, 1, 2)
    return problem(form, pixels, EDGE_SHAPES[:1], torch.full((1, 32, 1, 8), torch.nan))


def not_contiguous():
    result = scattered(2, 20, 2, 2, batch=3)
    for name in ("value", "points", "weights", "references", "grad_out"):
        moved = result[name].movedim(0, -1).contiguous().movedim(-1, 0)
        assert not moved.is_contiguous()
        result[name] = moved
    return result


def crowded(form, size):
    """All samples in one cell, all of the same sign, and of this size."""
    pixels = torch.ones(1, 7, 1, 1, 8, 2, dtype=torch.float64)
    result = problem(form, pixels, ((3, 5),), torch.randn(1, 15, 1, 8), torch.full((1, 7, 1, 2), 0.5) if form else None)
    result["weights"].fill_(3.0)
    result["grad_out"].fill_(size)
    return result


half = {"dtype": torch.bfloat16, "points_dtype": torch.float32}
PROBLEMS = {
    "plain, heads of 20, 3 levels, 3 points": lambda: scattered(0, 20, 3, 3, batch=3),
    "plain, heads of 128, 1 point": lambda: scattered(0, 128, 2, 1, queries=3),
    "plain, float16": lambda: scattered(0, 32, 2, 2, batch=3, dtype=torch.float16),
    "points, as in the encoder": lambda: scattered(2, 32, 4, 4, queries=9),
    "points, 5 levels, 2 points": lambda: scattered(2, 20, 5, 2, batch=3, queries=4),
    "points, bfloat16 value": lambda: scattered(2, 32, 3, 2, queries=9, **half),
    "points, as in InternImage": lambda: scattered(2, 16, 1, 9, batch=2, queries=9, heads=3),
    "points, as in InternImage, bfloat16 value": lambda: scattered(2, 16, 1, 9, queries=9, heads=3, **half),
    "points, 9 points, heads of 1": lambda: scattered(2, 1, 1, 9, queries=9, heads=3),
    "boxes, as in the decoder": lambda: scattered(4, 32, 4, 4, batch=3, queries=3, heads=1),
    "boxes, heads of 8, 1 level, 8 points": lambda: scattered(4, 8, 1, 8, queries=37),
    "boxes, bfloat16": lambda: scattered(4, 20, 3, 3, dtype=torch.bfloat16, points_dtype=torch.bfloat16),
    "plain, on the edges": lambda: on_the_edges(0),
    "points, on the edges": lambda: on_the_edges(2),
    "boxes, on the edges": lambda: on_the_edges(4),
    "not contiguous": not_contiguous,
}
EMPTY = {form: lambda form=form: next_to_nothing(form) for form in (0, 2, 4)}
FIXED_POINT = {
    "plain": lambda: scattered(0, 8, 2, 3, queries=9),
    "points": lambda: scattered(2, 8, 2, 3, queries=9),
    "boxes, bfloat16": lambda: scattered(4, 8, 2, 2, queries=9, **half),
    "plain, crowded, large": lambda: crowded(0, 1e35),
    "plain, crowded, small": lambda: crowded(0, 1e-28),
    "points, crowded, large": lambda: crowded(2, 1e37),
    "points, crowded, small": lambda: crowded(2, 1e-28),
}


def make(problems, name, device="cpu"):
    """The same numbers in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = problems[name]()
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in made.items()}


def shuffled(made):
    """The same samples in another order."""
    order = torch.arange(made["weights"].shape[1], device=made["weights"].device).flip(0)
    return made | {
        name: made[name][:, order] for name in ("points", "weights", "references", "grad_out") if made[name] is not None
    }


def run(kernel, made, deterministic=False):
    """Run forward and backward. Returns the results by NAMES."""
    arguments = [made[name] for name in ("value", "shapes", "points", "weights", "references")]
    out, lse = kernel.forward(*arguments)
    torch.use_deterministic_algorithms(deterministic)
    try:
        grads = kernel.backward(made["grad_out"], *arguments, out, lse)
    finally:
        torch.use_deterministic_algorithms(False)
    return dict(zip(NAMES, (out, *grads), strict=True)) | {"lse": lse}


# -- Expected results


def expected(made):
    """The expected results, in float64 with gathers, differentiated by autograd."""
    value, points, weights = (made[name].double().requires_grad_() for name in ("value", "points", "weights"))
    references = None if made["references"] is None else made["references"].double()[:, :, None]  # (B, Q, 1, L, 2 | 4)
    queries, levels, num_points = weights.shape[1], *weights.shape[3:]
    attention = weights if references is None else weights.flatten(-2).softmax(-1).view_as(weights)
    out, start = 0, 0
    for level in range(levels):
        height, width = made["shapes"][2 * level : 2 * level + 2]
        size = torch.tensor((width, height), dtype=torch.float64, device=value.device)
        pixels = points[:, :, :, level]  # (B, Q, H, P, 2)
        if references is None:
            pixels = pixels * size
        else:
            reference = references[:, :, :, level, None]  # (B, Q, 1, 1, 2 | 4)
            if reference.shape[-1] == 4:
                pixels = pixels / num_points * reference[..., 2:] * 0.5 * size
            pixels = reference[..., :2] * size + pixels
        pixels = pixels - 0.5
        inside = ((pixels > -1) & (pixels < size)).all(-1, keepdim=True)
        pixels = torch.where(inside, pixels, 0.0)
        first = pixels.detach().floor()
        share_of = 1 - (pixels - first), pixels - first
        for down in (0, 1):
            for right in (0, 1):
                column, row = first[..., 0] + right, first[..., 1] + down  # (B, Q, H, P)
                valid = inside[..., 0] & (column >= 0) & (column < width) & (row >= 0) & (row < height)
                token = start + torch.where(valid, row * width + column, 0.0).long()
                token = token.transpose(2, 3).flatten(1, 2)[..., None]  # (B, Q * P, H, 1)
                corner = value.gather(1, token.expand(-1, -1, -1, value.shape[-1]))  # (B, Q * P, H, D)
                corner = corner.unflatten(1, (queries, num_points)).transpose(2, 3)  # (B, Q, H, P, D)
                corner = torch.where(valid[..., None], corner, 0.0)
                share = share_of[right][..., 0] * share_of[down][..., 1]  # (B, Q, H, P)
                out = out + ((attention[:, :, :, level] * share)[..., None] * corner).sum(3)
        start += height * width
    out = out.flatten(-2)
    grads = torch.autograd.grad(out, (value, points, weights), made["grad_out"].double())
    # Autograd multiplies the zero of a sample that is not finite by a scale of NaN.
    return dict(zip(NAMES, (out.detach(), grads[0], grads[1].nan_to_num(0.0), grads[2]), strict=True))


def assert_as_expected(result, made, names=NAMES):
    correct_of = expected(made)
    for name in names:
        correct = correct_of[name]
        dtype = made[name.removeprefix("grad_")].dtype if name != "out" else made["value"].dtype
        assert result[name].dtype == dtype, name
        # Sums of some dozen products: as many roundings of the largest. In half precision the result is rounded once, and
        # the mean that softmax subtracts comes from the rounded output.
        coarse = max(torch.finfo(dtype).eps, torch.finfo(made["value"].dtype).eps)
        tolerance = correct.abs().max().item() * (32 * coarse if coarse < 1e-6 else coarse)
        torch.testing.assert_close(result[name].double(), correct, rtol=0, atol=tolerance, msg=f"{name}: {{}}".format)


# -- In the interpreter


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """The results of all problems, computed in one process."""
    path = tmp_path_factory.mktemp("triton") / "results.pt"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, path], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return torch.load(path)


@pytest.mark.parametrize("name", PROBLEMS)
def test_values_and_gradients_agree_with_plain_pytorch(interpreted, name):
    assert_as_expected(interpreted["problems"][name], make(PROBLEMS, name))


@pytest.mark.parametrize("form", EMPTY)
def test_what_is_outside_is_never_read(interpreted, form):
    for name in NAMES:
        assert not interpreted["empty"][form][name].any(), name


@pytest.mark.parametrize("name", ["points, as in the encoder", "boxes, as in the decoder"])
def test_the_log_sum_exp_is_that_of_the_logits(interpreted, name):
    lse = make(PROBLEMS, name)["weights"].flatten(-2).logsumexp(-1)  # (B, Q, H)
    # a few roundings of float32
    torch.testing.assert_close(interpreted["problems"][name]["lse"], lse, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", FIXED_POINT)
def test_fixed_point_gradients_agree_with_plain_pytorch(interpreted, name):
    assert_as_expected(interpreted["fixed point"][name], make(FIXED_POINT, name), ["grad_value"])


@pytest.mark.parametrize("name", FIXED_POINT)
def test_fixed_point_gradients_do_not_depend_on_the_order(interpreted, name):
    assert torch.equal(interpreted["fixed point"][name]["grad_value"], interpreted["shuffled"][name]["grad_value"])


def interpret():
    """Main function of the process that `interpreted` starts."""
    kernel = load()
    return {
        "problems": {name: run(kernel, make(PROBLEMS, name)) for name in PROBLEMS},
        "empty": {form: run(kernel, make(EMPTY, form)) for form in EMPTY},
        "fixed point": {name: run(kernel, make(FIXED_POINT, name), deterministic=True) for name in FIXED_POINT},
        "shuffled": {name: run(kernel, shuffled(make(FIXED_POINT, name)), deterministic=True) for name in FIXED_POINT},
    }


# -- The fixed point


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-38, 3e-5, 1.0, 65504.0, 3e38])
def test_no_sum_overflows_the_fixed_point(largest, fused):
    queries = 89_023  # the encoder with five scales
    weights = torch.full((1, queries, 1, 5, 4), 0.7)
    scale, inverse = load()._fixed_point(torch.full((1, 3), -largest), weights, torch.zeros(1), fused)
    assert scale.dtype == inverse.dtype == torch.float32
    assert (scale * inverse).item() == 1
    bound = largest * queries * (1 if fused else 0.7 * 20)
    assert bound * scale.item() < 2**62
    if largest > 1e-30:
        assert bound * scale.item() > 2**58  # few of the 63 bits are wasted


@pytest.mark.parametrize(
    ("grad", "weight", "lse", "fused"),
    [
        (torch.inf, 1.0, 0.0, False),
        (torch.nan, 1.0, 0.0, True),
        (1.0, torch.nan, 0.0, False),
        (1.0, torch.inf, 0.0, False),
        (1e30, 1e30, 0.0, False),
        (1.0, 1.0, torch.nan, True),
        (1.0, 1.0, torch.inf, True),
    ],
)
def test_overflow_stays_visible_in_fixed_point(grad, weight, lse, fused):
    weights = torch.full((1, 3, 1, 1, 1), weight)
    scale, inverse = load()._fixed_point(torch.tensor([[1.0, grad]]), weights, torch.tensor([0.0, lse]), fused)
    assert scale.isfinite()
    assert inverse.isnan()


# -- Through the compiler


class Recorder:
    """Replaces a kernel and records the arguments of its launch."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        self.grid = grid
        return self.launch

    def launch(self, *arguments, **named):
        names = self.kernel.arg_names
        self.options = {name: value for name, value in named.items() if name not in names}
        self.arguments = dict(zip(names, arguments, strict=False))
        self.arguments |= {name: value for name, value in named.items() if name in names}

    def constants(self):
        return {
            parameter.name: self.arguments[parameter.name]
            for parameter in self.kernel.params
            if parameter.is_constexpr or self.arguments[parameter.name] is None
        }

    def compile(self, capability):
        """Compile as a launch would, for a GPU that this machine may not have."""
        constants = self.constants()
        names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
        names |= {torch.int32: "i32", torch.int64: "i64"}
        signature, attributes = {}, {}
        for i, (name, argument) in enumerate((name, self.arguments[name]) for name in self.kernel.arg_names):
            if name in constants:
                signature[name] = "constexpr"
            elif isinstance(argument, torch.Tensor):
                signature[name] = "*" + names[argument.dtype]
                attributes[i,] = [["tt.divisibility", 16]]  # aligned like all new memory
            else:
                signature[name] = "i32"
        source = ASTSource(
            self.kernel,
            signature,
            constexprs={(self.kernel.arg_names.index(name),): value for name, value in constants.items()},
            attrs=attributes,
        )
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)


def record(made, monkeypatch, deterministic=False):
    """The launches of forward and backward, without a device."""
    kernel = load()
    recorders = Recorder(kernel._forward_kernel), Recorder(kernel._backward_kernel)
    monkeypatch.setattr(kernel, "_forward_kernel", recorders[0])
    monkeypatch.setattr(kernel, "_backward_kernel", recorders[1])
    run(kernel, made, deterministic)
    return recorders


# ptxas may spill a register or two to fit one more warp on a multiprocessor: triton 3.8.0 spills 4 bytes a thread for sm_90.
# That costs nothing beside some hundred loads of values. More than four registers would be a mistake in the kernel.
MOST_SPILLED_BYTES = 16


def assert_no_spills(compiled, path):
    """No arrays, and at most MOST_SPILLED_BYTES of registers, lie in local memory. A stack frame alone costs nothing."""
    target = re.search(r"^\.target (\w+)", compiled.asm["ptx"], re.MULTILINE).group(1)
    path.write_text(compiled.asm["ptx"])
    # A build of triton has two assemblers, and triton knows which one reads the PTX that it writes for a GPU.
    try:
        assembler = get_ptxas(int(re.search(r"\d+", target).group())).path
    except RuntimeError as error:
        pytest.skip(f"this build of triton has no ptxas: {error}")
    command = [assembler, "--verbose", f"--gpu-name={target}", path, f"--output-file={path}.cubin"]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    used = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    stack, stores, loads = map(int, used.groups())
    assert max(stores, loads) <= MOST_SPILLED_BYTES, log
    assert stack <= 2 * MOST_SPILLED_BYTES, log  # arrays in local memory lie on the stack


def as_in_the_model(form, dtype):
    return scattered(form, 32, 4, 4, queries=9, heads=8, dtype=dtype, points_dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_kernels_of_internimage_compile_without_spills(dtype, monkeypatch, tmp_path):
    """One level of 9 points, and 16 channels in each of 10 groups."""
    made = scattered(2, 16, 1, 9, queries=9, heads=10, dtype=dtype)
    for name, kernel in zip(("forward", "backward"), record(made, monkeypatch), strict=True):
        assert_no_spills(kernel.compile(90), tmp_path / f"{name}.ptx")


@pytest.mark.parametrize("capability", [75, 80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", [0, 2, 4], ids=["plain", "points", "boxes"])
def test_kernels_compile_without_spills(form, dtype, capability, monkeypatch, tmp_path):
    forward, backward = record(as_in_the_model(form, dtype), monkeypatch)
    assert_no_spills(forward.compile(capability), tmp_path / "forward.ptx")
    compiled = backward.compile(capability)
    assert_no_spills(compiled, tmp_path / "backward.ptx")
    if capability >= 90:  # one instruction adds four channels
        assert re.search(r"(red|atom)\.global\S*\.add\S*\.v4\.f32", compiled.asm["ptx"])


def test_a_spill_is_found(monkeypatch, tmp_path):
    forward, _ = record(as_in_the_model(4, torch.float32), monkeypatch)
    forward.options["maxnreg"] = 24
    with pytest.raises(AssertionError, match="bytes spill stores"):
        assert_no_spills(forward.compile(90), tmp_path / "forward.ptx")


@pytest.mark.parametrize("form", [0, 2, 4], ids=["plain", "points", "boxes"])
def test_the_fixed_point_compiles_without_spills(form, monkeypatch, tmp_path):
    _, backward = record(as_in_the_model(form, torch.float32), monkeypatch, deterministic=True)
    compiled = backward.compile(90)
    assert_no_spills(compiled, tmp_path / "backward.ptx")
    assert re.search(r"(red|atom)\.global\S*\.add\.u64", compiled.asm["ptx"])
    assert not re.search(r"(red|atom)\.global\S*\.f32", compiled.asm["ptx"])


@pytest.mark.parametrize("form", [0, 2, 4], ids=["plain", "points", "boxes"])
def test_image_size_and_number_of_queries_do_not_recompile(form, monkeypatch):
    small = record(scattered(form, 32, 2, 4, queries=1, heads=8), monkeypatch)
    monkeypatch.setitem(globals(), "SHAPES", ((100, 167), (16, 16)))
    large = record(scattered(form, 32, 2, 4, batch=2, queries=48, heads=8), monkeypatch)
    for one, other in zip(small, large, strict=True):
        assert one.constants() == other.constants()
        assert one.options == other.options
        assert one.grid != other.grid
        free = {parameter.name for parameter in one.kernel.params if parameter.do_not_specialize}
        numbers = {name for name, argument in one.arguments.items() if isinstance(argument, int)}
        assert numbers - set(one.constants()) == free == {"S", "Q"}


def test_programs_fit_the_first_axis_of_the_grid(monkeypatch):
    made = make({"many": lambda: scattered(2, 8, 1, 1, batch=70, queries=3, heads=1000)}, "many")
    for recorder in record(made, monkeypatch):
        assert len(recorder.grid) == 1
        assert recorder.grid[0] == 70_000


@pytest.mark.parametrize("form", [0, 2, 4], ids=["plain", "points", "boxes"])
@pytest.mark.parametrize(("batch", "queries"), [(2, 0), (0, 3)], ids=["no query", "no image"])
def test_nothing_in_is_nothing_out(batch, queries, form):
    made = scattered(form, 20, 2, 3, batch=batch, queries=queries)
    for deterministic in (False, True):
        result = run(load(), made, deterministic)  # a launch would fail: there is no device
        assert result["out"].shape == (batch, queries, 40)
        assert result["lse"].shape == ((batch, queries, 2) if form else (0,))
        for name in ("value", "points", "weights"):
            assert result["grad_" + name].shape == made[name].shape
            assert not result["grad_" + name].any()


# -- On a GPU

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_gpu_agrees_with_plain_pytorch(name):
    made = make(PROBLEMS, name, "cuda")
    assert_as_expected(run(load(), made), made)


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("form", EMPTY)
def test_a_gpu_never_reads_what_is_outside(form):
    result = run(load(), make(EMPTY, form, "cuda"))
    for name in NAMES:
        assert not result[name].any(), name


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", [0, 2, 4], ids=["plain", "points", "boxes"])
def test_deterministic_algorithms_give_the_same_bits_on_a_gpu(form, dtype):
    # thousands of queries on a few cells, so that many programs add to the same ones
    problems = {"many": lambda: scattered(form, 32, 4, 4, batch=2, queries=5000, heads=8, dtype=dtype)}
    made, kernel = make(problems, "many", "cuda"), load()
    first = run(kernel, made, deterministic=True)
    # Thousands of terms give more rounding than the small problems: float32 is compared with itself.
    normal = run(kernel, made)["grad_value"].float()
    tolerance = normal.abs().max().item() * (1e-4 if dtype == torch.float32 else torch.finfo(dtype).eps)
    torch.testing.assert_close(first["grad_value"].float(), normal, rtol=0, atol=tolerance)
    for other in (made, made, shuffled(made)):
        assert torch.equal(first["grad_value"], run(kernel, other, deterministic=True)["grad_value"])


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("form", [0, 2, 4], ids=["plain", "points", "boxes"])
def test_a_gpu_neither_recompiles_nor_waits(form, monkeypatch):
    kernel, compiled = load(), []
    small = make({"small": lambda: scattered(form, 32, 2, 4, queries=1, heads=8)}, "small", "cuda")
    monkeypatch.setitem(globals(), "SHAPES", ((100, 167), (16, 16)))
    large = make({"large": lambda: scattered(form, 32, 2, 4, batch=2, queries=48, heads=8)}, "large", "cuda")
    for deterministic in (False, True):
        run(kernel, small, deterministic)
    # a new image size needs one copy to the device and nothing else
    kernel._level_table(tuple(large["shapes"]), large["value"].device)
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **what: compiled.append(what["repr"]))
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for deterministic in (False, True):
            run(kernel, large, deterministic)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert not compiled


if __name__ == "__main__":
    torch.save(interpret(), sys.argv[1])
