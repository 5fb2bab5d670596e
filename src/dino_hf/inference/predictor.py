"""`Predictor`: run any detector of transformers on images of any size, and get detections in pixels."""

import copy
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import SizeDict

from ..common.free_memory import is_lack_of_memory
from ..common.images import to_rgb
from ..model.configuration_dino_detr import DinoDetrConfig
from ..model.nms import read_nms, with_candidates
from .ahead import map_ahead
from .loading import load_detector, load_image_processor, read_device, read_dtype
from .score_thresholds import ScoreThresholds, check_threshold, score_thresholds

TOP_K = 300  # as in the paper; COCO evaluates 100 detections in an image
_WINDOW = 8  # number of batches of images that may wait for other images of the same shape
_WINDOW_BYTES = 2**29  # bytes of waiting images, original and resized
_AHEAD_BYTES = 2**28  # bytes of images that threads resize at the same time


class Detections(NamedTuple):
    """Detections in one image, highest score first."""

    boxes: np.ndarray  # (N, 4) float64 (x0, y0, x1, y1) in pixels of the original image; boxes may extend beyond it
    scores: np.ndarray  # (N,) float64 in [0, 1]
    labels: np.ndarray  # (N,) int64 class index of the model
    queries: np.ndarray | None = None  # (N,) int64 index of the query of each detection; None: not requested
    class_scores: np.ndarray | None = None  # (N, K) float32 scores of all classes, in [0, 1]; None: not requested

    @classmethod
    def sorted(cls, boxes, scores, labels) -> "Detections":
        """Detections from arrays or lists in any order. Equal scores keep their order."""
        scores = np.asarray(scores, dtype=np.float64).reshape(-1)
        order = np.argsort(-scores, kind="stable")
        boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
        return cls(boxes[order], scores[order], np.asarray(labels, dtype=np.int64).reshape(-1)[order])

    def keep(self, mask: np.ndarray) -> "Detections":
        """Select detections by a mask, (N,) bool, or by indices, (M,)."""
        return Detections(*(None if values is None else values[mask] for values in self))

    def rows(self) -> list[tuple[list[float], float, int]]:
        """Box, score and label of each detection, as Python numbers."""
        return list(zip(self.boxes.tolist(), self.scores.tolist(), self.labels.tolist(), strict=True))

    def __repr__(self) -> str:
        best = f", scores {self.scores[-1]:.3f} to {self.scores[0]:.3f}" if len(self.scores) else ""
        return f"Detections({len(self.scores)}{best})"


class TooLarge(NamedTuple):
    """Placeholder for an image that does not fit into memory, or for its detections."""

    reason: str  # one sentence
    width: int = 0
    height: int = 0


class DoesNotFit(ValueError):
    """An image does not fit into memory. The message is one sentence."""


class _Prepared(NamedTuple):
    pixel_values: Tensor  # (3, h, w)
    pixel_mask: Tensor | None  # (h, w)
    size: tuple[int, int]  # (height, width) of the image


