"""The command `dino-hf eval`."""

from pathlib import Path
from typing import Annotated

import typer

from .command_errors import Debug, one_sentence_errors
from .options import DATA, AllowOutside, BoxFormat, Mirror, Split, TrustBoxes

_MOST_CLASSES = 100  # rows of a table; the files have all classes
_OUTPUT, _SETTINGS = "Output", "Settings"


def evaluate(
    model: Annotated[
        str,
        typer.Argument(help="Detector: folder, name from `dino-hf models`, or Hub id.", show_default=False),
    ],
    dataset: Annotated[
        str,
        typer.Argument(help="Folder, json, yaml or parquet file, or Hub id of annotated images.", show_default=False),
    ],
    split: Split = "validation",
    output_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder for numbers, detections and plots.",
            show_default="outputs/eval/<model name>",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier evaluation.", rich_help_panel=_OUTPUT)
    ] = False,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Evaluate this model too, and compare the two.",
            show_default=False,
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    box_format: BoxFormat = None,
    allow_trained: Annotated[
        bool,
        typer.Option(
            "--allow-trained", help="Evaluate even on images that the detector was trained on.", rich_help_panel=DATA
        ),
    ] = False,
    allow_outside: AllowOutside = False,
    trust_boxes: TrustBoxes = False,
    keep_threshold: Annotated[
        bool,
        typer.Option(
            "--keep-threshold",
            help="Make the best threshold the default of predict.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.", rich_help_panel=_SETTINGS)] = 8,
    num_bootstrap: Annotated[
        int,
        typer.Option(help="Bootstrap resamples for the 95 % intervals. 0: no intervals.", rich_help_panel=_SETTINGS),
    ] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the resamples.", rich_help_panel=_SETTINGS)] = 0,
    max_detections: Annotated[
        int | None,
        typer.Option(
            help="Detections that count per image and class, at least 100.",
            show_default="as needed",
            rich_help_panel=_SETTINGS,
        ),
    ] = None,
    tiles: Annotated[
        str | None,
        typer.Option(
            help="Cut larger images into tiles of this size, such as 640 or 640x480; none: no tiles.",
            show_default="as in training",
            rich_help_panel=_SETTINGS,
        ),
    ] = None,
    tile_overlap: Annotated[
        float | None,
        typer.Option(
            help="Overlap of neighbouring tiles, as a fraction of their side.",
            show_default="as in training, or 0.2",
            rich_help_panel=_SETTINGS,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Device: cuda, cpu, ...", show_default="the best available", rich_help_panel=_SETTINGS),
    ] = None,
    mirror: Mirror = None,
    debug: Debug = False,
) -> None:
    """Evaluate any detector: COCO AP with 95 % intervals, AP per class and size, plots, and the worst mistakes.

    \b
    Example: dino-hf eval my-detector my-dataset --compare PekingU/rtdetr_r50vd
    """
    with one_sentence_errors(debug):
        settings = {"num_bootstrap": num_bootstrap, "seed": seed, "max_detections": max_detections}
        settings |= {"tiles": tiles, "tile_overlap": tile_overlap}
        from ..evaluation.kept_thresholds import check_keeps_thresholds
        from ..inference.score_thresholds import report_folder

        folder = output_dir or report_folder(model)
        reading = {"split": split, "box_format": box_format, "allow_trained": allow_trained}
        if keep_threshold:
            check_keeps_thresholds(model, split, allow_trained)
        reading |= {"allow_outside": allow_outside, "trust_boxes": trust_boxes}
        _evaluate(model, dataset, folder, overwrite, compare, device, batch_size, reading, settings, keep_threshold)


def _evaluate(
    model, dataset, output_dir, overwrite, other, device, batch_size, reading, settings, keep_threshold
) -> None:
    # Imported here, because they take seconds and `--help` does not need them.
    from ..common.console import make_console
    from ..common.tiles import read_tiling
    from ..evaluation import compare, load_split
    from ..evaluation.bootstrap import check_num_bootstrap
    from ..evaluation.classes import map_classes
    from ..evaluation.kept_thresholds import keep_thresholds
    from ..evaluation.report import COMPARED, check_folder, save_comparison, save_report
    from ..inference import Predictor

    num_bootstrap = settings["num_bootstrap"]
    if other is not None and not num_bootstrap:
        raise ValueError("--compare needs resamples; choose --num-bootstrap 1000.")
    check_num_bootstrap(num_bootstrap)
    read_tiling(settings["tiles"], settings["tile_overlap"])  # before a model is loaded
    folders = [output_dir] if other is None else [output_dir, output_dir / COMPARED]
    check_folder(output_dir, overwrite)
    console = make_console()
    predictors = [Predictor(name, device=device) for name in (model, other) if name is not None]
    data, notes = load_split(dataset, models=[predictor.model for predictor in predictors], log=False, **reading)
    for note in notes:
        console.print(note)
    for predictor in predictors:  # before the first evaluation, which may take an hour
        map_classes(predictor.id2label, predictor.category_ids, data, predictor.name)
    evaluations, paths = [], []
    for predictor, folder in zip(predictors, folders, strict=True):
        evaluation = _evaluate_one(console, predictor, data, batch_size=batch_size, **settings)
        evaluation.notes[:0] = notes
        paths += save_report(evaluation, data, folder)
        evaluations.append(evaluation)
        _show(console, evaluation)
    if other is not None:
        comparison = compare(*evaluations)
        paths += save_comparison(comparison, output_dir)
        _show_comparison(console, comparison)
    if keep_threshold:
        console.print(keep_thresholds(evaluations[0], predictors[0], model), soft_wrap=True)
    console.print(f"{len(paths)} files are in {output_dir}.", soft_wrap=True)


