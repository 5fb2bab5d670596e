"""`dino-hf doctor --model`: print, write and draw the labels that a detector contradicts."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from ..common.console import make_console
from ..common.progress import ProgressBar
from ..common.text import count_text, shorten
from ..data.load import load_raw
from ..data.raw import SPLITS, RawDataset, fill_sizes
from ..data.rows import ClassSpace, CocoData, annotation_names
from ..evaluation.label_error_pages import PAGE_NAME, save_label_errors
from ..evaluation.label_errors import KINDS, SUSPECTS_NAME, LabelError, find_label_errors, rank, write_suspects
from ..evaluation.seen_images import count_trained, seen_images
from ..inference import Predictor

FILES = (SUSPECTS_NAME, PAGE_NAME)
_MOST_ROWS = 20  # of the printed table
_LONGEST = 60  # characters of a name in the table


def rank_labels(
    predictor: Predictor, raw: RawDataset, batch_size: int, pictures: Path | None, trust_boxes: bool
) -> list[LabelError]:
    """Rank the labels of all splits, print the first, and write the files `FILES` into a folder.

    Args:
        raw: data without errors.
        pictures: the folder. None: nothing is written.
    """
    console = make_console(markup=True)
    loaded = load_raw(raw, str(raw.origin), validation_fraction=0, trust_boxes=trust_boxes)
    parts = {name: getattr(loaded, name) for name in SPLITS if getattr(loaded, name) is not None}
    console.print()
    _warn_of_trained(console, predictor, parts)
    suspects, notes = [], []
    with ProgressBar(make_console(stderr=True)) as bar:
        for name, data in parts.items():
            classes = ClassSpace(data.id2label, data.category_ids)
            found, own_notes = find_label_errors(
                predictor,
                data,
                split=name,
                annotations=annotation_names(fill_sizes(raw.splits[name]), classes),
                batch_size=batch_size,
                progress=lambda stage, done, total, name=name: bar(f"{name}: {stage}", done, total),
            )
            suspects += found
            notes += own_notes
    suspects, first = rank(suspects), next(iter(parts.values()))
    class_names = {category_id: first.id2label[index] for index, category_id in enumerate(first.category_ids)}
    for note in dict.fromkeys(notes):
        console.print(Text(note), soft_wrap=True)
    _print_suspects(console, suspects, class_names)
    if pictures is None:
        console.print(
            Text(f"--pictures FOLDER writes all of them to {SUSPECTS_NAME}, and draws the first in {PAGE_NAME}.")
        )
        return suspects
    write_suspects(pictures / SUSPECTS_NAME, suspects, class_names)
    save_label_errors(pictures / PAGE_NAME, suspects, parts, class_names)
    places = [str(pictures / name) for name in FILES]
    console.print(Text(f"All of them are in {places[0]}. The first are drawn in {places[1]}."), soft_wrap=True)
    return suspects


def _warn_of_trained(console, predictor: Predictor, parts: dict[str, CocoData]) -> None:
    seen = seen_images(getattr(predictor, "model", None))
    for name, data in parts.items():
        if count := count_trained(data, seen):
            text = (
                f"warning: {predictor.name} was trained on {count} of the {len(data.dataset)} images of {name}. It repeats the "
                "labels that it has learned, so most errors there are not found. Use a detector that was trained on other images."
            )
            console.print(Text(text, style="bold red"), soft_wrap=True)


def _print_suspects(console, suspects: Sequence[LabelError], class_names: dict[int, str]) -> None:
    counts = Counter(one.kind for one in suspects)
    listed = ", ".join(f"{kind} {counts[kind]:,}" for kind in KINDS if counts[kind])
    heading = f"{count_text(len(suspects), 'suspicious label')}{f': {listed}' if listed else ''}. The most certain come first."
    console.print(Text(heading, style="bold"), soft_wrap=True)
    if not suspects:
        return
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("", "kind", "score", "image", "label", "class", "model"):
        table.add_column(name, justify="right" if name in ("", "score") else "left")
    for place, one in enumerate(suspects[:_MOST_ROWS], 1):
        found = "" if one.model_box is None else f"{class_names[one.model_category_id]} {one.model_score:.2f}"
        found += "" if one.iou is None or one.model_box is None else f", IoU {one.iou:.2f}"
        texts = [one.file_name, "" if one.annotation is None else str(one.annotation)]
        texts += [class_names.get(one.category_id, ""), found]
        cells = [Text(shorten(text, _LONGEST)) for text in texts]
        table.add_row(str(place), one.kind, f"{one.score:.2f}", *cells)
    console.print(table)
