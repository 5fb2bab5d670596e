import copy
import inspect
import math
import pickle
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForObjectDetection
from transformers.utils.generic import find_labels

from dino_hf import DinoDetrConfig, DinoDetrForObjectDetection, DinoDetrImageProcessor, DinoDetrModel
from dino_hf.model.feature_levels import describe_levels
from dino_hf.model.modeling_dino_detr import DinoDetrModelOutput, DinoDetrObjectDetectionOutput
from helpers import (
    BIT,
    CONVNEXT,
    NUM_LABELS,
    RESNET,
    SIZES,
    SWIN,
    TIMM,
    num_tokens,
    tiny_config,
    tiny_images,
    tiny_labels,
)

BACKBONES = {"resnet": RESNET, "swin": SWIN, "convnext": CONVNEXT, "timm": TIMM, "bit": BIT}
every_backbone = pytest.mark.parametrize("backbone", ["resnet", "swin", "convnext", "bit"])
every_backbone_and_timm = pytest.mark.parametrize("backbone", BACKBONES)
NUM_TOKENS = 8 * 13 + 4 * 7 + 2 * 4 + 1 * 2


def make_model(backbone="resnet", **changes) -> DinoDetrForObjectDetection:
    if backbone == "timm":
        pytest.importorskip("timm")
    torch.manual_seed(0)
    return DinoDetrForObjectDetection(tiny_config(backbone_config=dict(BACKBONES[backbone]), **changes))


