"""Deformable self-attention over the tokens of all feature maps."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_dino_detr import DinoDetrConfig
from .feature_levels import FeatureLevels, cell_centers, flatten_maps
from .layers import FeedForward, linear, xavier_weight
from .ms_deform_attn import DinoDetrDeformableAttention, SamplingPoints
from .position_embedding import embed_map, embed_whole_map


class DinoDetrEncoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: DinoDetrConfig):
        super().__init__()
        self.self_attn = DinoDetrDeformableAttention(
            config.d_model,
            config.encoder_attention_heads,
            config.num_feature_levels,
            config.encoder_n_points,
            config.ms_deform_attn_backend,
        )
        self.self_attn_norm = nn.LayerNorm(config.d_model)
        self.mlp = FeedForward(config.d_model, config.encoder_ffn_dim)
        self.mlp_norm = nn.LayerNorm(config.d_model)

    def forward(
        self, tokens: Tensor, position: Tensor, references: Tensor, levels: FeatureLevels, need_weights: bool = False
    ) -> tuple[Tensor, SamplingPoints | None]:
        """Deformable self-attention, then the feed-forward block.

        Args:
            tokens, position: (B, S, C); position is added to queries, not to values.
            references: (B, S, 2) centre of each token as (x, y), in [0, 1] of the valid image.
            need_weights: also return the sampling points.
        Returns:
            (B, S, C), and the sampling points or None.
        """
        attended, points = self.self_attn(tokens + position, references, tokens, levels, need_weights)
        tokens = self.self_attn_norm(tokens + attended)
        return self.mlp_norm(tokens + self.mlp(tokens)), points


class DinoDetrEncoderFusion(nn.Module):
    """Fusion of the states of all encoder layers, as in Stable-DINO (arXiv:2304.04742): (B, S, (layers + 1) C) -> (B, S, C)."""

    def __init__(self, config: DinoDetrConfig):
        super().__init__()
        num_states = config.encoder_layers + 1  # the input of the first layer is one of them
        self.projection = linear(num_states * config.d_model, config.d_model, xavier_weight)
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, states: Tensor) -> Tensor:
        return self.norm(self.projection(states))


class Encoded(NamedTuple):
    """Result of the encoder. The last two are None unless requested."""

    memory: Tensor  # (B, S, C)
    hidden_states: tuple[Tensor, ...] | None  # input and output of each layer, (B, S, C)
    points: tuple[SamplingPoints, ...] | None  # sampling points of each layer


class DinoDetrEncoder(nn.Module):
    """Position embedding, level embedding, encoder layers and, with `encoder_fusion`, the fusion of their outputs."""

    def __init__(self, config: DinoDetrConfig):
        super().__init__()
        self.config = config
        self.level_embed = nn.Embedding(config.num_feature_levels, config.d_model)
        self.layers = nn.ModuleList(DinoDetrEncoderLayer(config) for _ in range(config.encoder_layers))
        self.fusion = DinoDetrEncoderFusion(config) if config.encoder_fusion else None

    def forward(
        self, tokens: Tensor, levels: FeatureLevels, output_hidden_states: bool = False, output_attentions: bool = False
    ) -> Encoded:
        """tokens: (B, S, C) of the backbone's maps."""
        position = self._position(levels).to(tokens.dtype)
        references = cell_centers(levels)
        hidden_states, points = [tokens], []
        for layer in self.layers:
            tokens, sampled = layer(tokens, position, references, levels, output_attentions)
            if output_hidden_states or self.fusion is not None:
                hidden_states.append(tokens)
            points.append(sampled)
        if self.fusion is not None:  # with `device_map`, layers are on several devices
            tokens = self.fusion(torch.cat([state.to(tokens.device) for state in hidden_states], dim=-1))
        return Encoded(
            memory=tokens,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            points=tuple(points) if output_attentions else None,
        )

    def _position(self, levels: FeatureLevels) -> Tensor:
        """(B or 1, S, C) position embedding of each cell plus the embedding of its level."""
        config = self.config
        sine = (config.d_model, config.position_temperature, config.position_offset)
        device = levels.valid_ratios.device
        if levels.padding_mask is None:
            positions = [embed_whole_map(height, width, *sine, device) for height, width in levels.shapes]
        else:
            masks = levels.split(levels.padding_mask)  # L x (B, h * w)
            masks = [mask.unflatten(1, shape) for mask, shape in zip(masks, levels.shapes, strict=True)]
            positions = [embed_map(mask, *sine) for mask in masks]
        level_embed = self.level_embed(torch.arange(len(positions), device=device)).to(device)  # (L, C)
        return flatten_maps(
            [position + embed[:, None, None] for position, embed in zip(positions, level_embed, strict=True)]
        )
