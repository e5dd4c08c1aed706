"""The services behind buckets (s3, gs, az): connections to them, and what they say in a sentence.

obstore speaks to the services; credentials and endpoints come from their usual environment
variables (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, GOOGLE_SERVICE_ACCOUNT, AZURE_STORAGE_ACCOUNT_NAME
and so on), and requests that fail for a while (no connection, 429, 5xx) are retried by it.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import PurePath
from typing import Any

from obstore import exceptions
from obstore.store import ObjectStore, from_url

from cache.errors import StoreError
from eupe.errors import BadInput

RETRY_VARIABLE = "EUPE_BUCKET_RETRY_SECONDS"
RETRY_SECONDS = 180.0
"""How long one request is tried again, unless RETRY_VARIABLE says otherwise."""
MAX_RETRIES = 30
REQUEST_SECONDS = 900
"""A whole request, its body included: a shard of 256 MB at 0.3 MB/s."""


def store(path: PurePath) -> ObjectStore:
    """Return the connection to the bucket of a path, one a process."""
    scheme, bucket = path.parts[0], path.parts[1]
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return _connected(f"{scheme}//{bucket}", endpoint, os.environ.get(RETRY_VARIABLE))


@cache
def _connected(url: str, endpoint: str | None, retry_seconds: str | None) -> ObjectStore:
    """Return the connection pool of one bucket."""
    try:
        seconds = float(retry_seconds or RETRY_SECONDS)
    except ValueError as error:
        raise BadInput(f"{RETRY_VARIABLE} = {retry_seconds!r}: wants a number") from error
    extra: dict[str, Any] = {}
    if endpoint and url.startswith("s3:"):
        extra["endpoint"] = endpoint
    return from_url(
        url,
        client_options={
            # Plain http only where the user names such an endpoint (a service on this machine).
            "allow_http": bool(endpoint and endpoint.startswith("http://")),
            "timeout": timedelta(seconds=REQUEST_SECONDS),
            "connect_timeout": timedelta(seconds=10),
        },
        retry_config={
            "max_retries": MAX_RETRIES,
            "retry_timeout": timedelta(seconds=seconds),
        },
        **extra,
    )


@contextmanager
def asking(path: PurePath, done: str) -> Iterator[None]:
    """Turn what the service or the network says into one sentence about the object."""
    try:
        yield
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            raise StoreError(f"{path}: there is no bucket {path.parts[1]!r}") from error
        raise FileNotFoundError(errno.ENOENT, "no such object", str(path)) from error
    except exceptions.AlreadyExistsError as error:
        raise FileExistsError(errno.EEXIST, "there is such an object", str(path)) from error
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
        raise StoreError(
            f"{path}: may not be {done} with the credentials in the environment "
            f"({_reason(error)}); see docs/operations.md, A bucket as cache root"
        ) from error
    except exceptions.BaseError as error:
        raise StoreError(f"{path}: cannot be {done}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Shorten obstore's account of a failed request to status, code and number of retries."""
    text = str(error).partition("\n\nDebug source:")[0]
    status = re.search(r"status code:? (\d{3}[A-Za-z ]*)|status (\d{3}[A-Za-z ]*)", text)
    code = re.search(r"<Code>(\w+)</Code>", text)
    told = [(status.group(1) or status.group(2)).strip()] if status else []
    told += [code.group(1)] if code else []
    if not told:
        told = [text.splitlines()[0].rpartition(" - ")[2].strip()]
    retries = re.search(r"after (\d+) retries", text)
    told += [f"after {retries.group(1)} retries"] if retries else []
    throttled = status is not None and (status.group(1) or status.group(2))[:3] in ("429", "503")
    advice = f"; the bucket throttles: use fewer readers or raise {RETRY_VARIABLE}"
    return ", ".join(told) + (advice if throttled else "")