def excite(model: nn.Module) -> nn.Module:
    """Away from the initial values, whose zeros hide mistakes, and not so far that boxes saturate."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "backbone" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def train_step(model, labels, seed=0):
    """Loss, gradients by name and loss_dict of one step whose denoising noise is seeded."""
    pixel_values, pixel_mask = tiny_images()
    model.train().zero_grad()
    torch.manual_seed(seed)
    outputs = model(pixel_values, pixel_mask, labels)
    outputs.loss.backward()
    return (
        outputs.loss.detach(),
        {name: parameter.grad for name, parameter in model.named_parameters()},
        outputs.loss_dict,
    )


def test_the_auto_classes_build_the_model():
    config = tiny_config()
    assert type(AutoConfig.for_model("dino_detr")) is DinoDetrConfig
    assert type(AutoModel.from_config(config)) is DinoDetrModel
    assert type(AutoModelForObjectDetection.from_config(config)) is DinoDetrForObjectDetection


def test_the_auto_classes_load_the_model(tmp_path):
    model = make_model().eval()
    model.save_pretrained(tmp_path)
    detector = AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    base = AutoModel.from_pretrained(tmp_path).eval()
    inputs = tiny_images()
    assert type(detector) is DinoDetrForObjectDetection
    assert type(base) is DinoDetrModel
    assert torch.equal(detector(*inputs).logits, model(*inputs).logits)
    assert torch.equal(base(*inputs).last_hidden_state, model(*inputs).last_hidden_state)


OUTPUTS = {
    "logits": (2, 15, NUM_LABELS),
    "pred_boxes": (2, 15, 4),
    "intermediate_logits": (2, 3, 15, NUM_LABELS),
    "intermediate_pred_boxes": (2, 3, 15, 4),
    "enc_topk_logits": (2, 15, NUM_LABELS),
    "enc_topk_bboxes": (2, 15, 4),
    "last_hidden_state": (2, 15, 64),
    "encoder_last_hidden_state": (2, NUM_TOKENS, 64),
}


@every_backbone
def test_outputs_are_batch_first_and_of_these_shapes(backbone):
    # an image whose sides are multiples of 64: ConvNeXt leaves out odd rows, and then has fewer tokens
    pixel_values = torch.randn(2, 3, 64, 128)
    tokens = 8 * 16 + 4 * 8 + 2 * 4 + 1 * 2
    outputs = make_model(backbone).eval()(pixel_values)
    expected = {**OUTPUTS, "encoder_last_hidden_state": (2, tokens, 64)}
    assert {name: tuple(value.shape) for name, value in outputs.items()} == expected


@pytest.mark.parametrize("training", [False, True])
def test_outputs_with_labels_begin_with_loss_loss_dict_logits_and_boxes(training):
    outputs = make_model().train(training)(*tiny_images(), tiny_labels(3, 0))
    assert list(outputs) == ["loss", "loss_dict", *OUTPUTS]
    assert outputs.loss.shape == ()
    assert ("loss_ce_dn" in outputs.loss_dict) == training
    assert {name: tuple(outputs[name].shape) for name in OUTPUTS} == OUTPUTS


def test_a_tuple_has_the_same_order():
    model = make_model().eval()
    inputs = tiny_images()
    outputs, as_tuple = model(*inputs), model(*inputs, return_dict=False)
    assert len(as_tuple) == len(OUTPUTS)
    for value, name in zip(as_tuple, OUTPUTS, strict=True):
        assert torch.equal(value, outputs[name])


def test_the_last_layer_is_the_prediction():
    outputs = make_model().eval()(*tiny_images())
    assert torch.equal(outputs.logits, outputs.intermediate_logits[:, -1])
    assert torch.equal(outputs.pred_boxes, outputs.intermediate_pred_boxes[:, -1])


@pytest.mark.parametrize("by_config", [False, True])
def test_hidden_states_and_attentions_come_on_request(by_config):
    model = make_model().eval()
    inputs, asked = tiny_images(), {"output_hidden_states": True, "output_attentions": True}
    if by_config:
        model.config._attn_implementation = "eager"  # the library refuses `output_attentions` of a config with sdpa
        for name, value in asked.items():
            setattr(model.config, name, value)
        asked = {}
    outputs = model(*inputs, **asked)
    shapes = {
        "encoder_hidden_states": [(2, NUM_TOKENS, 64)] * (2 + 1),
        "encoder_attentions": [(2, NUM_TOKENS, 4, 4, 2)] * 2,
        "decoder_hidden_states": [(2, 15, 64)] * (3 + 1),
        "decoder_attentions": [(2, 4, 15, 15)] * 3,
        "cross_attentions": [(2, 15, 4, 4, 3)] * 3,
        "encoder_sampling_locations": [(2, NUM_TOKENS, 4, 4, 2, 2)] * 2,
        "cross_sampling_locations": [(2, 15, 4, 4, 3, 2)] * 3,
    }
    for name, expected in shapes.items():
        assert [tuple(value.shape) for value in outputs[name]] == expected, name
    assert torch.equal(outputs.encoder_hidden_states[-1], outputs.encoder_last_hidden_state)
    plain = model(*inputs, output_hidden_states=False, output_attentions=False)
    assert set(plain) == set(OUTPUTS)
    # asking for weights takes eager attention instead of sdpa: sums in another order in float32
    torch.testing.assert_close(plain.logits, outputs.logits, rtol=0, atol=1e-5)


def test_evaluation_keeps_nothing_behind_the_boxes():
    names = list(DinoDetrObjectDetectionOutput.__dataclass_fields__)
    assert names[:4] == ["loss", "loss_dict", "logits", "pred_boxes"]
    assert set(names[4:]) == set(DinoDetrConfig.keys_to_ignore_at_inference)


def test_the_detector_passes_on_every_output_of_the_model_but_denoising():
    inner, outer = (set(output.__dataclass_fields__) for output in (DinoDetrModelOutput, DinoDetrObjectDetectionOutput))
    assert inner - outer == {"denoising"}


def test_trainer_takes_labels_and_nothing_else_as_labels():
    assert find_labels(DinoDetrForObjectDetection) == ["labels"]
    assert list(inspect.signature(DinoDetrForObjectDetection.forward).parameters)[1:4] == [
        "pixel_values",
        "pixel_mask",
        "labels",
    ]


class PatchBackbone(nn.Module):
    """Maps of which each cell sees its own pixels only, so that padding can enter behind the backbone or nowhere."""

    def __init__(self, d_model: int):
        super().__init__()
        self.projection = nn.Linear(3, d_model)

    def forward(self, pixel_values, pixel_mask):
        maps, masks = [], []
        for stride in (8, 16, 32, 64):
            cells = nn.functional.avg_pool2d(pixel_values, stride).permute(0, 2, 3, 1) * stride
            maps.append(self.projection(cells).permute(0, 3, 1, 2))
            masks.append(None if pixel_mask is None else ~pixel_mask[:, ::stride, ::stride])
        return maps, None if pixel_mask is None else masks


@pytest.mark.parametrize("padded_size", [(128, 256), (64, 320), (192, 128)], ids=str)
def test_an_image_gives_the_same_detections_alone_and_padded(padded_size, monkeypatch):
    """But for two things that the original has too, and which are taken out here: the convolutions and norms of the
    backbone see padding, and the decoder's position embedding takes a box relative to the padded image."""
    model = excite(make_model()).eval()
    model.model.backbone = PatchBackbone(64)
    embed = model.model.decoder._position
    unpadded = torch.ones(2, 4, 2)
    monkeypatch.setattr(
        model.model.decoder, "_position", lambda boxes, levels: embed(boxes, levels._replace(valid_ratios=unpadded))
    )
    # Then tokens without an anchor score the class bias, less than the best class of any other: they are not selected.
    nn.init.zeros_(model.model.query_selection.memory_proj.bias)
    nn.init.zeros_(model.model.query_selection.memory_norm.bias)
    images = torch.randn(2, 3, 64, 128)
    alone = model(images)
    pixel_values, pixel_mask = torch.randn(2, 3, *padded_size), torch.zeros(2, *padded_size, dtype=torch.long)
    pixel_values[:, :, :64, :128], pixel_mask[:, :64, :128] = images, 1
    padded = model(pixel_values, pixel_mask)
    assert alone.enc_topk_bboxes.max() < 1  # no token without an anchor was selected
    for name in ("enc_topk_logits", "enc_topk_bboxes", "logits", "pred_boxes"):
        # sampling at rescaled coordinates in float32, through two encoder and three decoder layers
        torch.testing.assert_close(padded[name], alone[name], rtol=0, atol=1e-4)