class Predictor:
    """A detector with its image processor, on a device.

    The detections in an image do not depend on the other images of its batch, except for rounding. A batch holds images of one
    shape, so images are not padded: padding would change the features near the border.

    Args:
        model: folder, name of a published checkpoint, Hub id, or a detector. The detector is put into evaluation mode.
        image_processor: None: the image processor saved beside the model.
        device: "cuda", "cuda:1", "mps", "cpu", ... None: the device of a given model; else CUDA or Apple's GPU if available.
        dtype: "float32", "bfloat16", "float16" or a torch dtype. None: the dtype of a given model, or float32.
    Raises:
        FileNotFoundError, ValueError: the model does not exist, is not a detector, or its files are damaged or incomplete; or
            the device cannot be used.
    """

    _takes_limit = False  # whether the image processor takes a limit of detections
    _num_queries = 0  # number of queries of a DINO model

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        image_processor=None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ):
        dtype = read_dtype(dtype)
        self._folder = None  # folder of the weights
        if isinstance(model, PreTrainedModel):
            source = model.name_or_path
            device = model.device if device is None else read_device(device)
            if image_processor is None:
                if not source:
                    raise ValueError(
                        f"This {type(model).__name__} was not loaded from a folder or the Hub, so its image processor is unknown; "
                        "pass image_processor."
                    )
                image_processor = load_image_processor(source)
        else:
            device = read_device(device)
            source, model = str(model), load_detector(model, dtype or torch.float32)
            self._folder = source
            image_processor = load_image_processor(source) if image_processor is None else image_processor
        self.model = model.to(device=device, dtype=dtype or model.dtype).eval()
        self.name = source or type(model).__name__
        self.image_processor = image_processor
        self.id2label: dict[int, str] = dict(model.config.id2label)
        self.category_ids: list[int] | None = getattr(model.config, "category_ids", None)
        # Compare names, not classes: a model that was loaded with the code of its repository has other classes.
        self._is_ours = model.config.model_type == DinoDetrConfig.model_type
        self._takes_mask = "pixel_mask" in inspect.signature(model.forward).parameters
        postprocess = inspect.signature(image_processor.post_process_object_detection).parameters
        self._size = dict(image_processor.size)
        self._scaled_size: dict[str, int] = {}
        self._model_type = model.config.model_type
        self._num_queries: int = getattr(model.config, "num_queries", None) or 0
        self._takes_limit = "top_k" in postprocess
        self._window_bytes, self._ahead_bytes = _WINDOW_BYTES, _AHEAD_BYTES

    def __repr__(self) -> str:
        dtype = str(self.model.dtype).removeprefix("torch.")
        return f"Predictor({self.name!r}, {len(self.id2label)} classes, {dtype} on {self.device})"

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def thresholds(self) -> ScoreThresholds:
        """The score thresholds of the model. `predict` uses them by default; a call of the predictor does not."""
        return score_thresholds(self.model.config, self._folder)

    @property
    def can_scale(self) -> bool:
        """Whether the image processor keeps the aspect ratio of images, so the model can be used at several sizes."""
        return self._size.get("shortest_edge") is not None

    def at_scale(self, scale: float, num_others: int = 0) -> "Predictor":
        """A predictor that resizes images to `scale` times the size of the image processor. It needs `can_scale`.

        Args:
            num_others: number of other predictors that run at the same time and share the memory for waiting images.
        """
        scaled = copy.copy(self)
        scaled._window_bytes //= 1 + num_others
        scaled._ahead_bytes //= 1 + num_others
        scaled._scaled_size = {
            name: max(1, round(scale * side)) for name, side in self._size.items() if side is not None
        }
        if getattr(self.image_processor, "canvas_side", None):  # boxes are relative to the canvas of this scale
            scaled.image_processor = copy.copy(self.image_processor)
            scaled.image_processor.size = SizeDict(**scaled._scaled_size)
        return scaled

    def refuses(self, image: Image.Image) -> str | None:
        """The reason why an image cannot be used, or None. Processors of other models may round a short side to zero."""
        if self._is_ours or not self.can_scale:
            return None
        sides = get_size_with_aspect_ratio(
            (image.height, image.width), self._size["shortest_edge"], self._size.get("longest_edge")
        )
        if min(sides) > 0:
            return None
        return (
            f"It is {image.width} x {image.height} pixels: resized for the model, its shorter side would have no pixel."
        )

    def __call__(
        self,
        images: Iterable[Image.Image | TooLarge],
        *,
        batch_size: int = 8,
        threshold: float = 0.0,
        max_detections: int | None = None,
        all_scores: bool = False,
        skip_too_large: bool = False,
    ) -> Iterator[Detections | TooLarge]:
        """Yield the detections of each image, in the order of `images`. Images are read when they are needed.

        An image waits until `batch_size` images have its shape, `8 * batch_size` images wait, or all waiting images take half a
        GiB.

        Args:
            images: images of any mode. Their EXIF orientation is not applied.
            threshold: detections with a score of at most this, in [0, 1], are left out.
            max_detections: limit for one image; the highest scores are kept. None: 300, or the number of queries if that is higher.
                Image processors of other detectors have their own limits. With non-maximum suppression, the default is the
                number of its candidates, and a limit above 300 raises that number.
            all_scores: also return the query and all class scores of each detection. For DINO detectors only.
            skip_too_large: yield a `TooLarge` for an image that does not fit into memory, instead of raising `DoesNotFit`.
        Raises:
            DoesNotFit: there is not enough memory for an image.
            ValueError: a setting is out of range; an image cannot be used (see `refuses`); scores are not finite.
            OSError: it is unknown which value of an image is white.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        check_threshold(threshold)
        check_max_detections(max_detections)
        if all_scores and not self._is_ours:
            raise ValueError(
                f"all_scores is for DINO detectors; {self.name} is a {self._model_type}, and its image processor does "
                "not return the query of a detection."
            )
        settings = _Settings({"threshold": threshold, **self._limits(max_detections)}, all_scores)
        found = self._stream(images, batch_size, settings)
        return found if skip_too_large else _raise_too_large(found)

    def limit(self, max_detections: int | None) -> int | None:
        """Limit of detections in an image. None: the image processor decides."""
        if not self._takes_limit:
            return None
        nms = read_nms(getattr(self.image_processor, "nms", None))
        return max_detections or (nms and nms.candidates) or max(TOP_K, self._num_queries)

    def _limits(self, max_detections: int | None) -> dict:
        """Arguments of post-processing that limit the number of detections."""
        limits = {"top_k": self.limit(max_detections)} if self._takes_limit else {}
        nms = with_candidates(getattr(self.image_processor, "nms", None), max_detections or 0, self._num_queries)
        return limits if nms is None else {**limits, "nms": nms}

    def _stream(
        self, images: Iterable[Image.Image | TooLarge], batch_size: int, settings: "_Settings"
    ) -> Iterator[Detections | TooLarge]:
        waiting: dict[tuple, list[int]] = {}  # shape -> numbers of images
        prepared: dict[int, _Prepared] = {}
        done: dict[int, Detections | TooLarge] = {}
        sizes: dict[int, int] = {}  # bytes of each image without returned detections
        next_number = 0

        def run(shape: tuple) -> None:
            numbers = waiting.pop(shape)
            found = self._detect([prepared.pop(number) for number in numbers], settings)
            done.update(zip(numbers, found, strict=True))

        def is_full() -> bool:
            return len(sizes) >= _WINDOW * batch_size or sum(sizes.values()) > self._window_bytes

        loaded = map(partial(try_on_image, _loaded), images)  # a generator expression would keep the last image
        ahead = map_ahead(partial(try_on_image, self._prepare), loaded, cost=num_bytes, budget=self._ahead_bytes)
        counter = itertools.count()
        for image, prepared_image in ahead:  # enumerate would keep the image while the next one is loaded
            number = next(counter)
            if isinstance(prepared_image, TooLarge):
                done[number], sizes[number] = prepared_image, 0
                del image
            else:
                prepared[number], shape = prepared_image, tuple(prepared_image.pixel_values.shape)
                sizes[number] = num_bytes(image) + prepared_image.pixel_values.nbytes
                del image, prepared_image
                waiting.setdefault(shape, []).append(number)
                if len(waiting[shape]) == batch_size:
                    run(shape)
            while next_number in done or (is_full() and next_number in sizes):
                if next_number not in done:
                    run(next(shape for shape, numbers in waiting.items() if numbers[0] == next_number))
                yield done.pop(next_number)
                del sizes[next_number]
                next_number += 1
        for shape in list(waiting):
            run(shape)
        yield from (done[number] for number in sorted(done))

    def _prepare(self, image: Image.Image) -> _Prepared:
        """Prepare one image alone, so its pixels do not depend on other images."""
        if reason := self.refuses(image):
            raise ValueError(f"An image cannot be used. {reason}")
        if image.mode != "RGB":
            image = to_rgb(image)
        settings = {"size": self._scaled_size} if self._scaled_size else {}
        inputs = self.image_processor(images=[image], return_tensors="pt", **settings)
        pixels, mask = inputs["pixel_values"][0], inputs.get("pixel_mask")
        mask = None if mask is None or not self._takes_mask else mask[0]
        return _Prepared(pixels, mask, (image.height, image.width))

    @torch.inference_mode()
    def _detect(self, images: list[_Prepared], settings: "_Settings") -> list[Detections | TooLarge]:
        inputs = {
            "pixel_values": torch.stack([image.pixel_values for image in images]).to(self.device, self.model.dtype)
        }
        if images[0].pixel_mask is not None:
            mask = torch.stack([image.pixel_mask for image in images])
            # Without a mask, our detector skips the work for padding. It checks for an all-ones mask only on a CPU.
            if not (self._is_ours and mask.all()):
                inputs["pixel_mask"] = mask.to(self.device)
        try:
            outputs = self.model(**inputs)
        except (RuntimeError, MemoryError) as error:
            if not is_lack_of_memory(error):
                raise
            outputs = None  # retry outside of the handler, because it keeps the tensors of this attempt alive
        if outputs is None:
            if len(images) == 1:
                height, width = images[0].pixel_values.shape[-2:]
                on_cpu = "" if self.device.type == "cpu" else 'device="cpu", '
                reason = (
                    f"A single image, resized to {width} x {height}, does not fit into the memory of {self.device}; use "
                    f'{on_cpu}dtype="bfloat16", or an image processor with a smaller size.'
                )
                return [TooLarge(reason, *images[0].size[::-1])]
            half = len(images) // 2
            return self._detect(images[:half], settings) + self._detect(images[half:], settings)
        for name in ("logits", "pred_boxes"):
            outputs[name] = outputs[name].float()
        if not outputs.logits.isfinite().all() or not outputs.pred_boxes.isfinite().all():
            raise ValueError(
                f"{self.name} gives scores or boxes that are not finite in {str(self.model.dtype).removeprefix('torch.')}; use "
                'dtype="float32" or "bfloat16". If that does not help, the weights are damaged.'
            )
        sizes = torch.tensor([image.size for image in images])  # (B, 2)
        found = self.image_processor.post_process_object_detection(outputs, target_sizes=sizes, **settings.options)
        detections = [
            Detections.sorted(*(image[name].cpu().numpy() for name in ("boxes", "scores", "labels"))) for image in found
        ]
        if settings.all_scores:
            options = {name: value for name, value in settings.options.items() if name != "threshold"}
            queries = self.image_processor.top_detections(outputs, sizes, **options)["queries"].cpu().numpy()
            detections = [_with_scores(*image) for image in zip(detections, queries, outputs.logits, strict=True)]
        return detections


class _Settings(NamedTuple):
    options: dict  # arguments of post-processing
    all_scores: bool


def _with_scores(found: Detections, queries: np.ndarray, logits: Tensor) -> Detections:
    """Add the query and all class scores of each detection.

    Args:
        found: N detections above the threshold, highest score first.
        queries: (M,) queries of these detections, and of others with lower scores.
        logits: (Q, K)
    """
    queries = queries[: len(found.scores)]
    return found._replace(queries=queries, class_scores=logits.sigmoid().cpu().numpy()[queries])


def try_on_image(function: Callable, image: Image.Image | TooLarge):
    """`function(image)`, or a `TooLarge` if there is not enough memory for it."""
    if isinstance(image, TooLarge):
        return image
    try:
        return function(image)
    except (RuntimeError, MemoryError) as error:
        if not is_lack_of_memory(error):
            raise
    size = f"{image.width} x {image.height} pixels"
    reason = f"There is not enough memory for an image of {size}; scale it down, or end other programs."
    return TooLarge(reason, image.width, image.height)


def _raise_too_large(results: Iterator[Detections | TooLarge]) -> Iterator[Detections]:
    for found in results:
        if isinstance(found, TooLarge):
            raise DoesNotFit(found.reason)
        yield found


def num_bytes(image: Image.Image | TooLarge) -> int:
    """Memory of a Pillow image: a pixel takes 1 or 4 bytes in images with one band, and 4 bytes in other images."""
    if isinstance(image, TooLarge):
        return 0
    return image.width * image.height * (1 if image.mode in ("1", "L", "P") else 4)


def _loaded(image: Image.Image) -> Image.Image:
    """Load an image in the caller's thread: two threads must not load an image that is passed twice."""
    image.load()
    return image


def check_max_detections(max_detections: int | None) -> None:
    """Raise ValueError for a limit below 1."""
    if max_detections is not None and max_detections < 1:
        raise ValueError(f"max_detections={max_detections} must be at least 1; leave it out for the default.")
