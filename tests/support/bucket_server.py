"""A bucket on loopback: moto's S3 behind a proxy that can throttle, cut answers and kill."""

import http.client
import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

import boto3
from moto.server import ThreadedMotoServer

from support import http_server

NAME = "features"
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"


@dataclass(frozen=True)
class Request:
    """What came to the proxy: its number among those of its method, method and key."""

    number: int
    method: str
    key: str


@dataclass
class Behaviour:
    """What the proxy does with a request.

    Attributes:
        throttle: answer 503 SlowDown.
        cut: send half of the answer's body and close.
        kill_before: kill the client before the bucket hears of the request.
        kill_after: kill the client when the bucket has done it, before it is told.
        victim: process to kill.
        by: the signal that it is killed by.
        delay_seconds: before a request is passed on, as of a bucket far away.
    """

    throttle: Callable[[Request], bool] = lambda request: False
    cut: Callable[[Request], bool] = lambda request: False
    kill_before: Callable[[Request], bool] = lambda request: False
    kill_after: Callable[[Request], bool] = lambda request: False
    victim: int | None = None
    by: signal.Signals = signal.SIGKILL
    delay_seconds: float = 0.0


@dataclass
class Bucket:
    """A bucket and the proxy in front of it.

    Attributes:
        endpoint: URL of the proxy; what AWS_ENDPOINT_URL is set to.
        requests: all that came.
        sent: key -> bytes of it that were sent in answers to GET.
        behaviour: what is done with the next ones.
    """

    endpoint: str
    requests: list[Request] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    behaviour: Behaviour = field(default_factory=Behaviour)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def come(self, method: str, key: str) -> Request:
        with self.lock:
            number = sum(each.method == method for each in self.requests) + 1
            self.requests.append(Request(number, method, key))
            return self.requests[-1]

    def puts(self) -> int:
        """Number of PUT requests so far."""
        return sum(each.method == "PUT" for each in self.requests)

    def behave(self, **changes: object) -> None:
        """Behave so from now on, and count requests and bytes anew."""
        self.requests.clear()
        self.sent.clear()
        self.behaviour = Behaviour(**changes)  # type: ignore[arg-type]

    def kill_victim(self) -> None:
        assert self.behaviour.victim is not None
        os.kill(self.behaviour.victim, self.behaviour.by)


def client(endpoint: str):
    """Return a plain S3 client, to look at the bucket without our code."""
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )


@contextmanager
def serve() -> Iterator[Bucket]:
    """Start a server with one empty bucket, and its proxy, on free ports; stop both."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client(f"http://{host}:{port}").create_bucket(Bucket=NAME)
    bucket = Bucket("")
    try:
        with http_server.answering(_handler(bucket, host, port)) as bucket.endpoint:
            yield bucket
    finally:
        server.stop()


def _handler(bucket: Bucket, host: str, port: int) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            request = bucket.come(self.command, urlsplit(self.path).path.partition(NAME)[2])
            does = bucket.behaviour
            time.sleep(does.delay_seconds)
            if does.throttle(request):
                self.answer(503, {}, SLOW_DOWN)
                return
            if does.kill_before(request):
                bucket.kill_victim()
                self.close_connection = True
                return
            upstream = http.client.HTTPConnection(host, port, timeout=60)
            upstream.request(self.command, self.path, body, dict(self.headers))
            answer = upstream.getresponse()
            content = answer.read()
            upstream.close()
            if does.kill_after(request):
                bucket.kill_victim()
                self.close_connection = True
                return
            if request.method == "GET" and answer.status < 300:
                with bucket.lock:
                    bucket.sent[request.key] += len(content)
            self.answer(answer.status, dict(answer.headers), content, does.cut(request))

        def answer(
            self, status: int, headers: dict[str, str], content: bytes, cut: bool = False
        ) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                    self.send_header(name, value)
            length = headers.get("Content-Length", len(content))
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if cut else content)
            self.close_connection = cut or self.close_connection

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = pass_on

        def log_message(self, format: str, *args: object) -> None:
            """Keep quiet."""

    return Handler
