"""Configuration of the FocalNet of published DINO detectors."""

from transformers import FocalNetConfig


class DinoDetrFocalNetConfig(FocalNetConfig):
    """FocalNet (arXiv:2203.11926) as a backbone with the maps before the downsampling, each with a LayerNorm.

    All settings are those of `transformers.FocalNetConfig`. The maps "stage1" to "stage4" have the strides 4, 8, 16 and 32 and the
    widths `embed_dim`, 2 `embed_dim`, 4 `embed_dim` and 8 `embed_dim`, which `hidden_sizes` always shows.
    """

    model_type = "dino_detr_focalnet"

    def __post_init__(self, **kwargs):
        self.hidden_sizes = [self.embed_dim * 2**stage for stage in range(len(self.depths))]
        super().__post_init__(**kwargs)
