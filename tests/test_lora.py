"""Adapters and class heads train, everything else stays bit for bit, and what is merged is a plain model again."""

import dataclasses
import re
import sys

import pytest
import torch
from transformers import BitsAndBytesConfig, Trainer, TrainingArguments, set_seed

from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.common.installation import install_command
from dino_hf.common.scenes import make_scenes
from dino_hf.training import load_coco
from dino_hf.training.lora import add_lora, lora_config
from dino_hf.training.recipes import get_recipe
from helpers import CONVNEXT, RESNET, SWIN, randomize, small_trainer, tiny_config, tiny_images

peft = pytest.importorskip("peft")
pytestmark = [
    # peft asks models for what transformers has renamed
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # peft looks for the vocabulary of a model that was not loaded from anywhere
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]

PROCESSOR = DinoDetrImageProcessor(size={"shortest_edge": 72, "longest_edge": 112})
ARGUMENT_NAMES = {field.name for field in dataclasses.fields(TrainingArguments)}
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in ARGUMENT_NAMES else "gradient_checkpointing"
SELF_ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
DEFORMABLE = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
PREFIX = "base_model.model.model."  # two of peft, one of ours


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    train = make_scenes(folder / "train", 8, seed=0)
    held_out = make_scenes(folder / "eval", 5, seed=1)
    train = load_coco(train, train.parent)
    return train, load_coco(held_out, held_out.parent, like=train)


def make_model(**changes) -> DinoDetrForObjectDetection:
    set_seed(0)
    return DinoDetrForObjectDetection(tiny_config(**changes)).eval()


def make_adapted(**settings):
    """Adapters begin as zero: here they do something."""
    adapted = add_lora(make_model(), r=4, **settings).eval()
    randomize(torch.nn.ParameterList(parameter for parameter in adapted.parameters() if parameter.requires_grad), 0.1)
    return adapted


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def predict(model):
    torch.manual_seed(1)
    pixel_values, pixel_mask = tiny_images()
    with torch.no_grad():
        outputs = model(pixel_values=pixel_values, pixel_mask=pixel_mask)
    return outputs.logits, outputs.pred_boxes


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("backbone", [RESNET, SWIN, CONVNEXT], ids=lambda backbone: backbone["model_type"])
def test_adapters_are_on_the_linears_of_every_layer_and_nowhere_else(backbone):
    model = add_lora(make_model(backbone_config=backbone))
    blocks = {
        "encoder": {f"self_attn.{name}" for name in DEFORMABLE},
        "decoder": {f"cross_attn.{name}" for name in DEFORMABLE} | SELF_ATTENTION,
    }
    expected = {
        f"{PREFIX}{side}.layers.{layer}.{block}.lora_{matrix}.default.weight"
        for side, layers in (("encoder", 2), ("decoder", 3))
        for layer in range(layers)
        for block in blocks[side] | {"mlp.fc1", "mlp.fc2"}
        for matrix in "AB"
    }
    assert {name for name in trained(model) if ".lora_" in name} == expected


def test_class_heads_and_label_embedding_are_trained_whole():
    model = add_lora(make_model(share_decoder_heads=False))
    heads = ["query_selection.head", *(f"decoder.heads.{layer}" for layer in range(3))]
    expected = {f"{head}.class_head.modules_to_save.default.{part}" for head in heads for part in ("weight", "bias")}
    expected |= {"denoising.label_embedding.modules_to_save.default.weight"}
    assert {name for name in trained(model) if ".lora_" not in name} == {PREFIX + name for name in expected}


def test_without_denoising_there_is_no_label_embedding_to_train():
    assert lora_config(make_model(num_denoising=0)).modules_to_save == ["class_head"]


def test_fresh_adapters_change_no_prediction_and_no_bit_of_the_weights_below():
    model = make_model()
    before, expected = weights(model), predict(model)
    adapted = add_lora(model).eval()
    assert all(map(torch.equal, predict(adapted), expected))
    below = {
        name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", ""): value
        for name, value in adapted.state_dict().items()
        if ".lora_" not in name and ".modules_to_save" not in name
    }
    assert set(below) == set(before)
    assert all(torch.equal(below[name], before[name]) for name in before)


def test_settings_go_to_peft():
    config = lora_config(make_model(), r=3, lora_alpha=5, lora_dropout=0.25, target_modules=["q_proj"], use_rslora=True)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (3, 5, 0.25, True)
    assert config.target_modules == {"q_proj"}
    assert config.modules_to_save == ["class_head", "label_embedding"]


@pytest.mark.parametrize("changes", [{}, {"bf16": True, CHECKPOINTING: True}], ids=["plain", "bf16-checkpointing"])
def test_a_trainer_lowers_the_loss_and_moves_what_is_trained_and_nothing_else(changes, data, tmp_path):
    adapted = add_lora(make_model(num_denoising=50, id2label=data[0].id2label), r=4)
    settings = {"max_steps": 24, "learning_rate": 1e-2, "per_device_eval_batch_size": 2, "logging_steps": 1}
    trainer = small_trainer(data, tmp_path, adapted, PROCESSOR, **settings | changes)
    before, loss_before = weights(adapted), trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * loss_before
    moved = {name for name, value in adapted.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == trained(adapted)


def test_checkpointing_computes_the_same_losses(data, tmp_path):
    runs = []
    for changes in ({}, {CHECKPOINTING: True}):
        adapted = add_lora(make_model(num_denoising=50, id2label=data[0].id2label))
        settings = {"max_steps": 3, "logging_steps": 1, **changes}
        trainer = small_trainer(data, tmp_path, adapted, PROCESSOR, **settings)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)  # computed again, maybe in another order


