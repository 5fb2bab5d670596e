"""DINO for transformers: `DinoDetrModel` is the detector, `DinoDetrForObjectDetection` adds the loss."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from .backbone import DinoDetrBackbone
from .configuration_dino_detr import DinoDetrConfig
from .criterion import DenoisingPredictions, DinoDetrLoss
from .decoder import DinoDetrDecoder
from .denoising import DinoDetrDenoising
from .encoder import DinoDetrEncoder
from .feature_levels import describe_levels, describe_whole_levels, flatten_maps
from .query_selection import DinoDetrQuerySelection
from .run_mode import require_gradient
from .sharing import is_shipped, saving_hooks
from .targets import Targets, check_inputs, collect_targets, targets_and_mask


@dataclass
class DinoDetrModelOutput(ModelOutput):
    """Outputs of `DinoDetrModel`. B images, D decoder layers, Q queries, K classes, S tokens of all levels, C = d_model.

    Attributes:
        last_hidden_state: (B, Q, C) output of the last decoder layer, normalised.
        intermediate_logits: (B, D, Q, K) class logits of each decoder layer.
        intermediate_pred_boxes: (B, D, Q, 4) cxcywh in [0, 1] of the unpadded image.
        enc_topk_logits: (B, Q, K) class logits of the selected encoder tokens.
        enc_topk_bboxes: (B, Q, 4) boxes of the selected encoder tokens.
        encoder_last_hidden_state: (B, S, C) result of the encoder.
        encoder_hidden_states, decoder_hidden_states: on request, input and output of each layer, (B, S, C) and (B, Q, C). In
            training, denoising queries come first in the decoder.
        encoder_attentions, cross_attentions: on request, weights (B, S or Q, H, L, P) of the sampling points of each layer.
        decoder_attentions: on request, weights (B, H, Q, Q) of self-attention.
        encoder_sampling_locations, cross_sampling_locations: with the attentions, locations (B, S or Q, H, L, P, 2) of the
            sampling points as (x, y), in [0, 1] of the padded image. Points outside count as zero.
        denoising: in training with labels, predictions for the denoising queries.
    """

    last_hidden_state: Tensor | None = None
    intermediate_logits: Tensor | None = None
    intermediate_pred_boxes: Tensor | None = None
    enc_topk_logits: Tensor | None = None
    enc_topk_bboxes: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_sampling_locations: tuple[Tensor, ...] | None = None
    cross_sampling_locations: tuple[Tensor, ...] | None = None
    denoising: DenoisingPredictions | None = None


@dataclass
class DinoDetrObjectDetectionOutput(ModelOutput):
    """Outputs of `DinoDetrForObjectDetection`.

    Attributes:
        loss: () weighted sum of the losses, with labels.
        loss_dict: raw (unweighted) losses and logged values by the names of the original release, each () and detached:
            `loss_ce`, `loss_bbox`, `loss_giou`, `loss_xy`, `loss_hw` and `cardinality_error` of the last layer. Suffixes `_0`,
            `_1`, ... denote earlier layers, `_interm` the encoder, `_dn` and `_dn_0`, ... denoising. Also `class_error`.
        logits: (B, Q, K) class logits of the last layer. Their sigmoid is the score. There is no background class.
        pred_boxes: (B, Q, 4) cxcywh in [0, 1] of the unpadded image, float32.

    The other attributes are the same as in `DinoDetrModelOutput`.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    intermediate_logits: Tensor | None = None
    intermediate_pred_boxes: Tensor | None = None
    enc_topk_logits: Tensor | None = None
    enc_topk_bboxes: Tensor | None = None
    last_hidden_state: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_sampling_locations: tuple[Tensor, ...] | None = None
    cross_sampling_locations: tuple[Tensor, ...] | None = None


