"""A detector -> one graph of plain operators, for batches and images of any size."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers.models.bit.modeling_bit import BitEmbeddings, DynamicPad2d
from transformers.models.swin.modeling_swin import (
    SwinAttention,
    SwinLayer,
    SwinPatchEmbeddings,
    SwinPatchMerging,
)

from ..model.attention_backends import use_backend
from ..model.modeling_dino_detr import DinoDetrForObjectDetection
from .comparison import TOLERANCES, check_difference, compare_predictions

# Height and width of the images that are traced. At strides of 4 to 64 they leave maps whose sides are no multiples of a Swin's
# window: what is padded there is padded in the graph, and for other sizes by nothing.
_EXAMPLE = 577, 961
_OTHER = 256, 320  # multiples of all strides: a graph that is true of one size only would fail


class _Predictions(nn.Module):
    def __init__(self, model: DinoDetrForObjectDetection):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.model(pixel_values, pixel_mask)
        return outputs.logits.float(), outputs.pred_boxes


def export_program(model: DinoDetrForObjectDetection) -> ExportedProgram:
    """The inference graph of a detector by `torch.export`, with any number of images of any size.

        program = dino_hf.export.export_program(model)
        logits, boxes = program.module()(pixel_values, pixel_mask)

    The program takes pixel_values (B, 3, h, w) float32 and pixel_mask (B, h, w) int64, 1 on the image and 0 on padding, and gives
    logits (B, Q, K) and boxes (B, Q, 4), cxcywh in [0, 1] of the unpadded image, float32, on the model's device. The coarsest
    feature map must have two rows and two columns (more than 64 pixels for four levels, with a ConvNeXt 96), and all maps
    together a cell for each of the Q queries (224 x 224 pixels for 900).

    Parameters are those of the model, not copies. Before it is returned, it is run on an image of another size; in float32, what it
    finds is compared with the model.

    Raises:
        ValueError: the model is of another kind, or its backbone cannot be traced for all sizes.
    """
    if not isinstance(model, DinoDetrForObjectDetection):
        raise ValueError(f"A {type(model).__name__} cannot be exported here, only a DinoDetrForObjectDetection.")
    training = [module for module in model.modules() if module.training]  # some, if a part was set apart
    predictions = _Predictions(model).eval()
    device = model.device
    try:
        # What environment or configuration name may be a kernel that only this machine has, or grid_sample.
        with torch.no_grad(), use_backend("gather"), _any_size(model):
            program = torch.export.export(
                predictions,
                (
                    torch.zeros(2, 3, *_EXAMPLE, device=device),
                    torch.ones(2, *_EXAMPLE, dtype=torch.long, device=device),
                ),
                dynamic_shapes=tuple(dict.fromkeys(axes, Dim.DYNAMIC) for axes in ((0, 2, 3), (0, 1, 2))),
                prefer_deferred_runtime_asserts_over_guards=True,
            )
        _drop_assertions(program)
        with torch.no_grad():
            _check(program, predictions)
    except (RuntimeError, ValueError) as error:  # RuntimeError: what torch finds that depends on the size
        backbone = type(model.model.backbone.model).__name__
        raise ValueError(
            f"A model with a {backbone} of this configuration cannot be exported for images of any size: {first_line(error)}"
        ) from error
    finally:
        for module in training:
            module.training = True
    return program


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _drop_assertions(program: ExportedProgram) -> None:
    """What was true of the traced sizes alone, such as which tensors are contiguous, is no condition for the graph."""
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()


def _check(program: ExportedProgram, predictions: _Predictions) -> None:
    """Compare it with the model, on one padded image of a size unlike the traced one."""
    config, (height, width) = predictions.model.config, _OTHER
    dtype, device = predictions.model.dtype, predictions.model.device
    pixel_values = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones(1, height, width, dtype=torch.long, device=device)
    mask[:, :, -width // 5 :] = 0
    expected = predictions(pixel_values, mask)
    while expected[0].shape[1] < config.num_queries:  # the image was too small for so many queries
        pixel_values, mask = pixel_values.repeat(1, 1, 2, 2), mask.repeat(1, 2, 1).repeat_interleave(2, dim=2)
        expected = predictions(pixel_values, mask)
    found = program.module()(pixel_values, mask)
    # In half precision, noise has no detections that two orders of sums would agree on: there it is enough that it runs.
    if dtype == torch.float32:
        check_difference(compare_predictions(expected, found), TOLERANCES[dtype], "the program of torch.export")


@contextmanager
def _any_size(model: nn.Module) -> Iterator[None]:
    """While it is traced, let backbones pad without asking whether they must, for padding by nothing is padding too, and in a form
    that runtimes leave as it is; and let a Swin write out its attention, which PyTorch has in two layouts: traced is the one of its
    CPU kernel, and the exporter of ONNX, which takes the other, stops at a view that only the first allows."""
    changed, attentions = [], []

    def replace(module: nn.Module, name: str, function: Callable) -> None:
        setattr(module, name, function.__get__(module))
        changed.append((module, name))

    try:
        for module in model.modules():
            if isinstance(module, SwinAttention):
                attentions.append((module.config, module.config._attn_implementation))
                module.config._attn_implementation = "eager"
            elif isinstance(module, SwinPatchEmbeddings):
                replace(module, "maybe_pad", _pad_image)
            elif isinstance(module, SwinPatchMerging):
                replace(module, "maybe_pad", _pad_to_pairs)
            elif isinstance(module, SwinLayer):
                replace(module, "maybe_pad", _pad_to_windows)
            elif isinstance(module, BitEmbeddings) and isinstance(module.pad, nn.ConstantPad2d):
                replace(module.pad, "forward", _pad_by_parts)
            elif isinstance(module, DynamicPad2d):
                replace(module, "forward", _pad_same)
        yield
    finally:
        for module, name in changed:
            delattr(module, name)
        for config, attention in reversed(attentions):  # one object for all layers, which the first saw unchanged
            config._attn_implementation = attention


def _missing(size: int, unit: int) -> int:
    """What a size lacks to a multiple; as a quotient, of which much more can be proved than of a remainder."""
    return (size + unit - 1) // unit * unit - size


def _pad_image(self: SwinPatchEmbeddings, pixel_values: Tensor, height: int, width: int) -> Tensor:
    rows, columns = self.patch_size
    return F.pad(pixel_values, (0, _missing(width, columns), 0, _missing(height, rows)))


def _pad_to_pairs(self: SwinPatchMerging, maps: Tensor, height: int, width: int) -> Tensor:
    return F.pad(maps, (0, 0, 0, _missing(width, 2), 0, _missing(height, 2)))


def _pad_to_windows(self: SwinLayer, maps: Tensor, height: int, width: int) -> tuple[Tensor, tuple[int, ...]]:
    padding = 0, 0, 0, _missing(width, self.window_size), 0, _missing(height, self.window_size)
    # The caller cuts the padding off again where there is any; told that there is, it also cuts off nothing.
    return F.pad(maps, padding), (0, 0, 0, 1, 0, 1)


def _pad_same(self: DynamicPad2d, maps: Tensor) -> Tensor:
    padding = []
    for axis in (1, 0):
        size, stride = maps.shape[2 + axis], self.stride[axis]
        reach = (self.kernel_size[axis] - 1) * self.dilation[axis] + 1
        # Never negative: no kernel is shorter than its step, but those of a single pixel.
        total = 0 if reach == 1 else _missing(size, stride) + reach - stride
        padding += [total // 2, total - total // 2]
    return F.pad(maps, padding, value=self.value)


def _pad_by_parts(self: nn.ConstantPad2d, maps: Tensor) -> Tensor:
    """What stands before a maximum of neighbours, with which ONNX Runtime would merge a `Pad`: as if it were of -infinity."""
    left, right, top, bottom = self.padding
    batch, channels, _, width = maps.shape
    rows = [maps.new_full((batch, channels, count, width), self.value) for count in (top, bottom)]
    maps = torch.cat([rows[0], maps, rows[1]], dim=2)
    height = maps.shape[2]
    columns = [maps.new_full((batch, channels, height, count), self.value) for count in (left, right)]
    return torch.cat([columns[0], maps, columns[1]], dim=3)
