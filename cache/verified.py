"""Up to which version a store's shards were verified: a file beside HEAD, which may be absent.

Whoever verifies next looks at what was committed after it. It is a courtesy: a store without one,
or with one that is damaged or another store's, is verified from its first shard.
"""

import json

from cache.errors import StoreError
from cache.files import atomic, place
from cache.format import layout
from cache.store import Store

VERIFIED = "VERIFIED"
NOTHING = -1


def version(store: Store) -> int:
    """Return the version of the manifest up to which all shards were verified, or NOTHING."""
    try:
        said = json.loads((layout.manifest_directory(store.directory) / VERIFIED).read_bytes())
    except (FileNotFoundError, ValueError):
        return NOTHING
    if not isinstance(said, dict) or said.get("moments_sha256") != store.moments_sha256:
        return NOTHING
    found = said.get("version")
    return found if isinstance(found, int) else NOTHING


def note(store: Store, number: int) -> None:
    """Note that all shards of a version are sound, where one may write and it is news."""
    if number == version(store) or not place.may_write(store.directory):
        return
    content = json.dumps({"moments_sha256": store.moments_sha256, "version": number})
    path = layout.manifest_directory(store.directory) / VERIFIED
    try:
        atomic.write(path, [content.encode()], layout.scratch_directory(store.directory))
    except StoreError:
        return  # of a bucket one learns here that one may only read it: verified again next time
