"""Export a detector to an ONNX file, and compare the file with the detector."""

import copy
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ..common.output_folders import check_output_file, scratch_folder
from ..common.paths import expand_home
from ..common.scenes import draw_scene
from ..common.text import size_text
from ..common.tiles import NO_TILES
from ..inference.loading import DTYPES, load_detector, load_image_processor
from ..inference.predictor import Predictor
from ..inference.sources import Failure, Picture, Source, find_sources, read_sources
from ..model.configuration_dino_detr import DinoDetrConfig
from ..model.image_processing_mixin import pad_images
from ..model.modeling_dino_detr import DinoDetrForObjectDetection
from .comparison import TOLERANCES, Difference, check_difference, compare_predictions
from .graph import export_program
from .onnx_file import OPSETS, OnnxModel, import_onnx, make_metadata, write_onnx

# Largest difference of AP, in [0, 1], in both directions. Scores that differ in the last bit can swap two detections. Half
# precision moves boxes across the thresholds of IoU.
AP_TOLERANCES = {torch.float32: 0.001, torch.float16: 0.005}
_NUM_SCENES = 3


class ExportReport(NamedTuple):
    """The written file, and its differences from the model."""

    path: Path
    num_bytes: int
    opset: int
    dtype: str
    difference: Difference
    tolerance: float
    ap: tuple[float, float] | None  # AP of the model and of the file, in [0, 1]; None without data

    def __repr__(self) -> str:
        size, difference = size_text(self.num_bytes), self.difference
        return (
            f"ExportReport({str(self.path)!r:.200}: {size}, {self.dtype}, opset {self.opset}; scores differ by at most "
            f"{difference.score:.1g}, boxes by {difference.box:.1g})"
        )


def export_onnx(
    model: str | Path | DinoDetrForObjectDetection,
    output: str | Path,
    *,
    opset: int = 18,
    dtype: str | torch.dtype = "float32",
    images: Any = None,
    data: Any = None,
    split: str = "validation",
    box_format: str | None = None,
    allow_outside: bool = False,
    trust_boxes: bool = False,
    tolerance: float | None = None,
    ap_tolerance: float | None = None,
    overwrite: bool = False,
    image_processor=None,
    say: Callable[[str], None] | None = None,
) -> ExportReport:
    """Write a detector as an ONNX file for batches and images of any size, if ONNX Runtime gives the same detections.

        dino_hf.export_onnx("my-detector", "my-detector.onnx", images="photos", data="my-data")

    The file has the same inputs and outputs as `export_program`. Its metadata hold labels, category ids and the settings of the
    image processor. The file gets its name only if it passes the comparison.

    Args:
        model: folder, name of a published checkpoint, or id on the Hub of a DINO detector; or the model itself, which is not
            changed.
        opset: ONNX opset, 18 to 23. More runtimes read older opsets.
        dtype: dtype of the weights, "float32" or "float16". Inputs and outputs are float32 in both cases.
        images: files, folders or PIL images for the comparison. None: drawn scenes. The first image is run alone, the others in
            pairs, padded to a common size.
        data, split, box_format, allow_outside, trust_boxes: annotated images, as for `dino_hf.evaluate`, to compare the AP of model
            and file.
        tolerance: largest allowed difference of a score, and of a box as a part of the image's side. Detections with scores from
            0.3 are compared, and at least the 10 best of an image. None: 0.01 in float32, 0.25 in float16.
        ap_tolerance: largest allowed difference of AP, in [0, 1]. None: 0.001 in float32, 0.005 in float16.
        overwrite: replace an existing file.
        image_processor: image processor of a given model. None: the processor saved beside the model.
        say: called with a sentence before each stage.
    Raises:
        ValueError: an argument is wrong, the model cannot be exported, or the file differs too much.
        FileExistsError, FileNotFoundError, OSError, ImportError: the message is one sentence with the reason.
    """
    import_onnx()
    say, output = say or _silent, expand_home(output)
    dtype = _check_settings(opset, dtype, tolerance, ap_tolerance)
    if data is None and (ap_tolerance is not None or box_format is not None):
        raise ValueError("ap_tolerance and box_format need annotated images; give them as data (--data).")
    _check_output(output, overwrite, model)
    sources = None if images is None else _find_images(images)
    predictor, name = _load(model, image_processor)
    evaluation_data = None
    if data is not None:
        from ..evaluation import load_split
        from ..evaluation.classes import map_classes

        # The two APs are only compared with each other, so training images are allowed.
        reading = {"allow_outside": allow_outside, "trust_boxes": trust_boxes, "allow_trained": True, "log": False}
        evaluation_data, notes = load_split(data, split, box_format, [predictor.model], **reading)
        for note in notes:
            say(note)
        map_classes(predictor.id2label, predictor.category_ids, evaluation_data, name)
    _check_weights(predictor.model, name)
    tolerance = TOLERANCES[dtype] if tolerance is None else tolerance
    ap_tolerance = AP_TOLERANCES[dtype] if ap_tolerance is None else ap_tolerance

    say("Tracing the model.")
    program = export_program(predictor.model if dtype == torch.float32 else copy.deepcopy(predictor.model).to(dtype))
    # A folder, because there may be two files. It is beside the output, so that the files can be renamed to their places.
    with scratch_folder(output) as folder:
        say("Writing the graph.")
        draft = folder / output.name
        write_onnx(program, draft, opset, make_metadata(predictor, name))
        del program
        exported = copy.copy(predictor)
        exported.model, exported.name = OnnxModel(draft), f"{name} as ONNX"
        say("Comparing detections.")
        difference = _compare(predictor, exported, _pictures(sources))
        check_difference(difference, tolerance, f"{output.name} was not written: it")
        ap = None
        if evaluation_data is not None:
            ap = _compare_ap(predictor, exported, evaluation_data, ap_tolerance, output.name, say)
        num_bytes = sum(file.stat().st_size for file in folder.iterdir())
        _move(folder, output)
    dtype_name = str(dtype).removeprefix("torch.")
    return ExportReport(output, num_bytes, opset, dtype_name, difference, tolerance, ap)


