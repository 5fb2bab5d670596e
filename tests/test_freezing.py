"""What is frozen by name, stage or pattern, and what is not."""

import re

import pytest
import torch

from dino_hf import DinoDetrForObjectDetection, DinoDetrModel
from dino_hf.training.freezing import backbone_stages, freeze, unfreeze
from helpers import BIT, CONVNEXT, INTERNIMAGE, RESNET, SWIN, TIMM, randomize, tiny_config, tiny_images, tiny_labels
from processes import run_processes

BACKBONES = {"resnet": RESNET, "swin": SWIN, "convnext": CONVNEXT, "bit": BIT, "internimage": INTERNIMAGE}
PREFIXES = {
    "backbone": "backbone.model.",
    "projections": ("backbone.projections.", "backbone.norms."),
    "encoder": "encoder.",
    "query_selection": "query_selection.",
    "denoising": "denoising.",
    "decoder": "decoder.",
}


def make_model(model_class=DinoDetrForObjectDetection, **changes):
    torch.manual_seed(0)
    return model_class(tiny_config(**changes))


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("part", PREFIXES)
@pytest.mark.parametrize("model_class", [DinoDetrForObjectDetection, DinoDetrModel])
def test_a_part_is_frozen_as_a_whole_and_nothing_else(model_class, part):
    model = make_model(model_class)
    before = trained(model)
    changed = freeze(model, part)
    assert before - trained(model) == set(changed.names)
    expected = {name for name in before if name.removeprefix("model.").startswith(PREFIXES[part])}
    assert set(changed.names) == expected
    parameters = dict(model.named_parameters())
    assert changed.num_parameters == sum(parameters[name].numel() for name in changed.names) > 0


def test_the_parts_are_the_whole_model():
    model = make_model()
    freeze(model, PREFIXES)
    assert trained(model) == set()


@pytest.mark.parametrize("kind", BACKBONES)
def test_stages_are_frozen_one_by_one_as_the_configuration_does_it(kind):
    names = ["backbone.stem", "backbone.stage1", "backbone.stage2", "backbone.stage3", "backbone.stage4"]
    model = make_model(backbone_config=BACKBONES[kind], num_frozen_backbone_stages=0)
    assert list(backbone_stages(model)) == names
    for number, name in enumerate(names, start=1):
        assert freeze(model, name).num_parameters > 0
        configured = make_model(backbone_config=BACKBONES[kind], num_frozen_backbone_stages=number)
        assert trained(model) == trained(configured)


def test_a_regular_expression_begins_where_names_begin():
    model = make_model(backbone_config=SWIN)
    assert freeze(model, r"encoder\.layers\.1\.").names == [
        name for name, _ in model.named_parameters() if name.startswith("model.encoder.layers.1.")
    ]
    assert freeze(model, r"model\.encoder\.layers\.1\.").names == []  # the same, already frozen
    offsets = freeze(model, [r".*\.sampling_offsets\.", "denoising"]).names
    assert len(offsets) == 2 * (1 + 3) + 1  # one layer of the encoder is frozen already
    assert all("sampling_offsets" in name or "label_embedding" in name for name in offsets)


@pytest.mark.parametrize("kind", BACKBONES)
def test_unfreezing_leaves_frozen_what_no_gradient_reaches(kind):
    """Every trainable parameter must get a gradient, or distributed training waits for it."""
    config = {**BACKBONES[kind], "out_features": ["stage1", "stage3"]}
    model = make_model(backbone_config=config, num_frozen_backbone_stages=2).train()
    randomize(model, 0.05)
    changed = unfreeze(model, "backbone")
    stem = {id(parameter) for parameter in backbone_stages(model)["backbone.stem"].parameters()}
    parameters = dict(model.named_parameters())
    assert stem & {id(parameters[name]) for name in changed.names}
    assert unfreeze(model, PREFIXES).names == []
    pixel_values, pixel_mask = tiny_images()
    model(pixel_values=pixel_values, pixel_mask=pixel_mask, labels=tiny_labels(3, 0)).loss.backward()
    assert {name for name, parameter in parameters.items() if parameter.grad is not None} == trained(model)
    assert model.model.backbone.num_frozen_stages == 2  # what the configuration says of a model that is loaded


def test_frozen_parameters_stay_and_the_others_learn():
    model = make_model().train()
    randomize(model, 0.1)
    frozen = freeze(model, ["backbone", "encoder", r"decoder\.layers\.0\."])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW((parameter for parameter in model.parameters() if parameter.requires_grad), lr=1e-3)
    pixel_values, pixel_mask = tiny_images()
    model(pixel_values=pixel_values, pixel_mask=pixel_mask, labels=tiny_labels(3, 0)).loss.backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == trained(model)  # no running statistics either
    assert not moved & set(frozen.names)


def test_freezing_is_not_saved_but_that_of_the_configuration_holds(tmp_path):
    model = make_model(num_frozen_backbone_stages=1)
    expected = trained(model)
    freeze(model, ["decoder", "backbone.stage1"])
    model.save_pretrained(tmp_path)
    assert trained(DinoDetrForObjectDetection.from_pretrained(tmp_path)) == expected


@pytest.mark.parametrize("function", [freeze, unfreeze])
def test_what_matches_nothing_is_refused_and_nothing_is_changed(function):
    model = make_model(num_denoising=0)
    before = trained(model)
    with pytest.raises(ValueError, match=r"'decoder\.heads\.7' matches no parameter. The parts are .*'backbone\.stem'"):
        function(model, ["encoder", "backbone", "decoder.heads.7"])
    with pytest.raises(ValueError, match=r"'denoising' matches no parameter"):
        function(model, ["encoder", "backbone", "denoising"])  # the model has none
    with pytest.raises(
        ValueError, match=r"'decoder\.\(' is neither a part of the model nor a regular expression: missing \)"
    ):
        function(model, "decoder.(")
    with pytest.raises(ValueError, match=r"model is a Linear, .* before the model is wrapped"):
        function(torch.nn.Linear(3, 2), "encoder")
    assert trained(model) == before


@pytest.mark.parametrize("what", ["", None, 3, ["encoder", ""], ["encoder", None]])
def test_what_is_empty_or_no_string_is_refused_and_nothing_is_changed(what):
    model = make_model()
    before = trained(model)
    with pytest.raises(
        ValueError, match=r"^('|None|3).* does not name a part of the model.*one of the parts \['backbone', "
    ):
        freeze(model, what)
    assert trained(model) == before


@pytest.mark.parametrize("word", ["class_head", "sampling_offsets|class_head"])
def test_a_word_from_the_middle_of_names_is_told_how_to_be_written(word):
    model = make_model()
    with pytest.raises(
        ValueError, match=r"matches no parameter.* \d+ names contain it, such as .*\.weight': write r"
    ) as caught:
        freeze(model, word)
    pattern = re.search('write r"(.*)"', str(caught.value))[1]
    expected = [name for name, _ in model.named_parameters() if re.search(word, name)]
    assert freeze(model, pattern).names == expected


def test_stages_of_timm_are_not_known():
    pytest.importorskip("timm")
    model = make_model(backbone_config=TIMM)
    assert backbone_stages(model) == {}
    with pytest.raises(ValueError, match=r"'backbone\.stage1' matches .*the stages of TimmBackbone are not known here"):
        freeze(model, "backbone.stage1")
    assert freeze(model, r"backbone\.model\._backbone\.layer1\.").num_parameters > 0


@pytest.mark.slow
def test_frozen_unfrozen_and_adapted_models_train_in_two_processes():
    pytest.importorskip("peft")
    run_processes("frozen_parameters", 2)
