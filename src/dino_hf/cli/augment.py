"""`dino-hf augment`: a picture of what training sees."""

import os
from pathlib import Path
from typing import Annotated

import typer

from ..common.command_errors import Debug, one_sentence_errors
from ..common.output_folders import check_output_file, write_beside
from ..common.text import printable

_PICTURES = (".png", ".jpg", ".jpeg", ".pdf", ".svg")


def augment(
    context: typer.Context,
    dataset: Annotated[
        str,
        typer.Argument(
            help="Folder, file or Hub id of a data set, or the folder of a training run.", show_default=False
        ),
    ],
    recipe: Annotated[
        str | None, typer.Option(help="Training recipe.", show_default="finetune, or that of the run")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model that training starts from; it sets the sizes of images.", show_default=False),
    ] = None,
    output: Annotated[Path, typer.Option(help="Picture to write.")] = Path("augmented.png"),
    num_images: Annotated[int, typer.Option(min=1, max=100, help="Rows: images of the data.")] = 4,
    num_samples: Annotated[int, typer.Option(min=1, max=100, help="Columns: epochs.")] = 4,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Random seed of the augmentation and the choice of images.",
            show_default="0, or that of the run",
        ),
    ] = None,
    box_format: Annotated[
        str | None, typer.Option(help="Layout of the boxes, if the data do not state it.", show_default=False)
    ] = None,
    allow_outside: Annotated[
        bool,
        typer.Option("--allow-outside", help="Also read files outside of the data set's folder."),
    ] = False,
    trust_boxes: Annotated[bool, typer.Option("--trust-boxes", help="Do not check the layout of the boxes.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing picture.")] = False,
    debug: Debug = False,
) -> None:
    """Draw training images, each as annotated and as augmented in the first epochs.

    Options of `train` for augmentation are options here too: --short-sides 480 512 --longest-side 800.

    \b
    Example: dino-hf augment my-data --recipe finetune --output augmented.png
    """
    with one_sentence_errors(debug):
        if output.is_dir() or not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
            raise ValueError(
                f"{output} cannot be written; choose a file in a folder that exists, such as --output augmented.png."
            )
        if output.suffix.lower() not in _PICTURES:
            raise ValueError(
                f"{output} does not end in one of {', '.join(_PICTURES)}, the pictures that can be written; choose for example "
                f"--output {output.with_suffix('.png')}."
            )
        check_output_file(output, overwrite)
        from ..run.settings import parse_settings
        from ..run.training_view import view_training
        from .augmentation_grid import save_augmentation_grid

        reading = {"box_format": box_format, "allow_outside": allow_outside, "trust_boxes": trust_boxes}
        view = view_training(dataset, recipe, model, seed, parse_settings(context.args), **reading)
        with write_beside(output) as path:
            save_augmentation_grid(
                path, view.data, view.augmentation, num_images, num_samples, view.seed, view.image_processor
            )
        print(printable(f"Look at {output}."))
