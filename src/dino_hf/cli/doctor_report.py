"""Print the doctor's report in a terminal: statistics of the data, then the findings, the worst first."""

from collections.abc import Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..common.console import make_console
from ..common.text import count_text as number_of
from ..common.text import shorten
from ..doctor.checks import Report
from ..doctor.cleaned_copy import CleanedCopy
from ..doctor.data_statistics import SIZE_NAMES, aspect_texts, count_texts, relative_texts
from ..doctor.findings import Finding
from ..doctor.kinds import SEVERITIES

_STYLES = {"error": "bold red", "warning": "bold yellow", "note": "bold blue"}
_MOST_CLASSES = 15  # rows of the table of classes
_BAR = 16  # characters of a full bar
_MOST_SPLITS = 6  # columns of a table
_LONGEST = 200  # characters of a name or value; names from files can have any length
_MOST_SENTENCES = 20  # notes of the reader, and things that the copy could not correct


def print_report(report: Report, max_examples: int, notes: Sequence[str] = ()) -> None:
    """Print the statistics and findings of a data set.

    Args:
        max_examples: examples shown for each finding.
        notes: notes of the reader.
    """
    console = make_console(markup=True)
    console.print(Text(f"{report.origin}, in {report.format} format", style="bold"))
    for note in notes[:_MOST_SENTENCES]:
        console.print(Padding(Text(shorten(note, 5 * _LONGEST)), (0, 0, 0, 2), expand=False))
    if (more := len(notes) - _MOST_SENTENCES) > 0:
        console.print(Padding(Text(f"and {more:,} more notes"), (0, 0, 0, 2), expand=False))
    console.print(_splits_table(report.statistics))
    if report.statistics["classes"]:
        console.print(_classes_table(report.statistics))
    console.print(_boxes_table(report.statistics))
    for key, text in (("largest_image", "Largest image"), ("most_boxes", "Most boxes")):
        if image := report.statistics[key]:
            size = "size unknown" if image["width"] is None else f"{image['width']} x {image['height']}"
            file, split = shorten(str(image["file"]), _LONGEST), shorten(image["split"], _LONGEST)
            line = f"{text}: {file} of {split}, {size}, {number_of(image['boxes'], 'box')}"
            console.print(Text(line), soft_wrap=True)
    if not report.images_were_decoded:
        console.print(Text("Images were not opened, so damaged images, wrong sizes and copies were not looked for."))
    console.print()
    for finding in report.findings:
        _print_finding(console, finding, max_examples)
    console.print(Text(verdict(report), style="bold"))


def verdict(report: Report) -> str:
    counts = {name: sum(finding.severity == name for finding in report.findings) for name in SEVERITIES}
    parts = [number_of(count, name) for name, count in counts.items() if count]
    kinds = f" ({', '.join(parts)})" if parts else ""
    if counts["error"]:
        return f"The data have errors and cannot be used as they are{kinds}."
    if not report.images_were_decoded:
        return f"No error was found in the annotations; the images were not opened{kinds}."
    return f"Nothing was found that would stop training or falsify AP{kinds}."


def _print_finding(console: Console, finding: Finding, max_examples: int) -> None:
    heading = Text.assemble(
        (finding.severity, _STYLES[finding.severity]),
        " ",
        (finding.kind, "bold"),
        f" ({finding.count:,}): {finding.what}",
    )
    console.print(heading)
    for offender in finding.offenders[:max_examples]:
        # The message of a reading error already says where it is.
        texts = [offender.split, offender.where, offender.file, offender.value]
        texts = texts[3:] if texts[3].startswith(texts[1]) else texts
        texts = [shorten(text, _LONGEST) for text in texts if text]
        console.print(Padding(Text("  ".join(texts)), (0, 0, 0, 4), expand=False))
    if finding.count > max_examples:
        console.print(Padding(Text(f"and {finding.count - max_examples:,} more"), (0, 0, 0, 4), expand=False))
    fixed = " --fix does this." if finding.is_fixed else ""
    console.print(Padding(Text(f"{finding.cure}{fixed}", style="italic"), (0, 0, 0, 2), expand=False))
    console.print()


