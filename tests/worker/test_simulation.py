"""Any order of what can happen to jobs, workers and the janitor: hypothesis looks for one in
which something is lost, doubled, miscounted or blamed on the wrong job.

A failure prints the steps that lead to it, and its seed: DDPM_SIMULATION_SEED=… replays it.
"""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from jobs.states import ACTIVE, Status
from jobs.store.started import SILENT_S
from tests.worker.simulation import POISON, Clock, Puppet, World
from worker.models import ModelFolder, card_of
from worker.network.networks import Networks

WHO = st.integers(0, 2)
WHICH = st.integers(0, 11)


class Machine(RuleBasedStateMachine):
    """Hypothesis chooses what happens next."""

    parts: ClassVar[tuple[Any, ...]]
    clock: ClassVar[Clock]

    def __init__(self) -> None:
        super().__init__()
        self.world = World(*self.parts)
        self.world.clock = self.clock

    @rule(
        client=st.sampled_from("ab"),
        images=st.integers(1, 3),
        steps=st.integers(3, 8),
        seed=st.sampled_from([0, 1, 2, 3, 0, 1, 2, 3, POISON]),
        high=st.booleans(),
    )
    def admit(self, client: str, images: int, steps: int, seed: int, high: bool) -> None:
        if len(self.world.jobs) < 10:
            self.world.admit(
                client, num_images=images, steps=steps, seed=seed,
                priority="high" if high else "normal",
            )  # fmt: skip

    @rule(who=WHO, boards=st.integers(1, 3), ticks=st.integers(1, 4))
    def work(self, who: int, boards: int, ticks: int) -> None:
        """What a worker does most of the time."""
        puppet = self.world.worker(who)
        for _ in range(boards):
            puppet.act(puppet.board)
        for _ in range(ticks):
            puppet.act(puppet.runtime.engine.tick)
            puppet.act(puppet.round)

    @rule(who=WHO, count=st.integers(1, 4))
    def board(self, who: int, count: int) -> None:
        puppet = self.world.worker(who)
        for _ in range(count):
            puppet.act(puppet.board)

    @rule(who=WHO, count=st.integers(1, 6))
    def step(self, who: int, count: int) -> None:
        puppet = self.world.worker(who)
        for _ in range(count):
            puppet.act(puppet.runtime.engine.tick)

    @rule(who=WHO)
    def round(self, who: int) -> None:
        puppet = self.world.worker(who)
        puppet.act(puppet.round)

    @rule(seconds=st.sampled_from([0.3, 0.6, 6.0, 25.0, 70.0, 200.0]))
    def wait(self, seconds: float) -> None:
        self.world.wait(seconds)

    @rule(who=WHO)
    def kill(self, who: int) -> None:
        self.world.worker(who).die()

    @rule(who=WHO, commands=st.integers(0, 25))
    def kill_soon(self, who: int, commands: int) -> None:
        self.world.worker(who).pool.fuse = commands

    @rule(who=WHO, commands=st.integers(1, 3))
    def lose_connection(self, who: int, commands: int) -> None:
        self.world.worker(who).pool.away = commands

    @rule(who=WHO)
    def freeze_or_thaw(self, who: int) -> None:
        puppet = self.world.worker(who)
        puppet.frozen = not puppet.frozen

    @rule(who=WHO, other=WHO, ticks=st.integers(0, 3))
    def hang(self, who: int, other: int, ticks: int) -> None:
        """One worker does nothing until another has its jobs, and then goes on."""
        puppet, heir = self.world.worker(who), self.world.worker(other)
        puppet.frozen = True
        self.clean(26.0)
        for _ in range(3):
            heir.act(heir.board)
        puppet.frozen = False
        for _ in range(ticks):
            puppet.act(puppet.runtime.engine.tick)

    @rule(who=WHO, other=WHO, commands=st.integers(0, 40), boards=st.integers(0, 3))
    def freeze_soon(self, who: int, other: int, commands: int, boards: int) -> None:
        """Between two commands, for so long that the jobs are another's, or wait again."""
        puppet, heir = self.world.worker(who), self.world.worker(other)
        freeze_after(self, puppet, heir, commands=commands, boards=boards)
        for _ in range(3):
            puppet.act(puppet.board)
        puppet.act(puppet.round)

    @rule(who=WHO, rounds=st.sampled_from([0, 1, 12]))
    def deploy(self, who: int, rounds: int) -> None:
        """A stop, and what follows of it: nothing yet, some, or all."""
        puppet = self.world.worker(who)
        puppet.act(puppet.stop)
        for _ in range(rounds):
            self.clock.sleep(0.6)
            puppet.act(puppet.round)
            puppet.act(puppet.runtime.engine.tick)

    @rule(which=WHICH)
    def cancel(self, which: int) -> None:
        self.world.cancel(which)

    @rule(which=WHICH)
    def purge(self, which: int) -> None:
        self.world.purge(which)

    @rule(seconds=st.sampled_from([0.0, 6.0, 26.0]))
    def clean(self, seconds: float) -> None:
        """The janitor believes what it sees twice; the jobs of the dead come back in 20 s."""
        self.world.wait(seconds)
        self.world.janitor.run()
        if seconds:
            self.world.wait(6.0)
            self.world.janitor.run()

    @invariant()
    def holds(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        try:
            self.world.settle()
            self.world.check()
        finally:
            self.world.close()


@pytest.fixture
def machine(redis_url: str, model_folder: Path) -> Iterator[type[Machine]]:
    """The machine, with what all its runs share."""
    folder = ModelFolder(model_folder, queue="ddpm")
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        folder.rescan()
        networks = Networks(torch.float32, 8)
        [served] = folder.served.values()
        networks.prepare(served.model)
        World.install(patch, clock)
        Machine.parts = (redis_url, folder, networks, card_of(served.model, "tiny", "ddpm"))
        Machine.clock = clock
        yield Machine


def freeze_at_the_job(state: Machine, which: int) -> Puppet:
    """A worker takes the only job, steps it a little, and is silent until the job is taken away."""
    puppet = state.world.worker(which)
    puppet.act(puppet.board)
    for _ in range(3):
        puppet.act(puppet.round)
        puppet.act(puppet.runtime.engine.tick)
    assert puppet.rq._boarded
    puppet.frozen = True
    state.clean(26.0)
    return puppet


def freeze_after(
    state: Machine, puppet: Puppet, heir: Puppet, *, commands: int, boards: int
) -> None:
    """So many commands on, a worker is silent until its jobs wait again, or are another's."""

    def meanwhile() -> None:
        puppet.frozen = puppet.froze = True
        state.world.wait(70.0)
        state.clean(6.0)
        for _ in range(boards):
            heir.act(heir.board)
            heir.act(heir.runtime.engine.tick)
        puppet.frozen = False

    puppet.pool.meanwhile = meanwhile  # type: ignore[method-assign]
    puppet.pool.awake = commands


def moments(machine: type[Machine]) -> Iterator[tuple[Machine, Puppet, Puppet, int]]:
    """A world with one job and two workers for each command before which the first can be frozen,
    until it has come through without; at the end of each the job must be done."""
    for commands in itertools.count():
        state = machine()
        state.admit(client="a", images=1, steps=8, seed=0, high=False)
        puppet, heir = state.world.worker(0), state.world.worker(1)
        yield state, puppet, heir, commands
        [record] = state.world.records()
        assert record.status is Status.SUCCEEDED, f"after {commands} commands: {record}"
        state.holds()
        state.world.close()
        if not puppet.froze:
            break
    assert commands > 5


@pytest.mark.parametrize("boards", [0, 1], ids=["waits again", "runs elsewhere"])
def test_a_worker_frozen_as_it_begins_a_job_takes_it_from_nobody(
    machine: type[Machine], boards: int
) -> None:
    """Between any two of its commands."""
    for state, puppet, heir, commands in moments(machine):
        freeze_after(state, puppet, heir, commands=commands, boards=boards)
        puppet.act(puppet.board)
        for _ in range(30):
            if state.world.records()[0].status not in ACTIVE:
                break
            go_on(state, puppet, rounds=1)
            go_on(state, heir, rounds=1)
            heir.act(heir.board)
            state.clean(6.0)


@pytest.mark.parametrize("late", [False, True], ids=["in time", "too late to write states"])
@pytest.mark.parametrize("boards", [0, 1], ids=["waits again", "runs elsewhere"])
def test_a_worker_frozen_as_it_gives_jobs_back_is_not_blamed(
    machine: type[Machine], boards: int, late: bool
) -> None:
    """Between any two of its commands: it was silent, and ends of itself."""
    robbed = []  # moments at which another worker lost the job again
    for state, puppet, heir, commands in moments(machine):
        puppet.act(puppet.board)
        go_on(state, puppet, rounds=2)
        puppet.act(puppet.stop)
        while puppet.rq._released_at is None:
            state.clock.sleep(0.6)
            puppet.act(puppet.round)
        freeze_after(state, puppet, heir, commands=commands, boards=boards)
        if late:
            state.clock.sleep(20)
        else:
            puppet.act(puppet.runtime.engine.tick)
        for _ in range(20):
            puppet.act(puppet.round)
            puppet.act(puppet.runtime.engine.tick)
        assert puppet.dead
        [record] = state.world.records()
        blamed = [field for field in state.world.raw[record.id] if field.startswith(b"blamed:")]
        assert f"blamed:{puppet.rq.name}".encode() not in blamed, f"after {commands} commands"
        if not all(heir.rq._ours(list(heir.rq._boarded.values()))):
            robbed.append(commands)
        state.world.settle()
    assert len(robbed) <= 1, "only where the store was told and RQ not yet"


def go_on(state: Machine, puppet: Puppet, *, rounds: int = 4) -> None:
    for _ in range(rounds):
        state.clock.sleep(0.6)
        puppet.act(puppet.round)
        puppet.act(puppet.runtime.engine.tick)


@pytest.mark.parametrize("thawed", [0, 1, 4])
def test_a_job_over_which_workers_froze_waits_for_them(machine: type[Machine], thawed: int) -> None:
    """The first had it in its batch, the others ran it alone: were they dead, it killed them."""
    state = machine()
    state.admit(client="a", images=1, steps=20, seed=0, high=False)
    [job_id] = state.world.jobs
    silent = [freeze_at_the_job(state, which) for which in range(4)]
    heir = state.world.worker(4)
    heir.act(heir.board)
    go_on(state, heir)
    [record] = state.world.records()
    assert record.status is Status.QUEUED and record.crashes == 4
    for puppet in silent[4 - thawed :]:
        puppet.frozen = False
        go_on(state, puppet)
        assert not puppet.rq._boarded
    assert state.world.records()[0].crashes == 4 - thawed
    state.clock.sleep(0 if thawed else SILENT_S)
    go_on(state, heir, rounds=20)
    [record] = state.world.records()
    assert record.status is (Status.SUCCEEDED if thawed else Status.FAILED)
    assert record.id == job_id and heir.rq.name == record.worker
    state.holds()
    state.world.close()


def run(machine: type[Machine], *, examples: int, steps: int) -> None:
    chosen = int(os.environ.get("DDPM_SIMULATION_SEED") or secrets.randbits(32))
    print(f"DDPM_SIMULATION_SEED={chosen}")  # noqa: T201 - pytest shows it where the test fails
    found = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(seed(chosen)(machine), settings=found)


def test_nothing_is_lost_or_blamed_in_any_order(machine: type[Machine]) -> None:
    run(machine, examples=25, steps=30)


def test_a_canceled_job_of_a_silent_worker_is_ended_once(machine: type[Machine]) -> None:
    """By the janitor; the worker, once it is back, finds it lost."""
    state = machine()
    state.admit(client="a", images=1, steps=20, seed=0, high=False)
    puppet = state.world.worker(0)
    puppet.act(puppet.board)
    state.cancel(0)
    state.clean(26.0)
    [record] = state.world.records()
    assert record.status is Status.CANCELED
    puppet.act(puppet.stop)
    go_on(state, puppet)
    assert not puppet.rq._boarded
    state.holds()
    state.world.close()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nothing_is_lost_or_blamed_in_thousands_of_orders(machine: type[Machine]) -> None:
    run(machine, examples=int(os.environ.get("DDPM_SIMULATION_RUNS", "2000")), steps=60)
