"""What turns hidden states into classes and boxes."""

import math

from torch import Tensor, nn

from .cpu_speed import fast_linear
from .layers import MLP, linear, zero


def rare_classes(layer: nn.Linear) -> None:
    """Initial values of a class head: a probability of 0.01 for each class, for few queries show an object (arXiv:1708.02002, sec.
    4.1)."""
    layer.reset_parameters()
    nn.init.constant_(layer.bias, -math.log(99))


def class_head(d_model: int, num_labels: int, **settings) -> nn.Linear:
    """One logit per class."""
    return linear(d_model, num_labels, rare_classes, **settings)


class DetectionHead(nn.Module):
    """Class logits and box refinement from hidden states of width C.

    Query selection owns one; the decoder owns one for all layers (the release) or one each (detrex, mmdetection).
    """

    def __init__(self, d_model: int, num_labels: int):
        super().__init__()
        self.class_head = class_head(d_model, num_labels)
        self.box_head = MLP([nn.Linear(d_model, d_model), nn.Linear(d_model, d_model), linear(d_model, 4, zero)])

    @fast_linear
    def classify(self, hidden_states: Tensor) -> Tensor:
        """(..., C) -> (..., K) logits."""
        return self.class_head(hidden_states)

    def box_delta(self, hidden_states: Tensor) -> Tensor:
        """(..., C) -> (..., 4) in logits, float32: half precision moves a box of a large image by pixels."""
        return self.box_head(hidden_states).float()
