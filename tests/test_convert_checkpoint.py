"""Reading files of the original release: containers, settings, refusals. That the numbers agree is shown in parity/."""

import argparse
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from convert_checkpoint import ConversionError, build_config, convert, load_checkpoint
from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from key_mapping import find_rule, output_norms, renamed

SCRIPT = Path(__file__).parents[1] / "convert_scripts" / "convert_checkpoint.py"
WIDTH, FFN, CLASSES, QUERIES, LAYERS = 64, 48, 6, 7, 2
WIDTHS = {"resnet": [32, 48, 64, 80], "swin": [24, 48, 96, 192], "convnext": [16, 24, 32, 40]}


def linear(name, outputs, inputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def resnet_shapes(widths):
    def batch_norm(name, width):
        return norm(name, width) | {f"{name}.running_mean": (width,), f"{name}.running_var": (width,)}

    shapes, width = {"conv1.weight": (64, 3, 7, 7)} | batch_norm("bn1", 64), 64
    for stage, out in enumerate(widths, start=1):
        for block in range(2 if stage == 1 else 1):
            name, inner = f"layer{stage}.{block}", out // 4
            for part, (outputs, inputs, size) in enumerate([(inner, width, 1), (inner, inner, 3), (out, inner, 1)], 1):
                shapes[f"{name}.conv{part}.weight"] = (outputs, inputs, size, size)
                shapes |= batch_norm(f"{name}.bn{part}", outputs)
            if block == 0:
                shapes[f"{name}.downsample.0.weight"] = (out, width, 1, 1)
                shapes |= batch_norm(f"{name}.downsample.1", out)
            width = out
    return {f"body.{name}": shape for name, shape in shapes.items()}


def swin_shapes(widths, window=3):
    shapes = {"patch_embed.proj.weight": (widths[0], 3, 4, 4), "patch_embed.proj.bias": (widths[0],)}
    shapes |= norm("patch_embed.norm", widths[0])
    for stage, width in enumerate(widths):
        for block in range(2):
            name = f"layers.{stage}.blocks.{block}"
            shapes |= norm(f"{name}.norm1", width) | norm(f"{name}.norm2", width)
            shapes[f"{name}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, stage + 1)
            shapes[f"{name}.attn.relative_position_index"] = (window**2, window**2)
            shapes |= linear(f"{name}.attn.qkv", 3 * width, width) | linear(f"{name}.attn.proj", width, width)
            shapes |= linear(f"{name}.mlp.fc1", 4 * width, width) | linear(f"{name}.mlp.fc2", width, 4 * width)
        if stage < 3:
            shapes[f"layers.{stage}.downsample.reduction.weight"] = (2 * width, 4 * width)
            shapes |= norm(f"layers.{stage}.downsample.norm", 4 * width)
    return shapes | {key: shape for i in (1, 2, 3) for key, shape in norm(f"norm{i}", widths[i]).items()}


def convnext_shapes(widths):
    shapes, width = {}, 3
    for stage, out in enumerate(widths):
        if stage == 0:
            shapes |= {"downsample_layers.0.0.weight": (out, 3, 4, 4), "downsample_layers.0.0.bias": (out,)}
            shapes |= norm("downsample_layers.0.1", out)
        else:
            shapes |= norm(f"downsample_layers.{stage}.0", width)
            shapes |= {f"downsample_layers.{stage}.1.weight": (out, width, 2, 2)}
            shapes |= {f"downsample_layers.{stage}.1.bias": (out,)}
        for block in range(2 if stage == 1 else 1):
            name = f"stages.{stage}.{block}"
            shapes |= {f"{name}.dwconv.weight": (out, 1, 7, 7), f"{name}.dwconv.bias": (out,), f"{name}.gamma": (out,)}
            shapes |= norm(f"{name}.norm", out)
            shapes |= linear(f"{name}.pwconv1", 4 * out, out) | linear(f"{name}.pwconv2", out, 4 * out)
        shapes |= norm(f"norm{stage}", out)  # also of the stage that is not used
        width = out
    return shapes


def original_tensors(backbone="resnet"):
    """A small model under the names of the release, random."""
    widths = WIDTHS[backbone]
    shapes = {"transformer.level_embed": (4, WIDTH), "label_enc.weight": (CLASSES + 1, WIDTH)}
    shapes["transformer.tgt_embed.weight"] = (QUERIES, WIDTH)
    shapes |= linear("transformer.enc_output", WIDTH, WIDTH) | norm("transformer.enc_output_norm", WIDTH)
    shapes |= linear("transformer.enc_out_class_embed", CLASSES, WIDTH) | norm("transformer.decoder.norm", WIDTH)
    shapes |= linear("transformer.decoder.ref_point_head.layers.0", WIDTH, 2 * WIDTH)
    shapes |= linear("transformer.decoder.ref_point_head.layers.1", WIDTH, WIDTH)
    for part in range(3):
        shapes |= linear(f"transformer.enc_out_bbox_embed.layers.{part}", 4 if part == 2 else WIDTH, WIDTH)
        shapes |= linear(f"bbox_embed.0.layers.{part}", 4 if part == 2 else WIDTH, WIDTH)
    shapes |= linear("class_embed.0", CLASSES, WIDTH)
    for side, attention, points in (("encoder", "self_attn", 2), ("decoder", "cross_attn", 3)):
        for layer in range(LAYERS):
            name = f"transformer.{side}.layers.{layer}"
            shapes |= linear(f"{name}.linear1", FFN, WIDTH) | linear(f"{name}.linear2", WIDTH, FFN)
            for part in range(2 if side == "encoder" else 3):
                shapes |= norm(f"{name}.norm{part + 1}", WIDTH)
            shapes |= linear(f"{name}.{attention}.sampling_offsets", 4 * 4 * points * 2, WIDTH)
            shapes |= linear(f"{name}.{attention}.attention_weights", 4 * 4 * points, WIDTH)
            shapes |= linear(f"{name}.{attention}.value_proj", WIDTH, WIDTH)
            shapes |= linear(f"{name}.{attention}.output_proj", WIDTH, WIDTH)
            if side == "decoder":
                shapes |= {f"{name}.self_attn.in_proj_weight": (3 * WIDTH, WIDTH)}
                shapes |= {f"{name}.self_attn.in_proj_bias": (3 * WIDTH,)}
                shapes |= linear(f"{name}.self_attn.out_proj", WIDTH, WIDTH)
    for level in range(4):
        inputs, size = (widths[level + 1], 1) if level < 3 else (widths[3], 3)
        shapes |= {f"input_proj.{level}.0.weight": (WIDTH, inputs, size, size), f"input_proj.{level}.0.bias": (WIDTH,)}
        shapes |= norm(f"input_proj.{level}.1", WIDTH)
    own = {"resnet": resnet_shapes, "swin": swin_shapes, "convnext": convnext_shapes}[backbone](widths)
    shapes |= {f"backbone.0.{name}": shape for name, shape in own.items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) / 8 for name, shape in shapes.items()}
    tensors |= {key: value.abs() + 0.5 for key, value in tensors.items() if key.endswith("running_var")}
    for key in [key for key in tensors if key.startswith(("class_embed.0", "bbox_embed.0"))]:
        for layer in range(LAYERS):
            copy = key.replace("embed.0", f"embed.{layer}", 1)
            tensors[copy] = tensors[f"transformer.decoder.{copy}"] = tensors[key]
    return tensors


def settings(**changes):
    values = {"pe_temperatureH": 20, "pe_temperatureW": 20, "nheads": 4, "enc_n_points": 2, "dec_n_points": 3}
    return argparse.Namespace(**values | {"dn_number": 100, "dn_box_noise_scale": 1.0} | changes)


@pytest.fixture
def save(tmp_path):
    def write(content, name="checkpoint.pth"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return write


@pytest.mark.parametrize("backbone", ["resnet", "swin", "convnext"])
def test_a_checkpoint_becomes_a_folder_that_loads_and_detects(backbone, save, tmp_path):
    tensors = original_tensors(backbone)
    convert(save({"model": tensors, "args": settings()}), tmp_path / "out")
    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "out").eval()
    assert isinstance(model, DinoDetrForObjectDetection)
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path / "out"), DinoDetrImageProcessor)
    config = model.config
    assert (config.num_queries, config.num_labels, config.d_model) == (QUERIES, CLASSES, WIDTH)
    assert (config.encoder_n_points, config.decoder_n_points, config.num_feature_levels) == (2, 3, 4)
    assert config.backbone_config.model_type == backbone
    with torch.no_grad():
        logits = model(torch.randn(2, 3, 96, 128)).logits
    assert logits.shape == (2, QUERIES, CLASSES)
    assert logits.isfinite().all()
    # every kept tensor arrived: the fused projection, cut in three, is the last that could go astray
    fused = tensors["transformer.decoder.layers.1.self_attn.in_proj_weight"]
    attention = model.model.decoder.layers[1].self_attn
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert torch.equal(torch.cat(parts), fused)
    assert torch.equal(
        model.model.decoder.layers[0].cross_attn_norm.weight, tensors["transformer.decoder.layers.0.norm1.weight"]
    )


