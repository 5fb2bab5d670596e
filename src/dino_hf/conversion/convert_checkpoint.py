"""Turn a DINO checkpoint of the original release, detrex or mmdetection into a folder that `from_pretrained` loads, and back.

    python convert_scripts/convert_checkpoint.py --checkpoint checkpoint0011_4scale.pth --output dino-r50-4scale
    python convert_scripts/convert_checkpoint.py --checkpoint dino-r50-4scale --to original --output checkpoint.pth

Settings that a file does not have (files of detrex have only sizes) are set to the defaults of the project, and printed. Use
`--published` or `--set` to change them. docs/checkpoints.md has a command for every published file.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError

from ..common.console import make_console
from ..common.progress import ProgressBar
from ..common.text import printable
from ..model.image_processing_dino_detr import DinoDetrImageProcessor
from ..model.modeling_dino_detr import DinoDetrForObjectDetection
from ..runtime.weights_digest import weights_digest
from .architecture import (
    PROJECTS,
    build_config,
    filled_label_rows,
    recognise,
    rules_for,
    to_release_names,
)
from .checkpoint_files import Checkpoint, ConversionError, load_checkpoint, sha256
from .class_names import class_space
from .convert_back import convert_back
from .key_mapping import UnknownName, translate
from .output_folder import scratch_beside
from .published import BACKBONES, PUBLISHED, Published
from .training_settings import image_size, told_by_file
from .verify_conversion import open_picture, verify, verify_back


def convert(
    checkpoint: Path,
    output_dir: Path,
    *,
    source: str = "auto",
    ema: bool = False,
    published: str | None = None,
    chosen: dict | None = None,
    size: tuple[int, int] | None = None,
    label_names: Path | None = None,
    force: bool = False,
    ask: bool = False,
) -> DinoDetrForObjectDetection:
    """Convert one file and write the folder, completely or not at all.

    Args:
        checkpoint: `.pth` or `.safetensors`.
        output_dir: new or empty folder.
        source: "original", "detrex", "mmdet", or "auto" to recognise the project by its tensors.
        ema: take the averaged weights.
        published: title of this file in published.py, which has its settings and AP.
        chosen: fields of the configuration that the tensors do not determine.
        size: shortest edge and limit of the longest edge of images at evaluation.
        label_names: file with the names of the classes.
        force: replace an output folder that holds only a model.
        ask: refuse a file of detrex whose position settings are neither known nor chosen, instead of using the defaults of detrex.
    Raises:
        ConversionError: the message says what is wrong with the file or the folder.
    """
    row = find_published(published)
    if size is not None and not 0 < size[0] <= size[1]:
        raise ConversionError(
            f"The image size is {size[0]} to {size[1]}, but must be a shortest edge, and a longest at least as long."
        )
    with scratch_beside(output_dir, force, [path for path in (checkpoint, label_names) if path]) as scratch:
        loaded = load_checkpoint(checkpoint, ema)
        row = row or _known_by_name(loaded)
        if ask:
            _check_positions(loaded, source, row, chosen or {})
        try:
            model, processor = _convert(loaded, source, row, chosen or {}, size, label_names)
        except (ConversionError, StrictDataclassError):
            raise
        except (TypeError, IndexError, KeyError, ValueError, RuntimeError, ArithmeticError) as error:
            # a forged file can raise any of these
            raise ConversionError(
                f"{checkpoint} cannot be converted: {(str(error) or type(error).__name__).splitlines()[0][:300]}"
            ) from error
        model.save_pretrained(scratch)
        processor.save_pretrained(scratch)
    print(f"  written to {output_dir}")
    return model


def _convert(
    loaded: Checkpoint,
    source: str,
    row: Published | None,
    chosen: dict,
    size: tuple[int, int] | None,
    label_names: Path | None,
) -> tuple[DinoDetrForObjectDetection, DinoDetrImageProcessor]:
    project = source if source != "auto" else recognise(loaded.tensors) or "original"
    tensors, dropped = to_release_names(loaded, project)
    settings = "with" if loaded.settings else "without"
    print(f"{loaded.path}: {len(loaded.tensors)} tensors of {project}, {settings} the settings of its training")
    told = told_by_file(project, loaded.settings)
    settings = dict(row.settings) if row else {}
    if others := {name: told[name] for name in settings if name in told and told[name] != settings[name]}:
        raise ConversionError(f"The file is not {row.title}, which has {settings}: it says {others}; {_ANOTHER}.")
    config, assumed = build_config(tensors, project, told, {**settings, **chosen})
    check_published(row, project, config)
    print_architecture(config)
    id2label, category_ids, origin = class_space(
        config.num_labels, loaded.class_names, label_names, loaded.settings.get("dataset_file")
    )
    print(f"  class names: {origin}")
    if id2label is not None:
        config.set_classes(id2label, category_ids)
    size_told = {"shortest_edge": size[0], "longest_edge": size[1]} if size else image_size(project, loaded.settings)
    processor = DinoDetrImageProcessor(size=size_told) if size_told else DinoDetrImageProcessor()
    if not size_told:
        assumed |= {"image size": f"{processor.size['shortest_edge']} to {processor.size['longest_edge']}"}
    if assumed:
        otherwise = "" if row else " (--published, --set and --image-size say otherwise)"
        values = ", ".join(f"{name}={value}" for name, value in assumed.items())
        print(f"  not in the file, taken to be as {project} publishes it{otherwise}: {values}")
    tensors, num_filled = filled_label_rows(tensors, config.num_labels)
    if num_filled:
        print(
            f"  the label embedding had {num_filled} rows fewer than classes; they were filled up with the mean (training only)"
        )
    config.provenance = provenance(loaded, project, row, assumed)
    model, renamed, more = build_model(config, tensors)
    config.provenance["converted_from"]["weights"] = weights_digest(
        model
    )  # the model card notices changed weights by it
    dropped += more
    print(f"  read {len(loaded.tensors)}, renamed into {renamed}, dropped {sum(dropped.values())}")
    for reason, number in dropped.items():
        print(f"    {number}: {reason}")
    return model, processor


# Advice for a file that --published, or its name, takes for another published file.
_ANOTHER = "leave --published out, and do not call it as a published file"
_POSITIONS = ("position_temperature", "position_offset")


def _known_by_name(loaded: Checkpoint) -> Published | None:
    """The published checkpoint of detrex that has the name of this file. Other projects save their settings in the file."""
    if recognise(loaded.tensors) != "detrex":
        return None
    return next((row for row in PUBLISHED if row.project == "detrex" and row.file == loaded.path.name), None)


def _check_positions(loaded: Checkpoint, source: str, row: Published | None, chosen: dict) -> None:
    """
    Raises:
        ConversionError: the file is of detrex, which saves no settings, and trains with two kinds of positions.
    """
    project = source if source != "auto" else recognise(loaded.tensors)
    if project == "detrex" and row is None and not all(name in chosen for name in _POSITIONS):
        raise ConversionError(
            f"{loaded.path} is of detrex and does not tell its position settings, and wrong ones give wrong boxes: name the "
            "published checkpoint by --published, or take them from its configuration: --set position_temperature=10000 --set "
            "position_offset=-0.5 for detrex's default, --set position_temperature=20 --set position_offset=0 for the release's."
        )


def provenance(checkpoint: Checkpoint, project: str, row: Published | None, assumed: dict) -> dict:
    """Origin of the weights, for the model card."""
    converted_from = {
        "project": project,
        "file": checkpoint.path.name,
        "sha256": sha256(checkpoint.path),
        "assumed": assumed,
    }
    if row is None:
        return {"converted_from": converted_from}
    converted_from |= {"published": row.title, "published_ap": row.ap, "url": row.url}
    return {"converted_from": converted_from} | ({"license": row.license} if row.license else {})


def build_model(config, tensors) -> tuple[DinoDetrForObjectDetection, int, Counter]:
    """The model with these tensors (in names of the release), their number, and the number of dropped tensors by reason."""
    try:
        with ProgressBar(make_console(stderr=True)) as bar:
            items = bar.follow(tensors.items(), "converting tensors", len(tensors))
            state, dropped = translate(items, rules_for(config))
    except UnknownName as error:
        raise ConversionError(
            f"The checkpoint has the tensor {error.name!r} (release's name), which this DINO does not have: it is of a variant."
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


def _check_shapes(config, state: dict[str, torch.Tensor]) -> None:
    """Compare shapes before the model is allocated, because sizes in a forged file can be huge.

    Raises:
        ConversionError: a tensor does not fit.
    """
    with torch.device("meta"):
        wanted = DinoDetrForObjectDetection(config).state_dict()
    for name, tensor in state.items():
        if name in wanted and tensor.shape != wanted[name].shape:
            raise ConversionError(
                f"The converted tensors do not fit the model: {name} has the shape {tuple(tensor.shape)}, not "
                f"{tuple(wanted[name].shape)}."
            )


def find_published(title: str | None) -> Published | None:
    if title is None:
        return None
    found = next((row for row in PUBLISHED if row.title == title), None)
    if found is None:
        raise ConversionError(
            f"--published {title} is none of the checkpoints in docs/checkpoints.md: {', '.join(row.title for row in PUBLISHED)}."
        )
    return found


def check_published(row: Published | None, project: str, config) -> None:
    """Check that a file has the architecture of the published checkpoint that it is said to be."""
    if row is None:
        return
    if row.backbone not in BACKBONES:
        raise ConversionError(
            f"{row.title} has the backbone {row.backbone}, which is not supported; this is another file: {_ANOTHER}."
        )
    backbone = config.backbone_config
    is_swin = backbone.model_type == "swin"
    is_it = {
        "project": project,
        "backbone": backbone.model_type,
        "depths": list(backbone.depths),
        "width": backbone.embed_dim if is_swin else backbone.hidden_sizes[0],
        "window": backbone.window_size if is_swin else None,
        "levels": config.num_feature_levels,
        "queries": config.num_queries,
        "classes": config.num_labels,
    }
    should_be = row.architecture()
    if others := {name: value for name, value in is_it.items() if value != should_be[name]}:
        raise ConversionError(
            f"The file is not {row.title}, which has { ({name: should_be[name] for name in others}) }: it has {others}; {_ANOTHER}."
        )


def print_architecture(config) -> None:
    backbone = config.backbone_config
    print(
        f"  {backbone.model_type} {list(backbone.depths)}, {config.num_feature_levels} levels, {config.num_queries} queries, "
        f"{config.num_labels} classes, {'one head for all' if config.share_decoder_heads else 'a head for each'} of "
        f"{config.decoder_layers} decoder layers, {config.num_labels + config.num_extra_label_embeddings} label rows"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def setting(text: str) -> tuple[str, object]:
    """NAME=VALUE, the value in JSON or a plain string."""
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Turn a DINO checkpoint of another project into a folder that `from_pretrained` loads, and back."
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help=".pth or .safetensors; for --to, a folder of dino_hf"
    )
    parser.add_argument("--output", type=Path, required=True, help="new folder; for --to, a new .pth")
    parser.add_argument("--source", choices=["auto", *PROJECTS], default="auto", help="project that the file is of")
    parser.add_argument("--to", choices=PROJECTS, help="the way back: write a checkpoint for this project")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights")
    parser.add_argument("--published", metavar="PROJECT/NAME", help="which published checkpoint this is, if it is one")
    parser.add_argument("--label-names", type=Path, help="COCO json, json list or dictionary, or a name per line")
    parser.add_argument(
        "--image-size", type=int, nargs=2, metavar=("SHORTEST", "LONGEST"), help="of images at evaluation"
    )
    parser.add_argument(
        "--set", type=setting, action="append", default=[], metavar="FIELD=VALUE", help="a field of the configuration"
    )
    parser.add_argument("--force", action="store_true", help="replace the model that is in the output folder")
    parser.add_argument("--verify", action="store_true", help="compare the result with the source's own arithmetic")
    parser.add_argument("--image", type=Path, help="picture for --verify; otherwise one is drawn")
    options = parser.parse_args(arguments)
    if options.to:
        given = {"--source": options.source != "auto", "--ema": options.ema, "--published": options.published}
        given |= {"--label-names": options.label_names, "--image-size": options.image_size, "--set": options.set}
        if unused := [name for name, value in given.items() if value]:
            parser.error(f"{', '.join(unused)} mean nothing on the way back, --to {options.to}")
    if options.image and not options.verify:
        parser.error("--image is for --verify")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    try:
        if options.image:
            open_picture(options.image)  # before any work
        if options.to:
            lines = convert_back(options.checkpoint, options.to, options.output, options.force)
            print(f"{options.output} written for {options.to}; its configuration must say:", *lines, sep="\n  ")
            same = not options.verify or verify_back(options.checkpoint, options.output, options.image)
        else:
            convert(
                options.checkpoint,
                options.output,
                source=options.source,
                ema=options.ema,
                published=options.published,
                chosen=dict(options.set),
                size=options.image_size,
                label_names=options.label_names,
                force=options.force,
                ask=True,
            )
            same = not options.verify or verify(options.checkpoint, options.output, options.ema, options.image)
    except (ConversionError, StrictDataclassError) as error:
        sys.exit(f"error: {printable(str(error.args[0]), 4000)}")
    if not same:
        sys.exit("error: what was written does not compute what its source does (see above)")
