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

EARLY_SWIN = {"backbone_config": {**SWIN, "out_features": ["stage1", "stage3"]}, "num_frozen_backbone_stages": 2}
# Both have parameters on which no map depends: a mask token and last layers, and the ways to maps that are not taken.
DINOV2 = {"model_type": "dinov2", "image_size": 56, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
DINOV2 = {"backbone_config": {**DINOV2, "out_features": ["stage2", "stage3"]}}
HRNET = {"backbone_config": {"model_type": "timm_backbone", "backbone": "hrnet_w18_small", "out_indices": [1, 2, 3]}}

CASES = {  # name -> changes of the configuration, what is done to the model, and whether activations are computed again
    "frozen": (EARLY_SWIN, lambda model: freeze(model, ["backbone", "encoder", r"decoder\.layers\.0\."]), False),
    "without denoising": (EARLY_SWIN, lambda model: freeze(model, ["denoising", "query_selection"]), True),
    "unfrozen": (EARLY_SWIN, lambda model: unfreeze(model, "backbone"), False),
    "adapted": (EARLY_SWIN, add_lora, True),
    "DINOv2": (DINOV2, lambda model: None, False),
    "DINOv2, checkpointed": (DINOV2, lambda model: None, True),
    "DINOv2, unfrozen": (DINOV2, lambda model: unfreeze(model, "backbone"), False),
    "HRNet": (HRNET, lambda model: None, False),
    "HRNet, unfrozen": (HRNET, lambda model: unfreeze(model, "backbone"), False),
}


def train(changes: dict, prepare, checkpointing: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    model = DinoDetrForObjectDetection(tiny_config(**changes))
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
    for name, (changes, prepare, checkpointing) in CASES.items():
        model = train(changes, prepare, checkpointing)
        ours = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        first = ours.clone()
        torch.distributed.broadcast(first, src=0)
        assert torch.equal(ours, first), f"{name}: the processes have different weights"
    torch.distributed.destroy_process_group()
    leave()
