"""Workers, janitor and clients on one real Redis in one thread, in any order, on a fake clock.

The adapter to RQ, the runtime, the engine and every script are the real ones; only the network's
arithmetic is replaced. A worker can die, or freeze for long, between any two of its commands to
Redis.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import redis
import rq.executions
import rq.intermediate_queue
import rq.job
import rq.queue
import rq.registry
import rq.worker.base
from redis.exceptions import ConnectionError as Away

import jobs.store.janitor
import jobs.store.orders
import jobs.store.records
import jobs.store.writer
import worker.engine.loop
import worker.outputs
import worker.patience
import worker.roster
import worker.rq.adapter
import worker.rq.holding
import worker.rq.waiting
import worker.runtime
import worker.starting
from jobs.cards import ModelCard
from jobs.kinds.generate import GenerateSpec
from jobs.kinds.table import admit
from jobs.settings import Settings
from jobs.states import ACTIVE, Status
from jobs.store import keys
from jobs.store.admission import Admission, Order
from jobs.store.janitor import Janitor
from jobs.store.records import JobRecord, parse_record
from jobs.store.started import MAX_LONE_CRASHES, SILENT_S
from jobs.store.writer import JobStore
from worker.engine.chain_pool import ChainPool, task_of
from worker.models import ModelFolder
from worker.network.network import Network
from worker.network.networks import Networks
from worker.rq.adapter import EngineWorker
from worker.runtime import Runtime

POISON = 666  # the seed of a job that kills its worker
START = 1_800_000_000.0
OURS = (
    jobs.store.janitor, jobs.store.orders, jobs.store.records, jobs.store.writer,
    worker.engine.loop, worker.outputs, worker.patience, worker.roster, worker.rq.adapter,
    worker.rq.waiting, worker.runtime, worker.starting,
)  # fmt: skip
RQS = (
    rq.executions, rq.intermediate_queue, rq.job, rq.queue, rq.registry, rq.worker.base,
    worker.rq.adapter, worker.rq.holding, worker.rq.waiting,
)  # fmt: skip


class Killed(BaseException):
    """A worker died, here and now."""


class Clock:
    """Time that passes when it is told to, and a little whenever it is asked for."""

    def __init__(self) -> None:
        self.at = START

    def time(self) -> float:
        self.at += 0.001
        return self.at

    def sleep(self, seconds: float) -> None:
        self.at += seconds

    def install(self, patch: pytest.MonkeyPatch) -> None:
        module = SimpleNamespace(
            time=self.time,
            monotonic=self.time,
            time_ns=lambda: int(self.time() * 1e9),
            sleep=self.sleep,
        )
        for ours in OURS:
            if hasattr(ours, "time"):
                patch.setattr(ours, "time", module)
        for theirs in RQS:
            self._install_in_rq(theirs, patch)

    def _install_in_rq(self, module: ModuleType, patch: pytest.MonkeyPatch) -> None:
        if hasattr(module, "now"):
            patch.setattr(module, "now", lambda: datetime.fromtimestamp(self.time(), UTC))
        if hasattr(module, "current_timestamp"):
            patch.setattr(module, "current_timestamp", lambda: int(self.time()))


class FusedPool(redis.ConnectionPool):
    """Connections of one worker. fuse: commands until its death. away: commands that find no
    server. awake: commands until it freezes, for as long as `meanwhile` lasts."""

    fuse: int | None = None
    awake: int | None = None
    away = 0

    def meanwhile(self) -> None:
        """What others do."""

    def freeze(self) -> None:
        """If it is time to."""
        if self.awake is not None:
            self.awake -= 1
            if self.awake < 0:
                self.awake = None
                self.meanwhile()

    def get_connection(self, *args: Any, **options: Any) -> Any:
        self.freeze()
        if self.fuse is not None:
            if self.fuse <= 0:
                raise Killed
            self.fuse -= 1
        if self.away:
            self.away -= 1
            raise Away("a dropped connection")
        return super().get_connection(*args, **options)


class WatchedStore(JobStore):
    """Whose writes do something if and only if the job is this execution's."""

    looks: redis.Redis

    def _held(self, job_id: str, execution: str) -> bool:
        found: Any = self.looks.hmget(keys.job(job_id), ["status", "execution"])
        return bool(found == [b"running", execution.encode()])

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """Freeze now, if it is time to: not between the look at what is held and the act."""
        pool: Any = self.redis.connection_pool
        pool.freeze()
        left, pool.awake = pool.awake, None
        yield
        pool.awake = left

    def write(self, calls: list[list[Any]]) -> list[int]:
        with self._awake():
            held = [self._held(call[0], call[1]) for call in calls]
            replies = super().write(calls)
        assert [reply != 0 for reply in replies] == held, "a write of another execution"
        return replies

    def finish(self, job_id: str, execution: str, status: Status, **more: Any) -> bool:
        with self._awake():
            held = not execution or self._held(job_id, execution)
            ended = super().finish(job_id, execution, status, **more)
        assert not ended or held, "an end by another execution"
        return ended


