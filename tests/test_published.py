"""Every published checkpoint, as far as it can be had without its weights: a file with its names and depths, at toy widths,
under the settings of the table, and the page that documents it."""

import json
import re
from pathlib import Path

import pytest
import torch
from recipe import load_manifest
from transformers import AutoImageProcessor
from typer.testing import CliRunner

from dino_hf import DinoDetrConfig, DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.cli.app import app
from dino_hf.conversion import published_match
from dino_hf.conversion.checkpoint_files import load_checkpoint
from dino_hf.conversion.convert_back import convert_back
from dino_hf.conversion.convert_checkpoint import convert
from dino_hf.conversion.errors import ConversionError
from dino_hf.conversion.projects.project import backbone_depths
from dino_hf.conversion.published import PUBLISHED, find_published, table
from dino_hf.conversion.published_match import Candidate, project_of_file
from dino_hf.conversion.published_row import BACKBONES
from toy_checkpoints import convnext_shapes

PAGE = Path(__file__).parents[1] / "docs" / "checkpoints.md"
AUXILIARY = re.compile(r"(rpn_head|roi_head|bbox_head|query_head\.downsample|query_head\.transformer\.aux_pos_trans)")
SUPPORTED = [row for row in PUBLISHED if row.backbone in BACKBONES]
OTHERS = [row for row in PUBLISHED if row.backbone not in BACKBONES]
# A tensor of each backbone that cannot be expressed, and a part of the reason.
SAMPLES = {"EVA": ("backbone.blocks.0.attn.q_proj.weight", "a plain ViT with rotary positions")}
# Such tensors of backbones that no row of the table has.
UNSUPPORTED = {
    "backbone.net.blocks.0.attn.q_bias": "EVA",
    "backbone.net.blocks.0.attn.q_proj.weight": "EVA-02",
    "backbone.layers.0.blocks.0.attn.logit_scale": "Swin v2",
}
FOCALNET, VIT_PYRAMID = "dino_detr_focalnet", "dino_detr_vit_pyramid"


def small(row):
    """The row's model, narrow: its depths, levels, heads and label rows are real."""
    kind, depths, _, _ = BACKBONES[row.backbone]
    stages = ["stage1", "stage2", "stage3", "stage4"][5 - row.num_levels :]
    backbone = {"model_type": kind, "depths": depths, "out_features": stages}
    if kind == "dino_detr_internimage":
        backbone |= {"embed_dim": 16, "num_groups": [1, 2, 4, 8], "post_norm": row.backbone != "InternImage-T"}
        backbone |= {"offset_scale": 2.0 if row.backbone == "InternImage-L" else 1.0}
    elif kind == FOCALNET:
        fl4 = row.backbone.endswith("fl4")
        backbone |= {"embed_dim": 16, "focal_levels": [4 if fl4 else 3] * 4, "focal_windows": [3 if fl4 else 5] * 4}
        backbone |= {"use_conv_embed": True, "use_layerscale": True, "use_post_layernorm": True}
    elif kind == VIT_PYRAMID:
        del backbone["depths"], backbone["out_features"]
        blocks = {"num_hidden_layers": depths[0], "window_size": 14, "image_size": 1024}
        every = depths[0] // 4  # the last block of each quarter attends to the whole image
        blocks |= {"window_block_indices": [block for block in range(depths[0]) if (block + 1) % every]}
        sizes = {"hidden_size": 16, "num_attention_heads": 2, "use_relative_position_embeddings": True}
        backbone |= {"backbone_config": {"model_type": "vitdet", **blocks, **sizes}}
    elif kind == "swin":
        backbone |= {"embed_dim": 8, "num_heads": [1, 2, 4, 8], "window_size": 12 if "384" in row.backbone else 7}
    else:
        backbone |= {"hidden_sizes": [16, 20, 24, 28]}
    if kind == "resnet":
        backbone |= {"embedding_size": 64}
    return DinoDetrConfig(
        backbone_config=backbone,
        num_labels=row.num_labels,
        num_queries=900,
        num_feature_levels=row.num_levels,
        encoder_layers=row.encoder_layers,
        d_model=64,
        encoder_ffn_dim=12,
        decoder_ffn_dim=12,
        share_decoder_heads=row.project == "original",
        num_extra_label_embeddings=1 if row.project == "original" else 0,
        projection_bias=row.project not in ("mmdet", "codetr"),
    )


def with_toy_width(row, monkeypatch):
    """What tells a file of another width apart would not let the toy pass."""
    kind, depths, _, window = BACKBONES[row.backbone]
    monkeypatch.setitem(BACKBONES, row.backbone, (kind, depths, 8 if kind == "swin" else 16, window))


