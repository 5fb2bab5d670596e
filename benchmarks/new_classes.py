"""Measure what a detector forgets when it learns new classes, with and without boxes by the old detector, for several seeds.

python benchmarks/new_classes.py --output-dir outputs/new_classes

A detector of the demo's size learns three classes of the drawn scenes. Then it learns the other two, on new scenes in which only
these are annotated, though objects of the first three are visible. The held-out scenes are annotated with all five. Runs recorded
in `runs.jsonl` with the same settings are not repeated, so an interrupted measurement can be continued.
"""

import json
import shutil
import statistics
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import torch
from pycocotools import mask
from torch import nn
from transformers import TrainerCallback, set_seed

from common import parse
from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.common.scenes import CATEGORIES, make_scenes, small_config
from dino_hf.inference import Detections, Predictor
from dino_hf.training import (
    Augmentation,
    CocoData,
    DinoDetrTrainer,
    get_recipe,
    load_coco,
    transfer_classes,
)
from dino_hf.training.kept_classes import Boxes, KeptClasses, add_boxes, boxes_to_add, keep_classes
from repeated_runs import complete_runs, settings_of

OLD, NEW = ("disc", "box", "triangle"), ("star", "ring")
PROCESSOR = DinoDetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 120})
SCORES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)  # lowest scores whose boxes are counted
BEFORE = "before training"
# Variant -> the lowest score of added boxes (None: no boxes are added), and whether the rows of old classes are frozen.
VARIANTS: dict[str, tuple[float | None, bool]] = {
    "neither": (None, False),
    "boxes above 0.2": (0.2, False),
    "boxes above 0.2, rows frozen": (0.2, True),
    "rows frozen": (None, True),
    "boxes above 0.3": (0.3, False),
}


@dataclass
class NewClassesArguments:
    """Train a detector on new classes, and compare the AP of old and new classes."""

    output_dir: str = field(default="outputs/new_classes", metadata={"help": "folder for scenes and results"})
    num_old_images: int = field(default=2400, metadata={"help": "number of images with the three old classes"})
    num_new_images: int = field(default=600, metadata={"help": "number of images with the two new classes"})
    num_eval_images: int = field(default=200, metadata={"help": "number of held-out images, with all classes"})
    steps_before: int = field(default=1200, metadata={"help": "optimizer steps of the training with the old classes"})
    steps: int = field(default=150, metadata={"help": "optimizer steps of the training with the new classes"})
    batch_size: int = field(default=4, metadata={"help": "images per step"})
    learning_rate: float = field(default=3e-4, metadata={"help": "learning rate of the training with the new classes"})
    seeds: int = field(default=2, metadata={"help": "number of runs of each variant"})
    variants: list[str] = field(default_factory=lambda: list(VARIANTS), metadata={"help": "variants to run"})


class FrozenRows(TrainerCallback):
    """Keeps rows of the class heads and of the label embedding: no gradient, and no weight decay.

    Args:
        rows: class indices.
    """

    def __init__(self, model: DinoDetrForObjectDetection, rows: list[int]):
        detector = model.model
        layers: list[nn.Module] = [
            detector.query_selection.head.class_head,
            *(head.class_head for head in detector.decoder.heads),
            detector.denoising.label_embedding,
        ]
        self.rows = torch.tensor(rows)
        self.parameters = {parameter for layer in layers for parameter in layer.parameters()}
        self.values = {parameter: parameter.detach()[self.rows].clone() for parameter in self.parameters}
        for parameter in self.parameters:
            parameter.register_hook(partial(torch.index_fill, dim=0, index=self.rows, value=0.0))

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        optimizer.register_step_post_hook(lambda *_: self.restore())

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, values in self.values.items():
            parameter[self.rows] = values


