"""Converting files of other projects: containers, settings, refusals, the way back. That the numbers agree is shown in parity/."""

import hashlib
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from dino_hf import DinoDetrConfig, DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.conversion.architecture import build_config
from dino_hf.conversion.backbones import output_norms
from dino_hf.conversion.checkpoint_files import load_checkpoint
from dino_hf.conversion.class_names import read_label_names
from dino_hf.conversion.convert_back import convert_back
from dino_hf.conversion.convert_checkpoint import convert, main
from dino_hf.conversion.errors import ConversionError
from dino_hf.conversion.projects.mmdet import merging_from_unfold, merging_to_unfold
from dino_hf.conversion.projects.registry import PROJECTS
from dino_hf.conversion.rules import Rule, renamed, translate, translate_back
from dino_hf.conversion.verify_conversion import main as compare_command
from dino_hf.conversion.verify_conversion import verify
from helpers import tiny_config
from toy_checkpoints import CLASSES, LAYERS, QUERIES, WIDTH, original_tensors, settings

SCRIPT = Path(__file__).parents[1] / "convert_scripts" / "convert_checkpoint.py"


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


def test_averaged_weights_on_request(save, tmp_path):
    tensors = original_tensors()
    averaged = {key: tensor + 1 for key, tensor in tensors.items()}
    path = save({"model": tensors, "ema_model": averaged, "args": settings()})
    raw, ema = (convert(path, tmp_path / str(flag), ema=flag) for flag in (False, True))
    torch.testing.assert_close(ema.model.decoder.norm.weight, raw.model.decoder.norm.weight + 1)


def test_bare_tensors_and_the_prefix_of_distributed_training(save):
    tensors = original_tensors()
    bare = load_checkpoint(save({f"module.{key}": value for key, value in tensors.items()}))
    assert set(bare.tensors) == set(tensors)
    assert bare.settings == {}
    with pytest.raises(ConversionError, match=r"both with and without the prefix 'module\.'"):
        load_checkpoint(save({"model": tensors | {"module.label_enc.weight": torch.zeros(2, 3)}}))


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
    told = vars(settings(**changes, dn_box_noise_scale=0.4, focal_alpha=0.3))
    project = PROJECTS["original"]
    config, assumed = build_config(original_tensors(), project, project.fields_from_settings(told), {})
    assert assumed == {"num_frozen_backbone_stages": 2}
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
        ({"model": {"conv1.weight": torch.zeros(2, 3)}}, "not a DINO of original: it has no tensor"),
        ([torch.zeros(2, 3)], "holds a list"),
        ({"model": {}, "args": None}, "not a DINO of original"),
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


def test_heads_that_the_file_does_not_tell_are_eight_or_must_be_told(save, tmp_path, capsys):
    path = save(original_tensors())
    with pytest.raises(
        ConversionError, match=r"has 8 sampling points .* 8 heads with 4 points .*--set encoder_attention_heads"
    ):
        convert(path, tmp_path / "out")
    told = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    model = convert(path, tmp_path / "out", chosen=told)
    assert (model.config.encoder_n_points, model.config.decoder_n_points) == (2, 3)
    assert "encoder_attention_heads" not in capsys.readouterr().out.split("not in the file")[1]
    with pytest.raises(ConversionError, match="but 5 heads with"):
        convert(path, tmp_path / "other", chosen={"encoder_attention_heads": 5})


def test_settings_that_dino_hf_cannot_express_are_refused(save, tmp_path):
    path = save({"model": original_tensors(), "args": settings(two_stage_type="no")})
    with pytest.raises(ConversionError, match="two_stage_type='no'"):
        convert(path, tmp_path / "out")


def test_unknown_tensors_stop_the_conversion(save, tmp_path):
    tensors = original_tensors() | {"transformer.new_invention.weight": torch.zeros(3)}
    with pytest.raises(
        ConversionError, match=r"has the tensor 'transformer\.new_invention\.weight' .* it is a variant"
    ):
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
    with pytest.raises(ConversionError, match="is not empty; choose another output, or --force"):
        convert(save({"model": original_tensors(), "args": settings()}), tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("folder", [".", "checkpoint.pth/below", "/proc/nowhere/out"])
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(folder, save, tmp_path, monkeypatch):
    path = save({"model": original_tensors(), "args": settings()})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConversionError, match="choose another output"):
        convert(path, Path(folder))
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_a_name_meets_exactly_one_rule():
    norms = output_norms([1, 2, 3])
    assert renamed("backbone.0.norm3.weight", norms) == ("model.backbone.model.hidden_states_norms.stage4.weight",)
    assert renamed("backbone.0.norm0.weight", norms) == ()
    with pytest.raises(KeyError, match="exactly one rule"):
        renamed("backbone.0.norm0.weight", norms + norms)
    with pytest.raises(KeyError, match="exactly one rule"):
        renamed("backbone.0.norm7.weight", norms)