def _silent(text: str) -> None:
    pass


def _check_settings(
    opset: int, dtype: str | torch.dtype, tolerance: float | None, ap_tolerance: float | None
) -> torch.dtype:
    if opset not in OPSETS:
        raise ValueError(f"opset={opset} must be one of {OPSETS[0]} to {OPSETS[-1]}.")
    found = DTYPES.get(dtype, dtype)
    if found not in AP_TOLERANCES:
        raise ValueError(
            f"dtype={dtype!r} must be float32 or float16. The file is compared with the model on a CPU, where ONNX Runtime has "
            "no convolutions in other types."
        )
    for name, value in (("tolerance", tolerance), ("ap_tolerance", ap_tolerance)):
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name}={value} must be at least 0 and finite.")
    return found


def _check_output(output: Path, overwrite: bool, model: str | Path | DinoDetrForObjectDetection) -> None:
    """Check both files that may be written."""
    check_output_file(output, overwrite)
    check_output_file(_weights_of(output), overwrite)
    own_folder = expand_home(model).resolve() if isinstance(model, str | Path) else None
    if os.path.lexists(output) and output.suffix.lower() != ".onnx":
        if output.parent.resolve() == own_folder:
            raise FileExistsError(f"{output} is a file of the model itself; choose another name, such as model.onnx.")
        raise FileExistsError(
            f"{output} exists, and --overwrite replaces only .onnx files; choose another name, such as model.onnx."
        )


def _weights_of(output: Path) -> Path:
    return output.with_name(f"{output.name}.data")


def _move(folder: Path, output: Path) -> None:
    """Move the files in `folder` to their places. The weights go first, because a graph without them cannot be read."""
    names = sorted((file.name for file in folder.iterdir()), reverse=True)
    for name in names:
        os.replace(folder / name, output.parent / name)
    weights = _weights_of(output)
    if weights.name not in names:  # left by the overwritten file
        weights.unlink(missing_ok=True)


