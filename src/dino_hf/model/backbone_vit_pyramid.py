"""The simple feature pyramid of ViTDet on any plain vision transformer."""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput

from .configuration_vit_pyramid import DinoDetrVitPyramidConfig
from .own_backbones import build_backbone
from .run_mode import is_traced


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of maps (B, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class PyramidLevel(nn.Module):
    """One map of the pyramid: change the size, then a 1 x 1 and a 3 x 3 convolution, each with a norm."""

    def __init__(self, scale: float, hidden_size: int, config: DinoDetrVitPyramidConfig):
        super().__init__()
        width, eps = config.out_channels, config.layer_norm_eps
        half, quarter = hidden_size // 2, hidden_size // 4
        larger = [nn.ConvTranspose2d(hidden_size, half, kernel_size=2, stride=2)]
        self.resize, channels = {
            4: ([*larger, ChannelNorm(half, eps), nn.GELU(), nn.ConvTranspose2d(half, quarter, 2, 2)], quarter),
            2: (larger, half),
            1: ([], hidden_size),
            0.5: ([nn.MaxPool2d(kernel_size=2, stride=2)], hidden_size),
        }[scale]
        self.resize = nn.Sequential(*self.resize)
        self.reduce = nn.Conv2d(channels, width, kernel_size=1, bias=False)
        self.reduce_norm = ChannelNorm(width, eps)
        self.mix = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
        self.mix_norm = ChannelNorm(width, eps)

    def forward(self, x: Tensor) -> Tensor:
        x = self.reduce_norm(self.reduce(self.resize(x)))
        return self.mix_norm(self.mix(x))


class DinoDetrVitPyramidBackbone(BackboneMixin, PreTrainedModel):
    """A plain vision transformer, and a pyramid of maps from its one map (arXiv:2203.16527, sec. 3)."""

    config: DinoDetrVitPyramidConfig
    config_class = DinoDetrVitPyramidConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # the transformer itself decides

    def __init__(self, config: DinoDetrVitPyramidConfig):
        super().__init__(config)
        self.num_features = [config.out_channels] * len(config.stage_names)
        self.backbone = build_backbone(config.backbone_config)
        hidden_size = self.backbone.channels[0]
        self.pyramid = nn.ModuleList(PyramidLevel(scale, hidden_size, config) for scale in config.scale_factors)
        self.post_init()

    def post_init(self) -> None:
        # Without the step of BackboneMixin: it would register the hooks that record hidden states in the transformer a second
        # time, and the transformer would return the map of an earlier layer.
        PreTrainedModel.post_init(self)

    def _init_weights(self, module: nn.Module) -> None:
        # The library guards torch.nn.init, so values from a checkpoint are kept.
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()

    def forward(self, pixel_values: Tensor, **kwargs) -> BackboneOutput:
        """
        Args:
            pixel_values: (B, 3, h, w) normalised.
        Returns:
            the maps of `out_features`, (B, C, h_l, w_l). Sides that are not multiples of the patch size are rounded down.
        Raises:
            ValueError: the images are too small for the coarsest map.
        """
        (x,) = self.backbone(pixel_values).feature_maps  # (B, C, h / patch, w / patch)
        if not is_traced() and min(x.shape[-2:]) * min(self.config.scale_factors) < 1:
            height, width = pixel_values.shape[-2:]
            raise ValueError(
                f"Images of {height} x {width} pixels are too small: {type(self.backbone).__name__} makes a map of "
                f"{x.shape[-2]} x {x.shape[-1]} patches of them, but the pyramid needs 2 x 2."
            )
        maps = [level(x) for level in self.pyramid]
        if self.config.add_pooled_level:
            maps.append(F.max_pool2d(maps[-1], kernel_size=1, stride=2))
        return BackboneOutput(feature_maps=tuple(maps[index] for index in self.out_indices))
