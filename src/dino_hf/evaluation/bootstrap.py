"""Bootstrap intervals of AP: they show how AP varies between sets of images.

Images are resampled with replacement, and AP is computed from the stored matches. This is the percentile bootstrap (Efron and
Tibshirani, 1993, chapter 13), corrected for its bias, see `centre`. If an image is drawn twice, its objects and detections count
twice. Matches stay the same, because matching is within an image.
"""

from collections.abc import Callable, Sequence

import numpy as np

from ..common.text import size_text
from .matching import IOU_THRESHOLDS, RECALLS, SIZES, ClassMatches

# The numbers that are resampled for each class. Their means over classes have the same names.
STATISTICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
LEVEL = 0.95
MAX_RESAMPLES = 10_000
_MAX_BYTES = 2**31  # memory of all resamples
_MIN_RESAMPLES = 40  # with 40, one lies below the middle 95 % and one above
MIN_IMAGES = 2  # images with objects that an interval needs: a single image is the same in each resample
_MAX_ELEMENTS = 2**22  # numbers in an array (resamples, detections), so that temporary arrays take tens of megabytes
AP75_INDEX = int(np.argmin(np.abs(IOU_THRESHOLDS - 0.75)))


def check_num_bootstrap(num_bootstrap: int) -> None:
    """Raises ValueError if the number of resamples is too low or too high for intervals."""
    if num_bootstrap != 0 and num_bootstrap < _MIN_RESAMPLES:
        raise ValueError(
            f"num_bootstrap={num_bootstrap} is too low for 95 % intervals; choose 1000, at least {_MIN_RESAMPLES}, or 0 for none."
        )
    if num_bootstrap > MAX_RESAMPLES:
        raise ValueError(
            f"num_bootstrap={num_bootstrap} is above {MAX_RESAMPLES}. More resamples change an interval by less than a hundredth "
            "of its width; use 1000."
        )


