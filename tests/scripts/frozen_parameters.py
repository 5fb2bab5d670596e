"""In each process: models of which parts are frozen, or adapted, train in step; gradients that never come would stop them."""

import warnings

import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from dino_hf import DinoDetrForObjectDetection
from dino_hf.training.freezing import freeze, unfreeze
from dino_hf.training.lora import add_lora
from dino_hf.training.recipes import get_recipe
from helpers import SWIN, tiny_config, tiny_images, tiny_labels
from processes import leave

CASES = {  # name -> what is done to the model, and whether activations are computed again
    "frozen": (lambda model: freeze(model, ["backbone", "encoder", r"decoder\.layers\.0\."]), False),
    "without denoising": (lambda model: freeze(model, ["denoising", "query_selection"]), True),
    "unfrozen": (lambda model: unfreeze(model, "backbone"), False),
    "adapted": (add_lora, True),
}


def train(prepare, checkpointing: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    backbone = {**SWIN, "out_features": ["stage1", "stage3"]}  # its last stage gives no map
    model = DinoDetrForObjectDetection(tiny_config(backbone_config=backbone, num_frozen_backbone_stages=2))
    prepare(model)  # adapters are put in place too
    if checkpointing:
        model.gradient_checkpointing_enable()
    model = DistributedDataParallel(model).train()
    optimizer = get_recipe("finetune", learning_rate=1e-3).make_optimizer(model)
    rank = torch.distributed.get_rank()
    for step in range(2):
        torch.manual_seed(10 * step + rank)
        pixel_values, pixel_mask = tiny_images()
        labels = tiny_labels(3, 0) if rank else tiny_labels(0, 0)
        model(pixel_values=pixel_values, pixel_mask=pixel_mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of peft, about names that transformers has changed
    torch.distributed.init_process_group("gloo")
    for name, (prepare, checkpointing) in CASES.items():
        model = train(prepare, checkpointing)
        ours = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        first = ours.clone()
        torch.distributed.broadcast(first, src=0)
        assert torch.equal(ours, first), f"{name}: the processes have different weights"
    torch.distributed.destroy_process_group()
    leave()