def test_the_way_back_needs_all_parts():
    rules = [Rule("whole.{p}", ("one.{p}", "two.{p}"))]
    state, _ = translate([("whole.weight", torch.arange(6.0).reshape(6, 1))], rules)
    assert [len(part) for part in state.values()] == [3, 3]
    assert torch.equal(translate_back(state, rules)["whole.weight"], torch.arange(6.0).reshape(6, 1))
    with pytest.raises(KeyError, match=r"parts are missing of \['whole.weight'\]"):
        translate_back({"one.weight": state["one.weight"]}, rules)


def test_the_command_writes_a_folder_and_reports_errors_in_one_line(save, tmp_path):
    def run(*arguments):
        return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, cwd=tmp_path)

    path = save({"model": original_tensors(), "args": settings()})
    done = run("--checkpoint", path, "--output", "new/out")
    assert done.returncode == 0, done.stderr
    assert "written to new/out" in done.stdout
    assert (tmp_path / "new" / "out" / "model.safetensors").is_file()
    failed = run("--checkpoint", "nowhere.pth", "--output", "other")
    assert failed.returncode == 1
    assert failed.stderr.strip() == "error: There is no file nowhere.pth."


# ---------------------------------------------------------------------------------------------------------------------
# The other projects, from a toy of the release through the way back, whose names parity/ holds to real files


@pytest.fixture
def of_project(save, tmp_path):
    """Writes a toy checkpoint of a project, its heads all different where it has one for each layer."""

    def write(project, backbone="resnet", **changes):
        tensors = original_tensors(backbone)
        if project != "original":
            generator = torch.Generator().manual_seed(3)
            for layer in range(LAYERS):
                for name in [
                    name for name in tensors if name.startswith((f"class_embed.{layer}.", f"bbox_embed.{layer}."))
                ]:
                    tensors[name] = torch.randn(tensors[name].shape, generator=generator)
                    tensors[f"transformer.decoder.{name}"] = tensors[name]
            tensors |= {
                name: 0 * tensor for name, tensor in tensors.items() if re.match(r"input_proj\.\d\.0\.bias", name)
            }
        tensors |= changes
        convert(save({"model": tensors, "args": settings()}, "start.pth"), tmp_path / "start")
        convert_back(tmp_path / "start", project, tmp_path / f"{project}.pth")
        return tmp_path / f"{project}.pth"

    return write


HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}


