"""Train DINO, Deformable DETR and RT-DETRv2 on the same batches from the same pretrained backbone, and compare AP over steps.

python benchmarks/convergence.py my-data --backbone efficientnet-folder --output-dir outputs/convergence

All detectors have the same width, decoder layers and queries, the same images in the same order, the same optimizer and schedule.
Runs recorded in `runs.jsonl` with the same settings are not repeated, so an interrupted measurement can be continued. `curves.png`
shows AP over steps and over seconds. For the seconds, steps of all detectors are timed in turn.
"""

import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

from common import parse
from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.common.drawing import COLOURS
from dino_hf.data import DetectionData, load_data
from dino_hf.training import Augmentation, CocoEvaluator, DetectionCollator, DetectionTransform
from dino_hf.training.optimizer import adamw, make_scheduler, parameter_groups
from repeated_runs import complete_runs, mean_difference, settings_of
from trained_detectors import deformable_detr, rt_detr, small_dino

DETECTORS: dict[str, Callable[[DinoDetrForObjectDetection], nn.Module]] = {
    "DINO": lambda dino: dino,
    "Deformable DETR": deformable_detr,
    "RT-DETRv2": rt_detr,
}
MAX_GRAD_NORM = 0.1  # of all three, in their own releases


@dataclass
class ConvergenceArguments:
    """Train three detectors with several seeds and compare AP over steps."""

    data: str = field(metadata={"help": "data set with a held-out part: folder or file"})
    backbone: str = field(metadata={"help": "pretrained backbone: folder, Hub id or timm name"})
    output_dir: str = field(default="outputs/convergence", metadata={"help": "folder for results"})
    part: str = field(default="test", metadata={"help": "part to measure on", "choices": ["validation", "test"]})
    steps: int = field(default=312, metadata={"help": "optimizer steps of each run"})
    evaluations: int = field(default=6, metadata={"help": "number of points of each curve"})
    batch_size: int = field(default=4, metadata={"help": "images per step"})
    learning_rate: float = field(default=4e-4, metadata={"help": "peak learning rate; the backbone has a tenth"})
    shortest_side: int = field(default=320, metadata={"help": "shorter side of images, in pixels"})
    num_queries: int = field(default=300, metadata={"help": "queries of each detector"})
    seeds: int = field(default=3, metadata={"help": "number of runs of each detector"})


def build(detector: str, arguments: ConvergenceArguments, data) -> nn.Module:
    """Build a detector of the size that two cores can train, on the pretrained backbone."""
    classes = {"id2label": data.id2label, "category_ids": data.category_ids}
    dino = small_dino(arguments.backbone, num_queries=arguments.num_queries, **classes)
    return DETECTORS[detector](dino)


