"""Write the tables and pictures of docs/speed.md from the saved results of the benchmarks.

python benchmarks/report.py

A table is written between the comments `<!-- NAME DEVICE -->` and `<!-- end -->`, where DEVICE is cpu or cuda. Without results, the
old text stays. Only results from the machine and versions of the newest result are used, and of these the newest ones.
"""

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from common import parse
from detectors import DEFORMABLE, DINO, REFERENCE
from dino_hf.common.drawing import plot_style
from pictures import by_case, save_inference, save_scaling

_BLOCK = re.compile(r"(<!-- (\w+) (cpu|cuda) -->\n).*?(<!-- end -->)", re.DOTALL)
_MACHINE = ("device", "threads", "torch", "transformers")


@dataclass
class ReportArguments:
    """Write tables and pictures."""

    results: Path = field(default=Path("outputs/benchmarks"), metadata={"help": "folder with the saved results"})
    page: Path = field(default=Path("docs/speed.md"), metadata={"help": "page to write the tables into"})
    images: Path = field(default=Path("docs/images"), metadata={"help": "folder for the pictures"})


def read_rows(folder: Path, benchmark: str, device: str) -> list[dict]:
    """Read the newest rows of a benchmark, in the order of their first measurement."""
    path = folder / f"{benchmark}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [row for row in map(json.loads, lines) if row["device_type"] == device and not row["quick"]]
    rows = [row for row in rows if all(row[name] == rows[-1][name] for name in _MACHINE)]
    newest = {}
    for row in rows:
        newest[json.dumps(row["case"]), row["candidate"]] = row
    return [row for row in newest.values() if "error" not in row]


def cell(row: dict, other: str) -> str:
    """The speedup over another candidate, with its spread if there are several rounds."""
    ratio = row.get("times_faster_than", {}).get(other)
    if ratio is None:
        return ""
    median, lowest, highest = (f"{one:.2f}" if one < 10 else f"{one:.1f}" for one in ratio)
    return f"**{median}**" if row["rounds"] == 1 else f"**{median}** ({lowest} to {highest})"


def memory(row: dict, name: str = "temporary_MiB") -> str:
    return "" if row.get(name) is None else f"{row[name]:,.0f}"


def table(heads: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *map(list, lines)]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def measured_on(rows: list[dict]) -> str:
    about, rounds = rows[-1], sorted({row["rounds"] for row in rows if "rounds" in row})
    many = " to ".join(map(str, sorted({rounds[0], rounds[-1]}))) if rounds else ""
    spread = f"; {many} round{'' if many == '1' else 's'}" if rounds else ""
    threads = f"{about['threads']} thread{'' if about['threads'] == 1 else 's'}, "
    where = f"{about['device']}, {threads if about['device_type'] == 'cpu' else ''}"
    return f"\n{where}torch {about['torch'].split('+')[0]}, transformers {about['transformers']}, {about['date']}{spread}.\n"


def inference_table(rows: list[dict]) -> str:
    base, reference = (f"{name}, float32, eager" for name in (DEFORMABLE, REFERENCE))
    lines = []
    for case, candidates in by_case(rows):
        for name, row in candidates.items():
            if name == base:
                continue
            of_base = memory(candidates.get(base, {}))
            lines.append(
                [
                    case["model"],
                    case["size"],
                    case["batch_size"],
                    name,
                    cell(row, base),
                    "" if name == reference else cell(row, reference),
                    f"{memory(row)} / {of_base}" if of_base else memory(row),
                ]
            )
    heads = ["model", "pixels", "batch", "what", "faster than Deformable DETR", "than the reference attention"]
    return table([*heads, "MiB"], lines)


def gpu_inference_table(rows: list[dict]) -> str:
    lines = [
        [
            case["model"],
            case["size"],
            case["batch_size"],
            f"{row['dtype']}, {row['mode']}",
            f"{row['images_per_second']:.1f}",
            cell(row, f"{DEFORMABLE}, {row['dtype']}, {row['mode']}"),
            cell(row, f"{REFERENCE}, {row['dtype']}, eager"),
            f"{100 * row['arithmetic_share']:.0f} %",
            f"{100 * row['bandwidth_share']:.0f} %" if row["mode"] == "eager" else "",
            memory(row),
        ]
        for case, candidates in by_case(rows)
        for row in candidates.values()
        if row["detector"] == DINO
    ]
    heads = [
        "model",
        "pixels",
        "batch",
        "DINO in",
        "images/s",
        "faster than Deformable DETR",
        "than the reference attention",
    ]
    return table([*heads, "of arithmetic", "of bandwidth", "MiB"], lines)


