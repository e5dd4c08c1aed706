"""Ask for known vulnerabilities of the pinned versions; exit code 1 if one is not answered here.

Without the vulnerability service (a mirror of packages alone, no network) that is said in one line
and is no failure: nothing is known then, and nothing is claimed.
"""

import json
import subprocess
import sys
from pathlib import Path

ANSWERED: dict[str, str] = {}
"""Identifier of a vulnerability -> why it does not concern us, or until when it stays."""
SERVICE_SECONDS = 120


def findings(report: str) -> tuple[list[str], int]:
    """Read pip-audit's JSON.

    Returns:
        a line for each vulnerability that is not answered, and how many packages were looked up.
    """
    looked_up = [each for each in json.loads(report)["dependencies"] if "vulns" in each]
    lines = [
        f"{each['name']} {each['version']}: {found['id']}, mended in "
        f"{', '.join(found['fix_versions']) or 'no version yet'}"
        for each in looked_up
        for found in each["vulns"]
        if not {found["id"], *found.get("aliases", ())} & set(ANSWERED)
    ]
    return lines, len(looked_up)


def main(constraints: Path) -> int:
    """Audit a file of pinned versions; return the exit code."""
    audit = [
        *(sys.executable, "-m", "pip_audit", "-r", str(constraints), "--no-deps", "--disable-pip"),
        *("--progress-spinner", "off", "-f", "json"),
    ]
    try:
        run = subprocess.run(audit, capture_output=True, text=True, timeout=SERVICE_SECONDS)
        found, looked_up = findings(run.stdout)
    except (subprocess.TimeoutExpired, ValueError):  # it prints no JSON where nothing answers
        found, looked_up = [], 0
    if not looked_up:
        print("pip-audit: its vulnerability service does not answer here; nothing was audited")
        return 0
    print("\n".join([*found, f"pip-audit: {looked_up} packages, {len(found)} vulnerabilities"]))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
