"""The benchmarks run, at toy size: their figures are for docs/log.md."""

import json

import pytest

import ablation
import loss as loss_benchmark


def test_the_ablation_trains_every_variant_once_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    settings = {"num_train_images": 6, "num_eval_images": 4, "steps": 2, "batch_size": 2, "learning_rate": 1e-3}
    options = (x for name, value in settings.items() for x in (f"--{name}", str(value)))
    monkeypatch.setattr("sys.argv", ["ablation", "--output_dir", str(tmp_path), "--seeds", "2", *options])
    scores = {"seed": 0, "AP": 0.25, "AP50": 0.5}
    done = [{"variant": name, "settings": settings, **scores} for name in list(ablation.VARIANTS)[:3]]
    others = [{"variant": "DINO", "settings": settings | {"steps": 9}, **scores}]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in done + others))
    ablation.main()
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    pairs = [(one["variant"], one["seed"]) for one in runs if one["settings"] == settings]
    assert sorted(pairs) == sorted((name, seed) for name in ablation.VARIANTS for seed in range(2))
    table = capsys.readouterr().out.strip().splitlines()[-6:]
    assert [line.split(" | ")[0].removeprefix("| ") for line in table[2:]] == list(ablation.VARIANTS)


def test_the_table_of_the_ablation_compares_runs_of_one_seed():
    runs = [
        {"variant": variant, "seed": seed, "AP": ap, "AP50": 2 * ap}
        for variant, scores in {"DINO": (0.30, 0.40), "without denoising": (0.25, 0.33)}.items()
        for seed, ap in enumerate(scores)
    ]
    rows = ablation.table(runs).splitlines()[2:]
    assert rows[0] == "| DINO | 35.0 (30.0 to 40.0) | 70.0 |  |"
    assert rows[1] == "| without denoising | 29.0 (25.0 to 33.0) | 58.0 | -6.0 ± 1.0 |"


@pytest.mark.parametrize("num_boxes", [20, 3])
def test_both_losses_of_the_benchmark_are_equal(num_boxes, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["loss", "--rounds", "1", "--num_boxes", str(num_boxes)])
    loss_benchmark.main()
    printed = capsys.readouterr().out
    assert float(printed.split("relative difference ")[1].split()[0]) < 1e-6
    assert "times faster" in printed
