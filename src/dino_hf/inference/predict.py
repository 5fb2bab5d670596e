"""`predict`: detect objects in images, folders, videos and cameras. Results are returned, and saved in a folder on request."""

import difflib
import warnings
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from ..common.paths import expand_home
from ..common.tiles import OVERLAP, Tiling, read_tiling
from ..model.package_warning import DinoDetrWarning
from .augmented import augmented_detectors, detect_augmented
from .predictor import Detections, Predictor, TooLarge, check_max_detections
from .score_thresholds import check_threshold
from .sources import End, Failure, Picture, Source, find_sources, read_sources, real_path
from .tiling import Detect, choose_tiling, detect_tiled
from .writers import FORMATS, PredictionFolder, check_folder, check_formats


class Prediction(NamedTuple):
    """The N detections in one image or one frame of a video, highest score first."""

    name: str  # name of the source, relative to the common folder of all sources
    origin: object  # file, address, camera index or image in memory
    frame: int | None  # number in the video, from 0
    time: float | None  # seconds since the beginning of the video
    image_size: tuple[int, int]  # (width, height)
    boxes: np.ndarray  # (N, 4) float64 (x0, y0, x1, y1) in pixels, inside the image
    scores: np.ndarray  # (N,) float64 in [0, 1]
    labels: np.ndarray  # (N,) int64 class index of the model
    names: list[str]  # N class names
    category_ids: list[
        int
    ]  # N category ids of the training annotations; class indices if the model has no category ids
    queries: np.ndarray | None = None  # (N,) int64 index of the query; only with `all_scores`
    class_scores: np.ndarray | None = None  # (N, K) float32 score of each class; only with `all_scores`

    @property
    def detections(self) -> Detections:
        return Detections(self.boxes, self.scores, self.labels, self.queries, self.class_scores)

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {name:.40}" for name, count in Counter(self.names).most_common(5))
        more = len(set(self.names)) - 5
        found = (counts + (f" and {more} more classes" if more > 0 else "")) or "nothing found"
        frame = "" if self.frame is None else f", frame {self.frame}"
        return f"Prediction({self.name!r:.100}{frame}, {self.image_size[0]} x {self.image_size[1]}: {found})"


