"""The check of the CUDA kernels: what it keeps of parts that pass, fail and hang. The parts themselves need a GPU."""

import json
import sys
import time

import pytest

import gpu_check
from gpu_check import Arguments, Part

ROW = "import sys, json; print(json.dumps({'ratio': 3}), file=open(sys.argv[1], 'a')); print('said')"


@pytest.fixture
def with_parts(monkeypatch):
    def use(make):
        monkeypatch.setattr(gpu_check, "parts", make)
        monkeypatch.setattr(gpu_check, "machine", lambda device: {"device": f"a {device} GPU"})

    return use


def test_without_a_gpu_it_says_so_in_one_sentence(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="error: torch finds no CUDA device"):
        gpu_check.main()


def test_rows_and_output_of_each_part_are_kept(tmp_path, with_parts, capsys):
    with_parts(lambda folder: [Part("one", 60, ["-c", ROW, str(folder / "rows.jsonl")], "rows.jsonl")])
    for _ in range(2):  # rows of an earlier check are no rows of this one
        report = gpu_check.check(Arguments(tmp_path / "check.json", 60))
    assert json.loads((tmp_path / "check.json").read_text()) == report
    assert report["passed"]
    assert report["machine"] == {"device": "a cuda GPU"}
    assert report["parts"][0]["rows"] == [{"ratio": 3}]
    assert report["parts"][0]["output"] == "said\n"
    assert "all passed" in capsys.readouterr().out


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(tmp_path, with_parts):
    hanging = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(300)'])"
    with_parts(
        lambda folder: [
            Part("fails", 60, ["-c", "raise ValueError('no kernel image')"]),
            Part("hangs", 2, ["-c", hanging]),
            Part("passes", 60, ["-c", "print('ok')"]),
        ]
    )
    start = time.monotonic()
    report = gpu_check.check(Arguments(tmp_path / "check.json", 100))
    assert time.monotonic() - start < 30
    assert [(part["exit_code"], part["timed_out"]) for part in report["parts"]] == [
        (1, False),
        (None, True),
        (0, False),
    ]
    assert "no kernel image" in report["parts"][0]["output"]
    assert not report["passed"]


def test_what_there_is_no_time_for_is_named(tmp_path, with_parts):
    with_parts(lambda folder: [Part("one", 60, ["-c", "print('ok')"]), Part("two", 60, ["-c", "print('ok')"])])
    report = gpu_check.check(Arguments(tmp_path / "check.json", 10))
    assert [part["name"] for part in report["parts"]] + report["left_out"] == ["one", "two"] or report["left_out"] == [
        "one",
        "two",
    ]
    assert report["left_out"]
    assert not report["passed"]


def test_all_parts_are_commands_of_this_repository(tmp_path):
    found = gpu_check.parts(tmp_path)
    assert sum(part.seconds for part in found) < 12 * 60
    assert Arguments().seconds < 8 * 60
    for part in found:
        if part.command[0].endswith(".py"):
            assert (gpu_check.ROOT / part.command[0]).is_file()
