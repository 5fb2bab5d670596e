"""Find the columns of images, boxes and classes in a `Dataset`, and join rows of files with similar columns."""

from collections.abc import Collection
from typing import NamedTuple

from datasets import ClassLabel, Dataset, Features, Image, LargeList, List, Value, concatenate_datasets

# Names of columns, in the order in which they are tried.
_IMAGES = ("image", "img", "picture", "images", "file_name", "image_path", "filename", "path", "filepath")
_BOXES = ("bbox", "bboxes", "boxes", "box")
_CATEGORIES = (
    *("category_id", "category_ids", "category", "categories", "class_id", "class_ids", "class", "classes"),
    *("label_id", "label_ids", "label", "labels", "class_label", "class_labels", "category_name", "category_names"),
    *("class_name", "class_names", "label_name", "label_names", "name", "names"),
)
# Fields of a box that is a dictionary, in the order of its layout.
_BOX_FIELDS = {
    ("x", "y", "width", "height"): "xywh",
    ("x", "y", "w", "h"): "xywh",
    ("left", "top", "width", "height"): "xywh",
    ("x_min", "y_min", "width", "height"): "xywh",
    ("xmin", "ymin", "xmax", "ymax"): "xyxy",
    ("x_min", "y_min", "x_max", "y_max"): "xyxy",
    ("x1", "y1", "x2", "y2"): "xyxy",
    ("left", "top", "right", "bottom"): "xyxy",
    ("cx", "cy", "w", "h"): "cxcywh",
    ("cx", "cy", "width", "height"): "cxcywh",
    ("x_center", "y_center", "width", "height"): "cxcywh",
}
_AREAS = ("area", "areas")
_CROWDS = ("iscrowd", "is_crowd", "crowd")
_IDS = ("id", "ids", "bbox_id")


class Layout(NamedTuple):
    """Names of columns. Fields of objects are inside the column `group`, or are columns themselves if it is None."""

    image: str
    group: str | None
    box: str
    category: str
    category_name: str | None  # text beside a numeric category
    area: str | None
    iscrowd: str | None
    annotation_id: str | None


def find_layout(dataset: Dataset, where: str) -> tuple[Layout, object]:
    """The layout, and the feature of the classes. Raises ValueError if there are no images, boxes or classes."""
    features = dataset.features
    groups = {None: dict(features)}
    for name, feature in features.items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, dict):
            groups[name] = inner
    image = next((name for name in _IMAGES if isinstance(features.get(name), Image)), None) or next(
        (name for name, feature in features.items() if isinstance(feature, Image)), None
    )
    image = image or next((name for name in _IMAGES if _is_path_or_bytes(features.get(name))), None)
    ordered = sorted(groups, key=lambda name: (name is None, name != "objects"))
    group = next((name for name in ordered if _first(_BOXES, groups[name]) and _first(_CATEGORIES, groups[name])), "")
    if image is None or group == "":
        columns = {name: list(groups[name]) if name in groups else None for name in features}
        found = ", ".join(name if inner is None else f"{name} {inner}" for name, inner in columns.items())
        lacking = "images" if image is None else "boxes and classes"
        raise ValueError(
            f"{where} has the columns {found}, but no {lacking} under a known name; rename them to image, and objects with bbox "
            "and category."
        )
    inner = groups[group]
    kinds = {name: getattr(inner[name], "feature", inner[name]) for name in _CATEGORIES if name in inner}
    numeric = [name for name, kind in kinds.items() if isinstance(kind, ClassLabel) or "int" in dtype_name(kind)]
    texts = [name for name, kind in kinds.items() if "string" in dtype_name(kind)]
    labels = [name for name in numeric if isinstance(kinds[name], ClassLabel)]
    category = (labels or numeric or texts or list(kinds))[0]
    layout = Layout(
        image,
        group,
        _first(_BOXES, inner),
        category,
        texts[0] if texts and category in numeric and category not in labels else None,
        _first(_AREAS, inner),
        _first(_CROWDS, inner),
        _first(_IDS, inner) if group else None,
    )
    return layout, kinds[category]


def _first(names: tuple[str, ...], among: dict) -> str | None:
    return next((name for name in names if name in among), None)


def _is_path_or_bytes(feature) -> bool:
    return (isinstance(feature, dict) and "bytes" in feature) or dtype_name(feature) in ("string", "binary")


def dtype_name(feature) -> str:
    return str(getattr(feature, "dtype", ""))


def box_fields(features, layout: Layout, box_format: str | None, where: str) -> tuple[tuple[str, ...], str]:
    """Field names of a box that is a dictionary, in the order of its layout, and the layout. A list has no names: ()."""
    columns = features if layout.group is None else getattr(features[layout.group], "feature", features[layout.group])
    feature = columns[layout.box]
    while not isinstance(feature, dict) and hasattr(feature, "feature"):
        feature = feature.feature
    if not isinstance(feature, dict):
        return (), box_format or "xywh"
    fields = next((fields for fields in _BOX_FIELDS if set(fields) == set(feature)), None)
    layout_of_fields = _BOX_FIELDS.get(fields)
    if fields is None or (box_format or layout_of_fields).removesuffix("n") != layout_of_fields:
        raise ValueError(
            f"{where} has {layout.box} with the fields {list(feature)}"
            + (
                f", which is not box_format={box_format!r}; leave it out."
                if fields
                else "; call them x, y, width, height."
            )
        )
    return fields, box_format or layout_of_fields


def join_rows(first: Dataset, second: Dataset, needed: Collection[str]) -> Dataset | None:
    """Rows of both, with the columns that both have with compatible types. None: a needed column is missing.

    Files often derive types from their rows: the type of an empty list is null, and 5 and 5.5 are an integer and a float.
    """
    both = [name for name in first.column_names if name in second.column_names]
    merged = {name: _merge(first.features[name], second.features[name]) for name in both}
    features = Features({name: feature for name, feature in merged.items() if feature is not None})
    if not set(needed) <= set(features):
        return None
    return concatenate_datasets([rows.select_columns(list(features)).cast(features) for rows in (first, second)])


def _merge(first, second):
    """A type that holds the values of both. None: there is no common type."""
    if first == second or _is_null(second):
        return first
    if _is_null(first):
        return second
    if isinstance(first, List | LargeList) and isinstance(second, List | LargeList):
        inner = _merge(first.feature, second.feature)
        length = first.length if getattr(first, "length", -1) == getattr(second, "length", -1) else -1
        return None if inner is None else List(inner, length=length) if isinstance(first, List) else LargeList(inner)
    if isinstance(first, dict) and isinstance(second, dict) and set(first) == set(second):
        inner = {name: _merge(first[name], second[name]) for name in first}
        return None if None in inner.values() else inner
    kinds = {_kind_of_number(first), _kind_of_number(second)}
    if None in kinds:
        return None
    return Value("float64") if "float" in kinds else Value("int64")


def _is_null(feature) -> bool:
    return isinstance(feature, Value) and feature.dtype == "null"


def _kind_of_number(feature) -> str | None:
    if not isinstance(feature, Value):
        return None
    return next((kind for kind in ("float", "int") if feature.dtype.startswith((kind, f"u{kind}"))), None)