def test_convnext_computes_what_its_original_names_mean(save, tmp_path):
    """There are no recordings for ConvNeXt: its arithmetic (arXiv:2201.03545, fig. 4) is written out here."""
    tensors = original_tensors("convnext")
    model = convert(save({"model": tensors, "args": settings()}), tmp_path / "out")
    weights = {
        key.removeprefix("backbone.0."): value for key, value in tensors.items() if key.startswith("backbone.0.")
    }

    def layer_norm(x, name):  # over channels; x is (B, C, h, w)
        parameters = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return F.layer_norm(x.movedim(1, -1), x.shape[1:2], *parameters, eps=1e-6).movedim(-1, 1)

    x = pixel_values = torch.randn(2, 3, 64, 96)
    maps = []
    for stage in range(4):
        first, second = (f"downsample_layers.{stage}.{part}" for part in (0, 1))
        if stage == 0:
            x = layer_norm(F.conv2d(x, weights[f"{first}.weight"], weights[f"{first}.bias"], stride=4), second)
        else:
            x = F.conv2d(layer_norm(x, first), weights[f"{second}.weight"], weights[f"{second}.bias"], stride=2)
        for block in range(2 if stage == 1 else 1):
            name = f"stages.{stage}.{block}"
            y = F.conv2d(
                x, weights[f"{name}.dwconv.weight"], weights[f"{name}.dwconv.bias"], padding=3, groups=x.shape[1]
            )
            y = layer_norm(y, f"{name}.norm").movedim(1, -1)
            y = F.gelu(F.linear(y, weights[f"{name}.pwconv1.weight"], weights[f"{name}.pwconv1.bias"]))
            y = F.linear(y, weights[f"{name}.pwconv2.weight"], weights[f"{name}.pwconv2.bias"])
            x = x + (weights[f"{name}.gamma"] * y).movedim(-1, 1)
        maps.append(layer_norm(x, f"norm{stage}"))
    with torch.no_grad():
        features = model.model.backbone.model(pixel_values).feature_maps
    for ours, theirs in zip(features, maps[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # float32, sums of up to 160 terms


def test_averaged_weights_on_request(save, tmp_path):
    tensors = original_tensors()
    averaged = {key: tensor + 1 for key, tensor in tensors.items()}
    path = save({"model": tensors, "ema_model": averaged, "args": settings()})
    raw, ema = (convert(path, tmp_path / str(flag), ema=flag) for flag in (False, True))
    torch.testing.assert_close(ema.model.decoder.norm.weight, raw.model.decoder.norm.weight + 1)


def test_bare_tensors_and_the_prefix_of_distributed_training(save):
    tensors = original_tensors()
    bare, no_settings = load_checkpoint(save({f"module.{key}": value for key, value in tensors.items()}))
    assert set(bare) == set(tensors)
    assert no_settings == {}


def test_separate_heads_are_recognised(save, tmp_path):
    tensors = original_tensors()
    for prefix in ("", "transformer.decoder."):
        tensors[f"{prefix}class_embed.1.weight"] = tensors["class_embed.0.weight"] + 1
    model = convert(save({"model": tensors, "args": settings()}), tmp_path / "out")
    assert not model.config.share_decoder_heads
    first, second = (head.class_head.weight for head in model.model.decoder.heads)
    torch.testing.assert_close(second, first + 1)


def test_settings_of_training_reach_the_config():
    changes = {"pe_temperatureH": 10000, "pe_temperatureW": 10000, "dn_number": 300, "cls_loss_coef": 2.0}
    config = build_config(original_tensors(), vars(settings(**changes, dn_box_noise_scale=0.4, focal_alpha=0.3)))
    assert (config.position_temperature, config.num_denoising, config.box_noise_scale) == (10000, 300, 0.4)
    assert (config.cls_loss_coefficient, config.focal_alpha) == (2.0, 0.3)


def test_training_without_denoising_gives_a_model_without(save, tmp_path):
    model = convert(save({"model": original_tensors(), "args": settings(use_dn=False)}), tmp_path / "out")
    assert model.model.denoising is None


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("where", ["model", "args", "whole"])
def test_a_malicious_file_is_refused_and_runs_nothing(where, save, tmp_path):
    evil = Malicious(tmp_path / "ran")
    content = {"model": original_tensors(), "args": settings()}
    if where == "args":
        content["args"].extra = evil
    elif where == "model":
        content["model"]["label_enc.weight"] = evil
    path = save(evil if where == "whole" else content)
    with pytest.raises(ConversionError, match="nothing in it was run"):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()
    # the same file does its harm when it is loaded carelessly: the test is not blind
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"conv1.weight": torch.zeros(2, 3)}}, "not a DINO checkpoint of the original release"),
        ([torch.zeros(2, 3)], "holds a list"),
        ({"model": {}, "args": None}, "not a DINO checkpoint"),
        ({}, "holds nothing"),
        ({"model": None}, "a NoneType under 'model'"),
        ({"model": {}, "args": [1]}, "a list under 'args'"),
        ({"model": {"transformer.level_embed": torch.zeros(4)}}, "lacks .*tgt_embed"),
    ],
)
def test_other_files_are_refused_with_the_reason(content, message, save, tmp_path):
    with pytest.raises(ConversionError, match=message):
        convert(save(content), tmp_path / "out")


