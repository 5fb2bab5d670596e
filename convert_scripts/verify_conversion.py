"""Compare two DINO models number by number, stage by stage: each a folder of dino_hf or a checkpoint of another project.

    python convert_scripts/verify_conversion.py checkpoint0011_4scale.pth dino-r50-4scale

A folder is run by dino_hf, a checkpoint by arithmetic of its own (source_arithmetic.py), on two pictures of different size. Each
stage of the second gets the input that the first had there, so a difference shows where it arises.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from architecture import build_config, recognise, rules_for, to_release_names
from checkpoint_files import ConversionError, load_checkpoint
from convert_back import load_folder, to_release
from dino_hf import DinoDetrConfig, DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.feature_levels import describe_levels, flatten_maps
from dino_hf.recording import Record
from dino_hf.tools.scenes import draw_scene
from key_mapping import translate
from source_arithmetic import SourceArithmetic

# What counts as equal. Relative to the largest value of a stage, because those of a backbone reach hundreds, in float32, through
# dozens of layers; boxes lie in [0, 1], and 2e-5 of them is a fortieth of a pixel in 1333.
RELATIVE, BOXES = 1e-4, 2e-5
TIE = 1e-3  # proposals whose scores are closer may change places
SIZES = ((224, 320), (192, 288))  # (height, width) of the two pictures


class FolderStages:
    """The stages of a model of dino_hf. Masks are True on the image."""

    def __init__(self, model: DinoDetrForObjectDetection):
        self.model = model.model.float()
        self.config = model.config

    def features(self, pixels: Tensor) -> list[Tensor]:
        return list(self.model.backbone.model(pixels).feature_maps)

    def maps(self, features: list[Tensor]) -> list[Tensor]:
        return self.model.backbone.project(features)

    def masks(self, pixels: Tensor, pixel_mask: Tensor, maps: list[Tensor]) -> list[Tensor]:
        return [~mask for mask in self.model.backbone(pixels, pixel_mask)[1]]

    def memory(self, maps: list[Tensor], masks: list[Tensor]) -> Tensor:
        return self.model.encoder(
            flatten_maps(maps), describe_levels([~mask for mask in masks]), Record.of(False, False)
        )

    def proposals(self, memory: Tensor, masks: list[Tensor]) -> tuple[Tensor, Tensor]:
        chosen = self.model.query_selection(memory, describe_levels([~mask for mask in masks]))
        return chosen.logits, chosen.boxes

    def decoded(self, references: Tensor, memory: Tensor, masks: list[Tensor]) -> tuple[Tensor, Tensor]:
        levels = describe_levels([~mask for mask in masks])
        content = self.model.query_selection.content.weight[: references.shape[1]].expand(len(references), -1, -1)
        decoded = self.model.decoder(content, references, memory, levels, None, Record.of(False, False))
        return decoded.logits, decoded.boxes


class CheckpointStages:
    """The same of a checkpoint's tensors, by the release's names."""

    def __init__(self, tensors: dict[str, Tensor], config: DinoDetrConfig):
        self.source = SourceArithmetic(tensors, config)
        self.config = config

    def features(self, pixels: Tensor) -> list[Tensor]:
        return self.source.backbone(pixels)

    def maps(self, features: list[Tensor]) -> list[Tensor]:
        return self.source.neck(features)

    def masks(self, pixels: Tensor, pixel_mask: Tensor, maps: list[Tensor]) -> list[Tensor]:
        return self.source.masks(pixel_mask, maps)

    def memory(self, maps: list[Tensor], masks: list[Tensor]) -> Tensor:
        return self.source.encoder(maps, masks)

    def proposals(self, memory: Tensor, masks: list[Tensor]) -> tuple[Tensor, Tensor]:
        logits, boxes = self.source.proposals(memory, masks)
        best = logits.amax(-1).topk(min(self.config.num_queries, logits.shape[1]), dim=1).indices[..., None]
        return logits.take_along_dim(best, 1), boxes.take_along_dim(best, 1).sigmoid()

    def decoded(self, references: Tensor, memory: Tensor, masks: list[Tensor]) -> tuple[Tensor, Tensor]:
        return self.source.decoder(references, memory, masks)


class Model:
    """One side of a comparison: its tensors by the release's names, its configuration and its stages."""

    def __init__(self, path: Path, ema: bool = False, config: DinoDetrConfig | None = None):
        """`config`: settings of a checkpoint that the file does not tell; otherwise what its project publishes."""
        if path.is_dir():
            model = load_folder(path)
            self.config, self.tensors = model.config, to_release(model.state_dict(), model.config)
            self.stages = FolderStages(model)
            return
        checkpoint = load_checkpoint(path, ema)
        project = recognise(checkpoint.tensors) or "original"
        tensors, _ = to_release_names(checkpoint, project)
        self.config = config or build_config(tensors, project, checkpoint.settings, {})[0]
        self.tensors = tensors
        self.stages = CheckpointStages(tensors, self.config)