def predict(
    model: str | Path | PreTrainedModel | Predictor,
    sources,
    *,
    save: str | Path | None = None,
    formats: Collection[str] = FORMATS,
    overwrite: bool = False,
    resume: bool = False,
    threshold: float | None = None,
    class_thresholds: Mapping[str | int, float] | None = None,
    max_detections: int | None = None,
    all_scores: bool = False,
    classes: Sequence[str | int] | None = None,
    tiles: int | str | tuple[int, int] | None = None,
    tile_overlap: float | None = None,
    tta: bool = False,
    every: int = 1,
    max_frames: int | None = None,
    batch_size: int = 8,
    image_processor=None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    stream: bool = False,
    on_failure: Callable[[Failure], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Prediction] | Iterator[Prediction]:
    """Detect objects in images, folders, patterns, addresses, videos, cameras and images in memory.

    Sources that cannot be read are left out with a warning.

    Args:
        model: folder, name of a published checkpoint, or Hub id of any model for object detection; the model itself; or a
            `Predictor`.
        sources: one source or several; see `find_sources`.
        save: folder for results; see `PredictionFolder`.
        formats: some of "images", "coco", "csv", "yolo".
        overwrite: replace an earlier prediction in the folder.
        resume: keep an earlier prediction in the folder, and predict the missing sources.
        threshold: detections with a score of at most this, in [0, 1], are left out. None: the thresholds of the model, see
            `score_thresholds`; 0.5 if it has none.
        class_thresholds: thresholds of single classes, by name or original category id, such as {"person": 0.3}.
        max_detections: limit for one image; the highest scores are kept. None: 300, or the number of queries if that is higher. A
            warning names the number of images that reach the limit.
        all_scores: also return the query and all class scores of each detection, and save them in predictions.jsonl. For DINO
            detectors, without tiles and tta.
        classes: names or original category ids of the classes to keep. None: all.
        tiles: side or (width, height) in pixels. Larger images are cut into tiles of this size; see `detect_tiled`. None: the tiles
            that the model was trained on, with a warning. "none": no tiles.
        tile_overlap: overlap of neighbouring tiles, relative to their side, in [0, 0.9]. None: as in training, or 0.2.
        tta: test-time augmentation. Detect in each image and its mirror image at three sizes; see `fuse`. It takes 6 times as
            long.
        every: use every N-th frame of a video.
        max_frames: use at most this many frames of each video.
        batch_size, image_processor, device, dtype: see `Predictor`.
        stream: return an iterator that yields predictions as they are made, for example for long videos. Work starts with the
            first prediction that is requested.
        on_failure: called with each source that cannot be read, instead of a warning.
        say: called with a sentence if the thresholds of the model are used.
    Returns:
        the predictions in the order of the sources: a list, or with `stream` an iterator. With `resume`, only the new ones.
    Raises:
        FileNotFoundError, FileExistsError, ValueError: an argument is wrong.
        ValueError: none of the sources could be read.
    """
    if threshold is not None:
        check_threshold(threshold)
    for name, value in (class_thresholds or {}).items():
        check_threshold(value, f"class_thresholds: {name!s:.100}")
    check_formats(formats)
    tiling = read_tiling(tiles, tile_overlap)
    check_max_detections(max_detections)
    if all_scores and (tiling is not None or tta):
        raise ValueError("all_scores cannot be used with tiles or tta, because they join the boxes of several queries.")
    if save is None and (overwrite or resume):
        name = "overwrite" if overwrite else "resume"
        raise ValueError(
            f"--{name} (in Python, {name}=True) needs a folder of results: name it with --save (in Python, save=...)."
        )
    for name, value in (("batch_size", batch_size), ("every", every), ("max_frames", max_frames)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    planned = find_sources(sources, exclude=None if save is None else expand_home(save))
    if save is not None:
        check_folder(save, overwrite or resume)  # before the model is loaded, which takes seconds
        _check_apart(planned, real_path(expand_home(save)))
    predictor = model if isinstance(model, Predictor) else Predictor(model, image_processor, device=device, dtype=dtype)
    if tiles is None and not all_scores:
        tiling = _trained_tiling(predictor, tile_overlap)
    categories = {
        index: (index if predictor.category_ids is None else predictor.category_ids[index], name)
        for index, name in predictor.id2label.items()
    }
    labels = None if classes is None else find_classes(classes, categories)
    own_thresholds: dict[str, float] = {}
    if threshold is None:
        own = predictor.thresholds
        threshold, own_thresholds = own.default, own.by_class
        if say is not None and (sentence := own.describe()):
            say(sentence)
    thresholds = _thresholds(threshold, own_thresholds, class_thresholds or {}, categories)
    limit = _Limit(predictor, max_detections)
    lowest = min(thresholds.values(), default=threshold)
    detect = _make_detect(predictor, batch_size, lowest, limit, all_scores, tiling, tta)
    folder = None
    if save is not None:
        settings = {"model": predictor.name, "threshold": threshold, "classes": classes, "tta": tta}
        # Tiles of the user as they were given, so that predictions of earlier versions can be resumed.
        settings["tiles"] = "x".join(map(str, tiling.size)) if tiles is None and tiling is not None else tiles
        # Recorded only if set, so runs of earlier versions, which lack these settings, can be resumed.
        if by_class := own_thresholds | {str(name): value for name, value in (class_thresholds or {}).items()}:
            settings["class_thresholds"] = by_class
        settings |= {"max_detections": max_detections} if max_detections is not None else {}
        settings |= {"all_scores": True} if all_scores else {}
        settings |= {
            "tile_overlap": OVERLAP if tiling is None else tiling.overlap,
            "every": every,
            "max_frames": max_frames,
            "formats": sorted(formats),
        }
        folder = PredictionFolder(
            save, settings, categories, formats=formats, every=every, overwrite=overwrite, resume=resume
        )
        planned = [source for source in planned if not folder.is_finished(source)]
    items = _refuse(predictor, read_sources(planned, every=every, max_frames=max_frames))
    if labels is not None:
        thresholds = {label: thresholds[label] for label in labels}
    predictions = _run(_detect_in_order(detect, items), categories, thresholds, folder, on_failure or _warn, limit)
    return predictions if stream else list(predictions)


def _run(
    results: Iterator[tuple[Picture | Failure | End, Detections | None]],
    categories: Mapping[int, tuple[int, str]],
    thresholds: Mapping[int, float],
    folder: PredictionFolder | None,
    on_failure: Callable[[Failure], None],
    limit: "_Limit",
) -> Iterator[Prediction]:
    """Yield and save predictions, and report sources that cannot be read.

    Args:
        thresholds: class index -> lowest score, for the classes to keep.
    """
    num_predicted, first_failure = 0, None
    failed: set[str] = set()  # names of sources
    with folder or nullcontext():
        for item, found in results:
            if isinstance(item, Failure):
                first_failure = first_failure or item
                if item.source.name not in failed:  # many frames of a video may fail; report it once
                    on_failure(item)
                failed.add(item.source.name)
            elif isinstance(item, End):
                if folder is not None and item.source.name not in failed:
                    folder.finish(item.source)
            else:
                num_predicted += 1
                found = limit.cut(_inside(found, item.image.size, thresholds))
                if folder is not None:
                    folder.add(item, found)
                prediction = _describe(item, found, categories)
                del item  # the next image may need its memory
                yield prediction
    limit.warn()
    if first_failure and not num_predicted and not (folder and folder.has_finished):
        raise ValueError(
            f"Nothing could be read. The first source was {first_failure.source.name}: {first_failure.reason}"
        )


def _describe(picture: Picture, found: Detections, categories: Mapping[int, tuple[int, str]]) -> Prediction:
    ids, names = (
        zip(*(categories[label] for label in found.labels.tolist()), strict=True) if len(found.labels) else ((), ())
    )
    source = picture.source
    place = source.name, source.origin, picture.frame, picture.time, picture.image.size
    scores = {"queries": found.queries, "class_scores": found.class_scores}
    return Prediction(*place, found.boxes, found.scores, found.labels, list(names), list(ids), **scores)


def find_classes(classes: Sequence[str | int], categories: Mapping[int, tuple[int, str]]) -> list[int]:
    """Class indices for names (case is ignored) and original category ids.

    Args:
        categories: class index -> original category id and name.
    Raises:
        ValueError: the model has no class of that name or id. The message names the closest classes.
    """
    found = set()
    for name_or_id in [classes] if isinstance(classes, str | int) else classes:
        text = str(name_or_id).strip().lower()
        indices = [index for index, (_, name) in categories.items() if name.lower() == text]
        indices = indices or [index for index, (category_id, _) in categories.items() if str(category_id) == text]
        if not indices:
            names = {name.lower(): name for _, name in categories.values()}
            close = [names[name] for name in difflib.get_close_matches(text, names, n=3, cutoff=0.5)]
            listed = f"the closest are {', '.join(close)}" if close else f"it has {', '.join(names.values())}"
            raise ValueError(f"The model has no class {str(name_or_id).strip()!r}; {listed:.300}.")
        found.update(indices)
    if not found:
        raise ValueError("classes is empty; give names or category ids, or leave it out to use all classes.")
    return sorted(found)


def _thresholds(
    threshold: float,
    own: Mapping[str, float],
    by_class: Mapping[str | int, float],
    categories: Mapping[int, tuple[int, str]],
) -> dict[int, float]:
    """Class index -> lowest score.

    Args:
        own: class name -> threshold in the model's configuration.
        by_class: class name or category id -> threshold of the user, which replaces the others.
    """
    thresholds = {index: own.get(name, threshold) for index, (_, name) in categories.items()}
    for name, value in by_class.items():
        thresholds |= dict.fromkeys(find_classes([name], categories), value)
    return thresholds


class _Limit:
    """The limit of detections in an image, and the number of images (or tiles) that reached it."""

    def __init__(self, predictor: Predictor, max_detections: int | None):
        self.max_detections, self._limit, self._num_reached = max_detections, predictor.limit(max_detections), 0

    def count(self, results: Iterator[Detections | TooLarge]) -> Iterator[Detections | TooLarge]:
        for found in results:
            if self._limit is not None and not isinstance(found, TooLarge):
                self._num_reached += len(found.scores) >= self._limit
            yield found

    def cut(self, found: Detections) -> Detections:
        """Apply the user's limit to a whole image: several tiles or views may give more detections together."""
        if self.max_detections is None or len(found.scores) <= self.max_detections:
            return found
        self._num_reached += 1
        return found.keep(np.arange(len(found.scores)) < self.max_detections)

    def warn(self) -> None:
        if self._num_reached:
            warnings.warn(
                f"In {self._num_reached} {'image' if self._num_reached == 1 else 'images (or tiles)'}, {self._limit} detections or "
                "more have a score above the threshold; the others were cut off. A higher max_detections keeps more of them.",
                DinoDetrWarning,
                stacklevel=4,
            )


def _trained_tiling(predictor: Predictor, tile_overlap: float | None) -> Tiling | None:
    """The tiles that a model was trained on, with a warning. None: it was trained on whole images."""
    tiling = choose_tiling(None, tile_overlap, getattr(predictor, "model", None))
    if tiling is not None:
        warnings.warn(
            f"Images larger than a tile are cut into tiles of {tiling.text}, as in the training of this model; --tiles none (in "
            'Python, tiles="none") turns this off.',
            DinoDetrWarning,
            stacklevel=3,
        )
    return tiling


def _make_detect(
    predictor: Predictor,
    batch_size: int,
    threshold: float,
    limit: _Limit,
    all_scores: bool,
    tiling: Tiling | None,
    tta: bool,
) -> Detect:
    def detect(images):
        settings = {"threshold": threshold, "max_detections": limit.max_detections, "all_scores": all_scores}
        return limit.count(predictor(images, batch_size=batch_size, skip_too_large=True, **settings))

    if tta:
        detectors = augmented_detectors(predictor, batch_size, threshold, limit.max_detections)
        detect = detect_augmented(detectors, threshold)
    if tiling is not None:
        detect = detect_tiled(detect, *tiling)
    return detect


def _refuse(predictor: Predictor, items: Iterator[Picture | Failure | End]) -> Iterator[Picture | Failure | End]:
    """Replace pictures that the predictor cannot use by failures."""
    for item in items:
        reason = predictor.refuses(item.image) if isinstance(item, Picture) else None
        yield item if reason is None else Failure(item.source, reason)
        del item  # the next image may need its memory


def _detect_in_order(
    detect: Detect, items: Iterator[Picture | Failure | End]
) -> Iterator[tuple[Picture | Failure | End, Detections | None]]:
    """Pictures with their detections. Failures and ends of videos are yielded in order, after all pictures before them."""
    waiting: deque[Picture | Failure | End] = deque()

    def images():
        for item in items:
            waiting.append(item)
            if isinstance(item, Picture):
                yield item.image
            del item  # the next image may need its memory

    for found in detect(images()):
        while not isinstance(waiting[0], Picture):
            yield waiting.popleft(), None
        item = waiting.popleft()
        yield (_failure(item, found.reason), None) if isinstance(found, TooLarge) else (item, found)
        del item  # the next image may need its memory
    yield from ((item, None) for item in waiting)


def _failure(picture: Picture, reason: str) -> Failure:
    return Failure(picture.source, reason if picture.frame is None else f"Frame {picture.frame}: {reason}")


def _inside(found: Detections, size: tuple[int, int], thresholds: Mapping[int, float]) -> Detections:
    """Detections of the kept classes above their thresholds, clipped to the image."""
    boxes = found.boxes.clip(0, np.array([*size, *size]))
    keep = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    keep &= found.scores > np.array([thresholds.get(label, np.inf) for label in found.labels.tolist()])
    return found._replace(boxes=boxes).keep(keep)


def _check_apart(sources: Sequence[Source], folder: Path) -> None:
    """Refuse sources in the folder of results, which would be overwritten."""
    for source in sources:
        if isinstance(source.origin, Path) and folder in real_path(source.origin).parents:
            raise ValueError(
                f"{source.origin} is in {folder}, where the results are saved; choose another folder for the results."
            )


def _warn(failure: Failure) -> None:
    warnings.warn(f"{failure.source.name} was left out. {failure.reason}", DinoDetrWarning, stacklevel=4)