def make_trainer(detector: str, arguments: ConvergenceArguments, seed: int, splits: DetectionData) -> Trainer:
    """Make a stock Trainer of a detector, with warm-up and cosine."""
    held_out = getattr(splits, arguments.part)
    model = build(detector, arguments, splits.train)
    image_processor = DinoDetrImageProcessor.from_backbone(arguments.backbone)
    longest = round(arguments.shortest_side * 4 / 3)
    image_processor.size = {"shortest_edge": arguments.shortest_side, "longest_edge": longest}
    augmentation = Augmentation(short_sides=(arguments.shortest_side,), longest_side=longest, crop=0.0)
    evaluator = CocoEvaluator(held_out, image_processor)
    args = TrainingArguments(
        output_dir=str(Path(arguments.output_dir) / "training"),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=8,
        max_grad_norm=MAX_GRAD_NORM,
        eval_strategy="steps",
        eval_steps=arguments.steps // arguments.evaluations,
        logging_steps=arguments.steps // arguments.evaluations,
        save_strategy="no",
        remove_unused_columns=False,
        batch_eval_metrics=True,
        disable_tqdm=True,
        report_to="none",
        seed=seed,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    groups = parameter_groups(model, arguments.learning_rate, arguments.learning_rate / 10)
    optimizer = adamw(groups, weight_decay=1e-4)
    return Trainer(
        model=model,
        args=args,
        train_dataset=splits.train.dataset.with_transform(DetectionTransform(image_processor, augmentation, seed=seed)),
        eval_dataset=held_out.dataset.with_transform(DetectionTransform(image_processor)),
        data_collator=DetectionCollator(),
        compute_metrics=evaluator,
        preprocess_logits_for_metrics=evaluator.keep_top,
        optimizers=(optimizer, make_scheduler(optimizer, arguments.steps // 20, (), arguments.steps)),
    )


def run(arguments: ConvergenceArguments, detector: str, seed: int, splits: DetectionData) -> dict:
    """Train a detector with one seed.

    Returns:
        AP at the last step, and the curve as pairs of steps and AP.
    """
    set_seed(seed)
    trainer = make_trainer(detector, arguments, seed, splits)
    trainer.train()
    curve = [(entry["step"], entry["eval_AP"]) for entry in trainer.state.log_history if "eval_AP" in entry]
    last = next(entry for entry in reversed(trainer.state.log_history) if "eval_AP" in entry)
    return {"AP": last["eval_AP"], "AP50": last["eval_AP50"], "curve": curve}


def time_steps(arguments: ConvergenceArguments, splits: DetectionData, rounds: int = 12) -> dict[str, list[float]]:
    """Seconds of training steps of each detector, in turn on the same batches. The first step of each is left out."""
    set_seed(0)
    trainers = {detector: make_trainer(detector, arguments, 0, splits) for detector in DETECTORS}
    batches = itertools.cycle(trainers["DINO"].get_train_dataloader())
    seconds: dict[str, list[float]] = {detector: [] for detector in DETECTORS}
    for number in range(rounds + 1):
        batch = next(batches)
        for detector, trainer in trainers.items():
            started = time.perf_counter()
            trainer.model.train()
            trainer.model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), MAX_GRAD_NORM)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            if number:
                seconds[detector].append(time.perf_counter() - started)
    return seconds


def table(runs: list[dict], seconds: dict[str, list[float]]) -> str:
    """AP of each detector at the evaluated steps, the mean over seeds, and the time of a step against DINO's."""
    steps = [step for step, _ in runs[0]["curve"]]
    lines = [
        f"| detector | {' | '.join(f'{step} steps' for step in steps)} | DINO's lead at the end | seconds per step, to DINO |",
        f"|{' --- |' * (len(steps) + 3)}",
    ]
    by_detector = {name: {one["seed"]: one for one in runs if one["variant"] == name} for name in DETECTORS}
    for detector, by_seed in by_detector.items():
        if not by_seed:
            continue
        cells = []
        for index in range(len(steps)):
            values = [100 * one["curve"][index][1] for one in by_seed.values()]
            cells.append(f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})")
        shared = by_seed.keys() & by_detector["DINO"].keys()
        leads = [100 * (by_detector["DINO"][seed]["AP"] - by_seed[seed]["AP"]) for seed in sorted(shared)]
        cells.append(mean_difference(leads) if detector != "DINO" and len(leads) > 1 else "")
        ratios = [own / dino for own, dino in zip(seconds[detector], seconds["DINO"], strict=True)]
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        lines.append(f"| {detector} | {' | '.join(cells)} |")
    return "\n".join(lines)


def save_curves(path: Path, runs: list[dict], seconds: dict[str, list[float]]) -> None:
    """Plot AP over steps and over seconds: a thin line for each seed, a thick line for their mean."""
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=140)
    axes = figure.subplots(1, 2, sharey=True)
    for detector, colour in zip(DETECTORS, COLOURS, strict=False):
        curves = [one["curve"] for one in runs if one["variant"] == detector]
        if not curves:
            continue
        steps = [0] + [step for step, _ in curves[0]]
        step_seconds = statistics.median(seconds[detector])
        rows = [[0.0] + [100 * ap for _, ap in curve] for curve in curves]
        means = [statistics.mean(column) for column in zip(*rows, strict=True)]
        for axis, scale in zip(axes, (1, step_seconds), strict=True):
            places = [step * scale for step in steps]
            for row in rows:
                axis.plot(places, row, color=colour, linewidth=0.7, alpha=0.6)
            axis.plot(places, means, color=colour, linewidth=2.2, label=detector)
    axes[0].set(xlabel="optimizer steps", ylabel="AP (0.50:0.95)")
    axes[1].set(xlabel="seconds of training, without evaluation")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, facecolor="white")


def main() -> None:
    arguments = parse(ConvergenceArguments)
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    splits = load_data(arguments.data)
    if getattr(splits, arguments.part) is None:
        sys.exit(f"error: {arguments.data} has no {arguments.part} images; choose another --part.")

    def run_one(variant: str, seed: int) -> dict:
        gc.collect()
        return run(arguments, variant, seed, splits)

    settings = settings_of(arguments)
    runs = complete_runs(folder, settings, DETECTORS, arguments.seeds, run_one)
    seconds = time_steps(arguments, splits)
    (folder / "seconds.json").write_text(json.dumps(seconds) + "\n")
    print(table(runs, seconds))
    save_curves(folder / "curves.png", runs, seconds)


if __name__ == "__main__":
    main()
