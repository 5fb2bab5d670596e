"""Configuration of a feature pyramid on a plain vision transformer."""

from transformers import AutoConfig, PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from .own_backbones import OWN_MODEL_TYPES, backbone_config_class, fits_pyramid

# ViTDet-B, as in published DINO detectors. Blocks 2, 5, 8 and 11 attend to the whole image.
_VITDET_B = {
    "model_type": "vitdet",
    "image_size": 1024,
    "drop_path_rate": 0.1,
    "use_relative_position_embeddings": True,
    "window_size": 14,
    "window_block_indices": [0, 1, 3, 4, 6, 7, 9, 10],
}
_SCALES = (4, 2, 1, 0.5)


class DinoDetrVitPyramidConfig(BackboneConfigMixin, PreTrainedConfig):
    """Simple feature pyramid of ViTDet (arXiv:2203.16527) on a transformer that gives one map.

        DinoDetrConfig(backbone_config={"model_type": "dino_detr_vit_pyramid", "backbone_config": {"model_type": "dinov3_vit"}})

    With patches of 16 pixels, the default maps "stage1" to "stage4" have the strides 8, 16, 32 and 64. With patches of 14 pixels,
    they have 7, 14, 28 and 56.

    Args:
        backbone_config: configuration, or its dictionary, of a transformer of `AutoBackbone` with one map: "vitdet", "dinov3_vit",
            "dinov2" and others. None: ViTDet-B.
        scale_factors: sizes of the maps relative to the transformer's map, finest first. 4 and 2 are reached by transposed
            convolutions, 0.5 by max pooling.
        add_pooled_level: add one more map with half the size of the last one, by taking every second cell.
        out_channels: width of all maps.
        layer_norm_eps: epsilon of the norms of the pyramid.
        out_features, out_indices: maps to return. None: all.
    Raises:
        ValueError: the transformer is unknown or gives several maps, or there is another scale factor.
    """

    model_type = "dino_detr_vit_pyramid"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012  (an annotation would make it a field)

    backbone_config: dict | PreTrainedConfig | None = None
    scale_factors: list[float | int] | tuple[float | int, ...] = (2.0, 1.0, 0.5)
    add_pooled_level: bool = True
    out_channels: int = 256
    layer_norm_eps: float = 1e-6
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        self.backbone_config = _single_map(_VITDET_B if self.backbone_config is None else self.backbone_config)
        self.scale_factors = [float(scale) for scale in self.scale_factors]
        if not self.scale_factors or self.scale_factors != sorted({*self.scale_factors} & {*_SCALES}, reverse=True):
            raise ValueError(
                f"scale_factors={self.scale_factors} must be different values of {list(_SCALES)}, in falling order."
            )
        num_maps = len(self.scale_factors) + self.add_pooled_level
        self.stage_names = [f"stage{number}" for number in range(1, num_maps + 1)]
        maps = {name: kwargs.pop(name, None) for name in ("out_features", "out_indices")}
        if not any(maps.values()):
            maps["out_features"] = self.default_out_features
        self.set_output_features_output_indices(**maps)
        super().__post_init__(**kwargs)

    @property
    def default_out_features(self) -> list[str]:
        """All maps."""
        return list(self.stage_names)

    @property
    def map_strides(self) -> dict[str, int]:
        """Stride of each map in pixels, rounded down."""
        patch_size = self.backbone_config.patch_size
        patch = patch_size if isinstance(patch_size, int) else max(patch_size)
        scales = [*self.scale_factors, self.scale_factors[-1] / 2]
        return {stage: int(patch / scale) for stage, scale in zip(self.stage_names, scales, strict=False)}

    @property
    def image_size(self) -> int | list[int] | tuple[int, int] | None:
        """Size of the images that the transformer is made for, in pixels."""
        return getattr(self.backbone_config, "image_size", None)


def _single_map(config: dict | PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the transformer below the pyramid."""
    if isinstance(config, dict):
        model_type = config.get("model_type")
        config_class = None if model_type in OWN_MODEL_TYPES else backbone_config_class(model_type)
        if config_class is None:
            raise ValueError(
                f"The backbone_config of dino_detr_vit_pyramid has model_type={model_type!r}, but must name a plain vision "
                "transformer of transformers: 'vitdet', 'dinov3_vit', 'dinov2' or another type with one map."
            )
        config = config_class(**{name: value for name, value in config.items() if name != "model_type"})
    if not fits_pyramid(config):
        maps = getattr(config, "out_features", None)
        raise ValueError(
            f"The backbone_config of dino_detr_vit_pyramid is a {type(config).__name__} with the maps {maps}, but must be a plain "
            "vision transformer with one map, for images of any size. Backbones with several maps need no pyramid: use them as "
            "backbone_config itself."
        )
    return config
