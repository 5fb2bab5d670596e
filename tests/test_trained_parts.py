"""Runs that train parts of a detector: what is frozen stays, adapters are merged, and a resumed run ends with the same weights."""

import contextlib
import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForObjectDetection, pipeline
from transformers.utils import is_peft_available

from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.common.installation import install_command
from dino_hf.common.scenes import CATEGORIES, make_scenes
from dino_hf.run.starting_model import load_start
from dino_hf.run.trained_parts import parse_lora, read_freeze, read_lora, split_names
from dino_hf.run.training_run import train
from dino_hf.training import load_coco
from helpers import tiny_config

needs_peft = pytest.mark.skipif(not is_peft_available(), reason="peft is not installed")
QUICK = {
    "report_to": "none",
    "use_cpu": True,
    "num_denoising": 5,
    "learning_rate": 1e-2,
    "ema_decay": 0.5,
    "ema_warmup_steps": 0,
    "batch_size": 3,
    "max_steps": 4,
    "eval_steps": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Scenes of two splits, and a small model with weights and the classes of the scenes."""
    folder = tmp_path_factory.mktemp("parts")
    for name, num_images, seed in (("train", 7, 0), ("validation", 4, 1)):
        make_scenes(folder / "data" / name, num_images, seed=seed)
    torch.manual_seed(0)
    names = dict(enumerate(CATEGORIES.values()))
    DinoDetrForObjectDetection(tiny_config(num_denoising=5, id2label=names)).save_pretrained(folder / "model")
    DinoDetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 64}).save_pretrained(folder / "model")
    return folder


def run_quietly(folder: Path, **settings):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        run = train(folder / "data", **{"model": folder / "model"} | QUICK | settings)
    return run, " ".join(output.getvalue().split())


@pytest.fixture(scope="module")
def frozen(folder):
    return run_quietly(folder, output_dir=folder / "frozen", freeze=["backbone", "encoder"])


@pytest.fixture(scope="module")
def adapted(folder):
    pytest.importorskip("peft")
    return run_quietly(folder, output_dir=folder / "adapted", lora={"r": 4})


def read_run(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def interrupted(finished: Path, folder: Path) -> Path:
    """A copy of a finished run, as if it had been killed after its second step."""
    shutil.copytree(finished, folder)
    values = read_run(folder)
    del values["finished"]
    (folder / "run.json").write_text(json.dumps(values))
    shutil.rmtree(folder / "checkpoint-4")
    for name in ("model.safetensors", "last/model.safetensors"):
        (folder / name).unlink()
    return folder


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def test_frozen_parts_stay_and_the_others_move(folder, frozen):
    run, printed = frozen
    before, after = load_file(folder / "model/model.safetensors"), load_file(run.output_dir / "last/model.safetensors")
    changed = moved(before, after)
    assert changed
    assert not [name for name in changed if name.startswith(("model.backbone.model.", "model.encoder."))]
    assert any(name.startswith("model.decoder.") for name in changed)
    model = run.trainer.model
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert run.preflight.model["trained_parameters"] == trained < run.preflight.model["parameters"]
    assert f"{run.preflight.model['parameters'] / 1e6:.1f} M parameters" in printed
    assert "Frozen: backbone, encoder," in printed
    assert read_run(run.output_dir)["freeze"] == ["backbone", "encoder"]


@pytest.mark.parametrize("kind", ["frozen", pytest.param("adapted", marks=needs_peft)])
def test_a_resumed_run_has_the_same_parts_and_ends_with_the_same_weights(folder, kind, request, tmp_path):
    finished, _ = request.getfixturevalue(kind)
    copy = interrupted(finished.output_dir, tmp_path / "copy")
    run, printed = run_quietly(folder, model=None, output_dir=copy, resume=True)
    assert "resumed after step 2" in printed
    assert {name: read_run(copy)[name] for name in ("freeze", "lora")} == {
        name: read_run(finished.output_dir)[name] for name in ("freeze", "lora")
    }
    assert run.preflight.model["trained_parameters"] == finished.preflight.model["trained_parameters"]
    for name in ("model.safetensors", "last/model.safetensors"):
        assert moved(load_file(finished.output_dir / name), load_file(copy / name)) == set()


def test_adapters_are_merged_into_plain_models(folder, adapted):
    run, printed = adapted
    assert "LoRA adapters of rank 4" in printed
    assert read_run(run.output_dir)["lora"] == {"r": 4, "lora_alpha": 8}
    before = load_file(folder / "model/model.safetensors")
    for name in ("", "last"):
        after = load_file(run.output_dir / name / "model.safetensors")
        changed = moved(before, after)
        assert not [name for name in changed if name.startswith("model.backbone.")]
        assert any("sampling_offsets" in name for name in changed)
        assert any("class_head" in name for name in changed)
    loaded = AutoModelForObjectDetection.from_pretrained(run.output_dir)
    assert type(loaded) is DinoDetrForObjectDetection
    detector = pipeline("object-detection", model=str(run.output_dir), device="cpu")
    assert len(detector(Image.new("RGB", (90, 70)), threshold=0.0)) > 0
    training = loaded.config.provenance["training"]
    assert training["evaluation"]["metrics"]["AP"] == run.evaluation.metrics["AP"]
    assert {path.suffix for path in (run.output_dir / "checkpoint-4").glob("adapter_*")} == {".json", ".safetensors"}
    assert not (run.output_dir / "checkpoint-4/model.safetensors").exists()


def test_merged_weights_are_those_of_the_adapters_of_their_step(adapted):
    run, _ = adapted
    model = run.trainer.model  # with the best weights
    best, images = run.trainer.state.best_global_step, torch.randn(2, 3, 48, 64)
    last = AutoModelForObjectDetection.from_pretrained(run.output_dir / "last").eval()
    assert last.config.provenance["training"]["steps"] == 4
    model.load_adapter(str(run.output_dir / "checkpoint-4"), "newest")
    model.set_adapter("newest")
    with torch.no_grad():
        expected, found = (one.eval()(pixel_values=images) for one in (model, last))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert best in (2, 4)


def test_the_plan_counts_adapters(folder, adapted, tmp_path):
    run, _ = adapted
    whole, _ = run_quietly(folder, output_dir=tmp_path / "whole", dry_run=True)
    assert run.preflight.memory["fixed"] < whole.preflight.memory["fixed"]
    assert run.preflight.disk["checkpoint"] < 0.5 * whole.preflight.disk["checkpoint"]
    files = sum(path.stat().st_size for path in (run.output_dir / "checkpoint-4").glob("**/*.safetensors"))
    assert files < run.preflight.disk["checkpoint"]
    assert run.preflight.model["trained_parameters"] < 0.5 * whole.preflight.model["trained_parameters"]


def test_adapters_on_other_weights_are_not_resumed(folder, adapted, tmp_path):
    copy = interrupted(adapted[0].output_dir, tmp_path / "copy")
    other = shutil.copytree(folder / "model", tmp_path / "other")
    torch.manual_seed(1)
    config = DinoDetrForObjectDetection.from_pretrained(folder / "model").config
    DinoDetrForObjectDetection(config).save_pretrained(other)
    values = read_run(copy)
    (copy / "run.json").write_text(json.dumps(values | {"model": str(other)}))
    with pytest.raises(ValueError, match="weights have changed"):
        run_quietly(folder, model=None, output_dir=copy, resume=True)


def test_a_resumed_run_cannot_train_other_parts(folder, frozen, tmp_path):
    copy = interrupted(frozen[0].output_dir, tmp_path / "copy")
    for changes in ({"freeze": ["decoder"]}, {"lora": 4}):
        with pytest.raises(ValueError, match=f"started with {next(iter(changes))} .* leave out {next(iter(changes))}"):
            run_quietly(folder, model=None, output_dir=copy, resume=True, **changes)


def test_a_checkpoint_of_adapters_is_no_model_to_start_from(folder, adapted):
    data = load_coco(folder / "data/train/annotations.json", folder / "data/train")
    with pytest.raises(FileNotFoundError, match="has only adapters"):
        load_start(adapted[0].output_dir / "checkpoint-4", data, seed=0)


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"freeze": "neck"}, ["'neck'", "'backbone'", "'encoder'"]),
        ({"freeze": [3]}, ["freeze=[3]", "backbone"]),
        (
            {"freeze": ["backbone", "projections", "encoder", "query_selection", "denoising", "decoder"]},
            ["nothing to train"],
        ),
        ({"freeze": "backbone", "lora": 4}, ["--lora", "--freeze backbone"]),
        ({"lora": 0}, ["r=0", "16"]),
        ({"lora": {"rank": 4}}, ["'rank'", "did you mean r?"]),
        ({"lora": {"colour": 4}}, ["'colour'", "r, lora_alpha, lora_dropout"]),
        ({"lora": {"lora_dropout": 1.5}}, ["lora_dropout=1.5", "below 1"]),
    ],
)
@needs_peft
def test_what_cannot_be_trained_is_one_sentence(folder, tmp_path, settings, facts):
    with pytest.raises(ValueError, match=re.escape(facts[0])) as raised:
        run_quietly(folder, output_dir=tmp_path / "out", dry_run=True, **settings)
    assert all(fact in str(raised.value) for fact in facts), str(raised.value)


def test_frozen_random_weights_are_warned_of(folder, tmp_path):
    untrained = shutil.copytree(folder / "model", tmp_path / "untrained")
    (untrained / "model.safetensors").unlink()
    run, _ = run_quietly(folder, model=untrained, output_dir=tmp_path / "out", dry_run=True, freeze="encoder")
    assert any("--freeze encoder" in one and "random" in one for one in run.preflight.warnings)


def test_without_peft_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=re.escape(install_command("lora"))):
        read_lora(16)


@needs_peft
def test_options_of_the_command_line():
    assert split_names(r"backbone, encoder\.layers\.[0-9]{1,2}\.") == ["backbone", r"encoder\.layers\.[0-9]{1,2}\."]
    assert read_freeze("backbone") == ["backbone"]
    assert read_freeze([]) is None
    assert read_lora(parse_lora("8")) == {"r": 8, "lora_alpha": 16}
    assert read_lora(parse_lora("r=8,lora_dropout=0.1")) == {"r": 8, "lora_dropout": 0.1, "lora_alpha": 16}
    assert read_lora(True) == {"r": 16, "lora_alpha": 32}
    assert read_lora(None) is None
    with pytest.raises(ValueError, match="--lora 'many' must be like 16"):
        parse_lora("many")
