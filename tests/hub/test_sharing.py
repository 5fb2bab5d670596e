"""A saved folder works on machines without dino_hf: interpreters that see none of it, nor of what it does not need."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForObjectDetection,
    pipeline,
)
from typer.testing import CliRunner

import dino_hf
from dino_hf import (
    DinoDetrConfig,
    DinoDetrForObjectDetection,
    DinoDetrImageProcessor,
    DinoDetrImageProcessorPil,
    DinoDetrModel,
    use_backend,
)
from dino_hf.cli.app import app
from dino_hf.common.scenes import make_scenes
from dino_hf.model.own_backbones import OWN_MODEL_TYPES
from dino_hf.model.sharing import AUTO_MAP
from dino_hf.run.progress import BestApMetric
from dino_hf.run.publish import publish
from helpers import OWN_BACKBONES, randomize, tiny_config, tiny_images, tiny_labels
from test_pretrained_backbones import SETTINGS

FOLDER = Path(dino_hf.__file__).parent / "model"
OWN_CODE = {
    f"{part}_{model_type.removeprefix('dino_detr_')}.py": model_type
    for model_type in OWN_MODEL_TYPES
    for part in ("dino_detr", "configuration", "backbone")
}
FLOOR = {file.name for file in FOLDER.glob("*.py")} - {"__init__.py"} - OWN_CODE.keys()
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def code_in(folder: Path) -> set[str]:
    return {file.name for file in folder.glob("*.py")}


def dangling(folder: Path) -> list[str]:
    """Entries of an auto_map whose class is not in the folder."""
    wrong = []
    for file in folder.glob("*.json"):
        auto_map = json.loads(file.read_text()).get("auto_map", {})
        for entry in auto_map.values():
            for reference in entry.values() if isinstance(entry, dict) else [entry]:
                module, _, name = reference.rpartition(".")
                path = folder / f"{module}.py"
                if not path.is_file() or not re.search(
                    rf"^\s*(class|from .* import) .*\b{name}\b", path.read_text(), re.MULTILINE
                ):
                    wrong.append(f"{file.name}: {reference}")
    return wrong


def auto_map(folder: Path, file: str = "config.json") -> dict:
    return json.loads((folder / file).read_text()).get("auto_map")


# ---------------------------------------------------------------------------------------------------------------------
# Other machines


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """(script, packages that are absent, arguments) -> what the script prints, as json. The machine is a folder of links to
    the packages of this environment, without some; `-S` keeps the environment itself out."""
    site_packages = Path(torch.__file__).parents[1]
    farms = {}

    def run(script: str, absent: tuple[str, ...], *arguments: object, hub: Path | None = None) -> dict:
        if absent not in farms:
            farms[absent] = tmp_path_factory.mktemp("machine")
            for entry in site_packages.iterdir():
                name = entry.name.lower().lstrip("_").removeprefix("_editable_impl_")
                if not re.match(rf"(?:{'|'.join(absent)})(?![a-z])|editable_impl", name):
                    (farms[absent] / entry.name).symlink_to(entry)
        home = tmp_path_factory.mktemp("home")
        if hub is not None:
            (home / "hub").symlink_to(hub)
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "HF_HOME": str(home),
            "HF_MODULES_CACHE": str(home / "modules"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(farms[absent]),
            "OMP_NUM_THREADS": "1",
        }
        checked = CHECK_ABSENT + script
        run = subprocess.run(
            [sys.executable, "-S", "-s", "-c", checked, json.dumps(absent), *map(str, arguments)],
            cwd=home,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout.splitlines()[-1])

    return run


CHECK_ABSENT = """
import importlib, json, sys
for name in json.loads(sys.argv.pop(1)):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f"{name} is here")
"""

INFER = """
import warnings
from pathlib import Path
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForObjectDetection, pipeline

work, found = Path(sys.argv[1]), {"modules": {}}
images = torch.load(work / "images.pt")

def load(auto, place, **kwargs):
    return auto.from_pretrained(place, trust_remote_code=True, **kwargs)

def outputs(model):
    with torch.no_grad():
        out = model.eval()(**images)
    return out.logits, out.pred_boxes

