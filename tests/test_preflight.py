"""What is said before a run starts."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from datasets import Dataset
from PIL import Image
from rich.console import Console

from dino_hf import DinoDetrForObjectDetection
from dino_hf.common.scenes import make_scenes
from dino_hf.data import CocoData
from dino_hf.run.memory_forecast import MemoryForecast
from dino_hf.run.preflight import (
    Preflight,
    describe_data,
    describe_disk,
    describe_memory,
    describe_plan,
    few_queries,
    find_warnings,
    image_sizes,
)
from dino_hf.training import get_recipe, load_coco
from helpers import QUIET, tiny_config

FORECAST = MemoryForecast(weights=2**20, fixed=6 * 2**20, per_image=3 * 2**30, size=(800, 1333), num_boxes=40)


def make_data(**columns) -> CocoData:
    rows = {
        "image_id": [1, 2, 3],
        "width": [90, 60, 120],
        "height": [50, 70, 40],
        "objects": [
            {"category": [0, 0, 2], "iscrowd": [0, 1, 0]},
            {"category": [], "iscrowd": []},
            {"category": [0] * 11, "iscrowd": [0] * 11},
        ],
    }
    return CocoData(Dataset.from_dict(rows | columns), {0: "cat", 1: "dog", 2: "emu"}, [1, 2, 3])


def test_data_are_counted():
    data = make_data()
    told = describe_data("here", ["a note"], {"train": data, "validation": None, "test": data})
    assert told == {
        "origin": "here",
        "notes": ["a note"],
        "images": {"train": 3, "validation": None, "test": 3},
        "classes": {"cat": 12, "dog": 0, "emu": 1},
        "boxes": {"all": 13, "most_in_an_image": 11, "images_without": 1, "crowds": 1},
        "image_sizes": {"height": [40, 50, 70], "width": [60, 90, 120]},
    }
    part = data._replace(dataset=data.dataset.select([1, 0]))  # rows in another order than they are stored
    told = describe_data("here", [], {"train": part, "validation": None, "test": None})
    assert told["classes"] == {"cat": 1, "dog": 0, "emu": 1}
    assert told["boxes"] == {"all": 2, "most_in_an_image": 2, "images_without": 1, "crowds": 1}
    empty = data._replace(dataset=data.dataset.select([1]))
    assert describe_data("", [], {"train": empty})["boxes"]["most_in_an_image"] == 0


def test_sizes_that_are_not_annotated_are_those_of_images(tmp_path):
    path = make_scenes(tmp_path / "scenes", 3, seed=0)
    content = json.loads(path.read_text())
    expected = [(image["height"], image["width"]) for image in content["images"]]
    del content["images"][1]["width"]
    path.write_text(json.dumps(content))
    assert image_sizes(load_coco(path, path.parent)) == expected
    with Image.open(path.parent / content["images"][1]["file_name"]) as image:
        assert (image.height, image.width) == expected[1]


def test_a_plan_counts_steps_and_evaluations():
    recipe = get_recipe("finetune", num_train_epochs=3)
    model = DinoDetrForObjectDetection(tiny_config())
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **QUIET}
    plan = describe_plan(recipe, recipe.training_arguments("o", **settings), model, 10, 0)
    assert (plan["steps_per_epoch"], plan["steps"], plan["evaluations"], plan["epochs"]) == (3, 9, 3, 3.0)
    assert plan["images_per_step"]["all"] == 4
    assert plan["learning_rates"] == {"transformer": 5e-5, "backbone": 5e-6}
    assert plan["stops"] == "stops after 10 evaluations without a better AP"
    assert (plan["device"], plan["precision"]) == ("cpu", "float32")
    assert "images per step 4, the recipe has 8; no scaling" in plan["departures"][0]
    by_steps = recipe.training_arguments("o", eval_strategy="steps", eval_steps=2, max_steps=7, bf16=True, **settings)
    plan = describe_plan(recipe, by_steps, model, 10, 4)
    assert (plan["steps"], plan["evaluations"], plan["precision"]) == (7, 3, "bfloat16 autocast")
    without = recipe.training_arguments("o", eval_strategy="no", **settings)
    plan = describe_plan(recipe, without, model, 10, 0)
    assert (plan["evaluations"], plan["stops"]) == (0, None)


@pytest.mark.parametrize(("limit", "num_checkpoints"), [(2, 3), (1, 2), (None, 1)])
def test_disk_is_that_of_the_checkpoints(tmp_path, limit, num_checkpoints):
    model = DinoDetrForObjectDetection(tiny_config())
    recipe = get_recipe("finetune")
    args = recipe.training_arguments(tmp_path / "new/out", save_total_limit=limit, **QUIET)
    disk = describe_disk(model, recipe, args, tmp_path / "new/out")
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    moments = 8 * sum(one.numel() for one in model.parameters() if one.requires_grad)  # stem and stage 1 are frozen
    assert disk["checkpoint"] == 2 * weights + moments
    assert disk["needed"] == num_checkpoints * disk["checkpoint"] + 2 * weights
    assert ("never deleted" in disk["what"]) == (limit is None)
    assert disk["free"] > 0
    torch.save({"moments": torch.zeros(moments // 4)}, tmp_path / "moments.pt")
    assert abs((tmp_path / "moments.pt").stat().st_size - moments) < 5000


def test_what_is_wrong_is_a_warning():
    data = describe_data("here", [], {"train": make_data()})
    args = get_recipe("finetune").training_arguments("o", per_device_train_batch_size=4, **QUIET)
    memory = describe_memory(FORECAST, 10 * 2**30, args)
    process = psutil.Process().memory_info().rss
    assert memory["more"] == FORECAST.total(4) - FORECAST.weights
    assert memory["total"] == memory["more"] + memory["process"]
    assert memory["process"] == pytest.approx(process, rel=0.05)
    warnings = find_warnings(data, memory, ["a finding"])
    assert warnings[:3] == [
        "a finding",
        "no training box has the class dog: the model cannot learn it.",
        "fewer than 10 training boxes each have the class emu.",
    ]
    assert "needs about 12.0 GiB more, but only 10.0 GiB are free. Use a smaller --batch-size" in warnings[3]
    assert len(find_warnings(data, memory | {"free": 20 * 2**30}, [])) == 2


def test_all_is_shown_on_narrow_screens():
    data = describe_data("here", ["a note [with brackets]"], {"train": make_data(), "validation": make_data()})
    recipe, model = get_recipe("paper-12ep"), DinoDetrForObjectDetection(tiny_config())
    args = recipe.training_arguments("o", per_device_train_batch_size=4, **QUIET)
    preflight = Preflight(
        data=data,
        model={
            "from": "someone/dino",
            "notes": ["Kept 2 of 3 classes: cat, dog"],
            "parameters": 47_000_000,
            "trained_parameters": 1_000_000,
        },
        plan=describe_plan(recipe, args, model, 3, 1),
        memory=describe_memory(FORECAST, 20 * 2**30, args),
        disk=describe_disk(model, recipe, args, Path("o")),
        warnings=["mind [this]"],
    )
    console = Console(file=io.StringIO(), width=80)
    preflight.show(console)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines()[:-1])) <= 80
    words = " ".join(text.split())
    for part in (
        "here: images 3 to train on, 3 held out",
        "a note [with brackets]",
        "3 classes cat 12, emu 1, dog 0 (boxes in training)",
        "13 in training, at most 11 in an image; images without boxes: 1; crowd regions: 1",
        "width 60 to 120, median 90; height 40 to 70, median 50",
        "someone/dino; 47.0 M parameters, 1.0 M trained Kept 2 of 3 classes: cat, dog",
        "4 images = 4 in a batch x 1 process x 1 accumulated; the recipe has 16",
        "transformer 0.0001, backbone 1e-05 departs from paper-12ep: images per step 4",
        "paper-12ep: 12 epochs of 1 step, 12 steps, 12 evaluations; resumed after step 1",
        "that the process uses now, 5.0 MiB for gradients, optimizer and average, 3.0 GiB for each image of up to",
        "3.0 GiB for each image of up to 1333 x 800 with 40 boxes; 20.0 GiB free",
        "warning: mind [this]",
    ):
        assert part in words, (part, words)
    assert json.loads(json.dumps(preflight.as_dict())) == json.loads(json.dumps(preflight.as_dict(), allow_nan=False))


@pytest.mark.parametrize(("num_queries", "is_warned"), [(12, True), (13, False), (126, False), (127, True)])
def test_queries_are_warned_of_below_a_tenth_of_the_tokens_and_above_all(num_queries, is_warned):
    """64 x 96 pixels, strides 8, 16 and 32: 96 + 24 + 6 = 126 tokens."""
    config = SimpleNamespace(
        num_queries=num_queries,
        num_feature_levels=3,
        backbone_config=SimpleNamespace(out_features=["stage2", "stage3"]),
    )
    warnings = few_queries(config, (64, 96))
    assert len(warnings) == is_warned
    assert not is_warned or "about 126 tokens" in warnings[0]


@pytest.mark.parametrize(("num_queries", "is_warned"), [(899, True), (900, False)])
def test_the_published_number_of_queries_is_enough_for_large_images(num_queries, is_warned):
    """800 x 1333 pixels, strides 8 to 64: 16,700 + 4,200 + 1,050 + 273 = 22,223 tokens."""
    config = SimpleNamespace(
        num_queries=num_queries,
        num_feature_levels=4,
        backbone_config=SimpleNamespace(out_features=["stage2", "stage3", "stage4"]),
    )
    warnings = few_queries(config, (800, 1333))
    assert len(warnings) == is_warned
    assert not is_warned or "about 22,223 tokens" in warnings[0]


def test_twelve_classes_are_listed_and_those_below_ten_boxes_are_told_of():
    def warning_of(counts: dict[str, int]) -> list[str]:
        return find_warnings({"classes": counts}, None, [])

    assert warning_of({"fox": 10}) == []
    assert warning_of({"fox": 9, "owl": 10}) == ["fewer than 10 training boxes each have the class fox."]
    names = [f"c{number}" for number in range(13)]
    listed = ", ".join(names[:12])
    assert warning_of(dict.fromkeys(names[:12], 1)) == [f"fewer than 10 training boxes each have the class {listed}."]
    assert warning_of(dict.fromkeys(names, 1)) == [
        f"fewer than 10 training boxes each have the class {listed} and 1 more."
    ]


@pytest.mark.parametrize(("count", "num_opened"), [(200, 200), (201, 200), (3, 3)])
def test_up_to_200_images_are_opened_for_their_sizes(count, num_opened):
    opened = []

    class Rows:
        def select_columns(self, names):
            return self

        def __getitem__(self, index):
            if index == slice(None):
                return {"height": [None] * count, "width": [None] * count}
            opened.append(index)
            return {"image": Image.new("L", (index + 1, 7))}

    sizes = image_sizes(SimpleNamespace(dataset=Rows()))
    assert len(sizes) == len(opened) == num_opened
    assert (opened[0], opened[-1]) == (0, count - 1)