def test_a_run_with_adapters_is_resumed_to_the_same_weights(data, tmp_path):
    def make_trainer(**changes):
        adapted = add_lora(make_model(num_denoising=50, id2label=data[0].id2label), r=4)
        return small_trainer(data, tmp_path, adapted, PROCESSOR, max_steps=4, **changes)

    whole = make_trainer(save_strategy="steps", save_steps=2)
    whole.train()
    resumed = make_trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = weights(whole.model)
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())


def test_a_recipe_makes_the_optimizer_of_adapters():
    adapted = make_adapted()
    recipe = get_recipe("finetune", sampling_offsets_learning_rate=5e-6)
    groups = {group["name"]: group for group in recipe.make_optimizer(adapted).param_groups}
    names = {id(parameter): name for name, parameter in adapted.named_parameters()}
    assert set(groups) == {"transformer", "sampling_offsets"}  # nothing of the backbone is trained
    assert {names[id(parameter)] for group in groups.values() for parameter in group["params"]} == trained(adapted)
    assert all("sampling_offsets.lora_" in names[id(p)] for p in groups["sampling_offsets"]["params"])


def test_saved_adapters_give_the_same_outputs_on_the_base_again(tmp_path):
    adapted = make_adapted()
    adapted.save_pretrained(tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".safetensors", ".json", ".md"}  # adapters, not the model
    base = make_model()
    with torch.no_grad():
        base.model.decoder.heads[0].class_head.weight.zero_()  # comes with the adapters
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert all(map(torch.equal, predict(loaded), predict(adapted)))


def test_a_merged_model_is_a_plain_one_that_predicts_as_the_adapted_one(tmp_path):
    plain, adapted = make_model(), make_adapted()
    expected = predict(adapted)
    assert (expected[0] - predict(plain)[0]).abs().max() > 0.1
    merged = adapted.merge_and_unload()
    assert type(merged) is DinoDetrForObjectDetection
    types = {name: type(module) for name, module in plain.named_modules()}
    assert {name: type(module) for name, module in merged.named_modules()} == types
    for found, wanted in zip(predict(merged), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)  # a sum of two products, or a product of a sum

    merged.save_pretrained(tmp_path)
    loaded, report = DinoDetrForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert set(loaded.state_dict()) == set(plain.state_dict())
    assert all(map(torch.equal, predict(loaded.eval()), predict(merged)))
    assert trained(loaded) == trained(plain)  # nothing of the freezing is left


def test_a_model_of_another_kind_and_one_with_adapters_are_refused():
    with pytest.raises(ValueError, match="model is a Linear, but must be a DinoDetrForObjectDetection"):
        add_lora(torch.nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"model is a PeftModel.* only once"):
        add_lora(add_lora(make_model()))


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=re.escape(install_command("lora"))):
        add_lora(make_model())


def quantized(folder, bits: int, skip: list[str]):
    """The tiny model, saved and loaded with linears of 4 or 8 bits."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    make_model().save_pretrained(folder)
    settings = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, llm_int8_skip_modules=skip)
    model = DinoDetrForObjectDetection.from_pretrained(folder, quantization_config=settings, device_map="cpu")
    kind = {4: bitsandbytes.nn.Linear4bit, 8: bitsandbytes.nn.Linear8bitLt}[bits]
    return model, {name for name, module in model.named_modules() if isinstance(module, kind)}


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_learn_on_a_quantized_model(bits, tmp_path):
    model, names = quantized(tmp_path, bits, ["class_head"])
    plain = {name for name, module in make_model().named_modules() if isinstance(module, torch.nn.Linear)}
    assert names == {name for name in plain if not name.endswith("class_head")}
    adapted = add_lora(model, r=4).train()
    frozen = {name: value.clone() for name, value in adapted.named_parameters() if not value.requires_grad}
    learning = {name: value for name, value in adapted.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(learning.values(), lr=1e-3)
    torch.manual_seed(0)
    pixel_values = torch.randn(2, 3, 64, 96)
    labels = [
        {"class_labels": torch.tensor([1, 2]), "boxes": torch.tensor([[0.5, 0.4, 0.2, 0.3], [0.3, 0.6, 0.2, 0.1]])},
        {"class_labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)},
    ]
    before = {name: value.detach().clone() for name, value in learning.items()}
    for _ in range(2):
        optimizer.zero_grad()
        loss = adapted(pixel_values=pixel_values, labels=labels).loss
        assert loss.isfinite()
        loss.backward()
        optimizer.step()
    # in the second step no factor of an adapter is zero any more
    for name, value in learning.items():
        assert value.grad.isfinite().all()
        assert not torch.equal(value, before[name]), name
    assert any("lora_A" in name for name in learning)
    assert any("class_head" in name for name in learning)
    assert all(torch.equal(value, dict(adapted.named_parameters())[name]) for name, value in frozen.items())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_class_head_is_refused_with_the_cure(bits, tmp_path):
    model, names = quantized(tmp_path, bits, ["decoder"])
    assert any(name.endswith("class_head") for name in names)
    with pytest.raises(ValueError, match=r"class_head is quantized.*llm_int8_skip_modules=\['class_head', "):
        add_lora(model)
