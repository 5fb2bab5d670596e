"""A user's own augmentation: boxes follow, random numbers depend on the seed alone, and wrong pipelines are named."""

import json
import pickle
import random
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision.transforms import v2

from dino_hf import DinoDetrImageProcessor
from dino_hf.run.augmentation_choice import choose_augmentation
from dino_hf.run.record import RunRecord
from dino_hf.training import Augmentation
from dino_hf.training.augmentation import augment_by
from dino_hf.training.coco_data import DetectionTransform
from dino_hf.training.own_augmentation import OwnAugmentation, augmentation_digest, load_own_augmentation

OBJECTS = {
    "bbox": [[2.0, 3.0, 10.0, 20.0], [-5.0, 0.0, 4.0, 9.0], [40.0, 10.0, 40.0, 20.0]],  # the second is outside
    "area": [100.0, 36.0, 400.0],
    "category": [1, 0, 2],
    "iscrowd": [0, 0, 1],
}


def pixels(height: int = 50, width: int = 70) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, height, width), dtype=np.uint8))


def drops_first(sample: dict) -> dict:
    return sample | {"boxes": sample["boxes"][1:], "labels": sample["labels"][1:]}


class Jitter:
    """Shifts boxes by random numbers of three generators."""

    def __call__(self, sample: dict) -> dict:
        shift = random.random() + float(np.random.rand()) + float(torch.rand(()))
        return sample | {"boxes": sample["boxes"] + shift}


def test_boxes_areas_and_crowds_follow():
    image = pixels()
    flipped, objects = augment_by(OwnAugmentation(v2.RandomHorizontalFlip(1.0)), image, OBJECTS, (0,))
    assert torch.equal(flipped, image.flip(2))
    assert objects["bbox"] == [[58.0, 3.0, 10.0, 20.0], [0.0, 10.0, 30.0, 20.0]]
    assert objects["area"] == [100.0, 400.0]
    assert (objects["category"], objects["iscrowd"]) == ([1, 2], [0, 1])
    resized, objects = augment_by(OwnAugmentation(v2.Resize((100, 70))), image, OBJECTS, (0,))
    assert resized.shape == (3, 100, 70)
    assert objects["bbox"][0] == [2.0, 6.0, 10.0, 40.0]
    assert objects["area"][0] == 200.0
    _, objects = augment_by(OwnAugmentation(drops_first), image, OBJECTS, (0,))
    assert objects["category"] == [2]
    nothing = {name: [] for name in OBJECTS}
    _, objects = augment_by(OwnAugmentation(v2.RandomHorizontalFlip(1.0)), image, nothing, (0,))
    assert objects == nothing


def test_random_numbers_depend_on_the_seed_alone_and_the_callers_stay():
    own = OwnAugmentation(Jitter())
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    boxes = [augment_by(own, pixels(), OBJECTS, seed)[1]["bbox"] for seed in ((3, 1, 7), (3, 2, 7), (3, 1, 7))]
    assert boxes[0] == boxes[2] != boxes[1]
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_it_runs_before_the_augmentation_of_the_recipe():
    processor = DinoDetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 96})
    plain = Augmentation(horizontal_flip=0, crop=0, short_sides=(48,), longest_side=96)
    image = Image.fromarray(pixels().permute(1, 2, 0).numpy())
    rows = {"image_id": [4], "image": [image], "width": [70], "height": [50]}
    inside = {name: [values[0], values[2]] for name, values in OBJECTS.items()}
    samples = [
        DetectionTransform(processor, plain, own=own)(rows | {"objects": [inside]})
        for own in (None, OwnAugmentation(v2.RandomHorizontalFlip(1.0)))
    ]
    without, flipped = (sample["labels"][0]["boxes"] for sample in samples)
    assert_close(flipped, torch.stack([1 - without[:, 0], *without[:, 1:].unbind(1)], dim=1))
    assert samples[0]["pixel_values"][0].shape == samples[1]["pixel_values"][0].shape
    with pytest.raises(ValueError, match="augmentation must be given"):
        DetectionTransform(processor, own=OwnAugmentation(drops_first))


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        (v2.ToDtype(torch.float32, scale=True), "torch.float32, but it must be"),
        (lambda sample: sample | {"boxes": sample["boxes"][:1]}, "returns 1 boxes and 2 labels"),
        (lambda sample: None, "with image, boxes and labels, but it returns NoneType"),
        (lambda sample: sample["nothing"], "The augmentation failed: KeyError: 'nothing'"),
    ],
)
def test_pipelines_that_return_something_else_are_named(pipeline, message):
    with pytest.raises(ValueError, match=message):
        augment_by(OwnAugmentation(pipeline), pixels(), OBJECTS, (0,))


@pytest.mark.parametrize("pipeline", [v2.RandomHorizontalFlip, 3, None])
def test_only_objects_that_can_be_called_are_pipelines(pipeline):
    with pytest.raises(ValueError, match="must be an object"):
        OwnAugmentation(pipeline)


def write(folder, text="from torchvision.transforms import v2\naugmentation = v2.RandomVerticalFlip(1.0)\n"):
    file = folder / "own.py"
    file.write_text(text + "other = augmentation\nnumber = 3\n")
    return file