def check_memory(num_bootstrap: int, num_images: int, num_classes: int) -> None:
    """Raises ValueError if the resamples need more than 2 GiB."""
    per_resample = 4 * num_images + 8 * num_classes * len(STATISTICS)
    if num_bootstrap * per_resample > _MAX_BYTES:
        fit = max(_MIN_RESAMPLES, _MAX_BYTES // per_resample // 100 * 100)
        raise ValueError(
            f"{num_bootstrap} resamples of {num_images} images and {num_classes} classes need "
            f"{size_text(num_bootstrap * per_resample)}; choose num_bootstrap {fit}, or 0 for no intervals."
        )


def draw_images(num_images: int, num_bootstrap: int, seed: int) -> np.ndarray:
    """(B, I) int32: the number of times each image is in each resample. Equal arguments give equal results."""
    rng = np.random.default_rng(seed)
    weights = np.zeros((num_bootstrap, num_images), dtype=np.int32)
    for row in weights:
        row += np.bincount(rng.integers(num_images, size=num_images), minlength=num_images).astype(np.int32)
    return weights


def resample(
    matches: Sequence[ClassMatches], weights: np.ndarray, progress: Callable[[int, int], None] | None = None
) -> np.ndarray:
    """Compute the AP of each class in each resample.

    Args:
        weights: (B, I) number of times each image counts.
        progress: called with the number of classes done, and the total.
    Returns:
        (B, K, 6) the `STATISTICS`, in [0, 1]; NaN if a resample has no object of the class.
    """
    samples = np.full((len(weights), len(matches), len(STATISTICS)), np.nan)
    for index, of_class in enumerate(matches):
        step = max(1, _MAX_ELEMENTS // max(1, len(of_class.scores)))
        for start in range(0, len(weights), step):
            part = slice(start, start + step)
            samples[part, index] = _class_statistics(of_class, weights[part])
        if progress is not None:
            progress(index + 1, len(matches))
    return samples


def _class_statistics(matches: ClassMatches, weights: np.ndarray) -> np.ndarray:
    """(B, 6) The `STATISTICS` of one class in each resample."""
    by_threshold = precision_at_recalls(matches, weights, 0).mean(axis=2)  # (B, T)
    columns = [by_threshold.mean(axis=1), by_threshold[:, 0], by_threshold[:, AP75_INDEX]]
    columns += [precision_at_recalls(matches, weights, area).mean(axis=(1, 2)) for area in range(1, len(SIZES))]
    return np.stack(columns, axis=1)


def precision_at_recalls(matches: ClassMatches, weights: np.ndarray, area: int) -> np.ndarray:
    """The `precision` of pycocotools for one class and one range of sizes. With weights of 1, it is equal bit by bit.

    Only true positives are visited: recall rises only at a true positive, and precision has its local maxima there.

    Args:
        weights: (B, I) number of times each image counts.
        area: index into `SIZES`.
    Returns:
        (B, T, R) in [0, 1], for the recalls 0, 0.01, ..., 1; NaN in a resample without objects.
    """
    num_objects = weights.take(matches.objects[area], axis=1).sum(axis=1)  # (B,)
    precision = np.zeros((len(weights), len(IOU_THRESHOLDS), len(RECALLS)))
    precision[num_objects == 0] = np.nan
    kept = np.flatnonzero(num_objects)
    if not kept.size:
        return precision
    weights, num_objects = weights[kept], num_objects[kept, None]
    last = max((hits.positions[-1] + 1 for hits in matches.hits[area] if len(hits.positions)), default=0)
    in_range = matches.in_range[area, :last]
    places = np.flatnonzero(in_range)
    num_before = np.cumsum(in_range)  # (last,) number of detections in range up to each place
    # One cumulative sum over all detections in range. Thresholds differ only in their hits, which correct it below.
    ranked = np.zeros((len(weights), len(places) + 1), dtype=np.int32)
    np.cumsum(weights.take(matches.images[places], axis=1), axis=1, out=ranked[:, 1:])
    for index, (positions, counted) in enumerate(matches.hits[area]):
        if not counted.any():
            continue
        own = weights.take(matches.images[positions], axis=1)  # (B, M)
        num_ranked = ranked.take(num_before[positions], axis=1)
        correction = counted.astype(np.int32) - in_range[positions]
        if correction.any():
            num_ranked += np.cumsum(own * correction, axis=1, dtype=np.int32)
        if not counted.all():
            own, num_ranked = own[:, counted], num_ranked[:, counted]
        num_true = np.cumsum(own, axis=1, dtype=np.int32)
        # The formula of pycocotools, which keeps a precision of 1 slightly below 1.
        values = num_true / (num_ranked + np.spacing(1))
        values = np.maximum.accumulate(values[:, ::-1], axis=1)[:, ::-1]
        # For each true positive, the number of recall levels that are reached there first.
        reached = np.searchsorted(RECALLS, num_true / num_objects, side="right")
        times = np.diff(reached, axis=1, prepend=0, append=len(RECALLS))
        values = np.concatenate([values, np.zeros((len(values), 1))], axis=1)
        precision[kept, index] = np.repeat(values.ravel(), times.ravel()).reshape(-1, len(RECALLS))
    return precision


def mean_over_classes(samples: np.ndarray) -> np.ndarray:
    """(B, K, 6) -> (B, 6). The mean over the classes that have objects, as in COCO; NaN if none has."""
    known = ~np.isnan(samples)
    return np.where(known, samples, 0).sum(axis=1) / np.where(known.any(axis=1), known.sum(axis=1), np.nan)


def centre(samples: np.ndarray, estimate: float) -> np.ndarray:
    """Drop samples without objects, and shift the others so that their mean is the estimate. (B,) -> (up to B,).

    With few objects, AP is biased upwards: its precision is a maximum over all higher recalls, and chance raises a maximum. A
    resample has fewer distinct objects than the data, so its AP is biased further upwards.
    """
    samples = samples[~np.isnan(samples)]
    return samples if not samples.size else samples + (estimate - samples.mean())


def num_images_of(matches: Sequence[ClassMatches]) -> list[int]:
    """For each of the `STATISTICS`, the number of images with objects that count for it."""
    counts = [len(np.unique(np.concatenate([match.objects[area] for match in matches]))) for area in range(len(SIZES))]
    return [counts[0]] * 3 + counts[1:]


def interval(samples: np.ndarray, estimate: float, lowest: float = 0.0) -> tuple[float, float]:
    """The middle 95 % of the samples after `centre`: the range to expect for AP on the same number of other images.

    Args:
        samples: (B,) with at least one sample that is not NaN.
        lowest: lowest possible value. The highest is 1.
    Returns:
        lower and upper bound, with the estimate between them.
    """
    samples = centre(samples, estimate)
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    # If the distribution is skewed, the mean can lie outside the middle 95 %.
    return max(lowest, min(float(low), estimate)), min(1.0, max(float(high), estimate))