@every_backbone
def test_no_mask_is_a_mask_without_padding(backbone, monkeypatch):
    model = make_model(backbone).eval()
    pixel_values, _ = tiny_images()
    ones = torch.ones(2, 64, 104)
    without = model(pixel_values).logits
    assert torch.equal(without, model(pixel_values, ones).logits)
    assert torch.equal(without, model(pixel_values, ones.bool()).logits)
    # as on a GPU and in compiled code, which does not look at the mask
    monkeypatch.setattr("dino_hf.model.targets.is_traced", lambda: True)
    assert torch.equal(without, model(pixel_values, ones).logits)


def test_a_mask_without_padding_makes_no_work():
    model, given = make_model().eval(), []
    model.model.backbone.register_forward_pre_hook(lambda backbone, inputs: given.append(inputs[1]))
    pixel_values, pixel_mask = tiny_images()
    model(pixel_values, torch.ones_like(pixel_mask))
    model(pixel_values, pixel_mask)
    assert given[0] is None
    assert torch.equal(given[1], pixel_mask.bool())


def assert_initial_values(model: DinoDetrForObjectDetection):
    for head in (model.model.query_selection.head, *model.model.decoder.heads):
        torch.testing.assert_close(head.class_head.bias, torch.full((NUM_LABELS,), -math.log(99)))
        assert not head.box_head.layers[-1].weight.any()
        assert not head.box_head.layers[-1].bias.any()
    layers = [(layer.self_attn, 2) for layer in model.model.encoder.layers]
    layers += [(layer.cross_attn, 3) for layer in model.model.decoder.layers]
    for attention, points in layers:
        star = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
        star = star[:, None, None] * torch.arange(1, points + 1)[:, None]
        bias = attention.sampling_offsets.bias.view(4, 4, points, 2)
        # the sine of a multiple of pi in float32
        torch.testing.assert_close(bias, star.expand(4, 4, points, 2), rtol=0, atol=1e-5)
        assert not attention.sampling_offsets.weight.any()
        assert not attention.attention_weights.weight.any()
        assert not attention.attention_weights.bias.any()
    for name, module in model.model.named_modules():
        if (
            name.endswith(("value_proj", "output_proj", "fc1", "fc2", "memory_proj", "o_proj"))
            and "backbone" not in name
        ):
            bound = math.sqrt(6 / (module.in_features + module.out_features))
            assert 0.9 * bound < module.weight.abs().max() <= bound, name
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            assert (module.weight == 1).all(), name
            assert not module.bias.any(), name
    for embedding in (model.model.encoder.level_embed, model.model.query_selection.content):
        # 128 draws at least: the standard error of a deviation is 0.06
        assert embedding.weight.std().item() == pytest.approx(1, abs=0.25)
    for projection in model.model.backbone.projections:
        assert not projection.bias.any()


