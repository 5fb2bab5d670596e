"""`dino-hf push`."""

from pathlib import Path
from typing import Annotated

import typer

from .command_errors import Debug, one_sentence_errors


def push(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a trained, converted or saved detector.", show_default=False)
    ],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hub.", show_default=False)],
    yes: Annotated[bool, typer.Option("--yes", help="Upload. Without it, only check and show the files.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    license: Annotated[
        str | None, typer.Option(help="Licence of the weights, such as apache-2.0.", show_default="as recorded")
    ] = None,
    debug: Debug = False,
) -> None:
    """Check a detector and upload it to the Hub: weights, code, image processor and model card.

    \b
    Example: dino-hf push outputs/birds someone/birds --license apache-2.0 --yes
    """
    with one_sentence_errors(debug):
        # Imported here: it takes seconds, which `--help` need not wait for.
        from transformers.utils.logging import disable_progress_bar

        from ..common.text import printable
        from ..run.publish import describe, publish

        disable_progress_bar()

        def show(publication) -> None:
            for line in describe(publication):
                typer.echo(printable(line))

        address = publish(folder, repository, is_dry_run=not yes, is_private=private, license=license, show=show)
        if address is None:
            typer.echo("Nothing was uploaded. Add --yes to upload these files.")
        else:
            typer.echo(f"Uploaded: {address}")
