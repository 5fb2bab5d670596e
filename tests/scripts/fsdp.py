"""One step of a model whose parameters are spread over processes by torch's FSDP2: the plain model's gradients, a saved folder."""

import sys

import torch
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dino_hf import DinoDetrForObjectDetection
from helpers import tiny_config, tiny_images, tiny_labels
from processes import leave


def make_model():
    torch.manual_seed(0)
    return DinoDetrForObjectDetection(tiny_config(num_denoising=50)).train()


def train_step(model, batch):
    """The loss, with weights after a plain gradient step. Every process has the same batch and noise, so means are themselves."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=1e-3)
    loss = model(*batch).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


def main(folder):
    distributed.init_process_group("gloo")
    batch = (*tiny_images(), tiny_labels(3, 0)) if distributed.get_rank() == 0 else None
    box = [batch]
    distributed.broadcast_object_list(box)
    batch = box[0]

    plain, sharded = make_model(), make_model()
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    whole = set(type(sharded)._no_split_modules)
    for module in reversed(list(sharded.modules())):  # the decoder after its layers, as accelerate does
        if type(module).__name__ in whole:
            fully_shard(module, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert all(isinstance(one, torch.distributed.tensor.DTensor) for one in sharded.parameters())

    losses = [train_step(model, batch) for model in (plain, sharded)]
    torch.testing.assert_close(*losses)
    state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    if distributed.get_rank() == 0:
        for name, value in plain.state_dict().items():
            # float32, and gradients that are averaged
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6, msg=name)
        plain.save_pretrained(folder, state_dict=state)
    distributed.barrier()
    loaded = DinoDetrForObjectDetection.from_pretrained(folder)
    expected = make_model().eval()
    expected.load_state_dict(state if state else loaded.state_dict())
    with torch.no_grad():
        outputs = [model.eval()(*batch[:2]).logits for model in (loaded, expected)]
    assert torch.equal(*outputs)
    distributed.destroy_process_group()
    leave()


main(sys.argv[1])
