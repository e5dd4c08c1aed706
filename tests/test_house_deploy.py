"""The files of deploy/ can be read by whom they are for, and all begin the same command."""

import io
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from dockerfile_parse import DockerfileParser
from ray.scripts.symmetric_run import symmetric_run
from test_house_commands import fault as unknown_command
from test_house_dependencies import versions

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
COMMAND = "eupe run imagenet1k_vits16"
MOST_LINES = 40
PATIENCE_SECONDS = 60
LOCKED = versions((ROOT / "constraints.txt").read_text())

# Of the documentation of each: Dockerfile reference; KubeRay's API reference of ray.io/v1, 1.6;
# sbatch(1); SkyPilot's YAML reference.
INSTRUCTIONS = {
    *("FROM", "RUN", "CMD", "LABEL", "EXPOSE", "ENV", "ADD", "COPY", "ENTRYPOINT", "VOLUME"),
    *("USER", "WORKDIR", "ARG", "ONBUILD", "STOPSIGNAL", "HEALTHCHECK", "SHELL", "COMMENT"),
}
RAYJOB = {
    *("activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy"),
    *("entrypoint", "entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "jobId"),
    *("managedBy", "metadata", "preRunningDeadlineSeconds", "rayClusterSpec", "runtimeEnvYAML"),
    *("shutdownAfterJobFinishes", "submissionMode", "submitterConfig", "submitterPodTemplate"),
    *("suspend", "ttlSecondsAfterFinished"),
}
RAYCLUSTER = {
    *("authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions"),
    *("headGroupSpec", "headServiceAnnotations", "managedBy", "rayVersion", "suspend"),
    *("upgradeStrategy", "workerGroupSpecs"),
}
GROUP = {
    *("enableIngress", "groupName", "headService", "labels", "maxReplicas", "minReplicas"),
    *("numOfHosts", "rayStartParams", "replicas", "resources", "serviceType", "template"),
}
CONTAINER = {"name", "image", "env", "resources", "volumeMounts", "command", "args", "ports"}
SBATCH = {
    *("array", "cpus-per-task", "error", "exclusive", "gpus-per-node", "job-name", "mem"),
    *("nodes", "ntasks-per-node", "output", "partition", "requeue", "signal", "time"),
}
SKY = {
    *("config", "envs", "file_mounts", "name", "num_nodes", "resources", "run", "secrets"),
    *("service", "setup", "volumes", "workdir"),
}
SKY_RESOURCES = {
    *("accelerator_args", "accelerators", "any_of", "autostop", "cpus", "disk_size", "disk_tier"),
    *("image_id", "infra", "instance_type", "job_recovery", "labels", "max_hourly_cost", "memory"),
    *("network_tier", "ordered", "ports", "use_spot"),
}
SKY_TIERS = {"low", "medium", "high", "ultra", "best"}

Faults = Iterator[str]


def begins(words: list[str], who: str) -> Faults:
    """Yield what is wrong with the command that a file begins."""
    if shlex.join(words) != COMMAND:
        yield f"{who} begins {shlex.join(words)!r}"
    if words and (fault := unknown_command(shlex.join(words))) is not None:
        yield fault


def unknown(found: Any, known: set[str], where: str) -> Faults:
    """Yield the fields of a mapping that its reader does not know."""
    if not isinstance(found, dict):
        yield f"{where}: wants fields, has {found!r}"
        return
    yield from (f"{where}: no field {name}" for name in sorted(set(found) - known))


def installs(line: str) -> Faults:
    """Yield what is wrong with a line that installs us."""
    if "-c constraints.txt" not in line:
        yield f"{line}: wants -c constraints.txt"


def dockerfile(text: str) -> Faults:
    parsed = DockerfileParser(fileobj=io.BytesIO(text.encode()))
    steps = [(each["instruction"], each["value"]) for each in parsed.structure]
    yield from (f"no instruction {name}" for name, _ in steps if name not in INSTRUCTIONS)
    if not re.fullmatch(r"python:3\.11-[\w-]+", parsed.baseimage or ""):
        yield f"FROM {parsed.baseimage}: constraints.txt is of Python 3.11"
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for value in (value for name, value in steps if name == "COPY"):
        for source in value.split()[:-1]:
            if not (ROOT / source).exists():
                yield f"COPY {source}: not there"
            if f"!{source}" not in ignored:
                yield f"COPY {source}: .dockerignore leaves it out"
    installing = [value for name, value in steps if name == "RUN" and "pip install" in value]
    if not installing:
        yield "nothing is installed"
    for line in installing:
        yield from installs(line)
    yield from begins(yaml.safe_load(parsed.cmd or "[]"), "CMD")


def rayjob(text: str) -> Faults:
    document = yaml.safe_load(text)
    if (document["apiVersion"], document["kind"]) != ("ray.io/v1", "RayJob"):
        yield "no RayJob of ray.io/v1"
    job = document["spec"]
    yield from unknown(job, RAYJOB, "spec")
    cluster = job.get("rayClusterSpec") or {}
    yield from unknown(cluster, RAYCLUSTER, "rayClusterSpec")
    if str(cluster.get("rayVersion")) != LOCKED["ray"]:
        yield f"rayVersion {cluster.get('rayVersion')}: constraints.txt has {LOCKED['ray']}"
    if cluster.get("authOptions") != {"mode": "token"}:
        yield "whoever reaches the cluster runs code on it: authOptions"
    for group in (cluster.get("headGroupSpec"), *cluster.get("workerGroupSpecs", ())):
        yield from unknown(group, GROUP, "group")
        pod = (group or {}).get("template", {}).get("spec", {})
        if not pod.get("containers"):
            yield "a group without containers"
        volumes = {each["name"] for each in pod.get("volumes", ())}
        for container in pod.get("containers", ()):
            yield from unknown(container, CONTAINER, "container")
            mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
            yield from (f"no volume {name}" for name in sorted(set(mounts) - volumes))
            if "/dev/shm" not in mounts.values():
                yield "/dev/shm has 64 MB in a pod that mounts none"
    yield from begins(shlex.split(job.get("entrypoint", "")), "entrypoint")


def slurm(text: str) -> Faults:
    said = subprocess.run(
        ["bash", "-n"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    if said.returncode:
        yield said.stderr
    if not text.startswith("#!/bin/bash\n"):
        yield "sbatch wants an interpreter in the first line"
    head, _, script = text.partition("\nset -")
    for line in re.findall(r"^#SBATCH (.*)$", head, re.MULTILINE):
        if (option := re.fullmatch(r"--([a-z-]+)(=\S+)?", line)) is None or option[1] not in SBATCH:
            yield f"#SBATCH {line}: sbatch has no such option"
    if "#SBATCH" in script:
        yield "an #SBATCH below the first command is not read"
    (run,) = [each for each in script.replace("\\\n", " ").splitlines() if "symmetric-run" in each]
    words = shlex.split(run.removesuffix(" &"))
    after = words[words.index("symmetric-run") + 1 :]
    options = {option for each in symmetric_run.params for option in each.opts}
    starting, entry = after[: after.index("--")], after[after.index("--") + 1 :]
    for word in starting:
        if word.startswith("--") and word not in options:
            yield f"ray symmetric-run has no {word}"
    if entry[:1] == ["env"]:
        given = [word for word in entry if re.match(r"[A-Z_]+=", word)]
        if {word.partition("=")[0] for word in given} != {"RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"}:
            yield f"the command would not find the cluster: {given}"
        entry = entry[1 + len(given) :]
    yield from begins(entry, "symmetric-run")


def sky(text: str) -> Faults:
    task = yaml.safe_load(text)
    yield from unknown(task, SKY, "task")
    yield from unknown(task["resources"], SKY_RESOURCES, "resources")
    if not re.fullmatch(r"[A-Z0-9-]+:\d+", str(task["resources"].get("accelerators"))):
        yield "accelerators: wants NAME:NUMBER"
    if task["resources"].get("disk_tier") not in SKY_TIERS:
        yield f"disk_tier: wants one of {sorted(SKY_TIERS)}"
    for part in ("setup", "run"):
        words = ["bash", "-n"]
        said = subprocess.run(
            words,
            input=task[part],
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_SECONDS,
        )
        if said.returncode:
            yield f"{part}: {said.stderr}"
    for line in task["setup"].splitlines():
        if "pip install" in line:
            yield from installs(line)
    yield from begins(shlex.split(task["run"].splitlines()[-1]), "run")


FILES: dict[str, Callable[[str], Faults]] = {
    "Dockerfile": dockerfile,
    "rayjob.yaml": rayjob,
    "slurm.sh": slurm,
    "sky.yaml": sky,
}
ANOTHER = ("eupe run imagenet1k_vits16", "eupe run imagenet1k_vits61")
PLANTED = [
    ("Dockerfile", ANOTHER[0].replace(" ", '", "'), ANOTHER[1].replace(" ", '", "')),
    ("Dockerfile", "-c constraints.txt ", ""),
    ("Dockerfile", "COPY flows", "COPY flow"),
    ("Dockerfile", "COPY eupe ./eupe", "COPY docs ./docs"),
    ("Dockerfile", "python:3.11", "python:3.13"),
    ("Dockerfile", "WORKDIR", "WORKDIRECTORY"),
    ("rayjob.yaml", *ANOTHER),
    ("rayjob.yaml", "entrypoint: eupe", "entryPoint: eupe"),
    ("rayjob.yaml", "ray.io/v1", "ray.io/v1alpha1"),
    ("rayjob.yaml", "rayVersion: 2.60.0", "rayVersion: 2.59.0"),
    ("rayjob.yaml", "mode: token", "mode: disabled"),
    ("rayjob.yaml", "headGroupSpec", "headGroup"),
    ("rayjob.yaml", "name: shared-memory, mountPath", "name: shm, mountPath"),
    ("rayjob.yaml", "mountPath: /dev/shm", "mountPath: /shm"),
    ("slurm.sh", *ANOTHER),
    ("slurm.sh", "--requeue", "--requeu"),
    ("slurm.sh", "--min-nodes", "--num-nodes"),
    ("slurm.sh", "RAY_ADDRESS=", "RAY_ADRESS="),
    ("slurm.sh", "$(scontrol", "$((scontrol"),
    ("slurm.sh", "#SBATCH --exclusive\n", "set -u\n#SBATCH --exclusive\n"),
    ("sky.yaml", *ANOTHER),
    ("sky.yaml", "file_mounts:", "file_mount:"),
    ("sky.yaml", "disk_tier: best", "disk_tier: fastest"),
    ("sky.yaml", "accelerators:", "accelerator:"),
    ("sky.yaml", "-c constraints.txt ", ""),
]


@pytest.fixture(autouse=True)
def _at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EUPE_HOME", str(ROOT))


def test_every_file_of_deploy_is_known():
    assert {path.name for path in DEPLOY.iterdir()} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_file_can_be_read_and_begins_the_command(name: str):
    text = (DEPLOY / name).read_text()
    assert list(FILES[name](text)) == []
    assert len(text.splitlines()) <= MOST_LINES


@pytest.mark.parametrize(("name", "right", "wrong"), PLANTED)
def test_a_planted_fault_is_noticed(name: str, right: str, wrong: str):
    text = (DEPLOY / name).read_text()
    assert right in text
    assert list(FILES[name](text.replace(right, wrong))) != []


def test_slurms_signal_reaches_the_command_alone_and_is_waited_for(tmp_path):
    """The script as it is, but for a limit of the machine; with programs in Slurm's place."""
    saves = "trap 'sleep 1; touch saved; exit 143' TERM\n"
    for name, text in {
        "slurm/scontrol": "echo localhost\n",
        "slurm/srun": 'trap "touch srun" TERM\n"$SLURM_SUBMIT_DIR/.venv/bin/eupe" run it\n',
        ".venv/bin/eupe": f"{saves}touch begun\nwhile :; do sleep 0.1; done\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / name).chmod(0o755)
    given = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1"}
    path = os.pathsep.join([str(tmp_path / "slurm"), os.environ["PATH"]])
    batch = subprocess.Popen(
        ["bash", "-c", (DEPLOY / "slurm.sh").read_text().replace("ulimit", ": ulimit")],
        cwd=tmp_path,
        env={**given, "SLURM_JOB_NODELIST": "localhost", "PATH": path},
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (tmp_path / "begun").exists():
            assert batch.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        batch.send_signal(signal.SIGTERM)
        assert batch.wait(PATIENCE_SECONDS) == 143
    finally:
        with suppress(ProcessLookupError):
            os.killpg(batch.pid, signal.SIGKILL)
    assert (tmp_path / "saved").exists()
    assert not (tmp_path / "srun").exists(), "Ray would have died first"
    assert not list(tmp_path.glob("ray_token-*"))
