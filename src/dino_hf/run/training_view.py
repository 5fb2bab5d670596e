"""Data, augmentation, image processor and seed of a training run, for pictures of its training images."""

from pathlib import Path
from typing import Any, NamedTuple

from ..common.regular_files import is_regular
from ..common.tiles import read_tiling
from ..data import load_data
from ..data.tiled_data import EMPTY_TILES
from ..training.augmentation import Augmentation
from ..training.checkpoint_files import newest_checkpoint
from ..training.coco_data import CocoData
from .plan import adapt_recipe
from .recipe_choice import choose_recipe
from .record import RUN_NAME, RunRecord
from .settings import RUN_DEFAULTS, flat_settings, split_settings
from .starting_model import image_processor_of
from .tiles import SETTINGS, cut


class TrainingView(NamedTuple):
    """Result of `view_training`."""

    data: CocoData  # to train on
    augmentation: Augmentation
    image_processor: object
    seed: int  # random seed of the augmentation
    own: str | None  # name of the user's augmentation in the run, which is not loaded


def view_training(
    source: str | Path,
    recipe: str | None = None,
    model: str | Path | None = None,
    seed: int | None = None,
    settings: dict[str, Any] | None = None,
    tiles: int | str | tuple[int, int] | None = None,
    tile_overlap: float | None = None,
    **reading: Any,
) -> TrainingView:
    """Read the training data of a run, and its augmentation.

    Args:
        source: a data set, or the folder of a run. A run has its own data, recipe, image sizes and seed.
        recipe, model, seed, settings: as in `train`. None: the values of the run, or the defaults of `train`.
        tiles, tile_overlap: as in `train`, to view tiles. None: the tiles of the run. tiles="none": whole images.
        reading: box_format, allow_outside and trust_boxes, as in `load_data`.
    Raises:
        ValueError, OSError: the data or the record of the run cannot be used.
    """
    folder = Path(source)
    record = RunRecord.open(folder, resume=True) if is_regular(folder / RUN_NAME) else RunRecord(folder, {})
    before = record.recorded
    given = flat_settings(settings or {})
    run_settings = RUN_DEFAULTS | before
    model = model or (_model_of(record) if before else None)
    recipe, given = recipe or run_settings["recipe"] or choose_recipe(model), before.get("settings", {}) | given
    seed = run_settings["seed"] if seed is None else seed
    changed_recipe, others = split_settings(recipe, given)
    image_processor = image_processor_of(model)
    data = source
    if before and (data := before.get("source")) is None:
        raise ValueError(
            f"The run in {source} was not trained from a file or folder, so its data are not recorded. Name the data set itself, "
            f"with --recipe {recipe}."
        )
    reading = {name: value or before.get(name, value) for name, value in reading.items()}
    # Without a run, show all images, including those that a run would hold out.
    fraction = run_settings["validation_fraction"] if before else 0
    parts = load_data(data, validation_fraction=fraction, seed=run_settings["seed"], **reading)
    if parts.train is None:
        raise ValueError(f"{data} has no images to train on.")
    augmentation = adapt_recipe(changed_recipe, given, image_processor, has_evaluation=True).augmentation
    settings_of_tiles = {name: before.get(name) for name in SETTINGS} if tiles is None else {}
    if tiles is None and tile_overlap is not None:
        settings_of_tiles["tile_overlap"] = tile_overlap
    if (tiling := read_tiling(tiles, tile_overlap)) is not None:
        settings_of_tiles = {"tiles": tiling.size, "tile_overlap": tiling.overlap, "empty_tiles": EMPTY_TILES}
    parts = cut(parts._replace(validation=None), settings_of_tiles)
    own = before.get("augmentation")
    name = own.get("name") if isinstance(own, dict) else None
    return TrainingView(parts.train, augmentation, image_processor, others.get("data_seed") or seed, name)


def _model_of(record: RunRecord) -> str | None:
    """Folder with the image processor of a run: its own, its newest checkpoint, or the model that the run started from."""
    if record.is_finished:
        return str(record.output_dir)
    return newest_checkpoint(record.output_dir) or record.recorded.get("model")
