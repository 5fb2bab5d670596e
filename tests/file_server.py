"""A file server on the loopback interface whose answers tests can spoil, one request after another."""

import http.server
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

MOST_REQUESTS = 50
_ENDLESS = 2**26  # bytes; more than any limit of a test
_LONGEST = 20.0  # seconds for one answer


class FileServer:
    """Serves bytes by path, with ranges.

    Attributes:
        files: path such as "/detrex/toy.pth" -> content.
        plans: how to spoil the next requests, in order. An empty list: answer all correctly. See `_Handler.do_GET`.
        requests: path and headers of each request.
        tag: ETag of all files. None: no ETag.
        has_ranges: whether ranges are given; if not, whole files are sent.
    """

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.plans: list[tuple] = []
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.tag: str | None = '"one"'
        self.has_ranges = True
        self.address = ""

    @property
    def ranges(self) -> list[str | None]:
        """The range of each request."""
        return [headers.get("Range") for _, headers in self.requests]


@contextmanager
def serve() -> Iterator[FileServer]:
    server = FileServer()

    class Handler(_Handler):
        shared = server

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    server.address = f"http://127.0.0.1:{listening.server_port}"
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listening.shutdown()
        listening.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    shared: FileServer

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        server = self.shared
        server.requests.append((self.path, dict(self.headers)))
        self.close_connection = True
        if len(server.requests) > MOST_REQUESTS:
            self.send_error(500, "too many requests for a test")
            return
        plan = server.plans.pop(0) if server.plans else ("right",)
        with suppress(BrokenPipeError, ConnectionResetError):  # the client had enough
            getattr(self, f"_{plan[0]}")(*plan[1:])

    def end_headers(self) -> None:
        self.send_header("Connection", "close")
        super().end_headers()

    def _right(self, cut: int | None = None, **headers: str) -> None:
        """The file, or the requested range. `cut`: close the connection after this many bytes."""
        server, content = self.shared, self.shared.files.get(self.path)
        if content is None:
            self._status(404)
            return
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        is_same = self.headers.get("If-Range") == server.tag
        start = int(found[1]) if found and server.has_ranges and is_same else 0
        if start and start >= len(content):
            self._status(416, {"Content-Range": f"bytes */{len(content)}"})
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if server.tag:
            self.send_header("ETag", server.tag)
        for name, value in ({"Content_Type": "application/octet-stream"} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][:cut])

    def _cut(self, num_bytes: int) -> None:
        self._right(num_bytes)

    def _header(self, name: str, value: str) -> None:
        self._right(**{name: value})

    def _status(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _redirect(self, target: str) -> None:
        self._status(302, {"Location": target})

    def _wrong_range(self) -> None:
        """Another range than requested."""
        content = self.shared.files[self.path]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes 1-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - 1))
        self.end_headers()
        self.wfile.write(content[1:])

    def _slow(self, pause: float) -> None:
        """One byte of the body after each pause."""
        content, end = self.shared.files[self.path], time.monotonic() + _LONGEST
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        for byte in content:
            if time.monotonic() > end:
                return
            self.wfile.write(bytes([byte]))
            time.sleep(pause)

    def _slow_header(self, pause: float) -> None:
        """One byte of the header after each pause."""
        end = time.monotonic() + _LONGEST
        for byte in b"HTTP/1.1 200 OK\r\nX: " + b"y" * 10_000:
            if time.monotonic() > end:
                return
            self.wfile.write(bytes([byte]))
            time.sleep(pause)

    def _held(self, num_bytes: int, event: threading.Event) -> None:
        """The first bytes, then nothing until an event."""
        content = self.shared.files[self.path]
        self.send_response(200)
        self.send_header("ETag", self.shared.tag or "")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:num_bytes])
        event.wait(_LONGEST)

    def _endless(self) -> None:
        """A body without a stated length that does not end."""
        self.send_response(200)
        self.end_headers()
        for _ in range(_ENDLESS // 2**16):
            self.wfile.write(bytes(2**16))

    def _no_http(self) -> None:
        self.wfile.write(b"SSH-2.0-toy\r\n\r\n")
