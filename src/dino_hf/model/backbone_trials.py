"""Properties of backbones that only a forward pass shows. It runs on the device "meta", which computes nothing."""

import logging

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

logger = logging.getLogger(__name__)

_ERRORS = (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError)


def unused_parameters(backbone: nn.Module, config: PreTrainedConfig) -> frozenset[str]:
    """Names of the trainable parameters that no feature map depends on, such as mask tokens and layers after the last map.

    Empty if the backbone cannot run on the device "meta".

    Raises:
        ValueError: the backbone does not return feature maps of the form (B, C, h, w) with its `channels`.
    """
    parameters = {name: torch.empty_like(p, device="meta").requires_grad_() for name, p in backbone.named_parameters()}
    size = getattr(config, "image_size", None)
    sides = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    height, width = (side if isinstance(side, int) and 32 <= side <= 1024 else 224 for side in sides)
    try:
        outputs = _run_without_numbers(backbone, height, width, parameters)
    except _ERRORS as error:
        logger.info("Unused parameters of %s are unknown: %s", type(backbone).__name__, error)
        return frozenset()
    shapes = [tuple(level.shape) for level in outputs.feature_maps]
    if any(len(shape) != 4 or shape[1] != channel for shape, channel in zip(shapes, backbone.channels, strict=True)):
        raise ValueError(
            f"{type(backbone).__name__} returns maps of the shapes {shapes} instead of {backbone.channels} channels, (batch, "
            "channels, height, width), so a detector cannot be built on it; choose another backbone."
        )
    reached = _leaves([level.grad_fn for level in outputs.feature_maps])
    return frozenset(name for name, parameter in parameters.items() if id(parameter) not in reached)


def takes_size(backbone: nn.Module, height: int, width: int) -> bool:
    """Whether a backbone accepts images of this size. False also if it cannot run on the device "meta"."""
    parameters = {name: torch.empty_like(p, device="meta") for name, p in backbone.named_parameters()}
    try:
        _run_without_numbers(backbone, height, width, parameters)
    except _ERRORS:
        return False
    return True


def side_multiple(backbone: nn.Module, stride: int) -> int | None:
    """The number that must divide the height and width of images.

    Args:
        stride: stride of the coarsest map of the whole network.
    Returns:
        1: the backbone accepts images of any size. `stride`: it adds maps of several strides, so their sizes must match, as in
        HRNet. None: it accepts few sizes only, or cannot run on the device "meta".
    """
    if takes_size(backbone, 7 * stride - stride // 3, 10 * stride + stride // 2 - 3):
        return 1
    return stride if takes_size(backbone, 7 * stride, 10 * stride) else None


def _run_without_numbers(
    backbone: nn.Module, height: int, width: int, parameters: dict[str, torch.Tensor]
) -> ModelOutput:
    buffers = {name: torch.empty_like(buffer, device="meta") for name, buffer in backbone.named_buffers()}
    was_training = backbone.training
    backbone.eval()  # disables stochastic depth
    try:
        with torch.enable_grad(), torch.device("meta"):
            pixel_values = torch.empty(1, 3, height, width)
            return torch.func.functional_call(backbone, parameters | buffers, (pixel_values,))
    finally:
        backbone.train(was_training)


def _leaves(nodes: list) -> set[int]:
    """Ids of the leaf tensors of an autograd graph."""
    seen, found = set(), set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        nodes.extend(parent for parent, _ in node.next_functions)
    return found
