"""DINO once more, written out plainly on the tensors of a checkpoint by the release's names: what a conversion is checked with.

It shares no code with dino_hf, takes no kernel and no module of transformers, and is slow. Stage by stage and layer by layer, so
that a difference can be told from its consequences. tests/parity/ holds it to the recordings of all three projects.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Trace(NamedTuple):
    """What a model computed on the way: the input and the output of each stage. Masks are True on the image."""

    features: list[Tensor]  # of the backbone, (B, C, h, w)
    maps: list[Tensor]  # L of the neck
    masks: list[Tensor]  # (B, h, w)
    tokens: list[Tensor]  # input of the encoder and output of each layer, (B, S, C)
    proposal_logits: Tensor  # (B, Q, K) of the selected tokens
    proposal_boxes: Tensor  # (B, Q, 4)
    queries: list[Tensor]  # input of the decoder and output of each layer, (B, Q, C)
    references: list[Tensor]  # boxes that each layer starts from, (B, Q, 4)
    logits: list[Tensor]  # of each layer, (B, Q, K)
    boxes: list[Tensor]  # of each layer, (B, Q, 4)


class SourceArithmetic:
    """Everything is computed in float32, whatever the tensors are.

    Args:
        tensors: by the names of the original release.
        settings: position_temperature, position_offset, pred_boxes_eps, encoder_attention_heads, decoder_attention_heads
            and num_queries, as in the configuration of dino_hf.
    """

    def __init__(self, tensors: dict[str, Tensor], settings):
        self.tensors = {
            name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
        }
        self.settings = settings
        self.num_levels = len(tensors["transformer.level_embed"])

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    # -- small parts

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def layer_norm(self, x: Tensor, name: str, eps: float = 1e-5) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self[f"{name}.weight"], self[f"{name}.bias"], eps)

    def mlp(self, x: Tensor, name: str, depth: int) -> Tensor:
        for layer in range(depth):
            x = self.linear(x, f"{name}.layers.{layer}")
            x = x.relu() if layer < depth - 1 else x
        return x

    def conv(self, x: Tensor, name: str, **options) -> Tensor:
        return F.conv2d(x, self[f"{name}.weight"], self.tensors.get(f"{name}.bias"), **options)

    def channel_norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return self.layer_norm(x.movedim(1, -1), name, eps).movedim(-1, 1)

    # -- backbones: (B, 3, h, w) -> maps (B, C, h, w), finest first

    def backbone(self, pixels: Tensor) -> list[Tensor]:
        if "backbone.0.body.conv1.weight" in self:
            maps = self.resnet(pixels)
        elif "backbone.0.patch_embed.proj.weight" in self:
            maps = self.swin(pixels)
        else:
            maps = self.convnext(pixels)
        used = 0
        while f"input_proj.{used}.0.weight" in self and self[f"input_proj.{used}.0.weight"].shape[-1] == 1:
            used += 1
        return maps[-used:]

    def resnet(self, x: Tensor) -> list[Tensor]:
        prefix = "backbone.0.body."

        def norm(x: Tensor, name: str) -> Tensor:
            mean, variance, weight, bias = (
                self[f"{prefix}{name}.{part}"][:, None, None]
                for part in ("running_mean", "running_var", "weight", "bias")
            )
            return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

        x = norm(self.conv(x, prefix + "conv1", stride=2, padding=3), "bn1").relu()
        x = F.max_pool2d(x, 3, 2, 1)
        maps = []
        for stage in range(1, 5):
            block = 0
            while f"{prefix}layer{stage}.{block}.conv1.weight" in self:
                name = f"layer{stage}.{block}"
                stride = 2 if stage > 1 and block == 0 else 1
                strides = [1, stride, 1] if f"{prefix}{name}.conv3.weight" in self else [stride, 1]
                y = x
                for part, step in enumerate(strides, 1):
                    padding = self[f"{prefix}{name}.conv{part}.weight"].shape[-1] // 2
                    y = norm(
                        self.conv(y, f"{prefix}{name}.conv{part}", stride=step, padding=padding), f"{name}.bn{part}"
                    )
                    y = y.relu() if part < len(strides) else y
                if f"{prefix}{name}.downsample.0.weight" in self:
                    x = norm(self.conv(x, f"{prefix}{name}.downsample.0", stride=stride), f"{name}.downsample.1")
                x, block = (x + y).relu(), block + 1
            maps.append(x)
        return maps

    def swin(self, x: Tensor) -> list[Tensor]:
        prefix = "backbone.0."
        x = F.pad(x, (0, -x.shape[-1] % 4, 0, -x.shape[-2] % 4))
        x = self.conv(x, prefix + "patch_embed.proj", stride=4).movedim(1, -1)  # (B, h, w, C)
        x = self.layer_norm(x, prefix + "patch_embed.norm")
        maps = []
        for stage in range(4):
            block = 0
            while f"{prefix}layers.{stage}.blocks.{block}.norm1.weight" in self:
                name = f"{prefix}layers.{stage}.blocks.{block}"
                x = x + self.window_attention(self.layer_norm(x, f"{name}.norm1"), f"{name}.attn", shift=block % 2 == 1)
                y = F.gelu(self.linear(self.layer_norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
                x, block = x + self.linear(y, f"{name}.mlp.fc2"), block + 1
            if f"{prefix}norm{stage}.weight" in self:
                maps.append(self.layer_norm(x, f"{prefix}norm{stage}").movedim(-1, 1))
            if stage < 3:
                x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
                x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], dim=-1)
                x = self.layer_norm(x, f"{prefix}layers.{stage}.downsample.norm")
                x = self.linear(x, f"{prefix}layers.{stage}.downsample.reduction")
        return maps

    def window_attention(self, x: Tensor, name: str, shift: bool) -> Tensor:
        """Attention inside windows, which are shifted by half a window in every second block. (B, h, w, C)"""
        table = self[f"{name}.relative_position_bias_table"]
        window, heads = (math.isqrt(len(table)) + 1) // 2, table.shape[1]
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
        rows, columns = x.shape[1], x.shape[2]
        step = window // 2 if shift else 0

        def region(length: int) -> Tensor:
            """Which cells were neighbours before the shift: 0 before the last window, 1 and 2 in its two parts."""
            places = torch.arange(length)
            return (places >= length - window).long() + (places >= length - step).long() if step else places * 0

        def windows(x: Tensor) -> Tensor:  # (B, h, w, C) -> (B, windows, window * window, C)
            x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window)).transpose(2, 3)
            return x.flatten(3, 4).flatten(1, 2)

        x = windows(x.roll((-step, -step), (1, 2)))
        query, key, value = (
            part.unflatten(-1, (heads, -1)).transpose(2, 3) for part in self.linear(x, f"{name}.qkv").chunk(3, -1)
        )
        y, other = torch.arange(window * window), torch.arange(window * window)[:, None]
        row = (other // window - y // window + window - 1) * (2 * window - 1) + other % window - y % window + window - 1
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + table[row].permute(2, 0, 1)
        regions = windows((region(rows)[:, None] * 3 + region(columns))[None, ..., None])[
            0, :, :, 0
        ]  # (windows, cells)
        scores = scores.masked_fill((regions[:, None, :] != regions[:, :, None])[None, :, None], -100.0)
        x = self.linear((scores.softmax(-1) @ value).transpose(2, 3).flatten(3), f"{name}.proj")
        x = x.unflatten(2, (window, window)).unflatten(1, (rows // window, columns // window)).transpose(2, 3)
        return x.flatten(3, 4).flatten(1, 2).roll((step, step), (1, 2))[:, :height, :width]

    def convnext(self, x: Tensor) -> list[Tensor]:
        prefix, maps = "backbone.0.", []
        for stage in range(4):
            first, second = (f"{prefix}downsample_layers.{stage}.{part}" for part in (0, 1))
            if stage == 0:
                x = self.channel_norm(self.conv(x, first, stride=4), second, 1e-6)
            else:
                x = self.conv(self.channel_norm(x, first, 1e-6), second, stride=2)
            block = 0
            while f"{prefix}stages.{stage}.{block}.gamma" in self:
                name = f"{prefix}stages.{stage}.{block}"
                y = self.conv(x, f"{name}.dwconv", padding=3, groups=x.shape[1]).movedim(1, -1)
                y = F.gelu(self.linear(self.layer_norm(y, f"{name}.norm", 1e-6), f"{name}.pwconv1"))
                x = x + (self[f"{name}.gamma"] * self.linear(y, f"{name}.pwconv2")).movedim(-1, 1)
                block += 1
            known = f"{prefix}norm{stage}.weight" in self
            maps.append(self.channel_norm(x, f"{prefix}norm{stage}", 1e-6) if known else x)
        return maps

    # -- neck, and the geometry of padding

    def neck(self, features: list[Tensor]) -> list[Tensor]:
        """Maps of the backbone -> L maps (B, C, h, w)."""
        maps = []
        for level in range(self.num_levels):
            if level < len(features):
                x = self.conv(features[level], f"input_proj.{level}.0")
            else:
                last = features[-1] if level == len(features) else maps[-1]
                x = self.conv(last, f"input_proj.{level}.0", stride=2, padding=1)
            maps.append(F.group_norm(x, 32, self[f"input_proj.{level}.1.weight"], self[f"input_proj.{level}.1.bias"]))
        return maps

    @staticmethod
    def masks(pixel_mask: Tensor, maps: list[Tensor]) -> list[Tensor]:
        """(B, h, w) True on the image -> the same for each level."""
        return [F.interpolate(pixel_mask[:, None].float(), size=level.shape[-2:])[:, 0] > 0 for level in maps]

    @staticmethod
    def valid_ratios(masks: list[Tensor]) -> Tensor:
        """(B, L, 2): share of the width, share of the height."""
        return torch.stack(
            [torch.stack([mask[:, 0].float().mean(-1), mask[:, :, 0].float().mean(-1)], -1) for mask in masks], dim=1
        )

    @staticmethod
    def centers(masks: list[Tensor]) -> Tensor:
        """(B, S, 2) as (x, y), relative to the image without its padding."""
        centers = []
        for mask in masks:
            height, width = mask.shape[1:]
            y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
            columns, rows = mask[:, 0].sum(-1)[:, None], mask[:, :, 0].sum(-1)[:, None]  # (B, 1)
            centers.append(torch.stack([x.flatten() / columns, y.flatten() / rows], -1))
        return torch.cat(centers, dim=1)

    # -- attention

    def deformable(
        self, name: str, query: Tensor, references: Tensor, memory: Tensor, masks: list[Tensor], heads: int
    ) -> Tensor:
        """references: (B, Q, L, 2 or 4), relative to each level with its padding."""
        value = self.linear(memory, f"{name}.value_proj")
        value = value * torch.cat([mask.flatten(1) for mask in masks], 1)[..., None]
        value = value.unflatten(-1, (heads, -1))  # (B, S, H, D)
        offsets = self.linear(query, f"{name}.sampling_offsets").unflatten(-1, (heads, self.num_levels, -1, 2))
        weights = self.linear(query, f"{name}.attention_weights").unflatten(-1, (heads, -1)).softmax(-1)
        weights = weights.unflatten(-1, (self.num_levels, -1))  # (B, Q, H, L, P)
        points = offsets.shape[-2]
        out, start = 0, 0
        for level, mask in enumerate(masks):
            height, width = mask.shape[1:]
            reference = references[:, :, None, level, None]  # (B, Q, 1, 1, 2 or 4)
            if reference.shape[-1] == 2:
                places = reference + offsets[:, :, :, level] / torch.tensor([width, height])
            else:
                places = reference[..., :2] + offsets[:, :, :, level] / points * reference[..., 2:] / 2
            samples = self.sample(value[:, start : start + height * width], height, width, places)
            out = out + (samples * weights[:, :, :, level, :, None]).sum(-2)  # (B, Q, H, D)
            start += height * width
        return self.linear(out.flatten(2), f"{name}.output_proj")

    @staticmethod
    def sample(value: Tensor, height: int, width: int, places: Tensor) -> Tensor:
        """Bilinear samples, zero outside. (B, h * w, H, D) at (B, Q, H, P, 2) -> (B, Q, H, P, D)."""
        x, y = places[..., 0] * width - 0.5, places[..., 1] * height - 0.5
        left, top = x.floor(), y.floor()
        batch = torch.arange(len(value))[:, None, None, None]
        head = torch.arange(value.shape[2])[None, None, :, None]
        total = 0
        for column, row in ((left, top), (left + 1, top), (left, top + 1), (left + 1, top + 1)):
            share = (1 - (x - column).abs()) * (1 - (y - row).abs())
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            index = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).long()
            total = total + value[batch, index, head] * (share * inside)[..., None]
        return total

    # -- encoder

    def num_layers(self, side: str) -> int:
        layers = 0
        while f"transformer.{side}.layers.{layers}.norm1.weight" in self:
            layers += 1
        return layers

    def positions(self, masks: list[Tensor]) -> Tensor:
        """(B, S, C): where a cell is on its level, and which level that is."""
        levels = zip(masks, self["transformer.level_embed"], strict=True)
        return torch.cat([self.map_position(mask).flatten(1, 2) + embedding for mask, embedding in levels], dim=1)

    def encoder_layer(self, layer: int, tokens: Tensor, positions: Tensor, masks: list[Tensor]) -> Tensor:
        """(B, S, C) -> (B, S, C)"""
        name, heads = f"transformer.encoder.layers.{layer}", self.settings.encoder_attention_heads
        references = self.centers(masks)[:, :, None] * self.valid_ratios(masks)[:, None]  # (B, S, L, 2)
        attended = self.deformable(f"{name}.self_attn", tokens + positions, references, tokens, masks, heads)
        return self.feed_forward(self.layer_norm(tokens + attended, f"{name}.norm1"), name, "norm2")

    def feed_forward(self, x: Tensor, name: str, norm: str) -> Tensor:
        inner = self.linear(self.linear(x, f"{name}.linear1").relu(), f"{name}.linear2")
        return self.layer_norm(x + inner, f"{name}.{norm}")

    def map_position(self, mask: Tensor) -> Tensor:
        """(B, h, w, C): y, then x."""
        parts = []
        for axis in (1, 2):
            count = mask.float().cumsum(axis)
            last = count.amax(axis, keepdim=True)
            angle = (count + self.settings.position_offset) / (last + 1e-6) * 2 * math.pi
            parts.append(
                self.sine(angle, self["transformer.level_embed"].shape[1] // 2, self.settings.position_temperature)
            )
        return torch.cat(parts, -1)

    @staticmethod
    def sine(angle: Tensor, width: int, temperature: float) -> Tensor:
        """(...) -> (..., width): sine at even, cosine at odd places."""
        out = angle.new_empty(*angle.shape, width)
        for i in range(width):
            scaled = angle / temperature ** (2 * (i // 2) / width)
            out[..., i] = scaled.cos() if i % 2 else scaled.sin()
        return out

    # -- query selection

    def proposals(self, memory: Tensor, masks: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Of every token: logits (B, S, K), and its box (B, S, 4), all sides 1 where there is no anchor."""
        sizes = torch.cat([torch.full((mask[0].numel(), 2), 0.05 * 2.0**level) for level, mask in enumerate(masks)])
        centers = self.centers(masks)
        anchors = torch.cat([centers, sizes.expand_as(centers)], -1)
        valid = ((anchors > 0.01) & (anchors < 0.99)).all(-1) & torch.cat([mask.flatten(1) for mask in masks], 1)
        anchors = torch.where(valid[..., None], torch.log(anchors / (1 - anchors)), torch.inf)
        tokens = self.linear(memory * valid[..., None], "transformer.enc_output")
        tokens = self.layer_norm(tokens, "transformer.enc_output_norm")
        boxes = self.mlp(tokens, "transformer.enc_out_bbox_embed", 3) + anchors
        return self.linear(tokens, "transformer.enc_out_class_embed"), boxes.sigmoid()

    # -- decoder

    def content(self, references: Tensor) -> Tensor:
        """(B, Q, C), the same for every image."""
        return self["transformer.tgt_embed.weight"][: references.shape[1]].expand(len(references), -1, -1)

    def decoder_layer(
        self, layer: int, queries: Tensor, references: Tensor, memory: Tensor, masks: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, Q, C), (B, Q, 4) -> queries (B, Q, C), logits (B, Q, K), boxes (B, Q, 4), references of the next layer (B, Q, 4)."""
        name, heads = f"transformer.decoder.layers.{layer}", self.settings.decoder_attention_heads
        scaled = references[:, :, None] * self.valid_ratios(masks).repeat(1, 1, 2)[:, None]  # (B, Q, L, 4)
        x, y, w, h = (scaled[:, :, 0] * 2 * math.pi).unbind(-1)
        sine = torch.cat([self.sine(part, queries.shape[-1] // 2, 10000) for part in (y, x, w, h)], -1)
        position = self.mlp(sine, "transformer.decoder.ref_point_head", 2)
        attended = self.self_attention(queries + position, queries, f"{name}.self_attn", heads)
        queries = self.layer_norm(queries + attended, f"{name}.norm2")
        attended = self.deformable(f"{name}.cross_attn", queries + position, scaled, memory, masks, heads)
        queries = self.feed_forward(self.layer_norm(queries + attended, f"{name}.norm1"), name, "norm3")
        normed = self.layer_norm(queries, "transformer.decoder.norm")
        bounded = self.inverse_sigmoid(references, self.settings.pred_boxes_eps)
        boxes = (self.mlp(normed, f"bbox_embed.{layer}", 3) + bounded).sigmoid()
        moved = self.mlp(queries, f"bbox_embed.{layer}", 3) + self.inverse_sigmoid(references, 1e-3)
        return queries, self.linear(normed, f"class_embed.{layer}"), boxes, moved.sigmoid()

    @staticmethod
    def inverse_sigmoid(x: Tensor, eps: float) -> Tensor:
        return torch.log(x.clamp(eps, 1) / (1 - x).clamp(eps, 1))

    def self_attention(self, placed: Tensor, value: Tensor, name: str, heads: int) -> Tensor:
        weights, biases = self[f"{name}.in_proj_weight"].chunk(3), self[f"{name}.in_proj_bias"].chunk(3)
        query, key, value = (
            F.linear(x, weight, bias).unflatten(-1, (heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((placed, placed, value), weights, biases, strict=True)
        )
        scores = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
        return self.linear((scores @ value).transpose(1, 2).flatten(2), f"{name}.out_proj")

    # -- all of it

    def run(self, pixels: Tensor, pixel_mask: Tensor) -> Trace:
        """(B, 3, h, w), (B, h, w) True on the image."""
        features = self.backbone(pixels)
        maps = self.neck(features)
        masks = self.masks(pixel_mask, maps)
        tokens, positions = [torch.cat([level.flatten(2).transpose(1, 2) for level in maps], 1)], self.positions(masks)
        for layer in range(self.num_layers("encoder")):
            tokens.append(self.encoder_layer(layer, tokens[-1], positions, masks))
        logits, boxes = self.proposals(tokens[-1], masks)
        num_queries = min(self.settings.num_queries, logits.shape[1])
        best = logits.amax(-1).topk(num_queries, dim=1).indices[..., None]  # (B, Q, 1)
        logits, boxes = logits.take_along_dim(best, 1), boxes.take_along_dim(best, 1)
        trace = Trace(features, maps, masks, tokens, logits, boxes, [self.content(boxes)], [boxes], [], [])
        for layer in range(self.num_layers("decoder")):
            of_layer = self.decoder_layer(layer, trace.queries[-1], trace.references[-1], tokens[-1], masks)
            for entries, entry in zip(
                (trace.queries, trace.logits, trace.boxes, trace.references), of_layer, strict=True
            ):
                entries.append(entry)
        trace.references.pop()  # no layer starts from the last
        return trace
