"""`dino-hf export`."""

from pathlib import Path
from typing import Annotated

import typer

from ..common.command_errors import Debug, one_sentence_errors
from ..common.console import make_console
from ..common.paths import expand_home

_FILE, _COMPARISON = "File", "Comparison with the model"
_FORMATS = ("onnx",)


def export(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a DINO detector.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(help="File to write; by default MODEL.onnx here.", show_default=False, rich_help_panel=_FILE),
    ] = None,
    format: Annotated[str, typer.Option(help="onnx.", rich_help_panel=_FILE)] = "onnx",
    opset: Annotated[int, typer.Option(help="ONNX opset, 18 to 23.", rich_help_panel=_FILE)] = 18,
    dtype: Annotated[str, typer.Option(help="float32 or float16.", rich_help_panel=_FILE)] = "float32",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file.", rich_help_panel=_FILE)
    ] = False,
    images: Annotated[
        list[str] | None,
        typer.Option(
            help="Image or folder for the comparison, may be repeated; default: drawn scenes.",
            show_default=False,
            rich_help_panel=_COMPARISON,
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Allowed difference of scores, and of boxes as a part of the image's side; default: 0.01, in float16 0.25.",
            show_default=False,
            rich_help_panel=_COMPARISON,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATASET",
            help="Annotated images to compare the AP of model and file.",
            show_default=False,
            rich_help_panel=_COMPARISON,
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.", rich_help_panel=_COMPARISON)] = "validation",
    box_format: Annotated[
        str | None,
        typer.Option(
            help="Layout of the boxes, if the data do not state it.", show_default=False, rich_help_panel=_COMPARISON
        ),
    ] = None,
    allow_outside: Annotated[
        bool,
        typer.Option(
            "--allow-outside",
            help="Also read files outside of the data set's folder.",
            rich_help_panel=_COMPARISON,
        ),
    ] = False,
    trust_boxes: Annotated[
        bool,
        typer.Option("--trust-boxes", help="Do not check the layout of the boxes.", rich_help_panel=_COMPARISON),
    ] = False,
    ap_tolerance: Annotated[
        float | None,
        typer.Option(
            help="Allowed difference of AP, in [0, 1]; default: 0.001, in float16 0.005.",
            show_default=False,
            rich_help_panel=_COMPARISON,
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a detector as an ONNX file for images of any size, if ONNX Runtime finds with it what the model finds.

    \b
    Example: dino-hf export outputs/train --output detector.onnx --data my-data
    """
    with one_sentence_errors(debug):
        if format not in _FORMATS:
            raise ValueError(f"--format {format} is not known; there is {', '.join(_FORMATS)}.")
        # Imported here: they take seconds, which `--help` need not wait for.
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
        megabytes = report.num_bytes / 2**20
        console.print(f"{report.path}: {megabytes:.1f} MiB, {report.dtype}, opset {report.opset}.")
        console.print("Inputs pixel_values (batch, 3, height, width) float32, pixel_mask (batch, height, width) int64;")
        console.print("outputs logits (batch, queries, classes), pred_boxes (batch, queries, 4), float32.")


def _default_output(model: str) -> Path:
    """Named like the model, in the folder that the command is run in."""
    return Path(f"{expand_home(model).resolve().name}.onnx")