class Puppet:
    """A worker, moved by hand."""

    def __init__(self, world: World, name: str) -> None:
        made = redis.ConnectionPool.from_url(world.url, protocol=2)
        self.pool = FusedPool(connection_class=made.connection_class, **made.connection_kwargs)  # type: ignore[var-annotated]
        connection = redis.Redis(connection_pool=self.pool)
        store = WatchedStore(connection, world.settings)
        store.looks = world.redis
        self.runtime = Runtime(world.settings, store, world.folder, threads=False)
        self.runtime.roster.single = False  # it runs many jobs, as one with threads does
        self.runtime.engine.networks = world.networks
        quiet: Any = self.runtime
        quiet._loader.scan = lambda: None
        quiet._compiler.poll = lambda served, busy: None
        self.rq = EngineWorker(self.runtime, connection, name=name)
        self.rq.register_birth()  # type: ignore[no-untyped-call]
        self.clock = world.clock
        self.frozen = self.dead = False
        self.froze = False  # at any time
        self.let_go: dict[str, float] = {}  # job → when it was last found to be no more this one's

    def act(self, what: Callable[[], object]) -> None:
        """Do something, as far as this worker lives and is heard."""
        if self.frozen or self.dead:
            return
        before = dict(self.rq._boarded)
        try:
            what()
        except Killed:
            self.die()
        except Away:
            pass  # as `execute_job` does: the next round tries again
        if not self.dead:
            # One that it has taken again since, in the same round, may be counted against it again.
            held = {boarded.job.id for boarded in self.rq._boarded.values()}
            gone = {boarded.job.id for boarded in before.values()} - held
            self.let_go.update(dict.fromkeys(gone, self.clock.at))

    def die(self) -> None:
        self.dead = True
        self.pool.fuse = 0
        with suppress(Killed):
            self.runtime.close()
        self.pool.disconnect()

    def board(self) -> None:
        if self.rq._stop_requested:
            return
        self.rq._next()
        found = self.rq._dequeue(None)
        if found is not None:
            self.rq._board(*found)

    def round(self) -> None:
        if self.rq._boarded:
            self.rq._busy_round()
        else:
            self.rq._maintain()
        if self.rq._stop_requested and not self.rq._boarded:
            self.rq.teardown()
            self.die()

    def stop(self) -> None:
        self.rq.request_stop(15, None)


