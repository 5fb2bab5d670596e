"""Measure the AP of rare classes with repeated images and with class weights, for several seeds.

python benchmarks/rare_classes.py --output-dir outputs/rare_classes

A detector of the demo's size first learns to find objects of one class. Each run then trains it, with a new class head, on drawn
scenes in which some classes are rare, for the same number of steps. All classes are equally frequent in the held-out scenes. Runs
recorded in `runs.jsonl` with the same settings are not repeated, so an interrupted measurement can be continued.
"""

import json
import shutil
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from transformers import set_seed

from common import parse
from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.common.scenes import CATEGORIES, make_scenes, small_config
from dino_hf.training import Augmentation, CocoData, DinoDetrTrainer, get_recipe, load_coco, transfer_classes
from repeated_runs import complete_runs, mean_difference, settings_of

SHARES = (0.62, 0.25, 0.08, 0.035, 0.015)  # of CATEGORIES in the training scenes
PROCESSOR = DinoDetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 120})
PLAIN = "neither"  # the variant that the others are compared with


@dataclass
class RareArguments:
    """Train with and without options for rare classes, and compare the AP of each class."""

    output_dir: str = field(default="outputs/rare_classes", metadata={"help": "folder for scenes and results"})
    num_train_images: int = field(default=600, metadata={"help": "number of training images"})
    num_eval_images: int = field(default=200, metadata={"help": "number of held-out images"})
    steps_before: int = field(default=400, metadata={"help": "optimizer steps of the training with one class"})
    steps: int = field(default=200, metadata={"help": "optimizer steps of each run"})
    batch_size: int = field(default=4, metadata={"help": "images per step"})
    repeat_threshold: float = field(default=0.3, metadata={"help": "repeat_threshold of the runs that repeat images"})
    seeds: int = field(default=3, metadata={"help": "number of runs of each variant"})


def variants(arguments: RareArguments) -> dict[str, dict]:
    """Changes of the recipe by variant."""
    return {
        PLAIN: {},
        "repeat_threshold": {"repeat_threshold": arguments.repeat_threshold},
        "class_weights": {"class_weights": "balanced"},
    }


def draw(folder: Path, num_images: int, seed: int, shares=None) -> Path:
    """Draw scenes, unless an earlier run has drawn them. `one_class.json` calls all their objects "object"."""
    path = folder / "annotations.json"
    if not path.exists():
        shutil.rmtree(folder, ignore_errors=True)
        make_scenes(folder, num_images, seed, shares)
        content = json.loads(path.read_text())
        content["categories"] = [{"id": 1, "name": "object"}]
        for annotation in content["annotations"]:
            annotation["category_id"] = 1
        (folder / "one_class.json").write_text(json.dumps(content))
    return path


def train(
    model, train: CocoData, held_out: CocoData | None, folder: Path, seed: int, steps: int, batch: int, **changes
):
    """Train a model in place, without checkpoints.

    Returns:
        the trainer
    """
    recipe = get_recipe(
        "scratch",
        augmentation=Augmentation(short_sides=(96,), longest_side=120, crop=0.0),
        total_batch_size=batch,
        **changes,
    )
    args = recipe.training_arguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=20,
        eval_strategy="no",
        save_strategy="no",
        logging_steps=100,
        seed=seed,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    trainer = DinoDetrTrainer(
        model, args, recipe=recipe, train=train, held_out=held_out, image_processor=PROCESSOR, doctor=False
    )
    trainer.train()
    return trainer


def load_start(arguments: RareArguments, folder: Path, annotations: Path) -> Path:
    """Folder of the detector that all runs start from. It is trained by the first run."""
    start = folder / f"start_{arguments.num_train_images}_{arguments.steps_before}"
    if not (start / "config.json").exists():
        set_seed(0)
        data = load_coco(annotations.with_name("one_class.json"), annotations.parent)
        model = DinoDetrForObjectDetection(small_config(id2label=data.id2label, category_ids=data.category_ids))
        train(model, data, None, folder / "training", 0, arguments.steps_before, arguments.batch_size)
        model.save_pretrained(folder / "unfinished")
        (folder / "unfinished").rename(start)
    return start


def run(arguments: RareArguments, variant: str, seed: int, start: Path, data: CocoData, held_out: CocoData) -> dict:
    """Train one variant with one seed, and return its scores."""
    model = DinoDetrForObjectDetection.from_pretrained(start)
    set_seed(seed)
    transfer_classes(model, data.id2label, data.category_ids)
    settings = (start.parent / "training", seed, arguments.steps, arguments.batch_size)
    trainer = train(
        model,
        data,
        held_out,
        *settings,
        learning_rate=3e-4,
        backbone_learning_rate=3e-4,
        **variants(arguments)[variant],
    )
    metrics = trainer.evaluate()
    return {"AP": metrics["eval_AP"]} | {name: metrics[f"eval_AP_class_{name}"] for name in CATEGORIES.values()}


def table(runs: list[dict]) -> str:
    """Mean AP over seeds, and below it the mean difference from the plain variant with the same seed and its standard error."""
    columns = ["AP", *CATEGORIES.values()]
    scores = {name: {one["seed"]: one for one in runs if one["variant"] == name} for name in variants(RareArguments())}
    lines = [f"| | {' | '.join(columns)} |", f"|{' --- |' * (1 + len(columns))}"]
    for variant, by_seed in scores.items():
        if not by_seed:
            continue
        means = [f"{100 * statistics.mean(one[name] for one in by_seed.values()):.1f}" for name in columns]
        lines.append(f"| {variant} | {' | '.join(means)} |")
        shared = by_seed.keys() & scores[PLAIN].keys()
        if variant == PLAIN or len(shared) < 2:
            continue
        cells = []
        for name in columns:
            differences = [100 * (by_seed[seed][name] - scores[PLAIN][seed][name]) for seed in sorted(shared)]
            cells.append(mean_difference(differences))
        lines.append(f"| difference | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    arguments = parse(RareArguments)
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    annotations = draw(folder / f"train_{arguments.num_train_images}", arguments.num_train_images, 0, SHARES)
    data = load_coco(annotations, annotations.parent)
    held_out = draw(folder / f"eval_{arguments.num_eval_images}", arguments.num_eval_images, 1)
    held_out = load_coco(held_out, held_out.parent, like=data)
    start = load_start(arguments, folder, annotations)

    def run_one(variant: str, seed: int) -> dict:
        return run(arguments, variant, seed, start, data, held_out)

    print(table(complete_runs(folder, settings_of(arguments), variants(arguments), arguments.seeds, run_one)))


if __name__ == "__main__":
    main()
