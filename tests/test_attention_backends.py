"""Which implementation of deformable attention runs, and what happens where one cannot."""

import re
import threading
import warnings

import pytest
import torch

from dino_hf import DinoDetrForObjectDetection, use_backend
from dino_hf.model import attention_backends
from dino_hf.model.attention_backends import (
    ENVIRONMENT_VARIABLE,
    Backend,
    BackendUnavailable,
    choose_backend,
    describe_backends,
    load_backend,
    register_backend,
)
from dino_hf.model.backend_trial import SHAPES as TRIAL_SHAPES
from dino_hf.model.backend_trial import TOLERANCE, trial_inputs
from dino_hf.model.ms_deform_attn import ms_deform_attn
from dino_hf.model.package_warning import DinoDetrWarning
from helpers import needs_compiler, tiny_config

pytestmark = needs_compiler


@pytest.fixture(autouse=True)
def own_table(monkeypatch):
    """Each test may register what it likes."""
    for name in ("_entries", "_loaded", "_reasons", "_trials"):
        monkeypatch.setattr(attention_backends, name, dict(getattr(attention_backends, name)))
    monkeypatch.setattr(attention_backends, "_warned", set())
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


def broken() -> Backend:
    raise BackendUnavailable("the moon is in the wrong phase")


def choose(name=None, device="cpu", dtype=torch.float32, must_run=False) -> str:
    return choose_backend(name, device, dtype, must_run=must_run)


def test_the_device_and_the_dtype_choose():
    assert choose() == "cpu"
    assert choose(dtype=torch.bfloat16) == "cpu"
    assert choose(dtype=torch.float64) == "torch"
    assert choose(dtype=torch.float16) == "torch"
    assert choose(device="meta") == "torch"


def test_block_environment_and_configuration_go_first_in_this_order(monkeypatch):
    assert choose("reference") == "reference"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "torch")
    assert choose("reference") == "torch"
    with use_backend("cpu"):
        assert choose("reference") == "cpu"
        with use_backend("reference"):
            assert choose() == "reference"
        assert choose() == "cpu"
    assert choose("reference") == "torch"


def test_a_shared_model_does_without_the_kernel_that_its_configuration_names(monkeypatch):
    """Loaded as remote code it brings PyTorch's backends only. What this machine's user names still must be there."""
    for name in ("cpu", "triton"):
        attention_backends._entries.pop(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("cpu") == choose("triton") == "torch"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cpu")
    with pytest.raises(ValueError, match="no ms_deform_attn backend 'cpu'"):
        choose("cpu")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lunar", "but: The ms_deform_attn backend 'lunar' cannot run here: the moon is in the wrong phase. Another"),
        ("tritn", "which is unknown here .known are .*gather"),
        ("distant", "which supports any dtype on 'xpu', not torch.float32 on 'cpu'"),
    ],
)
def test_a_configuration_prefers_and_does_not_order(name, reason):
    """It travels in config.json to machines that are made otherwise."""
    register_backend("lunar", broken)
    register_backend("distant", broken, device_type="xpu")
    with pytest.warns(
        DinoDetrWarning, match=f"configuration prefers the ms_deform_attn backend '{name}', {reason}"
    ) as caught:
        assert choose(name) == choose(name) == "cpu"
    assert len(caught) == 1


def test_a_preference_that_can_run_is_met_before_the_kernel():
    assert choose("torch") == "torch"


def test_a_model_with_the_configuration_of_another_machine_runs():
    model = DinoDetrForObjectDetection(tiny_config(ms_deform_attn_backend="triton")).eval()
    with torch.no_grad(), pytest.warns(DinoDetrWarning, match="prefers the ms_deform_attn backend 'triton'"):
        assert model(torch.randn(2, 3, 64, 104)).logits.isfinite().all()


def test_a_block_that_fails_leaves_no_trace():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert choose() == "cpu"


def test_an_unknown_name_is_an_error_that_lists_the_known(monkeypatch):
    known = r"no ms_deform_attn backend 'cuda'; known are \['cpu', 'gather', 'reference', 'torch', 't"
    with pytest.raises(ValueError, match=known):
        choose("cuda", must_run=True)
    with pytest.raises(ValueError, match=known), use_backend("cuda"):
        pass
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cuda")
    with pytest.raises(ValueError, match=f"^DINO_HF_MS_DEFORM_ATTN: There is {known}"):
        choose()
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "  ")
    assert choose() == "cpu"


def test_a_named_backend_that_cannot_run_says_why(monkeypatch):
    register_backend("lunar", broken, first=True)
    reason = "'lunar' cannot run here: the moon is in the wrong phase"
    with pytest.raises(BackendUnavailable, match=reason):
        choose("lunar", must_run=True)
    with pytest.raises(BackendUnavailable, match=reason), use_backend("lunar"):
        pass
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "lunar")
    with pytest.raises(BackendUnavailable, match=f"^DINO_HF_MS_DEFORM_ATTN: .*{reason}"):
        choose("torch")


