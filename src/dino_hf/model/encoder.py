"""Deformable self-attention over the tokens of all feature maps."""

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_dino_detr import DinoDetrConfig
from .cpu_speed import fast_linear
from .feature_levels import FeatureLevels, cell_centers, flatten_maps
from .layers import FeedForward
from .ms_deform_attn import DinoDetrDeformableAttention, SamplingPoints
from .position_embedding import embed_map, embed_whole_map
from .recording import Record, note, note_points


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

    @fast_linear
    def forward(
        self, tokens: Tensor, position: Tensor, references: Tensor, levels: FeatureLevels, need_weights: bool = False
    ) -> tuple[Tensor, SamplingPoints | None]:
        """Let every token look around itself on every level, then think.

        Args:
            tokens, position: (B, S, C); position is added where a token asks, never to what it carries.
            references: (B, S, 2) its own place.
        Returns:
            (B, S, C) and, if they are wanted, its sampling points.
        """
        attended, points = self.self_attn(tokens + position, references, tokens, levels, need_weights)
        tokens = self.self_attn_norm(tokens + attended)
        return self.mlp_norm(tokens + self.mlp(tokens)), points


class DinoDetrEncoder(nn.Module):
    """Position and level embedding, and the layers. It alone needs positions of map cells, so it owns them."""

    def __init__(self, config: DinoDetrConfig):
        super().__init__()
        self.config = config
        self.level_embed = nn.Embedding(config.num_feature_levels, config.d_model)
        self.layers = nn.ModuleList(DinoDetrEncoderLayer(config) for _ in range(config.encoder_layers))

    def forward(
        self, tokens: Tensor, levels: FeatureLevels, output_hidden_states: bool = False, output_attentions: bool = False
    ) -> tuple[Tensor, Record]:
        """(B, S, C) tokens of the backbone's maps -> (B, S, C) memory, and what was asked for. It is returned, because hooks that
        move the inputs of a module to its device copy a list that is passed to it."""
        record = Record.of(output_hidden_states, output_attentions)
        position = self._position(levels).to(tokens.dtype)
        references = cell_centers(levels)
        note(record.hidden_states, tokens)
        for layer in self.layers:
            tokens, points = layer(tokens, position, references, levels, record.attentions is not None)
            note_points(record.attentions, record.locations, points)
            note(record.hidden_states, tokens)
        return tokens, record.as_tuples()

    def _position(self, levels: FeatureLevels) -> Tensor:
        """(B or 1, S, C): where a cell is on its level, and which level that is."""
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
