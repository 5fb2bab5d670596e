"""`dino-hf train`: fine-tune a detector."""

from pathlib import Path
from typing import Annotated

import typer

from .command_errors import Debug, one_sentence_errors
from .options import AUGMENTATION, DATA, AllowOutside, BoxFormat, Mirror, TrustBoxes

# For `app.command`. The 150 fields of recipes and TrainingArguments are accepted without being parameters of `train`.
CONTEXT = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "token_normalize_func": lambda name: name.replace("_", "-"),  # --batch_size is --batch-size, as in HfArgumentParser
}
_RUN = "Run"


def train(
    context: typer.Context,
    dataset: Annotated[
        str,
        typer.Argument(
            help="Folder, file or Hub id: COCO, YOLO, Pascal VOC or Hugging Face format.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Detector to start from: folder, name from `dino-hf models`, or Hub id.",
            show_default="untrained, on a pretrained backbone",
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="Backbone instead of --model.",
            show_default="microsoft/resnet-50",
        ),
    ] = None,
    num_queries: Annotated[
        int | None,
        typer.Option(
            help="Number of queries.",
            show_default="the model's",
        ),
    ] = None,
    freeze: Annotated[
        list[str] | None,
        typer.Option(
            help="Parts that are not trained: backbone, backbone.stage1, encoder, ..., or a regular expression. Separate them by "
            "commas, or repeat the option.",
        ),
    ] = None,
    lora: Annotated[
        str | None,
        typer.Option(
            help="Train only LoRA adapters of this rank, such as 16, and class heads; or settings: r=16,lora_alpha=32.",
        ),
    ] = None,
    keep_classes: Annotated[
        bool,
        typer.Option("--keep-classes", help="Also keep the other classes of --model."),
    ] = False,
    old_data: Annotated[
        str | None,
        typer.Option(help="Data to measure kept classes on.", show_default=False),
    ] = None,
    augmentation: Annotated[
        str | None,
        typer.Option(help=AUGMENTATION, show_default=False),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="finetune, from-backbone, scratch, paper-12ep, paper-24ep, paper-36ep, better-hyper, co-dino, align-detr or "
            "stable-dino.",
            show_default="by the start: finetune, from-backbone or scratch",
        ),
    ] = None,
    output_dir: Annotated[Path, typer.Option(help="New folder, or the folder of the run to resume.")] = Path(
        "outputs/train"
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --output-dir.", rich_help_panel=_RUN)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the training plan and stop.", rich_help_panel=_RUN)
    ] = False,
    batch_size: Annotated[
        str,
        typer.Option(help="Images per batch and process. auto: as many as fit.", rich_help_panel=_RUN),
    ] = "auto",
    report_to: Annotated[
        list[str] | None,
        typer.Option(
            help="tensorboard, wandb, trackio, none, ... Can be repeated.",
            show_default="tensorboard if installed",
            rich_help_panel=_RUN,
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed.", show_default="0", rich_help_panel=_RUN)] = None,
    tiles: Annotated[
        str | None,
        typer.Option(
            help="Cut larger images into tiles of this size, such as 640 or 640x480.",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ] = None,
    tile_overlap: Annotated[
        float | None,
        typer.Option(
            help="Overlap of neighbouring tiles, as a fraction of their side.",
            show_default="0.2",
            rich_help_panel=DATA,
        ),
    ] = None,
    empty_tiles: Annotated[
        float | None,
        typer.Option(
            help="Most tiles without boxes in an epoch, per tile with boxes.",
            show_default="1",
            rich_help_panel=DATA,
        ),
    ] = None,
    validation_fraction: Annotated[
        float | None,
        typer.Option(
            help="Share of images to hold out if there are no validation images.",
            show_default="0.2",
            rich_help_panel=DATA,
        ),
    ] = None,
    box_format: BoxFormat = None,
    allow_outside: AllowOutside = False,
    trust_boxes: TrustBoxes = False,
    on_bad_image: Annotated[
        str | None,
        typer.Option(
            help="skip or raise: leave unusable images out, or stop.",
            show_default="skip",
            rich_help_panel=DATA,
        ),
    ] = None,
    check_images: Annotated[
        bool,
        typer.Option(
            "--check-images",
            help="Decode all images before training.",
            rich_help_panel=DATA,
        ),
    ] = False,
    no_training_doctor: Annotated[
        bool,
        typer.Option(
            "--no-training-doctor",
            help="Do not log the training doctor's figures.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    mirror: Mirror = None,
    debug: Debug = False,
) -> None:
    """Fine-tune a detector. Writes its best weights, AP, curves and a model card.

    Every field of a recipe and of TrainingArguments is an option too: --num-train-epochs 20 --learning-rate 1e-4 --bf16.

    \b
    Example: dino-hf train my-data --model detrex/dino_r50_4scale_12ep --output-dir birds
    """
    with one_sentence_errors(debug):
        if dataset.startswith("-"):
            raise ValueError(f"The data set must come before {dataset}: dino-hf train DATASET {dataset} ...")
        if batch_size != "auto" and not batch_size.isdecimal():
            raise ValueError(f"--batch-size {batch_size} must be a number of images, or auto.")
        # Imported here, because they take seconds and `--help` does not need them.
        from ..run.settings import parse_settings
        from ..run.trained_parts import parse_lora, split_names
        from ..run.training_run import train

        train(
            dataset,
            model=model,
            backbone=backbone,
            num_queries=num_queries,
            freeze=None if freeze is None else [part for text in freeze for part in split_names(text)],
            lora=None if lora is None else parse_lora(lora),
            keep_classes=keep_classes or None,
            old_data=old_data,
            augmentation=augmentation,
            recipe=recipe,
            output_dir=output_dir,
            resume=resume,
            batch_size=batch_size if batch_size == "auto" else int(batch_size),
            report_to=report_to,
            seed=seed,
            tiles=tiles,
            tile_overlap=tile_overlap,
            empty_tiles=empty_tiles,
            validation_fraction=validation_fraction,
            box_format=box_format,
            allow_outside=allow_outside or None,
            trust_boxes=trust_boxes or None,
            on_bad_image=on_bad_image,
            check_images=check_images,
            training_doctor=False if no_training_doctor else None,
            dry_run=dry_run,
            **parse_settings(context.args),
        )
