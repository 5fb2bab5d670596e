"""Published checkpoints by name: downloaded and converted once, then kept in the cache.

The cache has two folders. `models/PROJECT/NAME` is a converted model, as `from_pretrained` loads it, with a record of its origin.
`downloads/PROJECT` holds files while they are transferred and converted. They have the published names, because the converted model
records the name. A file is deleted after its conversion: it would double the space, and the record has its SHA-256.
"""

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from filelock import FileLock, Timeout
from huggingface_hub import is_offline_mode

from ..common.console import make_console
from ..common.downloads import DownloadError, without_password
from ..common.output_folders import replace_file, replace_folder
from ..common.paths import cache_dir
from ..common.progress import ProgressBar, hide_library_bars
from ..common.regular_files import file_sha256, read_settings
from .errors import ConversionError
from .messages import collect_messages
from .options import MIRROR
from .published import find_published
from .published_row import Published

logger = logging.getLogger(__name__)

RECORD = "dino_hf_conversion.json"  # in the folder of a converted model
_FORMAT = 1  # of the record; higher if conversions must be made again
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_SETTINGS = ("config.json", "preprocessor_config.json")


def cached_folder(row: Published) -> Path:
    """The place of a converted checkpoint in the cache. It may not be there yet."""
    return cache_dir() / "models" / row.project / row.name


def is_cached(row: Published) -> bool:
    """Whether a converted checkpoint is in the cache and undamaged. Nothing is downloaded.

    Sizes and times of the files are compared with the record. The content of a file is read only if its time differs. If it is
    the recorded content, as in a copied cache, the new time is recorded.
    """
    folder = cached_folder(row)
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # no record, or a damaged one
        record = read_settings(folder / RECORD)
        files = record["files"]
        if record["format"] != _FORMAT or not files:
            return False
        times = {name: _time_if_same(folder / name, files[name]) for name in files}
        if None in times.values():
            return False
        if any(files[name]["time"] != time for name, time in times.items()):
            record["files"] = {name: entry | {"time": times[name]} for name, entry in files.items()}
            with suppress(OSError):  # the cache may be read-only; then the content is read at each call
                _save_record(folder, record)
        return True
    return False


def _time_if_same(path: Path, recorded: dict[str, Any]) -> int | None:
    """The time of a file that has the recorded content. None: it has another content."""
    status = path.stat()
    if status.st_size != recorded["size"]:
        return None
    is_same = status.st_mtime_ns == recorded["time"] or file_sha256(path) == recorded["sha256"]
    return status.st_mtime_ns if is_same else None


def fetch(name: str, mirror: str | None = None) -> Path:
    """The folder of a published checkpoint. It is downloaded and converted if it is not in the cache.

    Several processes and threads may call this at once: one downloads, the others wait.

    Args:
        name: PROJECT/NAME, such as "detrex/dino_r50_4scale_24ep".
        mirror: address of a folder that has the file as PROJECT/FILE. None: the environment variable DINO_HF_MIRROR, or else the
            addresses of the project.
    Raises:
        ConversionError: there is no checkpoint of this name, its backbone is not supported, or the file is not this checkpoint.
        OSError: the file cannot be downloaded or written. The message tells how to download it by hand.
    """
    row = find_published(name)
    folder = cached_folder(row)
    if is_cached(row):
        return folder
    _check_supported(row)
    file = _downloads(row) / row.file
    if not file.is_file():
        _addresses(row, mirror)  # raises before anything is written
    with _only_one(row):
        if is_cached(row):
            return folder
        address = _download(row, mirror, file)
        _keep(row, file, address)
        file.unlink()
    return folder


def store(file: Path, name: str) -> Path:
    """Convert a file that was downloaded by hand, and keep the result in the cache. Then `fetch` finds it.

    Args:
        file: is not changed.
        name: PROJECT/NAME of the published checkpoint in this file.
    Returns:
        the folder in the cache.
    Raises:
        ConversionError, OSError: see `fetch`.
    """
    row = find_published(name)
    _check_supported(row)
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}.")
    is_hash_known = row.sha256 and row.sha256_applies(file.name)
    if is_hash_known and not (found := file_sha256(file)).startswith(row.sha256):
        raise ConversionError(
            f"{file} is not {row.title}: its SHA-256 begins with {found[:8]}, not with {row.sha256[:8]}. Download it again."
        )
    with _only_one(row):
        _keep(row, file, row.url)
    return cached_folder(row)


def _check_supported(row: Published) -> None:
    if not row.is_supported:
        raise ConversionError(
            f"{row.title} has the backbone {row.backbone}, which is not supported. `dino-hf models` lists the others."
        )


def by_hand(row: Published) -> str:
    """A sentence that tells how to download a file by hand."""
    return f"Download {row.file} from {row.url} yourself, and run `dino-hf convert {row.file} --published {row.title}`."


