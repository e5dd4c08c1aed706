"""No test waits for another process without an end: CI would wait for the limit of all, 600 s."""

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parent
RUNS = {"subprocess.run", "subprocess.check_call", "subprocess.check_output"}
WAITS = {"wait", "communicate", "join"}
"""Methods of processes and threads whose first argument, or the one called timeout, is an end."""


def endless(source: str) -> Iterator[str]:
    """Yield the calls that may wait for ever, with their lines."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        method = name.rpartition(".")[2] if isinstance(node.func, ast.Attribute) else ""
        given = {each.arg for each in node.keywords}
        no_end = not given & {"timeout", None}
        if name in RUNS or (method == "communicate" and len(node.args) < 2):
            wrong = no_end
        else:
            wrong = method in WAITS and not node.args and no_end
        if wrong:
            yield f"{node.lineno}: {name}"


def test_no_test_waits_without_an_end():
    found = {
        str(path.relative_to(TESTS)): calls
        for path in sorted(TESTS.glob("**/*.py"))
        if "mutants" not in path.parts and (calls := [*endless(path.read_text())])
    }
    # A barrier that has its own end, and a server's thread that was told to end.
    assert found == {
        "support/http_server.py": ["27: thread.join"],
        "test_machines_in_process.py": ["19: self._meeting.wait"],
    }


def test_that_test_can_fail():
    waits = (
        "subprocess.run(words)",
        "child.communicate(b'go')",
        "child.communicate()",
        "child.wait()",
        "thread.join()",
    )
    ends = (
        "subprocess.run(words, timeout=5)",
        "subprocess.run(words, **settings)",
        "child.communicate(b'go', timeout=5)",
        "child.wait(5)",
        "thread.join(timeout=5)",
        "', '.join(words)",
    )
    assert [call for call in (*waits, *ends) if [*endless(call)]] == [*waits]
