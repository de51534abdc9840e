from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from worker.engine import fairness
from worker.engine.fairness import (
    LEAST_SHARE,
    Turns,
    fill,
    is_patient,
    oldest_first,
    shortest_first,
)


@dataclass(frozen=True)
class Job:
    arrival: int
    remaining: int
    urgent: bool = False
    client: str = ""


LONG, SHORT, LATER = Job(0, 6400), Job(1, 10), Job(2, 10)


def test_the_shortest_goes_first_and_equals_by_age() -> None:
    assert shortest_first([LATER, LONG, SHORT]) == [SHORT, LATER, LONG]


def test_urgent_goes_before_short() -> None:
    urgent = Job(3, 6400, urgent=True)
    assert shortest_first([SHORT, urgent]) == [urgent, SHORT]


def test_every_fourth_turn_goes_by_age_so_a_long_job_gets_a_quarter() -> None:
    assert [is_patient(turn) for turn in range(8)].count(True) == 2
    assert oldest_first([LATER, SHORT, LONG])[0] is LONG


def test_fill_lets_a_small_one_into_a_gap() -> None:
    assert fill([2, 2, 2, 1], 5, lambda cost: cost) == [2, 2, 1]
    assert fill([2, 2], 1, lambda cost: cost) == []


def deal(
    weights: dict[str, float], costs: dict[str, float], n: int, turns: Turns | None = None
) -> list[str]:
    """Whose n turns it was."""
    turns = turns or Turns()
    dealt = []
    for _ in range(n):
        key = turns.next(weights)
        turns.charge(key, costs[key])
        dealt.append(key)
    return dealt


def test_turns_are_dealt_in_proportion_to_weight() -> None:
    dealt = deal({"a": 3.0, "b": 1.0}, {"a": 1.0, "b": 1.0}, 400)
    assert Counter(dealt) == {"a": 300, "b": 100}


def test_a_pool_of_long_turns_gets_fewer_of_them() -> None:
    dealt = deal({"quick": 1.0, "slow": 1.0}, {"quick": 0.01, "slow": 0.4}, 410)
    assert Counter(dealt) == {"quick": 400, "slow": 10}
    assert dealt[:82].count("slow") == 2


def test_who_comes_later_has_no_claim_on_the_past() -> None:
    turns = Turns()
    for _ in range(100):
        turns.charge(turns.next({"old": 1.0}), 1.0)
    dealt = deal({"old": 1.0, "new": 1.0}, {"old": 1.0, "new": 1.0}, 10, turns)
    assert dealt.count("new") == 5


def test_no_pool_waits_for_ever() -> None:
    dealt = deal({"busy": 6400.0, "small": 1.0}, {"busy": 1.0, "small": 1.0}, 100)
    assert dealt.count("small") >= 100 * LEAST_SHARE / (1 + LEAST_SHARE) - 1


def rows(runs: list[Job], *, patient: bool = False) -> str:
    """Whose the first twelve rows of a batch are; each run has nine samples of one row."""
    dealt = fairness.deal(runs, lambda run: [run] * 9, lambda _: 1, patient=patient)
    return "".join(job.client for job in fill(dealt, 12, lambda _: 1))


def test_each_client_gets_the_same_rows_whatever_it_has_waiting() -> None:
    many = [Job(i, 1, client="a") for i in range(100)]
    assert rows([*many, Job(100, 900, client="b")]) == "ab" * 6
    assert rows([*many, Job(100, 900, client="b"), Job(101, 5, client="c")]) == "acb" * 4
    assert rows(many) == "a" * 12


def test_urgent_runs_go_before_others_but_not_when_it_is_the_turn_of_the_oldest() -> None:
    runs = [Job(0, 9, client="a"), Job(1, 9, client="b"), Job(2, 9, urgent=True, client="b")]
    assert rows(runs) == "bbbbbbbbb" + "aba"
    assert rows(runs, patient=True) == "ab" * 6


def test_a_sample_of_two_rows_counts_twice() -> None:
    guided, plain = Job(0, 9, client="g"), Job(1, 9, client="p")
    dealt = fairness.deal(
        [guided, plain], lambda run: [run] * 9, lambda job: 1 + (job is guided), patient=False
    )
    assert "".join(job.client for job in dealt)[:9] == "gppgppgpp"


def test_pools_share_the_device_by_client_too() -> None:
    weights = fairness.pool_weights({"x": {"a": 300, "b": 1}, "y": {"a": 100}, "z": {"c": 1}})
    assert weights == {"x": 1.75, "y": 0.25, "z": 1.0}
