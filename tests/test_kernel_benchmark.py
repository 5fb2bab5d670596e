import json

import pytest

import kernel_benchmark
from helpers import needs_compiler
from kernel_benchmark import Arguments, inputs_of, main

pytestmark = needs_compiler


@pytest.fixture(autouse=True)
def small_maps(monkeypatch):
    monkeypatch.setattr(kernel_benchmark, "SHAPES", ((10, 13), (5, 7), (3, 4), (2, 2)))


def test_every_backend_is_timed_beside_the_reference(tmp_path, capsys):
    arguments = Arguments(rounds=2, batch_size=2, model=False, output=tmp_path / "new" / "kernels.jsonl")
    results = main(arguments)
    main(arguments)  # adds to the file
    lines = [json.loads(line) for line in arguments.output.read_text().splitlines()]
    assert len(lines) == 2 * len(results) == 2 * 2 * 3 * 3
    for row, line in zip(results, lines, strict=False):
        assert row.items() <= line.items()
        assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        assert row["milliseconds"] > 0
        assert row["backend"] != "reference" or row["ratio"] == 1
    assert lines[0]["batch_size"] == 2
    assert {row["backend"] for row in results} == {"reference", "torch", "cpu"}
    assert "encoder, forward and backward" in capsys.readouterr().out


def test_a_device_without_a_kernel_is_one_sentence(monkeypatch):
    monkeypatch.setattr(
        kernel_benchmark, "describe_backends", lambda: {"triton": "there is no CUDA device", "cpu": None}
    )
    with pytest.raises(SystemExit, match="the triton backend is not available: there is no CUDA device"):
        main(Arguments(device="cuda"))


def test_encoder_tokens_look_around_themselves_and_decoder_queries_anywhere():
    value, shapes, references, offsets, logits = inputs_of("encoder", Arguments())
    assert value.shape[1] == offsets.shape[1] == sum(height * width for height, width in shapes)
    assert references[0, 0, 0].tolist() == pytest.approx([0.5 / 13, 0.5 / 10])
    assert references[0, 12, 3].tolist() == pytest.approx([12.5 / 13, 0.5 / 10])
    _, _, references, offsets, logits = inputs_of("decoder", Arguments(dtype="bfloat16"))
    assert references.shape == (1, 900, 4, 4)
    assert logits.shape == offsets.shape[:-1] == (1, 900, 8, 4, 4)


@pytest.mark.parametrize("settings", [{"rounds": 0}, {"batch_size": 0}])
def test_numbers_that_measure_nothing_are_refused(settings):
    with pytest.raises(SystemExit, match="must be at least 1"):
        main(Arguments(**settings))
