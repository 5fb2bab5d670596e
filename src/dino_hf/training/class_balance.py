"""Rare classes in training: images repeated by repeat-factor sampling, and weights of classes in the loss."""

import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..common.text import list_some
from ..common.values import is_number, short_repr
from ..data.rows import CocoData, box_columns
from ..data.tiled_data import drawing_factors
from .augmentation import mix_seeds

BALANCED = "balanced"
_LARGEST_WEIGHT = 10.0  # of balanced weights: a class with a single box would get more than a hundred
_LISTED = 8  # class names in an error
_SHOWN = 12  # class weights in a table


class RepeatFactorSampler(Sampler[int]):
    """Indices of training images. Images with rare classes are repeated (LVIS, arXiv:1908.03195, app. B).

    Each epoch has image i floor(r_i) or ceil(r_i) times, on average r_i times. The order is random. One random number per epoch
    rounds the factors of all images (systematic sampling). So every epoch has the same length, and the steps of a run are known.
    The sum of the factors is rounded up, so a random image may be added.

    The indices depend only on factors, seed and epoch. All processes draw the same indices, and accelerate or a distributed batch
    sampler divides them. An epoch can be drawn again, so training can resume in the middle of it. Call `set_epoch` at the start of
    each epoch, as with torch's `DistributedSampler`; accelerate does so.

    Args:
        factors: (I,) repeat factor of each image, at least 0, from `repeat_factors`.
        seed: random seed.
    Raises:
        ValueError: there are no factors, or one is negative or not finite.
    """

    def __init__(self, factors: np.ndarray | Tensor | list[float], seed: int = 0):
        self.factors = np.asarray(factors, dtype=np.float64)
        if self.factors.ndim != 1 or not np.isfinite(self.factors).all() or (self.factors < 0).any():
            raise ValueError("factors must be one finite number of at least 0 for each image, as from repeat_factors.")
        if not self.factors.sum():
            raise ValueError("factors must have a sum above 0; otherwise an epoch has no images.")
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the indices."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        """Number of images in an epoch."""
        return epoch_length(self.factors)

    def random_numbers(self) -> np.random.Generator:
        """The generator of this epoch."""
        return np.random.default_rng(mix_seeds((self.seed, self.epoch)))

    def draw(self, random: np.random.Generator) -> np.ndarray:
        """Indices of this epoch in random order."""
        order = random.permutation(
            len(self.factors)
        )  # otherwise, whether neighbours are repeated would depend on each other
        ends = np.cumsum(self.factors[order])
        # Each image has a part of the line from 0 to the sum. It is drawn once for each point in its part.
        points = random.random() + np.arange(len(self))
        drawn = np.searchsorted(ends, points, side="right")
        drawn[drawn == len(order)] = random.integers(len(order))  # a point beyond the parts of all images
        return order[random.permutation(drawn)]

    def __iter__(self) -> Iterator[int]:
        yield from self.draw(self.random_numbers()).tolist()


def epoch_length(factors: np.ndarray) -> int:
    """Number of images in an epoch of `RepeatFactorSampler`."""
    return math.ceil(factors.sum() - 1e-6)  # sums of floats may be slightly above a whole number


def repeat_factors(data: CocoData, threshold: float) -> np.ndarray:
    """Repeat factor of each image: the largest of its classes, max(1, sqrt(threshold / share of images with the class)).

    Crowd regions do not count. An image without boxes has the factor 1.

    Args:
        data: training data, from `load_coco` or `load_data`.
        threshold: classes in a smaller share of the images are repeated, in (0, 1]. LVIS uses 0.001.
    Returns:
        (I,)
    Raises:
        ValueError: the threshold is invalid, or the data are a stream, whose classes cannot be counted beforehand.
    """
    factors = np.ones(_num_images(data))
    _, is_crowd, image = box_columns(data)
    np.maximum.at(factors, image[~is_crowd], class_repeat_factors(data, threshold)[_classes(data)])
    return factors


def class_repeat_factors(data: CocoData, threshold: float) -> np.ndarray:
    """Repeat factor of each class, (K,). A class without images has the factor 1. See `repeat_factors`."""
    if not is_number(threshold) or not 0 < threshold <= 1:
        raise ValueError(
            f"threshold={short_repr(threshold)} must be a share of the training images in (0, 1], such as 0.05: classes in fewer "
            "images are repeated."
        )
    share = images_of_classes(data, np.ones(_num_images(data))) / _num_images(data)
    return np.sqrt(threshold / np.where(share > 0, share, 1.0)).clip(min=1.0)


def images_of_classes(data: CocoData, factors: np.ndarray) -> np.ndarray:
    """Number of images with each class, (K,). Image i counts `factors[i]` times."""
    _, is_crowd, image = box_columns(data)
    pairs = np.unique(np.stack([_classes(data), image[~is_crowd]]), axis=1)  # (2, P)
    return np.bincount(pairs[0], factors[pairs[1]], minlength=len(data.id2label))


def sampling_factors(data: CocoData, threshold: float | None) -> np.ndarray | None:
    """(N,) how often an epoch draws each row on average. None: each row once, in random order.

    Args:
        threshold: `repeat_threshold` of the recipe. Tiles with rare classes are repeated; tiles without boxes are drawn less often.
    """
    drawn = drawing_factors(data)
    if threshold is None:
        return drawn
    factors = repeat_factors(data, threshold)
    return factors if drawn is None else factors * drawn


def images_per_epoch(data: CocoData, threshold: float | None) -> int:
    """Number of images in an epoch, see `sampling_factors`."""
    factors = sampling_factors(data, threshold)
    return _num_images(data) if factors is None else epoch_length(factors)


def class_weights(data: CocoData, weights: str | Mapping[str, float]) -> Tensor:
    """Weight of each class in the class loss, for `DinoDetrLoss`.

    Args:
        data: training data.
        weights: "balanced": 1 / sqrt(number of boxes), scaled so that the mean over all training boxes is 1, and at most 10; a
            class without boxes has the weight 1. Or weights by class name; classes that are not named have the weight 1.
    Returns:
        (K,) float32
    Raises:
        ValueError: unknown weights or class names, or the data are a stream.
    """
    check_class_weights(weights)
    names = list(data.id2label.values())
    if isinstance(weights, str):
        _num_images(data)
        counts = np.bincount(_classes(data), minlength=len(names))
        balanced = 1 / np.sqrt(counts.clip(min=1))
        balanced *= counts.sum() / max((counts * balanced).sum(), 1e-9)
        return torch.tensor(np.where(counts > 0, balanced.clip(max=_LARGEST_WEIGHT), 1.0), dtype=torch.float32)
    for name in weights:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {list_some(names, _LISTED)}."
            raise ValueError(f"class_weights: the training data have no class {short_repr(name)}; {hint}")
    return torch.tensor([float(weights.get(name, 1.0)) for name in names])


def weights_text(data: CocoData, weights: str | Mapping[str, float]) -> str:
    """The classes and their weights, largest first: "bus 3.2, person 0.8"."""
    values = class_weights(data, weights).tolist()
    pairs = sorted(zip(data.id2label.values(), values, strict=True), key=lambda pair: -pair[1])
    return list_some([f"{name} {weight:.3g}" for name, weight in pairs], _SHOWN)


def check_class_weights(weights: Any) -> None:
    """Check the form of class weights.

    Raises:
        ValueError: they are neither "balanced" nor a dictionary of class names and positive numbers.
    """
    if isinstance(weights, str) and weights == BALANCED:
        return
    if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights):
        raise ValueError(
            f'class_weights={short_repr(weights)} must be "{BALANCED}", or weights by class name, such as {{"bus": 3.0}}.'
        )
    for name, weight in weights.items():
        if not is_number(weight) or weight <= 0:
            raise ValueError(f"class_weights: the weight {short_repr(weight)} of {short_repr(name)} must be above 0.")


def _classes(data: CocoData) -> np.ndarray:
    """Class of each box that is not a crowd, (N,)."""
    categories, is_crowd, _ = box_columns(data)
    return categories[~is_crowd]


def _num_images(data: CocoData) -> int:
    if not hasattr(data.dataset, "__len__"):
        raise ValueError(
            "The training data are a stream, so their classes cannot be counted before training. Load them with load_data, which "
            "writes them to the disk."
        )
    return len(data.dataset)
