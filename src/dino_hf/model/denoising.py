"""Contrastive denoising (DINO sec. 3.3): in training, noised boxes and labels join the queries, to be restored or refused."""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .box_ops import cxcywh_to_xyxy, inverse_sigmoid, xyxy_to_cxcywh
from .configuration_dino_detr import DinoDetrConfig
from .matcher import DenoisingAnswers, Matches
from .targets import Targets


class DenoisingQueries(NamedTuple):
    """N = G * 2n queries: in each of G groups, n positives and then n negatives, n being an image's largest number of boxes."""

    content: Tensor  # (B, N, C)
    references: Tensor  # (B, N, 4) cxcywh
    attention_mask: Tensor | None  # see `denoising_attention_mask`
    answers: DenoisingAnswers


class DinoDetrDenoising(nn.Module):
    def __init__(self, config: DinoDetrConfig):
        super().__init__()
        self.num_denoising = config.num_denoising
        self.max_queries = config.max_denoising_queries
        self.masks_padding = config.mask_denoising_padding
        self.label_noise = 0.5 * config.label_noise_ratio
        self.box_noise = config.box_noise_scale
        self.num_labels = config.num_labels
        num_rows = config.num_labels + config.num_extra_label_embeddings  # the extra ones are never looked up
        self.label_embedding = nn.Embedding(num_rows, config.d_model)

    @torch.compiler.disable(reason="every shape in it is a number of boxes")
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
        positive = group * group_size + targets.position  # (G, T) place of each target's positive
        place = torch.stack([positive, positive + largest])  # (2, G, T) and of its negative
        image = targets.image.expand_as(place)
        labels = self._noised_labels(targets.class_labels.expand(place.shape))
        boxes = self._noised_boxes(targets.boxes.expand(*place.shape, 4))

        batch_size, num_denoising = len(targets.counts), num_groups * group_size
        embedded = self.label_embedding(labels).to(device)  # (2, G, T, C)
        content = embedded.new_zeros(batch_size, num_denoising, embedded.shape[-1])
        # Also without any box this leaves the embedding in the graph: distributed training waits for each gradient.
        content = content.index_put((image, place), embedded)  # (B, N, C)
        # Images with fewer boxes are filled up with queries of zero logits: boxes in the middle, as in the release.
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
        return DenoisingQueries(content, references, mask, DenoisingAnswers(matches, num_groups, share))

    def _sample(self, targets: Targets) -> tuple[Targets, Tensor]:
        """As many boxes of each image as a group may have, drawn at random, and which of the T targets they are."""
        device = targets.boxes.device
        limit = max(targets.counts, default=0) if self.max_queries is None else self.max_queries // 2
        if max(targets.counts, default=0) <= limit:
            return targets, torch.arange(len(targets.boxes), device=device)
        shuffled = torch.rand(len(targets.boxes), device=device).argsort()
        order = shuffled[targets.image[shuffled].argsort(stable=True)]  # image after image, in random order within each
        counts = tuple(min(count, limit) for count in targets.counts)
        starts = itertools.accumulate(targets.counts, initial=0)
        first = torch.cat(
            [torch.arange(start, start + count, device="cpu") for start, count in zip(starts, counts, strict=False)]
        )
        index = order[first.to(device, non_blocking=True)]
        return Targets(targets.class_labels[index], targets.boxes[index], counts), index

    def _noised_labels(self, labels: Tensor) -> Tensor:
        """Some labels replaced by a random class, which may be the right one."""
        chosen = torch.rand(labels.shape, device=labels.device) < self.label_noise
        return torch.where(chosen, torch.randint_like(labels, self.num_labels), labels)

    def _noised_boxes(self, boxes: Tensor) -> Tensor:
        """(2, G, T, 4): sides moved by up to half a box size for positives, by half to one for negatives, times the noise."""
        if not self.box_noise:
            return boxes
        half_size = boxes[..., 2:].repeat(1, 1, 1, 2) / 2  # (2, G, T, 4) of the side's own axis
        shift = torch.rand_like(boxes)
        shift[1] += 1
        sign = torch.randint_like(boxes, 2) * 2 - 1
        noised = cxcywh_to_xyxy(boxes) + sign * shift * half_size * self.box_noise
        return xyxy_to_cxcywh(noised.clamp(0, 1))


def count_groups(num_denoising: int, largest: int) -> int:
    """Groups G for at most `largest` boxes per image, by the release's rule.

    It counts queries from 50 pairs on, and below that, oddly, groups: kept, because recipes depend on it.
    """
    if not largest:
        return 1
    doubled = 2 * num_denoising
    return max(1, doubled // (2 * largest)) if doubled >= 100 else max(1, doubled)


def denoising_attention_mask(
    num_groups: int, group_size: int, num_queries: int, is_padding: Tensor | None = None, device=None
) -> Tensor | None:
    """What the N denoising queries may attend to, of themselves and the Q matching queries after them: their own group and all
    matching queries. Matching queries only see matching queries, for denoising queries carry the ground truth.

    Args:
        is_padding: (B, N) True for queries that no query may attend to.
    Returns:
        (N, N + Q) or, with padding, (B, N, N + Q), True where the row may attend to the column. With one group, as crowded images
        have, None or, with padding, (B, 1, N + Q) for all rows: so memory grows with their boxes and not with the square.
    """
    mask = None
    if num_groups > 1:
        group = torch.arange(num_groups, device=device).repeat_interleave(group_size)  # (N)
        mask = F.pad(group[:, None] == group, (0, num_queries), value=True)  # (N, N + Q)
    if is_padding is not None:
        seen = F.pad(~is_padding, (0, num_queries), value=True)[:, None]  # (B, 1, N + Q)
        mask = seen if mask is None else mask & seen  # (B, 1 or N, N + Q)
    return mask
