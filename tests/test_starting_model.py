"""What training starts from, and what it refuses to start from."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.error import URLError

import pytest
import torch
from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

from data_layouts import draw_splits, write_layout
from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.common import hub_access
from dino_hf.data import CocoData
from dino_hf.run import starting_model
from dino_hf.run import training_run as run
from dino_hf.run.record import RunRecord
from dino_hf.run.starting_model import Start, adapt_start, load_checkpoint, load_start
from dino_hf.training import get_recipe
from helpers import RESNET, randomize, tiny_config

DATA = CocoData(None, {0: "cat", 1: "dog", 2: "emu"}, [4, 9, 11])


def weights(model) -> dict[str, torch.Tensor]:
    return model.state_dict()


def test_a_detector_keeps_the_classes_that_it_knows(tmp_path):
    model = DinoDetrForObjectDetection(tiny_config(num_labels=2, id2label={0: "emu", 1: "ant"}))
    model.config.provenance = {"start": "random weights", "license": "mit"}
    randomize(model)  # as if it were trained
    model.half().save_pretrained(tmp_path)
    DinoDetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 64}).save_pretrained(tmp_path)
    start = load_start(tmp_path, DATA, seed=0)
    assert start.model.dtype == torch.float32
    assert (start.model.config.id2label, start.model.config.category_ids) == (DATA.id2label, DATA.category_ids)
    head, old = (one.model.decoder.heads[0].class_head.weight for one in (start.model, model))
    assert torch.equal(head[2], old[0].float())
    assert start.image_processor.size == {"shortest_edge": 48, "longest_edge": 64}
    assert start.notes == ["Kept 1 of 3 classes: emu", "New: cat, dog", "Dropped: ant"]
    assert start.model.config.provenance == {"license": "mit"}  # the start is this folder now


def test_new_heads_follow_the_seed_and_the_random_numbers_go_on(tmp_path):
    DinoDetrForObjectDetection(tiny_config(num_labels=2)).save_pretrained(tmp_path)
    state = torch.get_rng_state()
    heads = [
        load_start(tmp_path, DATA, seed=seed).model.model.decoder.heads[0].class_head.weight.detach()
        for seed in (3, 4, 3)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(heads[0], heads[2])
    assert not torch.equal(heads[0], heads[1])


def test_two_threads_that_load_leave_no_seed_behind(tmp_path, monkeypatch):
    tiny_config(num_labels=2).save_pretrained(tmp_path)
    calls, second_is_in, one_is_done = [], threading.Event(), threading.Event()

    def draw(folder, data, source):
        calls.append(folder)
        if len(calls) == 1:
            second_is_in.wait(timeout=0.5)  # if nothing keeps the threads apart
        else:
            second_is_in.set()
            one_is_done.wait(timeout=60)
        return torch.rand(3)

    def load(seed):
        drawn = load_start(tmp_path, DATA, seed)
        one_is_done.set()
        return drawn

    monkeypatch.setattr(starting_model, "_from_configuration", draw)
    torch.manual_seed(77)
    state = torch.get_rng_state()
    with ThreadPoolExecutor(2) as pool:
        drawn = list(pool.map(load, (1, 2)))
    assert torch.equal(torch.get_rng_state(), state)
    expected = [torch.rand(3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    assert all(map(torch.equal, drawn, expected))


def test_a_configuration_alone_starts_from_random_weights_of_the_seed(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    torch.manual_seed(5)
    first = load_start(tmp_path, DATA, seed=1)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)
    again, other = load_start(tmp_path, DATA, seed=1), load_start(tmp_path, DATA, seed=2)
    assert all(torch.equal(value, weights(again.model)[name]) for name, value in weights(first.model).items())
    assert any(not torch.equal(value, weights(other.model)[name]) for name, value in weights(first.model).items())
    assert first.source == f"random weights: {tmp_path} has a configuration but no weights"
    assert first.notes == ["All 3 classes start from random weights"]
    assert first.model.config.category_ids == [4, 9, 11]
    assert first.model.config.provenance == {"start": "random weights"}
    assert first.image_processor.size == DinoDetrImageProcessor().size


@pytest.fixture
def backbone(tmp_path, monkeypatch):
    """A folder with a ResNet classifier of other pixel statistics; new detectors are tiny."""
    settings = {name: value for name, value in RESNET.items() if name != "model_type"}
    classifier = ResNetForImageClassification(ResNetConfig(**settings))
    randomize(classifier)
    classifier.save_pretrained(tmp_path / "backbone")
    ConvNextImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]).save_pretrained(tmp_path / "backbone")

    @staticmethod
    def tiny(**settings):
        return tiny_config(num_labels=len(settings["id2label"]), **settings)

    monkeypatch.setattr(starting_model.DinoDetrForObjectDetection, "config_class", tiny)
    return tmp_path / "backbone", classifier.resnet.state_dict()


@pytest.mark.parametrize("is_default", [True, False])
def test_a_new_detector_gets_the_weights_and_the_pixels_of_its_backbone(monkeypatch, backbone, tmp_path, is_default):
    folder, expected = backbone
    if is_default:
        monkeypatch.setattr(starting_model, "BACKBONE", str(folder))
    start = load_start(None, DATA, seed=0, backbone=None if is_default else str(folder))
    weights_here = weights(start.model.model.backbone.model)
    assert len(weights_here) > 20
    assert all(torch.equal(value, expected[name]) for name, value in weights_here.items())
    assert start.model.config.provenance == {"start": "random weights, except the backbone of backbone"}
    assert start.source == f"random weights, except the backbone of {folder}"
    start.model.save_pretrained(tmp_path / "saved")
    assert not any(str(folder) in path.read_text() for path in (tmp_path / "saved").glob("*.[jm]*"))  # it is private
    assert (start.model.config.id2label, start.model.config.category_ids) == (DATA.id2label, DATA.category_ids)
    processor = start.image_processor
    assert (list(processor.image_mean), list(processor.image_std)) == ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    assert processor.size == DinoDetrImageProcessor().size


def test_a_new_detector_has_the_architecture_of_the_recipe_and_its_nms(backbone):
    folder, _ = backbone
    recipe = get_recipe("stable-dino")
    start = load_start(None, DATA, 0, str(folder), recipe.architecture)
    assert start.model.config.encoder_fusion
    (note,) = adapt_start(start, recipe)
    assert "hard NMS" in note
    assert start.image_processor.nms == recipe.nms
    assert adapt_start(start, recipe) == []
    plain = load_start(None, DATA, 0, str(folder))
    assert any("encoder_fusion stays False" in note for note in adapt_start(plain, recipe))


def test_a_trained_detector_is_told_that_its_class_loss_changes(tmp_path):
    config = tiny_config(class_loss="quality_focal", num_labels=len(DATA.id2label))
    start = Start(DinoDetrForObjectDetection(config), DinoDetrImageProcessor(), "some/detector", [])
    (note,) = adapt_start(start, get_recipe("paper-12ep"))
    assert "changes from quality_focal to focal" in note
    assert "--class-loss quality_focal" in note
    assert adapt_start(start, get_recipe("paper-12ep", model_settings={"class_loss": "quality_focal"})) == []
    assert adapt_start(start, get_recipe("finetune")) == []  # keeps the class loss
    get_recipe("finetune").configure(start.model)
    assert start.model.config.class_loss == "quality_focal"
    start.model.config.cls_loss_coefficient = 6.0
    (note,) = adapt_start(start, get_recipe("finetune"))
    assert "quality_focal changes from 6 to 1" in note
    assert start.image_processor.nms is None


@pytest.mark.parametrize("before", [None, {"method": "soft", "iou_threshold": 0.8}])
def test_nms_that_the_user_chooses_replaces_any_other(before):
    def adapt(recipe, is_nms_chosen):
        start = Start(model, DinoDetrImageProcessor(nms=before), "some/detector", [])
        return adapt_start(start, recipe, is_nms_chosen), start.image_processor.nms

    model = DinoDetrForObjectDetection(tiny_config(num_labels=len(DATA.id2label)))
    hard = {"method": "hard", "iou_threshold": 0.6}
    notes, nms = adapt(get_recipe("finetune", nms=hard), True)
    assert nms == hard
    assert "hard NMS" in notes[0]
    assert "as you chose" in notes[0]
    notes, nms = adapt(get_recipe("co-dino", nms=None, model_settings={"class_loss": "focal"}), True)
    assert nms is None
    assert ["no longer get soft NMS" in note for note in notes] == ([] if before is None else [True])
    assert adapt(get_recipe("finetune"), False) == ([], before)  # a Co-DINO that is fine-tuned keeps its own


def test_the_rest_of_a_new_detector_follows_the_seed(backbone):
    folder, _ = backbone
    heads = [
        load_start(None, DATA, seed, str(folder)).model.model.encoder.layers[0].mlp.fc1.weight for seed in (3, 4, 3)
    ]
    assert torch.equal(heads[0], heads[2])
    assert not torch.equal(heads[0], heads[1])


def test_a_backbone_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(OSError, match=r"There is no folder .*nothing, and the Hub gives no backbone of this name"):
        load_start(None, DATA, 0, str(tmp_path / "nothing"))


@pytest.mark.parametrize("source", [None, "someone/model"])
def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch, source):
    asked = []

    def fail(request, timeout):
        asked.append(request.full_url)
        raise URLError("Name or service not known")

    monkeypatch.setattr(hub_access, "urlopen", fail)
    monkeypatch.setattr(hub_access, "is_offline_mode", lambda: False)
    with pytest.raises(OSError, match=r"\(ConnectionError\)"):
        load_start(source, DATA, seed=0)
    assert len(asked) == 1


def test_without_a_network_the_cure_is_named(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    monkeypatch.setattr(hub_access, "is_offline_mode", lambda: True)
    monkeypatch.setattr(starting_model.PreTrainedConfig, "get_config_dict", offline)
    with pytest.raises(OSError, match=r"microsoft/resnet-50 of the Hub, which cannot be downloaded .*--model"):
        load_start(None, DATA, seed=0)
    with pytest.raises(FileNotFoundError, match="no folder someone/model, and the Hub has no readable model"):
        load_start("someone/model", DATA, seed=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "dinov2"},
            r"encoder of type 'dinov2', .*self-supervised DINO, .* does not detect objects",
        ),
        ({"model_type": "vit"}, "self-supervised DINO"),
        ({"model_type": "rt_detr"}, "another detector, of type 'rt_detr', which can be evaluated"),
        ({"model_type": "bert"}, "a model of type 'bert'. Training needs a DINO detector, of type 'dino_detr'"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "a model of type None"),
    ],
)
def test_models_of_other_kinds_are_told_what_they_are(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    with pytest.raises(ValueError, match=message):
        load_start(tmp_path, DATA, seed=0)


def test_what_is_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not a model: it has no config\.json"):
        load_start(tmp_path, DATA, seed=0)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"adapters of a model\. .*merge_and_unload"):
        load_start(tmp_path, DATA, seed=0)
    (tmp_path / "checkpoint0011_4scale.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="dino-hf convert"):
        load_start(tmp_path / "checkpoint0011_4scale.pth", DATA, seed=0)


def test_a_checkpoint_keeps_what_the_run_started_from(tmp_path):
    model = DinoDetrForObjectDetection(tiny_config(num_labels=3, id2label=DATA.id2label))
    model.config.provenance = {"base_model": "someone/dino"}
    model.save_pretrained(tmp_path)
    DinoDetrImageProcessor().save_pretrained(tmp_path)
    start = load_checkpoint(tmp_path, "someone/dino", ["Kept 3"])
    assert start.model.config.provenance == {"base_model": "someone/dino"}
    assert not start.model.config._name_or_path  # of which record_training would make the base model
    assert (start.source, start.notes) == ("someone/dino", ["Kept 3"])


def test_a_run_that_is_not_there_is_named_before_the_backbone_that_a_new_one_lacks(tmp_path, monkeypatch):
    write_layout("coco", draw_splits(tmp_path / "drawn", train=4, validation=3, test=2), tmp_path / "data")

    def fails(*args):
        raise OSError("Without a model, training starts from a backbone that cannot be fetched.")

    monkeypatch.setattr(run, "load_start", fails)
    with pytest.raises(
        OSError, match=r"^There is no run in .*gone to resume, and a new one cannot start. Without a model"
    ):
        run.train(tmp_path / "data", output_dir=tmp_path / "gone", resume=True, use_cpu=True, report_to="none")
    with pytest.raises(OSError, match=r"^Without a model"):
        run.train(tmp_path / "data", output_dir=tmp_path / "gone", use_cpu=True, report_to="none")
    assert not (tmp_path / "gone").exists()


def test_a_run_on_a_backbone_shows_it_and_refuses_a_model_beside_it(tmp_path, backbone):
    folder, _ = backbone
    data = write_layout("coco", draw_splits(tmp_path / "drawn", train=4, validation=3, test=2), tmp_path / "data")
    settings = {"use_cpu": True, "report_to": "none", "batch_size": 2, "output_dir": tmp_path / "out"}
    with pytest.raises(ValueError, match=r"--model .* has a backbone of its own: leave out --backbone"):
        run.train(data, model=tmp_path, backbone=folder, **settings)
    plan = run.train(data, backbone=folder, num_queries=33, dry_run=True, **settings)
    assert plan.preflight.model["from"] == f"random weights, except the backbone of {folder}"


def test_a_resumed_run_keeps_its_backbone(tmp_path):
    record = RunRecord(tmp_path, {"model": None, "backbone": "microsoft/resnet-50", "settings": {}})
    record.choose_start(None, None, None)
    assert (record.values["model"], record.values["backbone"]) == (None, "microsoft/resnet-50")
    record.choose_start(None, "microsoft/resnet-50", None)
    with pytest.raises(ValueError, match=r"backbone microsoft/resnet-50, not with timm/resnet18.*leave out backbone"):
        record.choose_start(None, "timm/resnet18", None)
    with pytest.raises(ValueError, match="model not set, not with someone/dino"):
        record.choose_start("someone/dino", None, None)
    with pytest.raises(ValueError, match="num_queries not set, not with 40"):
        record.choose_start(None, None, 40)
    new = RunRecord(tmp_path, {})
    new.choose_start(None, tmp_path, 40)
    assert (new.values["model"], new.values["backbone"], new.values["num_queries"]) == (None, str(tmp_path), 40)


def test_the_card_of_an_untrained_detector_names_its_backbone(tmp_path, backbone):
    load_start(None, DATA, 0, str(backbone[0])).model.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "They are random weights, except the backbone of" in card
