"""Benchmarks of convergence and of starts at toy size: the compared detectors, runs, tables and curves."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification, set_seed

import convergence
import starts
from dino_hf.common.scenes import make_scenes
from dino_hf.model.targets import PADDING_LABEL
from helpers import RESNET, randomize
from trained_detectors import deformable_detr, rt_detr, small_dino

CLASSES = {"id2label": {0: "cat", 1: "dog"}, "category_ids": [4, 9]}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("convergence") / "backbone"
    torch.manual_seed(0)
    settings = {name: value for name, value in RESNET.items() if name not in ("model_type", "out_features")}
    ResNetForImageClassification(ResNetConfig(**settings)).save_pretrained(folder)
    ConvNextImageProcessor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for number, (name, num_images) in enumerate((("train", 6), ("validation", 4), ("test", 3))):
        make_scenes(folder / name, num_images, seed=number)
    return folder


def batch() -> dict:
    """Images of 60 x 90 and 40 x 64 pixels on one canvas; the second has no boxes."""
    torch.manual_seed(0)
    pixel_values, mask = torch.randn(2, 3, 60, 90), torch.ones(2, 60, 90, dtype=torch.long)
    mask[1, 40:] = mask[1, :, 64:] = 0
    boxes = torch.zeros(2, 2, 4)
    boxes[0] = torch.tensor([[0.4, 0.5, 0.3, 0.4], [0.7, 0.2, 0.2, 0.3]])
    labels = {"class_labels": torch.tensor([[1, 0], [PADDING_LABEL] * 2]), "boxes": boxes}
    return {"pixel_values": pixel_values * mask[:, None], "pixel_mask": mask, "labels": labels}


@pytest.mark.parametrize("build", [deformable_detr, rt_detr])
def test_every_part_of_a_compared_detector_learns_and_shares_the_backbone(backbone, build):
    set_seed(0)
    dino = small_dino(str(backbone), num_queries=12, num_denoising=3, **CLASSES)
    detector = build(dino)
    ours, theirs = dino.model.backbone.model.state_dict(), detector.model.backbone.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    outputs = detector.train()(**batch())
    assert (outputs.logits.shape[::2], outputs.pred_boxes.shape[::2]) == ((2, 2), (2, 4))
    outputs.loss.backward()
    silent = [
        name
        for name, one in detector.named_parameters()
        if one.requires_grad and (one.grad is None or not one.grad.any())
    ]
    assert not [name for name in silent if "backbone" in name or "enc_" in name], silent


def test_the_proposals_of_deformable_detr_have_a_loss(backbone):
    set_seed(0)
    detector = deformable_detr(small_dino(str(backbone), num_queries=12, **CLASSES)).train()
    inputs = batch()
    outputs = detector(**inputs)
    kept = [{"class_labels": inputs["labels"]["class_labels"][0], "boxes": inputs["labels"]["boxes"][0]}]
    kept.append({"class_labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)})
    shipped = super(type(detector), detector).forward(inputs["pixel_values"], inputs["pixel_mask"], labels=kept).loss
    parts = outputs.loss_dict
    added = parts["loss_ce"] + 5 * parts["loss_bbox"] + 2 * parts["loss_giou"]
    assert added > 0
    torch.testing.assert_close(outputs.loss, shipped + added)


def test_boxes_of_rt_detr_are_relative_to_the_image_without_padding(backbone):
    set_seed(0)
    detector = rt_detr(small_dino(str(backbone), num_queries=12, **CLASSES)).eval()
    randomize(detector.model.decoder.bbox_embed, scale=0.1)
    inputs = batch()
    with torch.no_grad():
        boxes = detector(**inputs).pred_boxes
        padded = torch.nn.functional.pad(inputs["pixel_values"], (0, 6, 0, 4))  # 64 x 96
        relative = super(type(detector), detector).forward(padded).pred_boxes
    pixels = torch.tensor([96.0, 64, 96, 64])
    sizes = torch.tensor([[90.0, 60, 90, 60], [64, 40, 64, 40]])
    torch.testing.assert_close(boxes * sizes[:, None], relative * pixels)


def call(module, monkeypatch, capsys, *options) -> str:
    monkeypatch.setattr("sys.argv", [module.__name__, *map(str, options)])
    module.main()
    return capsys.readouterr().out


def test_detectors_are_trained_on_the_same_batches_and_compared(backbone, data, tmp_path, monkeypatch, capsys):
    options = ["--data", data, "--backbone", backbone, "--output_dir", tmp_path, "--steps", 2, "--evaluations", 2]
    options += ["--batch_size", 2, "--shortest_side", 64, "--num_queries", 12, "--seeds", 1]
    printed = call(convergence, monkeypatch, capsys, *options)
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [one["variant"] for one in runs] == list(convergence.DETECTORS)
    assert all([step for step, _ in one["curve"]] == [1, 2] for one in runs)
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(convergence.DETECTORS)
    assert "| 1.00 (1.00 to 1.00) |" in next(row for row in rows if row.startswith("| DINO"))
    with Image.open(tmp_path / "curves.png") as picture:
        assert len(picture.convert("L").resize((64, 32)).getcolors()) > 10  # not blank
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(one | {"AP": 0.5}) + "\n" for one in runs))
    monkeypatch.setattr(convergence, "run", None)  # nothing is trained again
    assert call(convergence, monkeypatch, capsys, *options)


def test_the_table_of_convergence_has_the_mean_and_the_range():
    runs = [
        {"variant": name, "seed": seed, "AP": last, "curve": [[5, first], [10, last]]}
        for name, seed, first, last in (
            ("DINO", 0, 0.1, 0.3),
            ("DINO", 1, 0.2, 0.5),
            ("RT-DETRv2", 0, 0.1, 0.2),
            ("RT-DETRv2", 1, 0.1, 0.3),
        )
    ]
    seconds = {"DINO": [1.0, 2.0], "Deformable DETR": [1.0, 1.0], "RT-DETRv2": [0.5, 3.0]}
    *_, dino, rt = convergence.table(runs, seconds).splitlines()
    assert dino == "| DINO | 15.0 (10.0 to 20.0) | 40.0 (30.0 to 50.0) |  | 1.00 (1.00 to 1.00) |"
    assert rt == "| RT-DETRv2 | 10.0 (10.0 to 10.0) | 25.0 (20.0 to 30.0) | +15.0 ± 5.0 | 1.00 (0.50 to 1.50) |"


def test_each_start_is_trained_by_its_own_recipe(backbone, data, tmp_path, monkeypatch, capsys):
    options = ["--data", data, "--other_data", data, "--backbone", backbone, "--output_dir", tmp_path, "--epochs", 1]
    options += ["--other_epochs", 1, "--batch_size", 3, "--shortest_side", 64, "--num_queries", 12, "--seeds", 1]
    printed = call(starts, monkeypatch, capsys, *options)
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert {one["variant"]: one["recipe"] for one in runs} == starts.STARTS
    for start, recipe in starts.STARTS.items():
        assert f"| {start} | `{recipe}` | " in printed
