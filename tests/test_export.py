"""Programs of `torch.export` and ONNX files: one graph for all sizes, that finds what the model finds, or nothing is written.

Both are tested here, for to trace a model takes seconds, and one trace is enough.
"""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from PIL import ExifTags, Image
from transformers import AutoBackbone, AutoConfig, YolosConfig, YolosForObjectDetection, YolosImageProcessor
from transformers.models.dinov3_vit import modeling_dinov3_vit
from transformers.models.vitdet import modeling_vitdet

from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor, set_num_queries
from dino_hf.common.installation import install_command
from dino_hf.common.scenes import make_scenes
from dino_hf.export import ExportReport, export_onnx, onnx_export, onnx_file
from dino_hf.export.any_size import any_size
from dino_hf.export.comparison import compare_predictions
from dino_hf.export.graph import export_program
from dino_hf.export.onnx_file import OnnxModel, make_metadata
from dino_hf.inference import Predictor
from dino_hf.inference.sources import read_image
from dino_hf.model.attention_backends import ENVIRONMENT_VARIABLE
from helpers import (
    BIT,
    CONVNEXT,
    FOCALNET,
    INTERNIMAGE,
    RESNET,
    SWIN,
    VITDET,
    randomize,
    tiny_config,
)
from inference_toys import CATEGORY_IDS, NAMES, excite, noise, toy_detector
from test_own_backbones import DINOV3, pyramid_on

SIZES = (
    (1, 96, 128),
    (3, 91, 77),
    (2, 65, 210),
    (1, 168, 84),
)  # batch, height and width: even, odd, multiples of windows


def small_detector(**changes) -> DinoDetrForObjectDetection:
    """Two maps of the backbone and one more, two layers in the decoder."""
    torch.manual_seed(0)
    backbone = changes.pop("backbone_config", RESNET) | {"out_features": ["stage3", "stage4"]}
    settings = {"num_feature_levels": 3, "encoder_layers": 1, "decoder_layers": 2} | changes
    config = tiny_config(backbone_config=backbone, id2label=NAMES, category_ids=CATEGORY_IDS, **settings)
    return excite(DinoDetrForObjectDetection(config))


