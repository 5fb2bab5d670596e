"""Download one large file. An interrupted transfer is continued; the file appears complete and checked, or not at all."""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import urljoin, urlsplit

import requests
from urllib3.exceptions import ConnectTimeoutError, HTTPError, InvalidHeader, NewConnectionError
from urllib3.util import Retry

from .downloads import DownloadError, OutOfTime, is_local, within, without_password
from .output_folders import replace_file
from .regular_files import file_sha256, read_settings
from .text import first_line, size_text

logger = logging.getLogger(__name__)

LARGEST_FILE = 20 * 2**30  # bytes; the largest published checkpoints have 5 GiB, with the state of the optimizer
_CONNECT, _READ = 15.0, 30.0  # seconds to connect, and without any data
_FIRST_ANSWER = 60.0  # seconds until the header of the file is complete, with all redirects
_STALL_SECONDS, _STALL_BYTES = 60.0, 2**17  # a connection that brings fewer bytes in this time is given up
_MOST_FAILURES = 4  # in a row, each with less progress than _PROGRESS bytes
_PROGRESS = 2**20
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 120.0  # seconds before another attempt
_MOST_REDIRECTS = 10
_PIECE = 2**20  # bytes
_RETRIED = {408, 425, 429, 500, 502, 503, 504}
_NO_CONNECTION = (NewConnectionError, ConnectTimeoutError)

# Called with the number of received bytes, and with the total if it is known.
Progress = Callable[[int, int | None], None]


class _Interrupted(Exception):
    """The transfer broke off, and another attempt may succeed. The message is the reason, without a full stop.

    Attributes:
        wait: seconds that the server asks to wait.
    """

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


class _Unreachable(_Interrupted):
    """No connection to the server could be made."""


