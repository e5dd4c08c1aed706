"""Each fault, planted in facts where all is well, is found by its check and by no other."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from pipelines.caching import planning
from pipelines.caching.rates import Rates, machine
from pipelines.doctor import facts, findings
from pipelines.doctor.facts import Facts, Reading, Room, Token
from pipelines.doctor.node import PROJECT, Node
from pipelines.recipe import recipes

WELL = Node(
    name=facts.HERE,
    host="here-1",
    versions={"Python": "3.11.9", PROJECT: "0123", "pillow": "12.1.0", "ray": "2.60.0"},
    view_digests={"views": "aa", "held_out_views": "bb"},
    weights={"teachers.t": "c" * 64},
    no_weights={},
    no_pictures={},
    unseen=(),
    shared_memory_bytes=12 * 10**9,
    memory_bytes=32 * 10**9,
    open_files=(1024, 1 << 20),
)
FIRST = replace(WELL, name="node 10.0.0.1 (aaaaaa)", host="a-1", open_files=(65536, 1 << 20))
SECOND = replace(FIRST, name="node 10.0.0.2 (bbbbbb)", host="b-1")
SOUND = Facts(
    recipe="demo",
    here=WELL,
    nodes=(FIRST, SECOND),
    no_cluster=None,
    mute={},
    refused=(),
    licences={"teacher t": "Apache-2.0"},
    room=Room("/cache", 4e8, 1e9),
    unplanned=None,
    reading=Reading(9e9, 10e9, {"demo stage1": (1.1, 1.0)}),
    no_write={},
    token=Token(there=True, file="/home/u/.ray/auth_token", kept=True, exposed=False),
    environment={
        "RAY_ADDRESS": "10.0.0.1:6379",
        "RAY_API_SERVER_ADDRESS": "http://10.0.0.1:8265",
        "PREFECT_API_URL": "http://prefect.local:4200/api",
        "PREFECT_API_AUTH_STRING": "set",
    },
)
NO_FILE = "teachers.t: weights 'file:/t.pth': there is no file /t.pth"


def on_second(**fields: object) -> Callable[[Facts], Facts]:
    return lambda sound: replace(sound, nodes=(FIRST, replace(SECOND, **fields)))


def here(**fields: object) -> Callable[[Facts], Facts]:
    return lambda sound: replace(sound, here=replace(WELL, **fields))


def whole(**fields: object) -> Callable[[Facts], Facts]:
    return lambda sound: replace(sound, **fields)


def told(**variables: str) -> Callable[[Facts], Facts]:
    """Set variables of the environment; an empty one is not set."""
    said = {name: value for name, value in {**SOUND.environment, **variables}.items() if value}
    return lambda sound: replace(sound, environment=said)


OTHER_PILLOW = {**WELL.versions, "pillow": "11.0.0"}
OTHER_VIEWS = {**WELL.view_digests, "views": "other"}
FAULTS = {
    "too little disk": (whole(room=Room("/cache", 3e9, 1e9)), "disk", "want 3.0 GB more and 1.0"),
    "no plan": (whole(room=None, unplanned="who knows"), "disk", r"not known \(who knows\)"),
    "a root that takes nothing": (whole(no_write={"/c": "/c: no"}), "disk", "/c writable"),
    "a slow disk": (
        whole(reading=Reading(1e9, 10e9, {"demo stage1": (9.5, 1.0)})),
        "bandwidth",
        "read at 1 GB/s here.*demo stage1 9.5 h and not 1 h",
    ),
    "what a run is refused for": (whole(refused=("seed: no",)), "recipe", "seed: no"),
    "a weight file that is missing": (
        here(no_weights={"teachers.t": NO_FILE}),
        "weights",
        "this machine: teachers.t: .*there is no file /t.pth",
    ),
    "one that is missing on a node": (
        on_second(no_weights={"teachers.t": NO_FILE}),
        "weights",
        r"node 10\.0\.0\.2 .*there is no file",
    ),
    "other weights on a node": (
        on_second(weights={"teachers.t": "d" * 64}),
        "weights",
        "10.0.0.2 .*teachers.t has weights dddddddddddd, here it has cccccccccccc",
    ),
    "an unknown licence": (whole(licences={"teacher t": None}), "weights", "teacher t: the lic"),
    "a node with another Pillow": (
        on_second(versions=OTHER_PILLOW),
        "nodes",
        r"10\.0\.0\.2 .*pillow 11\.0\.0 \(here 12\.1\.0\)",
    ),
    "another Pillow that draws otherwise": (
        on_second(versions=OTHER_PILLOW, view_digests=OTHER_VIEWS),
        "nodes",
        "pillow .*draws other pixels for views: students are stopped",
    ),
    "another build of the same Pillow": (
        on_second(view_digests=OTHER_VIEWS),
        "nodes",
        "draws other pixels for views, with equal versions",
    ),
    "other code of ours": (
        on_second(versions={**WELL.versions, PROJECT: "4567"}),
        "nodes",
        "the same checkout",
    ),
    "a node that says nothing": (whole(mute={"node 3": "lost"}), "nodes", "node 3 does not answ"),
    "no cluster": (whole(no_cluster="RAY_ADDRESS = x: no Ray"), "nodes", "RAY_ADDRESS = x: no"),
    "an absent token": (
        whole(token=Token(False, "/home/u/.ray/auth_token", False, False)),
        "auth",
        r"there is no token \(/home/u/.ray/auth_token\)",
    ),
    "a token file that is named and gone": (
        whole(token=Token(True, "/gone", False, False)),
        "auth",
        "RAY_AUTH_TOKEN_PATH = /gone: there is no such file",
    ),
    "a token that others read": (
        whole(token=Token(True, "/t", True, True)),
        "auth",
        "/t may be read by others.*chmod 600 /t",
    ),
    "a cluster without tokens": (told(RAY_AUTH_MODE="disabled"), "auth", "runs code on it"),
    "a Prefect without a secret": (told(PREFECT_API_AUTH_STRING=""), "auth", "neither PREFECT_API"),
    "a proxy": (
        told(http_proxy="http://proxy:3128", NO_PROXY="127.0.0.1,prefect.local"),
        "proxies",
        r"RAY_API_SERVER_ADDRESS \(10.0.0.1\) goes through the proxy of http_proxy",
    ),
    "little shared memory": (
        on_second(shared_memory_bytes=64 << 20),
        "shared memory",
        r"10\.0\.0\.2 .*/dev/shm has 0.067 GB free, Ray wants 9.6 GB",
    ),
    "a low limit of open files here": (
        here(open_files=(1024, 4096)),
        "open files",
        "this machine: a process may have 4096 files open",
    ),
    "a low limit of open files there": (
        on_second(open_files=(1024, 1 << 20)),
        "open files",
        r"10\.0\.0\.2 .*may have 1024 files open",
    ),
    "a folder that is not shared": (
        on_second(unseen=("/cache/.probe-1", "/runs/.probe-2")),
        "shared folders",
        r"10\.0\.0\.2 .*does not see what this machine writes to /cache, /runs",
    ),
    "pictures that are not mounted": (
        on_second(no_pictures={"train": "/data: no such folder"}),
        "data sources",
        r"10\.0\.0\.2 .*train: /data: no such folder",
    ),
}


def planted(name: str) -> Facts:
    return FAULTS[name][0](SOUND)


def test_where_all_is_well_nothing_is_found():
    assert findings.judge(SOUND) == []
    assert findings.judge(replace(SOUND, nodes=(), reading=None, environment={})) == []
    said = findings.looked_at(SOUND)
    assert all(name in said for name in findings.CHECKS)
    assert said.endswith("of demo on this machine and 2 Ray nodes")
    assert "bandwidth" not in findings.looked_at(replace(SOUND, reading=None))


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_one_line_of_its_check(name):
    _, check, says = FAULTS[name]
    (found,) = findings.judge(planted(name))
    assert found.check == check
    assert re.search(says, str(found)), str(found)
    assert "\n" not in str(found)
    assert all((found.what, found.why, found.todo))


def test_every_check_has_a_fault_that_it_finds():
    assert {check for _, check, _ in FAULTS.values()} == set(findings.CHECKS)


def test_what_several_checks_know_of_is_said_once():
    """The recipe's own check refuses a missing file too, and this machine may be a node as well."""
    missing = replace(WELL, no_weights={"teachers.t": NO_FILE})
    same = replace(missing, name="node", open_files=FIRST.open_files)
    both = replace(SOUND, here=missing, nodes=(same,), refused=(NO_FILE,))
    (found,) = findings.judge(both)
    assert found.what.startswith("node: ")


@pytest.mark.parametrize("without", ["10.0.0.1,prefect.local", "*", "10.0.0.1,.local"])
def test_a_proxy_that_is_kept_off_the_cluster_is_none(without):
    kept = told(HTTP_PROXY="http://proxy:3128", no_proxy=without)(SOUND)
    assert findings.judge(kept) == []


@pytest.mark.slow
def test_hours_grow_as_a_disk_is_slower_than_planned():
    plan = planning.outlook(recipes.get("imagenet1k_vits16"), (), machine("h100:8"), Rates(), 28)
    slow = facts.against_plan(plan, Rates().disk_bytes / 10)
    own, planned = slow.hours["imagenet1k_vits16 stage2"]
    assert own == pytest.approx(10 * planned)
    as_planned = facts.against_plan(plan, Rates().disk_bytes)
    assert all(own == planned for own, planned in as_planned.hours.values())
