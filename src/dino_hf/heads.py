"""What turns hidden states into classes and boxes."""

import math

from torch import Tensor, nn

from .layers import MLP, Linear, ZeroLinear


class ClassHead(Linear):
    """One logit per class. Starts at a probability of 0.01 for each: few queries show an object (arXiv:1708.02002, sec. 4.1)."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.bias, -math.log(99))


class DetectionHead(nn.Module):
    """Class logits and box refinement from hidden states of width C.

    Query selection owns one; the decoder owns one for all layers (the release) or one each (detrex, mmdetection).
    """

    def __init__(self, d_model: int, num_labels: int):
        super().__init__()
        self.class_head = ClassHead(d_model, num_labels)
        self.box_head = MLP([Linear(d_model, d_model), Linear(d_model, d_model), ZeroLinear(d_model, 4)])

    def classify(self, hidden_states: Tensor) -> Tensor:
        """(..., C) -> (..., K) logits."""
        return self.class_head(hidden_states)

    def box_delta(self, hidden_states: Tensor) -> Tensor:
        """(..., C) -> (..., 4) in logits, float32: half precision moves a box of a large image by pixels."""
        return self.box_head(hidden_states).float()