def download_file(
    address: str,
    path: Path,
    *,
    sha256: str = "",
    size: int | None = None,
    spare: float = 0.0,
    progress: Progress | None = None,
) -> str:
    """Download the file at an http or https address to `path`.

    The bytes first come to a file beside `path`, with ".part" appended to its name. If it is there from an interrupted transfer and
    the server still has the same file, only the missing bytes are transferred. Proxies are taken from the environment. A broken
    transfer is tried again, after the time that the server asks for, or after 1, 2, 4 seconds. If the first connection cannot be
    made, there is no second attempt. Only one process at a time may download to a path.

    Args:
        sha256: start of the SHA-256 of the file, in lower-case hexadecimal digits.
        size: size of the file, in bytes.
        spare: disk space that must be left free, as a multiple of the size of the file.
        progress: called after each piece.
    Returns:
        the SHA-256 of the file, in hexadecimal digits.
    Raises:
        DownloadError: the server does not give the file, it is not the expected one, or the disk has too little space. A wrong file
            is deleted.
        OSError: the file cannot be written.
    """
    part = _Part(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    num_failures = 0  # in a row; never 0 again after the first failure
    while True:
        before = part.size
        try:
            _transfer(address, part, size, spare, progress or _silent)
            break
        except _Interrupted as failure:
            if isinstance(failure, _Unreachable) and num_failures == 0:  # probably there is no network
                raise DownloadError(str(failure)) from failure
            num_failures = 1 if part.size - before >= _PROGRESS else num_failures + 1
            if num_failures == _MOST_FAILURES:
                raise DownloadError(f"{failure}, at {num_failures} attempts") from failure
            wait = _FIRST_WAIT * 2 ** (num_failures - 1) if failure.wait is None else failure.wait
            wait = min(wait, _LONGEST_WAIT)
            logger.warning("The download of %s stopped: %s. It continues in %.0f s.", path.name, failure, wait)
            time.sleep(wait)
    found = file_sha256(part.path)
    if not found.startswith(sha256):
        part.delete()
        raise DownloadError(
            f"the file has the SHA-256 {found[: len(sha256)]}..., where {sha256}... is expected; it was deleted"
        )
    part.finish()
    return found


def _silent(done: int, total: int | None) -> None:
    pass


class _Part:
    """The part of a file that is here. A record beside it names the address and the version of the file there."""

    def __init__(self, path: Path):
        self.path, self.final = path.with_name(f"{path.name}.part"), path
        self._record = path.with_name(f"{path.name}.part.json")

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def version(self, address: str) -> str | None:
        """The version of the file when this part came from it. None: unknown, or the part is from another address."""
        with suppress(OSError, ValueError, LookupError, TypeError):  # no record, or a damaged one
            record = read_settings(self._record)
            if record["address"] == without_password(address) and isinstance(record["version"], str):
                return record["version"]
        return None

    def restart(self, address: str, version: str | None) -> BinaryIO:
        """Open an empty part for writing."""
        file = self.path.open("wb")
        with replace_file(self._record) as scratch:
            scratch.write_text(json.dumps({"address": without_password(address), "version": version}), encoding="utf-8")
        return file

    def delete(self) -> None:
        self.path.unlink(missing_ok=True)
        self._record.unlink(missing_ok=True)

    def finish(self) -> None:
        """Give the complete file its name."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        self.path.replace(self.final)
        self._record.unlink(missing_ok=True)


class _Answer(NamedTuple):
    """Facts in the header of an answer."""

    start: int  # number of bytes of the part that are kept
    total: int | None  # bytes of the whole file
    version: str | None  # a text that changes with the file


def _transfer(address: str, part: _Part, size: int | None, spare: float, progress: Progress) -> None:
    """Transfer the missing bytes of a part.

    Raises:
        _Interrupted: the transfer broke off. The received bytes are kept.
        DownloadError, OSError: another attempt is useless.
    """
    start, version = part.size, part.version(address)
    headers = {"User-Agent": "dino_hf", "Accept-Encoding": "identity"}
    if start and version:
        headers |= {"Range": f"bytes={start}-", "If-Range": version}
    with requests.Session() as session:
        response = _open(session, address, headers)
        with response:
            found = _read_header(response, part, start, version)
            if found is None:  # the part is already complete
                return
            if size is not None and found.total not in (None, size):
                raise DownloadError(f"the file has {found.total:,} bytes, where {size:,} are expected")
            _check_space(part.path.parent, found, spare)
            limit = found.total or size or LARGEST_FILE
            if limit > LARGEST_FILE:
                raise DownloadError(f"the file has {limit:,} bytes, and at most {LARGEST_FILE:,} are read")
            with part.path.open("ab") if found.start else part.restart(address, found.version) as file:
                _read_body(response, file, part, found, limit, progress)
    if part.size != (found.total or size or part.size):
        raise _Interrupted(f"the transfer broke off after {part.size:,} of {limit:,} bytes")


def _open(session: requests.Session, address: str, headers: dict[str, str]) -> requests.Response:
    """Request a file, and follow redirects.

    Raises:
        _Interrupted, DownloadError: the server cannot be reached, or does not give the file.
    """

    def get(where: str) -> requests.Response:
        return session.get(where, headers=headers, stream=True, allow_redirects=False, timeout=(_CONNECT, _READ))

    def follow() -> requests.Response:
        where = address
        for _ in range(_MOST_REDIRECTS):
            response = get(where)
            if not response.is_redirect:
                return response
            response.close()
            target = urljoin(where, response.headers["location"])
            _check_redirect(where, target)
            where = target
        raise DownloadError(f"the server redirects more than {_MOST_REDIRECTS} times")

    try:
        response = within(_FIRST_ANSWER, follow)
    except OutOfTime:
        raise _Interrupted(f"the server did not answer within {_FIRST_ANSWER:.0f} seconds") from None
    except requests.exceptions.SSLError as error:
        raise DownloadError(f"no secure connection to the server is possible ({_reason(error)})") from error
    except (requests.ConnectionError, requests.Timeout, HTTPError) as error:
        kind = _Unreachable if isinstance(_innermost(error), _NO_CONNECTION) else _Interrupted
        raise kind(f"the server cannot be reached ({_reason(error)})") from error
    except requests.RequestException as error:  # a wrong address, or an answer that is not HTTP
        raise DownloadError(f"the address cannot be requested ({_reason(error)})") from error
    if response.status_code in (200, 206, 416):
        return response
    response.close()
    answer = f"the server answers {response.status_code} {response.reason or ''}".strip()
    if response.status_code in _RETRIED:
        raise _Interrupted(answer, _asked_wait(response))
    raise DownloadError(answer)


def _check_redirect(origin: str, target: str) -> None:
    """Check that a redirect may be followed.

    Servers in the local network may trust this machine, so a public server must not lead to them. Without https, others on the way
    could exchange the file.

    Raises:
        DownloadError: it may not.
    """
    host = urlsplit(target).hostname or ""
    if urlsplit(target).scheme not in ("http", "https") or not host:
        raise DownloadError(f"the server leads to {target!r:.200}, which is not a web address")
    if urlsplit(origin).scheme == "https" and urlsplit(target).scheme == "http":
        raise DownloadError(f"the server leads from https to http, {target!r:.200}, which is not followed")
    if is_local(host) and not is_local(urlsplit(origin).hostname or ""):
        raise DownloadError(f"the server leads to {host!r:.200} in the local network, which is not followed")


def _asked_wait(response: requests.Response) -> float | None:
    value = response.headers.get("Retry-After")
    with suppress(InvalidHeader, OverflowError, ValueError):
        return None if value is None else max(0.0, float(Retry().parse_retry_after(value)))
    return None


def _read_header(response: requests.Response, part: _Part, start: int, version: str | None) -> _Answer | None:
    """Read the header of an answer with status 200, 206 or 416. None: the part is already complete.

    Args:
        start, version: size and version of the part.
    """
    header = response.headers
    found_version = header.get("ETag") or header.get("Last-Modified")
    if found_version is not None and found_version.startswith("W/"):  # two files may share a weak tag
        found_version = header.get("Last-Modified")
    if response.status_code != 416:
        if header.get("Content-Encoding", "identity").lower() != "identity":
            raise DownloadError(f"the server sends the file compressed ({header['Content-Encoding']!r:.40})")
        if header.get("Content-Type", "").lower().startswith("text/html"):
            raise DownloadError("the server answers with a web page instead of the file")
    if response.status_code == 200:
        return _Answer(0, _number(header.get("Content-Length")), found_version)
    first, total = _read_range(header.get("Content-Range", ""))
    if response.status_code == 416 and total == start:
        return None
    if response.status_code == 206 and first == start and found_version in (None, version):
        return _Answer(start, total, version)
    part.delete()
    raise _Interrupted("the server does not have the rest of the part that is here, so it starts again", wait=0.0)


def _read_range(text: str) -> tuple[int | None, int | None]:
    """ "bytes 5-9/10" -> the first byte and the total: 5, 10. None stands for unknown numbers."""
    found = re.fullmatch(r"bytes (?:(\d{1,18})-\d{1,18}|\*)/(?:(\d{1,18})|\*)", text.strip())
    return (None, None) if found is None else (_number(found[1]), _number(found[2]))


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"[0-9]{1,18}", text) else None


def _check_space(folder: Path, found: _Answer, spare: float) -> None:
    if found.total is None:
        return
    needed, free = found.total - found.start + int(spare * found.total), shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadError(f"{size_text(needed)} are needed in {folder}, and only {size_text(free)} are free")


def _read_body(
    response: requests.Response, file: BinaryIO, part: _Part, found: _Answer, limit: int, progress: Progress
) -> None:
    """Append the body of an answer to the opened file of a part. If it has more than `limit` bytes, the part is deleted."""
    done, window_start, window_bytes = found.start, time.monotonic(), 0
    progress(done, found.total)
    while True:
        try:
            piece = response.raw.read1(_PIECE, decode_content=False)
        except (HTTPError, OSError) as error:
            raise _Interrupted(f"the transfer broke off after {done:,} bytes ({_reason(error)})") from error
        if not piece:
            return
        done += len(piece)
        if done > limit:
            part.delete()
            raise DownloadError(f"the server sends more than {limit:,} bytes")
        file.write(piece)
        progress(done, found.total)
        window_bytes += len(piece)
        if time.monotonic() - window_start > _STALL_SECONDS:
            if window_bytes < _STALL_BYTES:
                raise _Interrupted(f"only {window_bytes:,} bytes came within {_STALL_SECONDS:.0f} seconds")
            window_start, window_bytes = time.monotonic(), 0


def _innermost(error: BaseException) -> BaseException:
    """The innermost cause of an error: requests and urllib3 wrap errors several times."""
    while (inner := getattr(error, "reason", None) or next(iter(error.args), None)) and isinstance(inner, Exception):
        error = inner
    return error


def _reason(error: BaseException) -> str:
    """Type and first line of the innermost cause."""
    cause = _innermost(error)
    return f"{type(cause).__name__}, {first_line(cause, 150)}"
