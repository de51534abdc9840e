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
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from diffusion import winograd
from diffusion.allocator import keep_freed_memory

LARGE = 10_000_000  # weights of a network whose single rows are worth a team
T = TypeVar("T")
Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
_NAME = "rows-"  # of the threads that evaluate parts
_cores = 0  # as told to `use`; 0: what torch was told


def use(cores: int) -> None:
    """Give networks so many cores. Call before the first evaluation, on the main thread.

    Torch by itself asks for as many threads as the machine has cores, whatever a container may use.
    From then on torch's own loops run on one core in every thread that starts: OpenMP gives each
    thread that runs a parallel loop a team of its own, and with more threads than cores none of
    them may wait actively, which makes a team 1.4 times as slow. A thread started earlier, or by
    something else than Python, calls `keep_to_one`. Memory that evaluations free is kept, see
    `diffusion.allocator`.
    """
    global _cores
    _cores = cores
    keep_freed_memory()
    torch.set_num_threads(1)


def keep_to_one() -> None:
    """Let the calling thread have no team, if `use` was called."""
    if _cores:
        torch.set_num_threads(1)


def code_options() -> dict[str, Any]:
    """For Inductor, whoever calls it: a·b + c rounded once, and operations of our own."""
    return {"cpp.enable_floating_point_contract_flag": "fast", **winograd.code_options()}


def compile_options() -> dict[str, Any]:
    """For torch.compile on a CPU: code that threads run side by side.

    As C++ from end to end it lets go of the interpreter's lock; where Python calls one loop after
    the other, the parts would take turns. Its teams are as large as their thread's.
    """
    return {"cpp_wrapper": True, "cpp.dynamic_threads": True, **code_options()}


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


def dealt(
    rows: int, call: Callable[[slice], T], *, device: torch.device, large: bool = False
) -> list[T]:
    """What call(some rows) returns for each part, in the order of the rows.

    On a CPU the parts are dealt to the cores; elsewhere all rows are one part. A new thread has
    neither inference mode nor gradients switched off: the call sees to that.
    """
    if device.type != "cpu":
        return [call(slice(0, rows))]
    parts, threads = deal(rows, count(), large=large)
    calls = [partial(call, slice(*ends)) for ends in pairwise(cuts(rows, parts))]
    return together(calls, threads=threads)


def evaluate(
    network: Network, x: Tensor, t: Tensor, labels: Tensor | None, *, large: bool = False
) -> Tensor:
    """The network's [N, …] of x, t and labels [N, …], its rows dealt to the cores.

    Gradients by x too, once: nothing can be differentiated twice. With gradients by weights or by
    t, on a GPU, and inside of a part, the network alone. Raises what it raises.
    """
    inside = threading.current_thread().name.startswith(_NAME)
    if inside or not x.shape[0] or x.device.type != "cpu":
        return network(x, t, labels)
    parts, threads = deal(x.shape[0], count(), large=large)
    compiled = _is_compiled(network)
    if torch.is_grad_enabled():
        if compiled or not x.requires_grad or t.requires_grad or _learns(network):
            return network(x, t, labels)
        ways = (parts, threads)
        return _Dealt.apply(x, network, t, labels, ways)  # type: ignore[no-untyped-call, no-any-return]
    in_turn = False
    if compiled:
        kind = (x.dtype, t.dtype, labels is None, torch.is_inference_mode_enabled(), threads)
        met = _compiled.setdefault(network, FirstTimes())
        in_turn = met.any_new((size, *kind) for size in sizes(x.shape[0], parts))
    return side_by_side(network, x, t, labels, parts=parts, threads=threads, in_turn=in_turn)


def _is_compiled(network: Network) -> bool:
    """Whether it is a module that torch.compile compiled, or calls one: `diffusion.speed`."""
    here = getattr(network, "_compiled_call_impl", None) is not None
    return here or getattr(network, "is_compiled", False)


def _learns(network: Network) -> bool:
    parameters = network.parameters() if isinstance(network, torch.nn.Module) else ()
    return any(weight.requires_grad for weight in parameters)


