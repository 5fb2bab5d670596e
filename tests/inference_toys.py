"""Detectors of toy size whose answers differ from image to image, and images for them."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel

from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from helpers import tiny_config

NAMES = {0: "disc", 1: "box", 2: "triangle", 3: "star", 4: "ring"}
CATEGORY_IDS = [3, 7, 12, 21, 40]


def excite(model: PreTrainedModel, scale: float = 0.05) -> PreTrainedModel:
    """Away from the initial values, at which most answers are alike."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "backbone" not in name:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def toy_detector() -> tuple[DinoDetrForObjectDetection, DinoDetrImageProcessor]:
    torch.manual_seed(0)
    model = excite(DinoDetrForObjectDetection(tiny_config(id2label=NAMES, category_ids=CATEGORY_IDS)))
    return model, DinoDetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 96})


def save_toy_detector(folder: Path) -> Path:
    for part in toy_detector():
        part.save_pretrained(folder)
    return folder


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Large blots, which a resize leaves."""
    rng = np.random.default_rng([seed, width, height])
    small = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)
