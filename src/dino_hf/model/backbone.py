"""Images -> L feature maps of one width."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .backbone_trials import unused_parameters
from .configuration_dino_detr import DinoDetrConfig
from .feature_levels import resize_mask
from .frozen_batch_norm import drop_unused_keys, freeze_batch_norm
from .layers import build_layer, xavier
from .own_backbones import build_backbone
from .run_mode import is_traced, require_gradient
from .timm_backbones import prepare_timm_backbone, refuse_size, timm_side_multiple


class DinoDetrBackbone(nn.Module):
    """Any backbone of `AutoBackbone` or of ours, and a projection of its maps to L levels of width C (DINO sec. 4.1, app. D.1)."""

    def __init__(self, config: DinoDetrConfig):
        super().__init__()
        kind = config.backbone_config.model_type
        self.model = build_backbone(config.backbone_config)
        for part in self.model.modules():  # the deformable convolutions of InternImage
            if hasattr(part, "attention_backend"):
                part.attention_backend = config.ms_deform_attn_backend
        is_timm = kind == "timm_backbone"
        if is_timm:
            prepare_timm_backbone(self.model)
        freeze_batch_norm(self.model)
        # Swin and BiT end with a norm for classification, which no feature map uses: its parameters would never get a gradient.
        for body, unused in (("swin", "layernorm"), ("bit", "norm")):
            if hasattr(getattr(self.model, body, None), unused):
                identity = nn.Identity()
                identity.register_load_state_dict_pre_hook(drop_unused_keys)
                setattr(getattr(self.model, body), unused, identity)
        self.num_frozen_stages = config.num_frozen_backbone_stages
        has_known_stages = kind in ("resnet", "swin", "convnext", "convnextv2", "bit")
        self._unused = frozenset() if has_known_stages else unused_parameters(self.model, config.backbone_config)
        self._side_multiple = timm_side_multiple(self.model) if is_timm else 1
        self.freeze_stages()

        channels, width = self.model.channels, config.d_model
        num_extra = config.num_feature_levels - len(channels)
        kernels = [(channel, {"kernel_size": 1}) for channel in channels]
        # The first extra level is computed from the backbone's last map, each further level from the level before it.
        for channel in [channels[-1], *[width] * (num_extra - 1)][:num_extra]:
            kernels.append((channel, {"kernel_size": 3, "stride": 2, "padding": 1}))
        self.projections = nn.ModuleList(
            build_layer(xavier, nn.Conv2d, channel, width, bias=config.projection_bias, **kernel)
            for channel, kernel in kernels
        )
        self.norms = nn.ModuleList(nn.GroupNorm(32, width) for _ in kernels)

    def freeze_stages(self) -> None:
        """Freeze the first stages and every parameter that no feature map depends on.

        Distributed training would wait for the gradients of the latter.
        """
        for name, parameter in self.model.named_parameters():
            if name in self._unused:
                parameter.requires_grad_(False)
        num_stages = self.num_frozen_stages
        body = getattr(self.model, "swin", getattr(self.model, "bit", self.model))
        stem = getattr(body, "embedder", getattr(body, "embeddings", None))
        encoder = getattr(body, "encoder", None)
        stages = getattr(encoder, "stages", getattr(encoder, "layers", None))
        if stem is None or stages is None:
            if num_stages:
                raise ValueError(
                    f"num_frozen_backbone_stages={num_stages} does not work with {type(self.model).__name__}; it works with "
                    "ResNet, Swin, ConvNeXt, BiT, FocalNet and InternImage. Use 0, and freeze parameters by name with "
                    "dino_hf.training.freeze."
                )
            return
        stages = [stem, *stages]
        if num_stages > len(stages):
            raise ValueError(
                f"num_frozen_backbone_stages={num_stages}, but {type(self.model).__name__} has {len(stages)} with its stem."
            )
        last = self.model.stage_names.index(self.model.out_features[-1])  # out_indices may be negative
        for stage in stages[:num_stages] + stages[last + 1 :]:
            stage.requires_grad_(False)
        downsample = getattr(stages[last], "downsample", None)
        if downsample is not None:  # the end of a Swin stage, which only the next stage uses
            downsample.requires_grad_(False)

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> tuple[list[Tensor], list[Tensor] | None]:
        """
        Args:
            pixel_values: (B, 3, h, w) normalised.
            pixel_mask: (B, h, w) True on the image, False on padding; None where nothing is padded.
        Returns:
            L maps (B, C, h_l, w_l) and their padding masks (B, h_l, w_l), True on padding, finest first; None in place of the
            masks where nothing is padded.
        Raises:
            ValueError: a timm backbone does not take images of this size.
        """
        pixel_values, pixel_mask = self._pad(pixel_values, pixel_mask)
        if any(parameter.requires_grad for parameter in self.model.parameters()):
            pixel_values = require_gradient(pixel_values, self.model)
        try:
            outputs = self._run(pixel_values)
        except (RuntimeError, AssertionError, ValueError) as error:
            if self._side_multiple is None:
                refuse_size(self.model, pixel_values, error)
            raise
        maps = self.project(list(outputs.feature_maps))
        if pixel_mask is None:
            return maps, None
        padding = ~pixel_mask  # (B, h, w)
        padding[:, 0, 0] = False  # an image without any valid pixel would divide by a size of zero
        return maps, [resize_mask(padding, *level.shape[-2:]) for level in maps]

    def _pad(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Pad images at the bottom and right to sides that the backbone takes. The mask excludes the padding."""
        height, width = pixel_values.shape[-2:]
        multiple = self._side_multiple or 1
        below, right = -height % multiple, -width % multiple
        if multiple == 1 or not (is_traced() or below or right):  # a traced graph must fit any size
            return pixel_values, pixel_mask
        if pixel_mask is None:
            pixel_mask = pixel_values.new_ones((), dtype=torch.bool).expand(len(pixel_values), height, width)
        return tuple(F.pad(tensor, (0, right, 0, below)) for tensor in (pixel_values, pixel_mask))

    def _run(self, pixel_values: Tensor) -> ModelOutput:
        """The backbone's output for images that are padded. The installed package has a faster version (cpu_speed.py)."""
        return self.model(pixel_values)

    def project(self, features: list[Tensor]) -> list[Tensor]:
        """Maps of the backbone -> L maps (B, C, h_l, w_l)."""
        maps = []
        for level, (projection, norm) in enumerate(zip(self.projections, self.norms, strict=True)):
            if level < len(features):
                source = features[level]
            else:
                source = features[-1] if level == len(features) else maps[-1]
            # In the layout "channels last", torch computes a group's variance as a difference of squares, which loses digits.
            # The backward pass of torch 2.11 can even crash.
            maps.append(norm(projection(source).contiguous()))
        return maps
