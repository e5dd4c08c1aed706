"""`eupe cache ls | inspect | verify` on a cache root in a bucket."""

import json
import subprocess
import sys

import pytest
from support import bucket_server
from support.toy_stores import Toy, ids

from cache.files import place

PATIENCE_SECONDS = 300

pytestmark = pytest.mark.slow


def eupe(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "flows.cli", "cache", *words, "--json"]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS
    )


def test_commands_take_a_bucket(s3):
    root = f"s3://{bucket_server.NAME}/commands"
    toy = Toy(place.root(root), bad={"a/003": "patches are not finite"})
    toy.add_samples(ids(6))
    store = toy.build(num_views=1)
    listed = eupe("ls", root)
    assert listed.returncode == 0, listed.stderr
    (line,) = json.loads(listed.stdout)
    assert line["directory"] == str(store.spec.directory())
    shown = eupe("inspect", f"{root}/{line['directory']}")
    assert json.loads(shown.stdout)["rows"] == 6, shown.stderr
    assert eupe("verify", root).returncode == 0
    store.directory.joinpath("view-0000", "rows-00000000.arrow").unlink()
    assert eupe("verify", root).returncode == 1
    absent = eupe("ls", f"s3://{bucket_server.NAME}/nothing")
    assert absent.returncode == 2
    assert "no cache root" in absent.stderr
