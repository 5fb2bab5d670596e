"""Bytes that one more image in a batch adds to a training step, as the system sees them and as they are forecast.

step_memory.py {resnet,internimage}
"""

import sys
from pathlib import Path

import torch

from dino_hf import DinoDetrForObjectDetection
from dino_hf.run.memory_forecast import forecast_memory
from dino_hf.training import Augmentation, get_recipe
from helpers import INTERNIMAGE, QUIET, RESNET, tiny_config

SIZE, NUM_BOXES = (352, 480), 20
BACKBONES = {"resnet": RESNET, "internimage": INTERNIMAGE}


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main(backbone: str) -> None:
    torch.manual_seed(0)
    model = DinoDetrForObjectDetection(
        tiny_config(backbone_config=dict(BACKBONES[backbone]), d_model=128, num_queries=100)
    ).train()
    augmentation = Augmentation(short_sides=SIZE[:1], longest_side=SIZE[1], crop=0.0)
    recipe = get_recipe("finetune", augmentation=augmentation, ema_decay=None)
    recipe.configure(model)
    optimizer = recipe.make_optimizer(model)
    peaks = {}
    for batch_size in (2, 6):
        labels = {
            "class_labels": torch.zeros(batch_size, NUM_BOXES, dtype=torch.int64),
            "boxes": torch.tensor([0.5, 0.5, 0.2, 0.2]).repeat(batch_size, NUM_BOXES, 1),
        }
        for _ in range(2):
            model(torch.rand(batch_size, 3, *SIZE), labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        peaks[batch_size] = peak()
    args = recipe.training_arguments("out", **QUIET)
    print((peaks[6] - peaks[2]) // 4, forecast_memory(model, recipe, args, [SIZE], NUM_BOXES).per_image)


if __name__ == "__main__":
    main(sys.argv[1])
