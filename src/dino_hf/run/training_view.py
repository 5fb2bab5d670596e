"""What a training run sees, for pictures of it: data, augmentation, image processor and seed."""

from pathlib import Path
from typing import Any, NamedTuple

from ..common.regular_files import is_regular
from ..data import load_data
from ..training.augmentation import Augmentation
from ..training.checkpoint_files import newest_checkpoint
from ..training.coco_data import CocoData
from .plan import fitted
from .record import RUN_NAME, RunRecord
from .settings import flat_settings, split_settings
from .starting_model import image_processor_of


class TrainingView(NamedTuple):
    data: CocoData  # to train on
    augmentation: Augmentation
    image_processor: object
    seed: int  # of the augmentation


def view_training(
    source: str | Path,
    recipe: str | None = None,
    model: str | Path | None = None,
    seed: int | None = None,
    settings: dict[str, Any] | None = None,
    **reading: Any,
) -> TrainingView:
    """
    Args:
        source: a data set, or the folder of a run, which has its own data, recipe, sizes and seed.
        recipe, model, seed, settings: as `train` takes them; None: those of the run, or the defaults of `train`.
        reading: box_format, allow_outside and trust_boxes, as `load_data` takes them.
    Raises:
        ValueError, OSError: the data or the record of the run cannot be used.
    """
    folder = Path(source)
    record = RunRecord.take_up(folder, resume=True) if is_regular(folder / RUN_NAME) else RunRecord(folder, {})
    before = record.recorded
    given = flat_settings(settings or {})
    recipe, given = recipe or before.get("recipe", "finetune"), before.get("settings", {}) | given
    seed = before.get("seed", 0) if seed is None else seed
    chosen, others = split_settings(recipe, given)
    model = model or (_model_of(record) if before else None)
    image_processor = image_processor_of(model)
    data = source
    if before and (data := before.get("source")) is None:
        raise ValueError(
            f"The data of the run in {source} were no file or folder, so they are not on record; give the data set itself, with "
            f"--recipe {recipe}."
        )
    reading = {name: value or before.get(name, value) for name, value in reading.items()}
    # Where nothing is known of a run, all images to train on are of interest, also those that it would hold out.
    fraction = before.get("validation_fraction", 0.2) if before else 0
    parts = load_data(data, validation_fraction=fraction, seed=before.get("seed", 0), **reading)
    if parts.train is None:
        raise ValueError(f"{data} has no images to train on.")
    augmentation = fitted(chosen, given, image_processor, has_evaluation=True).augmentation
    return TrainingView(parts.train, augmentation, image_processor, others.get("data_seed") or seed)


def _model_of(record: RunRecord) -> str | None:
    """Where the image processor of a run is: in its folder, its newest checkpoint, or beside the model that it started from."""
    if record.is_finished:
        return str(record.output_dir)
    return newest_checkpoint(record.output_dir) or record.recorded.get("model")
