"""Random augmentation of training images and their boxes, areas and crowd flags."""

import hashlib
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes, Image
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import IMAGENET_DEFAULT_MEAN

from ..common.values import is_number
from ..data.rows import SMALLEST_SIDE
from .own_augmentation import OwnAugmentation

_MEAN_COLOUR = [round(255 * value) for value in IMAGENET_DEFAULT_MEAN]  # becomes 0 when the image is normalised


@dataclass(frozen=True)
class Augmentation:
    """Random augmentation of a training image. The release and all DETR models use the defaults: a flip, and then with equal
    probability either a resize, or a resize, a crop and a resize.

    Resizing is bilinear with antialiasing on 8-bit pixels. Sides are rounded as in the image processor. An image that is only
    resized to a shortest side of 800 has the same pixels as the result of `DinoDetrImageProcessor`. (The PIL back end rounds
    differently.)

    Args:
        horizontal_flip: probability of a horizontal flip.
        short_sides: lengths of the shortest side in pixels, drawn with equal probability.
        longest_side: limit of the longest side in pixels. If it would be longer, the shortest side becomes shorter.
        crop: probability that the image is cropped before this resize. For a crop, its shortest side is resized to one of
            `crop_short_sides`, without a limit of the longest side. Then a rectangle is cut out.
        crop_short_sides: lengths of the shortest side before a crop in pixels, drawn with equal probability.
        crop_sizes: range of height and width of the rectangle in pixels. Both are drawn independently, and are at most the side
            of the image.
        scale_jitter: range of the scale of large-scale jitter (arXiv:2012.07177 uses 0.1 to 2.0), which replaces resize and crop.
            The image is resized to fit into a square of `jitter_size` times the scale. Then a square is cut out at a random
            position, or the image is placed at a random position in a square of ImageNet's mean colour. The model sees the whole
            square as image. On the canvas of an image processor, a smaller image is instead at the top left, and the rest has
            the value of the canvas, as in inference. None: no jitter.
        jitter_size: side of this square in pixels.
        photometric: probability that colours are distorted as in SSD (arXiv:1512.02325): brightness, contrast, saturation, hue and
            order of channels, each with probability 0.5.
    Raises:
        ValueError: a probability is not in [0, 1], or a size or range is invalid.
    """

    horizontal_flip: float = 0.5
    short_sides: tuple[int, ...] = tuple(range(480, 801, 32))
    longest_side: int = 1333
    crop: float = 0.5
    crop_short_sides: tuple[int, ...] = (400, 500, 600)
    crop_sizes: tuple[int, int] = (384, 600)
    scale_jitter: tuple[float, float] | None = None
    jitter_size: int = 1024
    photometric: float = 0.0

    def __post_init__(self):
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), list):  # read from JSON
                object.__setattr__(self, field.name, tuple(value))
        for name in ("horizontal_flip", "crop", "photometric"):
            if not is_number(value := getattr(self, name)) or not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r} must be a probability, a number in [0, 1].")
        for name in ("short_sides", "crop_short_sides"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not value or not all(map(_is_size, value)):
                raise ValueError(f"{name}={value!r} must be a tuple of numbers of pixels, each an int of at least 1.")
        for name in ("longest_side", "jitter_size"):
            if not _is_size(value := getattr(self, name)):
                raise ValueError(f"{name}={value!r} must be a number of pixels, an int of at least 1.")
        if self.longest_side < max(self.short_sides):
            raise ValueError(
                f"longest_side={self.longest_side} is below the largest of short_sides={self.short_sides}, so no image could reach "
                "that size. Raise longest_side or leave out the larger short sides."
            )
        if not _is_range(self.crop_sizes, _is_size):
            raise ValueError(
                f"crop_sizes={self.crop_sizes!r} must be the lowest and the highest number of pixels, in this order."
            )
        if self.scale_jitter is not None and not (_is_range(self.scale_jitter, is_number) and self.scale_jitter[0] > 0):
            raise ValueError(
                f"scale_jitter={self.scale_jitter!r} must be the lowest and the highest scale, finite and above 0, such as "
                "(0.1, 2.0), or None."
            )

    def resized(self, shortest_edge: int, longest_edge: int) -> "Augmentation":
        """The same augmentation for images of another size, given as the `size` of an image processor.

        Args:
            shortest_edge: largest of the new `short_sides` in pixels. All other sizes are scaled by the same factor.
            longest_edge: the new `longest_side` in pixels.
        """
        factor = shortest_edge / max(self.short_sides)

        def scaled(sizes: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(max(1, round(size * factor)) for size in sizes)

        return replace(
            self,
            short_sides=tuple(dict.fromkeys(scaled(self.short_sides))),
            longest_side=longest_edge,
            crop_short_sides=tuple(dict.fromkeys(scaled(self.crop_short_sides))),
            crop_sizes=scaled(self.crop_sizes),
            jitter_size=scaled((self.jitter_size,))[0],
        )

    def fitted(self, side: int) -> "Augmentation":
        """The same augmentation, with images that fit into a square of `side` pixels: the canvas of an image processor."""
        short_sides = tuple(dict.fromkeys(min(size, side) for size in self.short_sides))
        longest_side, jitter_size = min(self.longest_side, side), min(self.jitter_size, side)
        return replace(self, short_sides=short_sides, longest_side=longest_side, jitter_size=jitter_size)

    def transforms(self, pads_jitter: bool = True) -> v2.Transform:
        """Transforms of torchvision for an image and its boxes. They draw from torch's CPU generator.

        Args:
            pads_jitter: whether large-scale jitter pads small images to its square. False: only large images are cut, and the image
                processor pads them to its canvas.
        """
        if self.scale_jitter is not None:
            square = (self.jitter_size, self.jitter_size)
            crop = (
                v2.RandomCrop(square, pad_if_needed=True, fill=_MEAN_COLOUR)
                if pads_jitter
                else _RandomSizeCrop(*square)
            )
            scaled = [_ScaleJitter(square, self.scale_jitter), crop]
        else:
            crop = [_ResizeShortestSide(self.crop_short_sides), _RandomSizeCrop(*self.crop_sizes)]
            scaled = [v2.RandomApply(crop, p=self.crop), _ResizeShortestSide(self.short_sides, self.longest_side)]
        return v2.Compose(
            [
                v2.RandomApply([v2.RandomPhotometricDistort()], p=self.photometric),
                v2.RandomHorizontalFlip(self.horizontal_flip),
                *scaled,
                v2.ClampBoundingBoxes(),  # ratios of sizes are rounded
            ]
        )


def augment(transforms: v2.Transform, pixels: Tensor, objects: dict[str, list], seed: tuple[int, ...]):
    """Augment an image and its objects. The caller's random generators are not used.

    Boxes are clipped to the image and to a crop. Objects whose box then has no size are removed, and the others keep their order.
    An area is scaled by the same factor as the area of its box. This is exact for resizing, and for areas that equal the area of
    the box; for other objects that a crop cuts, it is an estimate. (The release uses the area of the box after a crop. Training
    does not use areas.)

    Args:
        transforms: from `Augmentation.transforms`.
        pixels: (3, h, w), uint8.
        objects: `bbox` as (x, y, width, height) in pixels, `area`, and any other lists of the same length.
        seed: numbers that determine the random numbers.
    Returns:
        (3, h', w'), uint8, and objects of the same form.
    """
    before = _clamped_corners(objects, tuple(pixels.shape[-2:]))
    with torch.random.fork_rng(devices=[]):
        # Seed only the CPU: torch.manual_seed would also seed the caller's CUDA devices.
        torch.default_generator.manual_seed(mix_seeds(seed))
        pixels, after = transforms(Image(pixels), before)
    return pixels.as_subclass(Tensor), _moved(objects, before, after)


def augment_by(own: OwnAugmentation, pixels: Tensor, objects: dict[str, list], seed: tuple[int, ...]):
    """Augment an image and its objects by a user's pipeline. Boxes, areas, seed and results are as in `augment`."""
    before = _clamped_corners(objects, tuple(pixels.shape[-2:]))
    shown = (_sizes(before) > 0).all(dim=1).nonzero().flatten()
    pixels, after, index = own(pixels, before[shown].as_subclass(Tensor), mix_seeds(seed))
    kept = shown[index]
    after = BoundingBoxes(after, format="XYXY", canvas_size=tuple(pixels.shape[-2:]))
    after = v2.functional.clamp_bounding_boxes(after)
    rows = kept.tolist()
    objects = {name: [values[row] for row in rows] for name, values in objects.items()}
    return pixels, _moved(objects, before[kept], after)


def _clamped_corners(objects: dict[str, list], size: tuple[int, int]) -> BoundingBoxes:
    """(N, 4) xyxy float64, inside the image.

    Args:
        size: (height, width).
    """
    boxes = torch.tensor(objects["bbox"], dtype=torch.float64).reshape(-1, 4)  # (N, 4) xywh
    corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
    return v2.functional.clamp_bounding_boxes(BoundingBoxes(corners, format="XYXY", canvas_size=size))


def _moved(objects: dict[str, list], before: Tensor, after: Tensor) -> dict[str, list]:
    """Objects with the boxes (N, 4) xyxy `after` instead of `before`, without those that have no size."""
    sizes_before, after = _sizes(before), after.as_subclass(Tensor)
    sizes = _sizes(after)  # (N, 2)
    # torchvision's SanitizeBoundingBoxes would also remove boxes of up to one pixel.
    keep = ((sizes >= SMALLEST_SIDE) & (sizes_before > 0)).all(dim=1)
    share = (sizes / sizes_before).prod(dim=1)
    boxes, area = torch.cat([after[:, :2], sizes], dim=1), torch.tensor(objects["area"], dtype=torch.float64) * share
    objects = {**objects, "bbox": boxes.tolist(), "area": area.tolist()}
    kept = keep.nonzero().flatten().tolist()
    return {name: [values[index] for index in kept] for name, values in objects.items()}


class _ResizeShortestSide(v2.RandomShortestSize):
    """As in torchvision, but sides are rounded as in the image processor, and are at least one pixel."""

    def make_params(self, flat_inputs):
        short_side = self.min_size[int(torch.randint(len(self.min_size), ()))]
        sides = get_size_with_aspect_ratio(v2.query_size(flat_inputs), short_side, self.max_size)
        return {"size": tuple(max(1, side) for side in sides)}


class _ScaleJitter(v2.ScaleJitter):
    """As in torchvision, but sides are at least one pixel."""

    def make_params(self, flat_inputs):
        return {"size": tuple(max(1, side) for side in super().make_params(flat_inputs)["size"])}


class _RandomSizeCrop(v2.Transform):
    """Crop to a rectangle. Height and width are drawn from `lowest` to `highest`, but never exceed the image."""

    def __init__(self, lowest: int, highest: int):
        super().__init__()
        self.lowest, self.highest = lowest, highest

    def make_params(self, flat_inputs):
        sides = v2.query_size(flat_inputs)
        height, width = (_draw(min(self.lowest, side), min(self.highest, side)) for side in sides)
        top, left = _draw(0, sides[0] - height), _draw(0, sides[1] - width)
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt, params):
        return v2.functional.crop(inpt, **params)


def _draw(lowest: int, highest: int) -> int:
    return int(torch.randint(lowest, highest + 1, ()))


def mix_seeds(seed: tuple[int, ...]) -> int:
    """A 64-bit hash of the seeds. Generators seeded with similar numbers, such as 1, 2, 3, start with similar values."""
    text = " ".join(str(int(part)) for part in seed)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _sizes(corners: Tensor) -> Tensor:
    """(N, 4) xyxy -> (N, 2) width and height."""
    return corners.as_subclass(Tensor)[:, 2:] - corners.as_subclass(Tensor)[:, :2]


def _is_size(value) -> bool:
    return isinstance(value, int) and value >= 1


def _is_range(value, is_valid) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(is_valid, value)) and value[0] <= value[1]
