"""Exponential moving average of a model's weights: kept beside the weights, evaluated and saved as a model."""

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

ADAPTER_FOLDER = "adapter"  # in EMA_FOLDER, if the model has adapters
EMA_FOLDER = "ema"  # beside the raw weights, in checkpoints and in the final folder
_STATE_NAME = "ema.json"


class ModelEma:
    """Exponential moving average of the weights of a model. After n updates, the next update sets

        average = d * average + (1 - d) * weights,   d = decay * (1 - exp(-n / warmup_steps)).

    So the average starts with the weights of the first update, and early weights soon lose their influence. Buffers, such as batch
    norm statistics, are copied from the model at each update.

    Args:
        model: with float32 weights, on its device. It is copied. Do not pass a model wrapped for distributed training or
            compilation.
        decay: limit of `d`, in [0, 1). With 0.9997, the average spans about 3,300 updates.
        warmup_steps: number of updates after which `d` is 63 % of `decay`. 0: `d` is `decay` from the start.

    Attributes:
        module: the model with averaged weights.

    Raises:
        ValueError: the decay is out of range, or the weights have too low precision for steps of 1 - d of a difference.
    """

    def __init__(self, model: nn.Module, decay: float, warmup_steps: int = 0):
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must be at least 0 and below 1, e.g. 0.9997.")
        coarse = {parameter.dtype for parameter in model.parameters() if parameter.dtype.itemsize < 4}
        if coarse:
            raise ValueError(
                f"The model has weights in {sorted(map(str, coarse))}, too coarse for the small steps of an average. Load it with "
                "dtype=torch.float32 and train with bf16=True or fp16=True, which keep weights in float32."
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
        """Forget all updates. The next update sets the average to the weights."""
        self._average.n_averaged.zero_()

    def update(self) -> None:
        """Add the current weights of the model to the average. Call it after each optimizer step."""
        self._average.update_parameters(self.model)

    def _mix(self, averages: list[Tensor], weights: list[Tensor], _) -> None:
        # The count passed by torch lies on the device of the weights: reading it would wait for the GPU.
        share = -math.expm1(-self.num_updates / self.warmup_steps) if self.warmup_steps else 1.0
        torch._foreach_lerp_(averages, weights, 1 - self.decay * share)

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """The model with the average in place of its weights. Its own weights are restored exactly, even after an exception."""
        own = [tensor.detach().clone() for tensor in _tensors(self.model)]
        try:
            self._copy_to_model(_tensors(self.module))
            yield self.model
        finally:
            self._copy_to_model(own)

    @torch.no_grad()
    def _copy_to_model(self, values: list[Tensor]) -> None:
        for tensor, value in zip(_tensors(self.model), values, strict=True):
            tensor.copy_(value)

    def save(self, folder: str | Path) -> None:
        """Save the averaged model, for `from_pretrained`, and the number of updates.

        For a peft model, the adapters are saved, in the sub-folder `adapter`.
        """
        self.module.save_pretrained(self._weights_folder(folder))
        state = {"num_updates": self.num_updates, "decay": self.decay, "warmup_steps": self.warmup_steps}
        (Path(folder) / _STATE_NAME).write_text(json.dumps(state), encoding="utf-8")

    @staticmethod
    def is_saved(folder: str | Path) -> bool:
        """Whether `save` has written to this folder."""
        return (Path(folder) / _STATE_NAME).is_file()

    def _weights_folder(self, folder: str | Path) -> Path:
        # Trainer would load a folder with adapters in a checkpoint as one more adapter of the resumed model.
        return Path(folder) / ADAPTER_FOLDER if _is_peft(self.module) else Path(folder)

    def load(self, folder: str | Path) -> None:
        """Load an average exactly as `save` wrote it. This object keeps its own decay.

        Raises:
            FileNotFoundError: the folder has no average.
            RuntimeError: the weights belong to another model.
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
