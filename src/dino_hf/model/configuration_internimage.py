"""The configuration of an InternImage backbone."""

import math

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin


@strict
class DinoDetrInternImageConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of an InternImage backbone (arXiv:2211.05778). The defaults give InternImage-T.

    The sizes of detrex's DINO models:

    | | embed_dim | depths | num_groups | post_norm | offset_scale | drop_path_rate |
    | --- | --- | --- | --- | --- | --- | --- |
    | T | 64 | 4, 4, 18, 4 | 4, 8, 16, 32 | False | 1 | 0.1 |
    | S | 80 | 4, 4, 21, 4 | 5, 10, 20, 40 | True | 1 | 0.1 |
    | B | 112 | 4, 4, 21, 4 | 7, 14, 28, 56 | True | 1 | 0.1 |
    | L | 160 | 5, 5, 22, 5 | 10, 20, 40, 80 | True | 2 | 0.4 |

    Args:
        embed_dim: width of the first stage. Each further stage is twice as wide. It is even.
        depths: number of layers of each stage.
        num_groups: groups of the deformable convolution of each stage. A group has its own offsets and weights. The number divides
            the width of the stage.
        mlp_ratio: inner width of the feed-forward blocks, divided by the width of the stage.
        post_norm: True: a layer normalises the results of its convolution and its feed-forward block. False: it normalises their
            inputs, and each stage ends with a norm.
        offset_scale: factor of the learnt offsets and of the 3 x 3 grid of the convolution. At 2, the grid is 5 cells wide. No
            tensor of a checkpoint shows it.
        layer_scale_init_value: initial value of the learnt scales of a layer; None: layers have no scales.
        layer_norm_eps: number added to variances.
        drop_path_rate: probability that training skips a branch of the last layer (stochastic depth). It grows from 0 at the first
            layer.
        initializer_range: standard deviation of the initial weights of linear layers.
        out_features, out_indices: stages of the feature maps: "stem", "stage1" to "stage4", or their numbers 0 to 4.

    Raises:
        huggingface_hub.errors.StrictDataclassError: a value has a wrong type, or sizes do not match.
    """

    model_type = "dino_detr_internimage"

    num_channels: int = 3
    embed_dim: int = 64
    depths: list[int] | tuple[int, ...] = (4, 4, 18, 4)
    num_groups: list[int] | tuple[int, ...] = (4, 8, 16, 32)
    mlp_ratio: float | int = 4.0
    post_norm: bool = False
    offset_scale: float | int = 1.0
    layer_scale_init_value: float | int | None = 1.0
    layer_norm_eps: float = 1e-6
    drop_path_rate: float | int = 0.1
    initializer_range: float = 0.02
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        self.depths, self.num_groups = list(self.depths), list(self.num_groups)
        self.stage_names = ["stem"] + [f"stage{stage}" for stage in range(1, len(self.depths) + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    @property
    def hidden_sizes(self) -> list[int]:
        """Width of each stage."""
        return [self.embed_dim * 2**stage for stage in range(len(self.depths))]

    def validate_architecture(self):
        """Check all settings. The library calls this at construction and before saving."""
        if len(self.num_groups) != len(self.depths) or not self.depths:
            raise ValueError(
                f"num_groups={self.num_groups} and depths={self.depths} must have one number for each stage."
            )
        if self.embed_dim < 2 or self.embed_dim % 2:
            raise ValueError(f"embed_dim={self.embed_dim} must be an even number of at least 2.")
        if min(self.depths) < 1:
            raise ValueError(f"depths={self.depths} must be at least 1 each.")
        for width, groups in zip(self.hidden_sizes, self.num_groups, strict=True):
            if groups < 1 or width % groups:
                raise ValueError(
                    f"num_groups={self.num_groups} must divide the widths {self.hidden_sizes} of the stages; InternImage has "
                    f"{max(1, width // 16)} groups at a width of {width}."
                )
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate={self.drop_path_rate} must be in [0, 1).")
        for name in ("mlp_ratio", "offset_scale", "layer_norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be a positive, finite number.")
