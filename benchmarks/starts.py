"""Compare the recipes for the three starts of a training: a detector of other data, a pretrained backbone, and random weights.

python benchmarks/starts.py --data my-data --other-data other-data --backbone efficientnet-folder --output-dir outputs/starts

Each run is a `dino_hf.train` with the recipe that it chooses, a small detector and small images. The detector of the first start is
trained once, on the other data. Scores are of the test part, or of the validation part if there are no test images. Runs recorded
in `runs.jsonl` with the same settings are not repeated, so an interrupted measurement can be continued.
"""

import json
import shutil
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

from transformers import set_seed

import dino_hf
from common import parse
from dino_hf import DinoDetrImageProcessor
from dino_hf.common.scenes import small_config
from repeated_runs import complete_runs, settings_of
from trained_detectors import small_dino

STARTS = {"detector of other data": "finetune", "pretrained backbone": "from-backbone", "random weights": "scratch"}


@dataclass
class StartsArguments:
    """Train from three starts with several seeds."""

    data: str = field(metadata={"help": "data set: folder or file"})
    other_data: str = field(metadata={"help": "data set that the detector of the first start is trained on"})
    backbone: str = field(metadata={"help": "pretrained backbone: folder, Hub id or timm name"})
    output_dir: str = field(default="outputs/starts", metadata={"help": "folder for runs and results"})
    epochs: float = field(default=12, metadata={"help": "passes over the training images, of every run"})
    other_epochs: float = field(default=12, metadata={"help": "passes over the other data"})
    batch_size: int = field(default=4, metadata={"help": "images per batch"})
    shortest_side: int = field(default=320, metadata={"help": "shorter side of images, in pixels"})
    num_queries: int = field(default=300, metadata={"help": "queries of the detector"})
    seeds: int = field(default=3, metadata={"help": "number of runs of each start"})


def image_processor(arguments: StartsArguments) -> DinoDetrImageProcessor:
    processor = DinoDetrImageProcessor.from_backbone(arguments.backbone)
    processor.size = {
        "shortest_edge": arguments.shortest_side,
        "longest_edge": round(arguments.shortest_side * 4 / 3),
    }
    return processor


def save_start(start: str, arguments: StartsArguments, folder: Path, seed: int) -> Path:
    """Folder of the model that a run starts from."""
    target = folder / f"start-{STARTS[start]}-{seed}"
    shutil.rmtree(target, ignore_errors=True)
    set_seed(seed)
    if start == "random weights":
        config = small_config()
        config.num_queries = arguments.num_queries
        config.save_pretrained(target)
    else:
        small_dino(arguments.backbone, num_queries=arguments.num_queries).save_pretrained(target)
    image_processor(arguments).save_pretrained(target)
    if start != "detector of other data":
        return target
    other = folder / f"other-{arguments.other_epochs:g}"
    if not (other / "results.json").is_file():
        shutil.rmtree(other, ignore_errors=True)
        train(arguments, arguments.other_data, target, other, 0, arguments.other_epochs)
    return other


def train(arguments: StartsArguments, data: str, model: Path, folder: Path, seed: int, epochs: float):
    return dino_hf.train(
        data,
        model=model,
        output_dir=folder,
        seed=seed,
        batch_size=arguments.batch_size,
        num_train_epochs=epochs,
        report_to="none",
        use_cpu=True,
    )


def run(arguments: StartsArguments, folder: Path, start: str, seed: int) -> dict:
    """Train from one start with one seed, and return the scores."""
    started = time.perf_counter()
    model = save_start(start, arguments, folder, seed)
    output = folder / f"run-{STARTS[start]}-{seed}"
    shutil.rmtree(output, ignore_errors=True)
    trained = train(arguments, arguments.data, model, output, seed, arguments.epochs)
    evaluation = trained.test or trained.evaluation
    recipe = json.loads((output / "run.json").read_text())["recipe"]
    history = json.loads((output / "history.json").read_text())
    curve = [
        (entry["step"], max(entry["eval_AP"], entry.get("eval_ema_AP", 0))) for entry in history if "eval_AP" in entry
    ]
    return {
        "recipe": recipe,
        "AP": evaluation.metrics["AP"],
        "AP50": evaluation.metrics["AP50"],
        "interval": list(evaluation.intervals["AP"]),
        "validation_curve": curve,
        "seconds": round(time.perf_counter() - started),
    }


def table(runs: list[dict]) -> str:
    """AP of each start: the mean over seeds, and AP with its 95 % interval over images for each seed."""
    lines = [
        "| start | recipe | AP, mean | AP of each seed (95 % interval) | AP50, mean |",
        "| --- | --- | --- | --- | --- |",
    ]
    for start in STARTS:
        rows = sorted((one for one in runs if one["variant"] == start), key=lambda one: one["seed"])
        if not rows:
            continue
        each = ", ".join(
            "{:.1f} ({:.1f} to {:.1f})".format(*(100 * x for x in (one["AP"], *one["interval"]))) for one in rows
        )
        means = [100 * statistics.mean(one[name] for one in rows) for name in ("AP", "AP50")]
        lines.append(f"| {start} | `{rows[0]['recipe']}` | {means[0]:.1f} | {each} | {means[1]:.1f} |")
    return "\n".join(lines)


def main() -> None:
    arguments = parse(StartsArguments)
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)

    def run_one(start: str, seed: int) -> dict:
        return run(arguments, folder, start, seed)

    print(table(complete_runs(folder, settings_of(arguments), STARTS, arguments.seeds, run_one)))


if __name__ == "__main__":
    main()
