"""Which threads have a team of OpenMP's: seen from outside, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, queue, threading, time
import torch
from diffusion import cores
from worker.engine.loop import Engine

def threads():
    return len(os.listdir("/proc/self/task"))

def started_by_a_loop():
    time.sleep(0.5)  # threads of teams that were let go are ending
    before = threads()
    (torch.ones(1 << 20) * 2).sum()
    return threads() - before

cores.use(2)
assert cores.count() == 2
assert started_by_a_loop() == 0, "the main thread has a team"

seen = queue.SimpleQueue()
engine = Engine(lambda events: None)
engine.start()
engine._command(lambda: seen.put(started_by_a_loop()))
assert seen.get(timeout=10) == 0, "the engine has a team"

def side():
    cores.keep_to_one()
    seen.put(started_by_a_loop())
threading.Thread(target=side).start()
assert seen.get(timeout=10) == 0, "a side thread has a team"

def network(x, t, labels):
    (torch.ones(1 << 20) * 2).sum()
    return x
engine.stop()
time.sleep(0.5)  # the side thread is ending
with torch.no_grad():
    before = threads()
    cores.evaluate(network, torch.zeros(8, 1), torch.zeros(8), None)
    assert threads() - before == 2, "one thread a part"
    cores.evaluate(network, torch.zeros(1, 1), torch.zeros(1), None, large=True)
    assert threads() - before == 3, "a team for one row of a large network"
print("ok")
"""


def test_rows_apart_need_no_teams() -> None:
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
