"""`PredictionFolder`: save predictions as a journal, as drawn pictures and videos, and in the formats of other tools."""

import csv
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath

from ..common.output_folders import check_output_folder, remove_leftovers, replace_file
from ..common.paths import expand_home, path_below, remove_files
from ..common.text import csv_cell
from .formats import write_coco, yolo_lines
from .journal import JOURNAL, MEMORY, Journal, as_line, describe, identity
from .pictures import draw_detections, save_picture
from .predictor import Detections
from .sources import Picture, Source, unique_name
from .videos import VideoWriter, video_info

FORMATS = ("images", "coco", "csv", "yolo")
_COCO, _CSV, _CLASSES = "predictions.json", "predictions.csv", "classes.txt"
_CSV_COLUMNS = ("file", "frame", "time", "label", "category_id", "score", "x0", "y0", "x1", "y1")
_KEPT_SUFFIXES = (".jpg", ".jpeg", ".png")
_LONGEST_NAME = 200  # bytes of a file or folder name; file systems allow 255, and suffixes and numbers are appended
_LONGEST_PATH = 1000  # bytes below the folder of results; systems allow 4,096 (Linux) or 1,024 (macOS)
_OLD_DRAFT = f".{JOURNAL}"  # unfinished journal of a killed run of an earlier version
_KINDS = ("images", "videos", "labels")  # folders