def test_a_fresh_model_has_its_initial_values():
    assert_initial_values(make_model())


def test_a_model_of_the_auto_class_has_its_initial_values():
    assert_initial_values(AutoModelForObjectDetection.from_config(tiny_config()))


@pytest.mark.parametrize(
    "missing",
    [
        ["class_head", "box_head"],
        ["sampling_offsets", "attention_weights", "value_proj", "output_proj"],
        ["mlp", "_norm", "level_embed", "content", "memory_proj"],
        ["q_proj", "k_proj", "v_proj", "o_proj", "projections", "backbone.norms"],
        ["model."],
    ],
    ids=lambda names: names[0],
)
def test_what_a_checkpoint_does_not_hold_has_its_initial_values(tmp_path, missing):
    """And the rest is loaded. The library skips `_init_weights` for third-party modules that own no parameter."""
    model = make_model()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    kept = {name: tensor for name, tensor in tensors.items() if not any(part in name for part in missing)}
    assert len(kept) < len(tensors)
    save_file(kept, file, metadata={"format": "pt"})
    loaded, info = DinoDetrForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == set(tensors) - set(kept)
    assert_initial_values(loaded)
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())
    assert all(tensor.isfinite().all() for tensor in state.values())


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_the_half_of_a_layer_that_a_checkpoint_holds_is_loaded(tmp_path, part):
    model = excite(make_model())
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(part) or "backbone.model" in name}
    assert len(kept) < len(tensors)
    save_file(kept, file, metadata={"format": "pt"})
    state = DinoDetrForObjectDetection.from_pretrained(tmp_path).state_dict()
    assert [name for name, tensor in kept.items() if not torch.equal(state[name], tensor)] == []


def test_missing_statistics_of_frozen_batch_norm_have_their_initial_values(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if "normalization" not in k}, file, metadata={"format": "pt"})
    state = DinoDetrForObjectDetection.from_pretrained(tmp_path).state_dict()
    for name in set(tensors) - {k for k in tensors if "normalization" not in k}:
        expected = torch.ones_like if name.endswith(("weight", "running_var")) else torch.zeros_like
        assert torch.equal(state[name], expected(state[name])), name


def test_a_new_number_of_labels_has_new_class_heads_only(tmp_path):
    model = excite(make_model())
    model.save_pretrained(tmp_path)
    loaded = DinoDetrForObjectDetection.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    before, after = model.state_dict(), loaded.state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    heads = {
        f"model.{owner}.class_head.{part}"
        for owner in ("query_selection.head", "decoder.heads.0")
        for part in ("weight", "bias")
    }
    assert changed == heads | {"model.denoising.label_embedding.weight"}
    for head in (loaded.model.query_selection.head, loaded.model.decoder.heads[0]):
        torch.testing.assert_close(head.class_head.bias, torch.full((7,), -math.log(99)))


