"""The token of a Ray connection: the user's wherever Ray looks for one, invented only if alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PATIENCE_SECONDS = 300

# Ray's own loader has the last word on which token a process has.
CHILD = """
from pipelines.machines import cluster
cluster._authenticate()
from ray._raylet import AuthenticationTokenLoader
loader = AuthenticationTokenLoader.instance()
print(loader.get_raw_token() if loader.has_token(ignore_auth_mode=True) else "none")
"""
CLUSTER = {"RAY_ADDRESS": "127.0.0.1:1"}


def token(home: Path, **environment: str) -> str:
    """Return the token that Ray has in a process that connects; "none" without one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    child = subprocess.run(
        [sys.executable, "-c", CHILD],
        env={**kept, "HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_SECONDS,
    )
    return child.stdout.strip()


@pytest.fixture
def keeper(tmp_path: Path) -> Path:
    """Return the home of a user whose token is where Ray looks for it."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("kept\n")
    return tmp_path


@pytest.mark.parametrize("environment", [{}, {"RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": ""}])
def test_a_local_ray_without_a_token_gets_one_that_is_not_kept(tmp_path, environment):
    first, second = (token(tmp_path, **environment) for _ in range(2))
    assert len(first) == len(second) == 64
    assert first != second
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, CLUSTER])
def test_the_users_own_token_is_used(keeper, environment):
    assert token(keeper, **environment) == "kept"
    assert token(keeper, RAY_AUTH_TOKEN="given", **environment) == "given"
    (keeper / "elsewhere").write_text("filed\n")
    assert token(keeper, RAY_AUTH_TOKEN_PATH=str(keeper / "elsewhere"), **environment) == "filed"


def test_a_blank_token_file_is_none(keeper):
    (keeper / ".ray/auth_token").write_text(" \n")
    assert len(token(keeper)) == 64


def test_no_token_is_invented_for_a_cluster_that_has_its_own(tmp_path):
    assert token(tmp_path, **CLUSTER) == "none"
