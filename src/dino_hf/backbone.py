"""Pixels -> L feature maps of one width."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoBackbone

from .configuration_dino_detr import DinoDetrConfig
from .layers import XavierConv2d


def _drop_keys(module: nn.Module, state_dict: dict, prefix: str, *args) -> None:
    """Before `load_state_dict`: a published backbone may hold what its counterpart here has no use for."""
    for name in ("weight", "bias") if isinstance(module, nn.Identity) else ("num_batches_tracked",):
        state_dict.pop(prefix + name, None)


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and scale are constants: detectors train on too few images per step to estimate them."""

    def __init__(self, num_features: int, eps: float, activation: nn.Module | None = None):
        super().__init__()
        self.eps = eps
        self.activation = activation or nn.Identity()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.empty(num_features))
        self.register_load_state_dict_pre_hook(_drop_keys)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.running_mean)
        nn.init.ones_(self.running_var)

    def forward(self, x: Tensor) -> Tensor:
        statistics = self.running_mean, self.running_var
        return self.activation(F.batch_norm(x, *statistics, self.weight, self.bias, training=False, eps=self.eps))


def freeze_batch_norm(module: nn.Module) -> None:
    """Replace every BatchNorm2d below `module` by its frozen form, values kept."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            # timm has a batch norm that contains what follows it
            followed_by = [getattr(child, part) for part in ("drop", "act") if hasattr(child, part)]
            frozen = FrozenBatchNorm2d(
                child.num_features, child.eps, nn.Sequential(*followed_by) if followed_by else None
            )
            frozen.load_state_dict(child.state_dict(), assign=True)
            setattr(module, name, frozen)
        else:
            freeze_batch_norm(child)


class DinoDetrBackbone(nn.Module):
    """Any backbone of `AutoBackbone`, and a projection of its maps to L levels of width C (DINO sec. 4.1, app. D.1)."""

    def __init__(self, config: DinoDetrConfig):
        super().__init__()
        # "sdpa", asked of the whole model, is what a backbone takes by itself if it can; one without attention refuses the name.
        attention = config.backbone_config._attn_implementation
        self.model = AutoBackbone.from_config(
            config.backbone_config, attn_implementation=None if attention == "sdpa" else attention
        )
        freeze_batch_norm(self.model)
        # Swin and BiT end with a norm for classification that no feature map passes: its parameters would never get a gradient.
        for body, unused in (("swin", "layernorm"), ("bit", "norm")):
            if hasattr(getattr(self.model, body, None), unused):
                identity = nn.Identity()
                identity.register_load_state_dict_pre_hook(_drop_keys)
                setattr(getattr(self.model, body), unused, identity)
        self.num_frozen_stages = config.num_frozen_backbone_stages
        self.freeze_stages()

        channels = self.model.channels
        num_extra = config.num_feature_levels - len(channels)
        bias = config.projection_bias
        projections = [XavierConv2d(width, config.d_model, kernel_size=1, bias=bias) for width in channels]
        # The first extra level looks at the backbone's last map as it is, further ones at the level before.
        for width in [channels[-1], *[config.d_model] * (num_extra - 1)][:num_extra]:
            projections.append(XavierConv2d(width, config.d_model, kernel_size=3, stride=2, padding=1, bias=bias))
        self.projections = nn.ModuleList(projections)
        self.norms = nn.ModuleList(nn.GroupNorm(32, config.d_model) for _ in projections)

    def freeze_stages(self) -> None:
        """Leave out of training the first stages, and those after the last that gives a feature map: no gradient reaches them."""
        num_stages = self.num_frozen_stages
        body = getattr(self.model, "swin", getattr(self.model, "bit", self.model))
        stem = getattr(body, "embedder", getattr(body, "embeddings", None))
        encoder = getattr(body, "encoder", None)
        stages = getattr(encoder, "stages", getattr(encoder, "layers", None))
        if stem is None or stages is None:
            if num_stages:
                raise ValueError(
                    f"num_frozen_backbone_stages={num_stages}: the stages of {type(self.model).__name__} are not known here, only "
                    "those of ResNet, Swin, ConvNeXt and BiT. Use 0, and requires_grad_(False) on parameters of your choice."
                )
            return
        stages = [stem, *stages]
        if num_stages > len(stages):
            raise ValueError(
                f"num_frozen_backbone_stages={num_stages}, but {type(self.model).__name__} has {len(stages)} with its stem."
            )
        last = max(self.model.out_indices)
        for stage in stages[:num_stages] + stages[last + 1 :]:
            stage.requires_grad_(False)
        downsample = getattr(stages[last], "downsample", None)
        if downsample is not None:  # a Swin stage ends with the way to the next
            downsample.requires_grad_(False)

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """
        Args:
            pixel_values: (B, 3, h, w) normalised.
            pixel_mask: (B, h, w) True on the image, False on padding.
        Returns:
            L maps (B, C, h_l, w_l) and their padding masks (B, h_l, w_l), True on padding, finest first.
        """
        maps = self.project(list(self.model(pixel_values).feature_maps))
        padding = (~pixel_mask)[:, None].float()  # (B, 1, h, w)
        padding[:, :, 0, 0] = 0  # where images begin: one without any valid pixel would divide by a size of zero
        masks = [F.interpolate(padding, size=level.shape[-2:])[:, 0].bool() for level in maps]
        return maps, masks

    def project(self, features: list[Tensor]) -> list[Tensor]:
        """Maps of the backbone -> L maps (B, C, h_l, w_l)."""
        maps = []
        for level, (projection, norm) in enumerate(zip(self.projections, self.norms, strict=True)):
            if level < len(features):
                source = features[level]
            else:
                source = features[-1] if level == len(features) else maps[-1]
            maps.append(norm(projection(source)))
        return maps
