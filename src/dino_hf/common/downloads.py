"""Download images, with limits on the time and size of the whole transfer."""

import ipaddress
import socket
import string
import threading
from http.client import HTTPException
from urllib.parse import quote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

LARGEST_DOWNLOAD = 100 * 2**20  # bytes
_TIMEOUT = 20.0  # seconds without any data
_LONGEST = 30.0  # seconds for a whole transfer
_PIECE = 2**16


def download(address: str) -> bytes:
    """The content at an http or https address.

    Raises:
        OSError, ValueError: the transfer fails, takes more than 30 seconds or has more than 100 MiB; or a public server redirects
            to a server in the local network.
    """
    found: list[bytes | BaseException] = []
    stop = threading.Event()
    # A separate thread, because a server can send its header byte by byte, and reading a header has no total time limit.
    thread = threading.Thread(target=_try_fetch, args=(address, found, stop), daemon=True)
    thread.start()
    thread.join(_LONGEST)
    stop.set()
    if not found:
        raise ValueError(f"It was not fetched completely within {_LONGEST:.0f} seconds; download it yourself.")
    (result,) = found
    if isinstance(result, BaseException):
        raise result
    return result


def _try_fetch(address: str, found: list, stop: threading.Event) -> None:
    try:
        found.append(_fetch(address, stop))
    except HTTPException as error:  # the answer is not HTTP
        found.append(ValueError(f"Its server does not answer in HTTP, {type(error).__name__}."))
    except Exception as error:  # `download` raises it
        found.append(error)


def _fetch(address: str, stop: threading.Event) -> bytes:
    address = quote(address, safe=string.punctuation)  # escape spaces and letters of other alphabets, as browsers do
    pieces, num_bytes = [], 0
    request = Request(address, headers={"User-Agent": "dino_hf"})
    with build_opener(_Redirects).open(request, timeout=_TIMEOUT) as answer:
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
        target = urlsplit(address)
        if target.scheme not in ("http", "https"):
            raise ValueError(f"It leads to {address!r:.200}, which is not a web address.")
        if is_local(target.hostname or "") and not is_local(request.origin_req_host):
            raise ValueError(f"It leads to {target.hostname!r:.200} in the local network, which is not followed.")
        return super().redirect_request(request, answer, code, message, headers, address)


def is_local(host: str) -> bool:
    """Whether a host has an address that is not public. False if its addresses cannot be found."""
    try:
        found = socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        return False
    return any(not ipaddress.ip_address(entry[4][0].partition("%")[0]).is_global for entry in found)
