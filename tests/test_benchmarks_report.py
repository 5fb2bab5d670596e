"""The tables of docs/speed.md are made of the newest rows, between their comments, and nothing else is touched."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import report
from measuring import spread

PAGE = Path(__file__).parents[1] / "docs" / "speed.md"
ABOUT = {
    "device_type": "cpu",
    "device": "A CPU",
    "threads": 2,
    "torch": "2.15.0+cpu",
    "transformers": "5.23.0",
    "date": "2026-11-21",
    "quick": False,
}


def rows_of(case: dict, seconds: dict[str, list[float]], **more) -> list[dict]:
    """What `side_by_side` would give for candidates that took so many seconds in each round."""
    return [
        {
            "case": case,
            "candidate": name,
            "rounds": len(times),
            "milliseconds": 1e3 * spread(times)[0],
            "times_faster_than": {
                other: spread([base / own for base, own in zip(seconds[other], times, strict=True)])
                for other in seconds
                if other != name
            },
            "temporary_MiB": 100.4 * len(name),
            **more,
            **ABOUT,
        }
        for name, times in seconds.items()
    ]


def write(folder: Path, benchmark: str, rows: list[dict]) -> None:
    folder.mkdir(exist_ok=True)
    with (folder / f"{benchmark}.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def inference_rows(ours: float = 2.0, **about) -> list[dict]:
    case = {"model": "r50-4scale", "size": "800x1333", "batch_size": 1}
    seconds = {
        "DINO, float32, eager": [ours, ours],
        "DINO with reference attention, float32, eager": [5.0, 6.0],
        "Deformable DETR, float32, eager": [10.0, 11.0],
    }
    rows = rows_of(case, seconds)
    for row in rows:
        row["detector"], row["dtype"], row["mode"] = row["candidate"].split(", ")
    return [row | about for row in rows]


def make_report(monkeypatch, tmp_path, page: str) -> str:
    path = tmp_path / "docs" / "page.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(page)
    options = {"results": tmp_path / "results", "page": path, "images": path.parent / "images"}
    arguments = [str(one) for name, value in options.items() for one in (f"--{name}", value)]
    monkeypatch.setattr("sys.argv", ["report", *arguments])
    report.main()
    return path.read_text()


def test_a_table_stands_between_its_comments_and_the_rest_stays(tmp_path, monkeypatch, capsys):
    write(tmp_path / "results", "inference", inference_rows())
    page = "a\n<!-- inference cpu -->\nold\n<!-- end -->\nb\n<!-- loss cpu -->\nnot measured\n<!-- end -->\nc\n"
    made = make_report(monkeypatch, tmp_path, page)
    assert made.startswith(
        "a\n<!-- inference cpu -->\n![Times faster than Deformable DETR](images/speed_inference.png)\n"
    )
    assert made.endswith("<!-- end -->\nb\n<!-- loss cpu -->\nnot measured\n<!-- end -->\nc\n")
    assert "old" not in made
    assert (
        "| r50-4scale | 800x1333 | 1 | DINO, float32, eager | **5.25** (5.00 to 5.50) | **2.75** (2.50 to 3.00) | 2,008 / 3,112 |\n"
        in made
    )
    assert "\nA CPU, 2 threads, torch 2.15.0, transformers 5.23.0, 2026-11-21; 2 rounds.\n" in made
    assert "inference (cpu)" in capsys.readouterr().out
    assert make_report(monkeypatch, tmp_path, made) == made


def test_the_newest_row_of_each_candidate_counts(tmp_path, monkeypatch):
    write(tmp_path / "results", "inference", inference_rows(ours=4.0))
    write(tmp_path / "results", "inference", inference_rows(ours=2.5))
    write(tmp_path / "results", "inference", inference_rows(ours=1.0, quick=True))
    rows = report.read_rows(tmp_path / "results", "inference", "cpu")
    assert [row["milliseconds"] for row in rows if row["detector"] == "DINO"] == [2500]
    write(tmp_path / "results", "inference", [inference_rows(ours=3.0, torch="2.16.0")[0]])
    assert len(report.read_rows(tmp_path / "results", "inference", "cpu")) == 1  # others were of another version
    failed = inference_rows(torch="2.16.0")[0] | {"error": "OutOfMemoryError: no memory left"}
    write(tmp_path / "results", "inference", [failed])
    assert report.read_rows(tmp_path / "results", "inference", "cpu") == []
    assert report.read_rows(tmp_path / "results", "inference", "cuda") == []


def test_every_table_of_the_page_is_made(tmp_path, monkeypatch):
    results = tmp_path / "results"
    pair = {"DINO": [1.0, 1.0, 1.0], "Deformable DETR": [3.0, 4.0, 5.0]}
    write(results, "inference", inference_rows())
    on_gpu = [row | {"device_type": "cuda", "device": "A GPU"} for row in inference_rows()]
    shares = {"images_per_second": 123.4, "arithmetic_share": 0.31, "bandwidth_share": 0.52}
    write(results, "inference", [row | shares for row in on_gpu])
    step = {
        "model": "r50-4scale",
        "size": "480x640",
        "batch_size": 2,
        "num_boxes": 20,
        "dtype": "float32",
        "mode": "eager",
    }
    reference = {"DINO with reference attention": [2.0, 2.0, 2.0], "loss of DINO alone": [0.04, 0.04, 0.05]}
    steps = rows_of(step, pair | reference, peak_MiB=1234.5)
    steps[-1]["share_of_step"] = [0.04, 0.04, 0.05]
    write(results, "training_step", steps + [row | {"device_type": "cuda"} for row in steps])
    write(results, "loss", rows_of({"num_boxes": 20, "num_queries": 900}, pair))
    write(results, "pipeline", rows_of({"batch_size": 4, "shortest_edge": 480, "dtype": "float32"}, pair))
    libraries = {f"{name}, {library}": times for library in ("torchvision", "PIL") for name, times in pair.items()}
    write(results, "image_processing", rows_of({"inputs": "image"}, libraries))
    evaluation = {"num_images": 5000, "num_classes": 80, "num_detections": 50}
    write(results, "coco_evaluation", rows_of(evaluation, {"CocoEvaluator": [2.0], "pycocotools": [3.0]}))
    write_scaling(results)
    accuracy = [{"candidate": "float32", "AP": 0.641}, {"candidate": "bfloat16", "AP": 0.64, "difference": -0.001}]
    more = {"case": {"images": 200}, "AP50": 0.8, "AP75": 0.7, "interval_95": [-0.004, 0.003], **ABOUT}
    write(results, "bf16_accuracy", [row | more for row in accuracy])

    made = make_report(monkeypatch, tmp_path, PAGE.read_text())
    blocks = {match[2] + " " + match[3]: match[0] for match in report._BLOCK.finditer(made)}
    assert not any("Not measured" in block for block in blocks.values())
    assert (
        "| float32, eager | 123.4 | **5.25** (5.00 to 5.50) | **2.75** (2.50 to 3.00) | 31 % | 52 % |"
        in (blocks["inference cuda"])
    )
    assert "| DINO | **4.00** (3.00 to 5.00) | **2.00** (2.00 to 2.00) | 1,234 |" in blocks["training_step cpu"]
    assert "is 4.0 % (4.0 to 5.0) of DINO's step" in blocks["training_step cpu"]
    assert "| 2 images of 20 boxes, 900 queries | **4.00** (3.00 to 5.00) | 402 / 1,506 |" in blocks["loss cpu"]
    assert "| batch 4, shorter side 480, float32 | **4.00** (3.00 to 5.00) |" in blocks["pipeline cpu"]
    assert "| image | PIL | **4.00** (3.00 to 5.00) |" in blocks["image_processing cpu"]
    assert "| 5,000 images, 80 classes, 50 detections each | **1.50** |" in blocks["coco_evaluation cpu"]
    assert "| bfloat16 | 64.00 | 80.00 | 70.00 | -0.10 (-0.40 to +0.30) |" in blocks["bf16_accuracy cpu"]
    assert blocks["scaling cpu"].startswith("<!-- scaling cpu -->\n![Cost over pixels, queries and boxes](images/")
    pictures = sorted(path.name for path in (tmp_path / "docs" / "images").iterdir())
    assert pictures == ["speed_inference.png", "speed_inference_cuda.png", "speed_scaling.png"]
    for name in pictures:
        pixels = np.asarray(Image.open(tmp_path / "docs" / "images" / name).convert("RGB"))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50  # something is drawn


def write_scaling(results: Path) -> None:
    sizes = {"320x480": 320 * 480, "640x960": 640 * 960}
    seconds = {
        f"{name}, {size}": [scale * pixels] * 2
        for name, scale in (("DINO", 1.0), ("Deformable DETR", 3.0))
        for size, pixels in sizes.items()
    }
    rows = rows_of({"over": "pixels"}, seconds)
    for row, pixels in zip(rows, [*sizes.values()] * 2, strict=True):
        row |= {"detector": row["candidate"].split(",")[0], "pixels": pixels}
    write(results, "scaling", rows)
    rows = rows_of(
        {"over": "queries", "size": "480x640"}, {f"DINO, {n} queries": [1 + n / 1e3] * 2 for n in (100, 900)}
    )
    for row, number in zip(rows, (100, 900), strict=True):
        row |= {"detector": "DINO", "num_queries": number}
    write(results, "scaling", rows)
    parts = {
        f"{part}, {n} boxes": [scale * (100 + n)] * 2 for part, scale in (("step", 20), ("loss", 1)) for n in (2, 500)
    }
    rows = rows_of({"over": "boxes", "size": "320x480"}, parts)
    for row in rows:
        part, number = re.match(r"(\w+), (\d+)", row["candidate"]).groups()
        row |= {"part": part, "num_boxes": int(number)}
    write(results, "scaling", rows)


def test_a_page_that_is_not_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["report", "--page", str(tmp_path / "none.md")])
    with pytest.raises(SystemExit, match=r"error: there is no page .*none\.md to write tables into"):
        report.main()


def test_a_place_for_what_is_not_measured_is_refused(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="has a place for the unknown benchmark 'speed'; known are inference, "):
        make_report(monkeypatch, tmp_path, "<!-- speed cpu -->\n<!-- end -->\n")


def test_the_makefile_runs_every_script_that_the_page_names():
    makefile = (PAGE.parents[1] / "Makefile").read_text()
    run = set(re.search(r"^BENCHMARKS := (.*)$", makefile, re.MULTILINE)[1].replace(",", " ").replace(")", " ").split())
    named = {match[2] for match in report._BLOCK.finditer(PAGE.read_text())}
    assert named - run == {"bf16_accuracy"}  # needs a trained detector
