"""Join the rows of files whose columns differ only in what does not matter: columns that one lacks, and kinds of numbers."""

from collections.abc import Collection

from datasets import Dataset, Features, LargeList, List, Value, concatenate_datasets


def join_rows(first: Dataset, second: Dataset, needed: Collection[str]) -> Dataset | None:
    """Rows of both, with the columns that both have in types that fit together. None: a needed column is not among them.

    Files may state types that follow from their rows: a list without boxes has the type null, and 5 and 5.5 are an integer and
    a float.
    """
    both = [name for name in first.column_names if name in second.column_names]
    merged = {name: _merge(first.features[name], second.features[name]) for name in both}
    features = Features({name: feature for name, feature in merged.items() if feature is not None})
    if not set(needed) <= set(features):
        return None
    return concatenate_datasets([rows.select_columns(list(features)).cast(features) for rows in (first, second)])


def _merge(first, second):
    """A type that holds the values of both. None: there is none."""
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
