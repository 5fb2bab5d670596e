"""A user's own augmentation of training images: transforms of torchvision (v2), or a pipeline of Albumentations."""

import hashlib
import importlib
import importlib.util
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes, Image

from ..common.paths import expand_home
from ..common.text import first_line

_DEFAULT_NAME = "augmentation"  # name of the object in a Python file, if none is given
_SAVED = (".json", ".yaml", ".yml")  # files of `albumentations.save`


class OwnAugmentation:
    """Apply a user's pipeline to an image and its boxes, with random numbers that depend only on a seed.

    Args:
        pipeline: a transform of torchvision.transforms.v2, a transform or pipeline of Albumentations, or a function. Transforms of
            torchvision and functions get a dictionary of `image` (`tv_tensors.Image`, (3, h, w) uint8), `boxes`
            (`tv_tensors.BoundingBoxes`, (N, 4) xyxy in pixels) and `labels` (N,) int64, the indices of the boxes, and return it
            changed. Dropped boxes must be dropped from `labels` too, as `v2.SanitizeBoundingBoxes` does. A pipeline of
            Albumentations gets the image and its boxes; its own `bbox_params` are not used.
    Raises:
        ValueError: the pipeline is not of a known kind.
    """

    def __init__(self, pipeline: Any):
        self._compose = None
        self.name: str | None = None  # from which it was loaded
        if isinstance(pipeline, type) or not callable(pipeline):
            raise ValueError(
                f"The augmentation {pipeline!r:.100} must be an object: a transform of torchvision.transforms.v2, a pipeline of "
                "Albumentations, or a function."
            )
        self.pipeline = pipeline
        if type(pipeline).__module__.partition(".")[0] == "albumentations" or _is_albumentations(pipeline):
            self._compose = _compose(pipeline)

    def __reduce__(self):
        # A new process of a DataLoader may not know the module of the user's file.
        return (OwnAugmentation, (self.pipeline,)) if self.name is None else (load_own_augmentation, (self.name,))

    def __repr__(self) -> str:
        return f"OwnAugmentation({self.pipeline!r:.200})"

    def __call__(self, pixels: Tensor, boxes: Tensor, seed: int) -> tuple[Tensor, Tensor, list[int]]:
        """Augment an image. The caller's random generators are not used.

        Args:
            pixels: (3, h, w) uint8.
            boxes: (N, 4) float64, corners inside the image in pixels, with a width and a height above 0.
            seed: of the random generators of Python, NumPy, torch's CPU and Albumentations.
        Returns:
            pixels (3, h', w') uint8; boxes (M, 4) float64; and for each of them its index in the given boxes.
        Raises:
            ValueError: the pipeline returns another kind of image, or numbers of boxes and labels that differ.
        """
        with _seeded_generators(seed):
            apply = self._by_torchvision if self._compose is None else self._by_albumentations
            try:
                pixels, boxes, index = apply(pixels, boxes, seed)
            except Exception as error:  # the user's code may raise anything
                raise ValueError(f"The augmentation failed: {type(error).__name__}: {first_line(error)}") from error
        if not isinstance(pixels, Tensor) or pixels.dtype != torch.uint8 or pixels.ndim != 3 or len(pixels) != 3:
            found = f"{tuple(pixels.shape)} {pixels.dtype}" if isinstance(pixels, Tensor) else type(pixels).__name__
            raise ValueError(
                f"The augmentation returns an image of {found}, but it must be (3, height, width) uint8. Leave out ToDtype and "
                "Normalize: the image processor does this afterwards."
            )
        if len(boxes) != len(index):
            raise ValueError(
                f"The augmentation returns {len(boxes)} boxes and {len(index)} labels. A transform that drops boxes must drop "
                "their labels too."
            )
        return pixels.as_subclass(Tensor), boxes, index

    def _by_torchvision(self, pixels: Tensor, boxes: Tensor, seed: int) -> tuple[Tensor, Tensor, list[int]]:
        given = {
            "image": Image(pixels),
            "boxes": BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(pixels.shape[-2:])),
            "labels": torch.arange(len(boxes)),
        }
        found = self.pipeline(given)
        if not isinstance(found, dict) or not given.keys() <= found.keys():
            raise ValueError(
                "The augmentation must return the dictionary that it gets, with image, boxes and labels, but it returns "
                f"{type(found).__name__}."
            )
        after = found["boxes"]
        if isinstance(after, BoundingBoxes):
            after = v2.functional.convert_bounding_box_format(after, new_format="XYXY")
        return found["image"], torch.as_tensor(after).as_subclass(Tensor).double(), found["labels"].tolist()

    def _by_albumentations(self, pixels: Tensor, boxes: Tensor, seed: int) -> tuple[Tensor, Tensor, list[int]]:
        self._compose.set_random_seed(seed % 2**32)
        found = self._compose(
            image=np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()),
            bboxes=boxes.numpy().reshape(-1, 4),
            labels=np.arange(len(boxes)),
        )
        image = found["image"]
        if isinstance(image, np.ndarray):
            image = torch.from_numpy(np.ascontiguousarray(image))
            image = image.permute(2, 0, 1) if image.ndim == 3 else image
        after = torch.as_tensor(np.asarray(found["bboxes"], dtype=np.float64).reshape(-1, 4))
        return image, after, [int(index) for index in found["labels"]]


