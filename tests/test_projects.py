"""Everything that is particular to a project stands in the file of that project."""

import ast
from importlib import import_module
from pathlib import Path

import pytest
import torch

import dino_hf.conversion
from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.common.values import short_repr
from dino_hf.conversion.checkpoint_files import load_checkpoint
from dino_hf.conversion.convert_back import convert_back
from dino_hf.conversion.convert_checkpoint import convert
from dino_hf.conversion.errors import ConversionError
from dino_hf.conversion.options import PROJECT_NAMES
from dino_hf.conversion.projects.codetr import square_canvas
from dino_hf.conversion.projects.registry import PROJECTS, find_project, recognise
from dino_hf.conversion.published import PUBLISHED
from helpers import tiny_config
from toy_checkpoints import original_tensors

FOLDER = Path(dino_hf.conversion.__file__).parent


def compared_names(text: str) -> set[str]:
    """Names of projects in comparisons."""
    return {
        part.value
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Compare)
        for operand in (node.left, *node.comparators)
        for part in ast.walk(operand)
        if isinstance(part, ast.Constant) and part.value in PROJECT_NAMES
    }


def test_the_options_name_every_project():
    assert tuple(PROJECTS) == PROJECT_NAMES
    assert [project.name for project in PROJECTS.values()] == list(PROJECT_NAMES)


@pytest.mark.parametrize("name", sorted({row.project for row in PUBLISHED}))
def test_a_published_checkpoint_belongs_to_its_project(name):
    assert {row.project for row in import_module(f"dino_hf.conversion.published_{name}").PUBLISHED} == {name}
    assert (FOLDER / "projects" / f"{name}.py").is_file()
    assert name in PROJECT_NAMES


@pytest.mark.parametrize("file", sorted(FOLDER.rglob("*.py")), ids=lambda file: file.stem)
def test_no_file_compares_the_name_of_a_project(file):
    assert compared_names(file.read_text(encoding="utf-8")) == set()


def test_a_planted_comparison_is_found():
    assert compared_names("if project == 'detrex' or name in ('mmdet', 'x'):\n    pass") == {"detrex", "mmdet"}


def test_only_the_own_project_recognises_a_file():
    names = original_tensors()
    assert recognise(names) is PROJECTS["original"]
    assert [project.name for project in PROJECTS.values() if project.recognises(names)] == ["original"]
    assert recognise(["backbone.cls_token"]) is None


def test_an_unknown_project_is_refused_with_the_choices():
    with pytest.raises(
        ConversionError, match="no project 'detectron'; choose one of original, stabledino, detrex, aligndetr, mmdet"
    ):
        find_project("detectron")


