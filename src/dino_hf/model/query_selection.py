"""Query selection (DINO sec. 3.4): the best encoder tokens give the reference boxes, learnt embeddings give the content."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .configuration_dino_detr import DinoDetrConfig
from .feature_levels import FeatureLevels, cell_centers
from .heads import DetectionHead
from .layers import linear, xavier_weight


class Proposals(NamedTuple):
    """The Q selected tokens. Their predictions have the form of a decoder layer's predictions and their own loss."""

    content: Tensor  # (B, Q, C) learnt, the same for every image; without mixed selection, the detached selected tokens
    references: Tensor  # (B, Q, 4) cxcywh, detached: initial references of the decoder
    logits: Tensor  # (B, Q, K)
    boxes: Tensor  # (B, Q, 4) cxcywh, with gradient


class DinoDetrQuerySelection(nn.Module):
    def __init__(self, config: DinoDetrConfig):
        super().__init__()
        self.memory_proj = linear(config.d_model, config.d_model, xavier_weight)
        self.memory_norm = nn.LayerNorm(config.d_model)
        self.head = DetectionHead(config.d_model, config.num_labels)
        self.num_queries = config.num_queries
        self.content = nn.Embedding(config.num_queries, config.d_model) if config.mixed_query_selection else None

    def forward(self, memory: Tensor, levels: FeatureLevels) -> Proposals:
        """
        Args:
            memory: (B, S, C)
        Returns:
            Q = num_queries proposals, or S if the maps of a tiny image have fewer cells.
        """
        anchors, is_anchor = grid_anchors(levels)  # (B, S, 4), (B, S)
        memory = memory.masked_fill(~is_anchor[..., None], 0)
        num_queries, num_tokens = self.num_queries, memory.shape[1]
        if num_tokens < num_queries:  # not min(): the number of queries would become a variable of a traced graph
            num_queries = num_tokens
        with torch.no_grad():  # the selection has no gradient
            best = self.best_logits(memory).topk(num_queries, dim=1).indices[..., None]  # (B, Q, 1)

        def select(x: Tensor) -> Tensor:
            return x.gather(1, best.expand(-1, -1, x.shape[-1]))

        # The heads run on the selected tokens only. The release runs them on all S and drops the rest, with the same result.
        tokens = self._tokens(select(memory))  # (B, Q, C)
        logits = self.head.classify(tokens)  # (B, Q, K)
        boxes = (select(anchors) + self.head.box_delta(tokens)).sigmoid()  # (B, Q, 4)
        if self.content is None:
            content = tokens.detach()  # (B, Q, C)
        else:
            content = self.content(torch.arange(num_queries, device=memory.device)).expand(memory.shape[0], -1, -1)
        return Proposals(content, boxes.detach(), logits, boxes)

    def _tokens(self, memory: Tensor) -> Tensor:
        return self.memory_norm(self.memory_proj(memory))

    def best_logits(self, memory: Tensor) -> Tensor:
        """(..., C) -> (...) logit of the best class of each token."""
        return self.head.classify(self._tokens(memory)).amax(-1)


def grid_anchors(levels: FeatureLevels) -> tuple[Tensor, Tensor]:
    """One square anchor on every cell, larger on coarser levels (Deformable DETR, app. A.4).

    Returns:
        (B, S, 4) anchors as logits of cxcywh, and (B, S) True for valid anchors. Anchors on padding or closer than 0.01 to the
        border are invalid, and their logits are +inf.
    """
    centers = cell_centers(levels)  # (B, S, 2)
    sizes = [
        centers.new_full((height * width, 2), 0.05 * 2.0**level) for level, (height, width) in enumerate(levels.shapes)
    ]
    boxes = torch.cat([centers, torch.cat(sizes).expand_as(centers)], dim=-1)  # (B, S, 4)
    inside = ((boxes > 0.01) & (boxes < 0.99)).all(-1)  # (B, S)
    if levels.padding_mask is not None:
        inside = inside & ~levels.padding_mask
    return torch.log(boxes / (1 - boxes)).masked_fill(~inside[..., None], float("inf")), inside
