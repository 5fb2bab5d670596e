"""Write a program of `torch.export` to an ONNX file with metadata, and run the file as a model."""

import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..common.installation import with_install_command
from ..common.paths import expand_home
from ..common.text import first_line
from ..inference.predictor import Predictor
from ..model.modeling_dino_detr import DinoDetrObjectDetectionOutput

OPSETS = range(18, 24)  # opsets that the exporter of torch writes or converts to
_MAX_BYTES = 2**31 - 2**24  # a protobuf file is limited to 2 GiB, and the graph needs space beside the weights
_PROCESSOR_SETTINGS = (
    "do_resize",
    "size",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_pad",
    "canvas_value",
    "nms",
)
_AXES = {
    "pixel_values": ("batch", 3, "height", "width"),
    "pixel_mask": ("batch", "height", "width"),
    "logits": ("batch", None, None),
    "pred_boxes": ("batch", None, None),
}
_TEXTS = {
    "pixel_values": "RGB images, resized, rescaled and normalised as the metadata's image_processor says, padded with zeros at the "
    "right and bottom. If image_processor has canvas_value, the images are padded with it to a square before normalisation",
    "pixel_mask": "1 on the image, 0 on padding; a canvas is 1 everywhere",
    "logits": "their sigmoid is the score of each class; the 300 best pairs of query and class are the detections, without "
    "non-maximum suppression unless image_processor has nms; there is no background class",
    "pred_boxes": "(centre x, centre y, width, height) in [0, 1] of the image without its padding, or of the whole canvas",
}


def import_onnx() -> ModuleType:
    """Import onnxruntime, and check that all packages for export are installed.

    Raises:
        ImportError: the message names the missing package and the command that installs it.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript
    except ImportError as error:
        raise with_install_command(error, (error.name or "").partition(".")[0], "ONNX files", "onnx") from error
    del onnx, onnxscript
    return onnxruntime


def write_onnx(program: ExportedProgram, path: Path, opset: int, metadata: dict[str, str]) -> None:
    """Write `path`, and `path`.data beside it if the weights do not fit into one file.

    Args:
        program: from `export_program`.
        opset: one of `OPSETS`.
    Raises:
        ValueError: the exporter of torch does not support an operator of the graph.
    """
    import onnx_ir
    import onnxscript.optimizer
    from onnx_ir.passes import common

    with _quiet():
        # The exporter's own optimiser takes minutes for a graph of this size, mostly for patterns that runtimes optimise anyway.
        # One of its rules (it merges two clips of one value) leaves a graph that does not load.
        try:
            exported = torch.onnx.export(program, dynamo=True, optimize=False, opset_version=opset, verbose=False)
        except torch.onnx.OnnxExporterError as error:
            cause = error.__cause__ or error  # the exporter wraps it in pages of advice
            raise ValueError(f"The graph cannot be written as ONNX: {first_line(cause)}") from error
        model = exported.model
        onnxscript.optimizer.fold_constants(model)
    for clean in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        common.ClearMetadataAndDocStringPass(),  # they hold paths of source files on this machine
    ):
        clean(model)
    _describe(model, onnx_ir, metadata)
    _save(model, path)


def _save(model, path: Path) -> None:
    import onnx_ir

    num_bytes = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    weights = f"{path.name}.data" if num_bytes > _MAX_BYTES else None
    onnx_ir.save(model, path, format="protobuf", external_data=weights)  # the format must not depend on the suffix


def _describe(model, onnx_ir: ModuleType, metadata: dict[str, str]) -> None:
    """Set the metadata, and the names and descriptions of inputs, outputs and their axes."""
    for node in model.graph:  # inner shapes are long formulas of numbered symbols; runtimes infer their own
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
    values = [*model.graph.inputs, *model.graph.outputs]
    for value, (name, axes) in zip(values, _AXES.items(), strict=True):
        value.name, value.doc_string = name, _TEXTS[name]
        value.metadata_props.clear()
        value.shape = onnx_ir.Shape(
            [known if axis is None else axis for axis, known in zip(axes, value.shape, strict=True)]
        )
    model.graph.name = "dino_detr"
    model.producer_name, model.producer_version = "dino_hf", version("dino_hf")
    model.metadata_props.update(metadata)


def make_metadata(predictor: Predictor, name: str) -> dict[str, str]:
    """Metadata that make the file usable alone, as JSON: labels, category ids, settings of the image processor."""
    settings = predictor.image_processor.to_dict()
    metadata = {
        "model": _public_name(name),
        "id2label": {str(index): label for index, label in predictor.id2label.items()},
        "image_processor": {key: settings[key] for key in _PROCESSOR_SETTINGS if key in settings},
    }
    if predictor.category_ids is not None:
        metadata["category_ids"] = list(predictor.category_ids)
    for name in ("score_threshold", "class_score_thresholds"):
        if (value := getattr(predictor.model.config, name, None)) is not None:
            metadata[name] = value
    return {key: json.dumps(value) for key, value in metadata.items()}


def _public_name(name: str) -> str:
    """The id of a model on the Hub. For a folder, only its last part, because paths of this machine are private."""
    is_id = name.count("/") < 2 and not name.startswith((".", "~", os.sep)) and not Path(name).exists()
    return name if is_id else Path(os.path.abspath(expand_home(name))).name


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings and logs about internals of the exporter, which users cannot change."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class OnnxModel:
    """Runs an ONNX file on the CPU as the model of a `Predictor`, with as many threads as torch."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, path: Path):
        onnxruntime = import_onnx()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # errors are raised as exceptions anyway; warnings are about performance
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # errors of ONNX Runtime have no common type
            raise ValueError(f"ONNX Runtime cannot load {path.name}: {first_line(error)}") from error

    def __call__(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> DinoDetrObjectDetectionOutput:
        if pixel_mask is None:
            batch, _, height, width = pixel_values.shape
            pixel_mask = torch.ones(batch, height, width)
        feed = {"pixel_values": pixel_values.float().numpy(), "pixel_mask": pixel_mask.long().numpy()}
        try:
            logits, boxes = self.session.run(["logits", "pred_boxes"], feed)
        except Exception as error:
            batch, _, height, width = pixel_values.shape
            raise ValueError(
                f"ONNX Runtime cannot run the file on {batch} x {height} x {width} pixels. All feature maps together must have a "
                f"cell for each query: {first_line(error)}"
            ) from error
        return DinoDetrObjectDetectionOutput(logits=torch.from_numpy(logits), pred_boxes=torch.from_numpy(boxes))