def test_names_of_files_and_modules(tmp_path, monkeypatch):
    file = write(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in (str(file), f"{file}:other", "own.py:augmentation", "own:other"):
        own = load_own_augmentation(name)
        assert type(own.pipeline).__name__ == "RandomVerticalFlip"
    sys.modules.pop("own")
    own = load_own_augmentation(f"{file}:other")
    content = pickle.dumps(own)
    del sys.modules[load_own_augmentation.__globals__["_module_of_file"](file).__name__]
    assert torch.equal(augment_by(pickle.loads(content), pixels(), OBJECTS, (0,))[0], pixels().flip(1))
    assert augmentation_digest(f"{file}:other") == augmentation_digest(str(file)) is not None
    assert augmentation_digest("own:other") is None
    for name, message in (
        (f"{file}:missing", "has no object 'missing'"),
        (f"{file}:number", "must be an object"),
        ("nowhere.py", "cannot be loaded: FileNotFoundError: there is no file nowhere.py"),
        ("no_such_module_here:a", "cannot be loaded: ModuleNotFoundError"),
    ):
        with pytest.raises(ValueError, match=message):
            load_own_augmentation(name)
    file.write_text("1 / 0")
    with pytest.raises(ValueError, match="cannot be loaded: ZeroDivisionError"):
        load_own_augmentation(str(file))


def test_albumentations_is_named_if_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "albumentations", None)
    with pytest.raises(ImportError, match="not installed: pip install albumentations"):
        load_own_augmentation(str(tmp_path / "saved.json"))


def test_a_resumed_run_needs_the_same_augmentation_and_never_runs_the_recorded_one(tmp_path, monkeypatch):
    file = write(tmp_path)

    def resumed(values):
        return RunRecord(tmp_path, {"augmentation": values})

    record = RunRecord(tmp_path, {})
    assert choose_augmentation(record, None) is None
    assert choose_augmentation(record, str(file)).pipeline.p == 1.0
    kept = json.loads(json.dumps(record.values["augmentation"]))
    assert kept == {"name": f"{file}:augmentation", "digest": augmentation_digest(str(file))}
    monkeypatch.chdir(tmp_path)
    assert choose_augmentation(resumed(kept), "own.py:augmentation") is not None
    file.write_text("raise RuntimeError('this was run')")
    with pytest.raises(ValueError, match="Name it again to resume"):
        choose_augmentation(resumed(kept), None)
    write(tmp_path, "augmentation = print\n")
    with pytest.raises(ValueError, match="has changed since then"):
        choose_augmentation(resumed(kept), str(file))
    with pytest.raises(ValueError, match=r"started with the augmentation .*, not with .*RandomVerticalFlip"):
        choose_augmentation(resumed(kept), v2.RandomVerticalFlip())
    with pytest.raises(ValueError, match=r"started without an augmentation, not with .*RandomVerticalFlip"):
        choose_augmentation(RunRecord(tmp_path, {"seed": 0}), v2.RandomVerticalFlip())
    finished = RunRecord(tmp_path, {"augmentation": kept, "finished": True})
    assert choose_augmentation(finished, None) is None
    assert finished.values["augmentation"] == kept


class TestAlbumentations:
    """With the optional package."""

    @pytest.fixture
    def package(self):
        return pytest.importorskip("albumentations")

    def test_boxes_follow_whatever_format_the_pipeline_has(self, package):
        flip = package.HorizontalFlip(p=1.0)
        pipelines = [flip, package.Compose([flip]), package.Compose([flip], bbox_params=package.BboxParams("yolo"))]
        for pipeline in [*pipelines, package.OneOf([flip], p=1.0)]:
            image, objects = augment_by(OwnAugmentation(pipeline), pixels(), OBJECTS, (0,))
            assert torch.equal(image, pixels().flip(2))
            assert_close(
                torch.tensor(objects["bbox"]), torch.tensor([[58.0, 3, 10, 20], [0, 10, 30, 20]]), atol=1e-4, rtol=0
            )
            assert (objects["category"], objects["iscrowd"]) == ([1, 2], [0, 1])
        nothing = {name: [] for name in OBJECTS}
        assert augment_by(OwnAugmentation(flip), pixels(), nothing, (0,))[1] == nothing

    def test_random_numbers_depend_on_the_seed_alone(self, package, tmp_path):
        pipeline = package.Compose([package.Affine(rotate=(-40, 40), p=1.0), package.GaussNoise(p=1.0)])
        package.save(pipeline, tmp_path / "saved.json")
        saved = load_own_augmentation(str(tmp_path / "saved.json"))
        own = OwnAugmentation(pipeline)
        first, other, again = (augment_by(own, pixels(), OBJECTS, seed) for seed in ((1, 2), (1, 3), (1, 2)))
        assert torch.equal(first[0], again[0])
        assert first[1] == again[1] != other[1]
        assert not torch.equal(first[0], other[0])
        loaded = augment_by(saved, pixels(), OBJECTS, (1, 2))
        assert torch.equal(loaded[0], first[0])
        assert loaded[1] == first[1]
