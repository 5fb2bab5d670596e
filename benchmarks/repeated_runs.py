"""Training runs of several variants and seeds. Finished runs are recorded, so an interrupted measurement can be continued."""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path


def settings_of(arguments, left_out: Sequence[str] = ()) -> dict:
    """The settings that compared runs must share: all but the folder, the number of seeds, and the names in `left_out`."""
    return {name: value for name, value in vars(arguments).items() if name not in ("output_dir", "seeds", *left_out)}


def complete_runs(
    folder: Path, settings: dict, variants: Iterable[str], num_seeds: int, run: Callable[[str, int], dict]
) -> list[dict]:
    """Run each variant with each seed, unless `runs.jsonl` in the folder has the run with the same settings.

    Args:
        run: (variant, seed) -> scores
    Returns:
        the recorded runs with these settings: `variant`, `seed`, `settings` and the scores.
    """
    results, variants = folder / "runs.jsonl", list(variants)
    runs = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    runs = [one for one in runs if one["settings"] == settings]
    done = {(one["variant"], one["seed"]) for one in runs}
    for seed in range(num_seeds):
        for variant in variants:
            if (variant, seed) in done:
                continue
            runs.append({"variant": variant, "seed": seed, "settings": settings, **run(variant, seed)})
            with results.open("a") as file:
                file.write(json.dumps(runs[-1]) + "\n")
            print(runs[-1], flush=True)
    return runs


def mean_difference(differences: Sequence[float]) -> str:
    """Mean of at least two differences with its standard error, such as "+1.2 ± 0.5"."""
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return f"{statistics.mean(differences):+.1f} ± {error:.1f}"
