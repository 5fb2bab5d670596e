"""Rebuilds the weights and images that the recorded numbers of the original release, detrex and mmdetection belong to.

Each tensor follows from its name alone, so that no weights need to be stored; `data/` holds, for each variant, the names and
shapes of its checkpoint, its settings, and what the project computed with them on a CPU in float32.
"""

import json
import math
import zlib
from argparse import Namespace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dino_hf.conversion.convert_checkpoint import convert
from dino_hf.model.coco_classes import COCO_CLASSES

DATA = Path(__file__).parent / "data"
VARIANTS = [
    *("original/r50_4scale", "original/r50_5scale", "original/swin_t_4scale"),
    *("detrex/r50_4scale", "detrex/swin_t_4scale", "mmdet/r50_4scale", "mmdet/swin_t_5scale"),
    *("detrex/focalnet_4scale", "detrex/vitdet_4scale", "detrex/internimage_4scale"),
]
# Co-DETR, Align-DETR and Stable-DINO, see test_family.py. They have other names and other losses than DINO.
FAMILY = ["codetr/r50_5scale", "codetr/swin_t_5scale", "aligndetr/r50_4scale", "stabledino/r50_4scale"]
_OF_DETREX = ("detrex", "aligndetr", "stabledino")


def each_variant(names: list[str]):
    """A fixture `variant` that runs the tests of a module on each of these recordings."""

    @pytest.fixture(scope="module", params=names)
    def variant(request):
        return request.param

    return variant


def project_of(variant: str) -> str:
    return variant.split("/")[0]


def load_manifest(variant: str) -> dict:
    return json.loads((DATA / variant / "manifest.json").read_text())


def load_recorded(variant: str, name: str) -> dict[str, Tensor]:
    """`eval_outputs` or `eval_intermediates`, with padding masked; `eval_outputs_of_padding`, without a mask.

    detrex masks padding in training only. Co-DETR does not mask it for models trained with large-scale jittering.
    """
    if project_of(variant) in _OF_DETREX:
        name = {"eval_outputs_of_padding": "eval_outputs"}.get(name, f"{name}_masked")
    name = {"eval_outputs_of_padding": "eval_outputs_nomask"}.get(name, name)
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


def make_checkpoint(variant: str) -> dict:
    """What `torch.load` of a file of the project gives."""
    manifest = load_manifest(variant)
    tensors: dict[str, Tensor] = {}
    for name, entry in manifest["tensors"].items():
        source = entry.get("alias_of")
        if name.endswith("relative_position_index"):
            tensors[name] = position_index(math.isqrt(entry["shape"][0]))
        elif source == "computed":
            tensors[name] = torch.zeros(entry["shape"], dtype=torch.int64)
        elif source is not None:
            tensors[name] = tensors[source]
        else:
            tensors[name] = make_tensor(name, entry["shape"], manifest["salt"])
    if project_of(variant) == "original":
        return {"model": tensors, "args": Namespace(**manifest["config"]), "epoch": 11}
    if project_of(variant) in _OF_DETREX:
        return {"model": tensors, "iteration": 89999}
    if project_of(variant) == "codetr":  # written by mmdetection 2
        meta = {"config": f"model = {manifest['config']!r}", "CLASSES": tuple(COCO_CLASSES.values())}
        return {"meta": meta, "state_dict": tensors}
    meta = {"cfg": f"model = {manifest['config']!r}", "dataset_meta": {"classes": tuple(COCO_CLASSES.values())}}
    return {"state_dict": tensors, "meta": meta}


def convert_recorded(variant: str, root: Path, **options) -> Path:
    """Write the checkpoint file of a recording, `checkpoint.pth`, and convert it. Returns the new folder beside it."""
    torch.save(make_checkpoint(variant), root / "checkpoint.pth")
    convert(root / "checkpoint.pth", root / "converted", **options)
    return root / "converted"


def position_index(window: int) -> Tensor:
    """(w * w, w * w): row of Swin's bias table for two cells, counted from their differences along y and x."""
    index = torch.empty(window, window, window, window, dtype=torch.int64)
    for y, x, other_y, other_x in product(range(window), repeat=4):
        index[y, x, other_y, other_x] = (y - other_y + window - 1) * (2 * window - 1) + x - other_x + window - 1
    return index.reshape(window**2, window**2)


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
