"""Export a detector as one graph of plain operators, for batches and images of any size."""

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..common.text import first_line
from ..model.attention_backends import use_backend
from ..model.modeling_dino_detr import DinoDetrForObjectDetection
from .any_size import any_size
from .comparison import TOLERANCES, check_difference, compare_predictions

# Height and width of the traced images. At strides 4 to 64, their maps are not multiples of a Swin's window, so the graph contains
# its padding. For sizes that need none, the graph pads by zero.
_EXAMPLE = 577, 961
_CHECKED = 256, 320  # size of a second image, which a graph that is valid for one size only would refuse


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

    The program takes pixel_values (B, 3, h, w) float32 and pixel_mask (B, h, w) int64, 1 on the image and 0 on padding. It returns
    logits (B, Q, K) and boxes (B, Q, 4), both float32; boxes are cxcywh in [0, 1] of the unpadded image. It runs on the model's
    device and shares the model's parameters.

    Images must be large enough. The coarsest feature map needs at least two rows and two columns: more than 64 pixels for four
    levels, more than 96 with a ConvNeXt, and at least 96 with a pyramid on patches of 16 pixels. All maps together need a cell for
    each of the Q queries: 224 x 224 pixels for 900.

    Before it is returned, the program runs on an image of another size. In float32, its detections are compared with the model's.

    Raises:
        ValueError: the model is not a `DinoDetrForObjectDetection`, or its backbone cannot be traced for all sizes.
    """
    if not isinstance(model, DinoDetrForObjectDetection):
        raise ValueError(f"A {type(model).__name__} cannot be exported; only a DinoDetrForObjectDetection can.")
    training = [module for module in model.modules() if module.training]  # modules may be in different modes
    predictions = _Predictions(model).eval()
    device = model.device
    try:
        # The graph must run on other machines, so it uses plain operators and ignores the backend in the configuration.
        with torch.no_grad(), use_backend("gather"), any_size(model):
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
    except (RuntimeError, ValueError) as error:  # RuntimeError: torch found a part that depends on the size
        backbone = type(model.model.backbone.model).__name__
        raise ValueError(
            f"A model with a {backbone} of this configuration cannot be exported for images of any size: {first_line(error)}"
        ) from error
    finally:
        for module in training:
            module.training = True
    return program


def _drop_assertions(program: ExportedProgram) -> None:
    """Remove assertions that hold only for the traced sizes, for example about contiguous tensors."""
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()


def _check(program: ExportedProgram, predictions: _Predictions) -> None:
    """Compare the program with the model, on a padded image of another size than the traced one."""
    config, (height, width) = predictions.model.config, _CHECKED
    dtype, device = predictions.model.dtype, predictions.model.device
    pixel_values = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones(1, height, width, dtype=torch.long, device=device)
    mask[:, :, -width // 5 :] = 0
    expected = predictions(pixel_values, mask)
    while expected[0].shape[1] < config.num_queries:  # the image was too small for so many queries
        pixel_values, mask = pixel_values.repeat(1, 1, 2, 2), mask.repeat(1, 2, 1).repeat_interleave(2, dim=2)
        expected = predictions(pixel_values, mask)
    found = program.module()(pixel_values, mask)
    # In half precision, rounding changes the detections of random images too much to compare. It is enough that the program runs.
    if dtype == torch.float32:
        check_difference(compare_predictions(expected, found), TOLERANCES[dtype], "the program of torch.export")
