"""`dino-hf augment`: draw training images as the model sees them."""

import os
from pathlib import Path
from typing import Annotated

import typer

from ..common.output_folders import check_output_file, replace_file
from ..common.text import printable
from .command_errors import Debug, one_sentence_errors
from .options import AUGMENTATION, AllowOutside, BoxFormat, TrustBoxes

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
        str | None, typer.Option(help="Training recipe.", show_default="as in train, or the recipe of the run")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model to train from. It determines the image sizes.", show_default=False),
    ] = None,
    augmentation: Annotated[str | None, typer.Option(help=AUGMENTATION, show_default=False)] = None,
    output: Annotated[Path, typer.Option(help="Picture to write: .png, .jpg, .pdf or .svg.")] = Path("augmented.png"),
    num_images: Annotated[int, typer.Option(min=1, max=100, help="Number of images (rows).")] = 4,
    num_samples: Annotated[int, typer.Option(min=1, max=100, help="Number of epochs (columns).")] = 4,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Random seed of the augmentation and of the choice of images.",
            show_default="0, or the seed of the run",
        ),
    ] = None,
    tiles: Annotated[
        str | None,
        typer.Option(
            help="Draw tiles of this size, as train --tiles cuts them; none: no tiles.",
            show_default="no tiles, or as in the run",
        ),
    ] = None,
    tile_overlap: Annotated[
        float | None,
        typer.Option(
            help="Overlap of neighbouring tiles, as a fraction of their side.", show_default="as in the run, or 0.2"
        ),
    ] = None,
    box_format: BoxFormat = None,
    allow_outside: AllowOutside = False,
    trust_boxes: TrustBoxes = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing picture.")] = False,
    debug: Debug = False,
) -> None:
    """Draw training images as annotated, and as augmented in the first epochs.

    The augmentation options of `train` also work here: --short-sides 480 512 --longest-side 800.

    \b
    Example: dino-hf augment my-data --recipe finetune --output augmented.png
    """
    with one_sentence_errors(debug):
        if output.is_dir() or not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
            raise ValueError(
                f"{output} cannot be written; choose a file in an existing folder, such as --output augmented.png."
            )
        if output.suffix.lower() not in _PICTURES:
            raise ValueError(
                f"{output} is not a supported kind of picture ({', '.join(_PICTURES)}); choose for example "
                f"--output {output.with_suffix('.png')}."
            )
        check_output_file(output, overwrite)
        from ..run.settings import parse_settings
        from ..run.training_view import view_training
        from ..training.own_augmentation import load_own_augmentation
        from .augmentation_grid import save_augmentation_grid

        reading = {"box_format": box_format, "allow_outside": allow_outside, "trust_boxes": trust_boxes}
        reading |= {"tiles": tiles, "tile_overlap": tile_overlap}
        view = view_training(dataset, recipe, model, seed, parse_settings(context.args), **reading)
        own = None if augmentation is None else load_own_augmentation(augmentation)
        drawn = (num_images, num_samples, view.seed, view.image_processor, own)
        with replace_file(output) as path:
            save_augmentation_grid(path, view.data, view.augmentation, *drawn)
        if own is None and view.own is not None:
            print(printable(f"The run also had the augmentation {view.own!s:.200}; draw it with --augmentation."))
        print(printable(f"The picture is in {output}."))