def test_a_co_deformable_detr_is_refused_in_words(tmp_path):
    names = ("head_pos_embed.weight", "level_embeds", "pos_trans.weight", "reference_points.weight")
    torch.save(
        {"state_dict": {f"query_head.transformer.{name}": torch.zeros(2, 3) for name in names}}, tmp_path / "x.pth"
    )
    with pytest.raises(ConversionError, match=r"x\.pth is a Co-Deformable-DETR.*not DINO.*only Co-DINO is converted"):
        convert(tmp_path / "x.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_stable_dino_has_a_fusion_of_the_encoder():
    fused = tiny_config(encoder_fusion=True)
    for name in ("original", "detrex", "aligndetr", "mmdet", "codetr"):
        with pytest.raises(ConversionError, match=f"encoder_fusion=True, which {name} cannot compute.*for stabledino"):
            PROJECTS[name].check_expressible(fused)
    PROJECTS["stabledino"].check_expressible(fused)
    with pytest.raises(ConversionError, match=r"encoder_fusion=False.*for detrex"):
        PROJECTS["stabledino"].check_expressible(tiny_config())


def settings_of_codetr(folder, meta):
    torch.save({"state_dict": {}, "meta": meta}, folder / "x.pth")
    settings = load_checkpoint(folder / "x.pth").settings
    project = PROJECTS["codetr"]
    return project.fields_from_settings(settings), project.processor_settings(settings)


def test_settings_of_co_detr_are_read_from_a_file_of_sense_x(tmp_path):
    text = """
model = dict(type='CoDETR', with_attn_mask=False,
    backbone=dict(type='ResNet', frozen_stages=1),
    query_head=dict(type='CoDINOHead',
        dn_cfg=dict(noise_scale=dict(label=0.3, box=0.4), group_cfg=dict(dynamic=True, num_dn_queries=500)),
        transformer=dict(
            encoder=dict(transformerlayers=dict(attn_cfgs=dict(num_heads=4, num_points=2))),
            decoder=dict(transformerlayers=dict(attn_cfgs=[dict(num_heads=4), dict(num_heads=4, num_points=3)]))),
        positional_encoding=dict(temperature=20, normalize=True),
        loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True, beta=2.0, loss_weight=1.0)),
    train_cfg=[dict(assigner=dict(cls_cost=dict(type='FocalLossCost', weight=2.5)))],
    test_cfg=[dict(max_per_img=300, nms=dict(type='nms', iou_threshold=0.7))])
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='MultiScaleFlipAug', img_scale=(1024, 1024), transforms=[
    dict(type='Resize', keep_ratio=True), dict(type='Pad', size=(1024, 1024), pad_val=dict(img=(114, 114, 114)))])]
"""
    fields, processor = settings_of_codetr(tmp_path, {"config": text})
    assert fields["num_denoising"] == 500
    assert (fields["label_noise_ratio"], fields["box_noise_scale"]) == (0.3, 0.4)
    assert (fields["encoder_n_points"], fields["decoder_n_points"], fields["decoder_attention_heads"]) == (2, 3, 4)
    assert (fields["class_cost"], fields["class_loss"]) == (2.5, "quality_focal")
    assert fields["num_frozen_backbone_stages"] == 2
    assert processor == square_canvas(1024) | {"nms": {"method": "hard", "iou_threshold": 0.7}}


def test_settings_of_co_detr_are_read_from_a_file_of_mmdetection(tmp_path):
    text = """
model = dict(type='CoDETR', use_lsj=False, eval_module='detr',
    query_head=dict(dn_cfg=dict(label_noise_scale=0.5, box_noise_scale=0.4, group_cfg=dict(num_dn_queries=300))),
    train_cfg=[dict(assigner=dict(match_costs=[dict(type='IoUCost', weight=3.0)]))],
    test_cfg=[dict(max_per_img=300)])
test_pipeline = [dict(type='Resize', scale=(2048, 1280), keep_ratio=True)]
"""
    fields, processor = settings_of_codetr(tmp_path, {"cfg": text})
    assert (fields["num_denoising"], fields["box_noise_scale"], fields["giou_cost"]) == (300, 0.4, 3.0)
    assert processor == {"size": {"shortest_edge": 1280, "longest_edge": 2048}, "nms": None}


@pytest.mark.parametrize(
    "nms",
    [
        {"type": "soft_nms", "iou_threshold": 0.7, "method": "gaussian"},
        {"type": "soft_nms", "class_agnostic": True},
        {"type": "soft_nms", "offset": [1]},
        {"type": "nms", "iou_threshold": 0.7, "max_num": 100},
        {"type": ["nms"], "iou_threshold": 0.7},
        {"type": "nms"},
        {},
        "soft",
    ],
)
def test_another_nms_is_named_and_not_set(nms, capsys):
    settings = {"model": {"test_cfg": [{"nms": nms}]}}
    assert PROJECTS["codetr"].processor_settings(settings)["nms"] is None
    assert f"nms={short_repr(nms)} for tests, which dino_hf does not have" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("nms", "expected"),
    [
        ({"type": "soft_nms"}, {"method": "soft", "iou_threshold": 0.3}),
        ({"type": "soft_nms", "min_score": 0.01}, {"method": "soft", "iou_threshold": 0.3, "min_score": 0.01}),
        ({"type": "soft_nms", "iou_thr": 0.6, "class_agnostic": False}, {"method": "soft", "iou_threshold": 0.6}),
        ({"iou_threshold": 0.5, "split_thr": 20}, {"method": "hard", "iou_threshold": 0.5}),
    ],
)
def test_settings_that_a_file_leaves_out_have_the_defaults_of_mmcv(nms, expected, capsys):
    settings = {"model": {"test_cfg": [{"nms": nms}]}}
    assert PROJECTS["codetr"].processor_settings(settings)["nms"] == expected
    assert not capsys.readouterr().out


