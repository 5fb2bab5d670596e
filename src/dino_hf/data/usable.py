"""What no reader may give to others: names that no file or report can hold, and files outside of the data set."""

from ..common.regular_files import OutsideError
from ..common.values import short_repr
from .files import DataFolder
from .raw import Problem, RawDataset, RawSplit


def only_usable(raw: RawDataset, files: DataFolder | None = None) -> RawDataset:
    """Without images, and their annotations, whose names are no text or whose files may not be read; each is a problem.

    Class names that are no text are made some, which is a problem too.

    Args:
        files: of the data set; None: its paths are the user's own, or were checked.
    """
    problems = []
    categories = [_usable_category(entry, raw, problems) for entry in raw.categories]
    splits = {name: _usable_split(split, files, problems) for name, split in raw.splits.items()}
    return raw._replace(splits=splits, categories=categories, problems=[*raw.problems, *problems])


def _usable_category(entry: dict, raw: RawDataset, problems: list[Problem]) -> dict:
    if is_text(entry["name"]):
        return entry
    where = f"{raw.origin}: category {entry['id']}"
    message = f"{where} has name={short_repr(entry['name'])}, which is no text that can be written; correct it."
    problems.append(Problem("bad-entry", where, message))
    return entry | {"name": entry["name"].encode("utf-8", "replace").decode().replace("\0", "?")}


def _usable_split(split: RawSplit, files: DataFolder | None, problems: list[Problem]) -> RawSplit:
    left_out = {}
    for place, image in enumerate(split.images):
        if problem := _problem(split, image, files):
            problems.append(problem)
            left_out[place] = image["id"]
    if not left_out:
        return split
    images = [image for place, image in enumerate(split.images) if place not in left_out]
    gone = set(left_out.values()) - {image["id"] for image in images}
    annotations = [entry for entry in split.annotations if entry["image_id"] not in gone]
    return split._replace(images=images, annotations=annotations)


def _problem(split: RawSplit, image: dict, files: DataFolder | None) -> Problem | None:
    where = f"{split.origin}: image {image['id']}"
    if not is_text(image["file_name"]) or ("path" in image and not is_text(str(image["path"]))):
        name = short_repr(image["file_name"] if not is_text(image["file_name"]) else str(image["path"]))
        wrong = (
            "usable, because it has a zero byte"
            if "\0" in f"{image['file_name']}{image.get('path', '')}"
            else "valid UTF-8"
        )
        message = f"{where} has the file {name}, whose name is not {wrong}; rename the file or its folder."
        return Problem("bad-entry", where, message)
    if files is not None and "path" in image:
        try:
            files.check(image["path"])
        except OutsideError as error:
            return Problem("outside", where, f"{where}: {error}")
    return None


def is_text(text: str) -> bool:
    """Whether a name can be written as UTF-8 and be part of a path. Names from a zip of another computer may not."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def is_address(path: str) -> bool:
    """Whether a path would be asked of a server, or is in an archive, by the file systems of `datasets`."""
    return "://" in path or "::" in path