def add_auxiliary_heads(path):
    """Add the tensors of Co-DETR's auxiliary heads, which a converted model has not, and remove its class names."""
    content = torch.load(path, weights_only=False)
    names = load_manifest("codetr/r50_5scale")["tensors"]
    heads = {name: torch.zeros(2, 3) for name in names if AUXILIARY.match(name)}
    torch.save({"state_dict": content["state_dict"] | heads}, path)


def patterns(names):
    return {re.sub(r"\d+", "#", name) for name in names}


def real_patterns(row):
    """Names that the project's own model has, numbers aside: recorded, for ConvNeXt written down in toy_checkpoints.py."""
    project, kind = row.project, BACKBONES[row.backbone][0]
    variants = {
        "original": "swin_t_4scale",
        "detrex": "swin_t_4scale",
        "mmdet": "swin_t_5scale",
        "codetr": "swin_t_5scale",
    }
    variant = variants[project] if kind == "swin" else "r50_5scale" if project == "codetr" else "r50_4scale"
    own = {"dino_detr_internimage": "internimage_4scale", FOCALNET: "focalnet_4scale", VIT_PYRAMID: "vitdet_4scale"}
    variant = own.get(kind, variant)
    names = load_manifest(f"{project}/{variant}")["tensors"]
    if kind == "convnext":
        names = [name for name in names if not name.startswith("backbone.")]
        names += [f"backbone.{name}" for name in convnext_shapes([16, 20, 24, 28]) if not name.startswith("norm0")]
    if row.backbone == "InternImage-T":  # each stage ends with a norm
        names = [*names, "backbone.levels.0.norm.0.weight", "backbone.levels.0.norm.0.bias"]
    return patterns(names)


@pytest.mark.parametrize("row", SUPPORTED, ids=lambda row: row.title)
def test_a_file_of_its_names_and_depths_is_converted(row, tmp_path, monkeypatch, capsys):
    """It is recognised, and gets its settings without being told."""
    torch.manual_seed(0)
    with_toy_width(row, monkeypatch)
    model = DinoDetrForObjectDetection(small(row))
    for head in model.model.decoder.heads:  # trained heads are not alike
        torch.nn.init.normal_(head.class_head.bias)
    model.save_pretrained(tmp_path / "model")
    convert_back(tmp_path / "model", row.project, tmp_path / row.file)
    if row.project == "mmdet":  # the published ones say nothing of position embeddings that the table does not
        content = torch.load(tmp_path / row.file, weights_only=False)
        torch.save({"state_dict": content["state_dict"]}, tmp_path / row.file)
    if row.project == "codetr":
        add_auxiliary_heads(tmp_path / row.file)
    tensors = load_checkpoint(tmp_path / row.file).tensors
    assert project_of_file(Candidate(row, "name", ""), tensors).name == row.project
    assert patterns(tensors) == real_patterns(row)

    if row.sha256:  # the toy has other bytes
        monkeypatch.setattr(published_match, "file_sha256", lambda path: row.sha256.ljust(64, "0"))
    converted = convert(tmp_path / row.file, tmp_path / "out")
    assert f"this is {row.title}, found by its {'SHA-256' if row.sha256 else 'name'}" in capsys.readouterr().out
    config, expected = converted.config, small(row)
    backbone = config.backbone_config
    kind, depths, _, _ = BACKBONES[row.backbone]
    assert (backbone.model_type, backbone_depths(backbone)) == (kind, depths)
    assert config.num_feature_levels == row.num_levels
    if kind == "swin":
        assert backbone.drop_path_rate == (0.3 if row.project == "codetr" else 0.2)
        assert (backbone.window_size, backbone.image_size) == ((12, 384) if "384" in row.backbone else (7, 224))
    if kind == "dino_detr_internimage":
        assert backbone.post_norm == (row.backbone != "InternImage-T")
        assert backbone.offset_scale == (2 if row.backbone == "InternImage-L" else 1)
        assert backbone.drop_path_rate == (0.4 if row.backbone == "InternImage-L" else 0.1)
    ours = (row.project == "detrex" and "24ep" not in row.name) or "improved" in row.name or row.project == "aligndetr"
    assert (config.position_temperature, config.position_offset) == ((10000, -0.5) if ours else (20, 0))
    from_objects365 = "o365" in row.name
    assert config.num_denoising == (
        500 if from_objects365 else 300 if "300dn" in row.name or "improved" in row.name else 100
    )
    assert config.box_noise_scale == (0.4 if from_objects365 else 1.0)
    assert config.class_loss == {"aligndetr": "align_detr", "codetr": "quality_focal"}.get(row.project, "focal")
    assert config.pred_boxes_eps == (1e-5 if row.project == "mmdet" else 1e-3)
    improved = "class_weight_2.0" in row.name or "improved" in row.name
    assert config.cls_loss_coefficient == (2 if improved else 1)
    assert config.denoising_cls_loss_coefficient == (1 if "class_weight_2.0" in row.name else None)
    if kind == "resnet":
        frozen = {"original": 2, "detrex": 1, "aligndetr": 1, "mmdet": 2, "codetr": 2}[row.project]
        assert config.num_frozen_backbone_stages == (0 if improved else frozen)
    assert config.share_decoder_heads == (row.project == "original")
    if row.ap_data == "COCO val2017":
        assert config.id2label[len(config.id2label) - 1] == "toothbrush"
        assert config.category_ids[-1] == 90
    assert config.provenance["converted_from"]["published_ap"] == row.ap
    assert config.provenance["converted_from"].get("published_ap_data", "COCO val2017") == row.ap_data
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    for name in ("nms", "canvas_value", "size"):
        value, usual = getattr(processor, name, None), getattr(DinoDetrImageProcessor(), name, None)
        assert value == row.processor.get(name, usual), name
    assert set(config.provenance["converted_from"]["assumed"]).isdisjoint({"position_temperature", *row.settings})
    for name in (
        "num_queries",
        "num_labels",
        "encoder_layers",
        "projection_bias",
        "num_extra_label_embeddings",
        "encoder_n_points",
    ):
        assert getattr(config, name) == getattr(expected, name), name
    state = converted.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    card = (tmp_path / "out" / "README.md").read_text()
    assert row.ap is None or str(row.ap) in card
    assert row.ap is None or (row.ap_data in card) == (row.ap_data != "COCO val2017")
    assert "model-index" not in card  # published is not measured


