"""Folders that all machines share: a file laid there is seen, and gone afterwards."""

from pathlib import Path

from support import bucket_server

from pipelines.machines import shared_folders


def test_probes_are_seen_where_they_were_laid_and_gone_afterwards(tmp_path):
    (tmp_path / "file").touch()
    folders = [str(tmp_path / name) for name in ("new/a", "new/b", "file/c")]
    with shared_folders.laid(folders) as laid:
        assert {Path(file).parent for file in laid.probes} == {Path(each) for each in folders[:2]}
        assert list(laid.refused) == folders[2:]
        assert all(Path(file).read_bytes() == content for file, content in laid.probes.items())
        assert shared_folders.unseen(laid.probes) == ()
        other = dict.fromkeys(laid.probes, b"of another machine")
        assert shared_folders.unseen(other) == tuple(laid.probes)
    assert shared_folders.unseen(laid.probes) == tuple(laid.probes)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_bucket_takes_probes(s3):
    with shared_folders.laid([f"s3://{bucket_server.NAME}/probed"]) as laid:
        assert len(laid.probes) == 1
        assert shared_folders.unseen(laid.probes) == ()
    assert shared_folders.unseen(laid.probes) == tuple(laid.probes)
