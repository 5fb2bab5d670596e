"""The main job from end to end, on a data set that is drawn on the spot: fine-tune, score, save, load, detect, look.

python -m dino_hf.tools.demo --output-dir outputs/demo
"""

import json
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser, ProgressCallback, Trainer, TrainingArguments, pipeline, set_seed

from dino_hf import DinoDetrConfig, DinoDetrForObjectDetection, DinoDetrImageProcessor

from ..training import (
    CocoData,
    CocoEvaluator,
    DetectionCollator,
    DetectionTransform,
    load_coco,
    make_optimizer,
    record_training,
)
from .drawing import save_comparison, save_curves
from .scenes import make_scenes

MARKER = ".dino_hf_demo"  # lies in a folder that this demo made, which it may clear


@dataclass
class DemoArguments:
    """Fine-tune a small DINO on drawn scenes and look at what it finds."""

    output_dir: str = field(
        default="outputs/demo", metadata={"help": "folder for everything; new, empty or of an earlier demo"}
    )
    num_train_images: int = field(default=4800, metadata={"help": "images to train on"})
    num_eval_images: int = field(default=200, metadata={"help": "held-out images"})
    epochs: int = field(default=3, metadata={"help": "passes over the training images"})
    batch_size: int = field(default=4, metadata={"help": "images per step"})
    learning_rate: float = field(default=7e-4, metadata={"help": "highest learning rate"})
    threshold: float = field(default=0.35, metadata={"help": "score from which detections are drawn"})
    seed: int = field(default=0, metadata={"help": "of the scenes, the initial weights and the order of images"})


def small_config(data: CocoData) -> DinoDetrConfig:
    """A DINO that two CPU cores train in minutes: everything of the full model, narrower and shallower.

    Its backbone has no pretrained weights here, so it is a BiT (arXiv:1912.11370): group norm and weight standardisation train
    from scratch with four images per step. The batch norms of a ResNet are frozen and need weights to start from.
    """
    return DinoDetrConfig(
        backbone_config={
            "model_type": "bit",
            "depths": [2, 2, 2, 1],
            "hidden_sizes": [128, 256, 384, 384],
            "embedding_size": 48,
            "num_groups": 16,
            "out_features": ["stage2", "stage3", "stage4"],
        },
        num_feature_levels=3,
        d_model=128,
        encoder_layers=1,
        decoder_layers=3,
        encoder_ffn_dim=384,
        decoder_ffn_dim=384,
        num_queries=50,
        num_denoising=50,
        box_noise_scale=0.4,
        cls_loss_coefficient=3.0,
        id2label=data.id2label,
        category_ids=data.category_ids,
    )


