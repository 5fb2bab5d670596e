"""Toy checkpoints of all projects, and rows of the table of published files for them."""

import hashlib
from pathlib import Path

import torch

from dino_hf.conversion import published
from dino_hf.conversion.convert_back import convert_back
from dino_hf.conversion.convert_checkpoint import convert
from dino_hf.conversion.published_row import BACKBONES, Published
from toy_checkpoints import CLASSES, LAYERS, QUERIES, original_tensors, settings

PROJECTS = ("original", "detrex", "mmdet")
BACKBONE = "toy ResNet"
# The toys have 4 heads of attention. Files of the release tell it.
_HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}


def write_toy_files(folder: Path) -> dict[str, bytes]:
    """Toy checkpoints as "/PROJECT/FILE" -> content.

    Args:
        folder: empty.
    """
    tensors = original_tensors()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model": tensors, "args": settings()}, folder / "original.pth")
    generator = torch.Generator().manual_seed(3)
    for layer in range(LAYERS):  # the other projects have a head for each layer
        for name in [name for name in tensors if name.startswith((f"class_embed.{layer}.", f"bbox_embed.{layer}."))]:
            tensors[name] = torch.randn(tensors[name].shape, generator=generator) / 8
            tensors[f"transformer.decoder.{name}"] = tensors[name]
    for name in tensors:
        if name.startswith("input_proj.") and name.endswith(".0.bias"):  # mmdetection has none
            tensors[name] = torch.zeros_like(tensors[name])
    torch.save({"model": tensors, "args": settings()}, folder / "start.pth")
    convert(folder / "start.pth", folder / "start")
    for project in PROJECTS[1:]:
        convert_back(folder / "start", project, folder / f"{project}.pth")
    return {f"/{project}/toy.pth": (folder / f"{project}.pth").read_bytes() for project in PROJECTS}


def add_toy_rows(setitem, files: dict[str, bytes], address: str) -> dict[str, Published]:
    """Add the rows PROJECT/toy to the table.

    Args:
        setitem: function that sets an item of a dictionary, such as `monkeypatch.setitem`.
        files: see `write_toy_files`.
        address: of the server.
    Returns:
        project -> row.
    """
    setitem(BACKBONES, BACKBONE, ("resnet", [2, 1, 1, 1], 32, None))
    rows = {}
    for project in PROJECTS:
        content = files[f"/{project}/toy.pth"]
        rows[project] = Published(
            *(project, "toy", 12.3, BACKBONE, 4, "toy.pth"),
            address=f"{address}/{project}/toy.pth",
            sha256=hashlib.sha256(content).hexdigest()[:8] if project == "mmdet" else "",
            settings={} if project == "original" else dict(_HEADS),
            aliases=("other",),
            num_labels=CLASSES,
            num_queries=QUERIES,
            encoder_layers=LAYERS,
        )
        for title in rows[project].titles:
            setitem(published._BY_TITLE, title, rows[project])
    return rows