@pytest.mark.parametrize("backbone", ["ResNet-50", "Swin-L 384"])
def test_copies_of_mmdetection_have_its_names_too(backbone, tmp_path, monkeypatch):
    """Both spellings of the label embedding and of Swin give the same model, whichever of them meet in a file."""
    row = next(row for row in SUPPORTED if row.project == "codetr" and row.backbone == backbone and row.settings == {})
    with_toy_width(row, monkeypatch)
    torch.manual_seed(0)
    model = DinoDetrForObjectDetection(small(row))
    model.save_pretrained(tmp_path / "model")
    for project in ("codetr", "codetr_mmdet"):
        convert_back(tmp_path / "model", project, tmp_path / f"{project}.pth")
    ours, theirs = (load_checkpoint(tmp_path / f"{project}.pth").tensors for project in ("codetr", "codetr_mmdet"))
    labels = "query_head.label_embedding.weight", "query_head.dn_generator.label_embedding.weight"
    assert (set(ours) - set(theirs)) >= {labels[0]}
    assert (set(theirs) - set(ours)) >= {labels[1]}
    mixed = {**theirs, labels[0]: theirs[labels[1]]}
    del mixed[labels[1]]
    mixed_back = {**ours, labels[1]: ours[labels[0]]}
    del mixed_back[labels[0]]
    for number, tensors in enumerate((ours, theirs, mixed, mixed_back)):
        torch.save({"state_dict": tensors}, tmp_path / "file.pth")
        state = convert(tmp_path / "file.pth", tmp_path / f"out{number}").state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    if row.backbone == "Swin-L 384":
        name = "backbone.stages.0.downsample.reduction.weight"
        theirs_reduction, ours_reduction = theirs[name], ours["backbone.layers.0.downsample.reduction.weight"]
        assert not torch.equal(theirs_reduction, ours_reduction)  # other order of channels


def test_the_hash_tells_the_file_that_mmdetection_links_by_mistake(tmp_path, monkeypatch, capsys):
    linked = find_published("codetr/co_dino_5scale_lsj_swin_large_1x_coco")
    wanted = find_published("codetr/co_dino_5scale_lsj_swin_large_3x_coco")
    with_toy_width(linked, monkeypatch)
    DinoDetrForObjectDetection(small(linked)).save_pretrained(tmp_path / "model")
    convert_back(tmp_path / "model", "codetr", tmp_path / wanted.file)  # the user gave it the name of the other
    monkeypatch.setattr(published_match, "file_sha256", lambda path: linked.sha256.ljust(64, "0"))
    with pytest.raises(ConversionError, match=f"is not {wanted.title}: its SHA-256 shows that it is {linked.title}"):
        convert(tmp_path / wanted.file, tmp_path / "out", published=wanted.title)
    converted = convert(tmp_path / wanted.file, tmp_path / "out")
    assert converted.config.provenance["converted_from"]["published_ap"] == 59.3
    assert "60.7 AP, by mistake" in capsys.readouterr().out


