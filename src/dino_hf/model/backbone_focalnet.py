"""FocalNet with maps before the downsampling, as published DINO detectors have it."""

from torch import Tensor, nn
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput
from transformers.models.focalnet.modeling_focalnet import (
    FocalNetEmbeddings,
    FocalNetEncoder,
    FocalNetPreTrainedModel,
)

from .configuration_focalnet import DinoDetrFocalNetConfig


class DinoDetrFocalNetBackbone(BackboneMixin, FocalNetPreTrainedModel):
    """The stages of transformers' FocalNet. Their maps before the downsampling go through a LayerNorm for each map.

    `FocalNetBackbone` of transformers returns the maps after the downsampling, without norms.
    """

    config: DinoDetrFocalNetConfig
    config_class = DinoDetrFocalNetConfig
    has_attentions = False

    def __init__(self, config: DinoDetrFocalNetConfig):
        super().__init__(config)
        widths = [config.embed_dim * 2**stage for stage in range(len(config.depths))]
        self.num_features = [config.embed_dim, *widths]
        self.embeddings = FocalNetEmbeddings(config)
        self.encoder = FocalNetEncoder(config, self.embeddings.patch_grid)
        self.hidden_states_norms = nn.ModuleDict(
            {
                stage: nn.LayerNorm(channels, config.layer_norm_eps)
                for stage, channels in self.out_feature_channels.items()
                if stage in self.out_features
            }
        )
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs) -> BackboneOutput:
        """pixel_values: (B, 3, h, w) normalised -> the maps of `out_features`, (B, C, h / stride, w / stride), rounded up."""
        hidden_states, size = self.embeddings(pixel_values)  # (B, tokens, C)
        states = {"stem": (hidden_states, size)}
        for name, stage in zip(self.stage_names[1:], self.encoder.stages, strict=True):
            hidden_states, before_downsampling, next_size = stage(hidden_states, size)
            states[name], size = (before_downsampling, size), next_size[-2:]
        maps = []
        for name, norm in self.hidden_states_norms.items():
            tokens, size = states[name]
            maps.append(norm(tokens).transpose(1, 2).unflatten(2, size))  # (B, C, h, w)
        return BackboneOutput(feature_maps=tuple(maps))