class PredictionFolder:
    """Writes results to a folder while they are computed. A context manager.

        predictions.jsonl   always: the settings, then a line for each image or frame
        images/, videos/    format "images": pictures and videos (.mp4) with boxes, under the names of the sources
        predictions.csv     format "csv": a row for each detection, with its box in pixels
        labels/             format "yolo": a text file for each image. The frames of a video have a folder with its name. Each line
                            is "class x y width height score"; centre and size are relative to the image. The class is the
                            number of a line in classes.txt, from 0
        predictions.json    format "coco", written at the end: images, categories and annotations with scores. Image ids count
                            from 1, in the order of prediction. `COCO.loadRes` reads the list of annotations alone.

    Args:
        settings: settings of the prediction. A resumed prediction must have the same settings.
        categories: class index -> original category id and name.
        formats: some of `FORMATS`.
        every: every N-th frame of a video is used. The frame rate of the written video is divided by N.
        overwrite: delete the files that the journal of an earlier prediction names. Other files are kept, and links are not
            followed.
        resume: keep the earlier results and continue. An unfinished video starts again. So do sources with damaged lines in the
            journal.
    Raises:
        FileExistsError: the folder has an earlier prediction and neither `overwrite` nor `resume` is set, or it has other files.
        ValueError: a format is unknown; both `overwrite` and `resume` are set; a folder of results is a link; the earlier
            prediction cannot be resumed, because it had other settings or the first line of its journal is damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping,
        categories: Mapping[int, tuple[int, str]],
        *,
        formats: Collection[str] = FORMATS,
        every: int = 1,
        overwrite: bool = False,
        resume: bool = False,
    ):
        check_formats(formats)
        if overwrite and resume:
            raise ValueError("overwrite deletes the results that resume would keep; choose one of them.")
        self.folder, self.formats, self.every = expand_home(folder), frozenset(formats), every
        self.settings, self.categories = json.loads(json.dumps(settings)), dict(categories)
        self._paths: dict[tuple[str, str], Path] = {}
        self._taken: set[str] = set()
        self._video: tuple[Source, VideoWriter] | None = None
        self._finished: set[tuple[str, str]] = set()
        self._journal_before: Journal | None = None
        if check_folder(self.folder, overwrite or resume):
            self._journal_before = Journal(self.folder)
        self._is_replaced = overwrite
        for kind in _KINDS:
            path_below(self.folder, f"{kind}/x")  # refuses a link before the work starts
        if resume and self._journal_before is not None and not self._journal_before.is_empty:
            self._finished = self._read_finished(self._journal_before)

    def __enter__(self) -> "PredictionFolder":
        """Delete an earlier prediction if requested, and open the files. Nothing is written or deleted before."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for folder in (self.folder, *(self.folder / kind for kind in _KINDS)):
            remove_leftovers(folder)
        (self.folder / _OLD_DRAFT).unlink(missing_ok=True)
        if self._is_replaced:
            self._delete_earlier()
        self._open_files()
        return self

    def __exit__(self, *error) -> None:
        self.close()

    @property
    def has_finished(self) -> bool:
        """Whether an earlier prediction finished any source."""
        return bool(self._finished)

    def is_finished(self, source: Source) -> bool:
        """Whether an earlier prediction finished a source. Images in memory never count, because they cannot be recognised."""
        return (source.name, describe(source)) in self._finished

    def add(self, picture: Picture, detections: Detections) -> None:
        """Write the results of an image or of the next frame of a video. The journal is written last: the files it names exist."""
        self._check_there()
        record = {
            "file": picture.source.name,
            "origin": describe(picture.source),
            "frame": picture.frame,
            "time": None if picture.time is None else round(picture.time, 4),
            "width": picture.image.width,
            "height": picture.image.height,
            "objects": [
                {
                    "label": self.categories[label][1],
                    "category_id": self.categories[label][0],
                    "score": round(score, 6),
                    "box": [round(value, 3) for value in box],
                }
                for box, score, label in detections.rows()
            ],
        }
        if detections.queries is not None:
            for entry, query, scores in zip(
                record["objects"], detections.queries.tolist(), detections.class_scores.tolist(), strict=True
            ):
                entry |= {"query": query, "scores": [round(score, 6) for score in scores]}
        if "images" in self.formats:
            self._draw(picture, detections)
        if "yolo" in self.formats:
            path = self._path("labels", picture.source.name, picture.frame)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replace_file(path) as new:
                new.write_text(yolo_lines(detections, picture.image.size))
        if self._table is not None:
            self._write_rows(record)
            self._table.flush()
        self._write_line(record)

    def finish(self, source: Source) -> None:
        """Record that a video was read to its end."""
        self._check_there()
        self._close_video()
        self._write_line({"file": source.name, "origin": describe(source), "end": True})

    def close(self) -> None:
        """Close all files. The results of a run that was stopped are complete up to there."""
        self._close_video()
        is_there = self._is_there()
        self._journal.close()
        if self._table is not None:
            self._table.close()
        if "coco" in self.formats and is_there:
            write_coco(self.folder / _COCO, self._records(), self.categories)

    def _open_files(self) -> None:
        """Start the journal with the kept lines of the earlier one, and the table with their rows."""
        with replace_file(self.folder / JOURNAL) as new, open(new, "w", encoding="utf-8") as file:
            file.write(as_line({"settings": self.settings}))
            kept = self._records(with_ends=True) if self._finished else ()
            file.writelines(as_line(record) for record in kept if identity(record) in self._finished)
        self._journal = open(self.folder / JOURNAL, "a", encoding="utf-8")  # noqa: SIM115  for the whole run
        self._table = None
        if "csv" in self.formats:
            # utf-8-sig: without a byte order mark, spreadsheets assume another encoding
            (self.folder / _CSV).unlink(missing_ok=True)  # never write through a link
            self._table = open(self.folder / _CSV, "x", encoding="utf-8-sig", newline="")  # noqa: SIM115
            csv.writer(self._table).writerow(_CSV_COLUMNS)
        if "yolo" in self.formats:
            names = [self.categories.get(index, (index, "-"))[1] for index in range(max(self.categories) + 1)]
            text = "".join(f"{' '.join(name.split())}\n" for name in names)
            with replace_file(self.folder / _CLASSES) as new:
                new.write_text(text, encoding="utf-8")
        for record in self._records():
            self._paths_of(record)  # later results must not use these names
            if self._table is not None:
                self._write_rows(record)

    def _records(self, with_ends: bool = False) -> Iterator[dict]:
        """Records of the journal, without its first line."""
        return Journal(self.folder).records(with_ends)

    def _read_finished(self, journal: Journal) -> set[tuple[str, str]]:
        if journal.settings is None:
            raise ValueError(
                f"{self.folder} cannot be resumed, because the first line of its {JOURNAL}, with the settings, is damaged; "
                "overwrite the prediction, or choose another folder."
            )
        earlier = journal.settings
        for name in self.settings:
            if earlier.get(name) != self.settings[name]:
                before, now = (ascii(value) for value in (earlier.get(name), self.settings[name]))
                raise ValueError(
                    f"{self.folder} was predicted with {name}={before:.200}, not {now:.200}; resume with the same value, "
                    "overwrite it, or choose another folder."
                )
        return {
            identity(record)
            for record in journal.records(with_ends=True)
            if record.get("end") or (record["frame"] is None and record["origin"] != MEMORY)
        }

    def _delete_earlier(self) -> None:
        """Delete only the files that the journal names. Other files belong to the user, so their names are not used."""
        if self._journal_before is not None:
            for record in self._journal_before.records():
                names = (path.relative_to(self.folder).as_posix() for path in self._paths_of(record))
                remove_files(self.folder, names)
            remove_files(self.folder, (_COCO, _CSV, _CLASSES, JOURNAL))
        self._paths.clear()
        self._taken = {
            path.relative_to(self.folder).as_posix().lower()
            for kind in _KINDS
            for path in (self.folder / kind).rglob("*")
        }

    def _paths_of(self, record: dict) -> list[Path]:
        kinds = ("images" if record["frame"] is None else "videos", "labels")
        return [self._path(kind, record["file"], record["frame"]) for kind in kinds]

    def _path(self, kind: str, name: str, frame: int | None) -> Path:
        """File of a kind for a source: the name of the source with the suffix of the kind.

        The labels of "a.jpg" and "a.png" are labels/a.txt and labels/a.png.txt.
        """
        if kind == "labels" and frame is not None:
            return path_below(self.folder, f"{kind}/{_short_path(name)}/{frame:06}.txt")
        if (kind, name) not in self._paths:
            suffix = {"labels": ".txt", "videos": ".mp4", "images": ".jpg"}[kind]
            path = PurePosixPath(kind, _short_path(name))
            if kind != "images" or path.suffix.lower() not in _KEPT_SUFFIXES:
                short = path.with_suffix(suffix)
                path = path.with_name(path.name + suffix) if str(short).lower() in self._taken else short
            self._paths[kind, name] = path_below(self.folder, unique_name(str(path), self._taken))
        return self._paths[kind, name]

    def _draw(self, picture: Picture, detections: Detections) -> None:
        names = {index: name for index, (_, name) in self.categories.items()}
        drawn = draw_detections(picture.image, detections, names, enlarge=picture.frame is None)
        path = self._path("images" if picture.frame is None else "videos", picture.source.name, picture.frame)
        path.parent.mkdir(parents=True, exist_ok=True)
        if picture.frame is None:
            save_picture(drawn, path)
            return
        if self._video is None or self._video[0] is not picture.source:
            self._close_video()
            rate = video_info(picture.source.origin).frame_rate / self.every
            self._video = picture.source, VideoWriter(path, drawn.size, rate)
        self._video[1].write(drawn, picture.time)

    def _close_video(self) -> None:
        if self._video is not None:
            (_, writer), self._video = self._video, None
            writer.close()

    def _is_there(self) -> bool:
        """Whether the journal is still in the folder. Writing to a deleted file succeeds, but its content is lost."""
        try:
            return os.path.samestat(os.stat(self.folder / JOURNAL), os.fstat(self._journal.fileno()))
        except OSError:
            return False

    def _check_there(self) -> None:
        if not self._is_there():
            raise FileNotFoundError(
                f"{self.folder} was deleted or moved while results were written to it; predict again."
            )

    def _write_line(self, record: dict) -> None:
        self._journal.write(as_line(record))
        self._journal.flush()

    def _write_rows(self, record: dict) -> None:
        place = [csv_cell(record["file"]), record["frame"], record["time"]]
        csv.writer(self._table).writerows(
            [*place, csv_cell(found["label"]), found["category_id"], found["score"], *found["box"]]
            for found in record["objects"]
        )