def padded_batch(batch: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The last image fills only a part of it."""
    pixel_mask = torch.ones(batch, height, width, dtype=torch.long)
    pixel_mask[-1, 2 * height // 3 :] = 0
    pixel_mask[-1, :, width // 2 :] = 0
    return torch.randn(batch, 3, height, width) * pixel_mask[:, None], pixel_mask


def assert_same(model, run, sizes=SIZES) -> None:
    torch.manual_seed(1)
    for size in sizes:
        inputs = padded_batch(*size)
        with torch.no_grad():
            outputs = model(*inputs)
            found = run(*inputs)
        difference = compare_predictions((outputs.logits, outputs.pred_boxes), found)
        # float32: the same sums in another order
        assert max(difference[:2]) < 1e-5
        assert difference.num_images == size[0]


class Exported(NamedTuple):
    folder: Path  # with the detector in "model", scenes in "data", and the file
    model: DinoDetrForObjectDetection
    program: torch.export.ExportedProgram
    report: ExportReport


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    make_scenes(folder / "data" / "train", 2, seed=0)
    make_scenes(folder / "data" / "validation", 4, seed=1)
    model = small_detector()
    model.save_pretrained(folder / "model")
    DinoDetrImageProcessor(size={"shortest_edge": 72, "longest_edge": 120}).save_pretrained(folder / "model")
    model.train().model.backbone.eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENVIRONMENT_VARIABLE, "torch")  # grid_sample, which may be named, but not in a graph
        program = export_program(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_export, "export_program", lambda other: program)  # of the same weights
        report = export_onnx(folder / "model", folder / "toy.onnx", data=folder / "data")
    return Exported(folder, model, program, report)


@pytest.fixture
def quick_export(exported, monkeypatch, tmp_path):
    """`export_onnx` with the graph that is there already."""

    def write(program, path, opset, metadata):
        shutil.copy(exported.report.path, path)

    monkeypatch.setattr(onnx_export, "export_program", lambda model: None)
    monkeypatch.setattr(onnx_export, "write_onnx", write)
    monkeypatch.chdir(tmp_path)

    def export(model=exported.folder / "model", output="out.onnx", **settings):
        return export_onnx(model, output, **settings)

    return export


def test_the_program_agrees_with_the_model_on_any_batch(exported):
    assert exported.model.training
    assert not any(part.training for part in exported.model.model.backbone.modules())
    exported.model.eval()
    assert_same(exported.model, exported.program.module())


def test_the_program_is_made_of_plain_operators_and_of_the_parameters_themselves(exported):
    names = {str(node.target) for node in exported.program.graph.nodes if node.op == "call_function"}
    assert "aten.embedding.default" in names
    assert not [name for name in names if "grid_sample" in name or "assert_scalar" in name]
    assert not [name for name in names if not name.startswith(("aten.", "<built-in function", "<function sym_"))]
    key = "model.model.decoder.norm.weight"
    assert exported.program.state_dict[key].data_ptr() == exported.model.model.decoder.norm.weight.data_ptr()


def test_only_a_detector_of_ours_is_taken():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with pytest.raises(ValueError, match="YolosForObjectDetection cannot be exported; only a DinoDetrForObject"):
        export_program(YolosForObjectDetection(YolosConfig(**sizes, image_size=[48, 64])))


@pytest.mark.parametrize(
    "settings",
    [SWIN, BIT, {**BIT, "global_padding": "same"}, FOCALNET, {**FOCALNET, "use_conv_embed": False}],
    ids=["swin", "bit", "bit padded", "focalnet", "focalnet without overlap"],
)
def test_padding_without_a_question_changes_nothing_and_leaves_no_trace(settings):
    torch.manual_seed(0)
    config = tiny_config(backbone_config=dict(settings)).backbone_config
    backbone = AutoBackbone.from_config(config, attn_implementation="eager").eval()
    attributes = [set(vars(module)) for module in backbone.modules()]
    with torch.no_grad():
        for height, width in ((96, 144), (91, 77), (48, 50)):
            pixels = torch.randn(2, 3, height, width)
            expected = backbone(pixels).feature_maps
            with any_size(backbone):
                assert [set(vars(module)) for module in backbone.modules()] != attributes
                found = backbone(pixels).feature_maps
            assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))
    assert [set(vars(module)) for module in backbone.modules()] == attributes


@pytest.mark.parametrize(("inner", "module"), [(VITDET, modeling_vitdet), (DINOV3, modeling_dinov3_vit)])
def test_positions_of_a_vision_transformer_are_the_same_in_a_graph(inner, module):
    backbone = AutoBackbone.from_config(AutoConfig.for_model(**pyramid_on(inner)))
    backbone = randomize(backbone, 0.1).eval()
    before = dict(vars(module))
    with torch.no_grad():
        for height, width in ((96, 144), (91, 77), (64, 64)):  # 64 x 64: the image size of this ViTDet
            pixels = torch.randn(2, 3, height, width)
            expected = backbone(pixels).feature_maps
            with any_size(backbone):
                assert vars(module) != before
                found = backbone(pixels).feature_maps
            assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))
    assert vars(module) == before


def test_onnx_runtime_agrees_with_the_model_on_any_batch(exported):
    model = OnnxModel(exported.report.path)

    def run(pixel_values, pixel_mask):
        outputs = model(pixel_values, pixel_mask)
        return outputs.logits, outputs.pred_boxes

    # also where the coarsest map has one row, which the program of torch.export does not take
    assert_same(exported.model.eval(), run, (*SIZES, (2, 32, 150)))


def test_a_missing_mask_is_a_whole_image(exported):
    model, (pixels, _) = OnnxModel(exported.report.path), padded_batch(2, 70, 90)
    mask = torch.ones(2, 70, 90, dtype=torch.bool)
    assert torch.equal(model(pixels).logits, model(pixels, mask).logits)


def test_the_file_has_plain_operators_and_explains_itself(exported):
    file = onnx.load(exported.report.path)
    onnx.checker.check_model(file, full_check=True)
    assert {(entry.domain, entry.version) for entry in file.opset_import} == {("", 18)}
    operators = {node.op_type for node in file.graph.node}
    assert not operators & {"GridSample", "Loop", "If", "Scan", "SplitToSequence", "SequenceAt"}
    assert "Gather" in operators
    assert not file.functions
    shapes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*file.graph.input, *file.graph.output)
    }
    assert shapes == {
        "pixel_values": ["batch", 3, "height", "width"],
        "pixel_mask": ["batch", "height", "width"],
        "logits": ["batch", 15, 5],
        "pred_boxes": ["batch", 15, 4],
    }
    assert all(value.doc_string for value in (*file.graph.input, *file.graph.output))
    metadata = {entry.key: json.loads(entry.value) for entry in file.metadata_props}
    processor = metadata.pop("image_processor")
    assert metadata == {
        "model": "model",
        "id2label": {str(index): name for index, name in NAMES.items()},
        "category_ids": CATEGORY_IDS,
    }
    assert processor["size"] == {"shortest_edge": 72, "longest_edge": 120}
    assert processor["image_mean"] == pytest.approx([0.485, 0.456, 0.406])
    # nothing of the machine that it was written on
    for path in (exported.folder, Path(torch.__file__).parent):
        assert str(path).encode() not in exported.report.path.read_bytes()


def test_the_metadata_have_nms_and_canvas_of_the_image_processor():
    nms = {"method": "soft", "iou_threshold": 0.8}
    processor = DinoDetrImageProcessor(size={"shortest_edge": 72, "longest_edge": 72}, canvas_value=114, nms=nms)
    metadata = make_metadata(Predictor(toy_detector()[0], processor), "toy")
    saved = json.loads(metadata["image_processor"])
    assert (saved["nms"], saved["canvas_value"], saved["size"]["longest_edge"]) == (nms, 114, 72)
    assert "score_threshold" not in metadata


def test_the_metadata_have_the_score_thresholds():
    model, processor = toy_detector()
    model.config.set_thresholds(0.25, {"star": 0.1})
    metadata = make_metadata(Predictor(model, processor), "toy")
    assert json.loads(metadata["score_threshold"]) == 0.25
    assert json.loads(metadata["class_score_thresholds"]) == {"star": 0.1}


def test_the_report_tells_what_was_compared(exported):
    report = exported.report
    assert report[:4] == (exported.folder / "toy.onnx", report.path.stat().st_size, 18, "float32")
    assert report.difference.num_images == 3
    assert report.difference.num_detections >= 3 * 10
    assert 0 < max(report.difference[:2]) < 1e-5  # float32: the same sums in another order
    assert report.ap[0] == report.ap[1]
    assert {path.name for path in exported.folder.iterdir()} == {"model", "data", "toy.onnx"}


def test_given_images_and_a_given_model_are_used(exported, quick_export):
    pictures = [noise(90 + 7 * number, 70, number) for number in range(4)]
    processor = DinoDetrImageProcessor(size={"shortest_edge": 72, "longest_edge": 120})
    before = exported.model.dtype, exported.model.training
    report = quick_export(exported.model, images=pictures, image_processor=processor)
    assert report.difference.num_images == 4
    assert (exported.model.dtype, exported.model.training) == before


def test_an_image_processor_that_pads_nothing_is_no_hindrance(exported, quick_export):
    processor = DinoDetrImageProcessor(size={"shortest_edge": 72, "longest_edge": 120}, do_pad=False)
    assert quick_export(exported.model, image_processor=processor).difference.num_images == 3


def test_the_program_of_a_model_with_more_queries_has_all_of_them(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "torch")
    model = small_detector(num_queries=5, decoder_layers=1).eval()
    set_num_queries(model, 12)
    program = export_program(model)
    inputs = padded_batch(2, 65, 104)
    with torch.no_grad():
        expected, (logits, boxes) = model(*inputs), program.module()(*inputs)
    assert logits.shape[:2] == boxes.shape[:2] == (2, 12)
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-5)  # other orders of the same sums


def test_weights_that_do_not_fit_into_one_file_lie_beside_it(exported, monkeypatch, tmp_path):
    monkeypatch.setattr(onnx_file, "_MAX_BYTES", 10_000)
    onnx_file._save(onnx_ir.load(exported.report.path), tmp_path / "big.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"big.onnx", "big.onnx.data"}
    inputs = padded_batch(2, 70, 90)
    expected, found = (OnnxModel(path)(*inputs) for path in (exported.report.path, tmp_path / "big.onnx"))
    assert torch.equal(expected.logits, found.logits)


def test_a_file_is_onnx_whatever_its_name_ends_in(exported, tmp_path):
    onnx_file._save(onnx_ir.load(exported.report.path), tmp_path / "toy.json")
    onnx.checker.check_model(onnx.load_from_string((tmp_path / "toy.json").read_bytes()))


def test_what_onnx_runtime_cannot_run_is_an_error_in_one_sentence(exported, tmp_path):
    inputs = padded_batch(2, 16, 40)  # maps of 1 x 3, 1 x 2 and 1 x 1 cells, for 15 queries
    with pytest.raises(
        ValueError, match=r"^ONNX Runtime cannot run the file on 2 x 16 x 40 pixels\. .* each query: .*$"
    ):
        OnnxModel(exported.report.path)(*inputs)
    (tmp_path / "no.onnx").write_text("no graph")
    with pytest.raises(ValueError, match=r"^ONNX Runtime cannot load no.onnx: .*$"):
        OnnxModel(tmp_path / "no.onnx")


def test_what_the_exporter_cannot_write_is_an_error_in_one_sentence(monkeypatch, tmp_path):
    def fail(*args, **settings):
        raise torch.onnx.OnnxExporterError("Failed.\nNext steps") from ValueError("Cannot view this.\nTraceback")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ValueError, match=r"^The graph cannot be written as ONNX: Cannot view this\.$"):
        onnx_file.write_onnx(None, tmp_path / "x.onnx", 18, {})


NAMES_OF_MODELS = {
    "owner/name": "owner/name",
    "name": "name",
    "/home/somebody/secret/gone": "gone",
    "~/secret/gone": "gone",
    "./secret/gone": "gone",
    "secret/gone/checkpoint-7": "checkpoint-7",
    "~": "home",
}


@pytest.mark.parametrize(("name", "expected"), NAMES_OF_MODELS.items())
def test_a_file_does_not_tell_where_its_model_lay(monkeypatch, name, expected):
    monkeypatch.setenv("HOME", "/somewhere/home")
    assert onnx_file._public_name(name) == expected


def test_the_folder_that_one_is_in_has_a_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert onnx_file._public_name(".") == tmp_path.name


def test_a_file_that_differs_is_not_written_and_what_was_there_stays(exported, quick_export, tmp_path):
    other = excite(small_detector(), 0.2)
    processor = DinoDetrImageProcessor(size={"shortest_edge": 72, "longest_edge": 120})
    old = tmp_path / "out.onnx"
    old.write_text("old")
    with pytest.raises(
        ValueError, match=r"out.onnx was not written: it differs from the model by .* 0.01 is allowed\."
    ):
        quick_export(other, image_processor=processor, overwrite=True)
    assert old.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]
    report = quick_export(other, image_processor=processor, overwrite=True, tolerance=9.0)
    assert old.read_bytes() == exported.report.path.read_bytes()
    assert report.tolerance == 9


def test_an_ap_that_differs_is_refused(exported, quick_export, monkeypatch, tmp_path):
    import dino_hf.evaluation

    class Evaluated(NamedTuple):
        metrics: dict

    def evaluate_model(predictor, data, **settings):
        return Evaluated({"AP": 0.503 if predictor.name.endswith("as ONNX") else 0.5})

    monkeypatch.setattr(dino_hf.evaluation, "evaluate_model", evaluate_model)
    data = exported.folder / "data"
    with pytest.raises(
        ValueError, match=r"its AP is 0.5030, the AP of the model is 0.5000. The allowed difference is 0.001"
    ):
        quick_export(data=data)
    assert not list(tmp_path.iterdir())
    assert quick_export(data=data, ap_tolerance=0.0031).ap == (0.5, 0.503)


def test_data_without_objects_confirm_nothing(exported, quick_export, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(exported.folder / "data", data)
    annotations = data / "validation" / "annotations.json"
    annotations.write_text(json.dumps(json.loads(annotations.read_text()) | {"annotations": []}))
    with pytest.raises(ValueError, match="has no objects, so there is no AP to compare; give other data, or none"):
        quick_export(data=data)
    assert not (tmp_path / "out.onnx").exists()


def test_old_weights_beside_an_overwritten_file_go_with_it(quick_export, tmp_path):
    (tmp_path / "out.onnx.data").write_text("old")
    with pytest.raises(FileExistsError, match=r"out.onnx.data exists; choose another name, or replace it with --overw"):
        quick_export()
    quick_export(overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]


def test_nothing_of_the_users_is_in_the_way(exported, quick_export, monkeypatch, tmp_path):
    (tmp_path / "out.onnx").symlink_to("nowhere.onnx")
    with pytest.raises(FileExistsError, match=r"out.onnx exists; choose another name"):
        quick_export()
    (tmp_path / "other.onnx.data").mkdir()
    with pytest.raises(IsADirectoryError, match=r"other.onnx.data is a folder; give the name of a file"):
        quick_export(output="other.onnx", overwrite=True)
    shutil.copytree(exported.folder / "model", tmp_path / "model")
    with pytest.raises(FileExistsError, match=r"model.safetensors is a file of the model itself; choose another name"):
        quick_export("model", "model/model.safetensors", overwrite=True)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        FileExistsError, match=r"notes.txt exists, and --overwrite replaces only .onnx files; choose another"
    ):
        quick_export(output="notes.txt", overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "notes.txt").unlink()
    (tmp_path / "clip.mp4").write_text("no picture")
    with pytest.raises(ValueError, match="There is no image among the sources"):
        quick_export(output="new.onnx", images="clip.mp4")
    assert {path.name for path in tmp_path.iterdir()} == {"out.onnx", "other.onnx.data", "model", "clip.mp4"}


WRONG = {
    "opset": ({"opset": 17}, ValueError, "opset=17 must be one of 18 to 23"),
    "dtype": ({"dtype": "bfloat16"}, ValueError, "dtype='bfloat16' must be float32 or float16"),
    "tolerance": ({"tolerance": -1.0}, ValueError, "tolerance=-1.0 must be at least 0"),
    "AP": ({"ap_tolerance": float("nan")}, ValueError, "ap_tolerance=nan must be at least 0"),
    "no bound": ({"tolerance": float("inf")}, ValueError, "tolerance=inf must be at least 0 and finite"),
    "no data": ({"ap_tolerance": 0.1}, ValueError, "ap_tolerance and box_format need annotated images"),
    "no user": ({"output": "~no_such_user/x.onnx"}, ValueError, "~no_such_user is not a home folder of this machine"),
    "no detector": ({"model": torch.nn.Identity()}, ValueError, "A Identity cannot be exported, only a DinoDetrFor"),
    "folder": ({"output": "."}, IsADirectoryError, "is a folder; give the name of a file in it"),
    "no place": ({"output": "/dev/null/x.onnx"}, FileExistsError, "/dev/null is not a folder; choose another place"),
    "model": ({"model": "./nothing"}, FileNotFoundError, "There is no folder ./nothing"),
    "images": ({"images": "nothing.jpg"}, FileNotFoundError, "nothing.jpg"),
    "data": ({"data": ".", "split": "dev"}, ValueError, "split='dev' must be one of train, validation, test"),
}


@pytest.mark.parametrize(("settings", "kind", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_done_is_refused_before_anything_is(quick_export, tmp_path, settings, kind, message):
    with pytest.raises(kind, match=message):
        quick_export(**settings)
    assert not list(tmp_path.iterdir())


def test_an_image_that_cannot_be_read_is_named(quick_export, tmp_path):
    (tmp_path / "broken.png").write_text("no image")
    with pytest.raises(ValueError, match=r"broken.png cannot be read: "):
        quick_export(images="broken.png")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.png"]


def test_a_detector_of_another_kind_is_refused(quick_export, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    YolosForObjectDetection(YolosConfig(**sizes, image_size=[48, 64])).save_pretrained(tmp_path / "yolos")
    YolosImageProcessor(size={"height": 48, "width": 64}).save_pretrained(tmp_path / "yolos")
    with pytest.raises(ValueError, match="yolos is a model of type 'yolos'; only 'dino_detr' can be exported"):
        quick_export(tmp_path / "yolos")


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named_with_its_cure(quick_export, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ImportError, match=re.escape(f"{package} is not installed, but ONNX files need it: {install_command('onnx')}.")
    ):
        quick_export()


@pytest.mark.parametrize(("width", "height"), [(110, 84), (100, 91), (60, 199)])
def test_the_documentation_runs_a_file_without_torch_and_finds_the_same(
    exported, monkeypatch, tmp_path, capsys, width, height
):
    text = (Path(__file__).parents[1] / "docs" / "export.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "InferenceSession" in block)
    assert "torch" not in code.replace("onnxruntime", "")
    monkeypatch.chdir(tmp_path)
    shutil.copy(exported.report.path, "detector.onnx")
    image, lying = noise(width, height), Image.Exif()
    lying[ExifTags.Base.Orientation] = 6  # as phones do: to be turned to stand upright
    image.transpose(Image.Transpose.ROTATE_90).save("photo.jpg", quality=100, subsampling=0, exif=lying)
    names = {}
    exec(code.replace("> 0.5)", "> 0.0)"), names)
    picture = read_image(Path("photo.jpg"))
    processor = DinoDetrImageProcessor(size={"shortest_edge": 72, "longest_edge": 120})
    assert names["pixel_values"].shape == processor([picture], return_tensors="pt")["pixel_values"].shape
    lines = [line.rsplit(maxsplit=5) for line in capsys.readouterr().out.splitlines()]
    (found,) = Predictor(exported.folder / "model", device="cpu")([picture])
    assert len(lines) == len(found.scores) == 15 * 5
    assert {name for name, *_ in lines} == set(NAMES.values())
    numbers = np.array([line[1:] for line in lines], dtype=float)
    # scores are printed with two digits, and the image is resized by another library, with other roundings to 8 bits
    np.testing.assert_allclose(numbers[:, 0], found.scores, atol=0.02)
    best = [tuple(box) for box in found.boxes[:10]]
    assert all(np.abs(numbers[:, 1:] - box).max(1).min() < 0.04 * max(width, height) for box in best)


def test_zeros_before_a_maximum_stay_zeros_in_onnx_runtime(tmp_path):
    """Its optimiser merges a `Pad` and a `MaxPool`, and pads with less than any number then."""
    torch.manual_seed(0)
    stem = AutoBackbone.from_config(tiny_config(backbone_config=dict(BIT)).backbone_config).eval().bit.embedder
    pixels = torch.randn(2, 3, 22, 30)
    with torch.no_grad(), any_size(stem):
        program = torch.export.export(stem, (pixels,))
        expected = stem(pixels)
    assert (expected == 0).any()  # where all neighbours within the image are negative
    with onnx_file._quiet():
        torch.onnx.export(program, dynamo=True, optimize=False, verbose=False).save(tmp_path / "stem.onnx")
    session = OnnxModel(tmp_path / "stem.onnx").session
    (found,) = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
    # float32: the same sums in another order, of up to 147 products
    np.testing.assert_allclose(found, expected, atol=1e-4)


class SwinLayerOfMaps(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, maps):
        return self.layer(maps.flatten(1, 2), maps.shape[1:3], always_partition=True)[0]


def test_attention_in_the_windows_of_a_swin_can_be_written(tmp_path):
    """That of PyTorch is traced with a view that the exporter of ONNX refuses."""
    torch.manual_seed(0)
    backbone = AutoBackbone.from_config(tiny_config(backbone_config=dict(SWIN)).backbone_config).eval()
    layer = SwinLayerOfMaps(backbone.swin.encoder.layers[1].blocks[0])
    axes = dict.fromkeys(range(3), torch.export.Dim.DYNAMIC)
    maps = torch.randn(2, 4, 10, 16)
    with torch.no_grad():
        with any_size(backbone):
            program = torch.export.export(
                layer,
                (torch.randn(2, 7, 11, 16),),
                dynamic_shapes=(axes,),
                prefer_deferred_runtime_asserts_over_guards=True,
            )
        assert backbone.config._attn_implementation == "sdpa"
        expected = layer(maps)
    with onnx_file._quiet():
        torch.onnx.export(program, dynamo=True, optimize=False, verbose=False).save(tmp_path / "layer.onnx")
    session = OnnxModel(tmp_path / "layer.onnx").session
    (found,) = session.run(None, {session.get_inputs()[0].name: maps.numpy()})
    # float32: the same sums in another order
    np.testing.assert_allclose(found, expected, atol=1e-5)


SMALL_SIZES = (1, 96, 128), (3, 121, 117), (2, 105, 210), (1, 168, 112)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [SWIN, CONVNEXT, {**BIT, "global_padding": "same"}, INTERNIMAGE, FOCALNET],
    ids=["swin", "convnext", "bit", "internimage", "focalnet"],
)
def test_every_backbone_is_exported_for_all_sizes(settings, tmp_path):
    model = small_detector(backbone_config=settings, num_feature_levels=2, decoder_layers=1)
    program = export_program(model)
    assert_same(model, program.module(), SMALL_SIZES)
    onnx_file.write_onnx(program, tmp_path / "toy.onnx", 18, {})
    onnx_model = OnnxModel(tmp_path / "toy.onnx")

    def run_file(pixel_values, pixel_mask):
        outputs = onnx_model(pixel_values, pixel_mask)
        return outputs.logits, outputs.pred_boxes

    assert_same(model, run_file, SMALL_SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("inner", [VITDET, DINOV3], ids=["vitdet", "dinov3"])
def test_programs_of_pyramids_take_all_sizes(inner):
    # The maps "stage3" and "stage4" have strides of 16 and 32, so that the images can be small.
    settings = pyramid_on(inner, scale_factors=[4, 2, 1, 0.5], add_pooled_level=False)
    model = small_detector(backbone_config=settings, num_feature_levels=2, decoder_layers=1)
    assert_same(model, export_program(model).module(), SMALL_SIZES)


@pytest.mark.slow
def test_a_graph_that_holds_for_some_sizes_only_is_refused(monkeypatch):
    model = small_detector(num_feature_levels=2, decoder_layers=1)
    project = model.model.backbone.project

    def different_for_odd_widths(features):
        return project([level if features[0].shape[-1] % 2 else level + 1 for level in features])

    monkeypatch.setattr(model.model.backbone, "project", different_for_odd_widths)
    with pytest.raises(ValueError, match=r"ResNetBackbone of this configuration cannot be .* any size: the program"):
        export_program(model)


@pytest.mark.slow
def test_another_precision_and_opset(exported, tmp_path):
    report = export_onnx(exported.folder / "model", tmp_path / "toy.onnx", dtype="float16", opset=23)
    assert report[2:4] == (23, "float16")
    file = onnx.load(report.path)
    assert {(entry.domain, entry.version) for entry in file.opset_import} == {("", 23)}
    assert report.num_bytes < 0.75 * exported.report.num_bytes
    onnx_model = OnnxModel(report.path)
    for size in SIZES:
        outputs = onnx_model(*padded_batch(*size))
        assert outputs.logits.isfinite().all()
        assert outputs.pred_boxes.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused_before_the_model_is_traced(value, tmp_path):
    model = small_detector()
    with torch.no_grad():
        model.model.encoder.layers[0].mlp.fc1.weight[1, 2] = value
    model.name_or_path = "diverged"
    message = (
        r"diverged is not exported: its weight model\.encoder\.layers\.0\.mlp\.fc1\.weight has values that are NaN"
    )
    with pytest.raises(ValueError, match=message):
        export_onnx(model, tmp_path / "a.onnx", image_processor=DinoDetrImageProcessor())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", [0, 1])
def test_outputs_that_are_no_numbers_are_not_equal_to_anything(value, part):
    """Large weights that are finite can overflow: a model of NaN must not be exported as one that agrees."""
    outputs = [torch.rand(2, 5, 3), torch.rand(2, 5, 4)]
    damaged = [one.clone() for one in outputs]
    damaged[part][1, 2, 0] = value
    with pytest.raises(ValueError, match="The model returns NaN or infinite values, so it cannot be compared"):
        compare_predictions(damaged, damaged)
    difference = compare_predictions(outputs, damaged)
    if part == 0 and value == float("inf"):
        assert difference.score > 0
    else:
        assert max(difference.score, difference.box) > 0.25
