"""Arguments of the stock Trainer in `DinoDetrTrainer`: each replaces a part of the recipe, and contradictions are refused."""

import json

import pytest
import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import HPSearchBackend

from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.common.scenes import make_scenes
from dino_hf.training import DetectionCollator, DetectionTransform, get_recipe, load_coco
from dino_hf.training.hyperparameters import checked_space, highest_ap
from dino_hf.training.trainer import DinoDetrTrainer
from helpers import QUIET, tiny_config

PROCESSOR = DinoDetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 64})
RECIPE = get_recipe(
    "finetune", ema_decay=0.5, ema_warmup_steps=0, early_stopping_patience=None, model_settings={"num_denoising": 5}
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    train = make_scenes(folder / "train", 5, seed=0)
    held_out = make_scenes(folder / "eval", 3, seed=1)
    train = load_coco(train, train.parent)
    return train, load_coco(held_out, held_out.parent, like=train)


def make_model(data) -> DinoDetrForObjectDetection:
    torch.manual_seed(0)
    return DinoDetrForObjectDetection(tiny_config(num_denoising=5, id2label=data[0].id2label))


def make_trainer(data, folder, recipe=RECIPE, model=None, settings=None, **arguments) -> DinoDetrTrainer:
    common = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 1,
    }
    args = recipe.training_arguments(folder, **QUIET | common | (settings or {}))
    model = None if "model_init" in arguments else model or make_model(data)
    defaults = {"recipe": recipe, "train": data[0], "image_processor": PROCESSOR, "doctor": False}
    if {"train_dataset"} & arguments.keys():
        del defaults["train"]
    if {"processing_class"} & arguments.keys():
        del defaults["image_processor"]
    return DinoDetrTrainer(model, args, **defaults | arguments)


def rows_of(data):
    return data.dataset.with_transform(DetectionTransform(PROCESSOR))


def state(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def list_collator(samples):
    """A collator in the form of the library's examples: labels are a list of dictionaries."""
    batch = DetectionCollator()(samples)
    return batch | {"labels": [sample["labels"] for sample in samples]}


def test_the_names_of_the_stock_trainer_mean_the_same(data, tmp_path):
    ours = make_trainer(data, tmp_path, held_out=data[1])
    stock = make_trainer(data, tmp_path, train_dataset=data[0], eval_dataset=data[1], processing_class=PROCESSOR)
    for trainer in (ours, stock):
        trainer.train()
    assert all(torch.equal(value, state(stock.model)[name]) for name, value in state(ours.model).items())
    assert ours.departures == stock.departures
    assert ours.evaluate()["eval_AP"] == stock.evaluate()["eval_AP"]


def test_own_rows_are_trained_on_as_they_are(data, tmp_path):
    trainer = make_trainer(data, tmp_path, train_dataset=rows_of(data[0]), eval_dataset=rows_of(data[1]))
    before = state(trainer.model)
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in state(trainer.model).items())
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0
    assert not [name for name in metrics if "AP" in name]  # the annotations of these rows are unknown
    assert any("train_dataset" in line and "augmentation" in line for line in trainer.departures)
    training = trainer.model.config.provenance["training"]
    assert (training["dataset"], training["num_images"]) == (None, 5)
    trainer.create_model_card()
    assert (tmp_path / "README.md").is_file()


def test_a_dictionary_of_held_out_data_may_mix_both_forms(data, tmp_path):
    trainer = make_trainer(data, tmp_path, eval_dataset={"plain": rows_of(data[1]), "scored": data[1]})
    metrics = trainer.evaluate()
    assert "eval_plain_loss" in metrics
    assert "eval_plain_AP" not in metrics
    assert metrics["eval_scored_AP"] >= 0


def test_a_collator_with_lists_of_labels_trains_and_evaluates_alike(data, tmp_path):
    ours = make_trainer(data, tmp_path, held_out=data[1])
    own = make_trainer(data, tmp_path, held_out=data[1], data_collator=list_collator)
    for trainer in (ours, own):
        trainer.train()
    assert all(torch.equal(value, state(own.model)[name]) for name, value in state(ours.model).items())
    assert own.evaluate()["eval_AP"] == ours.evaluate()["eval_AP"]
    assert "data_collator list_collator, the recipe has DetectionCollator" in own.departures


