"""Convert a DINO checkpoint of another project into a folder that `from_pretrained` loads, and back.

    dino-hf convert checkpoint0011_4scale.pth --output dino-r50-4scale --verify
    dino-hf convert dino-r50-4scale --output checkpoint.pth --to original

A published file is recognised, and gets its settings. Other settings that a file does not contain get the defaults of the project,
and are printed. `--published` and `--set` change them.
docs/checkpoints.md lists the published files.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers.utils import CONFIG_NAME

from ..common.console import make_console
from ..common.progress import ProgressBar
from ..common.regular_files import file_sha256
from ..common.text import first_line, printable
from ..model.configuration_dino_detr import DinoDetrConfig
from ..model.image_processing_dino_detr import DinoDetrImageProcessor
from ..model.modeling_dino_detr import DinoDetrForObjectDetection
from ..runtime.weights_digest import weights_digest
from .architecture import build_config, to_release_names
from .checkpoint_files import Checkpoint
from .class_names import class_space
from .convert_back import convert_back
from .errors import ConversionError
from .messages import say
from .options import HELP, PROJECT_NAMES, check_options, parse_setting
from .output_folder import scratch_beside
from .projects.project import Project, backbone_depths
from .projects.registry import PROJECTS, find_project
from .published_match import (
    Candidate,
    Match,
    check_offset_scale,
    check_positions,
    match_published,
    project_of_file,
    read_checkpoint,
)
from .published_row import COCO
from .release_names import rules_for
from .release_tensors import fill_label_rows
from .rules import UnknownName, translate
from .verify_conversion import open_picture, verify, verify_back


def convert(
    checkpoint: Path,
    output_dir: Path,
    *,
    source: str = "auto",
    ema: bool = False,
    published: str | None = None,
    chosen: dict[str, Any] | None = None,
    size: tuple[int, int] | None = None,
    label_names: Path | None = None,
    force: bool = False,
    assume_positions: bool = False,
) -> DinoDetrForObjectDetection:
    """Convert a file, and write the folder completely or not at all.

    Args:
        checkpoint: `.pth` or `.safetensors`.
        output_dir: new or empty folder.
        source: name of the project, or "auto" to recognise it by the tensors.
        ema: convert the averaged weights.
        published: title of the published checkpoint that this file is. It gives the settings and the AP. "none": it is none. By
            default, the file is recognised by its SHA-256 or its name.
        chosen: fields of the configuration that no tensor shows.
        size: shortest edge, and limit of the longest edge, of images at evaluation, in pixels.
        label_names: file with the names of the classes.
        force: replace an output folder that holds only a model.
        assume_positions: use the project's defaults if the position settings are unknown. Wrong positions give wrong boxes.
    Raises:
        ConversionError: the file cannot be converted, its position settings are unknown, or the folder cannot be written.
    """
    if size is not None and not 0 < size[0] <= size[1]:
        raise ConversionError(
            f"The image size is {size[0]} to {size[1]}, but must be a shortest edge and a longest edge that is not shorter."
        )
    named = None if source == "auto" else find_project(source)
    with scratch_beside(output_dir, force, [path for path in (checkpoint, label_names) if path]) as scratch:
        loaded, candidate = read_checkpoint(checkpoint, ema, published)
        project = named or project_of_file(candidate, loaded.tensors) or next(iter(PROJECTS.values()))
        try:
            model, processor = _convert(loaded, project, candidate, chosen or {}, size, label_names, assume_positions)
        except ConversionError:
            raise
        except (
            *(TypeError, IndexError, KeyError, ValueError, RuntimeError, ArithmeticError),
            StrictDataclassError,
        ) as error:
            # a forged file can raise any of these
            raise ConversionError(f"{checkpoint} cannot be converted: {first_line(error)}") from error
        model.save_pretrained(scratch)
        processor.save_pretrained(scratch)
        _use_mode_of_settings(scratch)
    say(f"  written to {output_dir}")
    return model


def _use_mode_of_settings(folder: Path) -> None:
    """Give the weights the permissions of the configuration. safetensors writes files that only their owner can read."""
    mode = (folder / CONFIG_NAME).stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def _convert(
    loaded: Checkpoint,
    project: Project,
    candidate: Candidate | None,
    chosen: dict[str, Any],
    size: tuple[int, int] | None,
    label_names: Path | None,
    assume_positions: bool,
) -> tuple[DinoDetrForObjectDetection, DinoDetrImageProcessor]:
    tensors, dropped = to_release_names(loaded, project)
    has = "with" if loaded.settings else "without"
    say(f"{loaded.path}: {len(loaded.tensors)} tensors of {project.name}, {has} the settings of its training")
    if loaded.note:
        say(f"  {loaded.note}")
    from_file = project.fields_from_settings(loaded.settings)
    likely = candidate.row.settings if candidate else {}
    config, assumed = build_config(tensors, project, from_file, likely | chosen)
    match = match_published(candidate, project, config, from_file)
    if candidate is not None:
        config, assumed = build_config(tensors, project, from_file, (match.settings if match else {}) | chosen)
    if match is None and not assume_positions:
        check_positions(loaded.path, project, from_file | chosen)
    check_offset_scale(loaded.path, config, chosen, {} if match or assume_positions else assumed)
    _print_architecture(config)
    id2label, category_ids, origin = class_space(
        config.num_labels, loaded.class_names, label_names, project.data_set(loaded.settings)
    )
    say(f"  class names: {origin}")
    if id2label is not None:
        config.set_classes(id2label, category_ids)
    processor, assumed_of_images = _make_processor(loaded, project, match, size)
    assumed |= assumed_of_images
    if assumed:
        advice = "" if match else " (change them by --published, --set and --image-size)"
        values = ", ".join(f"{name}={value}" for name, value in assumed.items())
        say(f"  not in the file, set to the defaults of {project.name}{advice}: {values}")
    tensors, num_added = fill_label_rows(tensors, config.num_labels)
    if num_added:
        say(
            f"  the label embedding had {num_added} rows fewer than classes; the mean fills them (used in training only)"
        )
    config.provenance = _provenance(loaded, project, match, assumed)
    model, num_renamed, more_dropped = _build_model(config, tensors)
    # the model card uses the digest to notice changed weights
    config.provenance["converted_from"]["weights"] = weights_digest(model)
    dropped += more_dropped
    say(f"  read {len(loaded.tensors)}, renamed into {num_renamed}, dropped {sum(dropped.values())}")
    for reason, number in dropped.items():
        say(f"    {number}: {reason}")
    return model, processor


def _make_processor(
    loaded: Checkpoint, project: Project, match: Match | None, size: tuple[int, int] | None
) -> tuple[DinoDetrImageProcessor, dict[str, Any]]:
    """Make the image processor.

    Args:
        size: shortest edge, and limit of the longest edge, from the user.
    Returns:
        the image processor, and its settings that come neither from the file, a published checkpoint nor the user.
    """
    from_file = project.processor_settings(loaded.settings)
    settings = {**project.processor, **(match.row.processor if match else {}), **from_file}
    if size:
        if settings.get("canvas_value") is not None and size[0] != size[1]:
            raise ConversionError(
                f"This model gets its images on a square canvas, so {size[0]} and {size[1]} of --image-size must be equal."
            )
        settings |= {"size": {"shortest_edge": size[0], "longest_edge": size[1]}}
    processor, assumed = DinoDetrImageProcessor(**settings), {}
    if "size" not in settings:
        assumed["image size"] = f"{processor.size['shortest_edge']} to {processor.size['longest_edge']}"
    if not (match or "nms" in from_file) and (nms := project.processor.get("nms")):
        assumed["detections"] = f"{nms['method']} NMS {nms['iou_threshold']:g}"
    return processor, assumed


def _provenance(checkpoint: Checkpoint, project: Project, match: Match | None, assumed: dict[str, Any]) -> dict:
    """Origin of the weights, for the model card."""
    converted_from = {
        "project": project.name,
        "file": checkpoint.path.name,
        "sha256": file_sha256(checkpoint.path),
        "assumed": assumed,
    }
    if match is None or not match.is_same:
        return {"converted_from": converted_from}
    row = match.row
    converted_from |= {"published": row.title, "published_ap": row.ap, "url": row.url}
    if row.ap_data != COCO:
        converted_from["published_ap_data"] = row.ap_data
    return {"converted_from": converted_from} | ({"license": row.license} if row.license else {})


def _build_model(config: DinoDetrConfig, tensors: dict[str, Tensor]) -> tuple[DinoDetrForObjectDetection, int, Counter]:
    """Build the model.

    Args:
        tensors: by the release's names.
    Returns:
        the model, the number of its tensors, and the number of dropped tensors by reason.
    """
    try:
        with ProgressBar(make_console(stderr=True)) as bar:
            items = bar.follow(tensors.items(), "converting tensors", len(tensors))
            state, dropped = translate(items, rules_for(config))
    except UnknownName as error:
        raise ConversionError(
            f"The checkpoint has the tensor {error.name!r} (release's name), which this DINO does not have: it is a variant."
        ) from error
    if not config.num_denoising and state.pop("model.denoising.label_embedding.weight", None) is not None:
        dropped["label embedding of denoising, which is off"] += 1
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    _check_shapes(config, state)
    model = DinoDetrForObjectDetection(config).to(dtypes.pop() if len(dtypes) == 1 else torch.float32)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ConversionError(
            f"The converted tensors do not fit the model: {' '.join(str(error).split())[:300]}"
        ) from error
    return model.eval(), len(state), dropped


def _check_shapes(config: DinoDetrConfig, state: dict[str, Tensor]) -> None:
    """Compare shapes before the model is allocated, because sizes in a forged file can be huge.

    Raises:
        ConversionError: a tensor does not fit.
    """
    with torch.device("meta"):
        expected = DinoDetrForObjectDetection(config).state_dict()
    for name, tensor in state.items():
        if name in expected and tensor.shape != expected[name].shape:
            raise ConversionError(
                f"The converted tensors do not fit the model: {name} has the shape {tuple(tensor.shape)}, not "
                f"{tuple(expected[name].shape)}."
            )


def _print_architecture(config: DinoDetrConfig) -> None:
    backbone = config.backbone_config
    heads = "one head for all" if config.share_decoder_heads else "a head for each"
    say(
        f"  {backbone.model_type} {backbone_depths(backbone)}, {config.num_feature_levels} levels, {config.num_queries} queries, "
        f"{config.num_labels} classes, {heads} of {config.decoder_layers} decoder layers, "
        f"{config.num_labels + config.num_extra_label_embeddings} label rows"
    )


# -- command line


def run(
    checkpoint: Path,
    output: Path,
    *,
    source: str = "auto",
    to: str | None = None,
    ema: bool = False,
    published: str | None = None,
    label_names: Path | None = None,
    image_size: tuple[int, int] | None = None,
    settings: list[str] | None = None,
    force: bool = False,
    verify_result: bool = False,
    image: Path | None = None,
) -> None:
    """Convert in either direction, as the command line does. The arguments are its options.

    Raises:
        ValueError: an option is wrong, the conversion failed, or the verification found a difference.
    """
    chosen = dict(parse_setting(text) for text in settings or [])
    if image:
        open_picture(image)  # raises before any work
    if to:
        lines = convert_back(checkpoint, to, output, force)
        say(f"{output} written for {to}; its configuration needs:", *lines, sep="\n  ")
        is_equal = not verify_result or verify_back(checkpoint, output, image)
    else:
        convert(
            *(checkpoint, output),
            source=source,
            ema=ema,
            published=published,
            chosen=chosen,
            size=image_size,
            label_names=label_names,
            force=force,
        )
        is_equal = not verify_result or verify(checkpoint, output, ema, image, published=published)
    if not is_equal:
        raise ConversionError("The result does not compute the same as its source (see above).")


def _parse(arguments: list[str] | None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Convert a DINO checkpoint of another project, or convert it back.")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help=".pth or .safetensors file; with --to, a folder of dino_hf"
    )
    parser.add_argument("--output", type=Path, required=True, help=HELP["output"])
    parser.add_argument("--source", choices=["auto", *PROJECT_NAMES], default="auto", help=HELP["source"])
    parser.add_argument("--to", choices=PROJECT_NAMES, help=HELP["to"])
    parser.add_argument("--ema", action="store_true", help=HELP["ema"])
    parser.add_argument("--published", metavar="PROJECT/NAME", help=HELP["published"])
    parser.add_argument("--label-names", type=Path, help=HELP["label_names"])
    parser.add_argument("--image-size", type=int, nargs=2, metavar=("SHORTEST", "LONGEST"), help=HELP["image_size"])
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help=HELP["set"])
    parser.add_argument("--force", action="store_true", help=HELP["force"])
    parser.add_argument("--verify", action="store_true", help=HELP["verify"])
    parser.add_argument("--image", type=Path, help=HELP["image"])
    options = vars(parser.parse_args(arguments))
    try:
        check_options(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: list[str] | None = None) -> None:
    """The script convert_checkpoint.py."""
    options = _parse(arguments)
    settings, verify_result = options.pop("set"), options.pop("verify")
    try:
        run(**options, settings=settings, verify_result=verify_result)
    except ValueError as error:
        sys.exit(f"error: {printable(str(error), 4000)}")
