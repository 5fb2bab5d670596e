"""Decoder: self-attention, deformable cross-attention, box refinement."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .box_ops import refine_boxes
from .configuration_dino_detr import DinoDetrConfig
from .feature_levels import FeatureLevels
from .heads import DetectionHead
from .layers import MLP, FeedForward, attention_xavier, linear, xavier, xavier_weight
from .ms_deform_attn import DinoDetrDeformableAttention, SamplingPoints
from .position_embedding import embed_boxes


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_
) -> tuple[Tensor, Tensor]:
    """Attention that also returns its weights. query, key, value: (B, H, Q, D_head) -> (B, Q, H, D_head), (B, H, Q, Q)."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    weights = scores.softmax(-1)
    return (weights @ value).transpose(1, 2), weights


class DinoDetrSelfAttention(nn.Module):
    """Multi-head self-attention. Positions are added to queries and keys, not to values."""

    is_causal = False

    def __init__(self, config: DinoDetrConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.decoder_attention_heads
        self.q_proj, self.k_proj, self.v_proj = (
            linear(config.d_model, config.d_model, attention_xavier) for _ in range(3)
        )
        self.o_proj = linear(config.d_model, config.d_model, xavier)

    def forward(
        self, queries: Tensor, position: Tensor, num_denoising: int, attention_mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            queries, position: (B, N + Q, C), denoising queries first.
            num_denoising: N
            attention_mask: (N, N + Q) or (B, N or 1, N + Q), rows of denoising queries, True where the row may attend to the
                column; None if denoising queries may attend to all. Matching queries always attend to all matching queries.
            need_weights: also return the weights.
        Returns:
            (B, N + Q, C), and the weights (B, H, N + Q, N + Q) or None.
        """
        placed = queries + position
        query, key, value = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, Q, D_head)
            for projection, x in ((self.q_proj, placed), (self.k_proj, placed), (self.v_proj, queries))
        )
        if attention_mask is not None:
            attention_mask = attention_mask.expand(len(queries), -1, -1)[:, None]  # (B, 1, N or 1, N + Q)
        scaling = query.shape[-1] ** -0.5
        if need_weights:
            mask = None
            if num_denoising:
                mask = whole_mask(attention_mask, num_denoising, queries.shape[1], queries.device)
            out, weights = eager_attention(self, query, key, value, mask, scaling)
            return self.o_proj(out.flatten(-2)), weights
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        # Two calls: matching queries need no mask, and often denoising queries need none either. No matrix of all pairs is made.
        first, query = query.split([num_denoising, query.shape[2] - num_denoising], dim=2)
        out, _ = attend(self, query, key[:, :, num_denoising:], value[:, :, num_denoising:], None, scaling=scaling)
        if num_denoising:
            first, _ = attend(self, first, key, value, attention_mask, scaling=scaling)  # (B, N, H, D_head)
            out = torch.cat([first, out], dim=1)  # (B, N + Q, H, D_head)
        return self.o_proj(out.flatten(-2)), None


def whole_mask(denoising_mask: Tensor | None, num_denoising: int, num_queries: int, device) -> Tensor:
    """Mask of denoising queries, (B, 1, N or 1, N + Q) or None -> mask of all N + Q queries, (B or 1, 1, N + Q, N + Q)."""
    mask = torch.ones(1, 1, num_queries, num_queries, dtype=torch.bool, device=device)
    if denoising_mask is not None:
        mask = mask.repeat(len(denoising_mask), 1, 1, 1)
        mask[:, :, :num_denoising] = denoising_mask
    mask[:, :, num_denoising:, :num_denoising] = False
    return mask


class DinoDetrDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: DinoDetrConfig):
        super().__init__()
        self.self_attn = DinoDetrSelfAttention(config)
        self.self_attn_norm = nn.LayerNorm(config.d_model)
        self.cross_attn = DinoDetrDeformableAttention(
            config.d_model,
            config.decoder_attention_heads,
            config.num_feature_levels,
            config.decoder_n_points,
            config.ms_deform_attn_backend,
        )
        self.cross_attn_norm = nn.LayerNorm(config.d_model)
        self.mlp = FeedForward(config.d_model, config.decoder_ffn_dim)
        self.mlp_norm = nn.LayerNorm(config.d_model)

    def forward(
        self,
        queries: Tensor,
        position: Tensor,
        references: Tensor,
        memory: Tensor,
        levels: FeatureLevels,
        num_denoising: int,
        attention_mask: Tensor | None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None, SamplingPoints | None]:
        """Self-attention among queries, deformable cross-attention to the image, feed-forward block.

        Args:
            queries, position: (B, Q, C), denoising queries first; position is added to queries and keys, not to values.
            references: (B, Q, 4) cxcywh in [0, 1]; centres and scales of the sampling points.
            memory: (B, S, C) encoder output, laid out as `levels` says.
            num_denoising, attention_mask, need_weights: see `DinoDetrSelfAttention`.
        Returns:
            (B, Q, C); with `need_weights` the weights of self-attention (B, H, Q, Q) and the sampling points of cross-attention,
            otherwise None twice.
        """
        attended, self_weights = self.self_attn(queries, position, num_denoising, attention_mask, need_weights)
        queries = self.self_attn_norm(queries + attended)
        attended, points = self.cross_attn(queries + position, references, memory, levels, need_weights)
        queries = self.cross_attn_norm(queries + attended)
        return self.mlp_norm(queries + self.mlp(queries)), self_weights, points


class Decoded(NamedTuple):
    """Predictions of all D layers. The last layer gives the final ones."""

    hidden_states: Tensor  # (D, B, Q, C) normalised
    logits: Tensor  # (D, B, Q, K)
    boxes: Tensor  # (D, B, Q, 4) cxcywh in [0, 1], float32

    def split(self, num_first: int) -> "tuple[Decoded, Decoded]":
        """The first `num_first` queries, and the others."""
        return Decoded(*(x[:, :, :num_first] for x in self)), Decoded(*(x[:, :, num_first:] for x in self))


class DecoderStates(NamedTuple):
    """Inner states of the decoder's layers. Each is None unless requested."""

    hidden_states: tuple[Tensor, ...] | None  # input and output of each layer, (B, Q, C)
    attentions: tuple[Tensor, ...] | None  # weights of self-attention, (B, H, Q, Q)
    points: tuple[SamplingPoints, ...] | None  # sampling points of cross-attention


class DinoDetrDecoder(nn.Module):
    """Decoder layers, their detection heads (one per layer, or one for all), and the embedding of reference boxes."""

    def __init__(self, config: DinoDetrConfig):
        super().__init__()
        width = config.d_model
        self.layers = nn.ModuleList(DinoDetrDecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(width)
        self.position_mlp = MLP([linear(2 * width, width, xavier_weight), linear(width, width, xavier_weight)])
        self.pred_boxes_eps = config.pred_boxes_eps
        self.look_forward_twice = config.look_forward_twice
        num_heads = 1 if config.share_decoder_heads else config.decoder_layers
        self.heads = nn.ModuleList(DetectionHead(width, config.num_labels) for _ in range(num_heads))

    def forward(
        self,
        queries: Tensor,
        references: Tensor,
        memory: Tensor,
        levels: FeatureLevels,
        num_denoising: int,
        attention_mask: Tensor | None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> tuple[Decoded, DecoderStates]:
        """
        Args:
            queries: (B, Q, C) content, denoising queries first.
            references: (B, Q, 4) cxcywh in [0, 1] of the valid image: initial anchors.
            memory: (B, S, C)
            num_denoising, attention_mask: see `DinoDetrSelfAttention`.
        """
        hidden_states, logits, boxes = [], [], []
        layer_states, attentions, points = [queries], [], []
        start = references
        for index, layer in enumerate(self.layers):
            head = self.heads[index % len(self.heads)]
            position = self._position(references, levels).to(queries.dtype)
            queries, weights, sampled = layer(
                queries, position, references, memory, levels, num_denoising, attention_mask, output_attentions
            )
            attentions.append(weights)
            points.append(sampled)
            if output_hidden_states:
                layer_states.append(queries)
            hidden = self.norm(queries)
            # Look forward twice (DINO, sec. 3.5): the supervised box refines `start`, which still carries the gradient of
            # the previous layer, while attention uses the detached copy. The head runs on normalised queries for the loss and
            # on plain queries for the next start; merging the two calls changes the model.
            boxes.append(refine_boxes(start, head.box_delta(hidden), self.pred_boxes_eps))
            logits.append(head.classify(hidden))
            hidden_states.append(hidden)
            if index + 1 < len(self.layers):
                start = refine_boxes(references, head.box_delta(queries))
                references = start.detach()
                if not self.look_forward_twice:
                    start = references
        states = DecoderStates(
            hidden_states=tuple(layer_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            points=tuple(points) if output_attentions else None,
        )
        return Decoded(torch.stack(hidden_states), torch.stack(logits), torch.stack(boxes)), states

    def _position(self, references: Tensor, levels: FeatureLevels) -> Tensor:
        """(B, Q, 4) -> (B, Q, C) embedding of the boxes, relative to the padded map of level 0."""
        ratios = levels.valid_ratios[:, None, 0].repeat(1, 1, 2)  # (B, 1, 4)
        sine = embed_boxes(references * ratios, self.norm.normalized_shape[0] // 2)  # (B, Q, 2C)
        return self.position_mlp(sine.to(self.norm.weight.dtype))
