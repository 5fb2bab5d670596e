"""Stable-DINO: https://github.com/IDEA-Research/Stable-DINO, built on detrex"""

from ...model.configuration_dino_detr import DinoDetrConfig
from ..errors import ConversionError
from ..rules import Rule
from .detrex import Detrex

_FUSION = "transformer.encoder.fusion_layer."


class StableDino(Detrex):
    """Stable-DINO is detrex's DINO with a fusion of the encoder's layers and another loss.

    No checkpoint of the project is public. All its models have the same position settings.
    """

    name = "stabledino"
    marks = ("transformer.level_embeds", _FUSION + "0.weight")
    defaults = Detrex.defaults | {
        "class_loss": "stable_dino",
        "cls_loss_coefficient": 6.0,
        "denoising_cls_loss_coefficient": 1.0,
        "negative_noise_start": 0.0,
    }
    has_fixed_positions = True
    has_encoder_fusion = True

    def rules(self, num_decoder_layers: int, num_maps: int) -> list[Rule]:
        name = _FUSION + "{i}.{p}"
        return [*super().rules(num_decoder_layers, num_maps), Rule(name, name)]

    def check_expressible(self, config: DinoDetrConfig) -> None:
        super().check_expressible(config)
        if not config.encoder_fusion:
            raise ConversionError("The model has encoder_fusion=False, which no Stable-DINO has; write it for detrex.")