@pytest.mark.parametrize(
    ("project", "backbone"),
    [("detrex", "resnet"), ("detrex", "swin"), ("detrex", "convnext"), ("mmdet", "resnet"), ("mmdet", "swin")],
)
def test_a_round_trip_through_another_project_keeps_every_tensor(project, backbone, of_project, tmp_path):
    path = of_project(project, backbone)
    first = convert(path, tmp_path / "first", chosen=HEADS, assume_positions=True)
    convert_back(tmp_path / "first", project, tmp_path / "again.pth")
    one, two = (load_checkpoint(file).tensors for file in (path, tmp_path / "again.pth"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not first.config.share_decoder_heads
    assert first.config.num_extra_label_embeddings == 0
    start = DinoDetrForObjectDetection.from_pretrained(tmp_path / "start").state_dict()
    for name, tensor in first.state_dict().items():
        expected = start[name][:CLASSES] if "label_embedding" in name else start[name]
        assert torch.equal(tensor, expected), name


def test_what_the_projects_publish_differently_is_in_the_config(of_project, tmp_path, capsys):
    detrex = convert(of_project("detrex"), tmp_path / "detrex", chosen=HEADS, assume_positions=True).config
    assert (detrex.position_temperature, detrex.position_offset, detrex.pred_boxes_eps) == (10000, -0.5, 1e-3)
    assert (detrex.num_frozen_backbone_stages, detrex.projection_bias) == (1, True)
    said = capsys.readouterr().out.split("not in the file, set to the defaults of detrex")[1]
    assert "position_temperature=10000.0, position_offset=-0.5" in said
    assert "image size=800 to 1333" in said


def test_the_command_asks_for_the_positions_of_a_file_of_detrex(of_project, tmp_path, capsys):
    arguments = ["--checkpoint", str(of_project("detrex")), "--output", str(tmp_path / "out")]
    arguments += [part for name in HEADS for part in ("--set", f"{name}=4")]
    for more in ([], ["--set", "position_offset=0"]):
        with pytest.raises(SystemExit, match="does not contain its position settings"):
            main([*arguments, *more])
    assert not (tmp_path / "out").exists()
    main([*arguments, "--set", "position_temperature=20", "--set", "position_offset=0"])
    config = DinoDetrForObjectDetection.from_pretrained(tmp_path / "out").config
    assert (config.position_temperature, config.position_offset) == (20, 0)


def test_mmdetections_configuration_is_read_from_the_file(of_project, tmp_path):
    content = torch.load(of_project("mmdet"), weights_only=False)
    content["meta"]["cfg"] = """
model = dict(
    type='DINO', num_queries=7, with_box_refine=True, as_two_stage=True,
    positional_encoding=dict(num_feats=32, normalize=True, offset=-0.5, temperature=10000),
    encoder=dict(layer_cfg=dict(self_attn_cfg=dict(num_heads=4, num_points=2))),
    decoder=dict(layer_cfg=dict(cross_attn_cfg=dict(num_heads=4, num_points=3))),
    backbone=dict(type='ResNet', frozen_stages=-1),
    bbox_head=dict(loss_cls=dict(type='FocalLoss', gamma=2.0, alpha=0.3, loss_weight=2.0), loss_iou=dict(loss_weight=3.0)),
    dn_cfg=dict(label_noise_scale=0.4, box_noise_scale=0.7, group_cfg=dict(dynamic=True, num_dn_queries=300)),
    train_cfg=dict(assigner=dict(match_costs=[dict(type='FocalLossCost', weight=1.5), dict(type='IoUCost', weight=4.0)])))
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(1000, 640), keep_ratio=True)]
"""
    content["meta"]["dataset_meta"] = {"classes": ("a", "b", "c", "d", "e", "f")}
    torch.save(content, tmp_path / "told.pth")
    config = convert(tmp_path / "told.pth", tmp_path / "out").config
    assert (config.position_temperature, config.position_offset, config.pred_boxes_eps) == (10000, -0.5, 1e-5)
    assert (config.encoder_n_points, config.decoder_n_points, config.num_frozen_backbone_stages) == (2, 3, 0)
    assert (config.cls_loss_coefficient, config.giou_loss_coefficient, config.focal_alpha) == (2.0, 3.0, 0.3)
    assert (config.label_noise_ratio, config.box_noise_scale, config.num_denoising) == (0.4, 0.7, 300)
    assert (config.class_cost, config.bbox_cost, config.giou_cost) == (1.5, 5.0, 4.0)
    assert not config.projection_bias
    assert config.id2label == dict(enumerate("abcdef"))
    assert config.category_ids is None
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").size == {"shortest_edge": 640, "longest_edge": 1000}
    assert config.provenance["converted_from"]["assumed"] == {}

    content["meta"]["cfg"] = content["meta"]["cfg"].replace("as_two_stage=True", "as_two_stage=False")
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ConversionError, match="trained with as_two_stage=False"):
        convert(tmp_path / "other.pth", tmp_path / "other")


def test_a_file_of_another_project_than_named_is_refused(of_project, tmp_path):
    with pytest.raises(
        ConversionError, match=r"not a DINO of mmdet.*It belongs to detrex: use --source detrex, or auto"
    ):
        convert(of_project("detrex"), tmp_path / "out", source="mmdet")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.query_selection.content.weight"], "It is a dino_hf model already"),
        (["backbone.cls_token"], "self-supervised DINO, which is another model"),
        (["roi_heads.box_predictor.weight"], "Detectors of other kinds cannot be converted"),
    ],
)
def test_other_models_are_told_apart(names, message, save, tmp_path):
    with pytest.raises(ConversionError, match=message):
        convert(save({name: torch.zeros(2, 3) for name in names}), tmp_path / "out")


def test_the_patch_merging_of_mmdetection_is_put_in_order():
    """One 2x2 patch of 3 channels: what unfold makes of it, and what the release does."""
    patch = torch.arange(12.0).reshape(1, 3, 2, 2)
    unfolded = F.unfold(patch, 2)[0, :, 0]
    release = torch.cat([patch[0, :, row, column] for column in (0, 1) for row in (0, 1)])
    assert torch.equal(merging_from_unfold(unfolded), release)
    assert torch.equal(merging_to_unfold(release), unfolded)


def test_a_file_that_has_each_tensor_once_is_enough(save, tmp_path):
    """Formats that cannot save one tensor under two names keep the first, by the alphabet."""
    tensors = original_tensors()
    for name in [name for name in tensors if name.startswith(("class_embed.", "bbox_embed."))]:
        del tensors[name]
    model = convert(save({"model": tensors, "args": settings()}), tmp_path / "out")
    kept = tensors["transformer.decoder.class_embed.0.weight"]
    assert torch.equal(model.model.decoder.heads[0].class_head.weight, kept)
    assert model.config.share_decoder_heads