@pytest.mark.parametrize(
    ("junk", "message"),
    [
        (b"", "is truncated or damaged"),
        (b"no checkpoint", "was refused, .* it is not a PyTorch checkpoint"),
        (pickle.dumps({"model": 1}, protocol=2)[:-3], "is truncated or damaged"),
    ],
)
def test_files_that_are_not_checkpoints_are_refused(junk, message, tmp_path):
    (tmp_path / "junk.pth").write_bytes(junk)
    with pytest.raises(ConversionError, match=message):
        load_checkpoint(tmp_path / "junk.pth")


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("share", [0.1, 0.6, 0.99])
def test_a_download_that_broke_off_is_called_so(new_format, share, tmp_path):
    path = tmp_path / "checkpoint.pth"
    content = {"model": {key: torch.ones(9, 9) for key in original_tensors()}, "args": settings()}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ConversionError, match=r"checkpoint\.pth is truncated or damaged .* Download it again"):
        load_checkpoint(path)


@pytest.mark.parametrize("container", ["model", "ema_model", None])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], "'transformer.decoder.norm.bias' is a list, where only tensors belong"),
        (torch.tensor([1.0, torch.nan]), "'transformer.decoder.norm.bias' has values that are NaN or infinite"),
        (torch.tensor([1.0, -torch.inf]), "'transformer.decoder.norm.bias' has values that are NaN or infinite"),
    ],
)
def test_entries_that_are_no_weights_stop_the_conversion(container, value, message, save):
    tensors = original_tensors() | {"transformer.decoder.norm.bias": value}
    content = {container: tensors} if container else tensors
    with pytest.raises(ConversionError, match=message):
        load_checkpoint(save(content | {"args": settings()}), ema=container == "ema_model")


