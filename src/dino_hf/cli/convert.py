"""`dino-hf convert`."""

from pathlib import Path
from typing import Annotated

import typer

from ..common.paths import expand_home
from ..conversion.options import HELP, check_options
from .command_errors import Debug, one_sentence_errors

_OUTPUT, _MODEL, _BACK, _CHECK = "Output", "Checkpoint", "Convert back", "Verification"


def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(help=".pth or .safetensors file; with --to, a folder of dino_hf.", show_default=False),
    ],
    second: Annotated[Path | None, typer.Argument(hidden=True)] = None,
    output: Annotated[
        Path | None, typer.Option(help=HELP["output"], show_default=False, rich_help_panel=_OUTPUT)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help=HELP["force"], rich_help_panel=_OUTPUT)] = False,
    source: Annotated[str, typer.Option(help=HELP["source"], rich_help_panel=_MODEL)] = "auto",
    published: Annotated[
        str | None,
        typer.Option(metavar="PROJECT/NAME", help=HELP["published"], show_default=False, rich_help_panel=_MODEL),
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help=HELP["ema"], rich_help_panel=_MODEL)] = False,
    label_names: Annotated[
        Path | None, typer.Option(help=HELP["label_names"], show_default=False, rich_help_panel=_MODEL)
    ] = None,
    image_size: Annotated[
        tuple[int, int] | None,
        typer.Option(metavar="SHORTEST LONGEST", help=HELP["image_size"], show_default=False, rich_help_panel=_MODEL),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help=HELP["set"], show_default=False, rich_help_panel=_MODEL),
    ] = None,
    to: Annotated[
        str | None, typer.Option(metavar="PROJECT", help=HELP["to"], show_default=False, rich_help_panel=_BACK)
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help=HELP["verify"], rich_help_panel=_CHECK)] = False,
    image: Annotated[Path | None, typer.Option(help=HELP["image"], show_default=False, rich_help_panel=_CHECK)] = None,
    debug: Debug = False,
) -> None:
    """Convert a checkpoint of the original release, detrex or mmdetection, or convert it back.

    \b
    Example: dino-hf convert checkpoint0011_4scale.pth --output dino-r50-4scale --verify

    Without --output, a file named by --published is kept in the cache, where its name finds it.
    """
    with one_sentence_errors(debug):
        if output is not None and second is not None:
            raise ValueError(f"There are two outputs, {output} and {second}; name one.")
        output = output or second
        options = {"source": source, "to": to, "ema": ema, "published": published, "label_names": label_names}
        options |= {"image_size": image_size, "force": force, "image": image}
        check_options(options | {"output": output, "set": settings, "verify": verify})
        # Imported here: it takes seconds, which `--help` need not wait for.
        from transformers.utils.logging import disable_progress_bar

        from ..conversion.by_name import store
        from ..conversion.convert_checkpoint import run

        disable_progress_bar()
        if output is None:
            store(expand_home(checkpoint), published)
        else:
            run(expand_home(checkpoint), expand_home(output), settings=settings, verify_result=verify, **options)