def test_half_precision_stays_half(save, tmp_path):
    tensors = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in original_tensors().items()
    }
    model = convert(save({"model": tensors, "args": settings()}), tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    convert_back(tmp_path / "out", "original", tmp_path / "back.pth")
    back = load_checkpoint(tmp_path / "back.pth").tensors
    assert all(torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_more_label_rows_than_classes_are_kept(save, tmp_path):
    """Who fine-tuned the release for few classes often left its label book at 91."""
    tensors = original_tensors() | {"label_enc.weight": torch.randn(92, WIDTH)}
    model = convert(save({"model": tensors, "args": settings()}), tmp_path / "out")
    assert model.config.num_extra_label_embeddings == 92 - CLASSES
    convert_back(tmp_path / "out", "original", tmp_path / "back.pth")
    assert torch.equal(load_checkpoint(tmp_path / "back.pth").tensors["label_enc.weight"], tensors["label_enc.weight"])
    assert torch.load(tmp_path / "back.pth", weights_only=False)["args"].dn_labelbook_size == 91


def test_fewer_label_rows_than_classes_are_filled_up(save, tmp_path, capsys):
    """The label book is used in training only; rows that the file lacks are the mean of the others."""
    rows = torch.randn(5, WIDTH)
    path = save({"model": original_tensors() | {"label_enc.weight": rows}, "args": settings()})
    model = convert(path, tmp_path / "few")
    embedding = model.model.denoising.label_embedding.weight
    assert torch.equal(embedding[:5], rows)
    assert torch.equal(embedding[5:], rows.mean(0, keepdim=True).expand(CLASSES - 5, -1))
    assert "1 rows fewer than classes" in capsys.readouterr().out
    assert verify(path, tmp_path / "few")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("transformer.tgt_embed.weight", (50_000, 1)),
        ("transformer.encoder.layers.0.linear1.weight", (10_000_000, 1)),
        ("class_embed.0.weight", (90_000, 1)),
        ("backbone.0.body.conv1.weight", (10_000_000, 1, 1, 1)),
    ],
)
def test_sizes_that_a_made_up_file_claims_take_no_memory(name, shape, save, tmp_path):
    path = save({"model": original_tensors() | {name: torch.zeros(shape, dtype=torch.float16)}, "args": settings()})
    with pytest.raises(ConversionError):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_numbers_of_parts_have_bounds(save, tmp_path):
    queries = {"transformer.tgt_embed.weight": torch.zeros(100_001, WIDTH, dtype=torch.float16)}
    with pytest.raises(ConversionError, match="num_queries=100,001; at most 100,000 are converted"):
        convert(save({"model": original_tensors() | queries, "args": settings()}), tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------------
# The way back


def test_the_args_of_the_way_back_give_the_same_config_again(save, tmp_path):
    one = convert(
        save({"model": original_tensors(), "args": settings(dn_number=70, cls_loss_coef=3.0)}), tmp_path / "one"
    )
    convert_back(tmp_path / "one", "original", tmp_path / "back.pth")
    two = convert(tmp_path / "back.pth", tmp_path / "two")
    silent = {"provenance"}
    ours, theirs = ({k: v for k, v in model.config.to_dict().items() if k not in silent} for model in (one, two))
    assert ours == theirs


def test_a_shared_head_is_written_for_every_layer(save, tmp_path):
    convert(save({"model": original_tensors(), "args": settings()}), tmp_path / "one")
    convert_back(tmp_path / "one", "detrex", tmp_path / "detrex.pth")
    tensors = load_checkpoint(tmp_path / "detrex.pth").tensors
    heads = [tensors[f"class_embed.{layer}.weight"] for layer in range(LAYERS + 1)]
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[LAYERS], original_tensors()["transformer.enc_out_class_embed.weight"])


def test_what_another_project_cannot_compute_is_refused(save, of_project, tmp_path):
    convert(save({"model": original_tensors("convnext"), "args": settings()}), tmp_path / "convnext")
    with pytest.raises(ConversionError, match="backbone is a 'convnext'; for mmdet, resnet or swin"):
        convert_back(tmp_path / "convnext", "mmdet", tmp_path / "a.pth")
    convert(save({"model": original_tensors(), "args": settings()}), tmp_path / "biased")
    with pytest.raises(ConversionError, match=r"have a bias \(up to .*which the neck of mmdetection does not"):
        convert_back(tmp_path / "biased", "mmdet", tmp_path / "b.pth")
    convert(of_project("detrex"), tmp_path / "detrex", chosen=HEADS, assume_positions=True)
    with pytest.raises(ConversionError, match=r"position_offset=-0.5, and the original release has no such setting"):
        convert_back(tmp_path / "detrex", "original", tmp_path / "c.pth")
    convert(save({"model": original_tensors(), "args": settings(use_dn=False)}), tmp_path / "without")
    with pytest.raises(ConversionError, match="without denoising"):
        convert_back(tmp_path / "without", "original", tmp_path / "d.pth")
    assert not list(tmp_path.glob("?.pth"))


@pytest.mark.parametrize(
    ("changes", "project", "message"),
    [
        ({"decoder_attention_heads": 8}, "original", "encoder_attention_heads=4 and decoder_attention_heads=8, but"),
        (
            {"decoder_ffn_dim": 20},
            "original",
            "encoder_ffn_dim=48 and decoder_ffn_dim=20, but the original release has one",
        ),
        ({"stages": ["stage1", "stage3", "stage4"]}, "detrex", "use the last ones, without a gap"),
        ({"hidden_act": "gelu"}, "detrex", r"The backbone has {'hidden_act': 'gelu'}, where the other projects have"),
        ({"num_feature_levels": 14}, "detrex", r"detrex has no name for the tensor 'input_proj\.11\.0\.weight'"),
    ],
)
def test_architectures_that_a_project_does_not_have_are_refused(changes, project, message, tmp_path):
    stages, act = changes.pop("stages", ["stage2", "stage3", "stage4"]), changes.pop("hidden_act", "relu")
    config = tiny_config(encoder_attention_heads=4, **{"decoder_attention_heads": 4} | changes)
    config.backbone_config.out_features, config.backbone_config.hidden_act = stages, act
    DinoDetrForObjectDetection(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ConversionError, match=message):
        convert_back(tmp_path / "model", project, tmp_path / "a.pth")


