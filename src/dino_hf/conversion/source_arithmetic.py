"""A second implementation of DINO, to verify conversions.

It computes directly with the tensors of a checkpoint, by the names of the original release. It shares no code with dino_hf, uses
no kernels and no modules of transformers, and is slow. It runs stage by stage and layer by layer, so the first stage that differs
can be found. tests/parity/ compares it with recordings of all projects.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .source_backbones import SourceBackbones


class Trace(NamedTuple):
    """Inputs and outputs of the stages of a model. Masks are True on the image."""

    features: list[Tensor]  # output of the backbone, (B, C, h, w)
    maps: list[Tensor]  # L outputs of the neck
    masks: list[Tensor]  # (B, h, w)
    tokens: list[Tensor]  # input of the encoder and output of each layer, (B, S, C)
    memory: Tensor  # output of the encoder, (B, S, C)
    proposal_logits: Tensor  # (B, Q, K) of the selected tokens
    proposal_boxes: Tensor  # (B, Q, 4)
    queries: list[Tensor]  # input of the decoder and output of each layer, (B, Q, C)
    references: list[Tensor]  # input boxes of each layer, (B, Q, 4)
    logits: list[Tensor]  # output of each layer, (B, Q, K)
    boxes: list[Tensor]  # output of each layer, (B, Q, 4)


class SourceArithmetic(SourceBackbones):
    """The whole model, in float32.

    Args:
        tensors: by the names of the original release.
        settings: position_temperature, position_offset, pred_boxes_eps, encoder_attention_heads, decoder_attention_heads
            and num_queries, as in the configuration of dino_hf.
    """

    def __init__(self, tensors: dict[str, Tensor], settings):
        super().__init__(tensors)
        self.settings = settings
        self.num_levels = len(tensors["transformer.level_embed"])

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
        """Resize a mask (B, h, w), True on the image, to each level."""
        return [F.interpolate(pixel_mask[:, None].float(), size=level.shape[-2:])[:, 0] > 0 for level in maps]

    @staticmethod
    def valid_ratios(masks: list[Tensor]) -> Tensor:
        """Shares of the width and of the height that show the image, (B, L, 2)."""
        return torch.stack(
            [torch.stack([mask[:, 0].float().mean(-1), mask[:, :, 0].float().mean(-1)], -1) for mask in masks], dim=1
        )

    @staticmethod
    def centers(masks: list[Tensor]) -> Tensor:
        """Centres of the cells (B, S, 2) as (x, y), relative to the image without its padding."""
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
        """Deformable attention.

        Args:
            references: (B, Q, L, 2 or 4), relative to each level with its padding.
        """
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

    # -- encoder

    def num_layers(self, side: str) -> int:
        layers = 0
        while f"transformer.{side}.layers.{layers}.norm1.weight" in self:
            layers += 1
        return layers

    def positions(self, masks: list[Tensor]) -> Tensor:
        """Embeddings of the position of each cell and of its level, (B, S, C)."""
        levels = zip(masks, self["transformer.level_embed"], strict=True)
        return torch.cat([self.map_position(mask).flatten(1, 2) + embedding for mask, embedding in levels], dim=1)

    def encoder_layer(self, layer: int, tokens: Tensor, positions: Tensor, masks: list[Tensor]) -> Tensor:
        """(B, S, C) -> (B, S, C)"""
        name, heads = f"transformer.encoder.layers.{layer}", self.settings.encoder_attention_heads
        references = self.centers(masks)[:, :, None] * self.valid_ratios(masks)[:, None]  # (B, S, L, 2)
        attended = self.deformable(f"{name}.self_attn", tokens + positions, references, tokens, masks, heads)
        return self.feed_forward(self.layer_norm(tokens + attended, f"{name}.norm1"), name, "norm2")

    def fuse(self, tokens: list[Tensor]) -> Tensor:
        """Output of the last layer, or in Stable-DINO a function of the states of all layers; (B, S, C) each -> (B, S, C)."""
        name = "transformer.encoder.fusion_layer"
        if f"{name}.0.weight" not in self:
            return tokens[-1]
        return self.layer_norm(self.linear(torch.cat(tokens, -1), f"{name}.0"), f"{name}.1")

    def feed_forward(self, x: Tensor, name: str, norm: str) -> Tensor:
        inner = self.linear(self.linear(x, f"{name}.linear1").relu(), f"{name}.linear2")
        return self.layer_norm(x + inner, f"{name}.{norm}")

    def map_position(self, mask: Tensor) -> Tensor:
        """Embedding of positions (B, h, w, C): y, then x."""
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
        """(...) -> (..., width): the sine at even indices, the cosine at odd indices."""
        out = angle.new_empty(*angle.shape, width)
        for i in range(width):
            scaled = angle / temperature ** (2 * (i // 2) / width)
            out[..., i] = scaled.cos() if i % 2 else scaled.sin()
        return out

    # -- query selection

    def proposals(self, memory: Tensor, masks: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (B, S, K) and boxes (B, S, 4) of all tokens. A box without a valid anchor is (1, 1, 1, 1)."""
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
        """Content queries (B, Q, C), the same for every image."""
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

    # -- the whole model

    def run(self, pixels: Tensor, pixel_mask: Tensor) -> Trace:
        """
        Args:
            pixels: (B, 3, h, w)
            pixel_mask: (B, h, w), True on the image.
        """
        features = self.backbone(pixels)
        maps = self.neck(features)
        masks = self.masks(pixel_mask, maps)
        tokens, positions = [torch.cat([level.flatten(2).transpose(1, 2) for level in maps], 1)], self.positions(masks)
        for layer in range(self.num_layers("encoder")):
            tokens.append(self.encoder_layer(layer, tokens[-1], positions, masks))
        memory = self.fuse(tokens)
        logits, boxes = self.proposals(memory, masks)
        num_queries = min(self.settings.num_queries, logits.shape[1])
        best = logits.amax(-1).topk(num_queries, dim=1).indices[..., None]  # (B, Q, 1)
        logits, boxes = logits.take_along_dim(best, 1), boxes.take_along_dim(best, 1)
        trace = Trace(features, maps, masks, tokens, memory, logits, boxes, [self.content(boxes)], [boxes], [], [])
        for layer in range(self.num_layers("decoder")):
            of_layer = self.decoder_layer(layer, trace.queries[-1], trace.references[-1], memory, masks)
            for entries, entry in zip(
                (trace.queries, trace.logits, trace.boxes, trace.references), of_layer, strict=True
            ):
                entries.append(entry)
        trace.references.pop()  # no layer uses the last boxes as input
        return trace
