"""The engine: step-level continuous batching. One thread steps whatever is active, together.

Every sample of a batch may be of another task, at another timestep, of another sampler. After
each step the finished leave and the waiting join; a sample can also be set aside in mid-chain
for a shorter job, since its state is only (x_t, x̂_0, row). The engine knows nothing of Redis, RQ
or HTTP: it takes tasks and gives events.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Protocol

import torch

from diffusion import cores
from worker.engine.chain_pool import ChainPool
from worker.engine.fairness import Turns, pool_weights
from worker.engine.flow_pool import FlowPool
from worker.engine.lane import EngineOptions, Lane
from worker.engine.pool import Batch, Pool, Step
from worker.engine.product_pool import ProductPool
from worker.engine.runs import Run
from worker.engine.tasks import (
    Advanced,
    Canceled,
    Checkpoint,
    EngineStopped,
    Event,
    Failed,
    Finished,
    NotFinite,
    TaskError,
    Work,
)
from worker.engine.term_pool import TermPool
from worker.network.costs import Shape
from worker.network.network import Network
from worker.network.networks import LaneKey, Networks, lane_key
from worker.network.out_of_memory import is_out_of_memory, release_memory

log = logging.getLogger("ddpm.worker")
Sink = Callable[[list[Event]], None]


class Book(Protocol):
    """Notes which tasks are in the batch, before they are stepped. Its methods run on the engine's
    thread and must only hand on."""

    def called(self, task_ids: list[str]) -> None:
        """These are to be stepped soon: note it, then call `Engine.admit`."""

    def left(self, task_ids: list[str]) -> None:
        """These are not being stepped any more."""

    def alone(self, task_id: str) -> None:
        """From now on nothing but this task, submitted or yet to come, is stepped."""


@dataclass(frozen=True, eq=False)
class Pending:
    """A step that is under way on the device."""

    lane: Lane
    step: Step
    shape: Shape
    began: float
    checkpoints: list[Event] = field(default_factory=list)


class Engine:
    """Runs tasks of any number of models on one device.

    sink receives the events of each step, in order, on the engine's thread: it must only hand
    them on. `submit`, `cancel` and their like may be called from any thread. book: is asked before
    a task that was submitted with `held` is stepped.
    """

    def __init__(
        self, sink: Sink, options: EngineOptions | None = None, *, book: Book | None = None
    ) -> None:
        self.options = options or EngineOptions()
        self.failure: BaseException | None = None
        self.tick_began: float | None = None  # time.monotonic() within a tick, for a watchdog
        self.waiting_rows = 0  # network rows that could run, as of the last tick
        self.lanes: dict[LaneKey, Lane] = {}
        self.networks = Networks(self.options.dtype, self.options.max_rows)
        self._sink = sink
        self._book = book
        self._only: str | None = None  # the one task that is stepped, where others are not
        self._kept: frozenset[str] | None = None  # digests of the models to keep; None: all
        self._turns = Turns()
        self._arrivals = itertools.count()
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._events: list[Event] = []
        self._pending: deque[Pending] = deque()
        self._settled_at = 0.0
        self._counting = threading.Lock()
        self._stepped: Counter[tuple[str, int]] = Counter()

    # Any thread

    def submit(self, task: Work, *, held: bool = False) -> None:
        """Run a task. Raises EngineStopped; a task that cannot run is answered by Failed.

        held: step it only once it is admitted. The first task of a model prepares its network
        here, so that running ones do not wait.
        """
        network = self.networks.prepare(task.model, exact=task.deterministic, mode=task.mode)
        self._command(lambda: self._take(task, network, admitted=not held))

    def admit(self, task_ids: Collection[str]) -> None:
        """Let tasks that were called into the batch; those that have ended are no matter."""
        self._command(lambda: self._let_in(task_ids))

    def only(self, task_id: str | None) -> None:
        """Step nothing but this task, and tell the book when that holds; None: step all again."""
        self._command(lambda: self._set_apart(task_id))

    def cancel(self, task_id: str) -> None:
        """Take a task out between two steps; answered by Canceled, or not at all if it ended."""
        self._command(lambda: self._cancel(task_id))

    def keep_only(self, digests: Collection[str]) -> None:
        """Let go of models with other digests as soon as no task uses them."""
        self._command(lambda: self._keep_only(frozenset(digests)))

    def _command(self, command: Callable[[], None]) -> None:
        with self._wake:
            if self._stopping or self.failure is not None:
                raise EngineStopped("the engine has stopped") from self.failure
            self._commands.append(command)
            self._wake.notify()

    def rates(self) -> dict[str, float]:
        """Digest → network evaluations a second while there is enough to do (image-steps/s)."""
        lanes = dict(self.lanes)
        return {
            key.digest: max(lanes[key].rate.value if key in lanes else 0.0, network.costs.fastest)
            for key, network in self.networks.sampling().items()
        }

    def stepped(self) -> Counter[tuple[str, int]]:
        """(digest, network rows) → how many steps there were of it since this was asked last."""
        with self._counting:
            stepped, self._stepped = self._stepped, Counter()
        return stepped

    def start(self) -> None:
        """Run in a thread of its own."""
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step it is in; what is in flight gets no further event."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    # The engine's thread

    def _loop(self) -> None:
        cores.keep_to_one()
        try:
            while not self._stopping:
                if not self.tick():
                    with self._wake:
                        if not self._commands and not self._stopping:
                            self._wake.wait()
        except BaseException as error:
            log.exception("the engine broke down")
            with self._wake:
                self.failure = error

    @torch.inference_mode()
    def tick(self) -> bool:
        """Carry out commands and one step; whether there was anything to do.

        A caller that has not called `start` may tick the engine itself.
        """
        self.tick_began = time.monotonic()
        commands = bool(self._commands)
        if commands:
            self._settle_all_but(0)  # so that nothing a step found is lost by a cancel
            while self._commands:
                self._commands.popleft()()
        if self._book is not None:
            self._keep(self._book)
        ready = {lane: lane.weights for lane in self.lanes.values() if lane.ready_rows}
        if ready:
            self._step(self._turns.next(pool_weights(ready)))
        self._settle_all_but(self._steps_behind() if ready else 0)
        if self._kept is not None:
            self._forget_others(self._kept)
        self.waiting_rows = sum(lane.waiting_rows for lane in self.lanes.values())
        if self._events:
            events, self._events = self._events, []
            self._sink(events)
        self.tick_began = None
        return commands or bool(ready)

    def _steps_behind(self) -> int:
        if self.options.steps_behind is not None:
            return self.options.steps_behind
        return int(any(pending.lane.pool.device.type == "cuda" for pending in self._pending))

    def _keep(self, book: Book) -> None:
        """Say who comes into the batch soon, before the step, and who has left it."""
        if self._only is not None:
            return
        for lane in self.lanes.values():
            if called := lane.to_call():
                book.called([run.task.id for run in called])
            if displaced := lane.displaced():
                lane.dismiss(displaced)
                book.left([run.task.id for run in displaced])

    def _let_in(self, task_ids: Collection[str]) -> None:
        for lane in self.lanes.values():
            for run in [run for run in lane.runs.values() if run.task.id in task_ids]:
                if run.called:  # else it has been dismissed meanwhile
                    lane.admit(run)

    def _set_apart(self, task_id: str | None) -> None:
        self._only = task_id
        if task_id is None:
            return
        left = []
        for lane in self.lanes.values():
            others = [run for run in lane.runs.values() if run.task.id != task_id]
            left += [run.task.id for run in others if run.admitted or run.called]
            lane.dismiss(others)
        if self._book is not None:
            self._book.left(left)
            self._book.alone(task_id)

    def _take(self, task: Work, network: Network, *, admitted: bool) -> None:
        try:
            task.check()
        except TaskError as error:
            self._events.append(Failed(task.id, error))
            return
        admitted = admitted and self._only in (None, task.id)
        run = Run(task, next(self._arrivals), admitted=admitted)
        run.checkpoint_at = time.monotonic() + self.options.checkpoint_every
        try:
            lane = self._join(run, network)
        except torch.AcceleratorError:  # the device itself is lost
            raise
        except Exception as error:  # no memory for the slots of one more model, say
            release_memory(network.model.device)
            self._events.append(Failed(task.id, error))
            return
        self._finish_if_done(lane, run)  # a resumed task may have nothing left to do

    def _join(self, run: Run, network: Network) -> Lane:
        task = run.task
        key = lane_key(task.model, exact=task.deterministic, mode=task.mode)
        if key not in self.lanes:
            self.lanes[key] = Lane(self._pool_for(task, network), self.options)
        lane = self.lanes[key]
        run.turn = lane.turn
        lane.join(run)
        return lane

    def _pool_for(self, task: Work, network: Network) -> Pool:
        if task.mode in ("terms", "flow"):
            return TermPool(network) if task.mode == "terms" else FlowPool(network)
        kind = ProductPool if task.mode == "products" else ChainPool
        return kind(network, self.options.capacity)

    def _cancel(self, task_id: str) -> None:
        for lane in self.lanes.values():
            run = lane.runs.get(task_id)
            if run is not None:
                states = lane.pool.states(run.samples)
                lane.leave(run)
                self._events.append(Canceled(task_id, states))

    def _keep_only(self, digests: frozenset[str]) -> None:
        self._kept = digests
        self.networks.keep_only({*digests, *(key.digest for key in self.lanes)})

    def _forget_others(self, kept: frozenset[str]) -> None:
        """Let go of other models than these, where no task uses them any more."""
        idle = [key for key, lane in self.lanes.items() if key.digest not in kept and not lane.runs]
        for key in idle:
            self._turns.forget(self.lanes.pop(key))
        for digest in {key.digest for key in idle} - {key.digest for key in self.lanes}:
            self.networks.let_go(digest)

    # A step: launched, then settled once the device has done it

    def _step(self, lane: Lane) -> None:
        began = time.monotonic()
        batch, shape = lane.next_batch()
        for step, ran in self._bisect(lane, batch, shape):
            for sample in step.batch.samples:
                sample.run.remaining -= sample.evaluations
                sample.run.turn = lane.turn
            for i in step.due:
                sample = step.batch.samples[i]
                if step.rows[i] == sample.run.task.rows - 1:
                    lane.end(sample)
            checkpoints = self._checkpoints(lane, step, began)
            self._pending.append(Pending(lane, step, ran, began, checkpoints))
            began = time.monotonic()

    def _bisect(self, lane: Lane, batch: Batch, shape: Shape) -> list[tuple[Step, Shape]]:
        """Step the batch; if that raises, its halves, until what cannot run stands alone."""
        try:
            return [(lane.pool.step(batch, shape), shape)]
        except torch.AcceleratorError:  # the device itself is lost, not one sample
            raise
        except Exception as error:
            full = is_out_of_memory(error)
            if full:
                log.warning("no memory for a batch of %d: %s", shape.rows, error)
                error.__traceback__ = None  # its frames hold what the forward had allocated
                lane.shrink(shape.rows)
            if len(batch.samples) == 1:
                self._fail(lane, batch.samples[0].run, error)
                return []
        if full:
            release_memory(lane.pool.device)
        steps: list[tuple[Step, Shape]] = []
        middle = len(batch.samples) // 2
        for half in (batch.samples[:middle], batch.samples[middle:]):
            alive = [sample for sample in half if not sample.run.over]
            if alive:
                part = lane.pool.batch(alive)
                steps += self._bisect(lane, part, _smallest_eager(lane, part.network_rows))
        return steps

    def _checkpoints(self, lane: Lane, step: Step, now: float) -> list[Event]:
        """The state, after this step, of the tasks whose checkpoint is due."""
        events: list[Event] = []
        for run in {sample.run: None for sample in step.batch.samples}:
            if now >= run.checkpoint_at and run.samples:
                run.checkpoint_at = now + self.options.checkpoint_every
                states = lane.pool.states(run.samples)
                if states is not None:
                    events.append(Checkpoint(run.task.id, states))
        return events

    def _settle_all_but(self, behind: int) -> None:
        while len(self._pending) > behind:
            self._settle(self._pending.popleft())

    def _settle(self, pending: Pending) -> None:
        """Look at what a step did, and tell."""
        lane, step = pending.lane, pending.step
        if not bool(step.finite.all()):  # the one value that a step reads from the device
            self._fail_not_finite(lane, step)
        now = time.monotonic()
        seconds, self._settled_at = now - max(pending.began, self._settled_at), now
        lane.pool.network.costs.record(pending.shape, seconds)
        self._turns.charge(lane, seconds)
        lane.rate.add(step.batch.network_rows, seconds)
        with self._counting:
            stepped = (lane.pool.network.model.digest, step.batch.network_rows)
            self._stepped[stepped] += 1
        self._events += step.events()
        last_t: dict[Run, int] = {}
        for sample, t in zip(step.batch.samples, step.t.tolist(), strict=True):
            last_t[sample.run] = t
        alive = [(run, t) for run, t in last_t.items() if not run.over]
        self._events += [Advanced(r.task.id, r.done, r.total, t) for r, t in alive]
        self._events += [c for c in pending.checkpoints if _task_id(c) in lane.runs]
        for run, _ in alive:
            self._finish_if_done(lane, run)

    def _fail_not_finite(self, lane: Lane, step: Step) -> None:
        for i, finite in enumerate(step.finite.tolist()):
            sample = step.batch.samples[i]
            if not finite and not sample.run.over:
                where = f"image {step.image(i)}: not finite after the step at t = {step.t[i] + 1}"
                self._fail(lane, sample.run, NotFinite(where))

    def _fail(self, lane: Lane, run: Run, error: BaseException) -> None:
        lane.leave(run)
        self._events.append(Failed(run.task.id, error))

    def _finish_if_done(self, lane: Lane, run: Run) -> None:
        if not run.untold and not run.over:
            lane.leave(run)
            self._events.append(Finished(run.task.id))


def _task_id(event: Event) -> str:
    return event.task_id


def _smallest_eager(lane: Lane, rows: int) -> Shape:
    eager = [shape for shape in lane.pool.network.eager_shapes if shape.rows >= rows]
    return min(eager, key=lambda shape: shape.rows)
