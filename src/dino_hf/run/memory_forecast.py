"""Forecast of the memory of a training step, and the largest batch size that fits."""

import math
import weakref
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainingArguments
from transformers.image_transforms import get_size_with_aspect_ratio

from ..common.free_memory import free_main_memory
from ..common.random_numbers import forked_random_numbers
from ..training.augmentation import Augmentation
from ..training.recipe import Recipe

SHARE_OF_FREE = 0.85  # share of the free memory that is used: allocators round up and leave gaps
# Largest batch size on a CPU. Larger batches are not faster there, and small images are padded to the largest.
_MOST_ON_CPU = 4
# Areas in pixels that take seconds to measure, also on a CPU. Larger images are extrapolated from these two.
_AREAS = (256 * 256, 384 * 384)
_CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")  # the new and the old name
_MULTIPLE = 32  # measured sides are multiples of this, so that no feature map is rounded


class MemoryForecast(NamedTuple):
    """Memory of a training step on one device, in bytes."""

    weights: int  # parameters and buffers
    fixed: int  # weights, gradients, moments of the optimizer, average of the weights
    per_image: int  # autograd graph of one image, and the peak of backward's temporary tensors
    size: tuple[int, int]  # largest (height, width) in pixels that images are padded to
    num_boxes: int  # boxes of the image with the most boxes

    def total(self, batch_size: int) -> int:
        """Peak bytes of a step with `batch_size` images.

        The peak is in backward, or in the optimizer's update, which needs one more copy of the weights after the activations are
        freed.
        """
        return self.fixed + max(self.per_image * batch_size, self.weights)

    def largest_batch(self, free: int) -> int:
        """Largest power of two whose step fits into 85 % of `free` bytes; 0 if not even one image fits."""
        room = int(free * SHARE_OF_FREE) - self.fixed
        if self.total(1) > free * SHARE_OF_FREE:
            return 0
        return 2 ** int(math.log2(max(1, room // max(1, self.per_image))))


def forecast_memory(
    model: nn.Module,
    recipe: Recipe,
    args: TrainingArguments,
    image_sizes: Sequence[tuple[int, int]],
    num_boxes: int,
    canvas_side: int | None = None,
) -> MemoryForecast:
    """Run one image forward and backward, and measure the peak of the bytes in living tensors.

    For images above about 400 x 400 pixels, memory is extrapolated from two smaller images: it is linear in the number of
    pixels (R50: within 0.2 % at 576 x 704). On a CPU, the tensors of one more image took 99 to 102 % of the forecast, and all
    tensors of an R50 92 %. The process took 116 % of that, up to 145 % with many small tensors, because glibc keeps freed memory.

    Afterwards the model is on the device of `args`, with activation checkpointing if `args` have it, and otherwise unchanged. The
    random generators are unchanged.

    Args:
        model: `DinoDetrForObjectDetection`, configured by the recipe.
        image_sizes: all distinct (height, width) of the training images.
        num_boxes: largest number of boxes of an image.
        canvas_side: side in pixels of the canvas that the image processor places images on. None: no canvas.
    """
    size = (canvas_side, canvas_side) if canvas_side else largest_training_size(recipe.augmentation, image_sizes)
    model.to(args.device)
    if name := next((name for name in _CHECKPOINTING if getattr(args, name, False)), None):
        getattr(model, f"{name}_enable")(getattr(args, f"{name}_kwargs"))
    area = size[0] * size[1]
    if area <= 1.1 * _AREAS[-1]:
        per_image = _measure(model, args, size, num_boxes)
    else:
        sizes = [_scaled(size, math.sqrt(smaller / area)) for smaller in _AREAS]
        (x0, y0), (x1, y1) = [(h * w, _measure(model, args, (h, w), num_boxes)) for h, w in sizes]
        per_image = int(y1 + (y1 - y0) / (x1 - x0) * (area - x1))
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    # AdamW keeps two moments; distributed training gathers gradients in buckets of the same size.
    fixed = weights + trained * (3 + (args.world_size > 1)) + (weights if recipe.ema_decay is not None else 0)
    return MemoryForecast(weights, fixed, per_image, size, num_boxes)


def largest_training_size(augmentation: Augmentation, image_sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Largest (height, width) that a batch is padded to: the highest and the widest image after augmentation."""
    if augmentation.scale_jitter is not None:
        return augmentation.jitter_size, augmentation.jitter_size
    results = []
    for size in image_sizes:
        results.append(_resized(size, max(augmentation.short_sides), augmentation.longest_side))
        for short_side in augmentation.crop_short_sides if augmentation.crop else ():
            lowest, highest = (
                [min(limit, side) for side in _resized(size, short_side)] for limit in augmentation.crop_sizes
            )
            for cut in ((highest[0], lowest[1]), (lowest[0], highest[1])):  # the highest and the widest rectangle
                results.append(_resized(cut, max(augmentation.short_sides), augmentation.longest_side))
    return max(height for height, _ in results), max(width for _, width in results)


def _resized(size: tuple[int, int], short_side: int, longest_side: int | None = None) -> tuple[int, int]:
    height, width = get_size_with_aspect_ratio(size, short_side, longest_side)
    return max(1, height), max(1, width)


def _scaled(size: tuple[int, int], factor: float) -> tuple[int, int]:
    height, width = (max(1, round(side * factor / _MULTIPLE)) * _MULTIPLE for side in size)
    return height, width


def _measure(model: nn.Module, args: TrainingArguments, size: tuple[int, int], num_boxes: int) -> int:
    """Peak bytes in forward and backward of one image, without the weights and their gradients."""
    device = args.device
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.2], device=device).repeat(1, num_boxes, 1)  # (1, T, 4)
    labels = {"class_labels": torch.zeros(1, num_boxes, dtype=torch.int64, device=device), "boxes": boxes}
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    autocast = nullcontext() if dtype is None else torch.autocast(device.type, dtype)
    with _unchanged(model, device):
        for parameter in model.parameters():  # existing gradients, as after an earlier batch, are not counted
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        held = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
        with _LiveBytes(held) as live:
            pixel_values = torch.rand(1, 3, *size, device=device)
            pixel_mask = torch.ones(1, *size, dtype=torch.int64, device=device)
            with autocast:
                loss = model.train()(pixel_values=pixel_values, pixel_mask=pixel_mask, labels=labels).loss
            loss.backward()
        return live.most


@contextmanager
def _unchanged(model: nn.Module, device: torch.device):
    """After the context, restore the state that a step without optimizer changes: gradients, buffers, mode, random generators."""
    was_training, buffers = model.training, [buffer.clone() for buffer in model.buffers()]
    with forked_random_numbers(device):
        try:
            yield
        finally:
            model.train(was_training).zero_grad(set_to_none=True)
            with torch.no_grad():
                for buffer, value in zip(model.buffers(), buffers, strict=True):
                    buffer.copy_(value)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages created inside the context, while they live. Temporary memory inside operators is not seen."""

    def __init__(self, held: Sequence[torch.Tensor]):
        super().__init__()
        self.now = self.most = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in held}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._take(leaf.untyped_storage())
        return result

    def _take(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def free_memory(device: torch.device) -> int:
    """Free bytes on a device. Memory of this process is not free."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return free_main_memory()


def choose_batch_size(
    forecast: MemoryForecast, free: int, recipe: Recipe, device: torch.device, num_processes: int
) -> int:
    """Batch size per process: the largest power of two that fits into `free` bytes and divides the recipe's images per step."""
    most = max(1, recipe.total_batch_size // num_processes)
    if device.type == "cpu":
        most = min(most, _MOST_ON_CPU)
    size = max(1, forecast.largest_batch(free))
    while size > 1 and (size > most or recipe.total_batch_size % (size * num_processes)):
        size //= 2
    return size
