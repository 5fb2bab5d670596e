"""`dino-hf models`: all published checkpoints, found by words, without torch."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from dino_hf.cli.app import app
from dino_hf.conversion import by_name
from dino_hf.conversion.published import PUBLISHED, find_published


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DINO_HF_CACHE", str(tmp_path / "cache"))


def run(*arguments):
    result = CliRunner().invoke(app, ["models", *arguments])
    return result.exit_code, result.stdout, result.stderr


def lines_of(output):
    """name -> the other columns"""
    rows = [line.split(maxsplit=1) for line in output.split("\n\n")[0].splitlines()[1:]]
    return {name: [text.strip() for text in rest.split("  ") if text.strip()] for name, rest in rows if name != "or"}


def test_every_checkpoint_is_listed_with_what_is_known():
    code, output, _ = run()
    rows = lines_of(output)
    assert code == 0
    assert list(rows) == [row.title for row in PUBLISHED]
    for row in PUBLISHED:
        texts = rows[row.title]
        ap = "none" if row.ap is None else f"{row.ap:.1f}" + (" LVIS" if "lvis" in row.name else "")
        assert texts[:4] == [row.backbone, str(row.num_levels), ap, row.post_processing]
        expected = "not supported" if not row.is_supported else "download" if row.addresses else "browser"
        assert texts[-2:] == [row.license or "not stated", expected]
    assert [rows[f"codetr/co_dino_5scale_{name}"][3] for name in ("r50_1x_coco", "lsj_r50_3x_coco")] == [
        "soft NMS 0.8",
        "soft NMS 0.8, canvas 1024",
    ]
    assert rows["codetr/co_dino_5scale_swin_large_16e_o365tococo"][2:4] == ["64.1", "soft NMS 0.8, images 1280 to 2048"]
    assert rows["detrex/dino_r50_4scale_24ep"][3] == "plain"
    assert "2616" in rows["original/swin_l_5scale_36ep"]
    assert "or detrex/dino_r50_4scale_12ep\n" in "\n".join(line.rstrip() for line in output.splitlines()) + "\n"


def test_the_link_to_the_wrong_file_is_named_where_its_rows_are_listed():
    assert "60.7 AP, by mistake" in run("lsj_swin_large_1x")[1]
    assert "gives the file of 59.3 AP" in run("lsj_swin_large_3x_coco")[1]
    assert "by mistake" not in run("detrex")[1]


def test_words_narrow_the_list():
    names = list(lines_of(run("SWIN", "5scale")[1]))
    assert names == [row.title for row in PUBLISHED if row.backbone.startswith("Swin") and row.num_levels == 5]
    assert list(lines_of(run("better_hyper")[1])) == [find_published("detrex/dino_r50_4scale_12ep_better_hyper").title]
    code, output, error = run("swin", "yolo")
    assert (code, output) == (1, "")
    assert error == "error: No published checkpoint has 'swin' and 'yolo'; `dino-hf models` lists all.\n"


def test_a_converted_checkpoint_is_here(monkeypatch):
    row = find_published("mmdet/dino-4scale_r50_8xb2-12e_coco")
    monkeypatch.setattr(by_name, "is_cached", lambda one: one == row)
    assert lines_of(run("mmdet")[1])[row.title][-1] == "here"
    found = {one["name"]: one["folder"] for one in json.loads(run("mmdet", "--json")[1])}
    assert {name for name, folder in found.items() if folder} == {row.title}
    assert found[row.title] == str(by_name.cached_folder(row))


def test_json_has_everything():
    rows = json.loads(run("--json")[1])
    assert len(rows) == len(PUBLISHED)
    for found, row in zip(rows, PUBLISHED, strict=True):
        assert found["name"] == row.title
        assert found["other_names"] == list(row.titles[1:])
        assert found["addresses"] or found["page"]
        assert (found["size"], found["published_ap"], found["license"]) == (row.size, row.ap, row.license)
        assert (found["ap_data"], found["post_processing"], found["note"] or "") == (
            row.ap_data,
            row.post_processing,
            row.note,
        )
        assert found["image_processor"] == row.processor
        assert found["folder"] is None


def test_it_does_not_wait_for_torch():
    code = (
        "import sys; from dino_hf.cli.app import app\n"
        "try: app(['models', 'swin'])\n"
        "except SystemExit as end: assert not end.code\n"
        "print(sorted({'torch', 'transformers', 'torchvision', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
