"""Images from addresses, within limits of time and size for the whole transfer."""

import string
import threading
from http.client import HTTPException
from urllib.parse import quote
from urllib.request import Request, urlopen

LARGEST_DOWNLOAD = 100 * 2**20  # bytes
_TIMEOUT = 20.0  # seconds without an answer
_LONGEST = 30.0  # seconds for a whole transfer
_PIECE = 2**16


def download(address: str) -> bytes:
    """The content at an http or https address.

    Raises:
        OSError, ValueError: it cannot be fetched, takes more than 30 seconds, or has more than 100 MiB.
    """
    found: list[bytes | BaseException] = []
    stop = threading.Event()
    # In a thread of its own: a server that sends its header letter by letter cannot be waited for in pieces.
    thread = threading.Thread(target=_try_fetch, args=(address, found, stop), daemon=True)
    thread.start()
    thread.join(_LONGEST)
    stop.set()
    if not found:
        raise ValueError(f"It was not fetched whole within {_LONGEST:.0f} seconds; download it yourself.")
    (result,) = found
    if isinstance(result, BaseException):
        raise result
    return result


def _try_fetch(address: str, found: list, stop: threading.Event) -> None:
    try:
        found.append(_fetch(address, stop))
    except HTTPException as error:  # an answer that is not HTTP
        found.append(ValueError(f"Its server does not answer in HTTP, {type(error).__name__}."))
    except Exception as error:  # it is raised where the content is waited for
        found.append(error)


def _fetch(address: str, stop: threading.Event) -> bytes:
    address = quote(address, safe=string.punctuation)  # as browsers do with spaces and letters of other alphabets
    pieces, num_bytes = [], 0
    with urlopen(Request(address, headers={"User-Agent": "dino_hf"}), timeout=_TIMEOUT) as answer:
        while not stop.is_set() and (piece := answer.read1(_PIECE)):
            pieces.append(piece)
            num_bytes += len(piece)
            if num_bytes > LARGEST_DOWNLOAD:
                raise ValueError(f"It is larger than {LARGEST_DOWNLOAD >> 20} MiB; download it yourself.")
        if answer.length:
            raise ValueError(f"Its transfer broke off after {num_bytes} bytes.")
    return b"".join(pieces)
