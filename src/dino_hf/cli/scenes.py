"""`dino-hf scenes`: draw a data set to try the other commands on."""

from pathlib import Path
from typing import Annotated

import typer

from ..common.output_folders import check_output_folder, replace_folder
from .command_errors import Debug, one_sentence_errors


def scenes(
    folder: Annotated[Path, typer.Argument(help="New folder for the data set.", show_default=False)],
    num_train: Annotated[int, typer.Option(min=1, help="Number of training images.")] = 4800,
    num_validation: Annotated[int, typer.Option(min=1, help="Number of validation images.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    debug: Debug = False,
) -> None:
    """Draw a small data set to try the other commands on.

    It has coloured shapes on textured backgrounds, in COCO format. Its folder `untrained` holds a small model without weights.

    \b
    Example: dino-hf scenes scenes && dino-hf train scenes --model scenes/untrained
    """
    with one_sentence_errors(debug):
        check_output_folder(folder, False, lambda _: False, "drawn scenes")
        from ..common.scenes import UNTRAINED, draw_data

        with replace_folder(folder) as scratch:
            draw_data(scratch, num_train, num_validation, seed)
        print(
            f"{folder} has {num_train} training and {num_validation} validation images, and a model in {folder / UNTRAINED}."
        )