class DinoDetrPreTrainedModel(PreTrainedModel):
    """Loading, saving and initial values of both models."""

    config: DinoDetrConfig
    config_class = DinoDetrConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # flash and flex attention cannot express the denoising mask
    _no_split_modules = [  # noqa: RUF012
        *("DinoDetrBackbone", "DinoDetrEncoderLayer", "DinoDetrQuerySelection", "DinoDetrDenoising"),
        # Boxes pass from layer to layer, with the heads in between.
        *("DinoDetrDecoder", "DinoDetrDecoderLayer"),
    ]
    accepts_loss_kwargs = False  # the loss normalises by the number of boxes itself
    # Called with each model at the end of `__init__`. The installed package adds a function here (cpu_speed.py).
    after_building: ClassVar[list[Callable[[nn.Module], None]]] = []

    def post_init(self) -> None:
        super().post_init()
        for change in self.after_building:
            change(self)

    @classmethod
    def register_for_auto_class(cls, *args, **kwargs) -> None:
        """As in the library for a user's subclass; the configuration saves the code of our own classes (sharing.py)."""
        if not is_shipped(cls):
            super().register_for_auto_class(*args, **kwargs)

    def _init_weights(self, module):
        # Each layer has its initial values. The library guards torch.nn.init, so values from a checkpoint are kept.
        if hasattr(module, "initial_values"):
            module.initial_values(module)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()

    def get_input_embeddings(self) -> nn.Module:
        """The level embedding of the encoder. `enable_input_require_grads` uses it to get a gradient into the first layer."""
        return self.base_model.encoder.level_embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.encoder.level_embed = value

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs) -> None:
        """As in `PreTrainedModel`, but "sdpa" is not set for the backbone: backbones without it would raise an error."""
        if attn_implementation == "sdpa":
            attn_implementation = {"": attn_implementation}
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in `PreTrainedModel`. Frozen stages are frozen again, because the library makes all loaded parameters trainable.

        Weights missing in a checkpoint, such as heads for other classes, are drawn from torch's generator. Seed it before.
        """
        loaded = super().from_pretrained(*args, **kwargs)  # a tuple, if output_loading_info is set
        for module in (loaded[0] if isinstance(loaded, tuple) else loaded).modules():
            if isinstance(module, DinoDetrBackbone):
                module.freeze_stages()
        return loaded

    def save_pretrained(self, save_directory, is_main_process: bool = True, *args, **kwargs):
        """As in `PreTrainedModel`. The configuration also saves code, and `saving_hooks` add files.

        Keys are saved under our own names. By default, the library would rename them to those of the backbone's original project,
        and `Trainer` could not resume (Swin).
        """
        kwargs.setdefault("save_original_format", False)
        folder, state_dict = Path(save_directory), kwargs.get("state_dict", args[0] if args else None)
        self._after_saving = [hook(self, folder, state_dict) for hook in saving_hooks] if is_main_process else []
        saved = super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        is_uploaded = kwargs.get(
            "push_to_hub", len(args) > 1 and args[1]
        )  # then `_upload_modified_files` has called them
        if not is_uploaded and folder.is_dir():
            for finish in self._after_saving:
                finish(folder)
        return saved

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        for finish in self._after_saving:
            finish(Path(working_dir), repo_id, kwargs.get("token"))
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


class DinoDetrModel(DinoDetrPreTrainedModel):
    """The DINO detector (arXiv:2203.03605): backbone, encoder, query selection, denoising, decoder."""

    def __init__(self, config: DinoDetrConfig):
        config.set_class_names()
        super().__init__(config)
        self.backbone = DinoDetrBackbone(config)
        self.encoder = DinoDetrEncoder(config)
        self.query_selection = DinoDetrQuerySelection(config)
        self.denoising = DinoDetrDenoising(config) if config.num_denoising else None
        self.decoder = DinoDetrDecoder(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict] | dict | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> DinoDetrModelOutput:
        """
        Args:
            pixel_values: (B, 3, h, w) normalised images, padded at the right and bottom.
            pixel_mask: (B, h, w) 1 on the image, 0 on padding; None if no image is padded, or if `labels` have `size`.
            labels: see `DinoDetrForObjectDetection.forward`. Used for denoising in training, and for a missing mask.
        """
        pixel_mask = check_inputs(pixel_values, pixel_mask, labels)
        # A replica of nn.DataParallel has tensors instead of parameters.
        is_replica = getattr(self, "_is_replica", False)
        pixel_values = pixel_values.to(self.encoder.level_embed.weight.dtype if is_replica else self.dtype)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        requested = output_hidden_states, output_attentions

        feature_maps, masks = self.backbone(pixel_values, pixel_mask)  # L x (B, C, h_l, w_l), L x (B, h_l, w_l)
        levels = describe_whole_levels(feature_maps) if masks is None else describe_levels(masks)
        tokens = require_gradient(flatten_maps(feature_maps), self.encoder.layers)
        memory, encoder_states, encoder_points = self.encoder(tokens, levels, *requested)  # (B, S, C)
        proposals = self.query_selection(memory, levels)
        queries, references, num_denoising, attention_mask = proposals.content, proposals.references, 0, None

        denoising = None
        if self.training and labels is not None and self.denoising is not None:
            targets = collect_targets(labels, len(pixel_values), self.config.num_labels, pixel_values.device)
            denoising = self.denoising(targets, num_queries=queries.shape[1])
            device = queries.device  # with `device_map`, parts of the model are on several devices
            queries = torch.cat([denoising.content.to(device), queries], dim=1)  # (B, N + Q, C)
            references = torch.cat([denoising.references.to(device), references], dim=1)  # (B, N + Q, 4)
            num_denoising, attention_mask = denoising.content.shape[1], denoising.attention_mask

        queries = require_gradient(queries, self.decoder.layers)
        decoded, decoder_states = self.decoder(
            queries, references, memory, levels, num_denoising, attention_mask, *requested
        )
        if denoising is not None:
            denoised, decoded = decoded.split(num_denoising)
            denoising = DenoisingPredictions(denoised.logits, denoised.boxes, denoising.targets)
        cross_points = decoder_states.points
        return DinoDetrModelOutput(
            last_hidden_state=decoded.hidden_states[-1],
            intermediate_logits=decoded.logits.transpose(0, 1),
            intermediate_pred_boxes=decoded.boxes.transpose(0, 1),
            enc_topk_logits=proposals.logits,
            enc_topk_bboxes=proposals.boxes,
            encoder_last_hidden_state=memory,
            encoder_hidden_states=encoder_states,
            encoder_attentions=encoder_points and tuple(points.weights for points in encoder_points),
            decoder_hidden_states=decoder_states.hidden_states,
            decoder_attentions=decoder_states.attentions,
            cross_attentions=cross_points and tuple(points.weights for points in cross_points),
            encoder_sampling_locations=encoder_points and tuple(points.locations for points in encoder_points),
            cross_sampling_locations=cross_points and tuple(points.locations for points in cross_points),
            denoising=denoising,
        )


class DinoDetrForObjectDetection(DinoDetrPreTrainedModel):
    """The DINO detector with its loss, for `Trainer` and `pipeline("object-detection")`."""

    # Loads a backbone by name. The installed package sets it (pretrained_backbones.py).
    backbone_loader: ClassVar[Callable | None] = None

    def __init__(self, config: DinoDetrConfig):
        super().__init__(config)
        self.model = DinoDetrModel(config)
        self.criterion = DinoDetrLoss(config)
        self.post_init()

    @classmethod
    def from_backbone(
        cls,
        name: str | Path,
        *,
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        **settings,
    ) -> "DinoDetrForObjectDetection":
        """A detector on a pretrained backbone. All other weights have their initial values: seed torch before.

            model = DinoDetrForObjectDetection.from_backbone("microsoft/resnet-50", id2label={0: "cat", 1: "dog"})
            processor = DinoDetrImageProcessor.from_backbone("microsoft/resnet-50")

        Args:
            name: folder of a backbone or classifier, id on the Hub, or timm name such as "resnet50.a1_in1k".
            out_features, out_indices: maps of the backbone to use, finest first. None: those of strides 8, 16 and 32.
            settings: of `DinoDetrConfig`.
        Raises:
            OSError: there is no backbone of this name, or it cannot be downloaded.
            ImportError: timm or the package dino_hf is needed and not installed.
            ValueError: the model is no backbone, or has no maps of these strides.
        """
        if cls.backbone_loader is None:
            raise ImportError("Backbones are loaded by name only where dino_hf is installed: pip install dino_hf.")
        config, weights = cls.backbone_loader(name, out_features, out_indices)
        origin = Path(name).name if Path(name).expanduser().exists() else name  # the rest of a path is private
        settings.setdefault("provenance", {"start": f"random weights, except the backbone of {origin}"})
        model = cls(cls.config_class(backbone_config=config, **settings))
        model.model.backbone.model.load_state_dict(weights)
        return model

    @property
    def loss_function(self) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
        """The loss, with the arguments and results of `DinoDetrLoss`. It is `criterion`, unless the user has set another loss."""
        # A module that is set as an attribute does not reach the setter.
        return self._modules.get("loss_function") or self.__dict__.get("_loss_function") or self.criterion

    @loss_function.setter
    def loss_function(self, value: Callable[..., tuple[Tensor, dict[str, Tensor]]] | None) -> None:
        self._loss_function = value

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict] | dict | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> DinoDetrObjectDetectionOutput:
        """
        Args:
            pixel_values: (B, 3, h, w) normalised images, padded at the right and bottom.
            pixel_mask: (B, h, w) 1 on the image, 0 on padding; None if no image is padded. Without a mask, `size` in the
                labels gives the mask. Image processors write it.
            labels: for the loss and, in training, denoising. One dictionary per image with `class_labels` (T,) in [0, K) and
                `boxes` (T, 4) cxcywh in [0, 1] of the unpadded image; or one dictionary of padded tensors, `class_labels`
                (B, M) padded with -100 and `boxes` (B, M, 4). Optional `size`: (height, width) of the unpadded image.
            output_hidden_states: return the hidden states of all layers.
            output_attentions: return the attention weights and the sampling locations of all layers.
            num_items_in_batch: number of boxes that losses are divided by. None: the boxes of this batch, averaged over
                processes. With gradient accumulation, pass the boxes of all batches of a step in all processes.
        Raises:
            ValueError: inputs or labels have a wrong form.
        """
        if labels is not None:
            if getattr(self, "_is_replica", False) and not isinstance(labels, Mapping):
                raise ValueError(
                    "labels is a list of dictionaries. nn.DataParallel, which Trainer uses for several GPUs in one process, splits "
                    "every tensor in that list. Start one process for each GPU with torchrun, or pass labels as one dictionary of "
                    "padded tensors, as dino_hf.training.DetectionCollator does."
                )
            labels, pixel_mask = targets_and_mask(labels, pixel_values, pixel_mask, self.config.num_labels)
        outputs = self.model(
            pixel_values,
            pixel_mask,
            labels,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        return _detections(outputs) if labels is None else self.score(outputs, labels, num_items_in_batch)

    @torch.compiler.disable(reason="the loss depends on the number of boxes")
    def score(
        self, outputs: DinoDetrModelOutput, targets: Targets, num_items_in_batch: Tensor | int | None = None
    ) -> DinoDetrObjectDetectionOutput:
        """Compute the loss of given outputs and return the result of `forward`.

        Args:
            outputs: outputs of `DinoDetrModel`.
            targets: result of `collect_targets` for the same images.
            num_items_in_batch: see `forward`.
        """
        device, denoising = outputs.intermediate_logits.device, outputs.denoising
        # The encoder's proposals come first. They have the form of a layer's predictions.
        logits = torch.cat(
            [outputs.enc_topk_logits[None].to(device), outputs.intermediate_logits.transpose(0, 1)]
        )  # (1 + D, B, Q, K)
        boxes = torch.cat([outputs.enc_topk_bboxes[None].to(device), outputs.intermediate_pred_boxes.transpose(0, 1)])
        if denoising is not None:
            denoising = denoising._replace(targets=denoising.targets.to(device))
        loss, logs = self.loss_function(logits, boxes, targets.to(device), denoising, num_items_in_batch)
        return _detections(outputs, loss, logs)


def _detections(
    outputs: DinoDetrModelOutput, loss: Tensor | None = None, loss_dict: dict[str, Tensor] | None = None
) -> DinoDetrObjectDetectionOutput:
    parts = {name: value for name, value in outputs.items() if name != "denoising"}
    return DinoDetrObjectDetectionOutput(
        loss=loss,
        loss_dict=loss_dict,
        logits=outputs.intermediate_logits[:, -1],
        pred_boxes=outputs.intermediate_pred_boxes[:, -1],
        **parts,
    )


__all__ = [
    "DinoDetrForObjectDetection",
    "DinoDetrModel",
    "DinoDetrModelOutput",
    "DinoDetrObjectDetectionOutput",
    "DinoDetrPreTrainedModel",
]