def _table(title: str, first: str, splits: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(first, overflow="ellipsis", no_wrap=True, max_width=30)
    for name in splits:
        table.add_column(Text(shorten(name, 40)), justify="right", no_wrap=True)
    return table


def _splits_table(statistics: dict) -> Table:
    table = _table("\nSplits", "", [])
    for name in ("images", "boxes", "crowds", "images without boxes"):
        table.add_column(name, justify="right")
    for name, counts in list(statistics["splits"].items())[: 4 * _MOST_SPLITS]:
        empty = counts["images_without_boxes"]
        share = f" ({100 * empty / counts['images']:.0f} %)" if empty else ""
        table.add_row(
            Text(shorten(name, 40)), *(f"{counts[key]:,}" for key in ("images", "boxes", "crowds")), f"{empty:,}{share}"
        )
    return table


def _classes_table(statistics: dict) -> Table:
    splits, classes = list(statistics["splits"])[:_MOST_SPLITS], statistics["classes"]
    totals = [sum(entry["boxes"].values()) for entry in classes]
    table = _table(f"\nBoxes of each class ({len(classes):,})", "class", ["id", *splits, ""])
    table.columns[-1].justify = "left"
    ordered = sorted(range(len(classes)), key=lambda place: -totals[place])
    shown = ordered
    if len(ordered) > _MOST_CLASSES:
        shown = [*ordered[: 2 * _MOST_CLASSES // 3], None, *ordered[-(_MOST_CLASSES // 3) :]]
    for place in shown:
        if place is None:
            table.add_row(f"… {len(ordered) - len(shown) + 1} more")
            continue
        counts = [f"{classes[place]['boxes'][name]:,}" for name in splits]
        bar = _bar(totals[place], max(totals))
        table.add_row(
            Text(shorten(" ".join(classes[place]["name"].split()), _LONGEST)), str(classes[place]["id"]), *counts, bar
        )
    return table


def _boxes_table(statistics: dict) -> Table:
    """The distributions of box sizes, box shapes and boxes per image, as shares of each split."""
    splits, edges = list(statistics["splits"])[:_MOST_SPLITS], statistics["edges"]
    table = _table("\nBoxes by size and shape, images by number of boxes", "", [*splits, ""])
    table.columns[-1].justify = "left"
    areas = ["small, < 32² pixels", "medium", "large, > 96² pixels"]
    by_size = {name: [counts[size] for size in SIZE_NAMES] for name, counts in statistics["sizes"].items()}
    relative = relative_texts(edges["relative_sizes"])
    sections = [
        ("area", areas, by_size),
        ("√(box area / image area)", relative, statistics["relative_sizes"]),
        ("width : height", aspect_texts(edges["aspect_ratios"]), statistics["aspect_ratios"]),
        ("boxes per image", count_texts(edges["boxes_per_image"]), statistics["boxes_per_image"]),
    ]
    for title, texts, counts in sections:
        of_all = [sum(of_split) for of_split in zip(*counts.values(), strict=True)]
        filled = [place for place, count in enumerate(of_all) if count]
        if not filled:
            continue
        table.add_row(Text(title, style="italic"))
        for place in range(filled[0], filled[-1] + 1):
            shares = [_percent(counts[name][place], sum(counts[name])) for name in splits]
            table.add_row(f"  {texts[place]}", *shares, _bar(of_all[place], max(of_all)))
    return table


def _percent(count: int, total: int) -> str:
    share = 100 * count / max(total, 1)
    return f"{share:.0f} %" if share >= 1 or not count else "< 1 %"


def _bar(count: int, most: int) -> str:
    if not count:
        return ""
    eighths = max(1, round(8 * _BAR * count / most))
    return "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8]).strip()


def print_copy(copy: CleanedCopy, report: Report) -> None:
    """Print a summary of a cleaned copy: its changes, the data left out, and the remaining errors.

    Args:
        report: report of the copy.
    """
    console = make_console(markup=True)
    console.print()
    console.print(Text(f"Cleaned copy in {copy.folder}: {'; '.join(copy.size_texts)}.", style="bold"))
    changes = f"{number_of(len(copy.changes), 'change')}, listed in {copy.folder / 'CHANGES.txt'}."
    console.print(Text(changes), soft_wrap=True)
    for number, text in enumerate(copy.left_out_texts):
        console.print(Padding(Text(text), (0, 0, 0, 2 if number else 0), expand=False))
    for text in copy.kept[:_MOST_SENTENCES]:
        console.print(Padding(Text(shorten(text, 5 * _LONGEST)), (0, 0, 0, 2), expand=False))
    if (more := len(copy.kept) - _MOST_SENTENCES) > 0:
        console.print(Padding(Text(f"and {more:,} more sentences in CHANGES.txt"), (0, 0, 0, 2), expand=False))
    for finding in report.findings:
        if finding.severity == "error":
            _print_finding(console, finding._replace(is_fixed=False), 3)  # because it was not fixed in the copy
    console.print(Text(_verdict_of_copy(copy, report), style="bold"))


def _verdict_of_copy(copy: CleanedCopy, report: Report) -> str:
    if report.has_errors:
        return "The copy still has errors that only you can correct."
    if copy.num_unread:
        return f"The copy has no errors. It lacks {copy.num_unread:,} images and entries that could not be read."
    return "The copy has no errors."
