"""Differences between the image processors of DINO and Deformable DETR, for both image backends."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import ImageType, SizeDict, get_image_type
from transformers.utils import logging

from .canvas import check_canvas, fit_canvas, place_on_canvas
from .config_checks import is_number
from .nms import read_nms
from .post_processing_mixin import PostProcessingMixin
from .sharing import CarriesCode, is_shipped

_LONGEST_SIDE = 16_384
_MOST_PIXELS = 10**8  # 1.2 GB for each image
_ABOVE_WHITE = 1.01  # resizing may give values slightly above 1

logger = logging.get_logger(__name__)


class DinoDetrProcessingMixin(PostProcessingMixin, CarriesCode):
    """Mixin for the library's image processors: checks of images, labels relative to the unpadded image, top 300 detections."""

    do_convert_rgb = True
    auto_map_entries = ("AutoImageProcessor",)
    # Reads the pixel statistics of a backbone by name. The installed package sets it (pretrained_backbones.py).
    pixel_reader = None

    def __init__(self, **settings):
        super().__init__(**settings)
        read_nms(self.nms)
        check_canvas(self.canvas_value, self.size, self.pad_size, self.do_pad)

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
        check_canvas(*map(kwargs.get, ("canvas_value", "size", "pad_size")))
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

    def _preprocess(self, images, annotations, return_segmentation_masks, masks_path, canvas_value=None, **settings):
        """As in the library. With `canvas_value`, each image is resized and placed on its canvas before normalisation."""
        if canvas_value is None:
            return super()._preprocess(images, annotations, return_segmentation_masks, masks_path, **settings)
        annotations = [annotations] if isinstance(annotations, dict) else annotations
        if annotations is not None and len(annotations) != len(images):
            raise ValueError(f"There are {len(images)} images, but {len(annotations)} annotations.")
        if return_segmentation_masks:
            raise ValueError("return_segmentation_masks is not possible with a canvas, because masks would not fit it.")
        samples = [
            self._on_canvas(image, annotation, masks_path, canvas_value, **settings)
            for image, annotation in zip(images, annotations or [None] * len(images), strict=True)
        ]
        images = [image for image, _ in samples]
        batch = super()._preprocess(images, None, None, None, **settings | {"do_resize": False, "do_pad": False})
        if annotations is not None:
            tensor_type = settings["return_tensors"]
            batch["labels"] = [BatchFeature(annotation, tensor_type=tensor_type) for _, annotation in samples]
        return batch

    def _on_canvas(self, image, annotation, masks_path, value, *, do_resize, size, resample, format, **settings):
        """Place an image on its canvas, and make labels of its annotation, with boxes relative to the canvas."""
        side, original = size.longest_edge, tuple(image.shape[-2:])
        if annotation is not None:
            annotation = self.prepare_annotation(image, annotation, format, False, masks_path)
        resized = fit_canvas(*original, side) if do_resize else original
        if do_resize:
            image = self.resize(image, SizeDict(height=resized[0], width=resized[1]), resample=resample)
        is_rescaled = not settings["do_rescale"] and "float" in str(image.dtype)
        if is_rescaled and max(_as_list(settings["image_mean"])) <= 1:
            value *= settings["rescale_factor"]  # the image has values in [0, 1]
        image = place_on_canvas(image, side, value)
        if annotation is not None:
            annotation = self.resize_annotation(annotation, original, resized) | {"size": (side, side)}
            if settings["do_convert_annotations"]:
                annotation = self.normalize_annotation(annotation, (side, side))
        return image, annotation

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