def test_labels_without_image_ids_are_trained_on(data, tmp_path):
    def collate(samples):
        batch = DetectionCollator()(samples)
        return batch | {"labels": {name: batch["labels"][name] for name in ("class_labels", "boxes")}}

    trainer = make_trainer(data, tmp_path, data_collator=collate)
    trainer.train()
    assert trainer.state.global_step == 2


def test_own_metrics_get_detections_and_replace_ours(data, tmp_path):
    seen = []

    def most_certain(prediction, compute_result):
        seen.append(prediction.predictions["scores"].max().item())
        return {"most_certain": max(seen)} if compute_result else {}

    trainer = make_trainer(data, tmp_path, held_out=data[1], compute_metrics=most_certain)
    metrics = trainer.evaluate()
    assert metrics["eval_most_certain"] == max(seen)
    assert "eval_AP" not in metrics
    assert any(line.startswith("compute_metrics most_certain") for line in trainer.departures)
    with pytest.raises(ValueError, match="takes no compute_result, but batch_eval_metrics=True"):
        make_trainer(data, tmp_path, held_out=data[1], compute_metrics=lambda prediction: {})
    settings = {"batch_eval_metrics": False}
    trainer = make_trainer(data, tmp_path, settings=settings, held_out=data[1], compute_metrics=lambda _: {"one": 1.0})
    assert trainer.evaluate()["eval_one"] == 1.0


def test_own_metrics_can_add_to_ours(data, tmp_path):
    def with_more(prediction, compute_result):
        numbers = trainer.evaluator(prediction, compute_result)
        return numbers | {"half": numbers["AP50"] / 2} if compute_result else {}

    trainer = make_trainer(data, tmp_path, held_out=data[1], compute_metrics=with_more)
    metrics = trainer.evaluate()
    assert metrics["eval_half"] == metrics["eval_AP50"] / 2


def test_own_preprocessing_replaces_ours(data, tmp_path):
    calls = []

    def only_first(predictions, labels):
        calls.append(len(labels["boxes"]))
        return trainer.evaluator.keep_top(predictions, labels)

    trainer = make_trainer(data, tmp_path, held_out=data[1], preprocess_logits_for_metrics=only_first)
    assert trainer.evaluate()["eval_AP"] >= 0
    assert sum(calls) == 3


def test_own_optimizer_and_schedule_train(data, tmp_path):
    model = make_model(data)
    optimizer = torch.optim.SGD([model.model.query_selection.head.class_head.weight], lr=0.25)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    trainer = make_trainer(data, tmp_path, model=model, optimizers=(optimizer, schedule))
    before = state(model)
    trainer.train()
    moved = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.endswith("query_selection.head.class_head.weight")}
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == [0.25, 0.125]
    lines = trainer.departures
    assert "optimizer SGD, the recipe has AdamW" in lines
    assert "schedule LambdaLR, the recipe has cosine" in lines
    record = trainer.model.config.provenance["training"]["recipe"]
    assert (record["optimizer"], record["schedule"]) == ("SGD", "LambdaLR")


def test_own_optimizer_gets_the_schedule_of_the_recipe(data, tmp_path):
    model = make_model(data)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    recipe = get_recipe("finetune", lr_scheduler="step", lr_drop_epochs=(1,), warmup_steps=0, ema_decay=None,
                        early_stopping_patience=None, model_settings={"num_denoising": 5})  # fmt: skip
    trainer = make_trainer(data, tmp_path, recipe, model, {"max_steps": 4}, optimizers=(optimizer, None))
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([0.25, 0.25, 0.25, 0.025])  # 5 images in batches of 2: 3 steps in an epoch


def test_an_optimizer_class_gets_the_rates_of_the_recipe(data, tmp_path):
    trainer = make_trainer(data, tmp_path, optimizer_cls_and_kwargs=(torch.optim.SGD, {"momentum": 0.5}))
    trainer.train()
    groups = {group["name"]: group for group in trainer.optimizer.param_groups}
    assert {name: group["initial_lr"] for name, group in groups.items()} == {"transformer": 5e-5, "backbone": 5e-6}
    assert groups["backbone"]["momentum"] == 0.5
    settings = {"lr": 1e-3, "weight_decay": 0.25}
    trainer = make_trainer(data, tmp_path, optimizer_cls_and_kwargs=(torch.optim.Adam, settings))
    trainer.train()
    groups = {group["name"]: group for group in trainer.optimizer.param_groups}
    assert groups["backbone"]["initial_lr"] == pytest.approx(1e-4)
    assert groups["transformer"]["initial_lr"] == pytest.approx(1e-3)
    assert groups["transformer"]["weight_decay"] == 0.25
    assert any(line == "optimizer Adam, the recipe has AdamW" for line in trainer.departures)