def test_fewer_than_fifty_denoising_queries_mean_something_else_elsewhere(of_project, tmp_path):
    with pytest.raises(ConversionError, match=r"num_denoising=30 counts pairs of queries in detrex.*below 50"):
        convert(of_project("detrex"), tmp_path / "out", chosen=HEADS | {"num_denoising": 30})


def test_a_folder_that_is_no_model_cannot_go_back(tmp_path_factory):
    tmp_path, output = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("out") / "a.pth"
    with pytest.raises(ConversionError, match=r"it has no config\.json"):
        convert_back(tmp_path, "original", output)
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(ConversionError, match="model of type 'resnet'"):
        convert_back(tmp_path, "original", output)
    DinoDetrConfig().save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="cannot be loaded"):
        convert_back(tmp_path, "original", output)


# ---------------------------------------------------------------------------------------------------------------------
# Class names


@pytest.fixture
def names_of(tmp_path):
    def read(text, num_labels=3):
        (tmp_path / "names").write_text(text, encoding="utf-8")
        return read_label_names(tmp_path / "names", num_labels)

    return read


def test_names_one_per_line_or_in_json(names_of):
    expected = {0: "cat", 1: "red deer", 2: "Ökonom"}
    assert names_of("cat\nred deer\n\n Ökonom \n") == (expected, None)
    assert names_of("\ufeffcat\r\nred deer\r\nÖkonom") == (expected, None)
    assert names_of('["cat", "red deer", "Ökonom"]') == (expected, None)
    assert names_of('{"2": "Ökonom", "0": "cat", "1": "red deer"}') == (expected, None)


def test_names_and_ids_of_a_coco_json(names_of):
    categories = '{"categories": [{"id": 7, "name": "cat"}, {"id": 2, "name": "dog"}]}'
    assert names_of(categories, 2) == ({0: "dog", 1: "cat"}, [2, 7])  # outputs in the order of the ids
    names, ids = names_of(categories, 9)  # outputs are the ids themselves, as in the release
    assert ids == list(range(9))
    assert (names[2], names[7], names[0]) == ("dog", "cat", "N/A")
    with pytest.raises(ConversionError, match=r"names 2 classes \(indices \[2, 7\] to 7\), but the checkpoint has 3"):
        names_of(categories, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"id": 1, "name": "a"}, "b", "c"]', "which are not text"),
        ('["a", "b", "a"]', r"has the names \['a'\] more than once"),
        ('["a", null, "b"]', "which are not text"),
        ('"abc"', "is not a COCO json"),
        ('{"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}', "two categories with the same id"),
        ('{"categories": [{"id": 1.5, "name": "a"}]}', "is not a COCO json"),
        ("[" * 5000, "is not a COCO json|nested|names 1 classes"),
    ],
)
def test_names_of_an_odd_form_are_refused(text, message, names_of):
    with pytest.raises(ConversionError, match=message):
        names_of(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat\ndog", "names 2 classes"),
        ("5", "is not a COCO json"),
        ("", "names 0 classes"),
        ('{"a": "b"}', "is not a COCO json"),
    ],
)
def test_names_that_do_not_fit_are_refused(text, message, names_of):
    with pytest.raises(ConversionError, match=message):
        names_of(text)


def test_names_reach_the_config(save, tmp_path):
    (tmp_path / "coco.json").write_text(
        '{"categories": [' + ", ".join(f'{{"id": {10 * i}, "name": "thing {i}"}}' for i in range(CLASSES)) + "]}"
    )
    path = save({"model": original_tensors(), "args": settings()})
    config = convert(path, tmp_path / "out", label_names=tmp_path / "coco.json").config
    assert config.id2label[3] == "thing 3"
    assert config.category_ids == [0, 10, 20, 30, 40, 50]
    assert DinoDetrConfig.from_pretrained(tmp_path / "out").category_ids == config.category_ids
    with pytest.raises(ConversionError, match="cannot be read"):
        convert(path, tmp_path / "other", label_names=tmp_path / "nowhere.txt")
    assert not (tmp_path / "other").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The output folder


