"""Compare two DINO models number by number, stage by stage. Each is a dino_hf folder or a checkpoint of another project.

    python convert_scripts/verify_conversion.py checkpoint0011_4scale.pth dino-r50-4scale

The first model runs on two pictures of different sizes: a folder runs in dino_hf, a checkpoint in the independent implementation of
source_arithmetic.py. Then that implementation computes each stage and layer again, with the tensors and settings of the second
model, from the inputs of the first. So differences do not accumulate, and each shows the stage that causes it.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from ..common.images import read_image
from ..common.regular_files import check_model_folder
from ..common.scenes import draw_scene
from ..common.text import first_line, printable
from ..model.configuration_dino_detr import DinoDetrConfig
from ..model.image_processing_dino_detr import DinoDetrImageProcessor
from ..model.modeling_dino_detr import DinoDetrForObjectDetection
from .architecture import build_config, to_release_names
from .convert_back import load_folder, to_release
from .errors import ConversionError
from .messages import say
from .projects.registry import PROJECTS
from .published_match import match_published, project_of_file, read_checkpoint
from .release_names import rules_for
from .release_tensors import cut_label_rows, fill_label_rows, separate_heads
from .rules import translate
from .source_arithmetic import SourceArithmetic, Trace

# Largest differences that count as equal in float32. Values of a backbone reach hundreds, so differences are relative to the
# largest value of a stage. Boxes lie in [0, 1]: 2e-5 is a fortieth of a pixel in an image of 1333 pixels.
RELATIVE, BOXES = 1e-4, 2e-5
SIZES = ((203, 317), (187, 270))  # (height, width) of the two pictures; no stride and no window divides them


class Model:
    """One side of a comparison.

    Attributes:
        config: its configuration.
        tensors: by the release's names.
        run: function that runs it on pixels (B, 3, h, w) and a mask (B, h, w), and returns a `Trace`.
    """

    def __init__(
        self, path: Path, ema: bool = False, fallback: DinoDetrConfig | None = None, published: str | None = None
    ):
        """
        Args:
            path: folder of dino_hf, or checkpoint file.
            ema: read the averaged weights of a checkpoint.
            fallback: configuration for settings that a checkpoint does not contain. By default, the settings of the published
                checkpoint in the file, or else the project's defaults.
            published: title of the published checkpoint in the file, "none", or None to recognise it.
        """
        if path.is_dir():
            model = load_folder(path).float()
            self.config = model.config
            self.tensors = separate_heads(to_release(model.state_dict(), model.config), model.config)
            self.run = lambda *inputs: trace_of(model, *inputs)
            return
        checkpoint, candidate = read_checkpoint(path, ema, published)
        project = project_of_file(candidate, checkpoint.tensors) or next(iter(PROJECTS.values()))
        self.tensors, _ = to_release_names(checkpoint, project)
        from_file = project.fields_from_settings(checkpoint.settings)
        values = {} if fallback is None else fallback.to_dict()
        self.config, _ = build_config(self.tensors, project, from_file, {}, values)
        if fallback is None and (match := match_published(candidate, project, self.config, from_file)):
            self.config, _ = build_config(self.tensors, project, from_file, match.settings)
        self.tensors, _ = fill_label_rows(self.tensors, self.config.num_labels)
        self.run = self.arithmetic().run

    def used_tensors(self) -> dict[str, Tensor]:
        """Tensors without unused rows of the label embedding, whose number differs between projects."""
        if "label_enc.weight" not in self.tensors:  # trained without denoising
            return self.tensors
        return cut_label_rows(self.tensors, self.config.num_labels)

    def arithmetic(self) -> SourceArithmetic:
        """The independent implementation with these tensors and settings."""
        return SourceArithmetic(self.tensors, self.config)


def trace_of(model: DinoDetrForObjectDetection, pixels: Tensor, pixel_mask: Tensor) -> Trace:
    """Run a model, and record the inputs and outputs of its stages by forward hooks."""
    features, maps, padding, decoder_inputs = [], [], [], []

    def record_backbone(module: nn.Module, inputs: tuple, output) -> None:
        features.extend(output.feature_maps)

    def record_levels(module: nn.Module, inputs: tuple, output: tuple) -> None:
        maps.extend(output[0])
        padding.extend(output[1])

    detector = model.model
    handles = [
        detector.backbone.model.register_forward_hook(record_backbone),
        detector.backbone.register_forward_hook(record_levels),
        *(
            layer.register_forward_pre_hook(lambda _, args: decoder_inputs.append(args))
            for layer in detector.decoder.layers
        ),
    ]
    try:
        outputs = model(pixels, pixel_mask, output_hidden_states=True)
    finally:
        for handle in handles:
            handle.remove()
    return Trace(
        features,
        maps,
        [~mask for mask in padding],
        list(outputs.encoder_hidden_states),
        outputs.encoder_last_hidden_state,
        outputs.enc_topk_logits,
        outputs.enc_topk_bboxes,
        list(outputs.decoder_hidden_states),
        [args[2] for args in decoder_inputs],
        list(outputs.intermediate_logits.unbind(1)),
        list(outputs.intermediate_pred_boxes.unbind(1)),
    )


def differences(
    first: Trace, second: SourceArithmetic, pixels: Tensor, pixel_mask: Tensor
) -> Iterator[tuple[str, float, float]]:
    """Compare the stages of two models.

    Yields:
        the name of each stage, its largest difference, and the largest difference that counts as equal.
    """

    def compare(name: str, a: Tensor, b: Tensor, limit: float | None = None) -> tuple[str, float, float]:
        if a.shape != b.shape:
            raise ConversionError(f"{name}: the shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared.")
        limit = RELATIVE * max(1, a.abs().max().item()) if limit is None else limit
        return name, (a - b).abs().max().item(), limit

    def same_number(name: str, a: int, b: int) -> None:
        if a != b:
            raise ConversionError(f"The models have {a} and {b} {name}; they cannot be compared.")

    features = second.backbone(pixels)
    same_number("maps of the backbone", len(first.features), len(features))
    for number, (a, b) in enumerate(zip(first.features, features, strict=True), 1):
        yield compare(f"backbone, map {number}", a, b)
    maps = second.neck(first.features)
    same_number("levels", len(first.maps), len(maps))
    for number, (a, b) in enumerate(zip(first.maps, maps, strict=True), 1):
        yield compare(f"neck, level {number}", a, b)
    masks = first.masks
    for number, (a, b) in enumerate(zip(masks, second.masks(pixel_mask, maps), strict=True), 1):
        yield compare(f"padding, level {number}", a.float(), b.float())

    inside = torch.cat([mask.flatten(1) for mask in masks], 1)  # (B, S); values of padding do not matter
    tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in first.maps], 1)
    yield compare("encoder, input", first.tokens[0], tokens)
    positions = second.positions(masks)
    same_number("encoder layers", len(first.tokens) - 1, second.num_layers("encoder"))
    for layer in range(len(first.tokens) - 1):
        output = second.encoder_layer(layer, first.tokens[layer], positions, masks)
        yield compare(f"encoder, layer {layer + 1}", first.tokens[layer + 1][inside], output[inside])

    memory = first.memory
    yield compare("encoder, output", memory[inside], second.fuse(first.tokens)[inside])
    logits, boxes = second.proposals(memory, masks)
    same_number("classes", first.proposal_logits.shape[-1], logits.shape[-1])
    # A proposal does not record its token: find the token with the closest logits and, among equal ones, the closest box.
    distance = torch.cdist(first.proposal_logits, logits, p=torch.inf)  # (B, Q, S)
    distance += 0.01 * torch.cdist(first.proposal_boxes, boxes, p=torch.inf)
    place = distance.argmin(-1)[..., None]  # (B, Q, 1)
    yield compare("query selection, logits", first.proposal_logits, logits.take_along_dim(place, 1))
    yield compare("query selection, boxes", first.proposal_boxes, boxes.take_along_dim(place, 1), BOXES)
    scores = first.proposal_logits.amax(-1)  # (B, Q)
    best = logits.amax(-1).topk(scores.shape[1], dim=1).values
    yield compare("query selection, scores", scores.sort(dim=1, descending=True).values, best)
    rises = scores.diff(dim=1).clamp(min=0)  # scores must descend, except for near ties
    yield (
        "query selection, order",
        rises.max().item() if rises.numel() else 0.0,
        RELATIVE * max(1, scores.abs().max().item()),
    )

    yield compare("decoder, input", first.queries[0], second.content(first.references[0]))
    yield compare("decoder, first boxes", first.references[0], first.proposal_boxes, BOXES)
    same_number("decoder layers", len(first.logits), second.num_layers("decoder"))
    for layer, references in enumerate(first.references):
        output = second.decoder_layer(layer, first.queries[layer], references, memory, masks)
        name = f"decoder, layer {layer + 1}"
        yield compare(name, first.queries[layer + 1], output[0])
        yield compare(f"{name}, logits", first.logits[layer], output[1])
        yield compare(f"{name}, boxes", first.boxes[layer], output[2], BOXES)
        if layer + 1 < len(first.references):
            yield compare(f"{name}, boxes for the next", first.references[layer + 1], output[3], BOXES)


def open_picture(image: Path | None) -> Image.Image:
    """Read a picture, or draw one for None.

    Raises:
        ConversionError: it cannot be read.
    """
    if image is None:
        return draw_scene(np.random.default_rng(0))[0].resize((640, 480))
    try:
        return read_image(image)
    except OSError as error:
        raise ConversionError(f"{image} cannot be read as a picture. {error}") from error


@torch.no_grad()
def report(first: Model, second: Model, picture: Image.Image) -> bool:
    """Print the differences of settings, tensors and stages.

    Returns:
        whether all tensors and stages are equal within their limits.
    """
    print_settings(first.config, second.config)
    same_tensors = print_tensors(first.used_tensors(), second.used_tensors())
    batch = [picture.resize((width, height)) for height, width in SIZES]
    inputs = DinoDetrImageProcessor(do_resize=False)(images=batch, return_tensors="pt")
    inputs = inputs["pixel_values"], inputs["pixel_mask"].bool()
    say(f"  {'stage':40} {'difference':>10}  {'equal up to':>11}")
    equal = True
    for name, difference, limit in differences(first.run(*inputs), second.arithmetic(), *inputs):
        is_equal = difference <= limit  # False for NaN
        equal &= is_equal
        say(f"  {name:40} {difference:10.1e}  {limit:11.1e}{'' if is_equal else '  DIFFERENT'}")
    if not equal:
        say("  the two do NOT compute the same")
    elif not same_tensors:
        say("  the two compute the same in evaluation, but tensors differ")
    else:
        say("  the two compute the same")
    return equal and same_tensors


def print_settings(first: DinoDetrConfig, second: DinoDetrConfig) -> None:
    """Print settings that differ, except names and records."""
    skipped = {
        "provenance",
        "id2label",
        "label2id",
        "category_ids",
        "auto_map",
        "architectures",
        "transformers_version",
    }
    one, two = first.to_dict(), second.to_dict()
    for name in sorted((set(one) | set(two)) - skipped):
        if one.get(name) != two.get(name) and not name.startswith("_") and name not in ("dtype", "backbone_config"):
            say(f"  setting {name}: {one.get(name)!r} and {two.get(name)!r}")


def print_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Print the number of equal tensors, by the release's names.

    Returns:
        whether all tensors that both have are equal.
    """
    shared = sorted(set(first) & set(second))
    unequal = [name for name in shared if not torch.equal(first[name], second[name])]
    say(f"  {len(shared) - len(unequal)} of {len(shared)} tensors that both have are equal, bit by bit")
    for name in unequal[:5]:
        one, two = first[name], second[name]
        is_same_shape = one.shape == two.shape
        difference = (
            f"{(one.double() - two.double()).abs().max():.1e}" if is_same_shape else f"{one.shape}, {two.shape}"
        )
        say(f"    {name}: {difference}")
    return not unequal


