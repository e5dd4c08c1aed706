"""Run `pip install` and tell its story on one screen: `install.py LOG ARGUMENT...`.

The arguments are pip's; all that it says goes to LOG. Shown are the large files, a count now and
then, and, if pip fails, the end of what it said. The exit code is pip's.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

LARGE_MEGABYTES = 40.0  # some fifteen files of two hundred; together nine tenths of the bytes
EVERY_PACKAGES = 50
LINES_OF_A_FAILURE = 40
DOWNLOADING = re.compile(r"\s*Downloading (\S+?)-(\d\S*?)-\S+ \(([\d.]+) (MB|GB)\)")
FROM_DISK = re.compile(r"\s*Processing (/\S+/([^/\s]+?)-(\d[^-/\s]*)-[^/\s]+\.whl)")
FOUND = re.compile(r"(Collecting|Processing) ")


def progress(lines: Iterable[str]) -> Iterator[str]:
    """Yield what is shown of pip's output as its lines arrive."""
    found = 0
    for line in lines:
        if shown := _large(line):
            yield shown
        if FOUND.match(line):
            found += 1
            if found % EVERY_PACKAGES == 0:
                yield f"{found} packages found"
        elif line.startswith("Installing collected packages:"):
            yield f"installing {line.count(',') + 1} packages: a minute or two"
        elif line.startswith("Successfully installed"):
            yield f"installed {len(line.split()) - 2} packages"


def _large(line: str) -> str | None:
    """Name a large file that the line says pip fetches or reads; None of any other line."""
    if match := DOWNLOADING.match(line):
        name, version, size, unit = match.groups()
        megabytes = float(size) * (1000 if unit == "GB" else 1)
    elif match := FROM_DISK.match(line):
        path, name, version = match.groups()
        if not os.path.exists(path):
            return None
        megabytes = os.path.getsize(path) / 1e6
    else:
        return None
    return f"{name} {version}, {megabytes:.0f} MB" if megabytes >= LARGE_MEGABYTES else None


def install(log: Path, arguments: list[str]) -> int:
    """Run `pip install`, log it, show its progress and return its exit code."""
    started = time.monotonic()
    command = [sys.executable, "-m", "pip", "install", "--progress-bar", "off", *arguments]
    pip = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert pip.stdout is not None
    kept: list[str] = []

    def logged(file: Iterable[str]) -> Iterator[str]:
        with log.open("w") as output:
            for line in file:
                output.write(line)
                kept.append(line)
                yield line

    with pip:
        for shown in progress(logged(pip.stdout)):
            print(f"  {time.monotonic() - started:4.0f} s  {shown}", flush=True)
    if pip.returncode:
        print("".join(kept[-LINES_OF_A_FAILURE:]), end="", file=sys.stderr)
        print(f"pip failed; all that it said: {log}", file=sys.stderr)
    return pip.returncode


if __name__ == "__main__":
    sys.exit(install(Path(sys.argv[1]), sys.argv[2:]))
