"""Which threads have a team of OpenMP's: seen from outside, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, queue, threading, time
import torch
from worker.engine.loop import Engine
from worker.network.threads import keep_to_one, reserve_team, team_size, with_team

def threads():
    return len(os.listdir("/proc/self/task"))

def started_by_a_loop():
    time.sleep(0.5)  # threads of teams that were let go are ending
    before = threads()
    (torch.ones(1 << 20) * 2).sum()
    return threads() - before

torch.set_num_threads(2)
reserve_team()
assert team_size() == 2
assert started_by_a_loop() == 0, "the main thread has a team"
assert with_team(started_by_a_loop) == 1
def fail(): raise KeyError("seen")
try:
    with_team(fail)
except KeyError:
    pass
else:
    raise AssertionError

seen = queue.SimpleQueue()
engine = Engine(lambda events: None)
engine.start()
engine._command(lambda: seen.put(started_by_a_loop()))
assert seen.get(timeout=10) == 1, "the engine has no team"

def side():
    keep_to_one()
    seen.put(started_by_a_loop())
threading.Thread(target=side).start()
assert seen.get(timeout=10) == 0, "a side thread has a team"
engine.stop()
assert started_by_a_loop() == 0
print("ok")
"""


def test_the_engine_alone_has_a_team_for_good() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout == "ok\n", done.stderr