class QuietProgress(ProgressCallback):
    """Trainer's progress bar with one line for each evaluation, instead of all that is logged."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        super().on_evaluate(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.write(
                f"epoch {state.epoch:.0f} of {args.num_train_epochs}: held-out loss {metrics['eval_loss']:.2f}, "
                f"AP {metrics['eval_AP']:.3f}, AP50 {metrics['eval_AP50']:.3f}"
            )


def make_trainer(
    arguments: DemoArguments,
    train_data: CocoData,
    eval_data: CocoData,
    folder: Path,
    config: DinoDetrConfig | None = None,
    **settings,
) -> Trainer:
    """The stock Trainer, for a model with random weights; `settings` of TrainingArguments go first."""
    image_processor = DinoDetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 120})
    model = DinoDetrForObjectDetection(small_config(train_data) if config is None else config)
    transform = DetectionTransform(image_processor)
    common = {
        "num_train_epochs": arguments.epochs,
        "per_device_train_batch_size": arguments.batch_size,
        "per_device_eval_batch_size": 20,
        "learning_rate": arguments.learning_rate,
        "weight_decay": 1e-4,
        "max_grad_norm": 5.0,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 60,
        "logging_steps": 20,
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "remove_unused_columns": False,
        "batch_eval_metrics": True,
        "report_to": "none",
        "seed": arguments.seed,
        "use_cpu": True,
    }
    training_arguments = TrainingArguments(output_dir=str(folder), **common | settings)
    return Trainer(
        model=model,
        args=training_arguments,
        train_dataset=train_data.dataset.with_transform(transform),
        eval_dataset=eval_data.dataset.with_transform(transform),
        data_collator=DetectionCollator(),
        processing_class=image_processor,
        compute_metrics=CocoEvaluator(eval_data, image_processor),
        # Everything starts from scratch here, so the backbone learns as fast as the rest; a pretrained one takes a tenth.
        optimizers=(make_optimizer(model, training_arguments, backbone_scale=1.0), None),
    )


def train(arguments: DemoArguments, train_data: CocoData, eval_data: CocoData, folder: Path) -> Trainer:
    """Train, scoring AP after every epoch; returns the trainer with the last weights."""
    trainer = make_trainer(arguments, train_data, eval_data, folder)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(QuietProgress)
    record_training(trainer, train_data, eval_data)  # for the model card
    trainer.train()
    return trainer


def detect(model_dir: Path, data: CocoData, threshold: float, num_images: int = 6) -> list[dict]:
    """Load the saved folder as any user would and detect on the images with most objects; rows for `save_comparison`."""
    detector = pipeline("object-detection", model=str(model_dir), device="cpu")
    counts = [len(objects["category"]) for objects in data.dataset.select_columns("objects")["objects"]]
    crowded = sorted(range(len(counts)), key=lambda index: -counts[index])
    rows = []
    for index in crowded[:: max(1, len(crowded) // (2 * num_images))][:num_images]:
        entry = data.dataset[index]
        objects = entry["objects"]
        found = detector(entry["image"], threshold=threshold)
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


def prepare(arguments: DemoArguments) -> Path:
    """Check the settings, and clear away what an earlier run of this demo left: that and nothing else."""
    for name in ("num_train_images", "num_eval_images", "epochs", "batch_size"):
        if getattr(arguments, name) < 1:
            sys.exit(f"error: {name}={getattr(arguments, name)} must be at least 1.")
    output = Path(arguments.output_dir)
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / MARKER).exists())):
        sys.exit(f"error: {output} is not an empty folder and not of an earlier demo; choose another --output-dir.")
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).touch()
    for name in ("data", "training", "model"):
        shutil.rmtree(output / name, ignore_errors=True)
    for name in ("detections.png", "curves.png", "results.json"):
        (output / name).unlink(missing_ok=True)
    return output


def run(arguments: DemoArguments) -> dict[str, float]:
    """All of it. Returns the scores on the held-out images, which also stand in `results.json`."""
    started = time.perf_counter()
    output = prepare(arguments)
    set_seed(arguments.seed)

    print(f"Drawing {arguments.num_train_images} + {arguments.num_eval_images} scenes ...")
    train_json = make_scenes(output / "data" / "train", arguments.num_train_images, seed=arguments.seed)
    eval_json = make_scenes(output / "data" / "eval", arguments.num_eval_images, seed=arguments.seed + 1)
    train_data = load_coco(train_json, train_json.parent)._replace(name="scenes drawn by the demo of dino_hf")
    eval_data = load_coco(eval_json, eval_json.parent, like=train_data)._replace(name="other scenes drawn by the demo")

    print(f"Training on {torch.get_num_threads()} threads ...")
    trainer = train(arguments, train_data, eval_data, output / "training")
    logged = next(entry for entry in reversed(trainer.state.log_history) if "eval_AP" in entry)  # after the last epoch
    scores = {name: value for name, value in logged.items() if "AP" in name or "AR" in name}
    trainer.save_model(str(output / "model"))

    print(f"Detecting with pipeline('object-detection', model='{output / 'model'}') ...")
    rows = detect(output / "model", eval_data, arguments.threshold)
    save_comparison(output / "detections.png", rows, f"detected, score > {arguments.threshold}")
    save_curves(output / "curves.png", trainer.state)
    scores["seconds"] = round(time.perf_counter() - started, 1)
    (output / "results.json").write_text(json.dumps(scores, indent=2))

    print(
        f"\nAP {scores['eval_AP']:.3f} (0.50:0.95), {scores['eval_AP50']:.3f} at 0.50, after {scores['seconds']:.0f} s"
    )
    for name in train_data.id2label.values():
        print(f"  {name:10} {scores[f'eval_AP_class_{name}']:.3f}")
    print(f"Look at {output / 'detections.png'} and {output / 'curves.png'}; the model is in {output / 'model'}.")
    return scores


def main() -> None:
    run(HfArgumentParser(DemoArguments).parse_args_into_dataclasses()[0])


if __name__ == "__main__":
    main()