def draw(folder: Path, num_images: int, seed: int) -> Path:
    """Draw scenes, unless an earlier run has drawn them. `old.json` and `new.json` have the objects of some classes."""
    if not (folder / "new.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        content = json.loads(make_scenes(folder, num_images, seed).read_text())
        for name, kept in (("old", OLD), ("new", NEW)):
            ids = [category_id for category_id, category in CATEGORIES.items() if category in kept]
            part = {
                "images": content["images"],
                "categories": [entry for entry in content["categories"] if entry["id"] in ids],
                "annotations": [entry for entry in content["annotations"] if entry["category_id"] in ids],
            }
            (folder / f"{name}.json").write_text(json.dumps(part))
    return folder


def make_trainer(
    model, data: CocoData, held_out: CocoData, folder: Path, arguments: NewClassesArguments, steps: int, **settings
) -> DinoDetrTrainer:
    recipe = get_recipe(
        "scratch",
        augmentation=Augmentation(short_sides=(96,), longest_side=120, crop=0.0),
        total_batch_size=arguments.batch_size,
        **{name: settings.pop(name) for name in list(settings) if name.endswith("learning_rate")},
    )
    args = recipe.training_arguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=20,
        eval_strategy="no",
        save_strategy="no",
        logging_steps=100,
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",
        seed=settings["seed"],
    )
    return DinoDetrTrainer(
        model, args, recipe=recipe, train=data, held_out=held_out, image_processor=PROCESSOR, doctor=False
    )


def load_start(arguments: NewClassesArguments, folder: Path) -> Path:
    """Folder of the detector that all runs start from. It is trained by the first run."""
    start = folder / f"start_{arguments.num_old_images}_{arguments.steps_before}"
    if not (start / "config.json").exists():
        scenes = draw(folder / f"old_{arguments.num_old_images}", arguments.num_old_images, seed=100)
        data = load_coco(scenes / "old.json", scenes)
        set_seed(0)
        model = DinoDetrForObjectDetection(small_config(id2label=data.id2label, category_ids=data.category_ids))
        make_trainer(model, data, None, folder / "training", arguments, arguments.steps_before, seed=0).train()
        model.save_pretrained(folder / "unfinished")
        (folder / "unfinished").rename(start)
    return start


@cache
def detect(start: Path, scenes: Path) -> list[Detections]:
    """Detections of the old detector in each image."""
    images = load_coco(scenes / "new.json", scenes).dataset["image"]
    return list(Predictor(DinoDetrForObjectDetection.from_pretrained(start), PROCESSOR)(images))


def choose_boxes(start: Path, scenes: Path, data: CocoData, classes: KeptClasses, min_score: float) -> dict[int, Boxes]:
    """The old detector's boxes above a score, which become annotations, by image id."""
    boxes = {}
    for row, found in zip(data.dataset, detect(start, scenes), strict=True):
        size = row["width"], row["height"]
        annotated = row["objects"]["bbox"]
        boxes[row["image_id"]], _ = boxes_to_add(
            found, annotated, size, classes.old_places, dict.fromkeys(classes.old_places, min_score)
        )
    return boxes


def quality_of_boxes(scenes: Path, boxes: dict[int, Boxes]) -> tuple[float, float]:
    """Precision and recall of boxes of old classes at an IoU of 0.5. Boxes of one class and image are matched best score first."""
    truth = load_coco(scenes / "old.json", scenes)
    num_right = num_objects = 0
    for row in truth.dataset:
        objects = row["objects"]
        free = [place for place, iscrowd in enumerate(objects["iscrowd"]) if not iscrowd]
        num_objects += len(free)
        for label, box, _ in boxes[row["image_id"]]:
            overlaps = {
                place: mask.iou([box], [objects["bbox"][place]], [0])[0, 0]
                for place in free
                if objects["category"][place] == label
            }
            best = max(overlaps, key=overlaps.get, default=None)
            if best is not None and overlaps[best] >= 0.5:
                free.remove(best)
                num_right += 1
    return num_right / max(1, sum(map(len, boxes.values()))), num_right / num_objects


def scores_of(trainer: DinoDetrTrainer, names: tuple[str, ...]) -> dict:
    metrics = trainer.evaluate()
    by_class = {name: metrics[f"eval_AP_class_{name}"] for name in names}
    groups = {"old": OLD, "new": NEW}
    means = {
        f"AP of {group}": statistics.mean(by_class[name] for name in members)
        for group, members in groups.items()
        if set(members) <= set(names)
    }
    return means | by_class


