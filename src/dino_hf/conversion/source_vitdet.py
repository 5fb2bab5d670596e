"""ViTDet for the second implementation of DINO in source_arithmetic.py."""

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor

from .source_layers import SourceLayers

_NET, _EPS = "backbone.0.net.", 1e-6


class SourceVitDet(SourceLayers):
    """A plain ViT with windows and relative positions, and the simple feature pyramid."""

    def vitdet(self, x: Tensor) -> list[Tensor]:
        """(B, 3, h, w) -> maps (B, C, h, w) of the pyramid."""
        patch = self[_NET + "patch_embed.proj.weight"].shape[-1]
        x = self.conv(x, _NET + "patch_embed.proj", stride=patch)  # (B, C, h, w)
        table = self[_NET + "pos_embed"][0, 1:].transpose(0, 1)  # (C, cells), without the class token
        side = math.isqrt(table.shape[1])
        table = F.interpolate(table.reshape(1, -1, side, side), size=x.shape[-2:], mode="bicubic", align_corners=False)
        x, block = (x + table).movedim(1, -1), 0  # (B, h, w, C)
        num_blocks = len(
            {name for name in self.tensors if re.fullmatch(r"backbone\.0\.net\.blocks\.\d+\.norm1\.bias", name)}
        )
        whole = self.table_sides(num_blocks - 1)  # the last block attends to the whole image
        for block in range(num_blocks):
            name, sides = f"{_NET}blocks.{block}", self.table_sides(block)
            y = self.layer_norm(x, f"{name}.norm1", _EPS)
            x = x + self.vit_attention(y, f"{name}.attn", None if sides == whole else sides[0])
            y = F.gelu(self.linear(self.layer_norm(x, f"{name}.norm2", _EPS), f"{name}.mlp.fc1"))
            x = x + self.linear(y, f"{name}.mlp.fc2")
        return self.pyramid(x.movedim(-1, 1), patch)

    def table_sides(self, block: int) -> tuple[int, int]:
        """Rows and columns of patches that a block's relative positions are made for."""
        name = f"{_NET}blocks.{block}.attn.rel_pos_"
        return tuple((len(self[name + side]) + 1) // 2 for side in "hw")

    def pyramid(self, x: Tensor, patch: int) -> list[Tensor]:
        """One map (B, C, h, w) -> maps of several sizes."""
        maps = []
        numbers = sorted(
            {int(match[1]) for name in self.tensors if (match := re.match(r"backbone\.0\.simfp_(\d+)\.", name))}
        )
        for number in numbers:
            name, scale, y, layer = f"backbone.0.simfp_{number}.", patch / 2**number, x, 0
            if scale >= 2:
                y, layer = self.transposed(y, name + "0"), 1
            if scale == 4:
                y, layer = self.transposed(F.gelu(self.channel_norm(y, name + "1", _EPS)), name + "3"), 4
            if scale == 0.5:
                y, layer = F.max_pool2d(y, 2), 1
            y = self.channel_norm(self.conv(y, f"{name}{layer}"), f"{name}{layer}.norm", _EPS)
            maps.append(
                self.channel_norm(self.conv(y, f"{name}{layer + 1}", padding=1), f"{name}{layer + 1}.norm", _EPS)
            )
        return [*maps, maps[-1][..., ::2, ::2]] if self.settings.backbone_config.add_pooled_level else maps

    def transposed(self, x: Tensor, name: str) -> Tensor:
        return F.conv_transpose2d(x, self[f"{name}.weight"], self[f"{name}.bias"], stride=2)

    def vit_attention(self, x: Tensor, name: str, window: int | None) -> Tensor:
        """Attention with relative positions, inside windows or over the whole map: (B, h, w, C) -> (B, h, w, C)."""
        height, width = x.shape[1:3]
        if window is not None:
            x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
            rows, columns = x.shape[1] // window, x.shape[2] // window
            x = x.unflatten(2, (columns, window)).unflatten(1, (rows, window)).transpose(2, 3).flatten(0, 2)
        heads = x.shape[-1] // self[f"{name}.rel_pos_h"].shape[1]
        query, key, value = (
            part.unflatten(-1, (heads, -1)).movedim(-2, 1) for part in self.linear(x, f"{name}.qkv").chunk(3, -1)
        )  # (B, heads, h, w, D)
        scores = torch.einsum("bnyxd,bnvud->bnyxvu", query, key) / query.shape[-1] ** 0.5
        table = self.relative_rows(name + ".rel_pos_h", x.shape[1])  # (y, v, D)
        scores = scores + torch.einsum("bnyxd,yvd->bnyxv", query, table)[..., None]
        table = self.relative_rows(name + ".rel_pos_w", x.shape[2])  # (x, u, D)
        scores = scores + torch.einsum("bnyxd,xud->bnyxu", query, table)[..., None, :]
        weights = scores.flatten(-2).softmax(-1).view_as(scores)
        out = torch.einsum("bnyxvu,bnvud->byxnd", weights, value)
        out = self.linear(out.flatten(3), f"{name}.proj")
        if window is None:
            return out
        out = out.unflatten(0, (-1, rows, columns)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return out[:, :height, :width]

    def relative_rows(self, name: str, length: int) -> Tensor:
        """The row of a table of relative positions for each pair of places: (length, length, D)."""
        table = self[name].T[None]  # (1, D, rows)
        if table.shape[-1] != 2 * length - 1:
            table = F.interpolate(table, size=2 * length - 1, mode="linear")
        place = torch.arange(length)
        return table[0].T[place[:, None] - place + length - 1]