def verify(
    checkpoint: Path,
    folder: Path,
    ema: bool = False,
    image: Path | None = None,
    show_detections: bool = True,
    published: str | None = None,
) -> bool:
    """Compare a folder with its source checkpoint: tensors, computation, image processor. Print some detections.

    Args:
        ema, published: as in the conversion.
        image: picture to compare on. None: a drawn one.
    Returns:
        whether all are equal.
    """
    picture = open_picture(image)
    model = load_folder(folder)
    source = Model(checkpoint, ema, model.config, published)
    state, _ = translate(source.tensors.items(), rules_for(model.config))
    saved = model.state_dict()
    lost = [name for name, tensor in saved.items() if name not in state or not torch.equal(tensor, state[name])]
    say(
        f"verified: {len(saved) - len(lost)} of {len(saved)} tensors of {folder} are bit for bit equal to the tensors of "
        f"{checkpoint}"
    )
    equal = report(Model(folder), source, picture) and check_processor(folder)
    if show_detections:
        print_detections(folder, picture, "the drawn test picture" if image is None else str(image))
    return equal and not lost


def verify_back(folder: Path, checkpoint: Path, image: Path | None = None) -> bool:
    """Compare a checkpoint of another project with its source folder.

    Returns:
        whether they are equal.
    """
    model = Model(folder)
    say(f"verified: {folder} and {checkpoint}")
    return report(model, Model(checkpoint, fallback=model.config), open_picture(image))


