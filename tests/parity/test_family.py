"""Co-DINO, Align-DETR and Stable-DINO against recorded numbers of their public code, by the same conversion that users call.

The recordings were made in float32 with another build of torch. The limits of DINO hold (see test_recordings.py).
"""

import re

import pytest
import torch
from recipe import FAMILY, convert_recorded, each_variant, load_manifest, load_recorded, make_images, project_of
from test_recorded_nms import assert_same_detections
from test_recordings import assert_near, load_model, run_model
from transformers import AutoImageProcessor

from dino_hf.conversion.checkpoint_files import load_checkpoint
from dino_hf.conversion.convert_back import convert_back
from dino_hf.conversion.convert_checkpoint import convert
from dino_hf.conversion.verify_conversion import Model, verify

LOGITS, BOXES = 1e-4, 1e-5  # half of what counts as equal; Swin reaches 3e-5 and 2e-6
CHANNELS, TOKENS = 64, 64  # every 64th channel of the maps and every 64th token are kept
# Tensors of the auxiliary heads, as the recorded model has them.
AUXILIARY = re.compile(r"(rpn_head|roi_head|bbox_head|query_head\.downsample|query_head\.transformer\.aux_pos_trans)")

pytestmark = pytest.mark.xdist_group("parity")
variant = each_variant(FAMILY)


@pytest.fixture(scope="module")
def folder(variant, tmp_path_factory):
    """A converted checkpoint. The project is named for Align-DETR only, whose files have the tensors of detrex."""
    root = tmp_path_factory.mktemp(variant.replace("/", "_"))
    return convert_recorded(variant, root, source="aligndetr" if project_of(variant) == "aligndetr" else "auto")


@pytest.fixture(scope="module")
def outputs(variant, folder):
    return run_model(variant, folder)


def assert_all_layers(outputs, recorded):
    assert_near(outputs.intermediate_logits.transpose(0, 1), recorded["logits"], LOGITS)
    assert_near(outputs.intermediate_pred_boxes.transpose(0, 1), recorded["pred_boxes"], BOXES)
    assert_near(outputs.logits, recorded["logits"][-1], LOGITS)
    assert_near(outputs.enc_topk_logits, recorded["encoder_logits"], LOGITS)
    assert_near(outputs.enc_topk_bboxes, recorded["encoder_boxes"], BOXES)
    assert_near(outputs.enc_topk_bboxes, recorded["reference_points"][0], BOXES)


def test_every_layer_gives_the_recorded_logits_and_boxes(variant, outputs):
    assert_all_layers(outputs[0], load_recorded(variant, "eval_outputs"))


def test_neck_and_encoder_give_the_recorded_features(variant, outputs):
    recorded = load_recorded(variant, "eval_intermediates")
    assert len([name for name in recorded if name.startswith("level")]) == len(outputs[1])
    for level, feature_map in enumerate(outputs[1]):
        assert_near(feature_map[:, ::CHANNELS], recorded[f"level{level}"], 1e-4)  # values of up to 5
    assert_near(outputs[0].encoder_last_hidden_state[:, ::TOKENS], recorded["encoder_last_hidden_state"], 1e-4)


def test_unmasked_padding_gives_the_recorded_logits_and_boxes(variant, folder):
    """As Co-DETR does for models of large-scale jittering, and detrex in evaluation."""
    if variant == "codetr/r50_5scale":
        pytest.skip("the selection of queries has near ties without a mask, so it was not recorded")
    pixels, _ = make_images(load_manifest(variant))
    with torch.no_grad():
        outputs = load_model(folder).eval()(pixels)
    assert_all_layers(outputs, load_recorded(variant, "eval_outputs_of_padding"))