@pytest.mark.parametrize("project", ["codetr", "codetr_mmdet"])
def test_of_two_label_embeddings_that_of_mmdetection_is_taken(project):
    """A file that mmdetection trained from Sense-X's weights may still have Sense-X's, which mmdetection does not use."""
    ours, theirs = torch.ones(2, 3), torch.zeros(2, 3)
    names = "query_head.label_embedding.weight", "query_head.dn_generator.label_embedding.weight"
    tensors, dropped = PROJECTS[project].to_release(dict(zip(names, (ours, theirs), strict=True)))
    assert tensors["label_enc.weight"] is theirs
    assert sum(dropped.values()) == 1


@pytest.mark.parametrize(
    ("padding", "value"), [({"img": [7, 7, 7]}, 7), ({"img": 9}, 9), ([5, 5, 5], 5), (3, 3), (None, 0)]
)
def test_the_value_of_the_canvas_is_that_of_the_padding(padding, value):
    pad = {"type": "Pad", "size": [640, 640]} | ({} if padding is None else {"pad_val": padding})
    settings = {"model": {"use_lsj": True}, "test_pipeline": [{"type": "Resize", "scale": [640, 640]}, pad]}
    assert PROJECTS["codetr"].processor_settings(settings) == square_canvas(640, value)


@pytest.mark.parametrize("project", ["codetr", "codetr_mmdet"])
@pytest.mark.parametrize(
    ("preprocessor", "candidates"), [({}, None), ({"data_preprocessor": {"pad_mask": True}}, 1000)]
)
def test_mmdetection_3_cuts_detections_before_nms(project, preprocessor, candidates):
    """A file of mmdetection in the table belongs to the project codetr, so the configuration tells, not the project."""
    settings = {"model": {"test_cfg": [{"max_per_img": 1000, "nms": {"type": "soft_nms", "iou_threshold": 0.7}}]}}
    settings["model"] |= preprocessor
    nms = PROJECTS[project].processor_settings(settings)["nms"]
    assert nms["iou_threshold"] == 0.7
    assert nms.get("candidates") == (candidates or PROJECTS[project].processor["nms"].get("candidates"))


@pytest.mark.parametrize(("project", "canvas"), [("codetr", "with_attn_mask=False"), ("codetr_mmdet", "use_lsj=True")])
def test_the_way_back_prints_the_settings_of_the_test(project, canvas, tmp_path):
    model = DinoDetrForObjectDetection(tiny_config(num_feature_levels=5, projection_bias=False))
    model.save_pretrained(tmp_path / "model")
    nms = {"method": "soft", "iou_threshold": 0.7, "min_score": 0.01}
    DinoDetrImageProcessor(**square_canvas(640), nms=nms).save_pretrained(tmp_path / "model")
    lines = convert_back(tmp_path / "model", project, tmp_path / "back.pth")
    text = "\n".join(lines)
    assert canvas in text
    assert "nms=dict(type='soft_nms', iou_threshold=0.7, min_score=0.01)" in text
    assert "Pad to (640, 640) with pad_val=(114, 114, 114)" in text
    text = "\n".join(convert_back(tmp_path / "model", "detrex", tmp_path / "detrex.pth"))
    assert "canvas of 640" in text
    assert "'iou_threshold': 0.7" in text
    DinoDetrImageProcessor().save_pretrained(tmp_path / "model")
    plain = convert_back(tmp_path / "model", project, tmp_path / "plain.pth")
    assert "Resize to (1333, 800)" in "\n".join(plain)
    assert "model.test_cfg[0]: no nms" in plain


def test_a_damaged_image_processor_is_named_on_the_way_back(tmp_path):
    DinoDetrForObjectDetection(tiny_config()).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"nms": {"method": "medium"}}')
    with pytest.raises(ConversionError, match=r"image processor .* cannot be loaded: .*medium"):
        convert_back(tmp_path, "detrex", tmp_path.parent / "back.pth")


def test_a_co_detr_that_detects_by_an_auxiliary_head_is_refused(tmp_path):
    with pytest.raises(ConversionError, match="eval_module='one-stage'; dino_hf supports only 'detr'"):
        settings_of_codetr(tmp_path, {"cfg": "model = dict(type='CoDETR', eval_module='one-stage')"})