def test_without_settings_other_sampling_points_than_the_release_has_are_refused(save, tmp_path, capsys):
    with pytest.raises(
        ConversionError, match=r"8 heads of 4 sampling points per level are assumed, 32 in all, but .* has 8;"
    ):
        convert(save(original_tensors()), tmp_path / "out")
    tensors = original_tensors()
    for side, attention, samples in (("encoder", "self_attn", 2), ("decoder", "cross_attn", 3)):
        for layer in range(LAYERS):
            for name, factor in (("sampling_offsets", 2), ("attention_weights", 1)):
                for kind in ("weight", "bias"):
                    key = f"transformer.{side}.layers.{layer}.{attention}.{name}.{kind}"
                    assert len(tensors[key]) == 4 * 4 * samples * factor
                    tensors[key] = torch.zeros(4 * 32 * factor, *tensors[key].shape[1:])
    model = convert(save(tensors), tmp_path / "out")
    assert (model.config.encoder_attention_heads, model.config.decoder_n_points) == (8, 4)
    assert "heads, sampling points, temperature and noise are taken to be the release's" in capsys.readouterr().out


def test_settings_that_dino_hf_cannot_express_are_refused(save, tmp_path):
    path = save({"model": original_tensors(), "args": settings(two_stage_type="no")})
    with pytest.raises(ConversionError, match="two_stage_type='no'"):
        convert(path, tmp_path / "out")