def differences(first: Model, second: Model, pixels: Tensor, pixel_mask: Tensor) -> Iterator[tuple[str, float, float]]:
    """Stage, largest difference, and the largest that counts as equal."""

    def compare(name: str, a: Tensor, b: Tensor, limit: float | None = None) -> tuple[str, float, float]:
        if a.shape != b.shape:
            raise ConversionError(f"{name}: the shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared.")
        limit = RELATIVE * max(1, a.abs().max().item()) if limit is None else limit
        return name, (a - b).abs().max().item() if a.numel() else 0.0, limit

    one, two = first.stages, second.stages
    features = one.features(pixels)
    for number, (a, b) in enumerate(zip(features, two.features(pixels), strict=True), 1):
        yield compare(f"backbone, map {number}", a, b)
    maps = one.maps(features)
    masks, other_masks = (stages.masks(pixels, pixel_mask, maps) for stages in (one, two))
    for number, (a, b) in enumerate(zip(maps, two.maps(features), strict=True), 1):
        yield compare(f"neck, level {number}", a, b)
    yield compare(
        "padding of all levels", *(torch.cat([m.flatten(1) for m in of], 1).float() for of in (masks, other_masks))
    )
    memory = one.memory(maps, masks)
    yield compare("encoder", memory, two.memory(maps, masks))
    logits, boxes = one.proposals(memory, masks)
    other_logits, other_boxes = two.proposals(memory, masks)
    scores = logits.amax(-1)
    yield compare("query selection, scores", scores, other_logits.amax(-1))
    gaps = (scores[:, 1:] - scores[:, :-1]).abs() > TIE  # (B, Q - 1)
    edge = torch.zeros_like(gaps[:, :1])  # the last may be tied with one that was not selected
    alone = torch.cat([~edge, gaps], 1) & torch.cat([gaps, edge], 1)
    yield compare(f"query selection, {alone.sum()} untied boxes", boxes[alone], other_boxes[alone], BOXES)
    decoded, other = one.decoded(boxes, memory, masks), two.decoded(boxes, memory, masks)
    for layer, (a, b) in enumerate(zip(decoded[0], other[0], strict=True), 1):
        yield compare(f"decoder layer {layer}, logits", a, b)
    for layer, (a, b) in enumerate(zip(decoded[1], other[1], strict=True), 1):
        yield compare(f"decoder layer {layer}, boxes", a, b, BOXES)


def open_picture(image: Path | None) -> Image.Image:
    if image is None:
        return draw_scene(np.random.default_rng(0))[0].resize((640, 480))
    try:
        return Image.open(image).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ConversionError(f"{image} cannot be read as a picture ({error}).") from error


@torch.no_grad()
def report(first: Model, second: Model, picture: Image.Image) -> bool:
    """Print the differences of settings, tensors and stages; whether nothing differs by more than it may."""
    print_settings(first.config, second.config)
    same_tensors = print_tensors(first.tensors, second.tensors)
    batch = [picture.resize((width, height)) for height, width in SIZES]
    inputs = DinoDetrImageProcessor(do_resize=False)(images=batch, return_tensors="pt")
    print(f"  {'stage':32} {'difference':>10}  {'equal up to':>11}")
    equal = True
    for name, difference, limit in differences(first, second, inputs["pixel_values"], inputs["pixel_mask"].bool()):
        is_equal = difference <= limit  # not so for NaN
        equal &= is_equal
        print(f"  {name:32} {difference:10.1e}  {limit:11.1e}{'' if is_equal else '  DIFFERENT'}")
    print(f"  the two {'compute the same' if equal else 'do NOT compute the same'}", end="")
    print("" if same_tensors or not equal else ", though tensors differ")
    return equal