def random_states() -> list:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]


SEVEN = {index: f"class {index}" for index in range(7)}


@pytest.mark.parametrize("load", [DinoDetrForObjectDetection, DinoDetrModel, AutoModelForObjectDetection, AutoModel])
@pytest.mark.parametrize("missing", [None, "value_proj", "stages.0"])
def test_what_is_drawn_in_loading_depends_on_the_seed_of_the_caller(tmp_path, load, missing):
    make_model(share_decoder_heads=False).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    changes = {"id2label": SEVEN, "ignore_mismatched_sizes": True} if missing is None else {}
    if missing is not None:
        kept = {name: tensor for name, tensor in tensors.items() if missing not in name}
        assert len(kept) < len(tensors)
        save_file(kept, file, metadata={"format": "pt"})
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model, info = load.from_pretrained(tmp_path, output_loading_info=True, **changes)
        states.append(model.state_dict())
    assert [name for name, tensor in states[0].items() if not torch.equal(tensor, states[1][name])] == []
    drawn = info["missing_keys"] if missing else [name for name, *_ in info["mismatched_keys"]]
    drawn = [name for name in drawn if states[0][name].ndim > 1]
    assert len(drawn) >= 2
    assert not any(torch.equal(states[0][name], states[2][name]) for name in drawn)
    # each has draws of its own
    assert len({tuple(states[0][name].flatten()[:40].tolist()) for name in drawn}) == len(drawn)


def test_a_load_that_draws_nothing_leaves_the_random_numbers_alone(tmp_path):
    make_model().save_pretrained(tmp_path)
    before = random_states()
    DinoDetrForObjectDetection.from_pretrained(tmp_path)
    assert random_states() == before


def test_hidden_states_and_attentions_are_there_under_the_hooks_of_accelerate():
    accelerate = pytest.importorskip("accelerate")
    model, inputs = make_model().eval(), tiny_images()
    asked = {"output_hidden_states": True, "output_attentions": True}
    expected = model(*inputs, **asked)
    for part in (model.model.encoder, model.model.decoder, *model.model.encoder.layers, *model.model.decoder.layers):
        accelerate.hooks.add_hook_to_module(part, accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True))
    outputs = model(*inputs, **asked)
    for name in ("encoder_hidden_states", "encoder_attentions", "decoder_hidden_states", "decoder_attentions"):
        assert len(outputs[name]) == len(expected[name]) > 0
        assert all(map(torch.equal, outputs[name], expected[name]))


@every_backbone_and_timm
def test_a_saved_model_is_exactly_the_same_again(tmp_path, backbone):
    model = excite(make_model(backbone)).eval()
    model.save_pretrained(tmp_path)
    loaded, info = DinoDetrForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not loaded.training
    inputs = tiny_images()
    expected, got = model(*inputs), loaded(*inputs)
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.pred_boxes, expected.pred_boxes)


@every_backbone_and_timm
def test_trainer_resumes_from_saved_weights_without_missing_or_unexpected_keys(tmp_path, backbone):
    """`Trainer` loads with `load_state_dict(strict=False)`: keys of other names would be lost with a mere warning."""
    model = excite(make_model(backbone))
    model.save_pretrained(tmp_path)
    fresh = DinoDetrForObjectDetection(model.config)
    result = fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    state = fresh.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("training", [False, True])
