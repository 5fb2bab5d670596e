"""In each process of a run: the stock `Trainer` evaluates, and the numbers must be those of pycocotools on the same detections.

Arguments: an annotation file of at least 8 images, two of them without any object, beside its images; a folder to write to.
"""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments, set_seed

from coco_reference import by_pycocotools
from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.training import CocoEvaluator, DetectionCollator, DetectionTransform, load_coco
from helpers import small_trainer, tiny_config
from processes import leave

PROCESSOR = DinoDetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 80})
NUM_QUERIES, NUM_CLASSES = 100, 5  # more than 300 candidates


class FixedModel(nn.Module):
    """Predicts for each image what is fixed for it; what a network predicts also depends on the other images of the batch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.batches_left = math.inf

    def forward(self, pixel_values, pixel_mask=None, labels=None):
        self.batches_left -= 1
        if self.batches_left < 0:
            raise RuntimeError("out of memory")
        logits, boxes = map(torch.stack, zip(*map(predict, labels["image_id"].tolist()), strict=True))
        loss = labels["image_id"].float().mean() + self.weight
        return {"loss": loss, "loss_dict": {"loss_ce": loss.detach()}, "logits": logits, "pred_boxes": boxes}


def predict(image_id):
    generator = torch.Generator().manual_seed(image_id)
    logits = (2 * torch.randn(NUM_QUERIES, NUM_CLASSES, generator=generator)).round(
        decimals=1
    )  # equal scores are frequent
    return logits, 0.2 + 0.6 * torch.rand(NUM_QUERIES, 4, generator=generator)


def detect(row):
    """The detections of one image alone."""
    logits, boxes = predict(row["image_id"])
    outputs = SimpleNamespace(logits=logits[None], pred_boxes=boxes[None])
    return PROCESSOR.post_process_object_detection(outputs, -1.0, [(row["height"], row["width"])])[0]


class Stream(IterableDataset):
    """Without a length: nobody can tell how many images of the last batch are repeated ones that fill it up."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        return iter(self.dataset)


class Evaluations:
    """One data set, its parts, and what they must give."""

    def __init__(self, annotations: Path):
        self.annotations, self.data = annotations, load_coco(annotations, annotations.parent)
        self.dataset = self.data.dataset.with_transform(DetectionTransform(PROCESSOR))
        self.rows = list(self.data.dataset.select_columns(["image_id", "width", "height", "objects"]))

    def reference(self, indices, detections=None) -> dict[str, float]:
        rows = [self.rows[index] for index in indices]
        results = [
            (row["image_id"], box, self.data.category_ids[label], score)
            for row, found in zip(rows, detections or map(detect, rows), strict=True)
            for box, label, score in zip(*(found[name].tolist() for name in ("boxes", "labels", "scores")), strict=True)
        ]
        return by_pycocotools(self.annotations, results, [row["image_id"] for row in rows])


def check(scores: dict[str, float], reference: dict[str, float]) -> None:
    """The numbers are those of the reference, to the last bit, and all are the same in each process; the loss is finite."""
    found = {name.partition("_")[2]: value for name, value in scores.items()}
    assert {name: found[name] for name in reference} == reference
    assert math.isfinite(found["loss"])
    own = {name: found[name] for name in [*reference, "loss"]}
    parts = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, own)
    assert all(part == own for part in parts)


def check_parts(trainer: Trainer, evaluations: Evaluations) -> None:
    """Uneven last batches, less images than processes, no objects at all, with and without what keeps memory flat."""
    empty = [index for index, row in enumerate(evaluations.rows) if not row["objects"]["category"]]
    assert len(empty) >= 2
    for indices in (range(7), range(5), range(1), range(8), empty):
        part, reference = evaluations.dataset.select(indices), evaluations.reference(indices)
        for flat in (True, False):
            trainer.args.batch_eval_metrics = flat
            for preprocess in (trainer.compute_metrics.keep_top, None):
                trainer.preprocess_logits_for_metrics = preprocess
                check(trainer.evaluate(part), reference)
        image_ids = trainer.predict(part).label_ids["image_id"].tolist()
        assert image_ids == [evaluations.rows[index]["image_id"] for index in indices]
    assert reference["AP"] == -1  # of images without objects
    assert 0 < evaluations.reference(range(8))["AP"] < 1


def check_stream(trainer: Trainer, evaluations: Evaluations) -> None:
    for count in (7, 1):
        stream, reference = Stream(evaluations.dataset.select(range(count))), evaluations.reference(range(count))
        for flat in (True, False):
            trainer.args.batch_eval_metrics = flat
            check(trainer.evaluate(stream), reference)


def check_protections(trainer: Trainer, evaluations: Evaluations) -> None:
    evaluator, part, reference = (
        trainer.compute_metrics,
        evaluations.dataset.select(range(7)),
        evaluations.reference(range(7)),
    )
    wider = evaluations.data.dataset.map(lambda row: {"width": row["width"] + 1})
    for flat in (True, False):
        trainer.args.batch_eval_metrics = flat
        trainer.compute_metrics = CocoEvaluator(evaluations.data._replace(dataset=wider), PROCESSOR)
        with pytest.raises(ValueError, match="Image 1 is evaluated with"):
            trainer.evaluate(part)
        trainer.compute_metrics = evaluator
        check(trainer.evaluate(part), reference)
    trainer.args.batch_eval_metrics, trainer.model.batches_left = True, 1
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.evaluate(part)
    trainer.model.batches_left = math.inf
    with pytest.raises(ValueError, match="were evaluated before"):
        trainer.evaluate(part)
    check(trainer.evaluate(part), reference)


def check_network(evaluations: Evaluations, folder: str) -> None:
    """A DINO that is trained for a moment: pycocotools on the detections that `predict` returns."""
    set_seed(0)
    config = tiny_config(num_denoising=10, num_queries=60, id2label=evaluations.data.id2label)
    model = DinoDetrForObjectDetection(config)
    trainer = small_trainer(
        (evaluations.data, evaluations.data),
        folder,
        model,
        PROCESSOR,
        max_steps=20,
        learning_rate=3e-3,
        per_device_eval_batch_size=2,
        batch_eval_metrics=True,
        eval_strategy="steps",
        eval_steps=10,
    )
    trainer.preprocess_logits_for_metrics = trainer.compute_metrics.keep_top
    trainer.train()
    for indices in (range(7), range(1)):
        predictions, _, metrics = trainer.predict(evaluations.dataset.select(indices))
        assert predictions["boxes"].dtype == predictions["scores"].dtype == "float32"
        found = predictions["labels"] >= 0
        assert len(indices) == 1 or not found.all()  # some images are too small for that many queries
        detections = [
            {name: values[index][found[index]] for name, values in predictions.items()} for index in range(len(indices))
        ]
        reference = evaluations.reference(indices, detections)
        assert reference["AP"] > 0 or len(indices) == 1
        check(metrics, reference)
        check(trainer.evaluate(evaluations.dataset.select(indices)), reference)


def main(annotations: str, folder: str) -> None:
    evaluations = Evaluations(Path(annotations))
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_eval_batch_size=2,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
        accelerator_config={"dispatch_batches": False},  # streams are split by each process
    )
    trainer = Trainer(
        FixedModel(),
        arguments,
        data_collator=DetectionCollator(),
        compute_metrics=CocoEvaluator(evaluations.data, PROCESSOR),
    )
    check_parts(trainer, evaluations)
    check_stream(trainer, evaluations)
    check_protections(trainer, evaluations)
    check_network(evaluations, folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
    torch.distributed.destroy_process_group()
    leave()
