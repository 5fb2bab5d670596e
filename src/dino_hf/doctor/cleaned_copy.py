"""Write cleaned copies of data sets in COCO format: correctable entries are corrected, others are left out."""

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..common.output_folders import check_writable, replace_folder
from ..common.text import count_text
from ..data.raw import RawDataset, image_file
from .checks import Report
from .cleaning import ANNOTATION_FILE, Change, CleanedSplit, Cleaner, portable_name
from .kinds import KINDS, UNREAD_IMAGES, UNREADABLE


class CleanedCopy(NamedTuple):
    folder: Path
    changes: list[Change]
    kept: list[str]  # one sentence for each decision that is left to the owner of the data
    num_images: dict[str, int]  # by split
    num_boxes: dict[str, int]
    num_original_images: int  # images of all splits in the original
    num_original_boxes: int

    def __repr__(self) -> str:
        images, boxes = sum(self.num_images.values()), sum(self.num_boxes.values())
        return f"CleanedCopy({str(self.folder)!r:.100}: {images} images, {boxes} boxes, {len(self.changes)} changes)"

    @property
    def left_out(self) -> dict[str, int]:
        """Kind of finding -> number of images, boxes or other entries that it excludes from the copy. Boxes of excluded images do
        not count."""
        return dict(Counter(change.kind for change in self.changes if change.action == "left out").most_common())

    @property
    def left_out_texts(self) -> list[str]:
        """Sentences about the entries that are not in the copy. Empty if all are."""
        if not self.left_out:
            return []
        num_images = self.num_original_images - sum(self.num_images.values())
        num_boxes = self.num_original_boxes - sum(self.num_boxes.values())
        total = f"{num_images:,} of {count_text(self.num_original_images, 'image')}"
        total += f" and {num_boxes:,} of {count_text(self.num_original_boxes, 'box')} are not in the copy:"
        kinds = [f"{count:,} {kind}: {KINDS.get(kind, UNREADABLE).what}" for kind, count in self.left_out.items()]
        return [total, *kinds]

    @property
    def num_unread(self) -> int:
        """Images and entries that are not in the copy because they could not be read."""
        return sum(count for kind, count in self.left_out.items() if kind in UNREAD_IMAGES or kind not in KINDS)

    @property
    def size_texts(self) -> list[str]:
        """Numbers of images and boxes, one text for each split."""
        return [
            f"{name}: {count_text(count, 'image')}, {count_text(self.num_boxes[name], 'box')}"
            for name, count in self.num_images.items()
        ]


def write_cleaned_copy(
    raw: RawDataset,
    report: Report,
    folder: str | Path,
    progress: Callable[[int, int], None] | None = None,
    drop_near_copies: bool = False,
) -> CleanedCopy:
    """Write `folder/<split>/` with images and `_annotations.coco.json`, and all changes to fixes.json and CHANGES.txt.

    Images are copied byte by byte, so editing one in the copy does not change the original.

    - Left out: images that are missing or broken, have a different shape than stated, share an id, or are copies (a copy in a
      held-out split stays); boxes without numbers or size, outside their image, repeated, or with an unknown image or category.
    - Corrected: boxes in a layout that is wrong for their format, if `inspect` is sure; boxes of resized images and of images that
      EXIF turns; negative sizes; impossible areas. Boxes that stick out are clipped. Categories with the same name are merged.

    The copy has only fields for detection, without masks and key points.

    Args:
        report: the result of `inspect(raw)` with images.
        folder: a new or empty folder. It appears when the copy is complete. Until then, the copy is in a hidden folder beside it.
            If the process is killed, the next call removes that folder.
        progress: called with the number of images written, and of all images.
        drop_near_copies: also leave out images that look like an image in another split, and boxes that nearly repeat a box.
    Raises:
        ValueError: the folder is not empty or lies inside the data set, the report has no images, or no box is left.
        OSError: the folder cannot be written.
    """
    folder = Path(folder).resolve()
    if not report.images_were_decoded:
        raise ValueError("A cleaned copy needs a report of the images too: inspect with check_images=True.")
    check_target(raw, folder)
    cleaner = Cleaner(raw, report, drop_near_copies)
    splits = {name: split for name in raw.splits if (split := cleaner.clean(name)).images}
    if not any(split.annotations for split in splits.values()):
        raise ValueError(f"Nothing would be left of {raw.origin}: no image has a box that can be used.")
    num_images = {name: len(split.images) for name, split in splits.items()}
    num_boxes = {name: len(split.annotations) for name, split in splits.items()}
    originals = [sum(len(entries) for entries in column) for column in zip(*_entries(raw), strict=True)]
    result = CleanedCopy(folder, cleaner.changes, cleaner.kept, num_images, num_boxes, *originals)
    with replace_folder(folder) as beside:
        _write_splits(raw, beside, splits, cleaner.categories, progress)
        _write_changes(beside, str(raw.origin), result)
        check_target(raw, folder)  # another process may have written to it
    return result