def print_settings(first: DinoDetrConfig, second: DinoDetrConfig) -> None:
    """Fields that bear on what is computed or trained, where they differ."""
    silent = {"provenance", "id2label", "label2id", "category_ids", "auto_map", "architectures", "transformers_version"}
    one, two = first.to_dict(), second.to_dict()
    for name in sorted((set(one) | set(two)) - silent):
        if one.get(name) != two.get(name) and not name.startswith("_") and name not in ("dtype", "backbone_config"):
            print(f"  setting {name}: {one.get(name)!r} and {two.get(name)!r}")


def print_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """How many tensors are equal, by the release's names; whether all that both have are."""
    shared = sorted(set(first) & set(second))
    unequal = [name for name in shared if not torch.equal(first[name], second[name])]
    print(f"  {len(shared) - len(unequal)} of {len(shared)} tensors that both have are equal, bit by bit")
    for name in unequal[:5]:
        one, two = first[name], second[name]
        by = (
            f"{(one.double() - two.double()).abs().max():.1e}"
            if one.shape == two.shape
            else f"{one.shape}, {two.shape}"
        )
        print(f"    {name}: {by}")
    return not unequal


def verify(checkpoint: Path, folder: Path, ema: bool = False, image: Path | None = None) -> bool:
    """Check a folder against the checkpoint that it was converted from: what was saved, what it computes, what it sees.

    Returns:
        whether all is equal.
    """
    picture = open_picture(image)
    model = load_folder(folder)
    source = Model(checkpoint, ema, model.config)
    state, _ = translate(source.tensors.items(), rules_for(model.config))
    saved = model.state_dict()
    lost = [name for name, tensor in saved.items() if name not in state or not torch.equal(tensor, state[name])]
    print(
        f"verified: {len(saved) - len(lost)} of {len(saved)} tensors of {folder} are those of {checkpoint}, bit by bit"
    )
    equal = report(source, Model(folder), picture)
    print_detections(folder, picture, "the drawn test picture" if image is None else str(image))
    return equal and not lost


@torch.no_grad()
def print_detections(folder: Path, picture: Image.Image, name: str, top: int = 10) -> None:
    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForObjectDetection.from_pretrained(folder).eval()
    inputs = processor(images=picture, return_tensors="pt")
    outputs = model(inputs["pixel_values"].to(model.dtype), inputs["pixel_mask"])
    size = [(picture.height, picture.width)]
    found = processor.post_process_object_detection(outputs, threshold=-1, target_sizes=size, top_k=top)[0]
    print(f"  the {top} best detections in {name}, {picture.width} x {picture.height}:")
    for score, label, box in zip(found["scores"], found["labels"].tolist(), found["boxes"].tolist(), strict=True):
        print(f"    {score:.3f}  {model.config.id2label[label]:20} {', '.join(f'{side:.0f}' for side in box)}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first", type=Path, help="folder of dino_hf, or .pth or .safetensors of another project")
    parser.add_argument("second", type=Path, help="the same")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights of checkpoints")
    parser.add_argument("--image", type=Path, help="picture to run on; otherwise one is drawn")
    options = parser.parse_args(arguments)
    try:
        models = [None, None]
        paths = options.first, options.second
        for index in sorted((0, 1), key=lambda index: paths[index].is_file()):  # folders know more of their settings
            config = next((model.config for model in models if model is not None), None)
            models[index] = Model(paths[index], options.ema, config if paths[index].is_file() else None)
        print(f"{paths[0]} and {paths[1]}:")
        equal = report(*models, open_picture(options.image))
    except (ConversionError, StrictDataclassError) as error:
        sys.exit(f"error: {error.args[0]}")
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