def _addresses(row: Published, mirror: str | None) -> list[str]:
    """Addresses of the file of a checkpoint, in the order to try them.

    Raises:
        OSError: nothing may or can be downloaded.
    """
    if is_offline_mode():
        raise DownloadError(f"{row.title} is not in the cache, and offline mode is on. {by_hand(row)}")
    mirror = mirror or os.environ.get(MIRROR)
    if mirror:
        _check_mirror(mirror)
        return [f"{mirror.rstrip('/')}/{row.project}/{quote(row.file)}"]
    if not row.addresses:
        raise DownloadError(f"{row.title} can only be downloaded with a browser. {by_hand(row)} Then this name works.")
    return list(row.addresses)


def _check_mirror(mirror: str) -> None:
    """Raise DownloadError if the address of a mirror is not valid. The message never has a password."""
    try:
        parts = urlsplit(mirror)
        has_path_only = not (parts.query or parts.fragment)  # the name of the file is appended
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and has_path_only
    except ValueError:  # the port is no number, or a bracket is missing
        is_valid = False
    if not is_valid:
        shown = "" if set("@?") & set(mirror) else f" {mirror!r:.200}"  # it may have a password or a token
        raise DownloadError(
            f"The mirror{shown} is not an address such as http://mirror:8000 or https://user:password@mirror."
        )


def _downloads(row: Published) -> Path:
    return cache_dir() / "downloads" / row.project


@contextmanager
def _only_one(row: Published) -> Iterator[None]:
    """Wait until no other process or thread works on a checkpoint."""
    folder = _downloads(row)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{row.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.warning("Another process downloads or converts %s. Waiting for it.", row.title)
            lock.acquire()
    except OSError as error:
        raise type(error)(
            f"The cache {folder} cannot be written ({error.strerror or error}); set DINO_HF_CACHE to another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _download(row: Published, mirror: str | None, file: Path) -> str:
    """Download the file of a checkpoint from the first address that gives it.

    Returns:
        the address; the published one if an earlier process, which was stopped, has downloaded the file.
    """
    if file.is_file():
        return row.url
    # Imported here: requests takes a third of a second, which a cached checkpoint need not wait for.
    from ..common.file_downloads import download_file

    failures = []
    for address in _addresses(row, mirror):
        shown = without_password(address)
        console = make_console(stderr=True)
        console.print(f"Downloading {row.title} from {shown}", soft_wrap=True, highlight=False)
        try:
            with ProgressBar(console) as bar:
                download_file(
                    address,
                    file,
                    sha256=row.sha256,
                    size=row.size,
                    spare=1.0,  # the converted model is as large as the file
                    progress=lambda done, total: bar("MB", round(done / 1e6), total and round(total / 1e6)),
                )
            return address
        except DownloadError as error:
            failures.append(f"{urlsplit(shown).netloc if shown == row.url else shown}: {error}.")
    raise DownloadError(f"{row.title} cannot be downloaded. {' '.join(failures)} {by_hand(row)} Then this name works.")


def _keep(row: Published, file: Path, address: str) -> None:
    """Convert a file, check the result, and put it into the cache."""
    # Imported here: `is_cached` must not wait for torch.
    import torch

    from .convert_checkpoint import convert
    from .verify_conversion import verify

    start, folder = time.monotonic(), cached_folder(row)
    console = make_console(stderr=True)
    console.print(f"Converting and checking {row.title}", soft_wrap=True, highlight=False)
    with replace_folder(folder) as new:
        try:
            # Building a model draws random numbers. The caller's must be the same with and without a conversion.
            with hide_library_bars(), collect_messages() as report, torch.random.fork_rng(devices=[]):
                model = convert(file, new, published=row.title)
                converted_from = model.config.provenance["converted_from"]
                del model
                if "published" not in converted_from:  # it has other classes
                    raise ConversionError(f"It is not {row.title}. {' '.join(report)}")
                if not verify(file, new, show_detections=False, published=row.title):
                    raise ConversionError(f"The result does not compute the same as the file. {' '.join(report)}")
        except ConversionError as error:
            if not isinstance(error.__cause__, OSError):  # OSError: for example, the disk is full
                _discard(row, file)
            raise ConversionError(f"{row.title} was not converted. {error}") from error
        _write_record(new, row, address, converted_from, report)
    console.print(f"Ready in {folder} after {time.monotonic() - start:.0f} s.", soft_wrap=True, highlight=False)


def _discard(row: Published, file: Path) -> None:
    """Delete a file in the folder of downloads. A user's own file stays."""
    if file.parent == _downloads(row):
        file.unlink()


def _write_record(folder: Path, row: Published, address: str, converted_from: dict, report: list[str]) -> None:
    paths = [path for pattern in (*_SETTINGS, *_WEIGHTS) for path in sorted(folder.glob(pattern))]
    files = {}
    for path in paths:
        status = path.stat()
        files[path.name] = {"size": status.st_size, "time": status.st_mtime_ns, "sha256": file_sha256(path)}
    record = {
        "format": _FORMAT,
        "name": row.title,
        "address": without_password(address),
        "file": row.file,
        "sha256": converted_from["sha256"],
        "dino_hf": version("dino_hf"),
        "files": files,
        "report": report,
    }
    _save_record(folder, record)


def _save_record(folder: Path, record: dict[str, Any]) -> None:
    with replace_file(folder / RECORD) as scratch:
        scratch.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