def test_unknown_tensors_stop_the_conversion(save, tmp_path):
    tensors = original_tensors() | {"transformer.new_invention.weight": torch.zeros(3)}
    with pytest.raises(KeyError, match="new_invention"):
        convert(save({"model": tensors, "args": settings()}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_tensors_stop_the_conversion(save, tmp_path):
    tensors = original_tensors()
    del tensors["transformer.enc_output.bias"]
    with pytest.raises(ConversionError, match=r"memory_proj\.bias"):
        convert(save({"model": tensors, "args": settings()}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "checkpoint.pth"]


def test_copies_that_differ_stop_the_conversion(save, tmp_path):
    tensors = original_tensors()
    tensors["transformer.decoder.class_embed.1.bias"] = tensors["class_embed.1.bias"] + 1
    with pytest.raises(ConversionError, match="should be one tensor"):
        convert(save({"model": tensors, "args": settings()}), tmp_path / "out")


def test_a_folder_with_something_in_it_is_left_alone(save, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ConversionError, match="not an empty folder"):
        convert(save({"model": original_tensors(), "args": settings()}), tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("folder", [".", "checkpoint.pth/below", "/proc/nowhere/out"])
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(folder, save, tmp_path, monkeypatch):
    path = save({"model": original_tensors(), "args": settings()})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConversionError, match="choose another --output-dir"):
        convert(path, Path(folder))
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_every_rule_table_is_unambiguous():
    norms = output_norms([1, 2, 3])
    assert renamed("backbone.0.norm3.weight", find_rule("backbone.0.norm3.weight", norms)) == (
        "model.backbone.model.hidden_states_norms.stage4.weight",
    )
    assert renamed("backbone.0.norm0.weight", find_rule("backbone.0.norm0.weight", norms)) == ()
    with pytest.raises(KeyError, match="exactly one rule"):
        find_rule("backbone.0.norm0.weight", norms + norms)


def test_the_command_writes_a_folder_and_reports_errors_in_one_line(save, tmp_path):
    def run(*arguments):
        return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, cwd=tmp_path)

    path = save({"model": original_tensors(), "args": settings()})
    done = run("--checkpoint", path, "--output-dir", "new/out")
    assert done.returncode == 0, done.stderr
    assert f"written to {tmp_path / 'new' / 'out'}" in done.stdout
    assert (tmp_path / "new" / "out" / "model.safetensors").is_file()
    failed = run("--checkpoint", "nowhere.pth", "--output-dir", "other")
    assert failed.returncode == 1
    assert failed.stderr.strip() == "error: There is no file nowhere.pth."
