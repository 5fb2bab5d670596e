"""Detectors of transformers on the pretrained backbone of a DINO, to be trained on the same batches.

Each takes a batch of `DetectionCollator` and gives a loss, logits (B, Q, K) and boxes (B, Q, 4), as DINO does. The pretrained
backbone is DINO's own, with frozen batch norms. As shipped, both detectors replace the norms of a timm backbone by norms without an
activation.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
)
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss
from transformers.utils import ModelOutput

from dino_hf import DinoDetrForObjectDetection
from dino_hf.model.targets import PADDING_LABEL

_RT_DETR_STRIDE = (
    32  # its coarsest feature map. Its decoder joins maps by doubling them, so sides must be multiples of this.
)


def small_dino(backbone: str, **settings) -> DinoDetrForObjectDetection:
    """DINO on a pretrained backbone, of a size that two CPU cores train in minutes.

    Args:
        backbone: as in `from_backbone`.
        settings: fields of `DinoDetrConfig`.
    """
    return DinoDetrForObjectDetection.from_backbone(
        backbone, d_model=128, encoder_layers=3, decoder_layers=3, encoder_ffn_dim=512, decoder_ffn_dim=512, **settings
    )


def deformable_detr(dino: DinoDetrForObjectDetection) -> nn.Module:
    """Two-stage Deformable DETR with box refinement, DINO's sizes and losses of all layers."""
    ours = dino.config
    config = DeformableDetrConfig(
        backbone_config=ours.backbone_config,
        two_stage=True,
        with_box_refine=True,
        two_stage_num_proposals=ours.num_queries,
        auxiliary_loss=True,
        dropout=0.0,
        id2label=ours.id2label,
        label2id=ours.label2id,
        **{name: getattr(ours, name) for name in _SHARED},
    )
    detector = _DeformableDetr(config)
    detector.loss_type = DeformableDetrForObjectDetection.__name__  # the library looks for the name of the class
    detector.model.backbone.model = copy.deepcopy(dino.model.backbone.model)
    return detector


_SHARED = (
    "d_model",
    "encoder_layers",
    "decoder_layers",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "num_feature_levels",
    "num_queries",
)


def rt_detr(dino: DinoDetrForObjectDetection) -> nn.Module:
    """RT-DETRv2 with its own encoder (one layer and convolutions), and DINO's width, decoder layers and numbers of queries."""
    ours = dino.config
    channels = dino.model.backbone.model.channels
    config = RTDetrV2Config(
        backbone_config=ours.backbone_config,
        encoder_in_channels=list(channels),
        encoder_hidden_dim=ours.d_model,
        encoder_ffn_dim=ours.encoder_ffn_dim,
        d_model=ours.d_model,
        decoder_in_channels=[ours.d_model] * len(channels),
        decoder_layers=ours.decoder_layers,
        decoder_ffn_dim=ours.decoder_ffn_dim,
        num_queries=ours.num_queries,
        num_denoising=ours.num_denoising,
        id2label=ours.id2label,
        label2id=ours.label2id,
    )
    detector = _RTDetr(config)
    detector.loss_type = RTDetrV2ForObjectDetection.__name__
    detector.model.backbone.model = copy.deepcopy(dino.model.backbone.model)
    return detector


class _DeformableDetr(DeformableDetrForObjectDetection):
    """As shipped, the proposals of the encoder have no loss. Here they get the loss of the paper: one class, "object"."""

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor, labels: dict[str, Tensor]) -> ModelOutput:
        targets = _unpadded(labels)
        outputs = super().forward(pixel_values, pixel_mask, labels=targets)
        config = self.config
        costs = {name: getattr(config, name) for name in ("class_cost", "bbox_cost", "giou_cost")}
        criterion = DeformableDetrImageLoss(
            DeformableDetrHungarianMatcher(**costs), config.num_labels, config.focal_alpha, ["labels", "boxes"]
        )
        proposals = {"logits": outputs.enc_outputs_class, "pred_boxes": outputs.enc_outputs_coord_logits.sigmoid()}
        objects = [target | {"class_labels": torch.zeros_like(target["class_labels"])} for target in targets]
        losses = criterion(proposals, objects)
        weights = {"loss_ce": 1, "loss_bbox": config.bbox_loss_coefficient, "loss_giou": config.giou_loss_coefficient}
        loss = outputs.loss + sum(weight * losses[name] for name, weight in weights.items())
        return ModelOutput(loss=loss, loss_dict=losses, logits=outputs.logits, pred_boxes=outputs.pred_boxes)


class _RTDetr(RTDetrV2ForObjectDetection):
    """RT-DETR knows no padding. So its boxes are relative to the padded images, and change their units at both ends."""

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor, labels: dict[str, Tensor]) -> ModelOutput:
        below, right = (-side % _RT_DETR_STRIDE for side in pixel_values.shape[-2:])
        pixel_values = F.pad(pixel_values, (0, right, 0, below))
        height, width = pixel_values.shape[-2:]
        mask = pixel_mask.bool()
        sizes = torch.stack([mask.any(1).sum(1) / width, mask.any(2).sum(1) / height], dim=1)  # (B, 2) shares x, y
        shares = sizes.repeat(1, 2)  # (B, 4)
        targets = [
            target | {"boxes": target["boxes"] * share} for target, share in zip(_unpadded(labels), shares, strict=True)
        ]
        outputs = super().forward(pixel_values, labels=targets)
        boxes = outputs.pred_boxes / shares[:, None]
        return ModelOutput(loss=outputs.loss, loss_dict={}, logits=outputs.logits, pred_boxes=boxes)


def _unpadded(labels: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    kept = labels["class_labels"] != PADDING_LABEL
    return [
        {"class_labels": classes[own], "boxes": boxes[own]}
        for classes, boxes, own in zip(labels["class_labels"], labels["boxes"], kept, strict=True)
    ]
