"""Ratios are of neighbouring runs, memory is what grows during a call."""

import json
from pathlib import Path

import pytest
import torch

import measuring
from measuring import append_rows, resident_memory, restart_peak, side_by_side, spread, temporary_memory

needs_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")


@pytest.fixture
def called(monkeypatch):
    """Names in the order of the calls; a clock on which every call takes what its name says, growing from round to round."""
    calls = []

    def seconds(function, device):
        function()
        return {"fast": 1.0, "slow": 3.0, "slower": 5.0}[calls[-1]] * (1 + len(calls))

    monkeypatch.setattr(measuring, "seconds", seconds)
    return calls


def test_each_round_runs_every_candidate_once_in_an_order_that_goes_round(called):
    candidates = {name: lambda name=name: called.append(name) for name in ("fast", "slow", "slower")}
    side_by_side(candidates, rounds=4, memory=False)
    assert called[:3] == ["fast", "slow", "slower"]  # warm-ups
    rounds = [called[start : start + 3] for start in range(3, 15, 3)]
    first = ["fast", "slow", "slower"]
    assert rounds == [first, [*first[1:], first[0]], [first[2], *first[:2]], first]


def test_ratios_are_those_within_a_round(called):
    candidates = {name: lambda name=name: called.append(name) for name in ("fast", "slow")}
    fast, slow = side_by_side(candidates, rounds=3, warm_ups=0, memory=False)
    # On a clock that counts calls: 3 * 3 / 2, 3 * 4 / 5, 3 * 7 / 6
    assert fast["times_faster_than"]["slow"] == [3.5, 2.4, 4.5]
    assert slow["times_faster_than"]["fast"] == pytest.approx([1 / 3.5, 1 / 4.5, 1 / 2.4], rel=1e-3)
    assert (fast["milliseconds_min"], fast["milliseconds"], fast["milliseconds_max"]) == (2000, 5000, 6000)
    assert "temporary_MiB" not in fast


@needs_linux
@pytest.mark.parametrize("apart", [True, False])
def test_memory_is_measured_before_the_rounds_or_in_the_first(apart):
    calls = []
    rows = side_by_side({"a": lambda: calls.append(torch.ones(2**22)[:1])}, rounds=2, warm_ups=0, apart=apart)
    assert len(calls) == 2 + apart
    assert rows[0]["temporary_MiB"] == pytest.approx(16, abs=2)


@needs_linux
def test_temporary_memory_is_without_what_is_returned():
    torch.ones(2**22).sum()  # what is loaded when it is needed first
    assert temporary_memory(lambda: torch.ones(2**22) + 1, "cpu") == pytest.approx(16, abs=2)  # float32, 16 MiB each
    assert temporary_memory(lambda: (torch.ones(2**22), torch.ones(2**22)), "cpu") == pytest.approx(0, abs=2)


@needs_linux
def test_a_peak_counts_from_where_it_was_restarted():
    torch.ones(2**23).sum()
    restart_peak()
    before = resident_memory()
    assert resident_memory("VmHWM") - before < 2**21
    torch.ones(2**22).sum()
    assert 15 * 2**20 < resident_memory("VmHWM") - before < 18 * 2**20


def test_memory_is_unknown_where_the_system_does_not_tell(monkeypatch):
    def refuse(*key):
        raise FileNotFoundError("no /proc")

    monkeypatch.setattr(measuring, "resident_memory", refuse)
    monkeypatch.setattr(measuring.ctypes, "CDLL", lambda name: pytest.fail("Windows has no library without a name"))
    row = side_by_side({"a": lambda: None}, rounds=1)[0]
    assert row["temporary_MiB"] is None


def test_a_spread_is_median_smallest_and_largest():
    assert spread([3.0, 1.0, 2.0, 10.0]) == [2.5, 1.0, 10.0]


def test_rows_are_added_with_the_machine_and_the_settings(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    append_rows(path, [{"a": 1}], "cpu", dtype="float32")
    append_rows(path, [{"a": 2}, {"a": 3}], "cpu")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["a"] for row in rows] == [1, 2, 3]
    assert rows[0]["dtype"] == "float32"
    assert rows[0]["torch"] == torch.__version__
    assert rows[0]["device_type"] == "cpu"
    assert rows[0]["threads"] == torch.get_num_threads()
