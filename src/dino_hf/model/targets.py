"""The ground truth of a batch: `labels` as users pass them -> checked, flat tensors."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .run_mode import is_traced

PADDING_LABEL = -100


@dataclass(eq=False)
class Targets:
    """All T boxes of a batch, ordered by image. Not a tuple: torch.compile traces tuples and would recompile for each T."""

    class_labels: Tensor  # (T,) int64 in [0, K)
    boxes: Tensor  # (T, 4) float32 cxcywh in [0, 1]
    counts: tuple[int, ...]  # number of boxes of each of the B images; the sum is T

    @property
    def image(self) -> Tensor:
        """(T,) image index of each box."""
        # On the host, even if the default device is another one.
        counts = torch.tensor(self.counts, dtype=torch.long, device="cpu")
        image = torch.arange(len(self.counts), device="cpu").repeat_interleave(counts)
        return image.to(self.boxes.device, non_blocking=True)

    def to(self, device: torch.device) -> "Targets":
        return Targets(self.class_labels.to(device), self.boxes.to(device), self.counts)

    @property
    def position(self) -> Tensor:
        """(T,) index of each box within its image."""
        positions = [torch.arange(count, device="cpu") for count in self.counts]
        position = torch.cat(positions) if positions else torch.zeros(0, dtype=torch.long, device="cpu")
        return position.to(self.boxes.device, non_blocking=True)


@torch.compiler.disable(reason="the number of boxes depends on the data, and error messages name values")
def collect_targets(
    labels: "Sequence[Mapping] | Mapping | Targets", batch_size: int, num_labels: int, device
) -> Targets:
    """Check the labels of a batch and concatenate them.

    Args:
        labels: one mapping per image with `class_labels` (T_i,) and `boxes` (T_i, 4), as image processors return them; or one
            mapping of padded tensors, `class_labels` (B, M) padded with -100 and `boxes` (B, M, 4), which `Trainer` can gather
            over processes. Other keys are ignored. Targets are returned unchanged.
        batch_size: B
        num_labels: K
        device: device of the result.
    Raises:
        ValueError: a count, shape, class or box is wrong. The message names the image, the value and the cure.
    """
    if isinstance(labels, Targets):  # `DinoDetrForObjectDetection` has checked them
        return labels
    if not isinstance(labels, Iterable):
        raise ValueError(
            f"labels is a {type(labels).__name__}, but must be a list with one dictionary per image, or one dictionary of "
            "padded tensors; each with class_labels and boxes."
        )
    per_image = _unpad(labels) if isinstance(labels, Mapping) else list(labels)
    if len(per_image) != batch_size:
        raise ValueError(
            f"There are labels for {len(per_image)} images but pixel_values holds {batch_size}; pass one entry per image "
            "(an image without objects needs class_labels of shape (0,) and boxes of shape (0, 4))."
        )
    class_labels, boxes = [], []
    for image, target in enumerate(per_image):
        if not isinstance(target, Mapping):
            raise ValueError(
                f"labels[{image}] is a {type(target).__name__}, but must be a dictionary with class_labels (T,) and boxes (T, 4)."
            )
        missing = {"class_labels", "boxes"} - set(target)
        if missing:
            raise ValueError(
                f"labels[{image}] has the keys {sorted(target)} but needs {sorted(missing)}; let DinoDetrImageProcessor "
                "prepare COCO annotations, or pass class_labels (T,) and boxes (T, 4)."
            )
        image_classes, image_boxes = _as_tensors(target, f"labels[{image}]", "(T,)", "(T, 4)")
        if image_classes.ndim != 1 or image_boxes.shape != (len(image_classes), 4):
            raise ValueError(
                f"labels[{image}]: boxes have shape {tuple(image_boxes.shape)} for class_labels of shape "
                f"{tuple(image_classes.shape)}; expected (T, 4) and (T,). An image without objects needs torch.zeros(0, 4)."
            )
        is_whole = not (image_classes.is_floating_point() or image_classes.is_complex())
        if image_classes.numel() and (not is_whole or image_classes.dtype == torch.bool):
            raise ValueError(
                f"labels[{image}]: class_labels have dtype {image_classes.dtype}; pass whole numbers, as torch.int64."
            )
        if image_boxes.is_complex():
            raise ValueError(f"labels[{image}]: boxes have dtype {image_boxes.dtype}; pass torch.float32.")
        class_labels.append(image_classes.to(torch.int64))
        boxes.append(image_boxes.to(torch.float32))
    counts = tuple(len(image_classes) for image_classes in class_labels)
    if len({tensor.device for tensor in (*class_labels, *boxes)}) > 1:
        class_labels, boxes = ([tensor.to(device) for tensor in many] for many in (class_labels, boxes))
    classes = torch.cat(class_labels) if class_labels else torch.zeros(0, dtype=torch.int64, device="cpu")
    targets = Targets(classes, torch.cat(boxes) if boxes else torch.zeros(0, 4, device="cpu"), counts)
    _check_values(Targets(*_on_host(targets.class_labels, targets.boxes), counts), num_labels)
    return Targets(*(x.to(device, non_blocking=True) for x in (targets.class_labels, targets.boxes)), counts)


@torch.compiler.disable(reason="one graph break for both functions")
def targets_and_mask(
    labels: "Sequence[Mapping] | Mapping | Targets", pixel_values: Tensor, pixel_mask: Tensor | None, num_labels: int
) -> tuple[Targets, Tensor | None]:
    """Targets of a batch (see `collect_targets`) and its mask: `pixel_mask` if given, otherwise `mask_from_sizes`."""
    if pixel_mask is None and pixel_values.ndim == 4:  # the model refuses other shapes
        pixel_mask = mask_from_sizes(labels, pixel_values)
    return collect_targets(labels, len(pixel_values), num_labels, pixel_values.device), pixel_mask


@torch.compiler.disable(reason="whether images are padded depends on the data")
def mask_from_sizes(labels: "Sequence[Mapping] | Mapping | Targets", pixel_values: Tensor) -> Tensor | None:
    """Mask of padding from `size` in the labels, where image processors write the size of each image without padding.

    The library's training examples drop `pixel_mask`. Without a mask, the boxes in `labels` would be relative to another image
    than the padded one that the model gets.

    Args:
        labels: as in `collect_targets`. `size` (2,) or, padded, (B, 2) is (height, width) of the image without padding.
        pixel_values: (B, 3, h, w)
    Returns:
        (B, h, w) bool, True on the image; None if no label has a size or no image is padded.
    Raises:
        ValueError: a size is not (height, width), or is larger than the padded image.
    """
    if isinstance(labels, Mapping):
        sizes = None if labels.get("size") is None else list(_as_tensor(labels["size"]))
    elif isinstance(labels, Sequence) and any(isinstance(target, Mapping) and "size" in target for target in labels):
        whole = torch.tensor(pixel_values.shape[-2:], device="cpu")
        sizes = [_as_tensor(target["size"]) if "size" in target else whole for target in labels]
    else:
        sizes = None
    batch_size, _, height, width = pixel_values.shape
    if sizes is None or len(sizes) != batch_size:
        return None  # `collect_targets` refuses a wrong number of labels
    for image, size in enumerate(sizes):
        if size.shape != (2,):
            raise ValueError(f"labels[{image}]: size has shape {tuple(size.shape)}; expected (2,), height and width.")
    sizes = torch.stack([size.to(pixel_values.device, non_blocking=True) for size in sizes])  # (B, 2)
    if sizes.device.type == "cpu":  # on other devices this would synchronise
        given = sizes.tolist()
        for image, (h, w) in enumerate(given):
            if not (1 <= h <= height and 1 <= w <= width):
                raise ValueError(
                    f"labels[{image}]: size is {(h, w)}, but pixel_values have the height and width {(height, width)}. `size` must "
                    "be the height and width of the image without its padding. Pass pixel_mask, or leave `size` out if the batch "
                    "has no padding."
                )
        if all(size == [height, width] for size in given):
            return None
    rows, columns = (torch.arange(side, device=sizes.device) for side in (height, width))
    return (rows < sizes[:, :1])[:, :, None] & (columns < sizes[:, 1:])[:, None]


def _on_host(class_labels: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Copy (...), (..., 4) to the CPU unchanged, in one copy: each copy synchronises with the device."""
    if class_labels.device.type == "cpu" and boxes.device.type == "cpu":
        return class_labels, boxes
    bits = boxes.float().contiguous().view(torch.int32).long()  # not every device has float64
    packed = torch.cat([class_labels[..., None].long(), bits], dim=-1).cpu()
    boxes_on_host = packed[..., 1:].int().contiguous().view(torch.float32).to(boxes.dtype)
    return packed[..., 0].to(class_labels.dtype), boxes_on_host


