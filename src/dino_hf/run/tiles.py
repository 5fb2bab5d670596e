"""Training on tiles: the settings of a run, its data cut into tiles, and what the plan says about them."""

from typing import Any

import numpy as np

from ..common.text import size_text
from ..common.tiles import OVERLAP, read_tiling
from ..data import DetectionData
from ..data.rows import box_columns
from ..data.tiled_data import EMPTY_TILES, KEPT_PIXELS, check_empty_tiles, cut_into_tiles, tiled_images
from ..training.class_balance import images_per_epoch
from ..training.coco_data import CocoData
from .record import RunRecord

SETTINGS = ("tiles", "tile_overlap", "empty_tiles")  # in run.json
_SHARE_OF_LARGE = 0.05  # share of boxes that may be larger than the tiles can show, without a warning
_SMALL_SIDE = 8  # pixels of the model's input; half of the boxes should be larger


def choose_tiles(
    record: RunRecord, tiles: int | str | tuple[int, int] | None, overlap: float | None, empty_tiles: float | None
) -> None:
    """Choose the tiles of a run: the given values, else the recorded values. They are kept in the record.

    Raises:
        ValueError: a setting is invalid, is given without tiles, or the resumed run had another one.
    """
    tiling = read_tiling(tiles, overlap)
    given = {
        "tiles": None if tiles is None else "none" if tiling is None else "{}x{}".format(*tiling.size),
        "tile_overlap": overlap,
        "empty_tiles": empty_tiles,
    }
    if empty_tiles is not None:
        check_empty_tiles(empty_tiles)
    before = {name: record.recorded.get(name) for name in SETTINGS}
    if record.is_resumed:
        for name, value in given.items():
            if value is not None and value != (before[name] or ("none" if name == "tiles" else before[name])):
                shown = "not set" if before[name] is None else before[name]
                raise ValueError(
                    f"The run in {record.output_dir} started with {name} {shown}, not with {value}. To resume "
                    f"it, leave out {name}; or choose another --output-dir."
                )
        record.values |= before
        return
    if tiling is None and (unused := [name for name in SETTINGS[1:] if given[name] is not None]):
        raise ValueError(
            f"{unused[0]}={given[unused[0]]} needs tiles: name their size by --tiles 640 (in Python, tiles=640)."
        )
    defaults = {"tiles": None, "tile_overlap": OVERLAP, "empty_tiles": EMPTY_TILES}
    record.values |= (
        dict.fromkeys(SETTINGS)
        if tiling is None
        else {name: defaults[name] if given[name] is None else given[name] for name in SETTINGS}
    )


def cut(splits: DetectionData, settings: dict[str, Any]) -> DetectionData:
    """Cut training and held-out images, as the settings of a run say. Test images stay whole: training does not use them."""
    if settings.get("tiles") is None:
        return splits
    tiling = [settings[name] for name in SETTINGS]
    held_out = splits.validation
    return splits._replace(
        train=cut_into_tiles(splits.train, *tiling),
        validation=None if held_out is None else cut_into_tiles(held_out, *tiling),
    )


def describe_tiles(train: CocoData, held_out: CocoData | None, repeat_threshold: float | None) -> dict[str, Any] | None:
    """The part of the plan about tiles. None: the data are not tiled."""
    images = tiled_images(train)
    if images is None:
        return None
    counts, pixels = images.counts, images.sizes.prod(1)
    is_cut = (images.sizes > np.array(images.tiling.size)).any(1)
    kept = min(int(pixels[is_cut].sum()), max(KEPT_PIXELS, int(pixels[is_cut].max(initial=0))))
    return images.tiling.as_dict() | {
        "images_cut": counts.cut,
        "tiles": counts.tiles,
        "tiles_without_boxes": counts.empty,
        "per_epoch": images_per_epoch(train, repeat_threshold),
        "held_out_tiles": None if held_out is None else tiled_images(held_out).counts.tiles,
        "boxes": counts.boxes,
        "boxes_only_in_whole_images": counts.only_in_whole,
        "boxes_lost": counts.lost,
        "memory": 3 * kept,  # bytes of decoded images that a worker keeps
    }


def tiles_line(tiles: dict[str, Any], num_images: int) -> str:
    """The line of the plan about tiles."""
    held_out = "" if tiles["held_out_tiles"] is None else f"; {tiles['held_out_tiles']:,} held-out tiles"
    return (
        f"{tiles['size'][0]} x {tiles['size'][1]} pixels, overlap {tiles['overlap']:g}: {tiles['images_cut']:,} of {num_images:,} "
        f"training images are cut into {tiles['tiles']:,} tiles, {tiles['tiles_without_boxes']:,} of them without boxes; an epoch "
        f"has {tiles['per_epoch']:,} tiles and whole images{held_out}; a process that reads images keeps up to "
        f"{size_text(tiles['memory'])} of them"
    )


def tile_warnings(train: CocoData, image_processor) -> list[str]:
    """Warnings about tiles that do not fit the images or the boxes."""
    images = tiled_images(train)
    if images is None:
        return []
    counts, tiling = images.counts, images.tiling
    if not counts.cut:
        return [f"no training image is larger than a tile of {tiling.text}, so nothing is cut."]
    warnings = []
    if counts.only_in_whole > _SHARE_OF_LARGE * counts.boxes:
        warnings.append(
            f"{counts.only_in_whole} of {counts.boxes} boxes are in no tile, because no tile shows half of them. Only the whole "
            "images, scaled down, train these objects. Larger tiles or a larger --tile-overlap help."
        )
    if counts.lost:
        warnings.append(
            f"{counts.lost} of {counts.boxes} boxes are not trained on: no tile shows half of them, and in the whole image, scaled "
            "down, they are too small. Larger tiles or a larger --tile-overlap help."
        )
    side, (largest, smallest) = _median_side(train), (max(tiling.size), min(tiling.size))
    scale = image_processor.size.get("shortest_edge", smallest) / smallest
    if side * scale < _SMALL_SIDE:
        warnings.append(
            f"half of the boxes in tiles have sides below {side * scale:.1f} pixels (square root of the area) in the input of the "
            f"model. Smaller tiles than {tiling.size[0]} x {tiling.size[1]} show them larger."
        )
    if side > largest / 2:
        warnings.append(
            f"half of the boxes in tiles have sides above {side:.0f} pixels, more than half of a tile. Larger tiles than "
            f"{tiling.size[0]} x {tiling.size[1]} show more of their surroundings; or train without tiles."
        )
    return warnings


def _median_side(train: CocoData) -> float:
    """Median of the square root of the area of all boxes in tiles and whole images, in pixels."""
    _, is_crowd, _ = box_columns(train)
    objects = train.dataset.select_columns("objects").with_format("arrow")[:]["objects"].combine_chunks()
    boxes = objects.field("bbox").flatten().flatten().to_numpy(zero_copy_only=False).reshape(-1, 4)
    return float(np.median(np.sqrt(boxes[~is_crowd, 2:].prod(1)))) if (~is_crowd).any() else 0.0
