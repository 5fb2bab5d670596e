"""`dino-hf train`: fine-tune a detector on anyone's data."""

from pathlib import Path
from typing import Annotated

import typer

from ..common.command_errors import Debug, one_sentence_errors

# For `app.command`: fields of recipes and of TrainingArguments, some 150, are no options of this function.
CONTEXT = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "token_normalize_func": lambda name: name.replace("_", "-"),  # as argparse has it for the fields
}
_RUN, _DATA = "Run", "Data"


def train(
    context: typer.Context,
    dataset: Annotated[
        str,
        typer.Argument(
            help="Folder, json, yaml, parquet file or Hub id: COCO, YOLO, Pascal VOC, Hugging Face.", show_default=False
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub id to start from; else R50.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="finetune, paper-12ep, paper-24ep, paper-36ep, better-hyper or scratch.", show_default="finetune"
        ),
    ] = None,
    output_dir: Annotated[Path, typer.Option(help="New folder, or the folder of a run to resume.")] = Path(
        "outputs/train"
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --output-dir.", rich_help_panel=_RUN)
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, and stop.", rich_help_panel=_RUN)] = False,
    batch_size: Annotated[
        str, typer.Option(help="Images of a batch in each process; auto: as many as fit.", rich_help_panel=_RUN)
    ] = "auto",
    report_to: Annotated[
        list[str] | None,
        typer.Option(
            help="tensorboard, wandb, trackio, none, ...; may be given more than once.",
            show_default="tensorboard if installed",
            rich_help_panel=_RUN,
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed.", show_default="0", rich_help_panel=_RUN)] = None,
    validation_fraction: Annotated[
        float | None,
        typer.Option(
            help="Share of images to hold out if there is no validation part.",
            show_default="0.2",
            rich_help_panel=_DATA,
        ),
    ] = None,
    box_format: Annotated[
        str | None,
        typer.Option(
            help="Layout of boxes, see dino-hf doctor.",
            show_default=False,
            rich_help_panel=_DATA,
        ),
    ] = None,
    allow_outside: Annotated[
        bool,
        typer.Option(
            "--allow-outside",
            help="Also read files outside of the data set's folder.",
            rich_help_panel=_DATA,
        ),
    ] = False,
    trust_boxes: Annotated[
        bool,
        typer.Option("--trust-boxes", help="Do not check the layout of the boxes.", rich_help_panel=_DATA),
    ] = False,
    on_bad_image: Annotated[
        str | None,
        typer.Option(
            help="skip: leave out unusable images; raise: stop.",
            show_default="skip",
            rich_help_panel=_DATA,
        ),
    ] = None,
    check_images: Annotated[
        bool,
        typer.Option(
            "--check-images",
            help="Decode all images first.",
            rich_help_panel=_DATA,
        ),
    ] = False,
    no_training_doctor: Annotated[
        bool,
        typer.Option("--no-training-doctor", help="Log fewer figures.", rich_help_panel=_RUN),
    ] = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a detector, and leave the best weights, their AP, curves and a model card.

    Any field of a recipe or of TrainingArguments is an option too: --num-train-epochs 20 --learning-rate 1e-4 --bf16.

    \b
    Example: dino-hf train my-data --model dino-r50-4scale --output-dir outputs/birds
    """
    with one_sentence_errors(debug):
        if dataset.startswith("-"):
            raise ValueError(f"The data set comes first, before {dataset}: dino-hf train DATASET {dataset} ...")
        if batch_size != "auto" and not batch_size.isdecimal():
            raise ValueError(f"--batch-size {batch_size} must be a number of images, or auto.")
        # Here: they take seconds, which --help need not wait for.
        from ..run.settings import parse_settings
        from ..run.training_run import train

        train(
            dataset,
            model=model,
            recipe=recipe,
            output_dir=output_dir,
            resume=resume,
            batch_size=batch_size if batch_size == "auto" else int(batch_size),
            report_to=report_to,
            seed=seed,
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
