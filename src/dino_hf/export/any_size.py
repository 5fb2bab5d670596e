"""Backbones of transformers, changed while they are traced, so that the graph is valid for images of any size."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.bit.modeling_bit import BitEmbeddings, DynamicPad2d
from transformers.models.dinov3_vit import modeling_dinov3_vit
from transformers.models.focalnet.modeling_focalnet import FocalNetPatchEmbeddings
from transformers.models.swin.modeling_swin import (
    SwinAttention,
    SwinLayer,
    SwinPatchEmbeddings,
    SwinPatchMerging,
)
from transformers.models.vitdet import modeling_vitdet


@contextmanager
def any_size(model: nn.Module) -> Iterator[None]:
    """Inside the context, the backbones in `model` can be traced for images of any size.

    They always pad, if necessary by zero, because a branch would fix the size in the graph. Swin uses plain operators for
    attention: the tracer records the memory layout of PyTorch's CPU kernel, and the ONNX exporter, which assumes another layout,
    fails at a view.
    """
    with ExitStack() as restore:

        def replace(owner: Any, name: str, value: Any) -> None:
            restore.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        def override(module: nn.Module, name: str, function: Callable) -> None:
            restore.callback(delattr, module, name)
            setattr(module, name, MethodType(function, module))

        replace(modeling_vitdet, "get_rel_pos", _relative_positions)
        replace(modeling_dinov3_vit, "get_patches_center_coordinates", _patch_centers)
        for module in model.modules():
            if isinstance(module, SwinAttention):
                replace(module.config, "_attn_implementation", "eager")
            elif isinstance(module, SwinPatchEmbeddings | FocalNetPatchEmbeddings):
                override(module, "maybe_pad", _pad_before_projection)
            elif isinstance(module, SwinPatchMerging):
                override(module, "maybe_pad", _pad_to_pairs)
            elif isinstance(module, SwinLayer):
                override(module, "maybe_pad", _pad_to_windows)
            elif isinstance(module, BitEmbeddings) and isinstance(module.pad, nn.ConstantPad2d):
                override(module.pad, "forward", _pad_by_parts)
            elif isinstance(module, DynamicPad2d):
                override(module, "forward", _pad_same)
        yield


def _missing(size: int, unit: int) -> int:
    """The padding from a size to the next multiple of a unit. Written as a quotient, for which torch.export can prove more."""
    return (size + unit - 1) // unit * unit - size


def _pad_before_projection(
    self: SwinPatchEmbeddings | FocalNetPatchEmbeddings, pixel_values: Tensor, height: int, width: int
) -> Tensor:
    """Pad by a constant number of zeros at the right and bottom.

    The projection then takes as many steps as on sides padded to multiples of its stride.
    Shapes of all further maps are short formulas of the size, because the number does not depend on it.
    """
    conv, padding = self.projection, []
    for axis in (1, 0):
        stride = conv.stride[axis]
        padding += [0, stride - 1 - (2 * conv.padding[axis] - conv.kernel_size[axis]) % stride]
    return F.pad(pixel_values, padding)


def _pad_to_pairs(self: SwinPatchMerging, maps: Tensor, height: int, width: int) -> Tensor:
    return F.pad(maps, (0, 0, 0, _missing(width, 2), 0, _missing(height, 2)))


def _pad_to_windows(self: SwinLayer, maps: Tensor, height: int, width: int) -> tuple[Tensor, tuple[int, ...]]:
    padding = 0, 0, 0, _missing(width, self.window_size), 0, _missing(height, self.window_size)
    # The caller removes the padding only if there is any. The returned padding is not zero, so that it always does.
    return F.pad(maps, padding), (0, 0, 0, 1, 0, 1)


def _pad_same(self: DynamicPad2d, maps: Tensor) -> Tensor:
    padding = []
    for axis in (1, 0):
        size, stride = maps.shape[2 + axis], self.stride[axis]
        reach = (self.kernel_size[axis] - 1) * self.dilation[axis] + 1
        # Never negative: a kernel is at least as long as its stride, except a 1 x 1 kernel.
        total = 0 if reach == 1 else _missing(size, stride) + reach - stride
        padding += [total // 2, total - total // 2]
    return F.pad(maps, padding, value=self.value)


def _pad_by_parts(self: nn.ConstantPad2d, maps: Tensor) -> Tensor:
    """Pad by concatenation. ONNX Runtime merges a `Pad` into the following max pooling, as if it padded with -infinity."""
    left, right, top, bottom = self.padding
    batch, channels, _, width = maps.shape
    rows = [maps.new_full((batch, channels, count, width), self.value) for count in (top, bottom)]
    maps = torch.cat([rows[0], maps, rows[1]], dim=2)
    height = maps.shape[2]
    columns = [maps.new_full((batch, channels, height, count), self.value) for count in (left, right)]
    return torch.cat([columns[0], maps, columns[1]], dim=3)


def _patch_centers(num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Centres of DINOv3's patches as (y, x) in [-1, 1]: (rows * columns, 2).

    Counted in whole numbers. DINOv3 counts from 0.5, and torch.export cannot prove how many numbers these are.
    """
    rows, columns = (
        2 * ((torch.arange(count, dtype=dtype, device=device) + 0.5) / count) - 1 for count in (num_rows, num_columns)
    )
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)


def _relative_positions(num_queries: int, num_keys: int, table: Tensor) -> Tensor:
    """ViTDet's embeddings of the distances along one side of a map: (queries, keys, C).

    ViTDet's own function turns a variable number of cells into a constant.

    Args:
        num_queries, num_keys: cells of the side. Both are equal, because ViTDet attends to the queries' own map.
        table: (distances, C), resized to 2 * num_queries - 1 distances.
    """
    resized = F.interpolate(table.t()[None], size=2 * num_queries - 1, mode="linear")[0].t()
    cells = torch.arange(num_queries, device=table.device)
    return resized[cells[:, None] - cells + num_queries - 1]
