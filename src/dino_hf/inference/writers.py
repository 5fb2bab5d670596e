"""What is saved of predictions: a journal that grows with each image, pictures, videos, and the formats of other tools."""

import csv
import json
import os
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath

from .formats import save_picture, write_coco, yolo_lines
from .journal import JOURNAL, MEMORY, as_line, describe, identity, read_journal
from .pictures import draw_detections
from .predictor import Detections
from .sources import Picture, Source, unused
from .videos import VideoWriter, video_info

FORMATS = ("images", "coco", "csv", "yolo")
_COCO, _CSV, _CLASSES = "predictions.json", "predictions.csv", "classes.txt"
_CSV_COLUMNS = ("file", "frame", "time", "label", "category_id", "score", "x0", "y0", "x1", "y1")
_DRAWN_AS_THEY_ARE = (".jpg", ".jpeg", ".png")


class PredictionFolder:
    """Results in a folder, written as they come. A context manager.

        predictions.jsonl   always: what the run depends on, then a line for each image or frame
        images/, videos/    "images": drawn, under the names of the sources, videos as .mp4
        predictions.csv     "csv": a row for each detection, box in pixels
        labels/             "yolo": a text file for each image, and for each frame in a folder of the video's name; its lines are
                            "class x y width height score", centre and size relative to the image, and the class is the number
                            of a line in classes.txt, from 0
        predictions.json    "coco", at the end: images, categories and annotations with scores. Image ids count from 1, in the
                            order of prediction; the annotations alone are what `COCO.loadRes` takes.

    Args:
        settings: what the results depend on; one that resumes must have the same.
        categories: class index -> original category id and name.
        formats: those of `FORMATS` that are wanted.
        every: each how many-th frame of a video comes; the written one has as many times less frames per second.
        overwrite: delete what an earlier prediction left in the folder.
        resume: keep it, and go on. A video that had not come to its end begins anew.
    Raises:
        FileExistsError: the folder has files, and neither is wanted, or they are not of an earlier prediction.
        ValueError: an unknown format; both are wanted; the earlier prediction had other settings, or its journal is damaged.
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
            raise ValueError("overwrite deletes what resume goes on with; choose one of them.")
        self.folder, self.formats, self.every = Path(folder).expanduser(), frozenset(formats), every
        self.settings, self.categories = json.loads(json.dumps(settings)), dict(categories)
        self._paths: dict[tuple[str, str], Path] = {}
        self._taken: set[str] = set()
        self._video: tuple[Source, VideoWriter] | None = None
        self._finished: set[tuple[str, str]] = set()
        has_journal = check_folder(self.folder, overwrite or resume)
        self._is_replaced = has_journal and overwrite
        if self._is_replaced:
            deque(self._records(), maxlen=0)  # a damaged journal is found before anything is deleted
        if has_journal and resume:
            self._finished = self._read_finished()

    def __enter__(self) -> "PredictionFolder":
        """Nothing is written or deleted before."""
        if self._is_replaced:
            self._delete_earlier()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._open_files()
        return self

    def __exit__(self, *error) -> None:
        self.close()

    @property
    def has_finished(self) -> bool:
        """Whether an earlier prediction had anything."""
        return bool(self._finished)

    def is_finished(self, source: Source) -> bool:
        """Whether an earlier prediction had all of it. Of an image in memory nobody knows whether it is the same."""
        return (source.name, describe(source)) in self._finished

    def add(self, picture: Picture, detections: Detections) -> None:
        """Write an image, or the next frame of a video. The journal comes last: what it names is there."""
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
                for box, score, label in zip(*(values.tolist() for values in detections), strict=True)
            ],
        }
        if "images" in self.formats:
            self._draw(picture, detections)
        if "yolo" in self.formats:
            path = self._path("labels", picture.source.name, picture.frame)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(yolo_lines(detections, picture.image.size))
        if self._table is not None:
            self._write_rows(record)
            self._table.flush()
        self._write_line(record)

    def finish(self, source: Source) -> None:
        """A video has come to its end."""
        self._close_video()
        self._write_line({"file": source.name, "origin": describe(source), "end": True})

    def close(self) -> None:
        """Also of a run that was broken off: what it has is complete."""
        self._close_video()
        self._journal.close()
        if self._table is not None:
            self._table.close()
        if "coco" in self.formats:
            write_coco(self.folder / _COCO, self._records(), self.categories)

    def _open_files(self) -> None:
        """The journal with what is kept of the earlier one, and the table that follows from it."""
        new = self.folder / f".{JOURNAL}"
        with open(new, "w", encoding="utf-8") as file:
            file.write(as_line({"settings": self.settings}))
            kept = self._records(with_ends=True) if self._finished else ()
            file.writelines(as_line(record) for record in kept if identity(record) in self._finished)
        os.replace(new, self.folder / JOURNAL)
        self._journal = open(self.folder / JOURNAL, "a", encoding="utf-8")  # noqa: SIM115  for the whole run
        self._table = None
        if "csv" in self.formats:
            # utf-8-sig: spreadsheets take a file without its mark for another encoding
            self._table = open(self.folder / _CSV, "w", encoding="utf-8-sig", newline="")  # noqa: SIM115
            csv.writer(self._table).writerow(_CSV_COLUMNS)
        if "yolo" in self.formats:
            names = [self.categories.get(index, (index, "-"))[1] for index in range(max(self.categories) + 1)]
            text = "".join(f"{' '.join(name.split())}\n" for name in names)
            (self.folder / _CLASSES).write_text(text, encoding="utf-8")
        for record in self._records():
            self._paths_of(record)  # names that later ones must not take
            if self._table is not None:
                self._write_rows(record)

    def _records(self, with_ends: bool = False) -> Iterator[dict]:
        """Of the journal, without its first line."""
        records = read_journal(self.folder / JOURNAL)
        next(records)
        return (record for record in records if with_ends or "end" not in record)

    def _read_finished(self) -> set[tuple[str, str]]:
        earlier = next(read_journal(self.folder / JOURNAL))["settings"]
        for name in {**earlier, **self.settings}:
            if earlier.get(name) != self.settings.get(name):
                raise ValueError(
                    f"{self.folder} was predicted with {name}={earlier.get(name)!r}, not {self.settings.get(name)!r}; resume with "
                    "the same, overwrite it, or choose another folder."
                )
        return {
            identity(record)
            for record in self._records(with_ends=True)
            if record.get("end") or (record["frame"] is None and record["origin"] != MEMORY)
        }

    def _delete_earlier(self) -> None:
        """Files that the journal names, no others."""
        for record in self._records():
            for path in self._paths_of(record):
                path.unlink(missing_ok=True)
                for parent in path.relative_to(self.folder).parents:
                    with suppress(OSError):  # other files are in it
                        if parent.name:
                            (self.folder / parent).rmdir()
        for name in (_COCO, _CSV, _CLASSES, JOURNAL):
            (self.folder / name).unlink(missing_ok=True)
        self._paths.clear()
        self._taken.clear()

    def _paths_of(self, record: dict) -> list[Path]:
        kinds = ("images" if record["frame"] is None else "videos", "labels")
        return [self._path(kind, record["file"], record["frame"]) for kind in kinds]

    def _path(self, kind: str, name: str, frame: int | None) -> Path:
        """In the folder of the kind, under the name of the source, with another suffix where the kind needs one; "a.jpg" and
        "a.png" have labels/a.txt and labels/a.png.txt."""
        if kind == "labels" and frame is not None:
            return self.folder / kind / name / f"{frame:06}.txt"
        if (kind, name) not in self._paths:
            suffix = {"labels": ".txt", "videos": ".mp4", "images": ".jpg"}[kind]
            path = PurePosixPath(kind, name)
            if kind != "images" or path.suffix.lower() not in _DRAWN_AS_THEY_ARE:
                short = path.with_suffix(suffix)
                path = path.with_name(path.name + suffix) if str(short).lower() in self._taken else short
            self._paths[kind, name] = self.folder / unused(str(path), self._taken)
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
        self._video[1].write(drawn)

    def _close_video(self) -> None:
        if self._video is not None:
            (_, writer), self._video = self._video, None
            writer.close()

    def _write_line(self, record: dict) -> None:
        self._journal.write(as_line(record))
        self._journal.flush()

    def _write_rows(self, record: dict) -> None:
        place = [record["file"], record["frame"], record["time"]]
        csv.writer(self._table).writerows(
            [*place, found["label"], found["category_id"], found["score"], *found["box"]] for found in record["objects"]
        )


def check_formats(formats: Collection[str]) -> None:
    if unknown := set(formats) - set(FORMATS):
        raise ValueError(
            f"There are no formats {sorted(unknown)} to save predictions in; known are {', '.join(FORMATS)}."
        )


def check_folder(folder: str | Path, is_wanted: bool) -> bool:
    """Whether an earlier prediction is in a folder.

    Args:
        is_wanted: to be overwritten or resumed.
    Raises:
        FileExistsError: it is not wanted, or the folder has other files.
    """
    folder = Path(folder).expanduser()
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    if not nearest.is_dir():
        raise FileExistsError(f"{nearest} is a file; choose a folder to save predictions in.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    if not (folder / JOURNAL).is_file():
        raise FileExistsError(
            f"{folder} has files that are not of an earlier prediction; choose a new or empty folder to save in."
        )
    if not is_wanted:
        raise FileExistsError(
            f"{folder} has an earlier prediction; choose another folder, or overwrite it, or resume it."
        )
    return True
