"""Which implementation of deformable attention runs, and what happens where one cannot."""

import warnings

import pytest
import torch

from dino_hf import attention_backends, use_backend
from dino_hf.attention_backends import (
    ENVIRONMENT_VARIABLE,
    Backend,
    BackendUnavailable,
    choose_backend,
    describe_backends,
    load_backend,
    register_backend,
)
from dino_hf.ms_deform_attn import ms_deform_attn
from helpers import needs_compiler

pytestmark = needs_compiler


@pytest.fixture(autouse=True)
def own_table(monkeypatch):
    """Each test may register what it likes."""
    for name in ("_entries", "_loaded", "_reasons"):
        monkeypatch.setattr(attention_backends, name, dict(getattr(attention_backends, name)))
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


def broken() -> Backend:
    raise BackendUnavailable("the moon is in the wrong phase")


def choose(name=None, device="cpu", dtype=torch.float32) -> str:
    return choose_backend(name, device, dtype)


def test_the_device_and_the_dtype_choose():
    assert choose() == "cpu"
    assert choose(dtype=torch.bfloat16) == "cpu"
    assert choose(dtype=torch.float64) == "torch"
    assert choose(dtype=torch.float16) == "torch"
    assert choose(device="mps") == "torch"


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
    with pytest.raises(ValueError, match="no ms_deform_attn backend 'tritn'"):
        choose("tritn")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cpu")
    with pytest.raises(ValueError, match="no ms_deform_attn backend 'cpu'"):
        choose("cpu")


def test_a_block_that_fails_leaves_no_trace():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert choose() == "cpu"


def test_an_unknown_name_is_an_error_that_lists_the_known(monkeypatch):
    with pytest.raises(
        ValueError, match=r"no ms_deform_attn backend 'cuda'; known are \['cpu', 'gather', 'reference', 'torch', 't"
    ):
        choose("cuda")
    with pytest.raises(ValueError, match="no ms_deform_attn backend 'cuda'"), use_backend("cuda"):
        pass
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cuda")
    with pytest.raises(ValueError, match="no ms_deform_attn backend 'cuda'"):
        choose()


def test_a_named_backend_that_cannot_run_says_why():
    register_backend("lunar", broken, first=True)
    with pytest.raises(BackendUnavailable, match="'lunar' cannot run here: the moon is in the wrong phase"):
        choose("lunar")
    with pytest.raises(BackendUnavailable, match="the moon"), use_backend("lunar"):
        pass


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
        ValueError, match=r"'cpu' computes torch.float32 and torch.bfloat16 on 'cpu', not torch.float64"
    ):
        choose("cpu", dtype=torch.float64)


def test_nothing_is_loaded_before_it_is_needed():
    calls = []
    register_backend("lazy", lambda: calls.append(1) or Backend(lambda *inputs: None), first=True, device_type="xpu")
    choose()
    assert not calls
    choose(device="xpu")
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