def test_detections_after_nms_are_the_recorded_ones(variant, folder, outputs):
    """With the image processor that the conversion saved. Sense-X takes as many candidates as queries, mmdetection 300."""
    processor, project = AutoImageProcessor.from_pretrained(folder), project_of(variant)
    if project == "aligndetr":
        assert processor.nms is None
        pytest.skip("its publisher uses no NMS")
    settings = {"post_nms": {"method": "hard", "iou_threshold": 0.8, "candidates": 300}}
    if project == "codetr":
        settings = {"post": None, "post300": {**processor.nms, "candidates": 300}}
    recorded, sizes = load_recorded(variant, "eval_outputs"), load_manifest(variant)["images"]
    for name, nms in settings.items():
        detections = processor.post_process_object_detection(outputs[0], -1, sizes, nms=nms)
        for image, (found, size) in enumerate(zip(detections, sizes, strict=True)):
            assert_same_detections(found, recorded, f"{name}.{image}", pixels=BOXES * max(size))


def test_the_arithmetic_that_conversions_are_verified_with_gives_them_too(variant, folder):
    recorded = load_recorded(variant, "eval_outputs")
    source = Model(folder.parent / "checkpoint.pth", fallback=load_model(folder).config)
    with torch.no_grad():
        trace = source.run(*make_images(load_manifest(variant)))
    assert_near(torch.stack(trace.logits), recorded["logits"], LOGITS)
    assert_near(torch.stack(trace.boxes), recorded["pred_boxes"], BOXES)
    assert_near(torch.stack(trace.references), recorded["reference_points"][:-1], BOXES)


def test_the_folder_is_verified_against_the_file(variant, folder):
    assert verify(folder.parent / "checkpoint.pth", folder, show_detections=False)


def test_the_configuration_has_the_settings_of_the_source(variant, folder):
    config, source = load_model(folder).config, load_manifest(variant)["config"]
    if project_of(variant) == "aligndetr":
        assert (config.class_loss, config.queries_per_box, config.num_denoising) == ("align_detr", 2, 100)
        assert (config.position_temperature, config.position_offset, config.projection_bias) == (10000, -0.5, True)
        return
    if project_of(variant) == "stabledino":
        assert (config.class_loss, config.encoder_fusion, config.negative_noise_start) == ("stable_dino", True, 0)
        assert (config.cls_loss_coefficient, config.denoising_cls_loss_coefficient) == (6, 1)
        assert (config.position_temperature, config.position_offset, config.projection_bias) == (10000, -0.5, True)
        return
    head = source["query_head"]
    assert (config.position_temperature, config.position_offset, config.pred_boxes_eps) == (20, 0, 1e-3)
    assert (config.class_loss, config.projection_bias, config.share_decoder_heads) == ("quality_focal", False, False)
    assert config.num_denoising == head["dn_cfg"]["group_cfg"]["num_dn_queries"]
    assert (config.label_noise_ratio, config.num_extra_label_embeddings) == (0, 0)  # load_model turns the noise off
    assert config.provenance["converted_from"]["project"] == "codetr"


def test_the_way_back_gives_the_same_file_without_the_auxiliary_heads(variant, folder, capsys):
    project = project_of(variant)
    lines = convert_back(folder, project, folder.parent / "back.pth")
    source = load_checkpoint(folder.parent / "checkpoint.pth").tensors
    expected = {name: tensor for name, tensor in source.items() if not AUXILIARY.match(name)}
    tensors = load_checkpoint(folder.parent / "back.pth").tensors
    assert set(tensors) == set(expected)
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name], tensor), name
    assert (len(source) > len(expected)) == (project == "codetr") == any("no auxiliary heads" in line for line in lines)
    model = load_model(folder)
    convert(folder.parent / "back.pth", folder.parent / "again", source=project)
    again = load_model(folder.parent / "again")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_dropped_tensors_are_counted_by_reason(variant, tmp_path, capsys):
    convert_recorded(variant, tmp_path, source=project_of(variant))
    lines = capsys.readouterr().out.splitlines()
    counts = {match[2]: int(match[1]) for line in lines if (match := re.match(r"    (\d+): (.*)", line))}
    dropped = {reason: number for reason, number in counts.items() if "for training only" in reason}
    names = load_manifest(variant)["tensors"]
    assert sum(dropped.values()) == len([name for name in names if AUXILIARY.match(name)])
    assert len(dropped) == (5 if project_of(variant) == "codetr" else 0)
    total = next(int(match[1]) for line in lines if (match := re.search(r"dropped (\d+)", line)))
    assert total == sum(counts.values())
