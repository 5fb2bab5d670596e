"""`Project`: everything that differs between the projects that publish DINO checkpoints."""

from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from ...model.configuration_dino_detr import DinoDetrConfig
from ...model.image_processing_dino_detr import DinoDetrImageProcessor
from ..errors import ConversionError
from ..rules import Rule, count_indices, translate


def backbone_depths(config: PreTrainedConfig) -> list[int]:
    """Layers in the stages of a backbone; a plain transformer below a pyramid is one stage."""
    inner = getattr(config, "backbone_config", None)
    return list(config.depths) if inner is None else [inner.num_hidden_layers]


class Project:
    """How a project names, saves and configures its models.

    Each project is a subclass in a file of its own, and is listed in registry.py. The attributes and methods below are
    the ones that projects override. Tensors have the names of the original release unless stated otherwise.

    Attributes:
        name: value of --source and --to.
        marks: names of tensors. A file that has them all belongs to this project.
        defaults: fields of the configuration that no tensor shows -> the values that this project uses.
        frozen_resnet_stages: the default of `num_frozen_backbone_stages` for a ResNet, including the stem.
        swin_drop_path_rate: the default of `drop_path_rate` for a Swin.
        pred_boxes_eps: bound of the inverse sigmoid of predicted boxes, for which the projects have no setting.
        has_fixed_positions: whether all models of this project have the position settings in `defaults`.
        processor: settings of the image processor that differ from its defaults, for files that contain none.
        refused: name of a tensor -> what a file with this tensor is, and why it cannot be converted.
        saves_settings: whether a file contains the settings of its training.
        saves_class_names: whether a file contains the names of the classes.
        counts_denoising_pairs: whether a `num_denoising` below 50 counts pairs of queries instead of groups.
        backbones: model types of the backbones that this project has.
        has_encoder_fusion: whether a file can hold a fusion of the encoder's layers.
        num_classes_setting, position_setting: names of settings, shown to the user by `settings_to_make`.
    """

    name: str
    marks: tuple[str, ...]
    defaults: dict[str, Any]
    frozen_resnet_stages: int
    swin_drop_path_rate = 0.2
    pred_boxes_eps = 1e-3
    has_fixed_positions = False
    processor: Mapping[str, Any] = MappingProxyType({})
    refused: Mapping[str, str] = MappingProxyType({})
    saves_settings = True
    saves_class_names = False
    counts_denoising_pairs = True
    backbones: tuple[str, ...] = ("resnet", "swin", "convnext")
    has_encoder_fusion = False
    num_classes_setting = ""
    position_setting = ""

    # -- from a file of this project

    def recognises(self, names: Iterable[str]) -> bool:
        """Whether a file with these tensors (names of this project) belongs to this project."""
        names = set(names)
        return all(mark in names for mark in self.marks)

    def rules(self, num_decoder_layers: int, num_maps: int) -> list[Rule]:
        """Names of this project -> names of the original release.

        Args:
            num_maps: feature maps of the backbone.
        """
        raise NotImplementedError

    def rules_for_names(self, names: Iterable[str]) -> list[Rule]:
        """`rules` for a file with these tensors (names of this project)."""
        names = list(names)
        return self.rules(self.count_decoder_layers(names), count_indices(names, r"neck\.convs\.(\d+)\."))

    def count_decoder_layers(self, names: Iterable[str]) -> int:
        """Number of decoder layers of a file with these tensors (names of this project)."""
        return count_indices(names, r"transformer\.decoder\.layers\.(\d+)\.")

    def to_release(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Counter]:
        """Rename the tensors of a file to the names of the original release.

        Returns:
            the tensors, and the number of dropped tensors by reason.
        """
        return translate(tensors.items(), self.rules_for_names(tensors))

    def fields_from_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Fields of the configuration that the tensors of this project show, besides the sizes."""
        return {"share_decoder_heads": False}

    def fields_from_settings(self, settings: dict) -> dict[str, Any]:
        """Fields of the configuration, and `drop_path_rate` of the backbone, that the settings in a file contain.

        Raises:
            ConversionError: the model computes something that dino_hf does not compute.
        """
        return {}

    def processor_settings(self, settings: dict) -> dict[str, Any]:
        """Settings of the image processor that the settings in a file contain."""
        return {}

    def data_set(self, settings: dict) -> str | None:
        """Name of the data set of the training, if the settings in a file contain it."""
        return None

    # -- to a file of this project

    def check_expressible(self, config: DinoDetrConfig) -> None:
        """Check that this project can compute a model with this configuration.

        Raises:
            ConversionError: it cannot.
        """
        backbone = config.backbone_config
        if backbone.model_type not in self.backbones:
            raise ConversionError(
                f"The backbone is a {backbone.model_type!r}; for {self.name}, {' or '.join(self.backbones)} can be written."
            )
        stages = backbone.out_features
        if stages != backbone.stage_names[-len(stages) :]:
            raise ConversionError(
                f"The model uses the stages {stages}; the other projects use the last ones, without a gap."
            )
        if config.encoder_fusion and not self.has_encoder_fusion:
            raise ConversionError(
                f"The model has encoder_fusion=True, which {self.name} cannot compute; write it for stabledino."
            )
        inner = getattr(backbone, "backbone_config", None)  # of the transformer below a pyramid
        if inner is not None and (inner.model_type != "vitdet" or stages != backbone.stage_names):
            raise ConversionError(
                f"The backbone is a pyramid with the maps {stages} on a {inner.model_type!r}; for {self.name}, all maps of a "
                "pyramid on a 'vitdet' can be written."
            )
        if config.num_denoising == 0:
            raise ConversionError(
                "The model was converted or trained without denoising (num_denoising=0), so it has no label embedding. The "
                "checkpoints of the other projects have one."
            )

    def file_content(self, tensors: dict[str, Tensor], config: DinoDetrConfig) -> dict[str, Any]:
        """Content of a file of this project, for `torch.save`."""
        raise NotImplementedError

    def settings_to_make(self, config: DinoDetrConfig) -> list[str]:
        """Settings that the configuration of this project needs to compute this model, and notes on what differs."""
        backbone = config.backbone_config
        lines = [
            f"backbone: {backbone.model_type} of depths {backbone_depths(backbone)}, maps {', '.join(backbone.out_features)}",
            *self.setting_lines(config),
        ]
        if not self.saves_class_names:
            lines.append(
                f"note: files of {self.name} have no class names and no category ids; restore them by --label-names"
            )
        if config.pred_boxes_eps != self.pred_boxes_eps:
            lines.append(
                f"note: {self.name} bounds the inverse sigmoid of predicted boxes by {self.pred_boxes_eps:g}, this model by "
                f"{config.pred_boxes_eps:g}; only boxes with a side this close to 0 or 1 differ"
            )
        return lines

    def test_settings(self, processor: DinoDetrImageProcessor) -> list[str]:
        """Test settings by which this project detects as the image processor does, and which DINO does not have."""
        lines = []
        if processor.canvas_side is not None:
            lines.append(
                f"note: the model sees images on a square canvas of {processor.canvas_side} pixels with the value "
                f"{processor.canvas_value}, without a mask; boxes are relative to the canvas"
            )
        if processor.nms is not None:
            lines.append(f"note: detections go through NMS: {dict(processor.nms)}")
        return lines

    def setting_lines(self, config: DinoDetrConfig) -> list[str]:
        """The settings of `settings_to_make` other than the backbone."""
        return [
            f"{self.num_classes_setting} = {config.num_labels}",
            f"num_queries = {config.num_queries}, num_feature_levels = {config.num_feature_levels}, width {config.d_model}",
            *(
                f"{side}: {getattr(config, f'{side}_layers')} layers, {getattr(config, f'{side}_attention_heads')} heads, "
                f"{getattr(config, f'{side}_n_points')} points, feed-forward {getattr(config, f'{side}_ffn_dim')}"
                for side in ("encoder", "decoder")
            ),
            f"{self.position_setting}: normalize=True, temperature={config.position_temperature:g}, "
            f"offset={config.position_offset:g}",
        ]
