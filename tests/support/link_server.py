"""An S3 far away: it counts bytes, lets requests wait, and sends as fast as a link takes.

    with link_server.serve({"key": content}, Link(...)) as far: ...    # far.endpoint

It answers HEAD and GET, with ranges; time is kept by sleeping, so that many streams cost no CPU.
"""

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

from support import http_server

CHUNKS_A_SECOND = 20
"""Pieces that a stream sends a second: it sleeps in between."""


@dataclass
class Link:
    """What lies between.

    Attributes:
        bytes_per_second: of all streams together.
        stream_bytes_per_second: of one of them.
        delay_seconds: before each answer.
    """

    bytes_per_second: float
    stream_bytes_per_second: float
    delay_seconds: float = 0.03


@dataclass
class Far:
    """The server, and what it has seen.

    Attributes:
        endpoint: URL; what AWS_ENDPOINT_URL is set to.
        sent: key -> bytes of answers to GET.
        num_requests: of all kinds.
        num_streams: GETs that are being answered now.
        most_streams: and the most there were at once.
        began: when the first GET came, seconds of `time.monotonic`.
        ended: when the last byte was sent.
    """

    link: Link
    endpoint: str = ""
    sent: Counter[str] = field(default_factory=Counter)
    num_requests: int = 0
    num_streams: int = 0
    most_streams: int = 0
    began: float = float("inf")
    ended: float = 0.0
    free_at: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def share_of_link(self) -> float:
        """Bytes sent, against what the link takes from the first request to the last byte."""
        return sum(self.sent.values()) / (self.link.bytes_per_second * (self.ended - self.began))

    def wait_for_link(self, num_bytes: int) -> None:
        """Take so many bytes' time of the link, after all who asked before."""
        with self.lock:
            self.free_at = max(self.free_at, time.monotonic())
            self.free_at += num_bytes / self.link.bytes_per_second
            turn = self.free_at
        time.sleep(max(0.0, turn - time.monotonic()))

    def count(self, change: int) -> None:
        with self.lock:
            self.num_streams += change
            self.most_streams = max(self.most_streams, self.num_streams)


@contextmanager
def serve(objects: Mapping[str, bytes], link: Link) -> Iterator[Far]:
    """Serve objects, by key with the bucket's name before it, on a free port."""
    far = Far(link)
    with http_server.answering(_handler(far, objects)) as far.endpoint:
        yield far


def _handler(far: Far, objects: Mapping[str, bytes]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.begin()

        def do_GET(self) -> None:
            with far.lock:
                far.began = min(far.began, time.monotonic())
            far.count(1)
            try:
                if (part := self.begin()) is not None:
                    self.send(part)
            finally:
                far.count(-1)

        def begin(self) -> memoryview | None:
            """Answer with everything but the body; return it."""
            time.sleep(far.link.delay_seconds)
            key = self.path.partition("?")[0].lstrip("/")
            content = objects.get(key)
            tag = f'"{hashlib.md5(content or b"").hexdigest()}"'
            with far.lock:
                far.num_requests += 1
            asked = self.headers.get("Range", "").removeprefix("bytes=")
            refused = 0
            if content is None:
                refused = 404
            elif self.headers.get("If-Match", tag) != tag:
                refused = 412
            elif asked and int(asked.partition("-")[0]) >= len(content):
                refused = 416
            if content is None or refused:
                self.send_response(refused)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return None
            first, last = 0, len(content) - 1
            if asked:
                first, last = (int(each) for each in asked.split("-"))
                last = min(last, len(content) - 1)
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            self.send_header("Content-Length", str(last + 1 - first))
            self.send_header("ETag", tag)
            self.send_header("Last-Modified", "Thu, 26 Nov 2026 00:00:00 GMT")
            self.end_headers()
            return memoryview(content)[first : last + 1]

        def send(self, part: memoryview) -> None:
            """Send a body at the pace of the stream and of the link."""
            key = self.path.partition("?")[0].lstrip("/")
            size = max(1, int(far.link.stream_bytes_per_second / CHUNKS_A_SECOND))
            free_at = time.monotonic()
            for first in range(0, len(part), size):
                chunk = part[first : first + size]
                free_at += len(chunk) / far.link.stream_bytes_per_second
                far.wait_for_link(len(chunk))
                time.sleep(max(0.0, free_at - time.monotonic()))
                with far.lock:  # counted before whoever gets it looks
                    far.sent[key] += len(chunk)
                    far.ended = time.monotonic()
                self.wfile.write(chunk)

        def log_message(self, format: str, *args: object) -> None:
            """Keep quiet."""

    return Handler
