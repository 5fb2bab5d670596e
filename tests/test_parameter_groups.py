"""Two learning rates, every trainable parameter once."""

import pytest
from transformers import TrainingArguments

from dino_hf import DinoDetrForObjectDetection, DinoDetrModel
from dino_hf.training import make_optimizer, parameter_groups
from helpers import tiny_config


@pytest.mark.parametrize("model_class", [DinoDetrForObjectDetection, DinoDetrModel])
def test_the_backbone_learns_at_a_tenth_and_its_projections_do_not_count_as_backbone(model_class):
    model = model_class(tiny_config())
    rest, backbone = parameter_groups(model, learning_rate=1e-3)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert (rest["lr"], backbone["lr"]) == (1e-3, pytest.approx(1e-4))
    assert all("backbone.model." in names[parameter] for parameter in backbone["params"])
    assert any("backbone.projections" in names[parameter] for parameter in rest["params"])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(p) for p in rest["params"] + backbone["params"]} == {id(p) for p in trained}
    assert len(rest["params"] + backbone["params"]) == len(trained)
    assert len(trained) < len(list(model.parameters()))  # the frozen stages are in neither


def test_the_optimizer_takes_its_settings_from_the_arguments(tmp_path):
    changes = {"weight_decay": 0.03, "adam_beta1": 0.8, "adam_beta2": 0.99, "adam_epsilon": 1e-7}
    args = TrainingArguments(str(tmp_path), learning_rate=2e-4, report_to="none", **changes)
    optimizer = make_optimizer(DinoDetrForObjectDetection(tiny_config()), args, backbone_scale=0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [2e-4, 1e-4]
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.03}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.99)}
    assert {group["eps"] for group in optimizer.param_groups} == {1e-7}