def _evaluate_one(console, predictor, data, **settings):
    from ..common.progress import ProgressBar
    from ..evaluation import evaluate_model

    with ProgressBar(console) as bar:

        def progress(stage: str, done: int, total: int) -> None:
            bar(stage, done, total, title=f"{predictor.name}: {stage}")

        return evaluate_model(predictor, data, check_trained=False, progress=progress, **settings)


def _show(console, evaluation) -> None:
    from rich.table import Table

    from ..common.text import shorten
    from ..evaluation.coco import COCO_LIMIT

    counts = evaluation.counts
    title = f"{evaluation.model:.200}: AP {_number(evaluation.metrics['AP'], evaluation.intervals.get('AP'))}"
    if (limit := evaluation.max_detections) > COCO_LIMIT:
        title += f" of {limit} detections per image and class, AR_{limit} {_number(evaluation.metrics[f'AR_{limit}'])}"
    table = Table()
    left_out = counts["detections_left_out"]
    caption = (
        f"{'with 95 % intervals; ' if evaluation.intervals else ''}{counts['images']} images, "
        f"{counts['objects']} objects, {counts['detections']} detections"
        + (f", {left_out} more of other classes" if left_out else "")
    )
    for name in ("class", "objects", "AP", "AP50", "small", "medium", "large"):
        table.add_column(name, justify="left" if name == "class" else "right", no_wrap=name != "class")
    together = {
        "name": "all",
        "num_objects": counts["objects"],
        "intervals": evaluation.intervals,
        **evaluation.metrics,
    }
    rows, num_left_out = _shown_classes(evaluation.per_class)
    for row in (together, *rows):
        values = [_number(row["AP"], row["intervals"].get("AP"))]
        values += [_number(row[name]) for name in ("AP50", "AP_small", "AP_medium", "AP_large")]
        table.add_row(shorten(row["name"], 60), str(row["num_objects"]), *values, end_section=row is together)
    if evaluation.tiling is not None:
        caption += f"; tiles of {evaluation.tiling.text}"
    if num_left_out:
        caption += f"; {num_left_out} more classes are in results.csv"
    # Not as title and caption of the table, because those are wrapped at its width.
    console.print(title, soft_wrap=True)
    console.print(table)
    console.print(caption, soft_wrap=True)
    if evaluation.best is not None:
        best = evaluation.best
        text = f"Best threshold {best.threshold:.3f}: F1 {best.f1:.2f}, precision {best.precision:.2f}, recall {best.recall:.2f}"
        console.print(text)


def _show_comparison(console, comparison) -> None:
    from rich.table import Table

    from ..common.text import shorten

    console.print(f"A: {comparison.model_a}\nB: {comparison.model_b}", soft_wrap=True)
    table = Table()
    for name in ("", "A", "B", "B - A", "B better in"):
        table.add_column(name, justify="right" if name else "left", no_wrap=bool(name))
    for entry in comparison.differences[:_MOST_CLASSES]:
        low, high = entry.interval
        table.add_row(
            shorten(entry.name.removeprefix("AP_class_"), 60),
            _number(entry.a),
            _number(entry.b),
            f"{entry.difference:+.3f} [{low:+.3f}, {high:+.3f}]",
            f"{100 * entry.share_better:.1f} %",
        )
    console.print(table)
    if (more := len(comparison.differences) - _MOST_CLASSES) > 0:
        console.print(f"{more} more classes are in compare.json.")
    console.print(comparison.verdict)


def _shown_classes(rows: list) -> tuple[list, int]:
    """The rows of the table, and the number of classes left out. Classes with the fewest objects are left out."""
    if len(rows) <= _MOST_CLASSES:
        return rows, 0
    fewest = sorted(rows, key=lambda row: -row["num_objects"])[_MOST_CLASSES - 1]["num_objects"]
    kept = [row for row in rows if row["num_objects"] >= fewest][:_MOST_CLASSES]
    return kept, len(rows) - len(kept)


def _number(value: float, bounds: tuple[float, float] | None = None) -> str:
    if value < 0:
        return "none"
    return f"{value:.3f}" + ("" if bounds is None else f" [{bounds[0]:.3f}, {bounds[1]:.3f}]")