config = load(AutoConfig, work / "folder")
model = load(AutoModelForObjectDetection, work / "folder")
base = load(AutoModel, work / "folder")
processors = {name: load(AutoImageProcessor, work / "folder", backend=name) for name in ("torchvision", "pil")}
for thing in (config, model, base, *processors.values(), load(AutoImageProcessor, work / "folder")):
    found["modules"][type(thing).__name__] = type(thing).__module__
found["named backend"] = config.ms_deform_attn_backend
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    logits, boxes = outputs(model)
    with torch.no_grad():
        hidden = base.eval()(**images).last_hidden_state
found["warnings"] = [str(one.message) for one in caught]
detector = pipeline("object-detection", model=str(work / "folder"), trust_remote_code=True, device="cpu")
found["detections"] = detector(str(work / "image.png"), threshold=0.0)

# Saved again, in this order and the other.
model.save_pretrained(work / "again")
processors["torchvision"].save_pretrained(work / "again")
processors["pil"].save_pretrained(work / "base again")
base.save_pretrained(work / "base again")
config.save_pretrained(work / "config again")
same = [outputs(load(AutoModelForObjectDetection, work / name)) for name in ("again", "base again")]

# A repository, and a folder whose code stands in that repository.
repository = load(AutoModelForObjectDetection, "someone/tiny")
found["modules"]["repository"] = type(repository).__module__
found["repository processor"] = type(load(AutoImageProcessor, "someone/tiny")).__name__
elsewhere = load(AutoModelForObjectDetection, work / "elsewhere")
found["modules"]["elsewhere"] = type(elsewhere).__module__
elsewhere.save_pretrained(work / "elsewhere again")
load(AutoImageProcessor, work / "elsewhere").save_pretrained(work / "elsewhere again")
same += [outputs(repository), outputs(elsewhere), outputs(load(AutoModelForObjectDetection, work / "elsewhere again"))]
torch.save((logits, boxes, hidden), work / "outputs.pt")
found["same"] = [torch.equal(a, logits) and torch.equal(b, boxes) for a, b in same]
print(json.dumps(found))
"""

ABSENT = ("dino_hf", "scipy", "triton", "kernels")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with a model and its processor, and what comes out of them here."""
    work = tmp_path_factory.mktemp("shared")
    torch.manual_seed(0)
    # The name of a kernel: it stays here, and must not keep others from running the model.
    config = tiny_config(id2label={index: f"thing {index}" for index in range(5)}, ms_deform_attn_backend="cpu")
    model = randomize(DinoDetrForObjectDetection(config).eval(), 0.1)
    model.save_pretrained(work / "folder")
    DinoDetrImageProcessor(size={"shortest_edge": 72, "longest_edge": 112}).save_pretrained(work / "folder")
    pixel_values, pixel_mask = tiny_images()
    torch.save({"pixel_values": pixel_values, "pixel_mask": pixel_mask}, work / "images.pt")
    Image.effect_noise((96, 64), 80).convert("RGB").save(work / "image.png")
    # The cache that a download leaves.
    snapshot = work / "hub/models--someone--tiny/snapshots" / COMMIT
    shutil.copytree(work / "folder", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text(COMMIT)
    (work / "elsewhere").mkdir()
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        shutil.copy(work / "folder" / name, work / "elsewhere" / name)
    for name in ("config.json", "preprocessor_config.json"):
        file = work / "elsewhere" / name
        content = json.loads(file.read_text())
        content["auto_map"] = {
            auto: "someone/tiny--" + (entry["torchvision"] if isinstance(entry, dict) else entry)
            for auto, entry in content["auto_map"].items()
        }
        file.write_text(json.dumps(content))
    return work, model


def test_a_folder_infers_without_dino_hf_scipy_triton_and_kernels(machine, shared):
    work, model = shared
    found = machine(INFER, ABSENT, work, hub=work / "hub")
    assert all(module.startswith("transformers_modules.") for module in found["modules"].values()), found["modules"]
    assert set(found["modules"]) == {
        "DinoDetrConfig",
        "DinoDetrForObjectDetection",
        "DinoDetrModel",
        "DinoDetrImageProcessor",
        "DinoDetrImageProcessorPil",
        "repository",
        "elsewhere",
    }
    assert found["repository processor"] == "DinoDetrImageProcessor"
    assert found["named backend"] == "cpu"
    assert found["warnings"] == []
    assert found["same"] == [True] * 5

    with use_backend("torch"), torch.no_grad():
        here = model(**torch.load(work / "images.pt"))
        detector = pipeline("object-detection", model=str(work / "folder"), device="cpu")
        detections = detector(str(work / "image.png"), threshold=0.0)
    # The same code and weights in float32; only the number of threads, and with it the order of sums, can differ.
    for theirs, ours in zip(
        torch.load(work / "outputs.pt"), (here.logits, here.pred_boxes, here.last_hidden_state), strict=True
    ):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert len(detections) == len(found["detections"])
    for theirs, ours in zip(found["detections"][:5], detections[:5], strict=True):
        assert theirs["label"] == ours["label"]
        assert theirs["score"] == pytest.approx(ours["score"], abs=1e-4)
        assert theirs["box"] == pytest.approx(ours["box"], abs=1)  # whole pixels, cut off

    for name in ("again", "base again", "config again", "elsewhere again"):
        assert code_in(work / name) == FLOOR
        assert dangling(work / name) == []
        assert auto_map(work / name) == AUTO_MAP
        if name != "config again":
            assert auto_map(work / name, "preprocessor_config.json") == {
                "AutoImageProcessor": AUTO_MAP["AutoImageProcessor"]
            }


LOAD_AND_SAVE = """
from pathlib import Path
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForObjectDetection

work, found = Path(sys.argv[1]), {}
images = torch.load(work / "images.pt")
for name in sorted(path.name for path in work.iterdir() if path.is_dir() and path.name.startswith("dino_detr")):
    def load(auto, place):
        return auto.from_pretrained(place, trust_remote_code=True)

    model = load(AutoModelForObjectDetection, work / name).eval()
    load(AutoImageProcessor, work / name).save_pretrained(work / f"again {name}")
    model.save_pretrained(work / f"again {name}")
    load(AutoConfig, work / name).save_pretrained(work / f"config {name}")
    with torch.no_grad():
        logits = model(**images).logits
        same = torch.equal(load(AutoModelForObjectDetection, work / f"again {name}").eval()(**images).logits, logits)
        base = load(AutoModel, work / name).eval()(**images).intermediate_logits[:, -1]
    parts = (model, model.config.backbone_config, model.model.backbone.model)
    modules = [type(part).__module__.split(".")[0] for part in parts]
    found[name] = {"logits": logits.tolist(), "same": same and torch.equal(base, logits), "modules": modules}
print(json.dumps(found))
"""


def test_detectors_on_own_backbones_infer_without_dino_hf(machine, tmp_path):
    torch.manual_seed(0)
    pixel_values, pixel_mask = tiny_images()
    images = {"pixel_values": pixel_values, "pixel_mask": pixel_mask}
    torch.save(images, tmp_path / "images.pt")
    expected = {}
    for model_type, settings in OWN_BACKBONES.items():
        model = randomize(DinoDetrForObjectDetection(tiny_config(backbone_config=dict(settings))).eval(), 0.1)
        DinoDetrImageProcessor().save_pretrained(tmp_path / model_type)
        model.save_pretrained(tmp_path / model_type)
        with torch.no_grad(), use_backend("torch"):
            expected[model_type] = model(**images).logits
    found = machine(LOAD_AND_SAVE, ABSENT, tmp_path)
    assert found.keys() == expected.keys() == set(OWN_MODEL_TYPES)
    for model_type, logits in expected.items():
        assert found[model_type]["same"] is True
        assert found[model_type]["modules"] == ["transformers_modules"] * 3
        torch.testing.assert_close(torch.tensor(found[model_type]["logits"]), logits, rtol=1e-4, atol=1e-4)
        own = {file for file, owner in OWN_CODE.items() if owner == model_type}
        for name in (model_type, f"again {model_type}", f"config {model_type}"):
            assert code_in(tmp_path / name) == FLOOR | own
            assert dangling(tmp_path / name) == []


PREDICT = """
from transformers import pipeline

detector = pipeline("object-detection", model=sys.argv[1], trust_remote_code=True, device="cpu")
parts = detector.model, detector.model.config.backbone_config, detector.image_processor
print(json.dumps({"modules": [type(part).__module__ for part in parts], "found": detector(sys.argv[2], threshold=0.0)}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN_BACKBONES)
def test_a_run_on_a_saved_own_backbone_resumes_and_its_result_predicts_without_dino_hf(
    name, machine, tmp_path, monkeypatch
):
    """`dino-hf train --backbone FOLDER`, stopped in the middle and resumed. Only the size of the new detector is changed here."""
    torch.manual_seed(3)
    backbone = randomize(AutoBackbone.from_config(AutoConfig.for_model(**OWN_BACKBONES[name])), 0.1)
    backbone.save_pretrained(tmp_path / "backbone")
    DinoDetrImageProcessor().save_pretrained(tmp_path / "backbone")
    make_scenes(tmp_path / "data/train", 7, seed=0)
    make_scenes(tmp_path / "data/validation", 2, seed=1)
    usual = DinoDetrForObjectDetection.from_backbone
    small = staticmethod(lambda backbone, **settings: usual(backbone, **SETTINGS, **settings))
    monkeypatch.setattr(DinoDetrForObjectDetection, "from_backbone", small)

    def train(folder: str, *options: str):
        words = "--max-steps 4 --save-steps 2 --eval-steps 2 --batch-size 2 --gradient-accumulation-steps 1 --num-denoising 5"
        sizes = "--short-sides 48 --longest-side 80 --crop 0 --learning-rate 1e-3 --use-cpu --report-to none"
        arguments = [
            "train",
            tmp_path / "data",
            "--output-dir",
            tmp_path / folder,
            *options,
            *words.split(),
            *sizes.split(),
        ]
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt

    whole = train("whole", "--backbone", tmp_path / "backbone")
    assert whole.exit_code == 0, whole.output
    with monkeypatch.context() as patch:
        patch.setattr(BestApMetric, "on_step_end", stop)
        assert train("stopped", "--backbone", tmp_path / "backbone").exit_code != 0
    assert [path.name for path in (tmp_path / "stopped").glob("checkpoint-*")] == ["checkpoint-2"]
    resumed = train("stopped", "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "resumed after step 2" in resumed.output
    for file in ("model.safetensors", "last/model.safetensors"):
        stopped, unbroken = (load_file(tmp_path / folder / file) for folder in ("stopped", "whole"))
        torch.testing.assert_close(stopped, unbroken, rtol=0, atol=0)

    model = DinoDetrForObjectDetection.from_pretrained(tmp_path / "stopped")
    own = {file for file, owner in OWN_CODE.items() if owner == name}
    assert model.config.backbone_config.model_type == name
    assert code_in(tmp_path / "stopped") == FLOOR | own
    image = next((tmp_path / "data/validation").rglob("*.png"))
    theirs = machine(PREDICT, ABSENT, tmp_path / "stopped", image)
    assert all(module.startswith("transformers_modules.") for module in theirs["modules"]), theirs["modules"]
    with use_backend("torch"), torch.no_grad():
        ours = pipeline("object-detection", model=str(tmp_path / "stopped"), device="cpu")(str(image), threshold=0.0)
    assert len(theirs["found"]) == len(ours) > 0
    for first, second in zip(theirs["found"][:5], ours[:5], strict=True):
        assert first["label"] == second["label"]
        assert first["score"] == pytest.approx(second["score"], abs=1e-4)
        assert first["box"] == pytest.approx(second["box"], abs=1)


WITHOUT_CODE = """
from transformers import AutoModelForObjectDetection

try:
    AutoModelForObjectDetection.from_pretrained(sys.argv[1], trust_remote_code=True)
except ImportError as error:
    print(json.dumps({"error": str(error)}))
"""


def test_a_config_that_was_edited_to_an_own_backbone_is_refused_in_words(machine, tmp_path):
    DinoDetrForObjectDetection(tiny_config()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["backbone_config"] = OWN_BACKBONES["dino_detr_focalnet"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    error = machine(WITHOUT_CODE, ABSENT, tmp_path)["error"]
    assert "dino_detr_focalnet" in error
    assert "configuration_focalnet.py" in error
    assert "pip install dino_hf" in error


WITHOUT_TORCHVISION = """
from transformers import AutoImageProcessor, pipeline

detector = pipeline("object-detection", model=sys.argv[1], trust_remote_code=True, device="cpu")
detections = detector(sys.argv[2], threshold=0.0)
print(json.dumps({"processor": type(detector.image_processor).__name__, "number": len(detections)}))
"""


def test_a_machine_without_torchvision_gets_the_processor_on_pil(machine, shared):
    work, _ = shared
    # timm needs torchvision
    found = machine(WITHOUT_TORCHVISION, (*ABSENT, "torchvision", "timm"), work / "folder", work / "image.png")
    assert found == {"processor": "DinoDetrImageProcessorPil", "number": 15 * 5}


TRAIN = """
from pathlib import Path
import torch
from transformers import AutoModelForObjectDetection, Trainer, TrainingArguments, set_seed

work, found = Path(sys.argv[1]), {}
batch = torch.load(work / "batch.pt")

def load(place):
    return AutoModelForObjectDetection.from_pretrained(place, trust_remote_code=True)

model = load(work / "folder").train()
torch.manual_seed(0)
loss = model(**batch).loss
loss.backward()
found["loss"] = loss.item()
found["without gradient"] = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
model.zero_grad()

class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return {"pixel_values": batch["pixel_values"][index % 2], "pixel_mask": batch["pixel_mask"][index % 2],
                "labels": batch["labels"][index % 2]}

def collate(samples):
    return {"pixel_values": torch.stack([s["pixel_values"] for s in samples]),
            "pixel_mask": torch.stack([s["pixel_mask"] for s in samples]), "labels": [s["labels"] for s in samples]}

args = TrainingArguments(
    output_dir=str(work / "training"), max_steps=2, per_device_train_batch_size=2, per_device_eval_batch_size=4,
    save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
    metric_for_best_model="loss", greater_is_better=False, prediction_loss_only=True, remove_unused_columns=False,
    report_to="none", disable_tqdm=True, dataloader_pin_memory=False, use_cpu=True)
before = {name: value.clone() for name, value in model.state_dict().items()}

def trainer_of(model):
    return Trainer(model=model, args=args, train_dataset=Samples(), eval_dataset=Samples(), data_collator=collate)

trainer = trainer_of(model)
trainer.train()
found["moved"] = sum(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
found["best"] = trainer.state.best_model_checkpoint
best = type(model).from_pretrained(found["best"]).state_dict()
found["best is loaded"] = all(torch.equal(value, best[name]) for name, value in model.state_dict().items())
trainer.save_model(str(work / "trained"))
trained = load(work / "trained").state_dict()
found["saved"] = all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
args.max_steps = 3
resumed = trainer_of(load(work / "folder"))
resumed.train(resume_from_checkpoint=str(work / "training/checkpoint-2"))
found["steps"] = resumed.state.global_step
print(json.dumps(found))
"""


LOAD = """
from transformers import AutoImageProcessor, AutoModelForObjectDetection
import torch

images, names = torch.load(sys.argv[1] + "/images.pt"), []
for auto in (AutoImageProcessor, AutoModelForObjectDetection):
    loaded = auto.from_pretrained(sys.argv[1], trust_remote_code=True)
    names.append(type(loaded).__module__.partition(".")[0])
with torch.no_grad():
    print(json.dumps({"names": names, "logits": loaded.eval()(**images).logits.tolist()}))
"""


def test_what_push_uploads_loads_without_dino_hf(machine, tmp_path):
    model = randomize(DinoDetrForObjectDetection(tiny_config()), scale=0.1).eval()
    model.save_pretrained(tmp_path / "saved")
    DinoDetrImageProcessor().save_pretrained(tmp_path / "saved")
    uploaded = tmp_path / "uploaded"
    uploaded.mkdir()

    def copy(publication):
        for name, path in publication.files.items():
            shutil.copyfile(path, uploaded / name)

    publish(tmp_path / "saved", "someone/birds", show=copy)
    pixel_values, pixel_mask = tiny_images()
    torch.save({"pixel_values": pixel_values, "pixel_mask": pixel_mask}, uploaded / "images.pt")
    found = machine(LOAD, ABSENT, uploaded)
    assert found["names"] == ["transformers_modules", "transformers_modules"]
    with torch.no_grad():
        expected = model(pixel_values, pixel_mask).logits
    torch.testing.assert_close(torch.tensor(found["logits"]), expected, rtol=0, atol=1e-5)


def test_a_folder_trains_without_dino_hf(machine, shared):
    work, _ = shared
    pixel_values, pixel_mask = tiny_images()
    batch = {"pixel_values": pixel_values, "pixel_mask": pixel_mask, "labels": tiny_labels(3, 0)}
    torch.save(batch, work / "batch.pt")
    found = machine(TRAIN, ("dino_hf", "triton", "kernels"), work)
    model = DinoDetrForObjectDetection.from_pretrained(work / "folder").train()
    torch.manual_seed(0)
    with use_backend("torch"):
        loss = model(**batch).loss
    # As above; the loss is a sum over all layers.
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert found["without gradient"] == []
    assert found["moved"] > 100
    assert found["best is loaded"]
    assert found["saved"]
    assert found["steps"] == 3
    for name in ("training/checkpoint-1", "training/checkpoint-2", "training/checkpoint-3", "trained"):
        assert code_in(work / name) == (FLOOR if name == "trained" else set())
        assert dangling(work / name) == []


# ---------------------------------------------------------------------------------------------------------------------
# This machine


@pytest.mark.parametrize(
    "save",
    [
        lambda folder: DinoDetrForObjectDetection(tiny_config()).save_pretrained(folder),
        lambda folder: DinoDetrModel(tiny_config()).save_pretrained(str(folder)),
        lambda folder: tiny_config().save_pretrained(folder),
        lambda folder: DinoDetrImageProcessor().save_pretrained(folder),
        lambda folder: DinoDetrImageProcessorPil().save_pretrained(str(folder)),
    ],
    ids=["detector", "model", "configuration", "processor", "PIL processor"],
)
def test_whatever_is_saved_brings_all_of_the_code(save, tmp_path):
    save(tmp_path)
    assert code_in(tmp_path) == FLOOR
    assert dangling(tmp_path) == []


@pytest.mark.parametrize("saved", [DinoDetrForObjectDetection, DinoDetrModel])
def test_a_folder_gives_detector_and_base_model(saved, tmp_path):
    model = randomize(saved(tiny_config())).eval()
    model.save_pretrained(tmp_path)
    pixel_values, pixel_mask = tiny_images()
    detector = AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    base = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model(pixel_values, pixel_mask)
        torch.testing.assert_close(
            detector(pixel_values, pixel_mask).last_hidden_state, expected.last_hidden_state, rtol=0, atol=0
        )
        torch.testing.assert_close(
            base(pixel_values, pixel_mask).last_hidden_state, expected.last_hidden_state, rtol=0, atol=0
        )


@pytest.mark.parametrize("trust_remote_code", [None, False, True])
def test_installed_classes_win_and_nobody_is_asked(trust_remote_code, shared, monkeypatch):
    def ask(*args):
        raise AssertionError("the user was asked")

    monkeypatch.setattr("builtins.input", ask)
    folder = shared[0] / "folder"
    kwargs = {"trust_remote_code": trust_remote_code}
    assert type(AutoConfig.from_pretrained(folder, **kwargs)) is DinoDetrConfig
    assert type(AutoModel.from_pretrained(folder, **kwargs)) is DinoDetrModel
    assert type(AutoModelForObjectDetection.from_pretrained(folder, **kwargs)) is DinoDetrForObjectDetection
    assert type(AutoImageProcessor.from_pretrained(folder, **kwargs)) is DinoDetrImageProcessor
    assert type(AutoImageProcessor.from_pretrained(folder, backend="pil", **kwargs)) is DinoDetrImageProcessorPil
    detector = pipeline("object-detection", model=str(folder), device="cpu", **kwargs)
    assert type(detector.model) is DinoDetrForObjectDetection


def test_what_points_elsewhere_is_replaced_when_it_is_saved(shared, tmp_path):
    """A folder whose code is in another repository, or in files that only that folder has."""
    config = AutoConfig.from_pretrained(shared[0] / "elsewhere")
    assert config.auto_map["AutoConfig"].startswith("someone/tiny--")
    config.auto_map["AutoModelForObjectDetection"] = "modeling_dino_detr.Fork"  # a file of the same name
    config.auto_map["AutoBackbone"] = "my_backbone.MyBackbone"
    config.save_pretrained(tmp_path)
    assert auto_map(tmp_path) == AUTO_MAP
    processor = AutoImageProcessor.from_pretrained(shared[0] / "elsewhere")
    processor.save_pretrained(tmp_path)
    assert auto_map(tmp_path, "preprocessor_config.json") == {"AutoImageProcessor": AUTO_MAP["AutoImageProcessor"]}


USERS_CLASSES = """
from dino_hf import DinoDetrConfig, DinoDetrForObjectDetection, DinoDetrImageProcessor

class MyConfig(DinoDetrConfig):
    pass

class MyDetector(DinoDetrForObjectDetection):
    pass

class MyProcessor(DinoDetrImageProcessor):
    pass
"""


@pytest.fixture
def users(tmp_path_factory, monkeypatch):
    """A module of a user, anew for each test."""
    folder = tmp_path_factory.mktemp("users")
    (folder / "my_dino.py").write_text(USERS_CLASSES)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "my_dino", raising=False)
    import my_dino

    yield my_dino
    monkeypatch.delitem(sys.modules, "my_dino")


def test_a_users_subclasses_do_not_pass_for_ours(users, tmp_path):
    """They are nobody's remote code: what is written has no auto_map of theirs, and none of ours that would give another class
    than the one it was saved by, except for a model, of which dino_hf itself makes its own class again."""
    assert users.MyDetector._auto_class is None
    users.MyDetector(tiny_config()).save_pretrained(tmp_path / "model")
    assert dangling(tmp_path / "model") == []
    assert type(AutoModelForObjectDetection.from_pretrained(tmp_path / "model")) is DinoDetrForObjectDetection
    for thing, file in ((users.MyConfig(), "config.json"), (users.MyProcessor(), "preprocessor_config.json")):
        folder = tmp_path / type(thing).__name__
        thing.auto_map = {"AutoConfig": "configuration_dino_detr.DinoDetrConfig"}  # as from a loaded folder
        thing.save_pretrained(folder)
        assert auto_map(folder, file) is None
        assert code_in(folder) == set()


def test_a_users_registered_subclasses_bring_their_own_file(users, tmp_path):
    users.MyDetector.register_for_auto_class("AutoModelForObjectDetection")
    users.MyDetector(tiny_config()).save_pretrained(tmp_path)
    assert auto_map(tmp_path) == {**AUTO_MAP, "AutoModelForObjectDetection": "my_dino.MyDetector"}
    users.MyProcessor.register_for_auto_class()
    users.MyProcessor().save_pretrained(tmp_path)
    assert auto_map(tmp_path, "preprocessor_config.json") == {"AutoImageProcessor": "my_dino.MyProcessor"}
    assert code_in(tmp_path) == {*FLOOR, "my_dino.py"}
    assert dangling(tmp_path) == []


@pytest.mark.parametrize("cls", [DinoDetrConfig, DinoDetrImageProcessor])
def test_one_attribute_turns_the_code_off(cls, tmp_path, monkeypatch):
    monkeypatch.setattr(cls, "saves_code", False)
    cls().save_pretrained(tmp_path)
    assert code_in(tmp_path) == set()
    assert auto_map(tmp_path, next(file.name for file in tmp_path.glob("*.json"))) is None


@pytest.mark.parametrize(
    ("name", "has_code"),
    [
        ("checkpoint-20", False),
        ("checkpoint-20/ema", False),
        ("checkpoint-best", True),
        ("checkpoint", True),
        ("checkpoint/ema", True),
    ],
)
def test_a_trainers_checkpoint_has_no_code(name, has_code, tmp_path):
    tiny_config().save_pretrained(tmp_path / name)
    assert (code_in(tmp_path / name) == FLOOR) is has_code
    assert (auto_map(tmp_path / name) == AUTO_MAP) is has_code
    assert type(AutoConfig.from_pretrained(tmp_path / name)) is DinoDetrConfig
