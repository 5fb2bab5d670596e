"""The command `dino-hf predict`."""

import warnings
from pathlib import Path
from typing import Annotated

import typer

from ..common.values import numbers_by_name
from .command_errors import SOME_SKIPPED, Debug, one_sentence_errors
from .options import Mirror

_RESULTS, _DETECTION, _LARGE, _VIDEO, _SPEED = "Results", "Detection", "Small objects", "Videos and cameras", "Speed"
_CLASS_THRESHOLDS = "--class-thresholds", "person=0.3,dog=0.6: names and scores in [0, 1]"
_MOST_CLASSES = 100  # rows of the table at the end


def predict(
    model: Annotated[
        str, typer.Argument(help="Detector: folder, name from `dino-hf models`, or Hub id.", show_default=False)
    ],
    sources: Annotated[
        list[str],
        typer.Argument(
            help='Images, videos, folders, quoted patterns such as "photos/**/*.jpg", web addresses, or a camera index such as 0.',
            show_default=False,
        ),
    ],
    save: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the results. Without it, nothing is saved.", rich_help_panel=_RESULTS, show_default=False
        ),
    ] = None,
    formats: Annotated[
        str,
        typer.Option(
            help="Formats to save: images (drawn images and videos), coco, csv, yolo.", rich_help_panel=_RESULTS
        ),
    ] = "images,coco,csv,yolo",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier prediction.", rich_help_panel=_RESULTS)
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Keep an earlier prediction and add the missing sources.", rich_help_panel=_RESULTS
        ),
    ] = False,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Lowest score of a detection, in [0, 1].",
            rich_help_panel=_DETECTION,
            show_default="of the model, or 0.5",
        ),
    ] = None,
    class_thresholds: Annotated[
        str | None,
        typer.Option(
            help="Lowest scores of single classes, such as person=0.3,dog=0.6.",
            rich_help_panel=_DETECTION,
            show_default=False,
        ),
    ] = None,
    max_detections: Annotated[
        int | None,
        typer.Option(
            help="Most detections per image.",
            rich_help_panel=_DETECTION,
            show_default="300, or the number of queries if that is higher",
        ),
    ] = None,
    all_scores: Annotated[
        bool,
        typer.Option(
            "--all-scores",
            help="Also save the query and all class scores of each detection, in predictions.jsonl.",
            rich_help_panel=_DETECTION,
        ),
    ] = False,
    classes: Annotated[
        str | None,
        typer.Option(
            help="Keep only these classes: names or original category ids, such as person,dog.",
            rich_help_panel=_DETECTION,
            show_default=False,
        ),
    ] = None,
    tta: Annotated[
        bool,
        typer.Option(
            "--tta",
            help="Test-time augmentation: fuse detections of flipped images and three sizes. Takes 6 times as long.",
            rich_help_panel=_DETECTION,
        ),
    ] = False,
    tiles: Annotated[
        str | None,
        typer.Option(
            help="Cut larger images into tiles of this size, such as 640 or 640x480; none: no tiles.",
            rich_help_panel=_LARGE,
            show_default="as in training",
        ),
    ] = None,
    tile_overlap: Annotated[
        float | None,
        typer.Option(
            help="Overlap of neighbouring tiles, as a fraction of their side.",
            rich_help_panel=_LARGE,
            show_default="as in training, or 0.2",
        ),
    ] = None,
    every: Annotated[int, typer.Option(help="Use every N-th frame.", rich_help_panel=_VIDEO)] = 1,
    max_frames: Annotated[
        int | None, typer.Option(help="Use at most N frames of each video.", rich_help_panel=_VIDEO, show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images per batch.", rich_help_panel=_SPEED)] = 8,
    device: Annotated[
        str | None,
        typer.Option(help="Device: cuda, mps or cpu.", rich_help_panel=_SPEED, show_default="the best available"),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Data type of the computation: float32, bfloat16 or float16.", rich_help_panel=_SPEED)
    ] = "float32",
    mirror: Mirror = None,
    debug: Debug = False,
) -> None:
    """Detect objects in images, videos, folders and cameras. Draws them, and writes COCO JSON, CSV and YOLO files.

    Sources that cannot be read are skipped with a message. The exit code is then 3.

    \b
    Examples:
    dino-hf predict outputs/train photos/ clip.mp4 --save found
    dino-hf predict detrex/dino_r50_4scale_12ep street.jpg
    """
    with one_sentence_errors(debug), warnings.catch_warnings():
        # Imported here, because they take seconds and `--help` does not need them.
        from transformers.utils.logging import disable_progress_bar

        from ..common.console import make_console
        from ..common.progress import ProgressBar
        from ..inference.predict import predict as run
        from ..inference.sources import find_sources

        disable_progress_bar()
        console, errors = make_console(), make_console(stderr=True, soft_wrap=True)
        warnings.showwarning = lambda message, *_: errors.print(f"note: {_line(str(message), 1000)}")
        found = find_sources(sources, exclude=save)
        skipped = []

        said = []  # sentences about the model's thresholds

        def say(sentence: str) -> None:
            said.append(sentence)
            console.print(sentence, soft_wrap=True)

        def report(failure) -> None:
            skipped.append(failure)
            errors.print(f"skipped {_line(failure.source.name, 300)}: {_line(failure.reason, 1000)}")

        predictions = run(
            model,
            found,
            save=save,
            formats=[name.strip() for name in formats.split(",") if name.strip()],
            overwrite=overwrite,
            resume=resume,
            threshold=threshold,
            class_thresholds=None
            if class_thresholds is None
            else numbers_by_name(class_thresholds, *_CLASS_THRESHOLDS),
            max_detections=max_detections,
            all_scores=all_scores,
            classes=None if classes is None else [name for name in classes.split(",") if name.strip()],
            tiles=tiles,
            tile_overlap=tile_overlap,
            tta=tta,
            every=every,
            max_frames=max_frames,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            stream=True,
            on_failure=report,
            say=say,
        )
        with ProgressBar(console) as progress:
            counted = progress.follow(predictions, "predicting images", _count_images(found, every, max_frames))
            num_images = _summarize(counted, console)
        if not num_images and not skipped:
            console.print("Nothing is left to predict: the earlier prediction has all these sources.")
        if save is not None:
            console.print(f"Results are in {save}.", soft_wrap=True)
        if not said and (hint := _hint(model, threshold)):
            console.print(hint, soft_wrap=True)
        if skipped:
            number = "1 source was" if len(skipped) == 1 else f"{len(skipped)} sources were"
            errors.print(f"{number} skipped.")
            raise typer.Exit(SOME_SKIPPED)


def _line(text: str, limit: int) -> str:
    """A text in one line, because a line feed in a file name could fake another message."""
    from ..common.text import shorten

    return shorten(text.replace("\n", "\\n").replace("\t", "\\t"), limit)


def _count_images(sources, every: int, max_frames: int | None) -> int | None:
    """Number of images and frames to read. None: unknown."""
    from ..inference.videos import video_info

    total = 0
    for source in sources:
        if source.kind == "image":
            total += 1
            continue
        num_frames = video_info(source.origin).num_frames if source.kind == "video" else None
        num_frames = None if num_frames is None else -(-num_frames // every)
        counts = [count for count in (num_frames, max_frames) if count is not None]
        if not counts:
            return None
        total += min(counts)
    return total


def _hint(model: str, threshold: float | None) -> str | None:
    """A hint at the best threshold that an evaluation of this model measured, if no threshold was chosen or kept."""
    from ..inference.score_thresholds import DEFAULT_THRESHOLD, evaluated_threshold

    if threshold is not None:
        return None
    found = evaluated_threshold(model)
    if found is None or abs(found[0] - DEFAULT_THRESHOLD) < 0.02:
        return None
    return (
        f"The best threshold of this model is {found[0]:.3f}, as measured in {found[1]}. The default is {DEFAULT_THRESHOLD}; to "
        f"use the best threshold: --threshold {found[0]:.3f}"
    )


def _summarize(predictions, console) -> int:
    """Go through all predictions, then print the numbers of objects and images of each class.

    Returns:
        number of images.
    """
    from collections import Counter

    from rich.table import Table
    from rich.text import Text

    from ..common.text import shorten

    objects, images, num_images = Counter(), Counter(), 0
    for prediction in predictions:
        num_images += 1
        objects.update(prediction.names)
        images.update(set(prediction.names))
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("class")
    table.add_column("objects", justify="right")
    table.add_column("images", justify="right")
    for name, count in objects.most_common(_MOST_CLASSES):
        table.add_row(Text(shorten(name, 60)), str(count), str(images[name]))
    if (more := len(objects) - _MOST_CLASSES) > 0:
        table.add_row(f"{more} more classes", str(sum(count for _, count in objects.most_common()[_MOST_CLASSES:])), "")
    table.add_row("all", str(objects.total()), str(num_images), style="bold")
    if num_images:
        console.print(table)
    return num_images
