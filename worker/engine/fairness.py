"""Who steps next: pure rules over what is in flight.

Each client gets the same share of a batch's rows, and what it cannot use goes to the others. Of a
client's own jobs three steps of four go to those with the least work left, so a short job never
waits for a long one; every fourth goes to the oldest, so a long one never waits for ever. Between
pools the device's time is dealt alike: each client's share in proportion to its waiting images.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

PATIENT_EVERY = 4
LEAST_SHARE = 1 / 8  # of the time, for each pool that has any work


class Runnable(Protocol):
    """What the order looks at."""

    @property
    def urgent(self) -> bool: ...
    @property
    def client(self) -> str: ...
    @property
    def remaining(self) -> int: ...
    @property
    def arrival(self) -> int: ...


R = TypeVar("R", bound=Runnable)
S = TypeVar("S")
K = TypeVar("K", bound=Hashable)


def is_patient(turn: int) -> bool:
    """Whether this turn of a pool goes by age."""
    return turn % PATIENT_EVERY == PATIENT_EVERY - 1


def shortest_first(runs: Iterable[R]) -> list[R]:
    """Urgent before others, then by work left, then by age."""
    return sorted(runs, key=lambda run: (not run.urgent, run.remaining, run.arrival))


def oldest_first(runs: Iterable[R]) -> list[R]:
    """By age alone."""
    return sorted(runs, key=lambda run: run.arrival)


def deal(
    runs: Iterable[R],
    samples: Callable[[R], Iterable[S]],
    cost: Callable[[S], int],
    *,
    patient: bool,
) -> Iterator[S]:
    """The samples of all runs in the order in which they are to step: always one of the client that
    has had the fewest rows so far. patient: by age, else by the work left and the urgent first."""
    if patient:
        yield from _by_client(oldest_first(runs), samples, cost)
        return
    ordered = shortest_first(runs)
    yield from _by_client([run for run in ordered if run.urgent], samples, cost)
    yield from _by_client([run for run in ordered if not run.urgent], samples, cost)


def _by_client(
    runs: Sequence[R], samples: Callable[[R], Iterable[S]], cost: Callable[[S], int]
) -> Iterator[S]:
    clients: dict[str, list[R]] = {}
    for run in runs:
        clients.setdefault(run.client, []).append(run)
    if len(clients) == 1:  # most of the time, and on the way of every step
        yield from (sample for run in runs for sample in samples(run))
        return
    left = [
        (0, first, (sample for run in theirs for sample in samples(run)))
        for first, theirs in enumerate(clients.values())
    ]
    while left:
        rows, first, rest = heapq.heappop(left)
        if (sample := next(rest, None)) is not None:
            yield sample
            heapq.heappush(left, (rows + cost(sample), first, rest))


def pool_weights(waiting: Mapping[K, Mapping[str, float]]) -> dict[K, float]:
    """What each pool weighs against the others, from what waits there of each client."""
    if len(waiting) == 1:
        return dict.fromkeys(waiting, 1.0)
    totals: Counter[str] = Counter()
    for clients in waiting.values():
        totals.update(clients)
    return {
        key: sum(weight / totals[client] for client, weight in clients.items())
        for key, clients in waiting.items()
    }


def fill(samples: Iterable[S], rows: int, cost: Callable[[S], int]) -> list[S]:
    """The first samples, in order, that fit into so many rows; a later one may fill a gap."""
    chosen: list[S] = []
    for sample in samples:
        if rows == 0:
            break
        need = cost(sample)
        if need <= rows:
            chosen.append(sample)
            rows -= need
    return chosen


class Turns:
    """Weighted round robin by cost: over time each key is charged in proportion to its weight."""

    def __init__(self) -> None:
        self._credit: dict[Hashable, float] = {}
        self._shares: dict[Hashable, float] = {}

    def next(self, weights: Mapping[K, float]) -> K:
        """The key whose turn it is. weights: positive; a key that is absent loses its credit."""
        total = sum(weights.values())
        # Nobody gets less than about an eighth, however much the others have to do.
        floored = {key: max(weight / total, LEAST_SHARE) for key, weight in weights.items()}
        scale = sum(floored.values())
        self._shares = {key: share / scale for key, share in floored.items()}
        self._credit = {key: self._credit.get(key, 0.0) for key in weights}
        return max(weights, key=lambda key: (self._credit[key], self._shares[key]))

    def charge(self, key: Hashable, cost: float) -> None:
        """A turn of this key cost so much (seconds); the others' credit grows by their share."""
        if key not in self._credit:
            return
        for other, share in self._shares.items():
            self._credit[other] += share * cost
        self._credit[key] -= cost

    def forget(self, key: Hashable) -> None:
        """This key will not come again."""
        self._credit.pop(key, None)
        self._shares.pop(key, None)