def _unpad(labels: Mapping) -> list[dict]:
    missing = {"class_labels", "boxes"} - set(labels)
    if missing:
        raise ValueError(
            f"labels is one mapping with the keys {sorted(labels)} but needs {sorted(missing)}: class_labels (B, M) padded "
            f"with {PADDING_LABEL}, and boxes (B, M, 4)."
        )
    class_labels, boxes = _as_tensors(labels, "labels", "(B, M)", "(B, M, 4)")
    if class_labels.ndim != 2 or boxes.shape != (*class_labels.shape, 4):
        raise ValueError(
            f"Padded labels: boxes have shape {tuple(boxes.shape)} for class_labels of shape {tuple(class_labels.shape)}; "
            f"expected (B, M, 4) and (B, M), rows padded with {PADDING_LABEL}."
        )
    class_labels, boxes = _on_host(class_labels, boxes)
    kept = class_labels != PADDING_LABEL
    return [
        {"class_labels": classes[keep], "boxes": image_boxes[keep]}
        for classes, image_boxes, keep in zip(class_labels, boxes, kept, strict=True)
    ]


def _as_tensor(value) -> Tensor:
    """Tensors keep their device. Other arrays become tensors on the CPU, even if the default device is another one."""
    return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")


def _as_tensors(target: Mapping, where: str, class_shape: str, box_shape: str) -> tuple[Tensor, Tensor]:
    try:
        return _as_tensor(target["class_labels"]), _as_tensor(target["boxes"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{where} cannot be read as tensors ({error}); pass class_labels {class_shape} as torch.int64 and boxes "
            f"{box_shape} as torch.float32."
        ) from error


def _check_values(targets: Targets, num_labels: int) -> None:
    """Check classes and boxes. A wrong class would otherwise cause an index error inside a CUDA kernel."""
    classes, boxes = targets.class_labels, targets.boxes
    rounding = 1e-4  # image processors divide pixels in float32, so a box of the whole image can end just above 1
    box_is_wrong = ~((boxes >= 0) & (boxes <= 1 + rounding)).all(-1)  # also True for NaN
    class_is_wrong = (classes < 0) | (classes >= num_labels)
    wrong = (box_is_wrong | class_is_wrong).nonzero().flatten()
    if not len(wrong):
        return
    first = int(wrong[0])
    image = int(targets.image[first])
    where = f"labels[{image}], box {int(targets.position[first])}"
    if class_is_wrong[first]:
        raise ValueError(
            f"{where}: class {int(classes[first])} does not exist. With config.num_labels={num_labels}, classes are 0 to "
            f"{num_labels - 1}. Raw COCO ids go up to 90 and need num_labels=91. Map the ids of your own data set to 0, 1, 2, ..., "
            "as dino_hf.training.load_coco does."
        )
    values = [round(value, 4) for value in boxes[first].tolist()]
    raise ValueError(
        f"{where}: {values} is not (cx, cy, w, h) in [0, 1]. Divide pixels by the image's width and height, turn corners "
        "into centre and size, or let DinoDetrImageProcessor prepare COCO annotations."
    )


def check_inputs(pixel_values: Tensor, pixel_mask: Tensor | None, labels=None) -> Tensor | None:
    """Check the inputs and return the mask as bool, True on the image, or None if no padding is known."""
    if pixel_values.ndim != 4:
        raise ValueError(
            f"pixel_values have shape {tuple(pixel_values.shape)}, expected (batch, channels, height, width); "
            "DinoDetrImageProcessor makes them, a single image needs pixel_values[None]."
        )
    if pixel_values.shape[1] != 3:
        raise ValueError(
            f"pixel_values have shape {tuple(pixel_values.shape)}, but a DINO detector takes 3 channels, RGB: (batch, 3, height, "
            "width). DinoDetrImageProcessor makes them of any image."
        )
    if (
        pixel_mask is None and labels is not None and not isinstance(labels, Targets)
    ):  # otherwise done by the outer model
        pixel_mask = mask_from_sizes(labels, pixel_values)
    if pixel_mask is None:
        return None
    batch_size, _, height, width = pixel_values.shape
    if pixel_mask.shape != (batch_size, height, width):
        raise ValueError(
            f"pixel_mask has shape {tuple(pixel_mask.shape)}, expected {(batch_size, height, width)} for pixel_values of "
            f"shape {tuple(pixel_values.shape)}: 1 on the image, 0 on padding."
        )
    pixel_mask = pixel_mask.bool()
    # On a CPU, checking for an all-ones mask is cheap. On a GPU it would synchronise, and a traced graph must accept any mask.
    if pixel_mask.device.type == "cpu" and not is_traced() and type(pixel_mask) is Tensor and pixel_mask.all():
        return None
    return pixel_mask
