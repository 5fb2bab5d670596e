"""Order of training tiles: random, but tiles of an image follow each other closely, so that it is decoded once for many of them."""

from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from ..data.rows import CocoData
from ..data.tiled_data import KEPT_PIXELS, image_rows, tiled_images
from .class_balance import RepeatFactorSampler, sampling_factors

# Tiles of one image that follow each other. An image with more tiles is read again, so that a large image does not fill many steps.
_MOST_IN_A_ROW = 64


class TileSampler(RepeatFactorSampler):
    """Indices of training tiles, in an order that reads large images seldom.

    An epoch draws its tiles as `RepeatFactorSampler` does. They are grouped by image, up to 64 tiles together, and the groups are
    shuffled. Groups whose images fit into the memory of a process together (`KEPT_PIXELS`, at least one image) are mixed. So the
    order is fully random if all images fit. It depends only on the factors, the images, the seed and the epoch.

    Args:
        factors: (N,) how often an epoch draws each row on average, from `sampling_factors`.
        images: (N,) number of the image of each row.
        pixels: (N,) pixels that stay in memory after a row was read: those of the whole image, or 0 if it is not cut.
        seed: random seed.
    """

    def __init__(self, factors: np.ndarray, images: np.ndarray, pixels: np.ndarray, seed: int = 0):
        super().__init__(factors, seed)
        self.images, self.pixels = np.asarray(images), np.asarray(pixels)

    def __iter__(self) -> Iterator[int]:
        random = self.random_numbers()
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        num_drawn: dict[int, int] = defaultdict(int)
        for index in self.draw(random).tolist():
            image = int(self.images[index])
            groups[image, num_drawn[image] // _MOST_IN_A_ROW].append(index)
            num_drawn[image] += 1
        members = list(groups.values())
        mixed: list[int] = []
        seen: dict[int, int] = {}  # images of the mixed groups, and their pixels
        for place in random.permutation(len(members)).tolist():
            first = members[place][0]
            image, pixels = int(self.images[first]), int(self.pixels[first])
            if mixed and image not in seen and sum(seen.values()) + pixels > KEPT_PIXELS:
                yield from random.permutation(mixed).tolist()
                mixed, seen = [], {}
            mixed += members[place]
            seen[image] = pixels
        yield from random.permutation(mixed).tolist()


def make_sampler(data: CocoData, threshold: float | None, seed: int) -> RepeatFactorSampler | None:
    """The sampler of training data. None: the sampler of `Trainer`."""
    factors, images = sampling_factors(data, threshold), tiled_images(data)
    if factors is None or images is None:
        return None if factors is None else RepeatFactorSampler(factors, seed)
    rows = image_rows(data)
    is_cut = (images.sizes > np.array(images.tiling.size)).any(1)
    return TileSampler(factors, rows, np.where(is_cut, images.sizes.prod(1), 0)[rows], seed)
