"""Who may run torch on all cores of a CPU: the engine's thread, alone.

OpenMP gives each thread that runs a parallel loop a team of its own, for as long as that thread
lives. With more of them than cores, libgomp lets no thread wait actively, so that every short
loop ends in a system call: a compiled forward of 64 images then took 1.4 times as long, with the
other teams idle. So all other threads of a worker keep to one core, and what needs more runs on
a thread that ends at once.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
_team = 0  # 0: every thread may have a team of torch's default size


def reserve_team() -> None:
    """Call first in a process, on its main thread: from now on teams are as told above."""
    global _team
    _team = torch.get_num_threads()
    torch.set_num_threads(1)


def team_size() -> int:
    """The cores that a network evaluation uses."""
    return _team or torch.get_num_threads()


def use_team() -> None:
    """Let the calling thread run on all cores, for the rest of its life."""
    torch.set_num_threads(team_size())


def keep_to_one() -> None:
    """Let the calling thread have no team. A new thread must say which it wants: this or that."""
    if _team:
        torch.set_num_threads(1)


def with_team(work: Callable[[], T]) -> T:
    """Do this on all cores, on a thread that ends with it; raises what it raises."""
    if not _team:
        return work()
    with ThreadPoolExecutor(1, thread_name_prefix="team", initializer=use_team) as thread:
        return thread.submit(work).result()
