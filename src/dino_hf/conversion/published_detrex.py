"""Published checkpoints of detrex. Nothing here imports torch."""

from .published_row import Published

_RELEASES = "https://github.com/IDEA-Research/detrex-storage/releases/download/"


def _row(
    version: str,
    file: str,
    ap: float,
    backbone: str,
    num_levels: int = 4,
    *,
    alias: str = "",
    is_averaged: bool = False,
    **settings,
) -> Published:
    """A file of a release of detrex's storage.

    Args:
        alias: name of the model's configuration in detrex, where the file has another name.
    """
    return Published(
        *("detrex", file.removesuffix(".pth"), ap, backbone, num_levels, file),
        address=f"{_RELEASES}{version}/{file}",
        settings=settings,
        is_averaged=is_averaged,
        aliases=(alias,) if alias else (),
    )


_CLASS_WEIGHT_2 = "dino_r50_4scale_12ep_backbone_2e-5_class_weight_2.0"
# detrex trained these with `freeze_at = -1`: no frozen stage. It kept a class weight of 1 for denoising.
_BETTER = {"cls_loss_coefficient": 2.0, "denoising_cls_loss_coefficient": 1.0, "num_frozen_backbone_stages": 0}

PUBLISHED = (
    _row("v0.2.0", "dino_r50_4scale_12ep_49_2AP.pth", 49.2, "ResNet-50", alias="dino_r50_4scale_12ep"),
    _row("v0.2.0", "dino_r50_4scale_12ep_300dn.pth", 49.5, "ResNet-50", num_denoising=300),
    _row("v0.3.0", "dino_r50_4scale_12ep_with_ema.pth", 49.4, "ResNet-50", is_averaged=True),
    _row("v0.4.0", "dino_r50_4scale_12ep_hacked_trainer.pth", 49.4, "ResNet-50"),
    _row("v0.4.0", f"{_CLASS_WEIGHT_2}.pth", 49.8, "ResNet-50", **_BETTER),
    _row(
        *("v0.4.0", f"{_CLASS_WEIGHT_2}_300dn.pth", 50.0, "ResNet-50"),
        alias="dino_r50_4scale_12ep_better_hyper",
        num_denoising=300,
        **_BETTER,
    ),
    _row("v0.1.1", "dino_r50_4scale_24ep.pth", 50.6, "ResNet-50", position_temperature=20.0, position_offset=0.0),
    _row("v0.2.1", "dino_r50_5scale_12ep.pth", 49.6, "ResNet-50", 5),
    _row("v0.1.1", "dino_r101_4scale_12ep.pth", 50.0, "ResNet-101"),
    _row("v0.1.1", "dino_swin_tiny_224_4scale_12ep.pth", 51.3, "Swin-T 224"),
    _row("v0.1.1", "dino_swin_tiny_224_22kto1k_finetune_4scale_12ep.pth", 52.5, "Swin-T 224"),
    _row("v0.1.1", "dino_swin_small_224_4scale_12ep.pth", 53.0, "Swin-S 224"),
    _row("v0.4.0", "dino_swin_small_22k_4scale_12ep.pth", 54.5, "Swin-S 224"),
    _row("v0.1.1", "dino_swin_base_384_4scale_12ep.pth", 55.8, "Swin-B 384"),
    _row("v0.1.1", "dino_swin_large_224_4scale_12ep.pth", 56.9, "Swin-L 224"),
    _row("v0.1.1", "dino_swin_large_4scale_12ep.pth", 56.9, "Swin-L 384", alias="dino_swin_large_384_4scale_12ep"),
    _row("v0.2.1", "dino_swin_large_384_5scale_12ep.pth", 57.5, "Swin-L 384", 5),
    _row("v0.2.0", "dino_swin_large_384_4scale_36ep.pth", 58.1, "Swin-L 384"),
    _row("v0.2.1", "dino_swin_large_384_5scale_36ep.pth", 58.5, "Swin-L 384", 5),
    _row("v0.4.0", "dino_convnext_tiny_1k_4scale_12ep.pth", 51.4, "ConvNeXt-T"),
    _row("v0.4.0", "dino_convnext_small_1k_4scale_12ep.pth", 52.0, "ConvNeXt-S"),
    _row("v0.4.0", "dino_convnext_base_1k_4scale_12ep.pth", 52.6, "ConvNeXt-B"),
    _row("v0.4.0", "dino_convnext_large_1k_4scale_12ep.pth", 53.4, "ConvNeXt-L"),
    _row("v0.4.0", "dino_convnext_tiny_384_4scale_12ep.pth", 52.4, "ConvNeXt-T"),
    _row("v0.4.0", "dino_convnext_small_384_4scale_12ep.pth", 54.2, "ConvNeXt-S"),
    _row("v0.4.0", "dino_convnext_base_384_4scale_12ep.pth", 55.1, "ConvNeXt-B"),
    _row("v0.4.0", "dino_convnext_large_384_4scale_12ep.pth", 55.5, "ConvNeXt-L"),
    _row("v0.2.1", "dino_focal_large_lrf_384_4scale_12ep.pth", 57.5, "FocalNet-L fl3"),
    _row("v0.2.1", "dino_focal_large_lrf_384_fl4_4scale_12ep.pth", 58.0, "FocalNet-L fl4"),
    _row("v0.4.0", "dino_focal_large_3level_4scale_36ep.pth", 58.3, "FocalNet-L fl3"),
    _row("v0.2.1", "dino_focalnet_large_lrf_384_fl4_5scale_12ep.pth", 58.5, "FocalNet-L fl4", 5),
    _row("v0.2.1", "dino_vitdet_4scale_12ep.pth", 50.2, "ViTDet-B", alias="dino_vitdet_base_4scale_12ep"),
    _row("v0.2.1", "dino_vitdet_base_4scale_50ep.pth", 55.0, "ViTDet-B"),
    _row("v0.2.1", "dino_vitdet_large_4scale_12ep.pth", 52.9, "ViTDet-L"),
    _row("v0.2.1", "dino_vitdet_large_4scale_50ep.pth", 57.5, "ViTDet-L"),
    _row("v0.4.0", "dino_internimage_tiny_4scale_12ep.pth", 52.3, "InternImage-T", offset_scale=1.0),
    _row("v0.4.0", "dino_internimage_small_4scale_12ep.pth", 53.6, "InternImage-S", offset_scale=1.0),
    _row("v0.4.0", "dino_internimage_base_4scale_12ep.pth", 54.7, "InternImage-B", offset_scale=1.0),
    _row("v0.4.0", "dino_internimage_large_4scale_12ep.pth", 57.0, "InternImage-L", offset_scale=2.0),
)
