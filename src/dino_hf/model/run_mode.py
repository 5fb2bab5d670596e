"""How the model is being run: by a compiler or tracer, or with re-entrant checkpointing."""

import torch
from torch import Tensor, nn


def is_traced() -> bool:
    """Whether we are being compiled or traced. Then use plain operators: the graph must fit any machine and any input."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def require_gradient(x: Tensor, layers: nn.Module) -> Tensor:
    """Return x, with `requires_grad` set if the checkpointing of `layers` needs it.

    Re-entrant checkpointing computes gradients only if an input of the layer requires a gradient. Behind frozen layers (LoRA,
    frozen stages) no input does.
    """
    if x.requires_grad or not torch.is_grad_enabled() or not any(map(_is_reentrant, layers.modules())):
        return x
    return x.detach().requires_grad_()


def _is_reentrant(layer: nn.Module) -> bool:
    """Whether the layer is checkpointed by torch's re-entrant implementation, which is torch's default."""
    if not (layer.training and getattr(layer, "gradient_checkpointing", False)):
        return False
    return getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant", True)
