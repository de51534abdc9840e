"""Bytes that no two ask for are the same, in this process and in its children."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from jobs import chance


def test_nothing_is_given_out_twice() -> None:
    with ThreadPoolExecutor(8) as threads:
        drawn = [*threads.map(lambda size: chance.draw(8 + size % 3), range(5000))]
    assert len({*drawn}) == len(drawn)
    assert [len(piece) for piece in drawn] == [8 + size % 3 for size in range(5000)]
    assert len(chance.draw(10_000)) == 10_000


def test_numbers_fill_their_range() -> None:
    drawn = [chance.below_power(3) for _ in range(1000)]
    assert {*drawn} == {*range(8)}
    assert 0 < max(chance.below_power(53) for _ in range(1000)).bit_length() <= 53


def test_a_child_draws_its_own() -> None:
    chance.draw(1)  # something is left, which the child has too
    ours, theirs = os.pipe()
    if (child := os.fork()) == 0:
        os.write(theirs, chance.draw(16))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(ours, 16) != chance.draw(16)
    os.close(ours)
    os.close(theirs)