def test_a_file_of_sense_x_is_known_by_its_name_although_its_bytes_are_not(tmp_path, monkeypatch):
    """mmdetection's copy has the same weights in another container, and only its SHA-256 is known."""
    row = find_published("codetr/co_dino_5scale_r50_1x_coco")
    with_toy_width(row, monkeypatch)
    DinoDetrForObjectDetection(small(row)).save_pretrained(tmp_path / "model")
    for name, is_same in ((f"{row.name}.pth", True), (row.file, False)):
        convert_back(tmp_path / "model", "codetr", tmp_path / name)
        config = convert(tmp_path / name, tmp_path / f"out {name}").config
        assert ("published" in config.provenance["converted_from"]) == is_same


@pytest.mark.parametrize("row", OTHERS, ids=lambda row: row.title)
def test_a_published_backbone_that_cannot_be_expressed_is_refused_with_the_reason(row, tmp_path):
    sample, reason = SAMPLES[row.backbone.split("-")[0]]
    variant = "codetr/r50_5scale" if row.project == "codetr" else "detrex/r50_4scale"
    names = [name for name in load_manifest(variant)["tensors"] if not name.startswith("backbone.")]
    torch.save({"model": {name: torch.zeros(2, 3) for name in [*names, sample]}}, tmp_path / "file.pth")
    with pytest.raises(ConversionError, match=f"The backbone is not supported, because it is {reason}"):
        convert(tmp_path / "file.pth", tmp_path / "out", published=row.title)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("sample", "reason"), UNSUPPORTED.items())
def test_a_backbone_that_cannot_be_expressed_is_refused_with_the_reason(sample, reason, tmp_path):
    names = [name for name in load_manifest("detrex/r50_4scale")["tensors"] if not name.startswith("backbone.")]
    torch.save({"model": {name: torch.zeros(2, 3) for name in [*names, sample]}}, tmp_path / "model.pth")
    with pytest.raises(ConversionError, match=f"The backbone is not supported, because it is {reason}"):
        convert(tmp_path / "model.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_of_another_width_is_not_taken_for_the_published_one(tmp_path):
    row = next(row for row in SUPPORTED if row.backbone == "Swin-B 384")
    DinoDetrForObjectDetection(small(row)).save_pretrained(tmp_path / "model")
    convert_back(tmp_path / "model", row.project, tmp_path / row.file)
    with pytest.raises(
        ConversionError, match=r"The file is not detrex/dino_swin_base.*: it has width 8 instead of 128"
    ):
        convert(tmp_path / row.file, tmp_path / "out", published=row.title)


def test_a_file_that_says_otherwise_is_not_taken_for_the_published_one(tmp_path, monkeypatch):
    row = next(row for row in SUPPORTED if "improved" in row.name)
    with_toy_width(row, monkeypatch)
    DinoDetrForObjectDetection(small(row)).save_pretrained(tmp_path / "model")
    convert_back(tmp_path / "model", row.project, tmp_path / row.file)
    content = torch.load(tmp_path / row.file, weights_only=False)
    content["meta"]["cfg"] = "model = dict(type='DINO', positional_encoding=dict(temperature=20, offset=0.0))"
    torch.save(content, tmp_path / row.file)
    with pytest.raises(ConversionError, match=r"it says {'position_temperature': 20, 'position_offset': 0.0}"):
        convert(tmp_path / row.file, tmp_path / "out", published=row.title)


def test_titles_and_files_are_not_twice_in_the_table():
    assert len({row.title for row in PUBLISHED}) == len(PUBLISHED)
    assert len({row.file for row in PUBLISHED}) == len(PUBLISHED)


def test_the_page_has_every_row():
    page = PAGE.read_text()
    assert table() in page, "run `python convert_scripts/published.py` and put its output into docs/checkpoints.md"
    assert all(f"| `{row.title}` | {row.backbone}" in table() for row in PUBLISHED)


def test_the_command_of_the_page_runs(tmp_path, monkeypatch):
    """As it stands there, on the toy file of its row."""
    (block,) = re.findall(r"```bash\n(curl -LO .*?)```", PAGE.read_text(), re.DOTALL)
    address, _, command = block.removeprefix("curl -LO ").partition("\n")
    arguments = command.replace("\\\n", " ").split()[1:]
    row = find_published(arguments[arguments.index("--published") + 1])
    output = arguments[arguments.index("--output") + 1]
    assert (row.address, row.file) == (address, arguments[1])
    DinoDetrForObjectDetection(small(row)).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    with_toy_width(row, monkeypatch)
    convert_back(tmp_path / "model", row.project, Path(row.file))
    result = CliRunner().invoke(app, [*arguments, "--image-size", "96", "160"])
    assert result.exit_code == 0, result.output
    assert "the two compute the same" in result.stdout
    config = json.loads(Path(output, "config.json").read_text())
    assert (config["position_temperature"], config["position_offset"]) == (20.0, 0.0)
