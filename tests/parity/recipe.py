"""Rebuilds the weights and images that the recorded numbers of the original release belong to.

Each tensor follows from its name alone, so that no weights need to be stored; `data/` holds, for each variant, the names and
shapes of its checkpoint, its settings, and what the original release computed with them on a CPU in float32.
"""

import json
import math
import zlib
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

DATA = Path(__file__).parent / "data"
VARIANTS = ["r50_4scale", "r50_5scale", "swin_t_4scale"]


def load_manifest(variant: str) -> dict:
    return json.loads((DATA / variant / "manifest.json").read_text())


def load_recorded(variant: str, name: str) -> dict[str, Tensor]:
    return load_file(DATA / variant / f"{name}.safetensors")


def make_tensor(name: str, shape: list[int], salt: str) -> Tensor:
    """The values of one tensor; the first rule that fits its name scales the noise to what such a tensor looks like."""
    noise = np.random.RandomState(zlib.crc32((salt + name).encode())).standard_normal(math.prod(shape))
    x = torch.from_numpy(noise.astype(np.float32)).reshape(shape)
    if name.startswith("pixel_values"):
        return x
    if name.endswith("running_var"):
        return 1 + 0.1 * x.abs()
    if name.endswith("running_mean"):
        return 0.1 * x
    if ("class_embed" in name or "cls_branches" in name) and name.endswith("bias"):
        return 0.05 * x - 4.6
    if name.endswith("sampling_offsets.bias"):
        return 2 * x
    if len(shape) == 1:
        return 1 + 0.1 * x if name.endswith("weight") else 0.05 * x
    embeddings = ("label_enc", "label_embedding", "tgt_embed", "query_embedding", "bias_table")
    if name.endswith(("level_embed", "level_embeds")) or any(part in name for part in embeddings):
        return 0.5 * x
    return x / math.sqrt(math.prod(shape[1:]))


def make_checkpoint(manifest: dict) -> dict:
    """What `torch.load` of a file of the release gives: tensors under `model`, settings under `args`."""
    tensors: dict[str, Tensor] = {}
    for name, entry in manifest["tensors"].items():
        source = entry.get("alias_of")
        if source == "computed":
            tensors[name] = torch.zeros(entry["shape"], dtype=torch.int64)
        elif source is not None:
            tensors[name] = tensors[source]
        else:
            tensors[name] = make_tensor(name, entry["shape"], manifest["salt"])
    return {"model": tensors, "args": Namespace(**manifest["config"]), "epoch": 11}


def make_images(manifest: dict) -> tuple[Tensor, Tensor]:
    """The padded batch and its mask, True on the image."""
    sizes = manifest["images"]
    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    pixel_values = torch.zeros(len(sizes), 3, height, width)
    pixel_mask = torch.zeros(len(sizes), height, width, dtype=torch.bool)
    for i, (h, w) in enumerate(sizes):
        pixel_values[i, :, :h, :w] = make_tensor(f"pixel_values.{i}", [3, h, w], manifest["salt"])
        pixel_mask[i, :h, :w] = True
    return pixel_values, pixel_mask


def make_labels(manifest: dict) -> list[dict[str, Tensor]]:
    targets = manifest["targets"]
    return [
        {"class_labels": torch.tensor(labels, dtype=torch.int64), "boxes": torch.tensor(boxes).reshape(-1, 4)}
        for labels, boxes in zip(targets["labels"], targets["boxes"], strict=True)
    ]
