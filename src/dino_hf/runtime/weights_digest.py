"""A digest that identifies the weights of a model, so that a recorded AP is only reported for the weights it belongs to."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn


def weights_digest(model: nn.Module, state_dict: dict[str, Tensor] | None = None) -> str | None:
    """SHA-256 of names, shapes, dtypes and bits of all weights.

    A cast changes the digest, because the model then gives other results. A move to another device does not change it. Tensors
    are copied to the CPU one at a time.

    Args:
        model: `DinoDetrForObjectDetection` or `DinoDetrModel`; both have the same digest if the detector is the same.
        state_dict: tensors to use in place of `model.state_dict()`.
    Returns:
        16 hex digits, or None if a weight is not available as a plain tensor (offloaded, sharded or quantized).
    """
    if state_dict is None:
        if _is_sharded(model):
            return None
        state_dict = model.state_dict()
    prefix, digest = f"{model.base_model_prefix}.", hashlib.sha256()
    tensors = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
    for name, tensor in sorted(tensors.items()):
        if not _is_plain(tensor):
            return None
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16] if state_dict else None


def _is_sharded(model: nn.Module) -> bool:
    """Whether FSDP 1 or DeepSpeed ZeRO 3 shards the weights. (With FSDP 1, all processes must call `state_dict` together.)"""
    is_fsdp = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    return is_fsdp or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _is_plain(value: Any) -> bool:
    is_tensor = type(value) in (Tensor, nn.Parameter)  # no subclass: a DTensor holds only a part
    return is_tensor and not value.is_meta and not value.is_quantized and value.layout == torch.strided
