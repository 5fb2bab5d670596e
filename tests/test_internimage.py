"""InternImage in checkpoints of detrex, at toy widths."""

import json

import pytest
import torch

from dino_hf import DinoDetrForObjectDetection
from dino_hf.conversion.convert_back import convert_back
from dino_hf.conversion.convert_checkpoint import convert
from dino_hf.conversion.errors import ConversionError
from dino_hf.conversion.verify_conversion import verify, verify_back
from helpers import INTERNIMAGE, RESNET, randomize, tiny_config

POSITIONS = {"position_temperature": 10000.0, "position_offset": -0.5}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_n_points": 2, "decoder_n_points": 3}
CHOSEN = POSITIONS | HEADS


def write(folder, **changes):
    """A file of detrex of a model with these settings of its backbone, and the model."""
    model = DinoDetrForObjectDetection(
        tiny_config(
            backbone_config=INTERNIMAGE | changes,
            share_decoder_heads=False,
            num_extra_label_embeddings=0,
            **POSITIONS,
        )
    )
    randomize(model, 0.1).save_pretrained(folder / "model")
    convert_back(folder / "model", "detrex", folder / "file.pth")
    return folder / "file.pth", model


@pytest.mark.parametrize("changes", [{}, {"post_norm": True}, {"layer_scale_init_value": None, "mlp_ratio": 2.0}])
def test_a_file_keeps_every_tensor_in_both_directions(changes, tmp_path, capsys):
    """The converted model also agrees with the second implementation, at a scale that no published model has."""
    file, model = write(tmp_path, offset_scale=1.5, **changes)
    converted = convert(file, tmp_path / "out", chosen=CHOSEN | {"offset_scale": 1.5})
    backbone, expected = converted.config.backbone_config, model.config.backbone_config
    for name in ("depths", "embed_dim", "num_groups", "mlp_ratio", "post_norm", "offset_scale", "out_features"):
        assert getattr(backbone, name) == getattr(expected, name), name
    state = converted.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    convert_back(tmp_path / "out", "detrex", tmp_path / "back.pth")
    first, second = (torch.load(tmp_path / name)["model"] for name in ("file.pth", "back.pth"))
    assert set(first) == set(second)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert verify(file, tmp_path / "out", show_detections=False), capsys.readouterr().out
    assert verify_back(tmp_path / "out", tmp_path / "back.pth")


def test_the_scale_of_an_unpublished_width_must_be_given(tmp_path):
    file, _ = write(tmp_path)
    with pytest.raises(ConversionError, match=r"width of 16.*--set offset_scale=1 .*--set offset_scale=2"):
        convert(file, tmp_path / "out", chosen=CHOSEN)
    assert convert(file, tmp_path / "out", chosen=CHOSEN | {"offset_scale": 2}).config.backbone_config.offset_scale == 2


@pytest.mark.parametrize(("post_norm", "scale", "rate"), [(True, 2.0, 0.4), (False, 1.0, 0.1)])
def test_a_scale_that_is_assumed_is_detrex_s_and_recorded(post_norm, scale, rate, tmp_path, capsys):
    file, _ = write(tmp_path, post_norm=post_norm)
    converted = convert(file, tmp_path / "out", chosen=HEADS, assume_positions=True)
    assert converted.config.backbone_config.offset_scale == scale
    assert converted.config.backbone_config.drop_path_rate == rate
    assert f"offset_scale={scale}" in capsys.readouterr().out
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["provenance"]["converted_from"]["assumed"]["offset_scale"] == scale


@pytest.mark.parametrize(("width", "scale"), [(64, 1.0), (80, 1.0), (112, 1.0), (160, 2.0)])
def test_published_widths_tell_the_scale(width, scale, tmp_path):
    file, _ = write(tmp_path, embed_dim=width, post_norm=True, depths=[1, 1, 1, 1])
    converted = convert(file, tmp_path / "out", chosen=CHOSEN)
    assert converted.config.backbone_config.offset_scale == scale
    assert "offset_scale" not in converted.config.provenance["converted_from"]["assumed"]


def test_another_backbone_has_no_such_scale(tmp_path):
    config = tiny_config(backbone_config=RESNET, share_decoder_heads=False, num_extra_label_embeddings=0)
    DinoDetrForObjectDetection(config).save_pretrained(tmp_path / "model")
    convert_back(tmp_path / "model", "detrex", tmp_path / "file.pth")
    with pytest.raises(ConversionError, match=r"offset_scale is a setting of InternImage.*'resnet'"):
        convert(tmp_path / "file.pth", tmp_path / "out", chosen=CHOSEN | {"offset_scale": 2})


@pytest.mark.parametrize("name", ["levels.0.blocks.0.res_post_norm1.0.weight", "levels.2.post_norms.0.0.weight"])
def test_larger_variants_are_refused(name, tmp_path):
    """InternImage-H and G have more norms and another kernel size."""
    file, _ = write(tmp_path)
    content = torch.load(file)
    content["model"][f"backbone.{name}"] = torch.ones(16)
    torch.save(content, file)
    with pytest.raises(ConversionError, match="which this DINO does not have: it is a variant"):
        convert(file, tmp_path / "out", chosen=CHOSEN | {"offset_scale": 1})


@pytest.mark.parametrize("project", ["original", "mmdet"])
def test_other_projects_have_no_internimage(project, tmp_path):
    write(tmp_path)
    with pytest.raises(ConversionError, match=f"dino_detr_internimage.*for {project}"):
        convert_back(tmp_path / "model", project, tmp_path / "other.pth")


def test_the_settings_to_make_in_detrex_name_the_scale(tmp_path):
    write(tmp_path, offset_scale=2.0)
    lines = convert_back(tmp_path / "model", "detrex", tmp_path / "again.pth")
    assert any("offset_scale=2" in line and "post_norm=False" in line for line in lines)
