"""Several GPUs in one process, without any: replicas of nn.DataParallel, and modules spread over devices of fake tensors."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dino_hf import DinoDetrConfig, DinoDetrForObjectDetection, use_backend
from helpers import tiny_config, tiny_images, tiny_labels

PARTS = [
    *("model.backbone", "model.encoder.level_embed", "model.encoder.layers.0", "model.encoder.layers.1"),
    *("model.query_selection", "model.denoising", "model.decoder"),
]


def replicate(model: nn.Module) -> nn.Module:
    """A copy that has tensors in the place of parameters, as nn.DataParallel makes one for each GPU."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicas[child]
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter.clone())
        replica._buffers = {name: None if x is None else x.clone() for name, x in module._buffers.items()}
    return replicas[model]


def padded_labels() -> dict[str, torch.Tensor]:
    first = tiny_labels(4)[0]
    classes = torch.full((2, 4), -100)
    classes[0], boxes = first["class_labels"], torch.zeros(2, 4, 4)
    boxes[0] = first["boxes"]
    return {"class_labels": classes, "boxes": boxes}


@pytest.mark.parametrize("training", [True, False])
def test_a_replica_computes_what_the_model_does(training):
    model = DinoDetrForObjectDetection(tiny_config()).train(training)
    batch, labels = tiny_images(), padded_labels()
    losses, gradients = [], []
    for each in (model, replicate(model)):
        torch.manual_seed(0)
        model.zero_grad()
        loss = each(*batch, labels).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert losses[0] == losses[1]
    assert gradients[0]
    assert set(gradients[0]) == set(gradients[1])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_a_replica_refuses_labels_that_were_cut_to_pieces():
    model = DinoDetrForObjectDetection(tiny_config())
    with pytest.raises(ValueError, match="one process for each GPU with torchrun, or pass labels as one dictionary"):
        replicate(model)(*tiny_images(), tiny_labels(2, 1))


@pytest.mark.parametrize("share", [0.7, 0.8, 0.9, 0.95])
def test_a_device_map_does_not_split_selection_and_decoder(share):
    accelerate = pytest.importorskip("accelerate")
    with accelerate.init_empty_weights():
        model = DinoDetrForObjectDetection(DinoDetrConfig())
    size = int(share * accelerate.utils.compute_module_sizes(model)[""])
    device_map = accelerate.infer_auto_device_map(
        model, {0: size, 1: size, "cpu": 10**10}, no_split_module_classes=model._no_split_modules
    )
    assert len(set(device_map.values())) > 1
    inner = ("model.decoder.", "model.query_selection.", "model.denoising.", "model.backbone.")
    assert not [name for name in device_map if name.startswith(inner)]


@pytest.mark.parametrize("place", ["hooks on every module", "offloaded"])
def test_hidden_states_and_attentions_pass_the_hooks_of_accelerate(place):
    """The hooks copy lists and dictionaries that are passed to a module, so everything must be returned."""
    accelerate = pytest.importorskip("accelerate")
    model = DinoDetrForObjectDetection(tiny_config()).eval()
    batch, requested = tiny_images(), {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        expected = model(*batch, **requested)
        if place == "offloaded":
            accelerate.cpu_offload(model, execution_device="cpu")
        else:
            for module in model.modules():
                hook = accelerate.hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True)
                accelerate.hooks.add_hook_to_module(module, hook)
        found = model(*batch, **requested)
    names = ("encoder_hidden_states", "encoder_attentions", "encoder_sampling_locations", "decoder_hidden_states")
    for name in (*names, "decoder_attentions", "cross_attentions", "cross_sampling_locations"):
        num_layers = model.config.encoder_layers if name.startswith("encoder") else model.config.decoder_layers
        assert len(found[name]) == num_layers + name.endswith("hidden_states")
        for one, other in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # with hooks, CPU speed-ups are off


def spread(model: nn.Module, devices: dict[str, str]) -> None:
    """Fake parameters on these devices, and hooks that move what goes into a part, as those of accelerate do."""
    from accelerate.utils import send_to_device

    for name, device in devices.items():
        part = model.get_submodule(name)
        for module in part.modules():
            for key, value in module._parameters.items():
                if value is not None:
                    module._parameters[key] = nn.Parameter(torch.empty(value.shape, device=device))
            for key, value in module._buffers.items():
                module._buffers[key] = torch.empty(value.shape, device=device)

        def move(module, args, kwargs, device=device):
            return send_to_device(args, device), send_to_device(kwargs, device)

        part.register_forward_pre_hook(move, with_kwargs=True)


@pytest.mark.parametrize("num_first", range(1, len(PARTS)))
def test_a_model_may_be_spread_over_two_devices(num_first):
    """Fake tensors refuse to meet across devices as real ones do."""
    pytest.importorskip("accelerate")
    model = DinoDetrForObjectDetection(tiny_config()).eval()
    with FakeTensorMode(allow_non_fake_inputs=True), use_backend("torch"):
        spread(model, {name: f"cuda:{int(index >= num_first)}" for index, name in enumerate(PARTS)})
        pixel_values = torch.empty(2, 3, 64, 104, device="cuda:0")
        pixel_mask = torch.empty(2, 64, 104, dtype=torch.bool, device="cuda:0")
        outputs = model(pixel_values, pixel_mask, output_hidden_states=True, output_attentions=True)
        assert outputs.logits.shape == (2, 15, 5)
        assert str(outputs.pred_boxes.device) == "cuda:1"
