"""Draw a data set, train a small DINO on it, evaluate it, and draw its detections.

python examples/demo.py --output-dir outputs/demo
"""

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import HfArgumentParser, pipeline

import dino_hf
from dino_hf.common.drawing import show_boxes
from dino_hf.common.scenes import UNTRAINED, draw_data
from dino_hf.training import CocoData, load_coco

MARKER = ".dino_hf_demo"  # marks a folder that an earlier demo created, whose files may be replaced


@dataclass
class DemoArguments:
    """Train a small DINO on drawn scenes and draw its detections."""

    output_dir: str = field(
        default="outputs/demo", metadata={"help": "output folder: new, empty, or from an earlier demo"}
    )
    num_train_images: int = field(default=4800, metadata={"help": "number of training images"})
    num_eval_images: int = field(default=200, metadata={"help": "number of held-out images"})
    epochs: int = field(default=3, metadata={"help": "number of passes over the training images"})
    batch_size: int = field(default=4, metadata={"help": "images per training step"})
    learning_rate: float = field(default=7e-4, metadata={"help": "peak learning rate"})
    threshold: float = field(default=0.35, metadata={"help": "lowest score of drawn detections"})
    seed: int = field(default=0, metadata={"help": "random seed of scenes, initial weights and order of images"})


def detect(model_dir: Path, data: CocoData, threshold: float, num_images: int = 6) -> list[dict]:
    """Load the saved model as any user would, and detect on images with many objects.

    Returns:
        rows for `save_comparison`.
    """
    detector = pipeline("object-detection", model=str(model_dir), device="cpu")
    counts = [len(objects["category"]) for objects in data.dataset.select_columns("objects")["objects"]]
    crowded = sorted(range(len(counts)), key=lambda index: -counts[index])
    chosen = crowded[:: max(1, len(crowded) // (2 * num_images))][:num_images]
    entries = [data.dataset[index] for index in chosen]
    rows = []
    batches = detector([entry["image"] for entry in entries], threshold=threshold, batch_size=num_images)
    for entry, found in zip(entries, batches, strict=True):
        objects = entry["objects"]
        rows.append(
            {
                "image": entry["image"],
                "truth": {
                    "boxes": [(x, y, x + w, y + h) for x, y, w, h in objects["bbox"]],
                    "labels": objects["category"],
                    "texts": [
                        data.id2label[category] + (" (crowd)" if iscrowd else "")
                        for category, iscrowd in zip(objects["category"], objects["iscrowd"], strict=True)
                    ],
                },
                "found": {
                    "boxes": [tuple(one["box"][side] for side in ("xmin", "ymin", "xmax", "ymax")) for one in found],
                    "labels": [detector.model.config.label2id[one["label"]] for one in found],
                    "texts": [f"{one['label']} {one['score']:.2f}" for one in found],
                },
            }
        )
    return rows


def save_comparison(path: Path, rows: Sequence[dict], detections_title: str) -> None:
    """Save a grid of images: annotations in the upper row, detections in the lower row.

    Args:
        rows: for each image, a dictionary of `image`, `truth` and `found`. The last two hold `boxes`, `labels` and `texts`.
        detections_title: title of the detections, for example with their threshold.
    """
    figure = Figure(figsize=(2.3 * len(rows), 5.0), layout="constrained", dpi=140)
    grid = figure.subplots(2, len(rows), squeeze=False)
    for column, row in enumerate(rows):
        show_boxes(grid[0, column], row["image"], **row["truth"])
        show_boxes(grid[1, column], row["image"], **row["found"])
    grid[0, 0].set_title("annotated", loc="left", fontsize=9)
    grid[1, 0].set_title(detections_title, loc="left", fontsize=9)
    figure.savefig(path, facecolor="white")


def prepare(arguments: DemoArguments) -> Path:
    """Check the settings, then prepare the output folder."""
    for name in ("num_train_images", "num_eval_images", "epochs", "batch_size"):
        if getattr(arguments, name) < 1:
            sys.exit(f"error: {name}={getattr(arguments, name)} must be at least 1.")
    return prepare_folder(Path(arguments.output_dir), ("scenes", "model"), ("detections.png",))


def prepare_folder(output: Path, folders: Sequence[str], files: Sequence[str]) -> Path:
    """Make the output folder, and delete what an earlier demo wrote to it, but no other files."""
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / MARKER).exists())):
        sys.exit(f"error: {output} is neither an empty folder nor from an earlier demo; choose another --output-dir.")
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).touch()
    for name in folders:
        shutil.rmtree(output / name, ignore_errors=True)
    for name in files:
        (output / name).unlink(missing_ok=True)
    return output


def run(arguments: DemoArguments) -> dict[str, float]:
    """Run the whole demo. Returns the scores on the held-out images."""
    started = time.perf_counter()
    output = prepare(arguments)
    scenes, model = output / "scenes", output / "model"

    print(f"Drawing {arguments.num_train_images} + {arguments.num_eval_images} scenes ...")
    draw_data(scenes, arguments.num_train_images, arguments.num_eval_images, arguments.seed)

    print(f"Training on {torch.get_num_threads()} threads ...")
    trained = dino_hf.train(
        scenes,
        model=scenes / UNTRAINED,
        recipe="scratch",
        output_dir=model,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        num_train_epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        backbone_learning_rate=arguments.learning_rate,
        total_batch_size=arguments.batch_size,
        report_to="none",
        use_cpu=True,
    )

    print(f"Detecting with pipeline('object-detection', model='{model}') ...")
    held_out = load_coco(scenes / "validation" / "annotations.json", scenes / "validation")
    save_comparison(
        output / "detections.png",
        detect(model, held_out, arguments.threshold),
        f"detected, score > {arguments.threshold}",
    )
    scores = trained.evaluation.metrics
    print(
        f"\nAP {scores['AP']:.3f} (0.50:0.95), {scores['AP50']:.3f} at 0.50, after {time.perf_counter() - started:.0f} s\n"
        f"Detections are in {output / 'detections.png'}, curves and scores in {model / 'README.md'}. The model is in {model}."
    )
    return scores


def main() -> None:
    run(HfArgumentParser(DemoArguments).parse_args_into_dataclasses()[0])


if __name__ == "__main__":
    main()