def test_a_model_in_half_precision_gives_boxes_and_loss_in_float32(training):
    model = make_model().bfloat16().train(training)
    outputs = model(*tiny_images(), tiny_labels(3, 0))
    assert outputs.logits.dtype == torch.bfloat16
    assert outputs.pred_boxes.dtype == outputs.enc_topk_bboxes.dtype == outputs.loss.dtype == torch.float32
    outputs.loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(gradients) > 100
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_autocast_changes_little():
    model, inputs = excite(make_model()).eval(), tiny_images()
    expected = model(*inputs, tiny_labels(3, 0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(*inputs, tiny_labels(3, 0))
    assert outputs.pred_boxes.dtype == outputs.loss.dtype == torch.float32
    # Other queries can win a close selection, so boxes are not comparable one by one; the encoder's tokens are.
    # five layers of bfloat16 (2 ** -9 each way) on values up to about 4
    torch.testing.assert_close(
        outputs.encoder_last_hidden_state.float(), expected.encoder_last_hidden_state, rtol=0, atol=0.15
    )


@every_backbone
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_neither_loss_nor_gradients(backbone, reentrant):
    model, labels = excite(make_model(backbone)), tiny_labels(3, 0)
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    torch.manual_seed(1)
    loss, gradients, _ = train_step(model, labels)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    layers = [*model.model.encoder.layers, *model.model.decoder.layers]
    calls = []
    for layer in layers:
        layer.mlp.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(1)
    checkpointed_loss, checkpointed_gradients, _ = train_step(model, labels)
    assert len(calls) == 2 * len(layers)  # forward, and again in backward
    # Where no gradient is recorded, Swin can round in another way, which norms over two cells enlarge.
    torch.testing.assert_close(checkpointed_loss, loss, rtol=1e-4, atol=0)
    for name, gradient in gradients.items():
        other = checkpointed_gradients[name]
        assert (gradient is None) == (other is None), name
        assert gradient is None or (other - gradient).norm() <= 1e-3 * gradient.norm() + 1e-3, name


def test_lists_and_padded_tensors_as_labels_give_the_same_loss():
    model, labels = make_model(), tiny_labels(3, 0)
    padded = {"class_labels": torch.full((2, 5), -100), "boxes": torch.zeros(2, 5, 4)}
    padded["class_labels"][0, :3], padded["boxes"][0, :3] = labels[0]["class_labels"], labels[0]["boxes"]
    images = tiny_images()
    losses = []
    for given in (labels, padded):
        torch.manual_seed(1)
        losses.append(model.train()(*images, given).loss)
    assert torch.equal(*losses)


def test_labels_do_not_change_the_predictions():
    """In training, denoising queries join the others, which must not look at them: they hold the ground truth."""
    model, images = excite(make_model()).train(), tiny_images()
    without, within = model(*images), model(*images, tiny_labels(3, 0))
    for name in OUTPUTS:
        # sums of another length in float32
        torch.testing.assert_close(within[name], without[name], rtol=0, atol=1e-5)


def test_an_image_with_fewer_tokens_than_queries_works():
    model = make_model().train()
    pixel_values = torch.randn(2, 3, 16, 24)
    outputs = model(pixel_values, None, tiny_labels(3, 0))
    tokens = 2 * 3 + 1 * 2 + 1 * 1 + 1 * 1
    assert outputs.logits.shape == (2, tokens, NUM_LABELS)
    assert outputs.pred_boxes.shape == (2, tokens, 4)
    outputs.loss.backward()
    assert outputs.loss.isfinite()


@pytest.mark.parametrize("model_class", [DinoDetrModel, DinoDetrForObjectDetection])
@pytest.mark.parametrize(
    ("pixel_values", "pixel_mask", "message"),
    [
        ((3, 64, 104), None, r"pixel_values have shape \(3, 64, 104\), expected \(batch, .*pixel_values\[None\]"),
        ((2, 3, 64, 104), (2, 104, 64), r"pixel_mask has shape \(2, 104, 64\), expected \(2, 64, 104\)"),
        ((2, 3, 64, 104), (1, 64, 104), r"pixel_mask has shape \(1, 64, 104\), expected \(2, 64, 104\)"),
        ((2, 3, 64, 104), (2, 1, 64, 104), r"pixel_mask has shape \(2, 1, 64, 104\)"),
    ],
)
def test_inputs_of_a_wrong_shape_are_refused(model_class, pixel_values, pixel_mask, message):
    pixel_mask = None if pixel_mask is None else torch.ones(pixel_mask)
    with pytest.raises(ValueError, match=message):
        model_class(tiny_config())(torch.randn(pixel_values), pixel_mask)


@pytest.mark.parametrize("training", [False, True])
def test_wrong_labels_are_refused(training):
    with pytest.raises(ValueError, match=r"class 9 does not exist.*config.num_labels=5"):
        make_model().train(training)(*tiny_images(), [{"class_labels": [9], "boxes": [[0.5] * 4]}, *tiny_labels(0)])


@every_backbone
@pytest.mark.parametrize("counts", [(0, 0), (3, 0), (0, 20)], ids=str)
@pytest.mark.parametrize("share", [True, False])
def test_every_trainable_parameter_gets_a_gradient_in_every_batch(backbone, counts, share):
    model = make_model(backbone, share_decoder_heads=share)
    loss, gradients, _ = train_step(model, tiny_labels(*counts))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert loss.isfinite()
    assert {name for name, gradient in gradients.items() if gradient is not None} == trainable
    assert all(gradients[name].isfinite().all() for name in trainable)


def test_without_denoising_there_are_no_denoising_parameters_and_losses():
    model = make_model(num_denoising=0)
    assert not [name for name, _ in model.named_parameters() if "denoising" in name]
    _, gradients, logs = train_step(model, tiny_labels(3, 0))
    assert not [name for name in logs if "_dn" in name]
    assert not [n for n, parameter in model.named_parameters() if parameter.requires_grad and gradients[n] is None]


def test_heads_of_their_own_for_each_decoder_layer_are_saved_and_used(tmp_path):
    model = excite(make_model(share_decoder_heads=False)).eval()
    assert len(model.model.decoder.heads) == 3
    model.save_pretrained(tmp_path)
    names = [name for name in load_file(tmp_path / "model.safetensors") if name.endswith("class_head.weight")]
    assert len(names) == 3 + 1
    images = tiny_images()
    before = model(*images).intermediate_logits
    with torch.no_grad():
        model.model.decoder.heads[1].class_head.bias += 1
    moved = (model(*images).intermediate_logits - before).abs().amax((0, 2, 3))
    # 1 plus rounding in float32
    torch.testing.assert_close(moved, torch.tensor([0.0, 1.0, 0.0]), rtol=0, atol=1e-5)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize(
    ("duplicate", "backbone"),
    # The library's Swin and ConvNeXt cannot be pickled themselves: they carry a local function as a hook.
    [*((copy.deepcopy, backbone) for backbone in BACKBONES), (through_pickle, "resnet")],
)
def test_a_copied_or_pickled_model_predicts_the_same(duplicate, backbone):
    model, images = make_model(backbone).eval(), tiny_images()
    twin = duplicate(model)
    expected = model(*images).logits
    assert torch.equal(twin(*images).logits, expected)
    with torch.no_grad():
        twin.model.query_selection.content.weight.add_(1)
    assert torch.equal(model(*images).logits, expected)


def test_the_base_model_runs_denoising_in_training_with_labels_only():
    model, images, labels = DinoDetrModel(tiny_config()), tiny_images(), tiny_labels(3, 0)
    assert model.eval()(*images, labels).denoising is None
    assert model.train()(*images).denoising is None
    denoising = model(*images, labels).denoising
    assert denoising.targets.num_groups == 100 // 6
    assert denoising.logits.shape == (3, 2, denoising.targets.num_groups * 6, NUM_LABELS)


def test_attention_implementations_agree():
    model, images = excite(make_model()).eval(), tiny_images()
    results = []
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)  # the ResNet below has no attention, and refuses the name "sdpa"
        assert model.model.decoder.layers[0].self_attn.config._attn_implementation == name
        results.append(model(*images).logits)
    # sums in another order in float32
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


def test_the_number_of_tokens_is_that_of_the_levels():
    _, pixel_mask = tiny_images()
    _, masks = make_model().model.backbone(torch.randn(2, 3, 64, 104), pixel_mask.bool())
    assert num_tokens(describe_levels(masks)) == NUM_TOKENS


def test_training_steps_lower_the_loss():
    model, labels = make_model(), tiny_labels(3, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images = tiny_images()
    losses = []
    for _ in range(8):
        torch.manual_seed(1)  # the same noise in each step
        loss = model.train()(*images, labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


def test_a_misspelt_argument_is_an_error():
    with pytest.raises(TypeError, match="label"):
        DinoDetrForObjectDetection(tiny_config())(*tiny_images(), label=tiny_labels(2, 0))


def test_what_is_frozen_stays_frozen_through_saving_and_loading(tmp_path):
    model = DinoDetrForObjectDetection(tiny_config(num_frozen_backbone_stages=2))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen
    model.save_pretrained(tmp_path)
    loaded = DinoDetrForObjectDetection.from_pretrained(tmp_path)
    assert {name for name, parameter in loaded.named_parameters() if not parameter.requires_grad} == frozen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_trains_with_a_loss_in_float32(dtype):
    model = make_model("resnet", num_denoising=10).train()
    labels, losses = tiny_labels(3, 0), []
    images = tiny_images()
    for enabled in (False, True):
        torch.manual_seed(1)  # the same noise
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            outputs = model(*images, labels)
        losses.append(outputs.loss.item())
    assert outputs.logits.dtype == dtype
    assert outputs.loss.dtype == outputs.pred_boxes.dtype == torch.float32
    outputs.loss.backward()
    assert all(one.grad.isfinite().all() for one in model.parameters() if one.requires_grad)
    # 8 bits of bfloat16 choose other queries; float16 has 11
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


@pytest.mark.parametrize("form", ["list", "sizes", "padded"])
def test_tensors_of_the_model_do_not_depend_on_the_default_device(form):
    """A model on another device than the default one; what is made on "meta" by mistake has no numbers."""
    model = DinoDetrForObjectDetection(tiny_config(max_denoising_queries=6, mask_denoising_padding=True))
    pixel_values, pixel_mask = tiny_images()
    labels = tiny_labels(5, 0)
    if form == "sizes":
        labels = [one | {"size": torch.tensor(size)} for one, size in zip(labels, SIZES, strict=True)]
        pixel_mask = None
    elif form == "padded":
        labels = {"class_labels": torch.tensor([[1, 2], [3, -100]]), "boxes": torch.full((2, 2, 4), 0.4)}
    expected = model.eval()(pixel_values, pixel_mask, labels).loss
    torch.set_default_device("meta")
    try:
        model.train()(pixel_values, pixel_mask, labels).loss.backward()
        outputs = model.eval()(pixel_values, pixel_mask, labels, output_attentions=True)
        sizes = [(48, 60), (40, 50)]
        found = DinoDetrImageProcessor().post_process_object_detection(outputs, 0.0, sizes, config=model.config)
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(outputs.loss, expected)
    assert all(one["boxes"].device.type == "cpu" and len(one["boxes"]) for one in found)


class HalfLoss(torch.nn.Module):
    """A loss of a user, as a module with a parameter."""

    def __init__(self, criterion):
        super().__init__()
        self.criterion, self.factor = criterion, torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, *args):
        loss, logs = self.criterion(*args)
        return loss * self.factor, logs


def test_the_loss_function_is_the_criterion_until_another_one_is_set():
    model = DinoDetrForObjectDetection(tiny_config()).eval()
    batch, labels = tiny_images(), tiny_labels(3, 0)
    assert model.loss_function is model.criterion
    expected = model(*batch, labels).loss
    model.loss_function = lambda *args: (2 * model.criterion(*args)[0], {"mine": torch.ones(())})
    found = model(*batch, labels)
    torch.testing.assert_close(found.loss, 2 * expected)
    assert set(found.loss_dict) == {"mine"}
    model.loss_function = None
    assert model.loss_function is model.criterion
    model.loss_function = HalfLoss(model.criterion)
    torch.testing.assert_close(model(*batch, labels).loss, expected / 2)
