"""The command `dino-hf eval`."""

from pathlib import Path
from typing import Annotated

import typer

from .command_errors import Debug, one_sentence_errors

_OUTPUT, _SETTINGS = "Data and output", "Settings"


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of any object detector.", show_default=False)],
    dataset: Annotated[
        str, typer.Argument(help="Folder, json, yaml, parquet or Hub id of annotated images.", show_default=False)
    ],
    split: Annotated[str, typer.Option(help="train, validation or test.", rich_help_panel=_OUTPUT)] = "validation",
    output_dir: Annotated[
        Path, typer.Option(help="Folder for numbers, detections and pictures.", rich_help_panel=_OUTPUT)
    ] = Path("outputs/eval"),
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Is this other detector better?", show_default=False, rich_help_panel=_OUTPUT
        ),
    ] = None,
    box_format: Annotated[
        str | None,
        typer.Option(help="Of boxes, where the data do not tell it.", show_default=False, rich_help_panel=_OUTPUT),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.", rich_help_panel=_SETTINGS)] = 8,
    num_bootstrap: Annotated[
        int, typer.Option(help="Resamples for the 95 % intervals; 0: none.", rich_help_panel=_SETTINGS)
    ] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the resamples.", rich_help_panel=_SETTINGS)] = 0,
    device: Annotated[
        str | None,
        typer.Option(help="cuda, cpu, ...; the best by default.", show_default=False, rich_help_panel=_SETTINGS),
    ] = None,
    debug: Debug = False,
) -> None:
    """Measure a detector: COCO AP with 95 % intervals, per class and size, curves, confusions, worst mistakes.

    \b
    Example: dino-hf eval my-detector my-dataset --compare PekingU/rtdetr_r50vd
    """
    with one_sentence_errors(debug):
        _evaluate(model, dataset, split, output_dir, compare, box_format, batch_size, num_bootstrap, seed, device)


def _evaluate(model, dataset, split, output_dir, other, box_format, batch_size, num_bootstrap, seed, device) -> None:
    # Imported here: they take seconds, which other commands need not wait for.
    from rich.console import Console

    from ..evaluation import compare, evaluate_model, load_split
    from ..evaluation.bootstrap import check_num_bootstrap
    from ..evaluation.classes import map_classes
    from ..evaluation.report import check_folder, save_comparison, save_report
    from ..inference import Predictor
    from ..training.progress import EvaluationProgress

    if other is not None and not num_bootstrap:
        raise ValueError("--compare needs resamples; choose --num-bootstrap 1000.")
    check_num_bootstrap(num_bootstrap)
    folders = [output_dir] if other is None else [output_dir, output_dir / "compared"]
    for folder in folders:
        check_folder(folder)
    console = Console()
    data, notes = load_split(dataset, split, box_format)
    for note in notes:
        console.print(note, markup=False, highlight=False)
    predictors = [Predictor(name, device=device) for name in (model, other) if name is not None]
    for predictor in predictors:  # before the first one has worked for an hour
        map_classes(predictor.id2label, predictor.category_ids, data, predictor.name)
    evaluations, paths = [], []
    for predictor, folder in zip(predictors, folders, strict=True):
        with EvaluationProgress(console, predictor.name) as progress:
            evaluation = evaluate_model(
                predictor, data, batch_size=batch_size, num_bootstrap=num_bootstrap, seed=seed, progress=progress
            )
        evaluation.notes[:0] = notes
        paths += save_report(evaluation, data, folder)
        evaluations.append(evaluation)
        _show(console, evaluation)
    if other is not None:
        comparison = compare(*evaluations)
        paths += save_comparison(comparison, output_dir)
        _show_comparison(console, comparison)
    console.print(f"{len(paths)} files are in {output_dir}.", markup=False, highlight=False, soft_wrap=True)


def _show(console, evaluation) -> None:
    from rich.table import Table

    counts = evaluation.counts
    title = f"{_plain(evaluation.model)}: AP {_number(evaluation.metrics['AP'], evaluation.intervals.get('AP'))}"
    table = Table()
    left_out = counts["detections_left_out"]
    caption = (
        f"in percent{', with 95 % intervals' if evaluation.intervals else ''}; {counts['images']} images, "
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
    for row in (together, *evaluation.per_class):
        values = [_number(row["AP"], row["intervals"].get("AP"))]
        values += [_number(row[name]) for name in ("AP50", "AP_small", "AP_medium", "AP_large")]
        table.add_row(_plain(row["name"]), str(row["num_objects"]), *values, end_section=row is together)
    # Apart from the table, at whose width they would be broken.
    console.print(title, highlight=False, soft_wrap=True)
    console.print(table)
    console.print(caption, markup=False, highlight=False, soft_wrap=True)
    if evaluation.best is not None:
        best = evaluation.best
        text = f"Best threshold {best.threshold:.3f}: F1 {best.f1:.2f}, precision {best.precision:.2f}, recall {best.recall:.2f}"
        console.print(text, highlight=False)


def _show_comparison(console, comparison) -> None:
    from rich.table import Table

    console.print(f"A: {comparison.model_a}\nB: {comparison.model_b}", markup=False, highlight=False, soft_wrap=True)
    table = Table()
    for name in ("", "A", "B", "B - A", "B better in"):
        table.add_column(name, justify="right" if name else "left", no_wrap=bool(name))
    for entry in comparison.differences:
        low, high = entry.interval
        table.add_row(
            _plain(entry.name.removeprefix("AP_class_")),
            _number(entry.a),
            _number(entry.b),
            f"{100 * entry.difference:+.1f} [{100 * low:.1f}, {100 * high:.1f}]".replace("[", r"\["),
            f"{100 * entry.share_better:.1f} %",
        )
    console.print(table)
    console.print(comparison.verdict, markup=False, highlight=False)


def _number(value: float, bounds: tuple[float, float] | None = None) -> str:
    """In percent."""
    if value < 0:
        return "none"
    return f"{100 * value:.1f}" + ("" if bounds is None else rf" \[{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]")


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