def run(arguments: NewClassesArguments, folder: Path, variant: str, seed: int) -> dict:
    """Train one variant with one seed, and return its scores."""
    start = load_start(arguments, folder)
    test = draw(folder / f"test_{arguments.num_eval_images}", arguments.num_eval_images, seed=999)
    model = DinoDetrForObjectDetection.from_pretrained(start)
    if variant == BEFORE:
        data = load_coco(test / "old.json", test)
        trainer = make_trainer(model, data, data, folder / "training", arguments, 1, seed=seed)
        return scores_of(trainer, OLD)
    scenes = draw(folder / f"new_{arguments.num_new_images}", arguments.num_new_images, seed=200)
    data = load_coco(scenes / "new.json", scenes)
    classes = keep_classes(model.config, data)
    min_score, is_frozen = VARIANTS[variant]
    boxes = {} if min_score is None else choose_boxes(start, scenes, data, classes, min_score)
    train = add_boxes(data, classes, boxes)
    held_out = load_coco(test / "annotations.json", test)
    held_out = add_boxes(held_out, classes._replace(places=places_of(held_out, classes)), {})
    set_seed(seed)
    transfer_classes(model, classes.id2label, classes.category_ids)
    rates = {"learning_rate": arguments.learning_rate, "backbone_learning_rate": arguments.learning_rate}
    trainer = make_trainer(model, train, held_out, folder / "training", arguments, arguments.steps, seed=seed, **rates)
    if is_frozen:
        trainer.add_callback(FrozenRows(model, list(classes.old_places.values())))
    trainer.train()
    return scores_of(trainer, (*OLD, *NEW)) | {"added boxes": sum(map(len, boxes.values()))}


def places_of(data: CocoData, classes: KeptClasses) -> list[int]:
    """For each class of the data, its index in `classes`."""
    names = list(classes.id2label.values())
    return [names.index(name) for name in data.id2label.values()]


def table(runs: list[dict]) -> str:
    """AP of old and new classes and of each class: mean over seeds, and in parentheses the values of the seeds."""
    columns = ["AP of old", "AP of new", *OLD, *NEW, "added boxes"]
    lines = [f"| | {' | '.join(columns)} |", f"|{' --- |' * (1 + len(columns))}"]
    for variant in dict.fromkeys(one["variant"] for one in runs):
        cells = []
        for name in columns:
            values = [one[name] for one in runs if one["variant"] == variant and name in one]
            digits = 0 if name == "added boxes" else 3
            text = f"{statistics.mean(values):.{digits}f}" if values else ""
            if name.startswith("AP") and len(values) > 1:
                text += f" ({', '.join(f'{value:.3f}' for value in values)})"
            cells.append(text)
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def thresholds_table(arguments: NewClassesArguments, folder: Path) -> str:
    """Number, precision and recall of the old detector's boxes in the new images, by the lowest score."""
    start = load_start(arguments, folder)
    scenes = draw(folder / f"new_{arguments.num_new_images}", arguments.num_new_images, seed=200)
    data = load_coco(scenes / "new.json", scenes)
    classes = keep_classes(DinoDetrForObjectDetection.from_pretrained(start).config, data)
    lines = ["| score above | boxes | precision | recall |", "| --- | --- | --- | --- |"]
    for min_score in SCORES:
        boxes = choose_boxes(start, scenes, data, classes, min_score)
        precision, recall = quality_of_boxes(scenes, boxes)
        lines.append(f"| {min_score} | {sum(map(len, boxes.values()))} | {precision:.2f} | {recall:.2f} |")
    return "\n".join(lines)


def main() -> None:
    arguments = parse(NewClassesArguments)
    if unknown := [name for name in arguments.variants if name not in VARIANTS]:
        raise SystemExit(f"error: there is no variant {unknown[0]!r}; there are {', '.join(map(repr, VARIANTS))}.")
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    settings = settings_of(arguments, left_out=("variants",))
    variants = [BEFORE, *arguments.variants]
    print(thresholds_table(arguments, folder), flush=True)
    print(table(complete_runs(folder, settings, variants, arguments.seeds, partial(run, arguments, folder))))


if __name__ == "__main__":
    main()
