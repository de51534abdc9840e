"""The storm of faults, each once: `benchmarks/reliability.py --short`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.house import ROOT

GROUPS = [
    ["every 2 s", "every worker", "up`"],
    ["Redis", "disk"],
    ["API", "deploy", "model"],
    ["frozen", "hangs", "memory", "clock"],
]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("names", GROUPS, ids=lambda names: names[0])
def test_nothing_is_lost_failed_doubled_or_different(names: list[str]) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "reliability.py"), "--short", "--only"]
    done = subprocess.run([*command, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    if missing := [line for line in done.stdout.splitlines() if "skipped:" in line]:
        pytest.skip("; ".join(missing))  # the others of the group were done