def test_parameters_of_an_optimizer_class_are_kept(data, tmp_path):
    model = make_model(data)
    settings = {"lr": 0.5, "params": [model.model.query_selection.head.class_head.bias]}
    trainer = make_trainer(data, tmp_path, model=model, optimizer_cls_and_kwargs=(torch.optim.SGD, settings))
    assert len(trainer.create_optimizer().param_groups[0]["params"]) == 1


@pytest.mark.parametrize("kind", ["optimizers", "class"])
def test_a_run_with_an_own_optimizer_is_resumed_to_the_same_weights(data, tmp_path, kind):
    def run(resume=None, **settings):
        model = make_model(data)
        own = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.5})}
        if kind == "optimizers":
            own = {"optimizers": (torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.5), None)}
        trainer = make_trainer(data, tmp_path, RECIPE, model, {"max_steps": 4} | settings, **own)
        trainer.train(resume_from_checkpoint=resume)
        return state(trainer.model) | {f"ema.{name}": value for name, value in state(trainer.ema.module).items()}

    whole = run(save_strategy="steps", save_steps=2)
    resumed = run(str(tmp_path / "checkpoint-2"))
    assert [name for name, value in whole.items() if not torch.equal(value, resumed[name])] == []


def test_a_function_makes_a_new_configured_model_for_each_training(data, tmp_path):
    made = []

    def model_init():
        made.append(make_model(data))
        return made[-1]

    recipe = get_recipe("finetune", ema_decay=0.5, ema_warmup_steps=0, early_stopping_patience=None,
                        model_settings={"num_denoising": 7, "class_cost": 3.0})  # fmt: skip
    trainer = make_trainer(data, tmp_path, recipe, model_init=model_init, held_out=data[1])
    results = []
    for _ in range(2):
        trainer.train()
        assert trainer.model is made[-1]
        assert trainer.model.config.num_denoising == trainer.model.model.denoising.num_denoising == 7
        assert trainer.model.criterion.cost.classes == 3.0
        assert trainer.ema.model is trainer.model
        assert trainer.ema.num_updates == 2
        results.append((state(trainer.model), state(trainer.ema.module), trainer.evaluate()["eval_ema_AP"]))
    assert len(made) == 3  # one when the trainer is made
    for first, second in zip(results[0][:2], results[1][:2], strict=True):
        assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert trainer.model.config.provenance["training"]["steps"] == 2


def test_a_made_model_is_resumed_with_its_average(data, tmp_path):
    def run(resume=None, **settings):
        trainer = make_trainer(
            data, tmp_path, settings={"max_steps": 4} | settings, model_init=lambda: make_model(data)
        )
        trainer.train(resume_from_checkpoint=resume)
        return state(trainer.model), state(trainer.ema.module)

    whole = run(save_strategy="steps", save_steps=2)
    resumed = run(str(tmp_path / "checkpoint-2"))
    for first, second in zip(whole, resumed, strict=True):
        assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []


def test_a_made_model_with_other_classes_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match="The model has"):
        make_trainer(data, tmp_path, model_init=lambda: DinoDetrForObjectDetection(tiny_config(num_denoising=5)))


class _Study:
    def _is_multi_objective(self) -> bool:
        return True  # then values within a trial are not reported


class _Trial:
    """A trial of the library optuna, as far as `Trainer` uses it."""

    study = _Study()

    def __init__(self, number: int, rate: float):
        self.number, self.params = number, {"learning_rate": rate}


class _Search:
    """A search over two learning rates, in place of the library optuna."""

    directions: list = []  # noqa: RUF012

    @staticmethod
    def ensure_available():
        pass

    def run(self, trainer, n_trials, direction, **kwargs):
        self.directions.append(direction)
        scores = []
        for number, rate in enumerate((1e-5, 1e-3)[:n_trials]):
            trainer.objective = None
            trainer.train(trial=_Trial(number, rate))
            scores.append((trainer.compute_objective(trainer.evaluate()), trainer.args.learning_rate))
            assert trainer.optimizer.param_groups[0]["initial_lr"] == rate
        return scores


