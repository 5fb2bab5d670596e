"""The stock Trainer's data, recipe and scores reach the card of the weights that they belong to."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoModelForObjectDetection, Trainer, TrainerCallback, set_seed

from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.common.scenes import make_scenes
from dino_hf.runtime.model_card import is_ours
from dino_hf.runtime.weights_digest import weights_digest
from dino_hf.training import (
    CocoEvaluator,
    load_coco,
    record_training,
    transfer_classes,
)
from helpers import small_trainer, tiny_config

PROCESSOR = DinoDetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 64})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    train, held_out = make_scenes(folder / "train", 6, seed=0), make_scenes(folder / "eval", 3, seed=1)
    train = load_coco(train, train.parent)._replace(name="scenes")
    return train, load_coco(held_out, held_out.parent, like=train)


def make_trainer(data, folder, model=None, **changes) -> Trainer:
    set_seed(0)
    model = model or DinoDetrForObjectDetection(tiny_config(num_denoising=0, id2label=data[0].id2label))
    settings = {"max_steps": 2, "per_device_eval_batch_size": 3, "warmup_steps": 1, "weight_decay": 1e-4}
    return small_trainer(data, folder, model, PROCESSOR, **settings | changes)


def saved(folder) -> tuple[dict, ModelCard]:
    return json.loads((Path(folder) / "config.json").read_text())["provenance"], ModelCard.load(f"{folder}/README.md")


def measured(card: ModelCard) -> dict[str, float]:
    return {one.metric_name: one.metric_value for one in card.data.eval_results or []}


def test_data_names_are_the_last_parts_of_their_files(data):
    assert data[1].name.split("/")[0] == "eval"
    assert data[1].name.endswith(".json")


def test_data_recipe_and_scores_are_saved(data, tmp_path):
    trainer = make_trainer(data, tmp_path, gradient_accumulation_steps=2, seed=7)
    record_training(trainer, *data, license="apache-2.0")
    trainer.train()
    scores = trainer.evaluate()
    trainer.save_model(tmp_path / "model")
    provenance, card = saved(tmp_path / "model")
    training = provenance["training"]
    assert (training["dataset"], training["num_images"], training["steps"]) == ("scenes", 6, 2)
    assert training["recipe"] == {
        "optimizer": "AdamW",
        "learning_rate": 1e-3,
        "lowest_group_learning_rate": 1e-4,  # the backbone's
        "schedule": "linear",
        "warmup_steps": 1,
        "weight_decay": 1e-4,
        "max_grad_norm": 0.1,
        "images_per_step": 6,
        "images_per_batch": 3,
        "gradient_accumulation_steps": 2,
        "processes": 1,
        "planned_steps": 2,
        "precision": "float32",
        "seed": 7,
    }
    evaluation = training["evaluation"]
    assert (evaluation["dataset"], evaluation["num_images"], evaluation["step"]) == (data[1].name, 3, 2)
    assert evaluation["metrics"]["AP50"] == scores["eval_AP50"]
    assert set(evaluation["metrics"]) == {
        name.removeprefix("eval_") for name in scores if name.startswith(("eval_AP", "eval_AR"))
    }
    assert measured(card)["AP, mean over IoU 0.50 to 0.95"] == round(scores["eval_AP"], 4)
    assert card.data.license == "apache-2.0"
    assert "trained on 6 images of `scenes`" in card.text
    assert is_ours(str(card))
    assert DinoDetrForObjectDetection.from_pretrained(tmp_path / "model").config.provenance == provenance


def test_recording_changes_no_number(data, tmp_path):
    plain, recorded = make_trainer(data, tmp_path / "plain"), make_trainer(data, tmp_path / "recorded")
    record_training(recorded, *data)
    states = []
    for trainer in (plain, recorded):
        set_seed(0)
        trainer.train()
        trainer.evaluate()
        trainer.save_model()
        states.append((trainer.model.state_dict(), torch.get_rng_state()))
    assert torch.equal(states[0][1], states[1][1])
    assert all(torch.equal(value, states[1][0][name]) for name, value in states[0][0].items())


class Scores(TrainerCallback):
    """Ranks the evaluations as a test wants it: best first."""

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_rank"] = float(state.global_step)


def test_the_best_weights_have_their_own_scores(data, tmp_path):
    """And so has every checkpoint, in between and at the end."""
    trainer = make_trainer(
        data,
        tmp_path,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="rank",
        greater_is_better=False,
    )
    record_training(trainer, *data)
    trainer.add_callback(Scores())
    trainer.train()
    assert trainer.state.best_global_step == 1
    trainer.save_model(tmp_path / "best")
    logged = {entry["step"]: entry["eval_AP50"] for entry in trainer.state.log_history if "eval_AP50" in entry}
    digests = {}
    for folder, step in (("checkpoint-1", 1), ("checkpoint-2", 2), ("checkpoint-3", 3), ("best", 1)):
        provenance, card = saved(tmp_path / folder)
        training = provenance["training"]
        digests[folder] = training["evaluation"]["weights"]
        assert digests[folder] == weights_digest(AutoModelForObjectDetection.from_pretrained(tmp_path / folder))
        assert (training["steps"], training["evaluation"]["step"]) == (step, step)
        assert training["evaluation"]["metrics"]["AP50"] == logged[step]
        assert measured(card)["AP at IoU 0.50"] == round(logged[step], 4)
        assert (tmp_path / folder / "dino_detr.py").is_file() is (folder == "best")  # checkpoints carry no code
    assert len(set(digests.values())) == 3
    scores = trainer.evaluate()  # of the best weights, which are loaded
    assert scores["eval_AP50"] == logged[1]
    assert trainer.model.config.provenance["training"]["evaluation"]["step"] == 1


def test_weights_that_went_on_have_no_measured_ap(data, tmp_path):
    schedule = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(data, tmp_path, max_steps=4, **schedule)
    record_training(trainer, *data)
    trainer.train()
    _, card = saved(tmp_path / "checkpoint-1")
    assert "No AP of these weights was recorded." in card.text
    assert len(measured(saved(tmp_path / "checkpoint-2")[1])) == 3
    _, card = saved(tmp_path / "checkpoint-3")
    assert measured(card) == {}
    assert "It was measured at step 2; these weights are from step 3" in card.text


def test_a_resumed_run_knows_its_earlier_scores(data, tmp_path):
    first = make_trainer(data, tmp_path, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2)
    record_training(first, *data)
    first.train()
    second = make_trainer(data, tmp_path, max_steps=3)
    record_training(second, *data)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    training = second.model.config.provenance["training"]
    assert (training["steps"], training["evaluation"]["step"]) == (3, 2)
    assert training["evaluation"]["num_images"] == 3


def test_a_resumed_run_knows_the_weights_of_its_earlier_scores(data, tmp_path):
    """Of the best, which were before, and of the last; without a checkpoint that tells, the steps decide as before."""
    schedule = {
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "rank",
        "greater_is_better": False,
    }
    first = make_trainer(data, tmp_path / "out", **schedule)
    record_training(first, *data)
    first.add_callback(Scores())
    first.train()
    digests = {
        step: saved(tmp_path / f"out/checkpoint-{step}")[0]["training"]["evaluation"]["weights"] for step in (1, 2)
    }
    second = make_trainer(data, tmp_path / "out", max_steps=3, **schedule)
    record_training(second, *data)
    second.add_callback(Scores())
    known = {}

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            known.update(model.config.provenance["training"]["evaluation"])

    second.add_callback(Look())
    second.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    assert (known["step"], known["weights"]) == (2, digests[2])
    evaluation = second.model.config.provenance["training"]["evaluation"]
    assert (evaluation["step"], evaluation["weights"]) == (1, digests[1])
    second.save_model(tmp_path / "best")
    assert len(measured(saved(tmp_path / "best")[1])) == 3

    settings = tmp_path / "out/checkpoint-2/config.json"
    for config in ({"provenance": None}, None):
        settings.unlink() if config is None else settings.write_text(json.dumps(config))
        third = make_trainer(data, tmp_path / "out", max_steps=2)
        record_training(third, *data)
        third.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
        evaluation = third.model.config.provenance["training"]["evaluation"]
        assert evaluation["step"] == 2
        assert "weights" not in evaluation
        third.save_model(tmp_path / "third")
        assert len(measured(saved(tmp_path / "third")[1])) == 3


@pytest.fixture(scope="module")
def measured_folder(data, tmp_path_factory) -> Path:
    """A model that was trained with a record, and measured."""
    folder = tmp_path_factory.mktemp("measured")
    trainer = make_trainer(data, folder, max_steps=1, bf16=True)  # autocast: the weights stay float32
    record_training(trainer, *data)
    trainer.train()
    trainer.evaluate()
    trainer.save_model(folder / "model")
    provenance, card = saved(folder / "model")
    model = DinoDetrForObjectDetection.from_pretrained(folder / "model")
    assert provenance["training"]["evaluation"]["weights"] == weights_digest(model)
    assert len(measured(card)) == 3
    return folder / "model"


def train_without_record(model, data, folder):
    make_trainer(data, folder, model, max_steps=1, warmup_steps=0).train()  # warm-up starts at a rate of 0


@pytest.mark.parametrize("record", ["measured", "converted"])
@pytest.mark.parametrize(
    "change",
    [
        train_without_record,
        lambda model, *_: transfer_classes(model, {0: "duck", 1: "goose"}),
        lambda model, *_: model.bfloat16(),
    ],
    ids=["trained", "classes", "half precision"],
)
def test_an_ap_does_not_survive_changes_without_a_record(change, record, measured_folder, data, tmp_path):
    model = DinoDetrForObjectDetection.from_pretrained(measured_folder)
    if record == "converted":
        model.config.provenance = {"converted_from": {"published_ap": 49.0, "weights": weights_digest(model)}}
    model.save_pretrained(tmp_path / "same")
    change(model, data, tmp_path)
    model.save_pretrained(tmp_path / "changed")
    for folder, is_changed in (("same", False), ("changed", True)):
        _, card = saved(tmp_path / folder)
        text = " ".join(card.text.split())
        assert ("weights here were changed" in text or "changed since" in text) == is_changed
        if record == "converted":
            assert ("It belongs to that file and not to the weights here" in text) == is_changed
        else:
            assert ("AP was not measured with these weights" in text) == is_changed
            assert len(measured(card)) == (0 if is_changed else 3)


def test_trainers_own_card_of_changed_weights_has_no_measured_ap(measured_folder, data, tmp_path):
    """Trainer.create_model_card, which writes without saving."""
    model = DinoDetrForObjectDetection.from_pretrained(measured_folder)
    trainer = make_trainer(data, tmp_path, model, max_steps=1)
    record_training(trainer, *data)
    trainer.create_model_card()
    assert len(measured(ModelCard.load(tmp_path / "README.md"))) == 3
    with torch.no_grad():
        next(model.parameters()).add_(1)
    trainer.create_model_card()
    assert measured(ModelCard.load(tmp_path / "README.md")) == {}


def test_sharded_weights_are_known_by_their_step(data, tmp_path, monkeypatch):
    monkeypatch.setattr("dino_hf.runtime.weights_digest._is_sharded", lambda model: True)
    trainer = make_trainer(data, tmp_path, max_steps=1)
    record_training(trainer, *data)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    provenance, card = saved(tmp_path)
    assert "weights" not in provenance["training"]["evaluation"]
    assert len(measured(card)) == 3


def test_other_evaluations_do_not_count(data, tmp_path):
    trainer = make_trainer(data, tmp_path, max_steps=1)
    record_training(trainer, *data)
    trainer.evaluate()  # before training: of weights that are not trained
    trainer.train()
    assert "evaluation" not in trainer.model.config.provenance["training"]
    trainer.evaluate(metric_key_prefix="test")
    own, trainer.compute_metrics = trainer.compute_metrics, CocoEvaluator(data[1], PROCESSOR)
    trainer.evaluate()
    assert "evaluation" not in trainer.model.config.provenance["training"]
    trainer.compute_metrics = own
    trainer.evaluate(trainer.eval_dataset.select(range(2)))
    assert trainer.model.config.provenance["training"]["evaluation"]["num_images"] == 2


def test_training_starts_from_what_was_loaded(data, tmp_path):
    config = tiny_config(num_denoising=0, id2label=data[0].id2label)
    config.provenance = {"converted_from": {"project": "original", "published_ap": 49.0}}
    DinoDetrForObjectDetection(config).save_pretrained(tmp_path / "base")
    model = DinoDetrForObjectDetection.from_pretrained(tmp_path / "base")
    trainer = make_trainer(data, tmp_path / "out", model, max_steps=1)
    record_training(trainer, data[0])
    trainer.train()
    trainer.save_model()
    provenance, card = saved(tmp_path / "out")
    assert provenance["base_model"] == "base"
    assert provenance["converted_from"] == config.provenance["converted_from"]
    assert "belongs to that file and not to the weights here" in card.text
    assert "starting from `base`" in card.text
    assert str(tmp_path) not in json.dumps(provenance) + str(card)


# ---------------------------------------------------------------------------------------------------------------------
# The Hub


@pytest.fixture
def hub(monkeypatch):
    """What is uploaded: for each call, the files of the folder. `hub.card` is the card in the repository."""

    class Hub:
        def __init__(self):
            self.uploads, self.card, self.folder = [], None, None

    def create_repo(api, repo_id, **kwargs):
        return type("Url", (), {"repo_id": f"someone/{repo_id}"})

    def upload_folder(api, repo_id, folder_path, **kwargs):
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir() if path.is_file()}
        hub.uploads.append(files)
        hub.card = files["README.md"].decode()
        return type("Job", (), {"done": lambda job: True})()

    def download(repo_id, filename, **kwargs):
        if hub.card is None:
            raise EntryNotFoundError("nothing there")
        path = hub.folder / filename
        path.write_text(hub.card)
        return str(path)

    hub = Hub()
    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr("huggingface_hub.repocard.hf_hub_download", download)
    return hub


@pytest.fixture
def pusher(data, tmp_path, hub):
    """A trainer that was trained, and may push."""
    hub.folder = tmp_path / "downloaded"
    hub.folder.mkdir()
    trainer = make_trainer(data, tmp_path / "birds", max_steps=1)
    record_training(trainer, *data)
    trainer.train()
    trainer.evaluate()
    return trainer


def test_trainers_push_uploads_our_card(pusher, hub):
    pusher.push_to_hub(tags="birds")
    (files,) = hub.uploads
    assert is_ours(hub.card)
    card = ModelCard(hub.card)
    assert "birds" in card.data.tags
    assert "generated_from_trainer" not in card.data.tags
    assert 'model="someone/birds"' in hub.card
    assert len(measured(card)) == 3
    assert {"config.json", "preprocessor_config.json", "modeling_dino_detr.py"} <= set(files)


def test_trainers_push_keeps_cards_of_the_users(pusher, hub):
    hub.card = "---\nlicense: mit\n---\n\n# In the repository\n"
    pusher.push_to_hub()
    assert "# In the repository" in hub.card
    (Path(pusher.args.output_dir) / "README.md").write_text("# In the folder\n")
    pusher.push_to_hub()
    assert hub.card == "# In the folder\n"


def test_create_model_card_writes_ours_and_says_what_it_ignores(pusher, caplog):
    pusher.create_model_card(tags=["birds"], model_name="birds")
    file = Path(pusher.args.output_dir) / "README.md"
    assert is_ours(file.read_text())
    assert "birds" in ModelCard.load(file).data.tags
    assert "not from" not in caplog.text
    pusher.create_model_card(language="en", dataset=None)
    assert "not from ['language']; see record_training" in caplog.text


def test_pushes_between_checkpoints_have_code_and_card(data, tmp_path, hub):
    """Trainer copies configuration and weights only; and here there is no processor that would bring the code."""
    hub.folder = tmp_path
    trainer = make_trainer(
        data,
        tmp_path / "birds",
        max_steps=1,
        save_strategy="steps",
        save_steps=1,
        push_to_hub=True,
        hub_strategy="every_save",
    )
    trainer.processing_class = None
    record_training(trainer, *data)
    trainer.train()
    files = hub.uploads[0]
    assert {"config.json", "model.safetensors", "modeling_dino_detr.py", "README.md"} <= set(files)
    assert json.loads(files["config.json"])["provenance"]["training"]["steps"] == 1
    assert is_ours(files["README.md"].decode())
