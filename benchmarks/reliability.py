"""A storm of real faults on a service under load: what is lost, failed, doubled or different.

    .venv/bin/python benchmarks/reliability.py [--short] [--only NAME …] [--together]
        [--under-way JOBS] [--soak JOBS STREAMS]

Each fault has a service of its own: Redis with a file on a disk, two workers, the API. While
clients keep a dozen jobs under way it is done so many times; then all that was accepted must end,
with the very images of an undisturbed service. --short does each once. --together does all that
can be on one service, one after the other, each as soon as jobs end again after the last.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from faults import (
    FAULTS,
    ON_OTHER,
    Fault,
    Skipped,
    faked_clock,
    kill_under_up,
    knows,
    move_clock,
    nothing,
    of_one_stage,
    other_model,
)
from followers import Followers
from soak import soak
from storm import REQUESTS, Stage, UpStage, save_model, until
from storm_load import Load, Row


@contextlib.contextmanager
def staged(models: Path, *faults: Fault, brief: bool = False) -> Iterator[Stage]:
    """A service for these faults that serves a copy of the models. Raises Skipped."""
    acts = [fault.act for fault in faults]
    folder = Path(tempfile.mkdtemp(prefix="storm-"))
    try:
        shutil.copytree(models, folder / "models")
        more = faked_clock(folder) if move_clock in acts else {}
        kind = UpStage if kill_under_up in acts else Stage
        stage = kind(folder, folder / "models", brief=brief, **more)
        try:
            with httpx.Client(base_url=stage.url, trust_env=False) as client:
                until(lambda: knows(client, "tiny"), "the service")
            yield stage
        except BaseException:
            sys.stderr.write((folder / "log").read_text(errors="replace")[-3000:])
            raise
        finally:
            stage.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def do(fault: Fault, stage: Stage, load: Load, *, tries: int, pause: Callable[[], None]) -> None:
    """A fault so often. Raises what went wrong with the load."""
    for number in range(tries):
        stage.number = number
        fault.act(stage)
        pause()
        if load.failure is not None:
            raise load.failure


def run(fault: Fault, models: Path, *, tries: int, most: int, expected: dict[str, set[Any]]) -> Row:
    """One line of the table. most: jobs under way."""
    with (
        staged(models, fault) as stage,
        (fault.set_up or contextlib.nullcontext)(stage) as followers,
    ):
        load = Load(stage, expected, requests=fault.requests, most=most)
        load.start()
        time.sleep(3)
        do(fault, stage, load, tries=tries, pause=lambda: time.sleep(fault.pause))
        if isinstance(followers, Followers):
            followers.stop()
        row = load.finish()
        row.tries = tries
        if isinstance(followers, Followers):
            followers.reckon(row)
    return row


def together(models: Path, *parts: str, most: int) -> bool:
    """Each fault that can be beside others, and what ended while it was done; whether all went
    well."""
    faults, sound = of_one_stage(*parts), True
    try:
        with tempfile.TemporaryDirectory() as folder:
            faked_clock(Path(folder))
    except Skipped as why:
        for name in [name for name, fault in faults.items() if fault.act is move_clock]:
            skip(name, why)
            del faults[name]
    with staged(models, *faults.values(), brief=True) as stage, contextlib.ExitStack() as stack:
        entered = {}
        for name, fault in faults.items():
            try:
                set_up = (fault.set_up or contextlib.nullcontext)(stage)
                entered[name] = stack.enter_context(set_up)
            except Skipped as why:
                skip(name, why)
        followed = [it for it in entered.values() if isinstance(it, Followers)]
        models_are_two = any(fault.set_up is other_model for fault in faults.values())
        requests = (*REQUESTS[:3], *(ON_OTHER[3:] if models_are_two else ()))  # short jobs
        load = Load(stage, {}, requests=requests, most=most)
        load.start()
        until(lambda: len(load.expected) == len(requests) or load.failure, "an undisturbed service")
        sound &= show("none", load.turn())
        for name in entered:
            fault = faults[name]
            do(fault, stage, load, tries=fault.beside, pause=load.recover)
            row = load.turn()
            row.tries = fault.beside
            sound &= show(name, row)
        for followers in followed:
            followers.stop()
        row = load.finish()
        for followers in followed:
            followers.reckon(row)
        return show("to the end", row) and sound


def show(name: str, row: Row) -> bool:
    """A line of the table; whether it has nothing but zeros."""
    counts = (row.tries, row.accepted, row.lost, row.failed, row.doubled, row.different)
    print(f"| {name} | {' | '.join(map(str, counts))} | {row.recovery:.0f} |", flush=True)
    for note in row.notes[:5]:
        print(f"  {name}: {note}", file=sys.stderr, flush=True)
    return row.sound


def skip(name: str, why: Skipped) -> None:
    """A line of the table for what cannot be done here."""
    print(f"| {name} | skipped: {why} | | | | | | |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="each fault once")
    parser.add_argument("--together", action="store_true", help="each fault once, on one service")
    parser.add_argument("--only", nargs="+", default=[""], help="faults whose name has this")
    parser.add_argument("--under-way", type=int, default=12, help="jobs at once")
    parser.add_argument("--soak", nargs=2, type=int, metavar=("JOBS", "STREAMS"))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # and cleans up
    if options.soak:
        sys.exit(not soak(*options.soak))
    models, sound = Path(tempfile.mkdtemp(prefix="storm-models-")), True
    save_model(models / "tiny", seed=0)
    print("| fault | tries | accepted | lost | failed | doubled | different | recovery, s |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    if options.together:
        sys.exit(not together(models, *options.only, most=options.under_way))
    expected: dict[str, set[Any]] = {}
    for name, fault in {"none": Fault(nothing, 1, 20.0), **FAULTS}.items():
        if name != "none" and not any(part in name for part in options.only):
            continue
        try:
            tries = 1 if options.short else fault.tries
            row = run(fault, models, tries=tries, most=options.under_way, expected=expected)
        except Skipped as why:
            skip(name, why)
            continue
        sound &= show(name, row)
    shutil.rmtree(models)
    sys.exit(not sound)


if __name__ == "__main__":
    main()
