"""The command `dino-hf doctor`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..common.output_folders import check_output_folder, read_manifest, replace_file, write_manifest
from ..common.paths import remove_files
from ..common.regular_files import open_regular
from ..common.text import printable
from .command_errors import ERRORS_FOUND, Debug, one_sentence_errors
from .options import DATA, AllowOutside, BoxFormat, Mirror, TrustBoxes

_MODEL = "Label errors"
_PICTURES = "doctor"  # name of the command in the list of written files
_FIRST_LINE = b'{\n "dataset": '  # first line of a findings file: such a file may be overwritten


def doctor(
    dataset: Annotated[
        str, typer.Argument(help="Folder, json, yaml or parquet file, or Hub id of the data set.", show_default=False)
    ],
    fix: Annotated[
        Path | None, typer.Option(help="Write a cleaned copy to this new folder.", rich_help_panel="Results")
    ] = None,
    drop_near_copies: Annotated[
        bool,
        typer.Option(
            "--drop-near-copies",
            help="With --fix: also leave out images that look like an image of another split, and boxes that nearly repeat "
            "another box.",
            rich_help_panel="Results",
        ),
    ] = False,
    pictures: Annotated[
        Path | None,
        typer.Option(help="Draw suspicious images and histograms into this folder.", rich_help_panel="Results"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Rank labels that this detector contradicts: folder, name from `dino-hf models`, or Hub id. It must have been "
            "trained on other images.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images per batch of the detector.", rich_help_panel=_MODEL)
    ] = 8,
    device: Annotated[
        str | None,
        typer.Option(
            help="Device of the detector: cuda, cpu, ...", show_default="the best available", rich_help_panel=_MODEL
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the pictures of an earlier run.", rich_help_panel="Results"),
    ] = False,
    json: Annotated[
        Path | None, typer.Option(help="Write all findings to this JSON file.", rich_help_panel="Results")
    ] = None,
    box_format: BoxFormat = None,
    no_images: Annotated[
        bool,
        typer.Option(
            "--no-images", help="Do not open the images. This is faster and finds less.", rich_help_panel=DATA
        ),
    ] = False,
    allow_outside: AllowOutside = False,
    trust_boxes: TrustBoxes = False,
    max_examples: Annotated[
        int, typer.Option(min=1, help="Number of examples shown for each finding.", rich_help_panel="Results")
    ] = 3,
    mirror: Mirror = None,
    debug: Debug = False,
) -> None:
    """Check a data set for errors before training. The data set itself is never changed.

    Exit code: 0 if there are no errors, 2 if there are errors (with --fix: in the copy), 1 if the data set cannot be read.

    \b
    Example: dino-hf doctor data/pets --fix data/pets-cleaned --pictures suspects
    """
    with one_sentence_errors(debug):
        from ..common.console import make_console
        from ..common.progress import ProgressBar
        from ..data.recognise import read_raw
        from ..doctor.checks import inspect
        from ..doctor.cleaned_copy import check_outside, check_target, write_cleaned_copy
        from .doctor_report import print_copy, print_report

        if pictures is not None:
            _check_pictures(pictures)
        if json is not None and json.is_file() and not _has_findings(json):
            raise ValueError(f"{json} exists and is not a findings file of the doctor; choose another file.")
        if json is not None and (json.is_dir() or not json.absolute().parent.is_dir()):
            raise ValueError(
                f"{json} cannot be written; choose a file in an existing folder, such as --json findings.json."
            )
        if fix is not None and no_images:
            raise ValueError("--fix must open the images; remove --no-images.")
        predictor = None
        if model is not None:
            from ..inference import Predictor

            predictor = Predictor(model, device=device)  # before the images are checked, which may take long
        raw = read_raw(dataset, box_format=box_format, allow_outside=allow_outside)
        if fix is not None:
            check_target(raw, fix)
        for path in filter(None, (pictures, json)):
            check_outside(raw, path)
        if pictures is not None:
            is_ours = lambda folder: read_manifest(folder, _PICTURES) is not None  # noqa: E731
            check_output_folder(pictures, overwrite, is_ours, "pictures of the doctor")
        with ProgressBar(make_console(stderr=True)) as progress:
            counted = partial(progress, "checking images")
            report = inspect(raw, check_images=not no_images, trust_boxes=trust_boxes, progress=counted)
        print_report(report, max_examples, notes=raw.notes)
        if json is not None:
            _write_findings(json, report.as_dict())
            typer.echo(printable(f"All findings are in {json}."))
        if pictures is not None:
            from ..doctor.suspects import save_histograms, save_suspects

            remove_files(pictures, read_manifest(pictures, _PICTURES) or [])
            pages = save_suspects(pictures, raw, report, max_examples)
            save_histograms(pictures / "histograms.png", report)
            files = [*(page.name for page in pages), "histograms.png"]
            if model is not None:
                from .doctor_label_errors import FILES

                files += FILES
            write_manifest(pictures, _PICTURES, files)
            names = ", ".join(map(str, [*pages, pictures / "histograms.png"]))
            typer.echo(printable(f"Pictures are in {names}."))
        if fix is not None:
            with ProgressBar(make_console(stderr=True)) as progress:
                copy = write_cleaned_copy(raw, report, fix, partial(progress, "writing images"), drop_near_copies)
            raw = read_raw(fix)
            report = inspect(raw, check_images=False, trust_boxes=trust_boxes)
            print_copy(copy, report)
        if predictor is not None and report.has_errors:
            typer.echo("Label errors are not ranked, because the data have errors. Correct them first, or use --fix.")
        elif predictor is not None:
            from .doctor_label_errors import rank_labels

            rank_labels(predictor, raw, batch_size, pictures, trust_boxes)
        if report.has_errors:
            raise typer.Exit(ERRORS_FOUND)


def _check_pictures(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose a folder for the pictures.")


def _has_findings(path: Path) -> bool:
    with open_regular(path) as file:
        return file.read(len(_FIRST_LINE)) == _FIRST_LINE


def _write_findings(path: Path, content: dict) -> None:
    import json

    text = json.dumps(content, indent=1, ensure_ascii=False)
    encoding = {"encoding": "utf-8", "errors": "backslashreplace"}  # file names that are not UTF-8 become json escapes
    if path.exists() and not path.is_file():  # do not replace a pipe or a device, such as /dev/stdout, by a file
        path.write_text(text, **encoding)
        return
    with replace_file(path) as scratch:
        scratch.write_text(text, **encoding)
