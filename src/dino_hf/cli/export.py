"""The command `dino-hf export`."""

from pathlib import Path
from typing import Annotated

import typer

from ..common.console import make_console
from ..common.paths import expand_home
from ..common.text import size_text
from .command_errors import Debug, one_sentence_errors
from .options import AllowOutside, BoxFormat, Mirror, Split, TrustBoxes

_FILE, _COMPARISON = "File", "Comparison with the model"
_FORMATS = ("onnx",)


def export(
    model: Annotated[
        str,
        typer.Argument(help="DINO detector: folder, name from `dino-hf models`, or Hub id.", show_default=False),
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="File to write.", show_default="<model name>.onnx", rich_help_panel=_FILE),
    ] = None,
    format: Annotated[str, typer.Option(help="File format. Only onnx is available.", rich_help_panel=_FILE)] = "onnx",
    opset: Annotated[int, typer.Option(help="ONNX opset, from 18 to 23.", rich_help_panel=_FILE)] = 18,
    dtype: Annotated[
        str, typer.Option(help="Data type of the weights: float32 or float16.", rich_help_panel=_FILE)
    ] = "float32",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file.", rich_help_panel=_FILE)
    ] = False,
    images: Annotated[
        list[str] | None,
        typer.Option(
            help="Image or folder to compare on. Repeat the option for several.",
            show_default="drawn scenes",
            rich_help_panel=_COMPARISON,
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest allowed difference of scores, and of boxes relative to the image's side.",
            show_default="0.01, for float16 0.25",
            rich_help_panel=_COMPARISON,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATASET",
            help="Annotated images on which the AP of model and file is compared.",
            show_default=False,
            rich_help_panel=_COMPARISON,
        ),
    ] = None,
    split: Split = "validation",
    box_format: BoxFormat = None,
    allow_outside: AllowOutside = False,
    trust_boxes: TrustBoxes = False,
    ap_tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest allowed difference of AP, in [0, 1].",
            show_default="0.001, for float16 0.005",
            rich_help_panel=_COMPARISON,
        ),
    ] = None,
    mirror: Mirror = None,
    debug: Debug = False,
) -> None:
    """Export a detector to an ONNX file for images of any size.

    The file is written only if ONNX Runtime finds the same detections with it as the model.

    \b
    Example: dino-hf export outputs/train --output detector.onnx --data my-data
    """
    with one_sentence_errors(debug):
        if format not in _FORMATS:
            raise ValueError(f"--format {format} is unknown; choose {', '.join(_FORMATS)}.")
        # Imported here, because they take seconds and `--help` does not need them.
        from transformers.utils.logging import disable_progress_bar

        from ..export import export_onnx

        disable_progress_bar()
        console = make_console(soft_wrap=True)
        report = export_onnx(
            model,
            _default_output(model) if output is None else output,
            opset=opset,
            dtype=dtype,
            images=images or None,
            data=data,
            split=split,
            box_format=box_format,
            allow_outside=allow_outside,
            trust_boxes=trust_boxes,
            tolerance=tolerance,
            ap_tolerance=ap_tolerance,
            overwrite=overwrite,
            say=console.print,
        )
        difference = report.difference
        console.print(
            f"{difference.num_detections} detections in {difference.num_images} images: scores differ by at most "
            f"{difference.score:.1g}, boxes by {difference.box:.1g} of an image's side (allowed: {report.tolerance:g})."
        )
        if report.ap is not None:
            console.print(f"AP of the model {report.ap[0]:.4f}, of the file {report.ap[1]:.4f}.")
        console.print(f"{report.path}: {size_text(report.num_bytes)}, {report.dtype}, opset {report.opset}.")
        console.print(
            "Inputs: pixel_values (batch, 3, height, width) float32, pixel_mask (batch, height, width) int64."
        )
        console.print("Outputs: logits (batch, queries, classes), pred_boxes (batch, queries, 4), both float32.")


def _default_output(model: str) -> Path:
    """A file in the current folder with the name of the model."""
    return Path(f"{expand_home(model).resolve().name}.onnx")
