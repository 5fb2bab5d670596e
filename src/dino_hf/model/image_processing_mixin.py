"""Differences between the image processors of DINO and Deformable DETR, for both image backends."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import ImageType, SizeDict, get_image_type
from transformers.utils import logging

from .box_ops import cxcywh_to_xyxy
from .config_checks import is_number
from .nms import NmsSettings, read_nms, suppress
from .sharing import CarriesCode, is_shipped
from .targets import PADDING_LABEL

_LONGEST_SIDE = 16_384
_MOST_PIXELS = 10**8  # 1.2 GB for each image
_ABOVE_WHITE = 1.01  # resizing may give values slightly above 1

logger = logging.get_logger(__name__)


class DinoDetrProcessingMixin(CarriesCode):
    """Mixin for the library's image processors: checks of images, labels relative to the unpadded image, top 300 detections."""

    do_convert_rgb = True
    nms: dict | None = None  # non-maximum suppression of detections, see `read_nms`; None: none, as in DINO
    auto_map_entries = ("AutoImageProcessor",)
    # Reads the pixel statistics of a backbone by name. The installed package sets it (pretrained_backbones.py).
    pixel_reader = None

    def __init__(self, **settings):
        super().__init__(**settings)
        read_nms(self.nms)

    @classmethod
    def from_backbone(cls, name: str, **settings):
        """An image processor that normalises images as in the training of a backbone, otherwise with the default settings.

        Args:
            name: see `DinoDetrForObjectDetection.from_backbone`.
            settings: of the image processor. They take precedence.
        """
        if cls.pixel_reader is None:
            raise ImportError("Backbones are read by name only where dino_hf is installed: pip install dino_hf.")
        return cls(**cls.pixel_reader(name) | settings)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoImageProcessor"):
        """As in the library, but only for subclasses of users.

        The library calls this when it loads our code from a folder. It would then save only one of our two classes.
        """
        if not is_shipped(cls):
            super().register_for_auto_class(auto_class)

    def _validate_preprocess_kwargs(self, **kwargs):
        """As in the library, after checks of sizes and statistics, which may come from an untrusted preprocessor_config.json.

        Raises:
            ValueError: a side is not in [1, 16384] pixels, an image would have more than 10^8 pixels, mean or deviation are not
                one or three finite numbers, or a deviation is not positive.
        """
        for name in ("size", "pad_size", "crop_size"):
            _check_sides(name, dict(kwargs.get(name) or {}))
        for name in ("image_mean", "image_std"):
            _check_statistics(name, kwargs.get(name))
        read_nms(kwargs.get("nms"))
        factor = kwargs.get("rescale_factor")
        if factor is not None and not (is_number(factor) and factor > 0):
            raise ValueError(f"rescale_factor={factor!r:.50} must be a positive number; 1 / 255 for bytes.")
        return super()._validate_preprocess_kwargs(**kwargs)

    def process_image(self, image, *args, **kwargs):
        """As in the library, but images of more than 8 bits per channel raise an error: the library would clip or overflow them.

        Floating-point images in [0, 1] are not divided by 255 again. They and images in [0, 255] are rounded to bytes.

        Raises:
            ValueError: a PIL image has mode I, I;16 or F; or an array is empty or has NaN, infinity, or values outside [0, 1]
                after rescaling.
        """
        if get_image_type(image) == ImageType.PIL:
            if image.mode.startswith(("I", "F")):
                raise ValueError(_more_than_8_bits(f"mode {image.mode!r}"))
        elif kwargs.get("do_rescale") or kwargs.get("do_normalize"):
            image = self._checked_array(image, **kwargs)
        return super().process_image(image, *args, **kwargs)

    def _checked_array(self, image, do_rescale=None, rescale_factor=None, do_normalize=None, image_mean=None, **_):
        """Check an array and return it on the scale that `rescale_factor` maps to [0, 1]."""
        if 0 in image.shape:
            raise ValueError(f"An image has the shape {tuple(image.shape)} and no pixels.")
        is_bytes = str(image.dtype) in ("uint8", "torch.uint8")
        if is_bytes and do_rescale:
            return image
        numbers = image.float() if isinstance(image, Tensor) else image  # torch has no minimum for 16-bit integers
        lowest, highest = float(numbers.min()), float(numbers.max())
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            raise ValueError(
                "An image has values that are NaN or infinite; an image has 8 bits per channel, or floats in [0, 1]."
            )
        if not do_rescale:
            is_for_floats = image_mean is None or max(_as_list(image_mean)) <= 1  # other projects use means of bytes
            if do_normalize and is_for_floats and highest > _ABOVE_WHITE:
                raise ValueError(
                    f"An image has values up to {highest:g}, but with do_rescale=False they must lie in [0, 1]: pass "
                    "do_rescale=True, or divide by 255."
                )
            return image
        if highest * rescale_factor > _ABOVE_WHITE:
            raise ValueError(_more_than_8_bits(f"values up to {highest:g}"))
        if "float" not in str(image.dtype):
            return image
        if lowest < 0:
            raise ValueError(
                f"An image has values down to {lowest:g}; pass the image before normalisation, in [0, 255] or [0, 1], or pass "
                "do_rescale=False and do_normalize=False."
            )
        if 0 < highest <= 1:
            logger.warning_once(
                "Floating-point images with values in [0, 1] are not divided by 255 again. Pass do_rescale=False to silence this."
            )
            numbers = numbers / rescale_factor
        if not math.isclose(rescale_factor, 1 / 255):
            return numbers
        # Convert to bytes, because the backend on PIL can only resize bytes.
        if isinstance(image, Tensor):
            return numbers.round().clamp(0, 255).to(torch.uint8)
        return numbers.round().clip(0, 255).astype("uint8")

    def resize(self, image, size, *args, **kwargs):
        """As in the library, but each side keeps at least one pixel."""
        if size.shortest_edge and size.longest_edge:
            sides = get_size_with_aspect_ratio(image.shape[-2:], size.shortest_edge, size.longest_edge)
            size = SizeDict(height=max(1, sides[0]), width=max(1, sides[1]))
        return super().resize(image, size, *args, **kwargs)

    def pad(self, image, padded_size, annotation=None, update_bboxes=True, fill=0):
        """As in the library, but boxes and `size` in the annotation stay relative to the unpadded image.

        DINO's reference points and post-processing are relative to the unpadded image as well.
        """
        image, mask, padded = super().pad(image, padded_size, annotation=annotation, update_bboxes=False, fill=fill)
        if padded is not annotation:
            pairs = [(padded, annotation)] if isinstance(padded, dict) else zip(padded, annotation, strict=True)
            for after, before in pairs:
                after["size"] = before.get("size", tuple(image.shape[-2:]))
        return image, mask, padded

    def prepare_annotation(self, image, target, *args, **kwargs):
        """As in the library. A missing `area` becomes the area of the box, a missing `iscrowd` becomes 0."""
        if "annotations" in target:
            target = {**target, "annotations": [_complete(entry) for entry in target["annotations"]]}
        return super().prepare_annotation(image, target, *args, **kwargs)

    def top_detections(
        self,
        outputs,
        target_sizes: Tensor | Sequence[tuple[int, int]] | None = None,
        top_k: int = 300,
        nms: Mapping | bool | None = None,
    ) -> dict[str, Tensor]:
        """The best pairs of a query and a class, as tensors with one row per image, on the device of the outputs.

        The detections of an image are bit-for-bit independent of the other images in the batch.

        Args:
            outputs, target_sizes, top_k, nms: as in `post_process_object_detection`.
        Returns:
            `scores` (B, N) in [0, 1], highest first; `labels` (B, N) int64 in [0, K); `boxes` (B, N, 4) as (x0, y0, x1, y1),
            float32. N is top_k, or Q * K if that is less. Where non-maximum suppression leaves fewer detections, the last rows
            have the label -100, the score 0 and an empty box.
        Raises:
            ValueError: target_sizes is not one (height, width) per image, top_k is below 1, or nms is wrong.
        """
        logits, boxes = outputs.logits.float(), outputs.pred_boxes.float()
        if top_k < 1:
            raise ValueError(f"top_k={top_k} must be at least 1; a high threshold leaves detections out.")
        nms = read_nms(self.nms if nms is None else nms)
        num_queries, num_labels = logits.shape[1:]
        # Image by image: on a CPU, the last bit of a sigmoid depends on the position in the tensor, so also on the batch.
        scores = torch.stack([image.sigmoid() for image in logits.flatten(1)])  # (B, Q * K)
        num_kept = min(top_k, scores.shape[1])
        num_candidates = num_kept if nms is None else min(nms.candidates or num_queries, scores.shape[1])
        scores, index = scores.topk(num_candidates, dim=1)  # (B, N)
        labels = index % num_labels
        boxes = cxcywh_to_xyxy(boxes).gather(1, (index // num_labels)[..., None].expand(-1, -1, 4))  # (B, N, 4)
        if nms is not None:
            images = [_suppressed(nms, num_kept, *image) for image in zip(scores, labels, boxes, strict=True)]
            scores, labels, boxes = map(torch.stack, zip(*images, strict=True))
        if target_sizes is not None:
            height, width = _read_sizes(target_sizes, len(logits)).to(boxes.device).unbind(1)
            boxes = boxes * torch.stack([width, height, width, height], dim=1)[:, None]
        return {"scores": scores, "labels": labels, "boxes": boxes}

    def post_process_object_detection(
        self,
        outputs,
        threshold: float = 0.5,
        target_sizes: Tensor | Sequence[tuple[int, int]] | None = None,
        top_k: int = 300,
        config: PreTrainedConfig | None = None,
        nms: Mapping | bool | None = None,
    ) -> list[dict[str, Tensor | list[str]]]:
        """The best pairs of a query and a class, after non-maximum suppression if `nms` is set. DINO needs none.

        Args:
            outputs: with `logits` (B, Q, K) and `pred_boxes` (B, Q, 4).
            threshold: only detections with a higher score are returned; in [0, 1].
            target_sizes: (B, 2) tensor or B pairs of (height, width): the size that boxes are scaled to, usually the size of the
                original image. None: boxes stay in [0, 1].
            top_k: largest number of detections per image, at least 1. With non-maximum suppression there are at most as many as
                its `candidates`.
            config: configuration of the model; adds class names and category ids to the result.
            nms: non-maximum suppression, a dictionary with `method` and other fields of `NmsSettings`. It also clamps boxes to
                the image. None: the setting of this image processor. False: no suppression.
        Returns:
            for each image `scores` (N,) in [0, 1], highest first; `labels` (N,) in [0, K); `boxes` (N, 4) as
            (x0, y0, x1, y1), float32. With `config` also `text_labels`, a list of N names, and, if it has category ids,
            `category_ids` (N,), int64, as in the training annotations.
        Raises:
            ValueError: target_sizes is not one (height, width) per image, top_k is below 1, nms is wrong, or the number of classes
                differs between config and logits.
        """
        _check_classes(config, outputs.logits.shape[-1])
        detections = self.top_detections(outputs, target_sizes, top_k, nms)
        results = [
            {name: values[image, keep] for name, values in detections.items()}
            for image, keep in enumerate((detections["scores"] > threshold) & (detections["labels"] != PADDING_LABEL))
        ]
        if config is not None:
            category_ids = getattr(config, "category_ids", None)
            for result in results:
                labels = result["labels"].tolist()
                result["text_labels"] = [config.id2label[label] for label in labels]
                if category_ids is not None:
                    ids = [category_ids[label] for label in labels]
                    result["category_ids"] = torch.tensor(ids, dtype=torch.int64, device=result["labels"].device)
        return results


def pad_images(images: Sequence[Tensor], masks: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Join images of different sizes to a batch, padded with zeros at the right and bottom.

    Args:
        images: B tensors (3, h, w).
        masks: B tensors (h, w), 1 on the image; None if the images have no padding yet.
    Returns:
        pixel_values (B, 3, h, w) and pixel_mask (B, h, w), int64, 1 on the image.
    """
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    pixel_values = images[0].new_zeros(len(images), 3, height, width)
    pixel_mask = images[0].new_zeros(len(images), height, width, dtype=torch.int64)
    for index, image in enumerate(images):
        _, h, w = image.shape
        pixel_values[index, :, :h, :w] = image
        pixel_mask[index, :h, :w] = 1 if masks is None else masks[index]
    return pixel_values, pixel_mask


def _suppressed(
    nms: NmsSettings, num_rows: int, scores: Tensor, labels: Tensor, boxes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Detections of one image after non-maximum suppression, highest score first, filled up to `num_rows` rows.

    Args:
        scores, labels, boxes: (N,), (N,), (N, 4) corners relative to the image, highest score first.
    """
    clamped = boxes.clamp(0, 1)
    # Co-DINO clamps boxes to the image before soft NMS, Stable-DINO after hard NMS. The IoU of two boxes depends on it.
    kept, kept_scores = suppress(nms, scores, labels, clamped if nms.method == "soft" else boxes)
    count = min(len(kept), num_rows)
    rows = scores.new_zeros(num_rows), labels.new_full((num_rows,), PADDING_LABEL), boxes.new_zeros(num_rows, 4)
    for row, values in zip(rows, (kept_scores, labels[kept], clamped[kept]), strict=True):
        row[:count] = values[:count]
    return rows


def _check_sides(name: str, sides: dict) -> None:
    for side, value in sides.items():
        if value is not None and not (is_number(value) and 1 <= value <= _LONGEST_SIDE):
            raise ValueError(f"{name} has {side}={value!r:.50}; a side must lie in [1, {_LONGEST_SIDE}] pixels.")
    for pair in (("height", "width"), ("max_height", "max_width"), ("shortest_edge", "longest_edge")):
        first, second = map(sides.get, pair)
        if first and second and first * second > _MOST_PIXELS:
            raise ValueError(
                f"{name} has {pair[0]}={first} and {pair[1]}={second}: more than {_MOST_PIXELS} pixels together."
            )


def _check_statistics(name: str, value) -> None:
    if value is None:
        return
    numbers = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if isinstance(value, Sequence) and len(numbers) != 3:
        raise ValueError(f"{name}={value!r:.100} has {len(numbers)} numbers; give three, for red, green and blue.")
    if not all(map(is_number, numbers)):
        raise ValueError(f"{name}={value!r:.100} must be finite numbers.")
    if name == "image_std" and min(numbers) <= 0:
        raise ValueError(f"{name}={value!r:.100} must be positive: pixels are divided by it.")


def _more_than_8_bits(found: str) -> str:
    return (
        f"An image has {found}, but 8 bits per channel are expected. Convert it first; for `pipeline`, convert the file. For the "
        "full range of 16 bits: Image.fromarray((array / 257).astype('uint8'))."
    )


def _as_list(numbers: float | Sequence[float]) -> list[float]:
    return list(numbers) if isinstance(numbers, Sequence) else [numbers]


def _check_classes(config: PreTrainedConfig | None, num_labels: int) -> None:
    if config is None:
        return
    num_ids = num_labels if getattr(config, "category_ids", None) is None else len(config.category_ids)
    if config.num_labels != num_labels or num_ids != num_labels:
        found = f"names {config.num_labels} classes"
        if config.num_labels == num_labels:
            found = f"has {num_ids} category_ids"
        raise ValueError(
            f"The logits have {num_labels} classes, but the config {found}; pass the configuration of the same model, "
            "config=model.config."
        )


def _read_sizes(target_sizes: Tensor | Sequence, num_images: int) -> Tensor:
    """Convert a tensor, or a list of tuples or tensors, to (B, 2) float32."""
    try:
        sizes = torch.stack([torch.as_tensor(size, dtype=torch.float32, device="cpu") for size in target_sizes])
    except (TypeError, ValueError, RuntimeError):
        sizes = None
    if sizes is None or sizes.shape != (num_images, 2):
        found = f"are {target_sizes!r:.200}" if sizes is None else f"have the shape {tuple(sizes.shape)}"
        raise ValueError(f"target_sizes must be one (height, width) for each of {num_images} images, but {found}.")
    return sizes


def _complete(entry: dict) -> dict:
    if "bbox" not in entry or "category_id" not in entry:
        raise ValueError(
            f"An annotation has the keys {sorted(entry)}, but needs bbox, as (x, y, width, height) in pixels, and category_id."
        )
    try:
        x, y, width, height = map(float, entry["bbox"])
        is_box = all(map(math.isfinite, (x, y, width, height))) and width >= 0 and height >= 0
    except (TypeError, ValueError):
        is_box = False
    if not is_box:
        raise ValueError(f"An annotation has bbox={entry['bbox']}; it must be (x, y, width, height) in pixels.")
    known = {name: value for name, value in entry.items() if value is not None}
    return {"area": width * height, "iscrowd": 0, **known}