def load_own_augmentation(name: str) -> OwnAugmentation:
    """Load the augmentation that a user names. Its code is run, so names must come from the user, never from a checkpoint.

    Args:
        name: "file.py:object" or "package.module:object", where the object is as in `OwnAugmentation`, or a file that
            `albumentations.save` wrote. In a Python file, the object is called `augmentation` if none is named.
    Raises:
        ValueError, ImportError: nothing can be loaded. The message is one sentence.
    """
    own = OwnAugmentation(_load_pipeline(name))
    own.name = name
    return own


def _load_pipeline(name: str) -> Any:
    place, attribute = split_name(name)
    path = expand_home(place)
    if path.suffix in _SAVED:
        return _read_saved(path, name)
    try:
        module = _module_of_file(path) if path.suffix == ".py" else _module(place)
    except Exception as error:  # the user's code may raise anything
        raise ValueError(
            f"The augmentation {name} cannot be loaded: {type(error).__name__}: {first_line(error)}"
        ) from error
    if not hasattr(module, attribute):
        raise ValueError(
            f"{place} has no object {attribute!r}; name the augmentation as {place}:NAME, after the name of its variable."
        )
    return getattr(module, attribute)


def augmentation_digest(name: str) -> str | None:
    """A digest of the file of `load_own_augmentation`, so that a resumed run notices changes. None: it is a module."""
    path = expand_home(split_name(name)[0])
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest() if path.is_file() else None


def split_name(name: str) -> tuple[str, str]:
    """The file or module, and the name of the object. A drive letter of Windows is part of the file."""
    place, _, attribute = name.rpartition(":")
    return (place, attribute) if attribute.isidentifier() and len(place) > 1 else (name, _DEFAULT_NAME)


def _module_of_file(path: Path):
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    digest = hashlib.blake2b(str(path.resolve()).encode(), digest_size=8).hexdigest()
    module_name = f"_dino_hf_augmentation_{digest}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # objects of the file can then be pickled
    spec.loader.exec_module(module)
    return module


def _module(name: str):
    sys.path.insert(0, "")  # the current folder, as with `python -m`
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove("")


def _import_albumentations():
    try:
        import albumentations
    except ImportError as error:
        raise ImportError(
            f"This augmentation needs Albumentations, which is not installed: pip install albumentations. ({error})"
        ) from error
    return albumentations


def _read_saved(path: Path, name: str) -> Any:
    albumentations = _import_albumentations()
    try:
        return albumentations.load(path, data_format="json" if path.suffix == ".json" else "yaml")
    except Exception as error:  # also for damaged files
        raise ValueError(
            f"The augmentation {name} cannot be loaded: {type(error).__name__}: {first_line(error)}"
        ) from error


def _is_albumentations(pipeline: Any) -> bool:
    """Whether a class of Albumentations is among the bases. It is not imported, because it is optional."""
    return any(base.__module__.partition(".")[0] == "albumentations" for base in type(pipeline).__mro__)


def _compose(pipeline: Any) -> Callable:
    """A pipeline of Albumentations that takes boxes as corners in pixels, and their labels."""
    albumentations = _import_albumentations()
    if not hasattr(albumentations.Compose, "set_random_seed"):
        raise ImportError(
            f"albumentations {albumentations.__version__} has no seeds for a pipeline; install 2.0 or newer."
        )
    is_whole = type(pipeline) is albumentations.Compose
    return albumentations.Compose(
        list(pipeline.transforms) if is_whole else [pipeline],
        p=pipeline.p if is_whole else 1.0,
        bbox_params=albumentations.BboxParams(format="pascal_voc", label_fields=["labels"]),
    )


@contextmanager
def _seeded_generators(seed: int) -> Iterator[None]:
    """Seed the generators of Python, NumPy and torch's CPU inside the context, and restore them afterwards."""
    before, before_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        random.setstate(before)
        np.random.set_state(before_numpy)
