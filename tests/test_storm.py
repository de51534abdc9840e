"""The storm of faults: those that can be on one service one after the other; slow: each alone."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import pytest

from tests.house import ROOT

RELIABILITY = ROOT / "benchmarks" / "reliability.py"
GROUPS = [
    ["kill -9 a worker", "kill -9 every worker"],
    ["up`"],
    ["Redis", "disk"],
    ["API", "deploy", "model"],
    ["frozen", "hangs", "memory", "clock"],
]


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(RELIABILITY.parent))
    return importlib.import_module("faults")


def storm(*options: str, seconds: float) -> str:
    """Its table; what it skipped is not hidden. Killed, it would leave its service behind."""
    command = [sys.executable, str(RELIABILITY), *options]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            table, notes = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            table, notes = process.communicate(timeout=60)
    assert process.returncode == 0, f"{table}\n{notes[-6000:]}"
    return table


def skip_what_was(table: str) -> None:
    if missing := [line for line in table.splitlines() if "skipped:" in line]:
        pytest.skip("; ".join(missing))  # all others were done


@pytest.mark.timeout(600)
def test_one_fault_after_another_costs_nothing(faults: Any) -> None:
    """Of those that have no short test of their own."""
    names = [name for name, fault in faults.of_one_stage().items() if not fault.in_short]
    table = storm("--together", "--under-way", "6", "--only", *names, seconds=540)
    assert all(f"| {name} |" in table for name in names)
    skip_what_was(table)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_faults_one_after_another_cost_nothing(faults: Any) -> None:
    table = storm("--together", "--under-way", "6", seconds=840)
    assert all(f"| {name} |" in table for name in faults.of_one_stage())
    skip_what_was(table)


def test_no_fault_is_left_out(faults: Any) -> None:
    """Each is on the stage that CI sees, or has a short test; and each is in the long storm."""
    done = {(fault.act, fault.set_up) for fault in faults.of_one_stage().values()}
    for name, fault in faults.FAULTS.items():
        assert any(part in name for group in GROUPS for part in group), name
        if not fault.in_short:
            assert (fault.act, fault.set_up) in done, name
            continue
        file, _, test = fault.in_short.partition("::")
        before, found, _ = (ROOT / file).read_text().partition(f"\ndef {test}(")
        assert found and "\n@pytest.mark.slow\n" not in before.rpartition("\n\n\n")[2] + "\n", name


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("names", GROUPS, ids=lambda names: names[0])
def test_nothing_is_lost_failed_doubled_or_different(names: list[str]) -> None:
    skip_what_was(storm("--short", "--only", *names, seconds=2300))