def _entries(raw: RawDataset) -> list[tuple[list[dict], list[dict]]]:
    return [(split.images, split.annotations) for split in raw.splits.values()]


def check_target(raw: RawDataset, folder: str | Path) -> None:
    """Check that a cleaned copy can be written to a folder, before the images are checked for hours.

    Raises:
        ValueError: the folder is not empty, or lies inside the data set; OSError: it cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; choose a new folder for the cleaned copy.")
    check_outside(raw, folder)
    check_writable(folder)


def check_outside(raw: RawDataset, path: str | Path) -> None:
    """Raise ValueError for a path inside the data set, because files there would become a part of it."""
    folders = {Path(image["path"]).parent for split in raw.splits.values() for image in split.images if "path" in image}
    if Path(raw.origin).is_dir():
        folders = [Path(raw.origin), *folders]
    target = Path(path).resolve()
    for folder in map(Path.resolve, folders):
        if target.is_relative_to(folder):
            raise ValueError(f"{path} lies inside {folder}, which must not be changed; choose a place outside.")


def _write_splits(
    raw: RawDataset,
    folder: Path,
    splits: dict[str, CleanedSplit],
    categories: list[dict],
    progress: Callable[[int, int], None] | None,
) -> None:
    num_done, num_images = 0, sum(len(split.images) for split in splits.values())
    taken = {"fixes.json", "changes.txt"}
    for name, split in splits.items():
        target = folder / unique_name(portable_name(name), taken)
        for image, source in zip(split.images, split.sources, strict=True):
            path = target / image["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            _copy_image(raw.splits[name].images[source], path)
            num_done += 1
            if progress is not None:
                progress(num_done, num_images)
        content = {"images": split.images, "annotations": split.annotations, "categories": categories}
        _write_text(target / ANNOTATION_FILE, json.dumps(content, ensure_ascii=False))


def unique_name(name: str, taken: set[str]) -> str:
    """Return a name that is not in `taken`, and add it to `taken`. Case is ignored, as in some file systems."""
    free = next(
        candidate
        for candidate in itertools.chain([name], (f"{name}_{n}" for n in itertools.count(2)))
        if candidate.casefold() not in taken
    )
    taken.add(free.casefold())
    return free


def _copy_image(image: dict, path: Path) -> None:
    file = image_file(image)
    if isinstance(file, bytes):
        path.write_bytes(file)
    else:
        shutil.copyfile(file, path)  # fast on file systems with copy-on-write


def _write_changes(folder: Path, origin: str, result: CleanedCopy) -> None:
    changes = [change._asdict() for change in result.changes]
    content = {"original": origin, "kept": result.kept, "changes": changes}
    _write_text(folder / "fixes.json", json.dumps(content, indent=1, ensure_ascii=False))
    lines = [f"A cleaned copy of {origin}.", ""]
    lines += result.size_texts
    lines += ["", count_text(len(changes), "change")]
    counts = Counter((change.kind, change.action) for change in result.changes)
    lines += [f"  {count:>7}  {kind}: {action}" for (kind, action), count in counts.most_common()]
    if texts := result.left_out_texts:
        lines += ["", texts[0], *(f"  {text}" for text in texts[1:])]
    if result.kept:
        lines += ["", "Not changed, for you to decide", *(f"  {text}" for text in result.kept)]
    lines += ["", "Each change"]
    for change in result.changes:
        places = [part for part in (change.split, change.where, change.file) if part is not None]
        after = f" -> {change.after}" if change.after else ""
        lines.append(f"  {change.kind}: {': '.join(places)}: {change.action}: {change.before}{after}")
    _write_text(folder / "CHANGES.txt", "\n".join(lines) + "\n")


def _write_text(path: Path, text: str) -> None:
    # Names that are not UTF-8 are escaped, as in json.
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
