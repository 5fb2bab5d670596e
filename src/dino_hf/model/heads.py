"""The detection head: hidden states -> class logits and box refinements."""

import math

from torch import Tensor, nn

from .layers import MLP, linear, zero

# A probability of 0.01 for each class, because few queries show an object (arXiv:1708.02002, sec. 4.1).
INITIAL_CLASS_BIAS = -math.log(99)


def rare_classes(layer: nn.Linear) -> None:
    """Initial values of a class head."""
    layer.reset_parameters()
    nn.init.constant_(layer.bias, INITIAL_CLASS_BIAS)


def class_head(d_model: int, num_labels: int, **settings) -> nn.Linear:
    """A linear layer with one logit per class."""
    return linear(d_model, num_labels, rare_classes, **settings)


class DetectionHead(nn.Module):
    """Class logits and box refinements from hidden states of width C.

    Query selection has its own head. The decoder has one head for all layers (original release) or one per layer (detrex,
    mmdetection).
    """

    def __init__(self, d_model: int, num_labels: int):
        super().__init__()
        self.class_head = class_head(d_model, num_labels)
        self.box_head = MLP([nn.Linear(d_model, d_model), nn.Linear(d_model, d_model), linear(d_model, 4, zero)])

    def classify(self, hidden_states: Tensor) -> Tensor:
        """(..., C) -> (..., K) logits."""
        return self.class_head(hidden_states)

    def box_delta(self, hidden_states: Tensor) -> Tensor:
        """(..., C) -> (..., 4) in logits, float32: in half precision, a box in a large image would be off by pixels."""
        return self.box_head(hidden_states).float()