@pytest.fixture
def search(monkeypatch):
    from transformers import trainer as module

    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial and trial.params)
    monkeypatch.setitem(module.ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, _Search)
    return _Search


def test_hyperparameters_are_searched_for_the_highest_ap(data, tmp_path, search):
    trainer = make_trainer(data, tmp_path, model_init=lambda trial: make_model(data), held_out=data[1])
    found = trainer.hyperparameter_search(lambda trial: trial.params, n_trials=2, backend="optuna")
    assert [rate for _, rate in found] == [1e-5, 1e-3]
    assert all(0 <= score <= 1 for score, _ in found)
    assert search.directions[-1] == "maximize"
    trainer.hyperparameter_search(
        lambda trial: trial.params, lambda metrics: metrics["eval_loss"], n_trials=1, backend="optuna"
    )
    assert search.directions[-1] == "minimize"


def test_what_cannot_be_searched_is_refused(data, tmp_path):
    for name, reason in (("lr_scheduler_type", "set by the recipe"), ("ema_decay", "not a field")):
        with pytest.raises(ValueError, match=f"hp_space returns {name}, which .*{reason}"):
            checked_space(lambda trial, name=name: {name: 1}, None)
    assert highest_ap({"eval_AP": 0.2, "eval_ema_AP": 0.3, "eval_loss": 9.0}) == 0.3
    with pytest.raises(ValueError, match="no eval_AP: give compute_objective"):
        highest_ap({"eval_loss": 1.0})
    with pytest.raises(ValueError, match="give model_init in place of model"):
        make_trainer(data, tmp_path).hyperparameter_search()


def test_own_callbacks_are_called(data, tmp_path):
    class Count(TrainerCallback):
        steps = 0

        def on_step_end(self, args, state, control, **kwargs):
            self.steps += 1

    count = Count()
    make_trainer(data, tmp_path, callbacks=[count]).train()
    assert count.steps == 2


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        ({"train_dataset": 1, "train": 2}, "train and train_dataset"),
        ({"held_out": 1, "eval_dataset": 2}, "held_out and eval_dataset"),
        ({"processing_class": 1, "image_processor": 2}, "image_processor and processing_class"),
        ({"model_init": print, "model": 1}, "both are given"),
        ({"model": None}, "neither is given"),
        ({"recipe": None}, "recipe is missing"),
        ({"train": None}, "training data are missing"),
        ({"image_processor": None}, "image_processor is missing"),
        ({"compute_loss_func": print}, "compute_loss_func .*model.loss_function"),
        ({"model_init": print, "model": None, "optimizers": (1, None)}, "model_init .*optimizer_cls_and_kwargs"),
        ({"optimizers": (1, None), "optimizer_cls_and_kwargs": (torch.optim.SGD, {})}, "both choose the optimizer"),
    ],
)
def test_contradictions_are_one_sentence(data, tmp_path, arguments, facts):
    args = RECIPE.training_arguments(tmp_path, **QUIET, eval_strategy="no")
    common = {"model": 1, "args": args, "recipe": RECIPE, "train": data[0], "image_processor": PROCESSOR}
    with pytest.raises(ValueError, match=facts):
        DinoDetrTrainer(**common | arguments)


@pytest.mark.parametrize("changes", [{"repeat_threshold": 0.5}, {"class_weights": "balanced"}])
def test_own_rows_have_no_classes_to_count(data, tmp_path, changes):
    recipe = get_recipe("finetune", early_stopping_patience=None, ema_decay=None, **changes)
    with pytest.raises(ValueError, match=f"{next(iter(changes))} of the recipe counts the boxes"):
        make_trainer(data, tmp_path, recipe, train_dataset=rows_of(data[0]))
    with pytest.raises(ValueError, match="on_bad_image='skip' needs train"):
        make_trainer(data, tmp_path, train_dataset=rows_of(data[0]), on_bad_image="skip")


def test_every_argument_of_the_stock_trainer_is_taken():
    import inspect

    stock, ours = (list(inspect.signature(one.__init__).parameters) for one in (Trainer, DinoDetrTrainer))
    assert ours[: len(stock)] == stock


def test_departures_of_own_parts_are_kept_in_a_file(data, tmp_path):
    make_trainer(data, tmp_path, data_collator=list_collator).train()
    assert any("list_collator" in line for line in json.loads((tmp_path / "recipe.json").read_text())["departures"])