def test_force_replaces_a_model_and_nothing_else(save, tmp_path):
    path, out = save({"model": original_tensors(), "args": settings()}), tmp_path / "out"
    convert(path, out)
    (out / "config.json").write_text((out / "config.json").read_text().replace(f": {QUERIES}", ": 5"))
    with pytest.raises(ConversionError, match="is not empty; choose another output, or --force"):
        convert(path, out)
    convert(path, out, force=True)
    assert AutoModelForObjectDetection.from_pretrained(out).config.num_queries == QUERIES
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConversionError, match=r"holds \['notes.txt'\], which would be lost"):
        convert(path, out, force=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert {entry.name for entry in tmp_path.iterdir()} == {"checkpoint.pth", "out"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{}", "does not hold a model of dino_hf"),
        ("config.json", None, "does not hold a model of dino_hf"),
        ("README.md", "# My notes on this model", r"holds \['README.md'\]"),
        ("__init__.py", "", r"holds \['__init__.py'\]"),
        ("checkpoint-3/trainer_state.json", "{}", r"holds \['checkpoint-3'\]"),
    ],
)
def test_force_takes_no_folder_for_a_model_that_is_none_or_was_edited(name, content, message, save, tmp_path):
    path, out = save({"model": original_tensors(), "args": settings()}), tmp_path / "out"
    convert(path, out)
    if content is None:
        (out / name).unlink()
    else:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(content)
    before = {entry.name for entry in out.iterdir()}
    with pytest.raises(ConversionError, match=message):
        convert(path, out, force=True)
    assert {entry.name for entry in out.iterdir()} == before


def test_what_is_read_is_not_replaced(save, tmp_path):
    """The checkpoint, or the names, in the folder that --force would replace."""
    path, out = save({"model": original_tensors(), "args": settings()}), tmp_path / "out"
    convert(path, out)
    inside = path.rename(out / "model.safetensors")
    with pytest.raises(ConversionError, match=r"model\.safetensors lies in .*out and would be replaced"):
        convert(inside, out, force=True)
    assert load_checkpoint(inside).tensors.keys() == original_tensors().keys()
    convert(inside, tmp_path / "other")
    with pytest.raises(ConversionError, match=r"lies in .*other, the model that is read"):
        convert_back(tmp_path / "other", "original", tmp_path / "other" / "model.safetensors", force=True)


def test_being_stopped_between_two_renames_loses_nothing(save, tmp_path, monkeypatch):
    path, out = save({"model": original_tensors(), "args": settings()}), tmp_path / "out"
    convert(path, out)
    before = {entry.name: entry.read_bytes() for entry in out.iterdir()}
    rename, calls = Path.rename, []

    def stopped(self, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt):
        convert(path, out, force=True)
    assert {entry.name: entry.read_bytes() for entry in out.iterdir()} == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"checkpoint.pth", "out"}


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("transformer.tgt_embed.weight", torch.tensor(1.0)),
        ("label_enc.weight", torch.tensor(1.0)),
        ("input_proj.0.0.weight", torch.ones(5)),
        ("transformer.decoder.layers.0.self_attn.in_proj_weight", torch.tensor(1.0)),
        ("class_embed.0.weight", torch.zeros(0, WIDTH)),
        ("transformer.level_embed", torch.zeros(0, WIDTH)),
        ("transformer.encoder.layers.30000.norm1.weight", torch.ones(WIDTH)),
        ("transformer.encoder.layers.0.self_attn.value_proj.weight", torch.ones(3, 5)),
    ],
)
def test_tensors_of_odd_shapes_and_numbers_are_one_sentence(name, tensor, save, tmp_path):
    with pytest.raises(ConversionError) as stopped:
        convert(save({"model": original_tensors() | {name: tensor}, "args": settings()}), tmp_path / "out")
    assert len(str(stopped.value)) < 700
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("force", [False, True])
def test_links_are_not_followed(force, save, tmp_path):
    path = save({"model": original_tensors(), "args": settings()})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(ConversionError, match="is a symbolic link"):
        convert(path, tmp_path / "link", force=force)
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").symlink_to(tmp_path / "mine")
    with pytest.raises(ConversionError, match="does not hold a model" if force else "is not empty"):
        convert(path, tmp_path / "out", force=force)
    assert (tmp_path / "mine").read_text() == "mine"
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_crash_half_way_leaves_no_folder(save, tmp_path, monkeypatch):
    path = save({"model": original_tensors(), "args": settings()})
    convert(path, tmp_path / "old")
    before = {entry.name: entry.read_bytes() for entry in (tmp_path / "old").iterdir()}

    def fails(self, folder, *args, **kwargs):
        raise RuntimeError("power cut")

    monkeypatch.setattr(DinoDetrImageProcessor, "save_pretrained", fails)  # after the weights were written
    for folder, force in (("new", False), ("old", True)):
        with pytest.raises(RuntimeError, match="power cut"):
            convert(path, tmp_path / folder, force=force)
    assert {entry.name for entry in tmp_path.iterdir()} == {"checkpoint.pth", "old"}
    assert {entry.name: entry.read_bytes() for entry in (tmp_path / "old").iterdir()} == before


