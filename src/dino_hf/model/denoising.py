"""Contrastive denoising (DINO sec. 3.3): training adds queries made from boxes and labels with noise."""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .box_ops import cxcywh_to_xyxy, inverse_sigmoid, xyxy_to_cxcywh
from .configuration_dino_detr import DinoDetrConfig
from .matcher import DenoisingTargets, Matches
from .targets import Targets


class DenoisingQueries(NamedTuple):
    """N = G * 2n queries: G groups of n positives followed by n negatives. n is the largest number of boxes of an image."""

    content: Tensor  # (B, N, C)
    references: Tensor  # (B, N, 4) cxcywh
    attention_mask: Tensor | None  # see `denoising_attention_mask`
    targets: DenoisingTargets


class DinoDetrDenoising(nn.Module):
    """Denoising queries for a batch, and the embedding of their labels."""

    def __init__(self, config: DinoDetrConfig):
        super().__init__()
        self.configure(config)
        self.num_labels = config.num_labels
        num_rows = config.num_labels + config.num_extra_label_embeddings  # the extra rows are never looked up
        self.label_embedding = nn.Embedding(num_rows, config.d_model)

    def configure(self, config: DinoDetrConfig) -> None:
        """Take the number of queries and the noise from a configuration. The label embedding is unchanged."""
        self.num_denoising = config.num_denoising
        self.max_queries = config.max_denoising_queries
        self.masks_padding = config.mask_denoising_padding
        self.label_noise = 0.5 * config.label_noise_ratio
        self.box_noise = config.box_noise_scale
        self.negative_start = config.negative_noise_start

    @torch.compiler.disable(reason="every shape depends on the number of boxes")
    def forward(self, targets: Targets, num_queries: int) -> DenoisingQueries:
        num_boxes = len(targets.boxes)
        targets, index = self._sample(targets)  # index: (T,) into the targets of the batch
        largest = max(targets.counts, default=0)
        num_groups = count_groups(self.num_denoising, largest)
        if largest and self.max_queries is not None:
            num_groups = min(num_groups, self.max_queries // (2 * largest))
        group_size = 2 * largest
        device = targets.boxes.device

        group = torch.arange(num_groups, device=device)[:, None]  # (G, 1)
        positive = group * group_size + targets.position  # (G, T) place of the positive of each target
        place = torch.stack([positive, positive + largest])  # (2, G, T) places of positives and negatives
        image = targets.image.expand_as(place)
        labels = self._noised_labels(targets.class_labels.expand(place.shape))
        boxes = self._noised_boxes(targets.boxes.expand(*place.shape, 4))

        batch_size, num_denoising = len(targets.counts), num_groups * group_size
        embedded = self.label_embedding(labels).to(device)  # (2, G, T, C)
        content = embedded.new_zeros(batch_size, num_denoising, embedded.shape[-1])
        # This keeps the embedding in the graph even without boxes: distributed training waits for each gradient.
        content = content.index_put((image, place), embedded)  # (B, N, C)
        # Images with fewer boxes are padded with queries in the middle of the image (zero logits), as in the release.
        references = boxes.new_full((batch_size, num_denoising, 4), 0.5)
        references[image, place] = inverse_sigmoid(boxes).sigmoid()  # (B, N, 4), a little inside [0, 1]

        matches = Matches(
            layer=torch.zeros_like(positive).flatten(),
            image=image[0].flatten(),
            query=positive.flatten(),
            target=index.expand(num_groups, -1).flatten(),
        )
        is_padding = None
        if self.masks_padding and len(set(targets.counts)) > 1:
            is_padding = torch.ones(batch_size, num_denoising, dtype=torch.bool, device=device)
            is_padding[image, place] = False
        mask = denoising_attention_mask(num_groups, group_size, num_queries, is_padding, device)
        share = len(targets.boxes) / num_boxes if num_boxes else 1.0
        return DenoisingQueries(content, references, mask, DenoisingTargets(matches, num_groups, share))

    def _sample(self, targets: Targets) -> tuple[Targets, Tensor]:
        """Random boxes of each image, at most as many as a group may have, and their indices into the T targets."""
        device = targets.boxes.device
        limit = max(targets.counts, default=0) if self.max_queries is None else self.max_queries // 2
        if max(targets.counts, default=0) <= limit:
            return targets, torch.arange(len(targets.boxes), device=device)
        shuffled = torch.rand(len(targets.boxes), device=device).argsort()
        order = shuffled[
            targets.image[shuffled].argsort(stable=True)
        ]  # sorted by image, in random order within an image
        counts = tuple(min(count, limit) for count in targets.counts)
        starts = itertools.accumulate(targets.counts, initial=0)
        first = torch.cat(
            [torch.arange(start, start + count, device="cpu") for start, count in zip(starts, counts, strict=False)]
        )
        index = order[first.to(device, non_blocking=True)]
        return Targets(targets.class_labels[index], targets.boxes[index], counts), index

    def _noised_labels(self, labels: Tensor) -> Tensor:
        """Replace some labels by a random class, which may be the same class."""
        is_replaced = torch.rand(labels.shape, device=labels.device) < self.label_noise
        return torch.where(is_replaced, torch.randint_like(labels, self.num_labels), labels)

    def _noised_boxes(self, boxes: Tensor) -> Tensor:
        """Move the sides of boxes (2, G, T, 4), in units of the noise scale.

        Positives move by up to half a box size, negatives in DINO by half to one box size.
        """
        if not self.box_noise:
            return boxes
        half_size = boxes[..., 2:].repeat(1, 1, 1, 2) / 2  # (2, G, T, 4) along the axis of each side
        shift = torch.rand_like(boxes)
        shift[1] += self.negative_start
        sign = torch.randint_like(boxes, 2) * 2 - 1
        noised = cxcywh_to_xyxy(boxes) + sign * shift * half_size * self.box_noise
        return xyxy_to_cxcywh(noised.clamp(0, 1))


def count_groups(num_denoising: int, largest: int) -> int:
    """Number of groups G if images have at most `largest` boxes, by the release's rule.

    `num_denoising` counts pairs of queries if it is at least 50. Below 50, twice the number counts groups. Recipes depend on it.
    """
    if not largest:
        return 1
    doubled = 2 * num_denoising
    return max(1, doubled // (2 * largest)) if doubled >= 100 else max(1, doubled)


def denoising_attention_mask(
    num_groups: int, group_size: int, num_queries: int, is_padding: Tensor | None = None, device=None
) -> Tensor | None:
    """Attention mask of the N denoising queries: they may attend to their own group and to all Q matching queries.

    The columns are the N denoising queries followed by the Q matching queries. Matching queries have no rows: they attend only to
    matching queries, because denoising queries contain the ground truth.

    Args:
        is_padding: (B, N) True for queries that no query may attend to.
    Returns:
        (N, N + Q) or, with padding, (B, N, N + Q), True where the row may attend to the column. With one group, as for crowded
        images, None or, with padding, (B, 1, N + Q) for all rows. Memory then grows with the number of boxes, not its square.
    """
    mask = None
    if num_groups > 1:
        group = torch.arange(num_groups, device=device).repeat_interleave(group_size)  # (N)
        mask = F.pad(group[:, None] == group, (0, num_queries), value=True)  # (N, N + Q)
    if is_padding is not None:
        seen = F.pad(~is_padding, (0, num_queries), value=True)[:, None]  # (B, 1, N + Q)
        mask = seen if mask is None else mask & seen  # (B, 1 or N, N + Q)
    return mask