def training_table(rows: list[dict]) -> str:
    lines, sentences = [], []
    for case, candidates in by_case(rows):
        for name in (DINO, REFERENCE, DEFORMABLE):
            row = candidates[name]
            lines.append(
                [
                    f"{case['batch_size']} x {case['size']}, {case['num_boxes']} boxes, {case['dtype']}, {case['mode']}",
                    name,
                    cell(row, DEFORMABLE),
                    cell(row, REFERENCE),
                    memory(row, "peak_MiB"),
                ]
            )
        share, lowest, highest = (100 * one for one in candidates["loss of DINO alone"]["share_of_step"])
        sentences.append(
            f"\nThe loss, forward and backward, is {share:.1f} % ({lowest:.1f} to {highest:.1f}) of DINO's step ({case['dtype']}, "
            f"{case['mode']}).\n"
        )
    heads = ["images", "what", "faster than Deformable DETR", "than the reference attention", "peak MiB"]
    return table(heads, lines) + "".join(sentences)


def pairs_table(title: Callable[[dict], str], ours: str, theirs: str) -> Callable[[list[dict]], str]:
    """Make a function that writes the table of one candidate and one baseline. `title` names a case."""

    def make(rows: list[dict]) -> str:
        lines = [
            [
                title(case),
                cell(candidates[ours], theirs),
                f"{memory(candidates[ours])} / {memory(candidates[theirs])}",
            ]
            for case, candidates in by_case(rows)
        ]
        return table(["", f"{ours}, faster than {theirs}", "MiB"], lines)

    return make


def image_table(rows: list[dict]) -> str:
    lines = [
        [case["inputs"], library, cell(candidates[f"{DINO}, {library}"], f"{DEFORMABLE}, {library}")]
        for case, candidates in by_case(rows)
        for library in ("torchvision", "PIL")
    ]
    return table(["", "on", "DINO, faster than Deformable DETR"], lines)


def accuracy_table(rows: list[dict]) -> str:
    lines = [
        [row["candidate"], *(f"{100 * row[name]:.2f}" for name in ("AP", "AP50", "AP75")), _difference(row)]
        for _, candidates in by_case(rows)
        for row in candidates.values()
    ]
    return table(["weights in", "AP", "AP50", "AP75", "difference in AP"], lines)


def _difference(row: dict) -> str:
    if "difference" not in row:
        return ""
    low, high = (100 * bound for bound in row["interval_95"])
    return f"{100 * row['difference']:+.2f} ({low:+.2f} to {high:+.2f})"


_TABLES: dict[str, Callable[[list[dict]], str]] = {
    "inference": inference_table,
    "training_step": training_table,
    "loss": pairs_table(
        lambda case: f"2 images of {case['num_boxes']} boxes, {case['num_queries']} queries", DINO, DEFORMABLE
    ),
    "image_processing": image_table,
    "pipeline": pairs_table(
        lambda case: f"batch {case['batch_size']}, shorter side {case['shortest_edge']}, {case['dtype']}",
        DINO,
        DEFORMABLE,
    ),
    "coco_evaluation": pairs_table(
        lambda case: (
            f"{case['num_images']:,} images, {case['num_classes']} classes, {case['num_detections']} detections each"
        ),
        "CocoEvaluator",
        "pycocotools",
    ),
    "scaling": lambda rows: "",
    "bf16_accuracy": accuracy_table,
}
_PICTURES = {
    "inference": (save_inference, "Times faster than Deformable DETR"),
    "scaling": (save_scaling, "Cost over pixels, queries and boxes"),
}


def block(benchmark: str, device: str, arguments: ReportArguments) -> str | None:
    """The text between two comments. None if there are no results."""
    if benchmark not in _TABLES:
        raise SystemExit(
            f"error: {arguments.page} has a place for the unknown benchmark {benchmark!r}; known are {', '.join(_TABLES)}."
        )
    rows = read_rows(arguments.results, benchmark, device)
    if not rows:
        return None
    text = (gpu_inference_table if (benchmark, device) == ("inference", "cuda") else _TABLES[benchmark])(rows)
    if benchmark in _PICTURES:
        save, title = _PICTURES[benchmark]
        path = arguments.images / f"speed_{benchmark}{'' if device == 'cpu' else '_' + device}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with plot_style():
            save(path, rows)
        text = (
            f"![{title}]({Path(os.path.relpath(path, arguments.page.parent)).as_posix()})\n\n{text}".rstrip("\n") + "\n"
        )
    return text + measured_on(rows)


def main() -> None:
    arguments = parse(ReportArguments)
    if not arguments.page.is_file():
        raise SystemExit(
            f"error: there is no page {arguments.page} to write tables into; run this in the repository, or use --page."
        )
    page = arguments.page.read_text(encoding="utf-8")
    written = []

    def fill(match: re.Match) -> str:
        new = block(match[2], match[3], arguments)
        if new is None:
            return match[0]
        written.append(f"{match[2]} ({match[3]})")
        return f"{match[1]}{new}{match[4]}"

    new_page = _BLOCK.sub(fill, page)
    arguments.page.write_text(new_page, encoding="utf-8")
    print(f"{arguments.page}: {', '.join(written) or 'nothing was measured yet'}")


if __name__ == "__main__":
    main()
