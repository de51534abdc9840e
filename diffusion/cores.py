"""How the cores of a CPU share the rows of a batch: side by side, and not inside each operation.

A network is a hundred short loops. A team of threads that shares each of them meets at a barrier
after each, so that one neighbour on one core holds all the others up, and whoever waits there
spins. Rows dealt to the cores need one meeting a batch: as fast on a quiet machine (1.1 times for
16 rows on two cores), and 2 to 25 times as fast beside one or two busy processes. See
`benchmarks/neighbours.py`.

A team inside the operations is left for few rows of a large network, and for machines with more
cores than a batch feeds: Python starts the operations of all parts in turn.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

LARGE = 10_000_000  # weights of a network whose single rows are worth a team
Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
_NAME = "rows-"  # of the threads that evaluate parts
_cores = 0  # as told to `use`; 0: what torch was told


def use(cores: int) -> None:
    """Give networks so many cores. Call before the first evaluation, on the main thread.

    From then on torch's own loops run on one core in every thread that starts: OpenMP gives each
    thread that runs a parallel loop a team of its own, and with more threads than cores none of
    them may wait actively, which makes a team 1.4 times as slow. A thread started earlier, or by
    something else than Python, calls `keep_to_one`.
    """
    global _cores
    _cores = cores
    torch.set_num_threads(1)


def limit(cores: int | None = None) -> None:
    """Let torch run on so many cores from now on; None: on those that are there for this process.

    Torch itself asks for as many threads as the machine has cores, whatever a container may use.
    """
    torch.set_num_threads(cores or count())


def keep_to_one() -> None:
    """Let the calling thread have no team, if `use` was called."""
    if _cores:
        torch.set_num_threads(1)


@contextmanager
def team() -> Iterator[None]:
    """Let the calling thread share its operations among all cores: for what needs gradients."""
    before = torch.get_num_threads()
    torch.set_num_threads(count())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def count() -> int:
    """The cores that a network evaluation uses."""
    return _cores or max(1, min(torch.get_num_threads(), usable()))


@cache
def usable() -> int:
    """The cores that this process may use: its affinity, and its container's share of time."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        allowed = os.cpu_count() or 1
    share = quota()
    return allowed if share is None else max(1, min(allowed, math.floor(share + 0.5)))


def quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that the control groups of this process allow; None: no limit.

    Of version 2 (`cpu.max`) or 1 (`cpu.cfs_quota_us`), the least of all groups above it.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found: list[float] = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            found += _shares(root / "sys/fs/cgroup", group, _share_v2)
        elif "cpu" in controllers.split(","):
            for name in (controllers, "cpu"):
                found += _shares(root / "sys/fs/cgroup" / name, group, _share_v1)
    return min(found, default=None)


def _shares(mount: Path, group: str, share: Callable[[Path], float | None]) -> list[float]:
    """Of a group and those above it. In a container the mount may begin at the group itself."""
    here = mount / group.lstrip("/")
    folders = [here, *here.parents][: len(Path(group).parts)]
    values = [share(folder) for folder in {*folders, mount}]
    return [value for value in values if value is not None]


def _share_v2(folder: Path) -> float | None:
    try:
        most, period = (folder / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return None if most == "max" else int(most) / int(period)


def _share_v1(folder: Path) -> float | None:
    try:
        most, period = (
            int((folder / name).read_text(encoding="ascii"))
            for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        )
    except (OSError, ValueError):
        return None
    return None if most <= 0 else most / period


def deal(rows: int, cores: int, *, large: bool) -> tuple[int, int]:
    """(parts, threads a part) for a batch. large: a network of `LARGE` weights or more."""
    parts = max(1, min(cores, rows, 3 * rows // (2 * cores)))
    if parts == 1 and not large:  # a team as large as the machine gains nothing on short loops
        return 1, max(1, cores // 2)
    return parts, cores // parts


def evaluate(
    network: Network, x: Tensor, t: Tensor, labels: Tensor | None, *, large: bool = False
) -> Tensor:
    """The network's [N, …] of x, t and labels [N, …], its rows dealt to the cores.

    With gradients, on a GPU, inside of a part, and where torch.compile has the network, which
    must not be entered by two threads, the network alone. Raises what it raises.
    """
    inside = threading.current_thread().name.startswith(_NAME)
    compiled = getattr(network, "_compiled_call_impl", None) is not None
    alone = torch.is_grad_enabled() or inside or compiled or not x.shape[0]
    if alone or x.device.type != "cpu":
        return network(x, t, labels)
    parts, threads = deal(x.shape[0], count(), large=large)
    return side_by_side(network, x, t, labels, parts=parts, threads=threads)


def side_by_side(
    network: Network, x: Tensor, t: Tensor, labels: Tensor | None, *, parts: int, threads: int = 1
) -> Tensor:
    """The network's [N, …] in so many parts, nearly equal, each on a thread with its own team."""
    mode = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad

    def evaluate(first: int, last: int) -> Tensor:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        with mode():
            chosen = None if labels is None else labels[first:last]
            return network(x[first:last], t[first:last], chosen)

    ends = [i * x.shape[0] // parts for i in range(parts + 1)]
    found = [
        _threads(i).submit(evaluate, first, last) for i, (first, last) in enumerate(pairwise(ends))
    ]
    return torch.cat(_all(found)) if parts > 1 else found[0].result()


def _all(futures: list[Future[Tensor]]) -> list[Tensor]:
    """The results, once all have ended: none may still be reading what the caller goes on with."""
    errors = [error for error in (future.exception() for future in futures) if error is not None]
    if errors:
        raise errors[0]
    return [future.result() for future in futures]


_pool: list[ThreadPoolExecutor] = []
_growing = threading.Lock()


def _threads(i: int) -> ThreadPoolExecutor:
    """The i-th thread, each with a queue of its own, so that a part always has the same one."""
    with _growing:
        while len(_pool) <= i:
            _pool.append(ThreadPoolExecutor(1, f"{_NAME}{len(_pool)}"))
        return _pool[i]
