"""Test-time augmentation: detect in each image and its mirror image at several sizes, and fuse the detections."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from operator import attrgetter

import numpy as np
from PIL import Image, ImageOps

from .boxes import overlap
from .predictor import Detections, Predictor, TooLarge, try_on_image
from .tiling import Detect

SCALES = (1.0, 0.8, 1.25)  # factors for the size of the image processor
_SAME = 0.55  # boxes with a higher IoU belong to one object, as in the paper on weighted boxes fusion


def augmented_detectors(
    predictor: Predictor, batch_size: int, threshold: float, max_detections: int | None = None
) -> list[Detect]:
    """The predictor at each scale of `SCALES`. If its image processor gives all images one shape, only the original scale is used.

    Each view also keeps detections with a score below `threshold`, because fusion averages scores. Detections that are left out
    would change a fused score by at most a sixth of the threshold.
    """
    scales = SCALES if predictor.can_scale else SCALES[:1]
    lowest = threshold / (2 * len(scales))
    settings = {"batch_size": batch_size, "threshold": lowest, "max_detections": max_detections, "skip_too_large": True}
    return [partial(predictor.at_scale(scale, 2 * len(scales) - 1), **settings) for scale in scales]


def detect_augmented(detectors: Sequence[Detect], threshold: float = 0.0) -> Detect:
    """Run each detector on each image and its mirror image, and fuse the detections, see `fuse`.

    Args:
        detectors: one detector at several scales.
        threshold: fused detections with a score of at most this are left out.
    """

    def detect_all(images: Iterable[Image.Image]) -> Iterator[Detections]:
        num = len(detectors)
        originals, *copies = share(images, 1 + 2 * num)
        widths = map(attrgetter("width"), originals)  # a loop would keep the image in memory while the next one is read
        upright = [detect(copy) for detect, copy in zip(detectors, copies[:num], strict=True)]
        mirror = partial(try_on_image, ImageOps.mirror)
        mirrored = [detect(map(mirror, copy)) for detect, copy in zip(detectors, copies[num:], strict=True)]
        for width, *results in zip(widths, *upright, *mirrored, strict=True):
            if too_large := [result for result in results if isinstance(result, TooLarge)]:
                yield too_large[0]
                continue
            fused = fuse(results[:num] + [_mirror(result, width) for result in results[num:]])
            yield fused.keep(fused.scores > threshold)

    return detect_all


def share(items: Iterable, num: int) -> list[Iterator]:
    """`num` iterators over the same items.

    An item is freed as soon as all iterators have passed it. `itertools.tee` would keep up to 57 more items, which may be large
    images.
    """
    source, queues = iter(items), [deque() for _ in range(num)]

    def read(queue: deque) -> Iterator:
        while True:
            if not queue:
                try:
                    item = next(source)
                except StopIteration:
                    return
                for other in queues:
                    other.append(item)
                del item
            yield queue.popleft()

    return [read(queue) for queue in queues]


def _mirror(found: Detections, width: int) -> Detections:
    return found._replace(boxes=found.boxes[:, [2, 1, 0, 3]] * (-1, 1, -1, 1) + (width, 0, width, 0))


def fuse(results: Sequence[Detections]) -> Detections:
    """Weighted boxes fusion (arXiv:1910.13302) of the detections in several views of one image. Each view has one vote.

    A box joins an object of its class if its IoU with the fused box of the object is above 0.55. The fused box is the mean of the
    object's boxes, weighted by score. Two boxes of the same view are never joined. The fused score is the sum over views divided
    by the number of views: an object found by half of the views with score 0.8 has score 0.4.
    """
    boxes, scores, labels = (
        np.concatenate([getattr(result, name) for result in results]) for name in ("boxes", "scores", "labels")
    )
    view = np.repeat(np.arange(len(results)), [len(result.scores) for result in results])
    fused, classes = np.empty_like(boxes), np.empty_like(labels)  # (N, 4), (N,); the first `count` rows are used
    sums, voted = np.zeros(len(boxes)), np.zeros((len(boxes), len(results)), dtype=bool)
    count = 0
    for index in np.argsort(-scores, kind="stable"):
        same = overlap(boxes[index], fused[:count])
        same[(classes[:count] != labels[index]) | voted[:count, view[index]]] = 0
        place = int(same.argmax()) if count and same.max() > _SAME else count
        if place == count:
            fused[place], classes[place] = boxes[index], labels[index]
            count += 1
        weight = scores[index] / max(sums[place] + scores[index], 1e-12)
        fused[place] += weight * (boxes[index] - fused[place])
        sums[place] += scores[index]
        voted[place, view[index]] = True
    return Detections.sorted(fused[:count], sums[:count] / len(results), classes[:count])
