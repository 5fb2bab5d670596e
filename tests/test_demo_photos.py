"""The demo on photographs at toy size, with random weights in place of ImageNet's."""

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from transformers import AutoModelForObjectDetection

import demo_photos
from demo_photos import PhotoArguments, run, save_backbone
from dino_hf.common.scenes import make_scenes


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """A backbone's tensors in the order of timm, under other names."""
    torch.manual_seed(0)
    tensors = timm.create_model(demo_photos.BACKBONE).state_dict().values()
    return {f"_{number}": tensor for number, tensor in enumerate(tensors)}


def test_the_backbone_has_the_weights_in_their_order(weights, tmp_path):
    save_backbone(tmp_path, weights)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).state_dict()
    assert all(torch.equal(*pair) for pair in zip(loaded.values(), weights.values(), strict=True))
    *_, last = weights
    with pytest.raises(ValueError, match="shorter"):
        save_backbone(tmp_path, {name: tensor for name, tensor in weights.items() if name != last})


def test_a_folder_of_images_is_trained_on_from_the_backbone(weights, tmp_path, monkeypatch, capsys):
    data = tmp_path / "photos"
    for name, num_images in (("train", 5), ("validation", 3), ("test", 2)):
        make_scenes(data / name, num_images, seed=num_images)
    monkeypatch.setattr(demo_photos, "imagenet_weights", lambda: weights)
    monkeypatch.setattr(demo_photos, "IMAGE_SIZE", {"shortest_edge": 64, "longest_edge": 96})
    output = tmp_path / "out"
    scores = run(PhotoArguments(str(data), str(output), epochs=1, batch_size=3))
    assert 0 <= scores["AP"] <= 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "from-backbone: 1 epoch" in printed
    assert "random weights, except the backbone of" in printed
    assert "on test images" in printed
    assert len(AutoModelForObjectDetection.from_pretrained(output / "model").config.id2label) == 5
    with Image.open(output / "detections.png") as picture:
        assert len(picture.convert("L").resize((64, 32)).getcolors()) > 10  # not blank


def test_a_wrong_path_leaves_nothing_behind(tmp_path):
    with pytest.raises((OSError, ValueError), match="nowhere"):
        run(PhotoArguments(str(tmp_path / "nowhere"), str(tmp_path / "out")))
    assert list(Path(tmp_path).iterdir()) == []


def test_the_picture_shows_the_images_that_the_run_holds_out(tmp_path, monkeypatch):
    def load(source, seed=0):
        raise ValueError(f"split with seed {seed}")

    monkeypatch.setattr(demo_photos, "load_data", load)
    with pytest.raises(ValueError, match="split with seed 7"):
        run(PhotoArguments(str(tmp_path), str(tmp_path / "out"), seed=7))
