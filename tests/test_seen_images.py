"""What a run held out is what its model is evaluated on."""

import contextlib
import io
import shutil

import pytest

import dino_hf
from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.data import load_data
from dino_hf.data.image_digests import image_digests, pack
from dino_hf.evaluation import load_split
from dino_hf.evaluation.seen_images import seen_images
from dino_hf.tools.scenes import make_scenes
from helpers import tiny_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on data without validation images, of another seed and fraction than the default."""
    folder = tmp_path_factory.mktemp("seen")
    make_scenes(folder / "data/train", 15, seed=0)
    tiny_config(num_denoising=5).save_pretrained(folder / "untrained")
    DinoDetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 64}).save_pretrained(folder / "untrained")
    with contextlib.redirect_stdout(io.StringIO()):
        run = dino_hf.train(
            folder / "data",
            model=folder / "untrained",
            output_dir=folder / "out",
            seed=3,
            validation_fraction=0.4,
            max_steps=1,
            report_to="none",
            use_cpu=True,
            num_denoising=5,
        )
    return folder, run


def test_the_validation_images_are_those_of_the_run(trained):
    folder, run = trained
    for place in (folder / "out", folder / "out/last", next((folder / "out").glob("checkpoint-*"))):
        evaluation = dino_hf.evaluate(place, folder / "data", num_bootstrap=0, device="cpu")
        assert evaluation.counts["images"] == run.evaluation.counts["images"] == 5
        assert any("the 5 of 15 training images that the training run held out" in note for note in evaluation.notes)
    evaluation = dino_hf.evaluate(folder / "out", folder / "data", num_bootstrap=0, device="cpu")
    assert evaluation.metrics["AP"] == run.evaluation.metrics["AP"]
    model = run.trainer.model
    part, _ = load_split(folder / "data", models=[model])
    expected = load_data(folder / "data", seed=3, validation_fraction=0.4).validation
    assert sorted(part.dataset["file_name"]) == sorted(expected.dataset["file_name"])


def test_images_that_were_trained_on_are_refused(trained, tmp_path):
    folder, run = trained
    model = run.trainer.model
    make_scenes(tmp_path / "test", 4, seed=9)
    trained_on = run.trainer._train_data.dataset.with_format("arrow")[:1]["image"].to_pylist()[0]["path"]
    shutil.copy(trained_on, sorted(tmp_path.rglob("*.png"))[1])
    with pytest.raises(ValueError, match=r"^1 of the 4 test images were trained on.*--allow-trained"):
        load_split(tmp_path, "test", models=[model])
    part, notes = load_split(tmp_path, "test", models=[model], allow_trained=True)
    assert len(part.dataset) == 4
    assert notes[-1].startswith("1 of the 4 test images were trained on")
    part, notes = load_split(folder / "data", "train", models=[model])
    assert len(part.dataset) == 10
    assert notes[-1].startswith("10 of the 10 train images")


def test_data_that_are_loaded_are_evaluated(trained):
    folder, run = trained
    data = load_data(folder / "data", seed=3, validation_fraction=0.4)
    evaluation = dino_hf.evaluate(run.trainer.model, data, num_bootstrap=0, device="cpu")
    assert evaluation.counts["images"] == 5
    with pytest.raises(ValueError, match="has no test images, but train, validation"):
        dino_hf.evaluate(run.trainer.model, data, split="test", num_bootstrap=0)


def test_odd_records_count_as_none(trained):
    folder, _ = trained
    model = DinoDetrForObjectDetection(tiny_config())
    for provenance in (
        None,
        {"training": 3},
        {"training": {"images": [1]}},
        {"training": {"images": {"trained": 7}}},
    ):
        model.config.provenance = provenance
        assert seen_images(model) == (set(), set())
    part, _ = load_split(folder / "data", models=[model, None])
    assert part.dataset["file_name"] == load_data(folder / "data").validation.dataset["file_name"]


def test_other_data_are_split_as_ever(trained, tmp_path):
    make_scenes(tmp_path / "train", 10, seed=8)
    part, _ = load_split(tmp_path, models=[trained[1].trainer.model])
    assert len(part.dataset) == 2
    assert not set(image_digests(part)) & seen_images(trained[1].trainer.model).trained
    assert len(pack(image_digests(part))) == 16  # 10 bytes