def _load(model: str | Path | DinoDetrForObjectDetection, image_processor) -> tuple[Predictor, str]:
    """A predictor on the CPU in float32, and the name of the model. A given model is copied."""
    if isinstance(model, DinoDetrForObjectDetection):
        name = model.name_or_path or type(model).__name__
        model = copy.deepcopy(model).to("cpu", torch.float32)
    elif not isinstance(model, str | Path):
        raise ValueError(
            f"A {type(model).__name__} cannot be exported, only a DinoDetrForObjectDetection, or its folder, name or id on the Hub."
        )
    else:
        name, model = str(model), load_detector(model)
        image_processor = load_image_processor(name) if image_processor is None else image_processor
    if model.config.model_type != DinoDetrConfig.model_type:
        raise ValueError(
            f"{name} is a model of type {model.config.model_type!r}; only {DinoDetrConfig.model_type!r} can be exported."
        )
    return Predictor(model, image_processor, device="cpu"), name


def _check_weights(model: DinoDetrForObjectDetection, name: str) -> None:
    """Raises ValueError if a weight is NaN or infinite."""
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(
                f"{name} is not exported: its weight {key} has values that are NaN or infinite. Training had diverged; use an "
                "earlier checkpoint."
            )


def _find_images(images: Any) -> list[Source]:
    """The given sources without videos.

    Raises:
        FileNotFoundError, ValueError: there is no image.
    """
    found = [source for source in find_sources(images) if source.kind == "image"]
    if not found:
        raise ValueError("There is no image among the sources; give images to compare on, or none to use drawn scenes.")
    return found


def _pictures(sources: list[Source] | None) -> Iterator[Image.Image]:
    """The given images, or drawn scenes of different sizes.

    Raises:
        ValueError: an image cannot be read.
    """
    if sources is None:
        for number in range(_NUM_SCENES):
            yield draw_scene(np.random.default_rng([0, number]))[0]
        return
    for item in read_sources(sources):
        if isinstance(item, Failure):
            raise ValueError(f"{item.source.name} cannot be read: {item.reason}")
        if isinstance(item, Picture):
            yield item.image


@torch.inference_mode()
def _compare(predictor: Predictor, exported: Predictor, pictures: Iterator[Image.Image]) -> Difference:
    difference = Difference(0.0, 0.0, 0, 0)
    for batch in _batches(pictures):
        prepared = [predictor.image_processor(images=[image.convert("RGB")], return_tensors="pt") for image in batch]
        has_masks = "pixel_mask" in prepared[0]  # not with do_pad=False
        masks = [image["pixel_mask"][0] for image in prepared] if has_masks else None
        inputs = pad_images([image["pixel_values"][0] for image in prepared], masks)
        expected, found = predictor.model(*inputs), exported.model(*inputs)
        difference += compare_predictions((expected.logits, expected.pred_boxes), (found.logits, found.pred_boxes))
    return difference


def _batches(pictures: Iterator[Image.Image]) -> Iterator[list[Image.Image]]:
    """The first image alone, then pairs: a batch of one, and batches with padding."""
    batch, size = [], 1
    for image in pictures:
        batch.append(image)
        if len(batch) == size:
            yield batch
            batch, size = [], 2
    if batch:
        yield batch


def _compare_ap(
    predictor: Predictor, exported: Predictor, data, tolerance: float, name: str, say: Callable[[str], None]
) -> tuple[float, float]:
    """Compare the AP of the model and of the file.

    Returns:
        both APs, in [0, 1].
    Raises:
        ValueError: they differ by more than `tolerance`, or there are no objects.
    """
    from ..evaluation import evaluate_model

    ap, settings = [], {"num_bootstrap": 0, "tiles": NO_TILES, "check_trained": False}
    for detector in (predictor, exported):
        say(f"Evaluating {detector.name} on {len(data.dataset)} images.")
        ap.append(evaluate_model(detector, data, batch_size=1, **settings).metrics["AP"])
        if ap[0] < 0:  # COCO's -1
            raise ValueError(f"{data.name} has no objects, so there is no AP to compare; give other data, or none.")
    if abs(ap[0] - ap[1]) > tolerance:
        raise ValueError(
            f"{name} was not written: its AP is {ap[1]:.4f}, the AP of the model is {ap[0]:.4f}. The allowed difference is "
            f"{tolerance:g}."
        )
    return ap[0], ap[1]