def test_whatever_a_machine_does_wrong_is_a_reason():
    def strange() -> Backend:
        raise KeyError("id")

    register_backend("strange", strange, first=True)
    with pytest.warns(DinoDetrWarning, match="'strange' cannot run here: KeyError: 'id'"):
        assert choose() == "cpu"


# -- The trial


def stands_in(plain=None, fused=None) -> Backend:
    """A kernel for the CPU in place of one for a GPU: right, but for what a test puts in its place."""
    right = load_backend("cpu")
    return Backend(plain or right.plain, fused or right.fused)


def raises(*inputs):
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with ...")


def register_gpu(backend: Backend, **settings) -> None:
    register_backend("gpu", lambda: backend, "cpu", (torch.float32, torch.bfloat16), first=True, **settings)


def test_a_kernel_that_is_right_is_taken_after_one_trial():
    calls = []
    right = load_backend("cpu")
    register_gpu(stands_in(fused=lambda *inputs: calls.append(1) or right.fused(*inputs)))
    assert choose() == choose() == "gpu"
    assert len(calls) == 2  # references of two and of four numbers
    assert choose(dtype=torch.bfloat16) == "gpu"
    assert len(calls) == 4


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out):
        return out.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.01


class BackwardRaises(WrongGradient):
    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("grid_sampler_2d_backward")