def load_processor(folder: Path):
    """Load the image processor of a folder.

    Raises:
        ConversionError: it cannot be loaded.
    """
    try:
        check_model_folder(folder)
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConversionError(
            f"{folder} has no image processor that can be loaded: {first_line(error, 200)}"
        ) from error


def check_processor(folder: Path) -> bool:
    """Whether the image processor normalises pixels as all projects do. The size is not compared."""
    processor, usual = load_processor(folder), DinoDetrImageProcessor()
    names = ("image_mean", "image_std", "rescale_factor", "do_normalize", "do_rescale")
    others = {name: getattr(processor, name) for name in names if getattr(processor, name) != getattr(usual, name)}
    if others:
        expected = {name: getattr(usual, name) for name in others}
        say(f"  the image processor has {others}; the projects train with {expected}")
    return not others


@torch.no_grad()
def print_detections(folder: Path, picture: Image.Image, name: str, top: int = 10) -> None:
    """Print the best detections of a converted model in a picture with this name."""
    processor = load_processor(folder)
    model = AutoModelForObjectDetection.from_pretrained(folder, trust_remote_code=False).eval()
    inputs = processor(images=picture, return_tensors="pt")
    outputs = model(inputs["pixel_values"].to(model.dtype), inputs.get("pixel_mask"))
    size = [(picture.height, picture.width)]
    found = processor.post_process_object_detection(outputs, threshold=-1, target_sizes=size, top_k=top)[0]
    say(f"  the {top} best detections in {name}, {picture.width} x {picture.height}:")
    for score, label, box in zip(found["scores"], found["labels"].tolist(), found["boxes"].tolist(), strict=True):
        say(f"    {score:.3f}  {model.config.id2label[label]:20} {', '.join(f'{side:.0f}' for side in box)}")


def main(arguments: list[str] | None = None) -> None:
    """The script verify_conversion.py."""
    parser = argparse.ArgumentParser(description="Compare two DINO models number by number, stage by stage.")
    parser.add_argument("first", type=Path, help="folder of dino_hf, or .pth or .safetensors file of another project")
    parser.add_argument("second", type=Path, help="the same")
    parser.add_argument("--ema", action="store_true", help="Compare the averaged weights of checkpoints.")
    parser.add_argument("--image", type=Path, help="Picture to run on; by default, a drawn one.")
    options = parser.parse_args(arguments)
    try:
        # A folder comes first: it runs in dino_hf, and has all settings.
        first, second = sorted((options.first, options.second), key=lambda path: not path.is_dir())
        model = Model(first, options.ema)
        say(f"{first} and {second}:")
        other = Model(second, options.ema, model.config if first.is_dir() else None)
        is_equal = report(model, other, open_picture(options.image))
    except ConversionError as error:
        sys.exit(f"error: {printable(str(error), 4000)}")
    sys.exit(0 if is_equal else 1)
