"""Options that several commands share."""

import os
from typing import Annotated

import typer

from ..conversion.options import MIRROR

DATA = "Data set"  # the panel of these options in `--help`

BoxFormat = Annotated[
    str | None,
    typer.Option(
        help="Layout of the boxes, if not stated: xywh, xyxy or cxcywh in pixels; xywhn, xyxyn or cxcywhn in [0, 1].",
        show_default=False,
        rich_help_panel=DATA,
    ),
]
AllowOutside = Annotated[
    bool,
    typer.Option("--allow-outside", help="Also read files outside the data set's folder.", rich_help_panel=DATA),
]
TrustBoxes = Annotated[
    bool, typer.Option("--trust-boxes", help="Do not check the layout of the boxes.", rich_help_panel=DATA)
]
Split = Annotated[str, typer.Option(help="Part of the data set: train, validation or test.", rich_help_panel=DATA)]


AUGMENTATION = (
    "Your own augmentation, before the recipe's: FILE.py:NAME, MODULE:NAME, or a file saved by Albumentations."
)


def _use_mirror(address: str | None) -> None:
    if address is not None:
        os.environ[MIRROR] = address


Mirror = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Download published checkpoints from ADDRESS/PROJECT/FILE.",
        show_default=f"${MIRROR}",
        callback=_use_mirror,
        rich_help_panel="Other",
    ),
]