class World:
    """One Redis, the janitor, and any number of workers."""

    def __init__(self, url: str, folder: ModelFolder, networks: Networks, card: ModelCard) -> None:
        self.url, self.folder, self.networks, self.card = url, folder, networks, card
        self.clock = Clock()
        self.settings = Settings(
            redis_url=url, models=folder.root, slots=8, checkpoint_s=0.02, drain_s=1.0
        )
        self.store = JobStore.connect(self.settings)
        self.redis: Any = self.store.redis
        self.redis.flushall()
        self.store.publish_card(card)
        self.janitor = Janitor(self.store)
        self.admission = Admission(self.store)
        self.workers: list[Puppet] = []
        self.ever: dict[str, Puppet] = {}
        self.jobs: list[str] = []
        self.raw: dict[str, dict[bytes, bytes]] = {}
        self.looked_at: set[tuple[str, Status]] = set()
        self.endings: Counter[Status] = Counter()
        self.pictures: dict[tuple[Any, ...], bytes] = {}

    @staticmethod
    def install(patch: pytest.MonkeyPatch, clock: Clock) -> None:
        """Fake time; a network that is nothing but arithmetic; poison."""
        clock.install(patch)
        patch.setattr(worker.rq.adapter, "ROUND_S", 0.0)
        patch.setattr(Network, "eager", lambda self, x, t, labels: 0.9 * x)
        step = ChainPool.step

        def poisoned(self: ChainPool, batch: Any, shape: Any) -> Any:
            if any(task_of(s).seed == POISON and self.row_of(s) >= 2 for s in batch.samples):
                raise Killed
            return step(self, batch, shape)

        patch.setattr(ChainPool, "step", poisoned)

    # What can happen

    def admit(self, client: str, **fields: Any) -> None:
        asked = GenerateSpec(sampler="ddim", ttl_s=100, **fields)
        spec, plan = admit(asked, self.card, self.settings)
        order = Order(spec=spec, plan=plan, card=self.card, client=client)
        self.jobs.append(self.admission.admit(order).job_id)

    def worker(self, which: int) -> Puppet:
        """One that lives; a new one where there are not so many."""
        self.workers = [puppet for puppet in self.workers if not puppet.dead]
        if which < len(self.workers):
            return self.workers[which]
        puppet = Puppet(self, f"w{len(self.ever) + 1}")
        self.ever[puppet.rq.name] = puppet
        self.workers.append(puppet)
        return puppet

    def wait(self, seconds: float) -> None:
        """Let time pass, in Redis too: the locks of the dead lapse."""
        self.clock.sleep(seconds)
        if seconds > 30:
            self.redis.delete(keys.lock("janitor"), keys.lock("registries"))

    def cancel(self, which: int) -> None:
        if self.jobs:
            job_id = self.jobs[which % len(self.jobs)]
            if self.store.cancel(job_id) == "canceled":
                self.janitor.queues.cancel(job_id)

    def purge(self, which: int) -> None:
        if self.jobs:
            job_id = self.jobs[which % len(self.jobs)]
            self.store.purge(job_id)
            self.janitor.queues.delete(job_id)

    def settle(self) -> None:
        """With sound workers, one at a time, everything has to end."""
        for puppet in self.workers:
            puppet.die()
        for _ in range(40):
            active = [r for r in self.records() if r.status in ACTIVE]
            if not active:
                return
            self.wait(70)
            self.janitor.run()
            puppet = self.worker(0)
            for _ in range(100):
                for _ in range(4):
                    puppet.act(puppet.board)
                    puppet.act(puppet.runtime.engine.tick)
                self.clock.sleep(0.6)
                puppet.act(puppet.round)
                if puppet.dead or not puppet.rq._boarded:
                    break
            self.janitor.run()
        raise AssertionError(f"never ended: {active}")

    # What must hold at any time

    def records(self) -> list[JobRecord]:
        with self.redis.pipeline(transaction=False) as pipe:
            for job_id in self.jobs:
                pipe.hgetall(keys.job(job_id))
            rows = pipe.execute()
        self.raw = {job_id: raw for job_id, raw in zip(self.jobs, rows, strict=True) if raw}
        return [parse_record(job_id, raw) for job_id, raw in self.raw.items()]

    def check(self) -> None:
        """The counters, the sets and the queue agree with the records."""
        records = self.records()
        active = [r for r in records if r.status in ACTIVE]
        queue = self.janitor.queues.get("ddpm")
        with self.redis.pipeline(transaction=False) as pipe:
            for status in Status:
                pipe.zrange(keys.by_status(status), 0, -1)
                pipe.zrange(keys.in_queue("ddpm", status), 0, -1)
            pipe.zrange(keys.JOBS, 0, -1)
            pipe.hmget(keys.queue("ddpm"), ["admitted", "completed"])
            pipe.hgetall(keys.CLIENTS)
            pipe.hget(keys.TOTALS, "output_bytes")
            pipe.lrange(queue.key, 0, -1)
            pipe.lrange(queue.intermediate_queue.key, 0, -1)
            pipe.zrange(queue.started_job_registry.key, 0, -1)
            for priority in ("high", "normal"):
                pipe.zrange(keys.turns("ddpm", priority), 0, -1)
                pipe.hlen(keys.shares("ddpm", priority))
            *sets, everyone, ends, clients, held, waits, popped, runs, high, h, normal, n = (
                pipe.execute()
            )
        for status, members, queued in zip(Status, sets[::2], sets[1::2], strict=True):
            expected = {r.id.encode() for r in records if r.status is status}
            assert set(members) == expected, status
            assert set(queued) == (expected if status in ACTIVE else set()), status
        assert set(everyone) == {r.id.encode() for r in records}
        left = sum(r.work - r.done for r in active)
        assert int(ends[0] or 0) - int(ends[1] or 0) == left, "outstanding of the queue"
        owed: dict[bytes, int] = {}
        for r in active:
            client = self.raw[r.id][b"client"]
            owed[client] = owed.get(client, 0) + r.work - r.done
        assert {c: int(n) for c, n in clients.items()} == {c: n for c, n in owed.items() if n}
        assert int(held or 0) == sum(r.bytes for r in records), "bytes held"
        known = {*waits, *popped, *(entry.split(b":")[0] for entry in runs)}
        nowhere = [r.id for r in active if r.id.encode() not in known]
        assert not nowhere, f"RQ has lost {nowhere}"
        queued = {r.id.encode() for r in records if r.status is Status.QUEUED}
        assert {*high, *normal} <= queued, "the turn of a job that does not wait"
        assert bool(high) == bool(h) and bool(normal) == bool(n), "shares that nobody waits for"
        for r in records:
            if r.status not in ACTIVE and (r.id, r.status) not in self.looked_at:
                self.looked_at.add((r.id, r.status))
                self._check_outcome(r)

    def _check_outcome(self, record: JobRecord) -> None:
        """Of a job that has ended."""
        poison = record.spec.seed == POISON
        self.endings[record.status] += 1
        if record.status is Status.FAILED:
            assert record.fault is not None and record.fault.code == "gave_up", record
            self._check_blame(record.id)
        rows = self.redis.xrange(keys.events(record.id))
        ends = [row for _, row in rows if row[b"event"] in (b"done", b"error")]
        assert len(ends) == 1 or (record.outputs_gone and not rows), "last events"
        if record.status is Status.SUCCEEDED:
            assert not poison, "poison was survived"
            outputs = self.redis.hgetall(keys.outputs(record.id))
            assert len(outputs) == record.images and record.done == record.work
            for name, plane in outputs.items():
                key = (record.spec.seed, getattr(record.spec, "steps", None), name)
                assert self.pictures.setdefault(key, plane) == plane, "another picture"

    def _check_blame(self, job_id: str) -> None:
        """Of a job that was given up: it ran alone in so many workers, and each of them is dead, or
        has been silent for very long. (It need not be poison: others kill workers too.)"""
        deaths = 0
        for field, value in self.raw[job_id].items():
            if field.startswith(b"blamed:"):
                lone, since = int(value.split()[1]), float(value.split()[2])
                puppet = self.ever[field.removeprefix(b"blamed:").decode()]
                assert puppet.dead or self.clock.at - since >= SILENT_S, f"{field!r} may come back"
                assert puppet.let_go.get(job_id, 0.0) <= since, f"{field!r} has come back"
                deaths += lone
        assert deaths >= MAX_LONE_CRASHES, f"only {deaths} workers have died of it"

    def close(self) -> None:
        for puppet in self.workers:
            puppet.die()
        self.redis.close()
