"""One list of categories for the splits of a data set."""

from collections.abc import Sequence

from .raw import RawSplit


def groups_of_others(categories: Sequence[dict]) -> list[bool]:
    """Whether each category is the supercategory of another one, which may have the same name as in exports of one class."""
    entries_of: dict[str, set[int]] = {}
    for place, entry in enumerate(categories):
        if isinstance(entry.get("supercategory"), str):
            entries_of.setdefault(entry["supercategory"], set()).add(place)
    return [bool(entries_of.get(entry.get("name"), set()) - {place}) for place, entry in enumerate(categories)]


def merge_categories(categories: list[dict], split: RawSplit, own: list[dict]) -> tuple[RawSplit, list[str]]:
    """Add a split's categories to those of the splits before it. Where its ids mean other classes, as in parts that were
    numbered one by one, its annotations get the ids that the first split has for their names."""
    if not categories:
        categories += own
        return split, []
    id_of = {entry["name"]: entry["id"] for entry in categories}
    name_of = {entry["id"]: entry["name"] for entry in categories}
    if all(name_of.get(entry["id"], entry["name"]) == entry["name"] for entry in own) and all(
        id_of.get(entry["name"], entry["id"]) == entry["id"] for entry in own
    ):
        # two of one id or name in a single file stay two, to be found
        categories += [entry for entry in own if entry["id"] not in name_of]
        return split, []
    new_id_of = {}
    for entry in own:
        if entry["name"] not in id_of:
            unused = entry["id"] if entry["id"] not in name_of else max(name_of) + 1
            id_of[entry["name"]], name_of[unused] = unused, entry["name"]
            categories.append(entry | {"id": unused})
        new_id_of[entry["id"]] = id_of[entry["name"]]
    for category_id in {entry["category_id"] for entry in split.annotations} - new_id_of.keys():
        # Nothing in this split has that id, so nothing may in the others: it must be found, not be another class.
        new_id_of[category_id] = category_id if category_id not in name_of else -1 - abs(category_id)
    annotations = [entry | {"category_id": new_id_of[entry["category_id"]]} for entry in split.annotations]
    changed = {old: new for old, new in new_id_of.items() if old != new}
    note = f"{split.origin}: the classes are numbered otherwise than in the first split; ids were changed by name: {changed}."
    return split._replace(annotations=annotations), [note]