def test_the_card_and_the_record_say_where_the_weights_come_from(save, tmp_path):
    path = save({"model": original_tensors(), "args": settings()})
    record = convert(path, tmp_path / "out").config.provenance["converted_from"]
    assert (record["project"], record["file"]) == ("original", "checkpoint.pth")
    assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "published_ap" not in record
    card = (tmp_path / "out" / "README.md").read_text()
    assert "checkpoint.pth" in card
    assert 'model="out"' in card


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_the_command_converts_verifies_and_goes_back(of_project, tmp_path, capsys, monkeypatch):
    path = of_project("detrex", "swin")
    monkeypatch.chdir(tmp_path)
    told = ["--set", "encoder_attention_heads=4", "--set", "decoder_attention_heads=4", "--image-size", "96", "160"]
    told += ["--set", "position_temperature=10000", "--set", "position_offset=-0.5"]
    main(["--checkpoint", str(path), "--output", "out", *told, "--verify"])
    said = capsys.readouterr().out
    assert "tensors of out are bit for bit equal to the tensors of" in said
    assert "the two compute the same" in said
    assert "10 best detections in the drawn test picture, 640 x 480" in said
    assert AutoImageProcessor.from_pretrained("out").size == {"shortest_edge": 96, "longest_edge": 160}
    main(["--checkpoint", "out", "--to", "detrex", "--output", "detrex.pth", "--verify", "--force"])
    assert "the two compute the same" in capsys.readouterr().out
    main(["--checkpoint", "out", "--to", "mmdet", "--output", "back.pth"])
    said = capsys.readouterr().out
    assert "positional_encoding: normalize=True, temperature=10000, offset=-0.5" in said
    assert "decoder: 2 layers, 4 heads, 3 points, feed-forward 48" in said
    assert "bounds the inverse sigmoid of predicted boxes by 1e-05, this model by 0.001" in said
    assert load_checkpoint(Path("back.pth")).tensors["level_embed"].shape == (4, WIDTH)


@pytest.mark.parametrize("option", ["--ema", "--published=a", "--set=a=1", "--label-names=x", "--image-size=1 2"])
def test_options_of_the_other_direction_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        main(["--checkpoint", "a", "--output", "b.pth", "--to", "original", *option.split()])
    assert "have no effect when converting back" in capsys.readouterr().err or option.startswith("--image-size")


def test_a_processor_with_other_colours_is_told(save, tmp_path, capsys):
    path = save({"model": original_tensors(), "args": settings()})
    convert(path, tmp_path / "out")
    DinoDetrImageProcessor(image_mean=[0.0, 0.0, 0.0]).save_pretrained(tmp_path / "out")
    assert not verify(path, tmp_path / "out")
    assert "the image processor has {'image_mean': (0.0, 0.0, 0.0)}; the projects train with" in capsys.readouterr().out
    (tmp_path / "out" / "preprocessor_config.json").unlink()
    with pytest.raises(ConversionError, match="has no image processor that can be loaded"):
        verify(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "num_queries=9"], r"The tensors show \{'num_queries': 7\}; leave them out of --set"),
        (
            ["--set", "colour=red"],
            r"--set cannot set \['colour'\], only fields that no tensor shows: position_temperature",
        ),
        (["--set", "position_temperature=NaN"], "position_temperature=nan is not finite"),
        (["--set", "num_frozen_backbone_stages=9"], "num_frozen_backbone_stages=9, but .* has 5 with its stem"),
        (["--set", "position_temperature=-1"], "position_temperature=-1.* must be positive"),
        (["--set", "num_denoising=many"], "num_denoising"),
        (["--published", "original/r50"], "is not the name of a published checkpoint"),
        (
            ["--published", "original/r50_4scale_12ep"],
            r"The file is not original/r50_4scale_12ep: it has depths \[2, 1, 1, 1\] instead of \[3, 4, 6, 3\]",
        ),
        (["--set", "id2label={}"], r"--set cannot set \['id2label'\]"),
        (["--set", 'backbone_config={"model_type": "swin"}'], r"--set cannot set \['backbone_config'\]"),
        (
            ["--published", "detrex/dino_vitdet_4scale_12ep"],
            "The file is not detrex/dino_vitdet_4scale_12ep: .*backbone 'resnet' instead of 'dino_detr_vit_pyramid'",
        ),
        (["--set", "encoder_attention_heads=many"], "encoder_attention_heads='many' is not a number of heads"),
        (["--set", "encoder_attention_heads=0"], "encoder_attention_heads=0 is not a number of heads"),
        (["--image-size", "0", "100"], "image size"),
    ],
)
def test_wrong_options_are_one_line(arguments, message, save, tmp_path):
    path = save({"model": original_tensors(), "args": settings()})
    with pytest.raises(SystemExit) as stopped:
        main(["--checkpoint", str(path), "--output", str(tmp_path / "out"), *arguments])
    assert re.search(message, str(stopped.value.code))
    assert str(stopped.value.code).startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_verification_fails_where_a_tensor_differs(save, tmp_path, capsys):
    path = save({"model": original_tensors(), "args": settings()})
    model = convert(path, tmp_path / "out")
    with torch.no_grad():
        model.model.encoder.layers[1].mlp.fc1.weight[3, 5] += 0.5
    model.save_pretrained(tmp_path / "out")
    capsys.readouterr()
    assert not verify(path, tmp_path / "out")
    said = capsys.readouterr().out
    total = len(model.state_dict())
    assert f"{total - 1} of {total} tensors" in said
    assert "transformer.encoder.layers.1.linear1.weight: 5.0e-01" in said
    wrong = [line.split("  ")[1] for line in said.splitlines() if line.endswith("DIFFERENT")]
    assert wrong == ["encoder, layer 2"]  # nothing before depends on it, and all after gets the same input


