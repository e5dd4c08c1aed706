"""What is judged of the facts: a pure function for each kind of fault, a line for each finding."""

from collections.abc import Callable, Iterator
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]

from pipelines.doctor.facts import Facts
from pipelines.doctor.node import PROJECT, Node

OPEN_FILES = 8192
"""What Ray recommends: below 4096 it warns."""
RAISED_TO = 65536
"""Ray raises the limit of a process that connects to so many, where it may."""
RAY_SHARE = 0.3
"""Of a machine's memory, that Ray keeps objects in unless it is told otherwise."""
RAY_BYTES = 10e9
"""If /dev/shm is smaller than this and than that share, Ray keeps objects on disk."""
SLOW = 0.5
"""Of the planned bytes a second: reading below it is a finding."""


class Finding(NamedTuple):
    """One thing that is wrong.

    Attributes:
        check: what was looked at, a key of CHECKS.
        what: is wrong, and where.
        why: it matters.
        todo: what puts it right.
    """

    check: str
    what: str
    why: str
    todo: str

    def __str__(self) -> str:
        return f"{self.check}: {self.what}. {self.why}. {self.todo}."


Found = Iterator[tuple[str, str, str]]
"""What, why and what to do, of each finding of one check."""


def judge(facts: Facts) -> list[Finding]:
    """Return everything that is wrong, in the order of CHECKS."""
    return [Finding(name, *found) for name, check in CHECKS.items() for found in check(facts)]


def recipe(facts: Facts) -> Found:
    """Find what a run is refused for, and no other check knows."""
    nodes = (facts.here, *facts.nodes)
    told = {
        line for node in nodes for line in (*node.no_weights.values(), *node.no_pictures.values())
    }
    for sentence in facts.refused:
        if sentence not in told:
            yield sentence, "A build or a run does not begin", "Put it right as it says"


def disk(facts: Facts) -> Found:
    """Find too little room for the caches, and folders where nothing can be written."""
    for folder, sentence in facts.no_write.items():
        why = "No cache, checkpoint or report can be kept there"
        yield sentence, why, f"Make {folder} writable, or name another folder in the recipe"
    if facts.room is None:
        what = f"what the caches take is not known ({facts.unplanned})"
        why = "A disk that is too small is noticed when it is full"
        yield what, why, f"`eupe plan {facts.recipe} --images N` says it"
        return
    root, wanted, free = facts.room
    if wanted > free:
        yield (
            f"{root}: the caches of {facts.recipe} want {wanted / 1e9:,.1f} GB more and "
            f"{free / 1e9:,.1f} GB are free",
            "`eupe cache build` refuses to begin what the disk cannot hold",
            f"Name a larger cache_root, fewer views or another codec (`eupe plan {facts.recipe}`)",
        )


def bandwidth(facts: Facts) -> Found:
    """Find a disk that is read much more slowly than the plan assumes."""
    if facts.reading is None or facts.reading.bytes_second >= SLOW * facts.reading.planned:
        return
    found, planned, hours = facts.reading
    longer = ", ".join(
        f"{name} {own:.3g} h and not {was:.3g} h" for name, (own, was) in hours.items()
    )
    yield (
        f"caches are read at {found / 1e9:.2g} GB/s here, the plan has {planned / 1e9:.2g} GB/s",
        f"Accelerators wait: {longer}",
        "Lay cache_root on a faster disk, or take a cheaper codec or fewer `pixels`; "
        f"`eupe plan {facts.recipe} --bandwidth {found / 1e9:.2g}` has the hours",
    )


def weights(facts: Facts) -> Found:
    """Find weights that are not there, differ between machines, or have no licence."""
    for node in _machines(facts):
        for sentence in node.no_weights.values():
            yield f"{node.name}: {sentence}", "Nothing computes with them there", "Put them there"
    for node in facts.nodes:
        for field, digest in node.weights.items():
            own = facts.here.weights.get(field, digest)
            if own != digest:
                yield (
                    f"{node.name}: {field} has weights {digest[:12]}, here it has {own[:12]}",
                    "Features of two networks would come under one name, so its shards are refused",
                    "Copy one file to every machine",
                )
    for name, licence in facts.licences.items():
        if licence is None:
            yield (
                f"{name}: the licence of its weights is not known",
                "What a student may be used for follows from it",
                "Say it in the recipe's field `licence`",
            )


def nodes(facts: Facts) -> Found:
    """Find nodes that do not answer, or have other versions or draw other views."""
    if facts.no_cluster is not None:
        yield facts.no_cluster, "None of its nodes was looked at", "Put it right as it says"
    for name, sentence in facts.mute.items():
        yield (
            f"{name} does not answer: {sentence}",
            "No actor and no worker can run there",
            "Install eupe there as here (pip install -c constraints.txt), and see that it is up",
        )
    for node in facts.nodes:
        others = [
            f"{package} {version} (here {facts.here.versions[package]})"
            for package, version in node.versions.items()
            if version != facts.here.versions[package]
        ]
        drawn = [
            f for f, digest in node.view_digests.items() if digest != facts.here.view_digests[f]
        ]
        if others:
            yield (
                f"{node.name}: {', '.join(others)}",
                f"It draws other pixels for {' and '.join(drawn)}: students are stopped at them"
                if drawn
                else "Bytes of features may differ by who computed them",
                "Install the same there: pip install -c constraints.txt, and the same checkout"
                if any(each.startswith(PROJECT) for each in others)
                else "Install the same there: pip install -c constraints.txt",
            )
        elif drawn:
            yield (
                f"{node.name}: draws other pixels for {' and '.join(drawn)}, with equal versions",
                "A student that is shown them is stopped, as its teacher saw others",
                "Install the same build of Pillow there (python -m PIL), from the same wheel",
            )