WRONG = {
    "raises": (raises, "its trial ended with RuntimeError: CUDA error: no kernel image is .* device Compile"),
    "zeros": (
        lambda *inputs: 0 * load_backend("cpu").fused(*inputs),
        "wrong numbers: the output of the fused form .2 numb",
    ),
    "a little off": (lambda *inputs: load_backend("cpu").fused(*inputs) * 1.001, "the output of the fused form"),
    "NaN": (lambda *inputs: load_backend("cpu").fused(*inputs) * torch.nan, "differs by nan"),
    "gradients": (
        lambda *inputs: WrongGradient.apply(load_backend("cpu").fused(*inputs)),
        "the gradient of values of the",
    ),
    "no gradient": (
        lambda *inputs: BackwardRaises.apply(load_backend("cpu").fused(*inputs)),
        "grid_sampler_2d_backward",
    ),
    "boxes only": (
        lambda *inputs: load_backend("cpu").fused(*inputs) * (1 if inputs[2].shape[-1] == 2 else 2),
        "fused form .4 numbers a reference",
    ),
    "x and y": (
        lambda value, shapes, *others: load_backend("cpu").fused(value, [size[::-1] for size in shapes], *others),
        "wrong numbers",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_kernel_that_fails_its_trial_gives_way_with_one_warning(name):
    wrong, reason = WRONG[name]
    register_gpu(stands_in(fused=wrong))
    with pytest.warns(DinoDetrWarning, match=f"'gpu' cannot run here: .*{reason}.*A slower backend is used") as caught:
        assert choose() == choose() == "cpu"
    assert len(caught) == 1
    with pytest.raises(BackendUnavailable, match=reason), use_backend("gpu"):
        choose()
    assert re.search(reason, describe_backends()["gpu"])


def test_the_plain_form_is_tried_too():
    register_gpu(stands_in(plain=raises))
    with pytest.warns(DinoDetrWarning, match="no kernel image"):
        assert choose() == "cpu"


def test_a_device_that_does_not_fit_is_not_tried():
    register_gpu(stands_in(fused=raises), find_obstacle=lambda device: f"{device} is too old")
    with pytest.warns(DinoDetrWarning, match="'gpu' cannot run here: cpu is too old"):
        assert choose() == "cpu"


def test_no_memory_says_nothing_about_a_kernel():
    def full(*inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    backends = [stands_in(fused=full), stands_in()]
    register_backend(
        "gpu", lambda: Backend(backends[0].plain, lambda *inputs: backends[0].fused(*inputs)), "cpu", first=True
    )
    with pytest.raises(torch.OutOfMemoryError):
        choose()
    del backends[0]
    assert choose() == "gpu"


def test_a_trial_is_not_touched_by_what_surrounds_it_and_touches_nothing():
    """Nor do random numbers that are drawn after it change."""
    register_gpu(stands_in())
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        assert choose() == "gpu"
    assert torch.equal(torch.rand(3), expected)


def test_a_device_without_the_gradient_of_grid_sample_gathers(monkeypatch):
    """As MPS was; the CPU stands in for it."""
    monkeypatch.setattr(attention_backends, "_needs_trial", lambda entry, device_type: True)
    torch_backend = lambda *inputs: BackwardRaises.apply(load_backend("reference").plain(*inputs))  # noqa: E731
    for name in ("cpu", "torch"):
        attention_backends._entries.pop(name)
    register_backend("torch", lambda: Backend(torch_backend), first=True)
    with pytest.warns(DinoDetrWarning, match="'torch' cannot run here: .*grid_sampler_2d_backward"):
        assert choose() == "gather"


@pytest.mark.parametrize(
    ("device", "is_tried"), [("mps", True), ("xpu", True), ("cpu", False), ("cuda", False), ("meta", False)]
)
def test_where_pytorch_itself_is_tried(device, is_tried):
    assert attention_backends._needs_trial(attention_backends._entries["torch"], device) is is_tried
    assert attention_backends._needs_trial(attention_backends._entries["triton"], device)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("form", [None, 2, 4], ids=["plain", "points", "boxes"])
def test_no_sample_of_the_trial_lies_where_the_derivative_jumps(form, dtype):
    inputs = trial_inputs(form, dtype)
    size = torch.tensor([(width, height) for height, width in TRIAL_SHAPES])[:, None].double()
    points = inputs.points.double()
    if form is None:
        pixels = points * size - 0.5
    else:
        references = inputs.references.double()[:, :, None, :, None]
        cells = 1 if form == 2 else references[..., 2:] * size * 0.5 / points.shape[-2]
        pixels = references[..., :2] * size + points * cells - 0.5
    assert (pixels - pixels.round()).abs().min() > 0.15
    inside = ((pixels > -1) & (pixels < size)).all(-1)
    assert 0.4 < inside.double().mean() < 0.95  # and some are outside


# -- Threads


def test_a_block_holds_in_the_threads_of_autograd():
    """On a GPU, backward passes run in threads of their own, and compute again there what was checkpointed."""
    found = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: found.append(choose()))
        thread.start()
        thread.join()
    thread = threading.Thread(target=lambda: found.append(choose()))
    thread.start()
    thread.join()
    assert found == ["reference", "cpu"]


def test_threads_have_blocks_of_their_own():
    found, barrier = {}, threading.Barrier(2)

    def within(name):
        with use_backend(name):
            barrier.wait()
            found[name] = choose()
            barrier.wait()

    threads = [threading.Thread(target=within, args=(name,)) for name in ("reference", "torch")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"reference": "reference", "torch": "torch"}
    assert choose() == "cpu"


def test_an_automatic_one_that_cannot_run_gives_way_with_one_warning():
    register_backend("lunar", broken, first=True)
    with pytest.warns(UserWarning, match="the moon is in the wrong phase.*DINO_HF_MS_DEFORM_ATTN=torch"):
        assert choose() == "cpu"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert choose() == "cpu"
    assert not caught


def test_a_named_backend_is_not_asked_for_what_it_does_not_compute():
    with pytest.raises(
        ValueError, match=r"'cpu' supports torch.float32 and torch.bfloat16 on 'cpu', not torch.float64"
    ):
        choose("cpu", dtype=torch.float64, must_run=True)


def test_nothing_is_loaded_before_it_is_needed():
    calls = []
    register_backend("lazy", lambda: calls.append(1) or Backend(lambda *inputs: None), first=True, device_type="xpu")
    choose()
    assert not calls
    load_backend("lazy")
    load_backend("lazy")
    assert calls == [1]


def test_the_description_says_why_one_is_out():
    register_backend("lunar", broken)
    described = describe_backends()
    assert described["lunar"] == "the moon is in the wrong phase"
    assert described["cpu"] is described["torch"] is described["reference"] is None
    if not torch.cuda.is_available():
        assert described["triton"] == "there is no CUDA device"


def test_export_takes_what_every_runtime_has():
    class Attention(torch.nn.Module):
        def forward(self, value, locations, weights):
            return ms_deform_attn(value, ((3, 5), (1, 2)), locations, weights)

    inputs = torch.randn(2, 17, 3, 4), torch.rand(2, 7, 3, 2, 2, 2), torch.rand(2, 7, 3, 2, 2)
    program = torch.export.export(Attention(), inputs)
    operators = [str(node.target) for node in program.graph.nodes]
    assert not [name for name in operators if "_ms_deform_attn_" in name or "grid_sample" in name]
    expected = ms_deform_attn(inputs[0], ((3, 5), (1, 2)), *inputs[1:], backend="gather")
    assert torch.equal(program.module()(*inputs), expected)


def test_compiled_code_uses_the_kernel_and_gives_its_bits():
    inputs = torch.randn(2, 17, 3, 4), ((3, 5), (1, 2)), torch.rand(2, 7, 3, 2, 2, 2), torch.rand(2, 7, 3, 2, 2)
    compiled = torch.compile(ms_deform_attn, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), ms_deform_attn(*inputs, backend="cpu"))