@pytest.mark.parametrize("backbone", ["resnet", "swin", "convnext"])
def test_two_models_of_any_kind_are_compared(backbone, save, tmp_path, capsys):
    path = save({"model": original_tensors(backbone), "args": settings()})
    convert(path, tmp_path / "out")
    convert_back(tmp_path / "out", "detrex", tmp_path / "detrex.pth")
    for first, second in [
        (path, tmp_path / "out"),
        (tmp_path / "out", tmp_path / "out"),
        (tmp_path / "out", tmp_path / "detrex.pth"),
        (path, path),
    ]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            compare_command([str(first), str(second)])
        said = capsys.readouterr().out
        assert stopped.value.code == 0, said
        assert "the two compute the same" in said


@pytest.mark.parametrize("kinds", ["folder folder", "file folder", "file file"])
def test_settings_that_differ_are_told_and_make_a_difference(kinds, save, tmp_path, capsys):
    """Also those that two files tell, and that nothing in their tensors shows."""
    paths = []
    for kind, temperature in zip(kinds.split(), (20, 10000), strict=True):
        args = settings(pe_temperatureH=temperature, pe_temperatureW=temperature)
        paths.append(save({"model": original_tensors(), "args": args}, f"{temperature}.pth"))
        if kind == "folder":
            convert(paths.pop(), tmp_path / f"{temperature}")
            paths.append(tmp_path / f"{temperature}")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        compare_command([str(path) for path in paths])
    said = capsys.readouterr().out
    assert stopped.value.code == 1
    assert re.search(r"setting position_temperature: (20 and 10000|10000 and 20)", said)
    assert "the two do NOT compute the same" in said
    assert "encoder, layer 1" in next(line for line in said.splitlines() if line.endswith("DIFFERENT"))


DAMAGES = {
    "backbone.0.body.layer2.0.conv2.weight": "backbone, map 1",
    "input_proj.1.0.weight": "neck, level 2",
    "input_proj.3.1.bias": "neck, level 4",
    "transformer.level_embed": "encoder, layer 1",
    "transformer.encoder.layers.1.self_attn.sampling_offsets.bias": "encoder, layer 2",
    "transformer.enc_output_norm.weight": "query selection, logits",
    "transformer.enc_out_bbox_embed.layers.1.weight": "query selection, boxes",
    "transformer.tgt_embed.weight": "decoder, input",
    "transformer.decoder.ref_point_head.layers.0.weight": "decoder, layer 1",
    "transformer.decoder.layers.1.self_attn.in_proj_bias": "decoder, layer 2",
    "class_embed.0.bias": "decoder, layer 1, logits",
    "bbox_embed.0.layers.2.bias": "decoder, layer 1, boxes",
}


@pytest.mark.parametrize(("name", "stage"), DAMAGES.items())
def test_damage_is_found_where_it_is(name, stage, save, tmp_path, capsys):
    tensors = original_tensors()
    convert(save({"model": tensors, "args": settings()}), tmp_path / "out")
    changed = tensors[name] + torch.linspace(-0.3, 0.3, tensors[name].numel()).reshape(tensors[name].shape)
    copies = {other for other, tensor in tensors.items() if tensor is tensors[name]}
    path = save({"model": tensors | dict.fromkeys(copies, changed), "args": settings()}, "damaged.pth")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        compare_command([str(tmp_path / "out"), str(path)])
    said = capsys.readouterr().out
    assert stopped.value.code == 1
    assert next(line for line in said.splitlines() if line.endswith("DIFFERENT")).strip().startswith(f"{stage}  ")


def test_a_tensor_that_evaluation_does_not_use_is_still_told(save, tmp_path, capsys):
    tensors = original_tensors()
    convert(save({"model": tensors, "args": settings()}), tmp_path / "out")
    path = save({"model": tensors | {"label_enc.weight": tensors["label_enc.weight"] + 1}, "args": settings()})
    with pytest.raises(SystemExit) as stopped:
        compare_command([str(tmp_path / "out"), str(path)])
    said = capsys.readouterr().out
    assert stopped.value.code == 1
    assert "label_enc.weight: 1.0e+00" in said
    assert "the two compute the same in evaluation, but tensors differ" in said


@pytest.mark.parametrize("wrong", ["nowhere", "picture"])
def test_what_cannot_be_compared_is_one_line(wrong, save, tmp_path):
    path = save({"model": original_tensors(), "args": settings()})
    (tmp_path / "picture.png").write_text("none")
    arguments = [str(path), str(tmp_path / "nowhere")]
    if wrong == "picture":
        arguments = [str(path), str(path), "--image", str(tmp_path / "picture.png")]
    with pytest.raises(SystemExit, match=r"^error: (There is no file|.*cannot be read as a picture)"):
        compare_command(arguments)
