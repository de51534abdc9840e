"""What `ddpm up` does with each of its children: logs, last words, another start."""

from __future__ import annotations

import itertools
import os
import sys
import time
from pathlib import Path

import pytest

from app.up import children, parts
from app.up.children import Child, rotate
from app.up.parts import Part


def python(code: str, log: Path) -> Child:
    return Child("it", [sys.executable, "-c", code], log=log, env={})


def test_a_childs_epitaph(tmp_path: Path) -> None:
    log = tmp_path / "it.log"
    log.write_text("the words of an earlier one\n")
    child = python("import sys; print('first'); print('why'); sys.exit(3)", log)
    child.wait(20)
    assert child.epitaph().splitlines() == [
        f"it stopped (exit status 3); see {log}",
        "  first",
        "  why",
    ]
    assert log.read_text().startswith("the words of an earlier one\n--- it, ")
    sleeper = Child("it", ["sleep", "60"], log=tmp_path / "s.log", env={})
    sleeper.kill()
    sleeper.wait(5)
    assert sleeper.epitaph().startswith("it stopped (signal SIGKILL)")


def test_a_long_log_is_turned_while_its_process_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(children, "LOG_BYTES", 4000)
    log = tmp_path / "it.log"
    child = python(
        "import time\nfor i in range(2000): print(i, flush=True); time.sleep(0.0005)", log
    )
    while child.running:
        child.turn_log()
        time.sleep(0.01)
    kept = [log, *(tmp_path / f"it.log.{i}" for i in range(1, children.OLD_LOGS + 1))]
    assert sorted(tmp_path.iterdir()) == sorted(path for path in kept if path.exists())
    assert kept[1].exists()
    lines = [
        line for path in reversed(kept) if path.exists() for line in path.read_text().splitlines()
    ]
    numbers = [int(line) for line in lines if not line.startswith("---")]
    assert numbers == sorted(numbers) and numbers[-1] == 1999
    assert child.last_words().endswith("1999")


def test_a_log_that_is_gone_or_cannot_be_turned_ends_nothing(
    tmp_path: Path, small_disk: Path
) -> None:
    log = small_disk / "it.log"
    child = python("pass", log)
    child.wait(60)
    with log.open("ab") as file:
        file.truncate(children.LOG_BYTES)  # large, of no blocks
    (small_disk / "filler").write_bytes(b"0" * os.statvfs(small_disk).f_bavail * 4096)
    child.turn_log()
    assert log.stat().st_size == 0 and not log.with_name("it.log.1").exists()
    log.unlink()
    child.turn_log()
    assert "its log cannot be read" in child.epitaph()


def test_a_short_log_stays(tmp_path: Path) -> None:
    log = tmp_path / "it.log"
    assert not rotate(log)
    log.write_text("short")
    assert not rotate(log) and log.read_text() == "short"


def test_a_part_that_ends_is_started_again_later_each_time(tmp_path: Path) -> None:
    said: list[str] = []
    starts: list[float] = []

    def start() -> Child:
        starts.append(time.monotonic())
        if len(starts) == 3:
            raise OSError("no memory")
        return python("raise SystemExit('no good')", tmp_path / "it.log")

    part = Part(start, said.append)
    deadline = time.monotonic() + 60
    while len(starts) < 4:
        part.keep()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    part.child.wait(20)
    assert [line.splitlines()[-1].strip() for line in said] == [
        "starting another in 0.5 s",
        "starting another in 1 s",
        "it cannot be started: no memory; again in 2 s",
    ]
    assert all("no good" in line for line in said[:2])
    waits = [b - a for a, b in itertools.pairwise(starts)]
    assert waits[0] >= 0.5 and waits[1] >= 1 and waits[2] >= 2


def test_a_part_that_lived_for_long_is_back_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_STEADY_S", 0.0)
    said: list[str] = []
    part = Part(lambda: python("pass", tmp_path / "it.log"), said.append)
    deadline = time.monotonic() + 60
    while len(said) < 3:
        part.keep()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert all(line.endswith("starting another in 0.5 s") for line in said)


def test_children_take_nothing_from_the_folder_they_start_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs.processes import command_of

    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "__init__.py").write_text("raise SystemExit('the app of somebody else')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    child = Child("it", command_of("ddpm", "api", "--help"), log=Path("it.log"), env={})
    child.wait(60)
    assert "Run the HTTP API alone" in Path("it.log").read_text()
    assert os.environ.get("PYTHONPATH") is None