def _short_path(name: str) -> str:
    """The name of a source, short enough for file systems. A part that is too long becomes its beginning and a digest."""
    path = PurePosixPath(name)
    short = PurePosixPath(*(_short_name(part) for part in path.parts))
    if len(os.fsencode(str(short))) > _LONGEST_PATH:  # replace hundreds of folders by one
        short = PurePosixPath(_digest(name), short.name)
    return str(short)


def _short_name(part: str) -> str:
    if len(os.fsencode(part)) <= _LONGEST_NAME:
        return part
    stem, suffix = PurePosixPath(part).stem, PurePosixPath(part).suffix
    suffix = suffix if len(suffix) <= 8 else ""
    kept = os.fsencode(stem)[: _LONGEST_NAME // 2].decode("utf-8", errors="ignore")
    return f"{kept}-{_digest(part)}{suffix}"


def _digest(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:12]


def check_formats(formats: Collection[str]) -> None:
    """Raise ValueError for formats that are not in `FORMATS`."""
    if unknown := set(formats) - set(FORMATS):
        raise ValueError(
            f"There are no formats {sorted(unknown)} to save predictions in; choose from {', '.join(FORMATS)}."
        )


def check_folder(folder: str | Path, may_replace: bool) -> bool:
    """Whether a folder holds an earlier prediction.

    Args:
        may_replace: the earlier prediction may be overwritten or resumed.
    Raises:
        FileExistsError: there is an earlier prediction and `may_replace` is False, or the folder has other files.
    """
    folder = expand_home(folder)
    return check_output_folder(
        folder,
        may_replace,
        _is_prediction,
        "an earlier prediction",
        "replace it with --overwrite, or continue it with --resume",
    )


def _is_prediction(folder: Path) -> bool:
    path = folder / JOURNAL
    if path.is_file() and not path.is_symlink():
        return Journal(folder).is_ours
    # A run that was killed before its journal had its name.
    return {entry.name for entry in folder.iterdir()} <= {_OLD_DRAFT}