def auth(facts: Facts) -> Found:
    """Find tokens and secrets that are absent, or open to others."""
    said, token = facts.environment, facts.token
    if said.get("RAY_AUTH_MODE") == "disabled":
        if "RAY_ADDRESS" in said:
            yield (
                "RAY_AUTH_MODE=disabled",
                "Whoever reaches the cluster's ports runs code on it",
                "Start its nodes with RAY_AUTH_MODE=token and one RAY_AUTH_TOKEN_PATH",
            )
    elif "RAY_ADDRESS" in said and not token.there:
        yield (
            f"RAY_ADDRESS is set and there is no token ({token.file})",
            "The cluster refuses whoever comes without it",
            "Copy the cluster's token there, mode 0600, or name its file in RAY_AUTH_TOKEN_PATH",
        )
    if "RAY_AUTH_TOKEN" not in said and token.there and not token.kept:
        yield (
            f"RAY_AUTH_TOKEN_PATH = {token.file}: there is no such file",
            "Ray refuses to start without it",
            "Name the file that holds the token",
        )
    if token.exposed:
        yield (
            f"{token.file} may be read by others",
            "Whoever reads this token runs code as you",
            f"chmod 600 {token.file}",
        )
    if "PREFECT_API_URL" in said and not {"PREFECT_API_AUTH_STRING", "PREFECT_API_KEY"} & set(said):
        yield (
            "PREFECT_API_URL is set and neither PREFECT_API_AUTH_STRING nor PREFECT_API_KEY is",
            "A server without a secret runs what anybody tells it; one with a secret refuses you",
            "Set the server's secret here, and PREFECT_SERVER_API_AUTH_STRING where it runs",
        )


def proxies(facts: Facts) -> Found:
    """Find addresses of the cluster that would be asked for through a proxy."""
    said = facts.environment
    for variable in ("RAY_API_SERVER_ADDRESS", "PREFECT_API_URL"):
        address = urlsplit(said.get(variable, ""))
        name = f"{address.scheme}_proxy"
        proxy = next((n for n in (name, name.upper(), "all_proxy", "ALL_PROXY") if n in said), None)
        without = said.get("no_proxy") or said.get("NO_PROXY") or ""
        if not address.hostname or proxy is None:
            continue
        if not proxy_bypass_environment(address.hostname, {"no": without}):
            yield (
                f"{variable} ({address.hostname}) goes through the proxy of {proxy}",
                "A proxy that cannot reach it answers in its place, or nobody does",
                f"Add {address.hostname} to NO_PROXY and no_proxy",
            )


def shared_memory(facts: Facts) -> Found:
    """Find machines whose /dev/shm has no room for Ray's objects."""
    for node in _machines(facts):
        wanted = min(RAY_SHARE * node.memory_bytes, RAY_BYTES)
        if node.shared_memory_bytes < wanted:
            yield (
                f"{node.name}: /dev/shm has {node.shared_memory_bytes / 1e9:.2g} GB free, Ray "
                f"wants {wanted / 1e9:.2g} GB",
                "Ray's objects then lie on a disk, and workers that exchange gradients may die",
                "Free some of it; in a container start it with --shm-size=10g, or mount one there",
            )


def open_files(facts: Facts) -> Found:
    """Find limits of open files below what Ray recommends."""
    for node in _machines(facts):
        soft, hard = node.open_files
        if node is facts.here:
            soft = max(soft, min(hard, RAISED_TO))
        if soft < OPEN_FILES:
            yield (
                f"{node.name}: a process may have {soft} files open, Ray wants {OPEN_FILES}",
                "Connections between actors fail under load",
                f"`ulimit -n {RAISED_TO}` before Ray is started there (LimitNOFILE= of systemd)",
            )


def folders(facts: Facts) -> Found:
    """Find machines that do not see what was laid into the shared folders."""
    for node in _machines(facts):
        if node.unseen:
            places = ", ".join(file.rpartition("/")[0] for file in node.unseen)
            yield (
                f"{node.name} does not see what this machine writes to {places}",
                "Its shards and checkpoints would be lost, or it trains from other ones",
                "Mount the same file system there under the same path, or name a bucket",
            )


def sources(facts: Facts) -> Found:
    """Find data sources of which no picture can be read."""
    for node in _machines(facts):
        for name, sentence in node.no_pictures.items():
            yield (
                f"{node.name}: {name}: {sentence}",
                "Its pictures can be neither indexed nor drawn there",
                "Mount them there under that path, or change its source.path",
            )


CHECKS: dict[str, Callable[[Facts], Found]] = {
    "recipe": recipe,
    "disk": disk,
    "bandwidth": bandwidth,
    "weights": weights,
    "nodes": nodes,
    "auth": auth,
    "proxies": proxies,
    "shared memory": shared_memory,
    "open files": open_files,
    "shared folders": folders,
    "data sources": sources,
}
"""What is looked at, in this order."""


def looked_at(facts: Facts) -> str:
    """Say what was looked at, and on how many machines."""
    kept = [name for name in CHECKS if name != "bandwidth" or facts.reading is not None]
    number = len(facts.nodes)
    nodes = f" and {number} Ray node{'s' * (number > 1)}" if number else ""
    return f"{', '.join(kept)} of {facts.recipe} on this machine{nodes}"


def _machines(facts: Facts) -> list[Node]:
    """Return every machine once: this one is left out if it is a node as well."""
    if any(node.host == facts.here.host for node in facts.nodes):
        return list(facts.nodes)
    return [facts.here, *facts.nodes]
