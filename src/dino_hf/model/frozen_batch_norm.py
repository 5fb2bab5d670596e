"""Batch norm with constant statistics."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def drop_unused_keys(module: nn.Module, state_dict: dict, prefix: str, *args) -> None:
    """Before `load_state_dict`, remove the entries of a published backbone that `module` has no use for."""
    for name in ("weight", "bias") if isinstance(module, nn.Identity) else ("num_batches_tracked",):
        state_dict.pop(prefix + name, None)


class FrozenBatchNorm2d(nn.Module):
    """Batch norm with constant statistics and scale: detectors train on too few images per step to estimate them."""

    def __init__(self, num_features: int, eps: float, activation: nn.Module | None = None):
        super().__init__()
        self.eps = eps
        self.activation = activation or nn.Identity()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.empty(num_features))
        self.register_load_state_dict_pre_hook(drop_unused_keys)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.running_mean)
        nn.init.ones_(self.running_var)

    def forward(self, x: Tensor) -> Tensor:
        statistics = self.running_mean, self.running_var
        return self.activation(F.batch_norm(x, *statistics, self.weight, self.bias, training=False, eps=self.eps))


def freeze_batch_norm(module: nn.Module) -> None:
    """Replace every BatchNorm2d below `module` by its frozen form with the same values."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            # timm has a batch norm that contains the dropout and the activation after it.
            followed_by = [getattr(child, part) for part in ("drop", "act") if hasattr(child, part)]
            frozen = FrozenBatchNorm2d(
                child.num_features, child.eps, nn.Sequential(*followed_by) if followed_by else None
            )
            frozen.load_state_dict(child.state_dict(), assign=True)
            setattr(module, name, frozen)
        else:
            freeze_batch_norm(child)
