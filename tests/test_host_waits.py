"""Nothing in a forward pass or a training step makes the host wait for a GPU, but for the matcher's one copy."""

import contextlib
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerControl

from dino_hf import DinoDetrForObjectDetection
from dino_hf.training.steps import StepCallback
from helpers import SIZES, tiny_config, tiny_images, tiny_labels

aten = torch.ops.aten
READS_VALUES = {  # the host needs a number from the device, or the size of the result
    aten._local_scalar_dense,
    aten.equal,
    aten.is_nonzero,
    aten.masked_select,
    aten.nonzero,
    aten.nonzero_static,
    aten.unique_consecutive,
    aten.unique_dim,
    aten._unique2,
}
TAKES_MASKS = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
COPIES = {aten._to_copy, aten.copy_}


class HostWatch(TorchDispatchMode):
    """Counts copies from the device to the host, answers them with random numbers, and refuses whatever else would wait.

    `meta` stands in for the GPU: tensors on it have shapes and no numbers, so what needs a number cannot go unnoticed, and what is
    on the host and what is not can be told apart. It is a proxy. The code for CUDA alone (Triton's kernels, and branches that ask
    for "cuda") is not run; what waits inside an operator of torch, as copies from memory that is not pinned may, is not seen; nor
    are other processes. `benchmarks/host_syncs.py` asks CUDA itself.
    """

    def __init__(self):
        super().__init__()
        self.copies: list[tuple[int, ...]] = []  # shapes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        operator = func.overloadpacket
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_device = [tensor for tensor in tensors if tensor.is_meta]
        if on_device:
            assert operator not in READS_VALUES, f"{func} reads values"
            assert operator is not aten.lift_fresh, (
                "torch.tensor(..., device=...) waits; make it on the host, or by torch.full"
            )
            if operator is aten.repeat_interleave:
                assert kwargs.get("output_size") is not None, f"{func} has a size that depends on values"
        if on_device and operator in TAKES_MASKS:
            indices = [index for index in args[1] if index is not None]
            assert all(index.dtype not in (torch.bool, torch.uint8) for index in indices), "an index is a mask"
        if operator in COPIES:
            source = args[1] if operator is aten.copy_ else args[0]
            target = args[0].device if operator is aten.copy_ else torch.device(kwargs.get("device") or source.device)
            if source.is_meta and target.type == "cpu":
                self.copies.append(tuple(source.shape))
                return torch.rand(source.shape, dtype=kwargs.get("dtype") or source.dtype)
            if source.device.type == "cpu" and target.type == "meta":
                is_async = args[2:] == (True,) or kwargs.get("non_blocking")
                assert is_async, f"a copy of {tuple(source.shape)} to the device waits: non_blocking=True"
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def autocast_knows_no_meta(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())


def model_on_meta(**changes) -> DinoDetrForObjectDetection:
    with torch.device("meta"):
        return DinoDetrForObjectDetection(tiny_config(**changes))


@pytest.mark.parametrize("settings", [{}, {"mixed_query_selection": False, "num_feature_levels": 5}], ids=str)
@pytest.mark.parametrize("is_padded", [False, True])
def test_inference_waits_for_nothing(settings, is_padded):
    model = model_on_meta(**settings).eval()
    pixel_values, pixel_mask = (x.to("meta") for x in tiny_images())
    with HostWatch() as watch, torch.no_grad():
        outputs = model(pixel_values, pixel_mask if is_padded else None, output_attentions=is_padded)
    assert outputs.pred_boxes.is_meta
    assert not watch.copies


@pytest.mark.parametrize(
    ("counts", "settings"),
    [
        ((3, 0), {}),
        ((0, 0), {}),
        ((60, 2), {}),
        ((3, 1), {"max_denoising_queries": 4, "mask_denoising_padding": True}),
        ((3, 0), {"num_denoising": 0}),
        ((3, 0), {"class_loss": "align_detr", "queries_per_box": 2}),
        ((3, 2), {"class_loss": "stable_dino", "encoder_fusion": True}),
        ((3, 1), {"class_loss": "quality_focal"}),
    ],
)
def test_a_training_step_waits_for_the_costs_of_matching_alone(counts, settings):
    model = model_on_meta(**settings).train()
    optimizer = torch.optim.AdamW(model.parameters())
    pixel_values, pixel_mask = (x.to("meta") for x in tiny_images())
    labels = tiny_labels(*counts)  # on the host, where a data loader makes them
    model.loss_function = partial(model.criterion, skip_non_finite=not settings)
    with HostWatch() as watch:
        model(pixel_values, pixel_mask, labels, num_items_in_batch=7 if settings else None).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    layers = 1 + model.config.decoder_layers
    assert watch.copies == [(layers, len(SIZES), max(counts) + 1, model.config.num_queries)]


def test_the_check_of_gradients_waits_for_nothing():
    model = model_on_meta().train()
    optimizer = torch.optim.AdamW(model.parameters())
    trainer = SimpleNamespace(
        accelerator=None,
        is_fsdp_enabled=False,
        is_deepspeed_enabled=False,
        recipe=SimpleNamespace(on_non_finite="raise"),
        _image_ids=[torch.zeros(2, dtype=torch.long, device="meta")],
        _when=lambda: "",
        _inputs=SimpleNamespace(replaced={}),
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    control = TrainerControl()
    callback = StepCallback(trainer)
    with HostWatch() as watch:
        callback.on_pre_optimizer_step(None, None, control, model=model, optimizer=optimizer)
        callback.on_step_end(None, None, control)
    assert not watch.copies
    assert optimizer.found_inf.is_meta
    control.should_log = True
    with pytest.raises(AssertionError), HostWatch():
        callback.on_step_end(None, None, control)


def assert_refused(*waits) -> None:
    for wait in waits:
        with pytest.raises(AssertionError), HostWatch():
            wait()


def test_the_watch_sees_what_waits():
    x = torch.zeros(3, device="meta")
    assert_refused(
        lambda: x.sum().item(),
        lambda: bool(x.any()),
        lambda: x.nonzero(),
        lambda: x[x > 0],
        lambda: x.masked_select(x > 0),
        lambda: x.unique(),
        lambda: x.repeat_interleave(x.long()),
        lambda: torch.ones(3).to("meta"),
        lambda: x.copy_(torch.ones(3)),
        lambda: x.__setitem__(x > 0, x[:1]),
    )
    with HostWatch() as watch:
        x.cpu()
        x[torch.tensor([0, 2]).to("meta", non_blocking=True)] = 1.0
        x.masked_fill(x > 0, 1.0)
        torch.ones(3).to("meta", non_blocking=True)
    assert watch.copies == [(3,)]


@pytest.mark.skipif(torch.__version__ < (2, 15), reason="earlier, torch.tensor(..., device='meta') is not told")
def test_the_watch_sees_tensors_that_are_made_on_the_device():
    x = torch.zeros(3, device="meta")
    assert_refused(
        lambda: torch.tensor([1, 2], device="meta"),
        lambda: torch.as_tensor([1, 2], device="meta"),
        lambda: x.new_tensor([1, 2]),
        lambda: x[[0, 2]],
    )
