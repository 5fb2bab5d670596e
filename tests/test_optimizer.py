"""Two or three learning rates, every trainable parameter once."""

import pytest
import torch
from transformers import TrainingArguments

from dino_hf import DinoDetrForObjectDetection, DinoDetrModel
from dino_hf.training import make_optimizer, parameter_groups
from dino_hf.training.recipes import get_recipe
from helpers import SWIN, tiny_config, tiny_images, tiny_labels

MODELS = [DinoDetrForObjectDetection, DinoDetrModel]


def names_by_group(model, groups) -> dict[str, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}


def assert_every_trained_parameter_once(model, groups):
    found = [id(parameter) for group in groups for parameter in group["params"]]
    trained = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(found) == sorted(trained)
    assert len(trained) < len(list(model.parameters()))  # the frozen stages are in none


@pytest.mark.parametrize("model_class", MODELS)
def test_the_backbone_learns_at_a_tenth_and_its_projections_do_not_count_as_backbone(model_class):
    model = model_class(tiny_config())
    groups = parameter_groups(model, learning_rate=1e-3)
    assert [(group["name"], group["lr"]) for group in groups] == [("transformer", 1e-3), ("backbone", 1e-4)]
    names = names_by_group(model, groups)
    assert all("backbone.model." in name for name in names["backbone"])
    assert any("backbone.projections" in name for name in names["transformer"])
    assert_every_trained_parameter_once(model, groups)


@pytest.mark.parametrize("model_class", MODELS)
def test_sampling_offsets_can_have_a_learning_rate_of_their_own(model_class):
    model = model_class(tiny_config(backbone_config=SWIN, num_frozen_backbone_stages=1))
    groups = parameter_groups(
        model, learning_rate=1e-3, backbone_learning_rate=5e-4, sampling_offsets_learning_rate=2e-4
    )
    rates = {"transformer": 1e-3, "backbone": 5e-4, "sampling_offsets": 2e-4}
    assert {group["name"]: group["lr"] for group in groups} == rates
    names = names_by_group(model, groups)["sampling_offsets"]
    assert len(names) == 2 * (2 + 3)  # weight and bias in each layer of encoder and decoder
    assert all(".sampling_offsets." in name for name in names)
    assert_every_trained_parameter_once(model, groups)


def test_a_part_that_is_frozen_has_no_group():
    model = DinoDetrForObjectDetection(tiny_config())
    model.model.backbone.model.requires_grad_(False)
    groups = parameter_groups(model, learning_rate=1e-3)
    assert [group["name"] for group in groups] == ["transformer"]
    assert_every_trained_parameter_once(model, groups)


def test_a_model_of_which_nothing_is_trained_is_refused(tmp_path):
    model = DinoDetrForObjectDetection(tiny_config()).requires_grad_(False)
    message = r"the DinoDetrForObjectDetection are frozen.*unfreeze\(model, \.\.\.\)"
    with pytest.raises(ValueError, match=message):
        make_optimizer(model, TrainingArguments(str(tmp_path), report_to="none"))
    with pytest.raises(ValueError, match=message):
        get_recipe("finetune").make_optimizer(model)


def test_a_model_that_is_wrapped_has_the_same_groups():
    model = DinoDetrForObjectDetection(tiny_config())
    wrapped = torch.nn.ModuleDict({"module": model})  # the prefix of distributed training
    expected = [[id(parameter) for parameter in group["params"]] for group in parameter_groups(model, 1e-3)]
    assert [[id(parameter) for parameter in group["params"]] for group in parameter_groups(wrapped, 1e-3)] == expected


def test_the_optimizer_takes_its_settings_from_the_arguments(tmp_path):
    changes = {"weight_decay": 0.03, "adam_beta1": 0.8, "adam_beta2": 0.99, "adam_epsilon": 1e-7}
    args = TrainingArguments(str(tmp_path), learning_rate=2e-4, report_to="none", **changes)
    optimizer = make_optimizer(DinoDetrForObjectDetection(tiny_config()), args, backbone_learning_rate=1e-4)
    assert [group["lr"] for group in optimizer.param_groups] == [2e-4, 1e-4]
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.03}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.99)}
    assert {group["eps"] for group in optimizer.param_groups} == {1e-7}


def test_a_step_moves_each_group_by_its_own_learning_rate(tmp_path):
    """The first step of Adam is the learning rate, whatever the gradient, where there is one."""
    torch.manual_seed(0)
    model = DinoDetrForObjectDetection(tiny_config()).train()
    args = TrainingArguments(str(tmp_path), learning_rate=1e-3, weight_decay=0.0, report_to="none")
    optimizer = make_optimizer(model, args, backbone_learning_rate=5e-4, sampling_offsets_learning_rate=2.5e-4)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    pixel_values, pixel_mask = tiny_images()
    model(pixel_values=pixel_values, pixel_mask=pixel_mask, labels=tiny_labels(3, 0)).loss.backward()
    optimizer.step()
    steps = {name: (parameter.detach() - before[name]).abs().max() for name, parameter in model.named_parameters()}
    for name, group in names_by_group(model, optimizer.param_groups).items():
        rate = {"transformer": 1e-3, "backbone": 5e-4, "sampling_offsets": 2.5e-4}[name]
        assert max(steps[parameter] for parameter in group) == pytest.approx(rate, rel=1e-3)  # eps, and float32
