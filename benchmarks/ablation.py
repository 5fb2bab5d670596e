"""Measure the AP without each of DINO's three ideas, and with other class losses, on the model and data of the demo.

python benchmarks/ablation.py --output-dir outputs/ablation

Every variant trains on the same drawn scenes from random weights, for the same number of steps. The seed determines initial
weights, order of images and noise. Runs recorded in `runs.jsonl` with the same settings are not repeated, so an interrupted
ablation can be continued.
"""

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

from transformers import Trainer, TrainingArguments, set_seed

from common import parse
from dino_hf import DinoDetrConfig, DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.common.scenes import make_scenes, small_config
from dino_hf.training import CocoEvaluator, DetectionCollator, DetectionTransform, load_coco, make_optimizer
from repeated_runs import complete_runs, mean_difference, settings_of

WEIGHT = small_config().cls_loss_coefficient  # of the class loss; times its published weight relative to DINO's, below
IDEAS = {
    "DINO": {},
    "without denoising": {"num_denoising": 0},
    "pure query selection": {"mixed_query_selection": False},
    "without look forward twice": {"look_forward_twice": False},
}
LOSSES = {
    "quality focal loss (Co-DINO)": {"class_loss": "quality_focal"},
    "Align-DETR": {"class_loss": "align_detr", "queries_per_box": 2},
    "Stable-DINO": {
        "class_loss": "stable_dino",
        "cls_loss_coefficient": 6 * WEIGHT,
        "denoising_cls_loss_coefficient": WEIGHT,
        "negative_noise_start": 0.0,
        "encoder_fusion": True,
    },
    "varifocal loss": {"class_loss": "varifocal"},
    "matchability-aware loss": {"class_loss": "matchability_aware"},
}
VARIANTS = IDEAS | LOSSES


@dataclass
class AblationArguments:
    """Train each variant of the demo's model with several seeds and compare AP."""

    output_dir: str = field(default="outputs/ablation", metadata={"help": "folder for scenes and results"})
    num_train_images: int = field(default=4800, metadata={"help": "number of training images"})
    num_eval_images: int = field(default=400, metadata={"help": "number of held-out images"})
    steps: int = field(default=1500, metadata={"help": "optimizer steps of each run"})
    batch_size: int = field(default=4, metadata={"help": "images per step"})
    learning_rate: float = field(default=7e-4, metadata={"help": "peak learning rate"})
    seeds: int = field(default=3, metadata={"help": "number of runs of each variant"})
    only: str = field(
        default="all",
        metadata={"help": "which variants to train, all of them with DINO", "choices": ["all", "ideas", "losses"]},
    )


def configure(variant: str, **classes) -> DinoDetrConfig:
    """Configuration of a variant, with the classes of the data."""
    config = small_config(**classes)
    for name, value in VARIANTS[variant].items():
        setattr(config, name, value)
    config.validate_architecture()
    return config


def load_data(folder: Path, arguments: AblationArguments):
    """Load training and held-out scenes. They are drawn at the first run, and again for other numbers of images."""
    data = []
    for part, num_images, seed in (("train", arguments.num_train_images, 0), ("eval", arguments.num_eval_images, 1)):
        path = folder / f"{part}_{num_images}"
        annotations = path / "annotations.json"
        if not annotations.exists():
            make_scenes(path, num_images, seed)
        data.append(load_coco(annotations, path, like=data[0] if data else None))
    return data


def make_trainer(arguments: AblationArguments, config, seed: int, train, held_out) -> Trainer:
    """Make a stock Trainer for a model with random weights."""
    image_processor = DinoDetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 120})
    model = DinoDetrForObjectDetection(config)
    transform = DetectionTransform(image_processor)
    training_arguments = TrainingArguments(
        output_dir=str(Path(arguments.output_dir) / "training"),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=20,
        learning_rate=arguments.learning_rate,
        weight_decay=1e-4,
        max_grad_norm=5.0,
        lr_scheduler_type="cosine",
        warmup_steps=60,
        logging_steps=500,
        save_strategy="no",
        remove_unused_columns=False,
        batch_eval_metrics=True,
        disable_tqdm=True,
        report_to="none",
        seed=seed,
        use_cpu=True,
    )
    return Trainer(
        model=model,
        args=training_arguments,
        train_dataset=train.dataset.with_transform(transform),
        eval_dataset=held_out.dataset.with_transform(transform),
        data_collator=DetectionCollator(),
        processing_class=image_processor,
        compute_metrics=CocoEvaluator(held_out, image_processor),
        # The backbone is not pretrained, so it uses the full learning rate. A pretrained one would use a tenth.
        optimizers=(
            make_optimizer(model, training_arguments, backbone_learning_rate=training_arguments.learning_rate),
            None,
        ),
    )


def run(arguments: AblationArguments, variant: str, seed: int, train, held_out) -> dict:
    """Train one variant with one seed, and return its COCO scores."""
    started = time.perf_counter()
    set_seed(seed)
    config = configure(variant, id2label=train.id2label, category_ids=train.category_ids)
    trainer = make_trainer(arguments, config, seed, train, held_out)
    trainer.train()
    metrics = trainer.evaluate()
    return {
        "AP": metrics["eval_AP"],
        "AP50": metrics["eval_AP50"],
        "seconds": round(time.perf_counter() - started),
    }


def table(runs: list[dict]) -> str:
    """A table of mean and range over seeds, and of the mean difference from DINO with the same seed, with its standard error."""
    scores = {variant: {one["seed"]: one for one in runs if one["variant"] == variant} for variant in VARIANTS}
    lines = ["| variant | AP, mean (lowest to highest) | AP50 | AP against DINO |", "| --- | --- | --- | --- |"]
    for variant, by_seed in scores.items():
        if not by_seed:
            continue
        ap, ap50 = ([100 * one[name] for one in by_seed.values()] for name in ("AP", "AP50"))
        differences = [
            100 * (one["AP"] - scores["DINO"][seed]["AP"]) for seed, one in by_seed.items() if seed in scores["DINO"]
        ]
        against = ""
        if variant != "DINO" and len(differences) > 1:
            against = mean_difference(differences)
        spread = f"{statistics.mean(ap):.1f} ({min(ap):.1f} to {max(ap):.1f})"
        lines.append(f"| {variant} | {spread} | {statistics.mean(ap50):.1f} | {against} |")
    return "\n".join(lines)


def main() -> None:
    arguments = parse(AblationArguments)
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = load_data(folder, arguments)
    variants = {"all": VARIANTS, "ideas": IDEAS, "losses": ["DINO", *LOSSES]}[arguments.only]

    def run_one(variant: str, seed: int) -> dict:
        return run(arguments, variant, seed, train, held_out)

    settings = settings_of(arguments, left_out=["only"])
    print(table(complete_runs(folder, settings, variants, arguments.seeds, run_one)))


if __name__ == "__main__":
    main()
