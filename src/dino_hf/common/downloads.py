"""Download images, with limits on the time and size of the whole transfer; and what other downloads share."""

import ipaddress
import socket
import string
import threading
from collections.abc import Callable
from http.client import HTTPException
from typing import TypeVar
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

LARGEST_DOWNLOAD = 100 * 2**20  # bytes
_TIMEOUT = 20.0  # seconds without any data
_LONGEST = 30.0  # seconds for a whole transfer
_PIECE = 2**16
T = TypeVar("T")


def download(address: str) -> bytes:
    """The content at an http or https address.

    Raises:
        OSError, ValueError: the transfer fails, takes more than 30 seconds or has more than 100 MiB; or a public server redirects
            to a server in the local network.
    """
    stop = threading.Event()
    try:
        return within(_LONGEST, lambda: _fetch(address, stop))
    except OutOfTime:
        raise ValueError(
            f"It was not fetched completely within {_LONGEST:.0f} seconds; download it yourself."
        ) from None
    except HTTPException as error:  # the answer is not HTTP
        raise ValueError(f"Its server does not answer in HTTP, {type(error).__name__}.") from error
    finally:
        stop.set()


class DownloadError(OSError):
    """A file cannot be downloaded. The message is the reason, without a full stop."""


def without_password(address: str) -> str:
    """A valid address without the user name and password that it may have."""
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


class OutOfTime(Exception):
    """A function did not return in time."""


def within(seconds: float, function: Callable[[], T]) -> T:
    """Call a function in a thread, and return its result or raise its error.

    For servers that send their header byte by byte: reading a header has no limit on the total time.

    Raises:
        OutOfTime: the function takes longer. Its thread goes on, and does not keep the process alive.
    """
    found: list[tuple[bool, T | BaseException]] = []

    def run() -> None:
        try:
            found.append((True, function()))
        except BaseException as error:  # raised below, in the thread of the caller
            found.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not found:
        raise OutOfTime
    ((is_result, result),) = found
    if not is_result:
        raise result
    return result


def _fetch(address: str, stop: threading.Event) -> bytes:
    address = quote(address, safe=string.punctuation)  # escape spaces and letters of other alphabets, as browsers do
    pieces, num_bytes = [], 0
    request = Request(address, headers={"User-Agent": "dino_hf"})
    try:
        opened = build_opener(_Redirects).open(request, timeout=_TIMEOUT)
    except HTTPError as error:
        error.close()  # it holds the connection
        raise
    with opened as answer:
        while not stop.is_set() and (piece := answer.read1(_PIECE)):
            pieces.append(piece)
            num_bytes += len(piece)
            if num_bytes > LARGEST_DOWNLOAD:
                raise ValueError(f"It is larger than {LARGEST_DOWNLOAD >> 20} MiB; download it yourself.")
        if answer.length:
            raise ValueError(f"Its transfer broke off after {num_bytes} bytes.")
    return b"".join(pieces)


class _Redirects(HTTPRedirectHandler):
    """Follows redirects to other servers, but not to files, and not from a public server to one in the local network.

    Servers in the local network may trust this machine.
    """

    def redirect_request(self, request, answer, code, message, headers, address):
        target, refusal = urlsplit(address), None
        if target.scheme not in ("http", "https"):
            refusal = f"It leads to {address!r:.200}, which is not a web address."
        elif is_local(target.hostname or "") and not is_local(request.origin_req_host):
            refusal = f"It leads to {target.hostname!r:.200} in the local network, which is not followed."
        if refusal:
            answer.close()  # it holds the connection
            raise ValueError(refusal)
        return super().redirect_request(request, answer, code, message, headers, address)


def is_local(host: str) -> bool:
    """Whether a host has an address that is not public. False if its addresses cannot be found."""
    try:
        found = socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        return False
    return any(not ipaddress.ip_address(entry[4][0].partition("%")[0]).is_global for entry in found)
