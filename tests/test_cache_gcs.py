"""Google's bucket compares generations where S3 compares entity tags: HEADs move there as well."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cache.errors import Busy
from cache.files import bucket, bucket_service
from cache.files.bucket_path import BucketPath


class OneObject(BaseHTTPRequestHandler):
    """Whatever is asked for is one object, kept with its generation as Google's XML API does."""

    content, generation = b"", 0

    def do_GET(self) -> None:
        there = type(self).generation > 0
        self.answer(200 if there else 404, type(self).content if there else b"")

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["x-goog-if-generation-match"] != str(type(self).generation):
            self.answer(412)
            return
        type(self).content, type(self).generation = content, type(self).generation + 1
        self.answer(200)

    def answer(self, status: int, content: bytes = b"") -> None:
        """Send a reply."""
        self.send_response(status)
        self.send_header("ETag", f'"{hash(type(self).content)}"')
        self.send_header("x-goog-generation", str(type(self).generation))
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def google(tmp_path, monkeypatch):
    """A server on loopback in Google's place."""

    class Handler(OneObject):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    nobody = {"client_email": "", "private_key": "", "private_key_id": ""}
    account = tmp_path / "account.json"
    account.write_text(json.dumps({"gcs_base_url": url, "disable_oauth": True, **nobody}))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(account))
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)  # plain http is allowed where it is asked for
    bucket_service._connected.cache_clear()
    yield Handler
    bucket_service._connected.cache_clear()
    server.shutdown()
    server.server_close()


def test_a_head_is_replaced_if_it_is_as_expected(google):
    head = BucketPath("gs://bucket/HEAD")
    bucket.swap(head, b"1", None)
    first = bucket.read(head)
    bucket.swap(head, b"2", first)
    assert head.read_bytes() == b"2"
    with pytest.raises(Busy, match="another process has replaced it"):
        bucket.swap(head, b"3", first)
    assert (google.content, google.generation) == (b"2", 2)
    now = bucket.read(head)
    assert now is not None
    stamp = bucket.swap(head, b"4", now)  # what it returns is enough to go on with
    bucket.swap(head, b"5", bucket.Stamped(b"4", stamp))
    assert (google.content, google.generation) == (b"5", 4)
