"""Places of a run: folders, or in a bucket."""

from cache.files import place
from cache.files.bucket_path import BucketPath, is_uri
from eupe.errors import BadInput


def check(run_directory: str, stage_root: str | None) -> None:
    """Refuse places of a run that are no place, or one of them in a bucket alone.

    Raises:
        BadInput: naming the fields.
    """
    for field, said in (("run_directory", run_directory), ("stage_root", stage_root or "")):
        there = place.root(said) if "://" in said else None
        if isinstance(there, BucketPath) and not there.key:
            raise BadInput(f"{field} = {said!r}: wants a folder in the bucket, as {said}/runs/demo")
    if stage_root and is_uri(run_directory) != is_uri(stage_root):
        raise BadInput(
            f"run_directory = {run_directory!r}, stage_root = {stage_root!r}: a run is linked to "
            "its stages, so both want to be in a bucket, or neither"
        )
