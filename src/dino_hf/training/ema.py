"""Exponential moving average of a model's weights: kept beside them, evaluated in their place, saved as a model of its own."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers.utils import SAFE_WEIGHTS_NAME, is_peft_available

from ..common.regular_files import read_settings

if is_peft_available():
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

EMA_FOLDER = "ema"  # beside the raw weights, in checkpoints and in what is saved at the end
_STATE_NAME = "ema.json"


class ModelEma:
    """An average of the weights that a model has had: with n updates behind it, an update makes it

        average = d * average + (1 - d) * weights,   d = decay * (1 - exp(-n / warmup_steps)),

    so that it starts as the weights of the first update and forgets the early ones soon. Buffers, as the statistics of batch
    norm, are the model's own of the last update.

    Args:
        model: with float32 weights, on its device. It is copied; what wraps it, for distributed training or compilation, is not
            to be passed.
        decay: that `d` comes close to, in [0, 1). At 0.9997 the average spans about 3,300 updates.
        warmup_steps: updates after which `d` has come to 63 % of `decay`; 0: it is `decay` from the start.

    Attributes:
        module: the model with averaged weights.

    Raises:
        ValueError: a decay out of range, or weights of less precision: they would not move by 1 - d of a difference.
    """

    def __init__(self, model: nn.Module, decay: float, warmup_steps: int = 0):
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must be at least 0 and below 1, e.g. 0.9997.")
        coarse = {parameter.dtype for parameter in model.parameters() if parameter.dtype.itemsize < 4}
        if coarse:
            raise ValueError(
                f"The model has weights in {sorted(map(str, coarse))}, too coarse for the small steps of an average; load it with "
                "dtype=torch.float32 and train with bf16=True or fp16=True, which keeps weights in float32."
            )
        self.model, self.decay, self.warmup_steps = model, decay, warmup_steps
        self._average = AveragedModel(model, multi_avg_fn=self._mix)
        self._average.requires_grad_(False).eval()

    @property
    def module(self) -> nn.Module:
        return self._average.module

    @property
    def num_updates(self) -> int:
        return int(self._average.n_averaged)

    def restart(self) -> None:
        """Forget all updates: the next one makes the average the weights as they are then."""
        self._average.n_averaged.zero_()

    def update(self) -> None:
        """Take in the model's weights as they are now. After each optimizer step."""
        self._average.update_parameters(self.model)

    def _mix(self, averages: list[Tensor], weights: list[Tensor], _) -> None:
        # The count that is handed over lies on the weights' device: reading it would wait for the GPU.
        share = -math.expm1(-self.num_updates / self.warmup_steps) if self.warmup_steps else 1.0
        torch._foreach_lerp_(averages, weights, 1 - self.decay * share)

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """The model with the average in place of its weights, which come back bit by bit, also after an exception."""
        own = [tensor.detach().clone() for tensor in _tensors(self.model)]
        try:
            self._give(_tensors(self.module))
            yield self.model
        finally:
            self._give(own)

    @torch.no_grad()
    def _give(self, values: list[Tensor]) -> None:
        for tensor, value in zip(_tensors(self.model), values, strict=True):
            tensor.copy_(value)

    def save(self, folder: str | Path) -> None:
        """Save the averaged model, for `from_pretrained`, and how many updates it has seen. Of a peft model, the adapters are
        saved, in the folder `adapter` of this one."""
        self.module.save_pretrained(self._weights_folder(folder))
        state = {"num_updates": self.num_updates, "decay": self.decay, "warmup_steps": self.warmup_steps}
        (Path(folder) / _STATE_NAME).write_text(json.dumps(state), encoding="utf-8")

    @staticmethod
    def is_saved(folder: str | Path) -> bool:
        """Whether `save` has written there."""
        return (Path(folder) / _STATE_NAME).is_file()

    def _weights_folder(self, folder: str | Path) -> Path:
        # Trainer takes a folder with adapters that is in a checkpoint for one more adapter of the model that it resumes.
        return Path(folder) / "adapter" if _is_peft(self.module) else Path(folder)

    def load(self, folder: str | Path) -> None:
        """Take up an average where `save` left it, bit by bit. The decay stays that of this object.

        Raises:
            FileNotFoundError: nothing was saved there.
            RuntimeError: the weights are those of another model.
        """
        state = read_settings(Path(folder) / _STATE_NAME)
        if _is_peft(self.module):
            adapters = load_peft_weights(str(self._weights_folder(folder)), device="cpu")
            set_peft_model_state_dict(self.module, adapters)
        else:
            safetensors.torch.load_model(self.module, Path(folder) / SAFE_WEIGHTS_NAME)
        self._average.n_averaged.fill_(state["num_updates"])


def _is_peft(model: nn.Module) -> bool:
    return is_peft_available() and isinstance(model, PeftModel)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
