"""FocalNet for the second implementation of DINO in source_arithmetic.py."""

import torch.nn.functional as F
from torch import Tensor

from .source_layers import SourceLayers


class SourceFocalNet(SourceLayers):
    """FocalNet-L: convolutions as patch embeddings, norms after the layers, and a layer scale."""

    def focalnet(self, x: Tensor) -> list[Tensor]:
        """(B, 3, h, w) -> maps (B, C, h, w) of the four stages, before their downsampling."""
        maps = []
        x = F.pad(x, (0, -x.shape[-1] % 4, 0, -x.shape[-2] % 4))
        x = self.channel_norm(
            self.conv(x, "backbone.0.patch_embed.proj", stride=4, padding=2), "backbone.0.patch_embed.norm", 1e-5
        )
        for stage in range(4):
            name = f"backbone.0.layers.{stage}"
            x = x.movedim(1, -1)  # (B, h, w, C)
            for block in self.numbered(f"{name}.blocks", "norm1.weight"):
                x = self.focalnet_block(x, block)
            has_norm = f"backbone.0.norm{stage}.weight" in self
            maps.append((self.layer_norm(x, f"backbone.0.norm{stage}") if has_norm else x).movedim(-1, 1))
            x = x.movedim(-1, 1)
            if stage < 3:
                x = F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2))
                x = self.conv(x, f"{name}.downsample.proj", stride=2, padding=1)
                x = self.channel_norm(x, f"{name}.downsample.norm", 1e-5)
        return maps

    def focalnet_block(self, x: Tensor, name: str) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)"""
        y = self.layer_norm(self.focal_modulation(x, f"{name}.modulation"), f"{name}.norm1")
        x = x + self[f"{name}.gamma_1"] * y
        y = self.linear(F.gelu(self.linear(x, f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
        return x + self[f"{name}.gamma_2"] * self.layer_norm(y, f"{name}.norm2")

    def focal_modulation(self, x: Tensor, name: str) -> Tensor:
        """Focal modulation (arXiv:2203.11926, eq. 4 to 7): (B, h, w, C) -> (B, h, w, C)."""
        width = x.shape[-1]
        query, context, gates = self.linear(x, f"{name}.f").tensor_split((width, 2 * width), dim=-1)
        context, total = context.movedim(-1, 1), 0
        for level, layer in enumerate(self.numbered(f"{name}.focal_layers", "0.weight")):
            padding = self[f"{layer}.0.weight"].shape[-1] // 2
            context = F.gelu(self.conv(context, f"{layer}.0", padding=padding, groups=width))
            total = total + context * gates[..., level][:, None]
        total = total + F.gelu(context.mean((2, 3), keepdim=True)) * gates[..., -1][:, None]
        return self.linear(query * self.conv(total, f"{name}.h").movedim(1, -1), f"{name}.proj")