class _Dealt(torch.autograd.Function):
    """A network whose rows are dealt to the cores, forwards and backwards by x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, network: Network, t: Tensor, labels: Tensor | None, ways: Any
    ) -> Tensor:
        """ways: parts, and threads a part."""
        parts, ctx.threads = ways

        def evaluate(first: int, last: int) -> tuple[Tensor, Tensor]:
            chosen = None if labels is None else labels[first:last]
            with torch.enable_grad():
                rows = x[first:last].detach().requires_grad_()
                return rows, network(rows, t[first:last], chosen)

        ctx.ends = list(pairwise(cuts(x.shape[0], parts)))
        ctx.made = together([partial(evaluate, *ends) for ends in ctx.ends], threads=ctx.threads)
        return torch.cat([out.detach() for _, out in ctx.made])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """As often as asked for, while the graph is kept."""
        [by_out] = gradients

        def differentiate(rows: Tensor, out: Tensor, first: int, last: int) -> Tensor:
            return torch.autograd.grad(out, rows, by_out[first:last], retain_graph=True)[0]

        calls = [
            partial(differentiate, rows, out, *ends)
            for (rows, out), ends in zip(ctx.made, ctx.ends, strict=True)
        ]
        return torch.cat(together(calls, threads=ctx.threads)), None, None, None, None


class FirstTimes:
    """What torch.compile was called with. At a call of a new kind it compiles, and two threads must
    not do that at once; what is compiled any number may call."""

    def __init__(self) -> None:
        self._met: set[Hashable] = set()

    def any_new(self, kinds: Iterable[Hashable]) -> bool:
        """Whether some kind of call was never asked for before."""
        before = len(self._met)
        self._met.update(kinds)
        return len(self._met) > before


_compiled: WeakKeyDictionary[Network, FirstTimes] = WeakKeyDictionary()


def side_by_side(
    network: Network,
    x: Tensor,
    t: Tensor,
    labels: Tensor | None,
    *,
    parts: int,
    threads: int = 1,
    at_once: int | None = None,
    in_turn: bool = False,
) -> Tensor:
    """The network's [N, …] in so many parts, nearly equal: see `together`."""
    mode = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad

    def evaluate(first: int, last: int) -> Tensor:
        with mode():
            chosen = None if labels is None else labels[first:last]
            return network(x[first:last], t[first:last], chosen)

    calls = [partial(evaluate, *ends) for ends in pairwise(cuts(x.shape[0], parts))]
    found = together(calls, threads=threads, at_once=at_once, in_turn=in_turn)
    return torch.cat(found) if parts > 1 else found[0]


def cuts(rows: int, parts: int) -> list[int]:
    """Where parts of nearly equal size begin, and the end of the last."""
    return [i * rows // parts for i in range(parts + 1)]


def sizes(rows: int, parts: int) -> set[int]:
    """Of the parts."""
    return {last - first for first, last in pairwise(cuts(rows, parts))}


def together(
    calls: Sequence[Callable[[], T]],
    *,
    threads: int = 1,
    at_once: int | None = None,
    in_turn: bool = False,
) -> list[T]:
    """What calls return, each made on a thread whose operations have a team of so many threads.

    at_once: how many threads make them (None: one a call); whoever is done takes the next.
    in_turn: one after the other. Raises the error of the first that failed, once all have ended.
    """
    workers = 1 if in_turn else min(at_once or len(calls), len(calls))
    found: dict[int, T] = {}
    left = deque(range(workers, len(calls)))

    def work(i: int) -> None:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        found[i] = calls[i]()
        while left:
            try:
                i = left.popleft()
            except IndexError:  # another was quicker
                return
            found[i] = calls[i]()

    futures = [_threads(i).submit(work, i) for i in range(workers)]
    errors = [error for error in (future.exception() for future in futures) if error is not None]
    if errors:
        raise errors[0]
    return [found[i] for i in range(len(calls))]


_pool: list[ThreadPoolExecutor] = []
_growing = threading.Lock()


def _threads(i: int) -> ThreadPoolExecutor:
    """The i-th thread, each with a queue of its own, so that a part always has the same one."""
    with _growing:
        while len(_pool) <= i:
            _pool.append(ThreadPoolExecutor(1, f"{_NAME}{len(_pool)}"))
        return _pool[i]
