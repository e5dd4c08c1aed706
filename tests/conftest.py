"""What every test runs under: nothing reaches the network, nothing outlives the test session."""

import atexit
import os
import secrets
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import psutil
import pytest
from jaxtyping import install_import_hook

if TYPE_CHECKING:
    from support import bucket_server

ROOT = Path(__file__).resolve().parents[1]
SESSION = secrets.token_hex(8)
PRIVATE = Path(tempfile.mkdtemp(prefix="eupe-tests-"))  # Prefect's and Ray's homes, never yours
atexit.register(shutil.rmtree, PRIVATE, ignore_errors=True)
GRACE_SECONDS = 20.0  # Ray's and Prefect's children need a moment to follow their parent

# How long an example takes is the machine's affair, which has other work now and then.
hypothesis.settings.register_profile(
    "eupe", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("eupe")

# Set before anything imports torch, Ray or Prefect: they read their settings once, at import.
# A variable that every child inherits also finds those that were re-parented (see `survivors`).
os.environ.update(
    EUPE_TEST_SESSION=SESSION,
    PREFECT_HOME=str(PRIVATE / "prefect"),
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS="90",
    DO_NOT_TRACK="1",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN_PATH=str(PRIVATE / "ray_token"),
    HF_HUB_OFFLINE="1",
    MPLBACKEND="Agg",
    # Sums of several threads come in another order; and on busy cores they wait for each other.
    OMP_NUM_THREADS="1",
    PYTHONPATH=os.pathsep.join((str(ROOT), str(ROOT / "tests"))),  # for children: this checkout
)
for name in ("PREFECT_API_URL", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "EUPE_HOME"):
    os.environ.pop(name, None)
TOKEN = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
TOKEN.touch(mode=0o600)
TOKEN.write_text(secrets.token_hex(32))

install_import_hook("eupe", "beartype.beartype")  # shapes are checked here; users pay nothing


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deal files with many tests that take long, or wait for a cluster, to processes first."""
    if hasattr(config, "workerinput"):
        long = Counter[Path]()
        for item in items:
            marks = {mark.name for mark in item.iter_markers()}
            long[item.path] += 10 * bool(marks & {"ray", "prefect"}) + ("slow" in marks)
        items.sort(key=lambda item: -long[item.path])


def survivors() -> list[psutil.Process]:
    """Every process of this test session other than this one, re-parented ones included."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get("EUPE_TEST_SESSION") == SESSION
            if ours and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:  # gone meanwhile, or another user's
            continue
    return found


def describe(process: psutil.Process) -> str:
    """Name a process for a failure message."""
    try:
        return f"{process.pid} {' '.join(process.cmdline())[:120]}"
    except psutil.Error:
        return f"{process.pid} (gone)"


@pytest.fixture(scope="session", autouse=True)
def nothing_outlives_the_session() -> Iterator[None]:
    """Fail the session if a process that a test started is still alive at its end, and end it."""
    yield
    deadline = time.monotonic() + GRACE_SECONDS
    while (left := survivors()) and time.monotonic() < deadline:
        psutil.wait_procs(left, timeout=0.5)
    names = [describe(process) for process in left]
    for process in left:
        process.kill()
    assert not names, "processes left behind: " + "; ".join(names)


@pytest.fixture(scope="module", autouse=True)
def folders_of_a_file_go_with_it(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Remove what a file's fixtures and properties left on disk, unless one of its tests failed.

    pytest removes `tmp_path` alone after each test; the rest lay there to the end of the session.
    """
    failed, base = request.session.testsfailed, tmp_path_factory.getbasetemp()
    before = set(base.iterdir())
    yield
    if request.session.testsfailed == failed:
        for folder in set(base.iterdir()) - before:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """Start one local Ray for a file's in-process tests: two CPUs, no dashboard.

    No longer than that: others ask how a process connects that is not connected yet.
    """
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200 * 2**20,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def emoji() -> Path:
    """The demo's images."""
    return ROOT / "examples/emoji/emoji.parquet"


@pytest.fixture(scope="session")
def bucket_running() -> "Iterator[bucket_server.Bucket]":
    """Start one S3 on loopback for all tests that need it."""
    from support import bucket_server

    with bucket_server.serve() as running:
        yield running


@pytest.fixture
def s3(
    bucket_running: "bucket_server.Bucket", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> "bucket_server.Bucket":
    """Return the bucket, behaving, as the environment names it, with a mirror of its own."""
    settings = {
        "AWS_ENDPOINT_URL": bucket_running.endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "EUPE_MIRROR": str(tmp_path / "mirror"),
        "EUPE_MIRROR_BYTES": str(1 << 26),
        "EUPE_BUCKET_RETRY_SECONDS": "60",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    bucket_running.behave()
    return bucket_running


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return what makes this process, and those that it starts, one on another machine."""
    from cache.files import copies

    def move(name: str) -> None:
        monkeypatch.setenv(copies.FOLDER_VARIABLE, str(tmp_path / name))

    move("first")
    return move
