"""Linear layers by their initial values, and the two small networks that are made of them.

Each layer owns its initial values (`reset_parameters`), so a fresh model, a key that is missing from a checkpoint and a unit
test all get the same ones. The library guards `torch.nn.init` while it loads: parameters from a checkpoint stay as they are.
"""

from torch import Tensor, nn


class XavierLinear(nn.Linear):
    """Starts xavier-uniform, with zero bias."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)


class ZeroLinear(nn.Linear):
    """Starts as the constant zero: attention weights are uniform, a box refinement leaves boxes where they are."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class TransformerLinear(nn.Linear):
    """Starts xavier-uniform with torch's own bias: the release draws the matrices of its transformer anew, not the biases."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.xavier_uniform_(self.weight)


class XavierConv2d(nn.Conv2d):
    """Starts xavier-uniform, with zero bias if it has one."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class FeedForward(nn.Module):
    """The block of two layers at the end of every transformer layer: (..., C) -> (..., C)."""

    def __init__(self, d_model: int, ffn_dim: int):
        super().__init__()
        self.fc1 = TransformerLinear(d_model, ffn_dim)
        self.fc2 = TransformerLinear(ffn_dim, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())


class MLP(nn.Module):
    """Linear layers with ReLU between them: (..., in) -> (..., out)."""

    def __init__(self, layers: list[nn.Linear]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        *inner, last = self.layers
        for layer in inner:
            x = layer(x).relu()
        return last(x)
