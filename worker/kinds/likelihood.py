"""Likelihood jobs: the terms of the bound as they come in, and the result that they make.

Those by the flow are in `worker.kinds.flow`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.bound import bits_per_dim, bound_table, prior_nats
from diffusion.likelihood import Likelihood, check_variance
from diffusion.model import Model
from diffusion.term_plan import Plan, full_plan, monte_carlo_plan
from jobs.kinds.likelihood import LikelihoodSpec
from jobs.results import Bits, ImageBits, LikelihoodResult, TermValues
from jobs.store.batch import WriteBatch
from jobs.store.started import Started
from worker.engine.flows import FlowTask
from worker.engine.tasks import Event, Terms
from worker.engine.terms import TermTask
from worker.flights import Flight
from worker.kinds.flow import Strands
from worker.kinds.inputs import uploaded
from worker.models import Served
from worker.network.networks import Mode

_MAGIC = b"terms-2\0"  # of the saved numbers: those of another plan are of other terms


class LikelihoodFlight(Flight[LikelihoodSpec]):
    """The terms of the bound of uploaded images, or their density by the flow."""

    def __init__(
        self,
        started: Started,
        execution: str,
        served: Served,
        *,
        spec: LikelihoodSpec,
        deadline: float,
    ) -> None:
        super().__init__(started, execution, served, spec=spec, deadline=deadline)
        kind = Strands if spec.mode == "flow" else Numbers
        self._numbers: Strands | Numbers = kind(served, started, spec)
        self._task = self._numbers.task(execution)
        self.done_before = self.record.work - self._task.evaluations

    @classmethod
    def mode(cls, spec: LikelihoodSpec) -> Mode:
        """Terms, or the flow."""
        return "flow" if spec.mode == "flow" else "terms"

    @classmethod
    def provenance(cls, served: Served, spec: LikelihoodSpec) -> dict[str, Any]:
        """The bound is taken with the clipped x̂_0, and the flow is not clipped."""
        return {"clip": spec.mode != "flow"}

    def task(self) -> TermTask | FlowTask:
        """What is missing."""
        return self._task

    def write(self, event: Event, batch: WriteBatch) -> None:
        """Nothing yet: `save` writes what was found, at its own pace."""
        self._numbers.take(event)

    def save(self, batch: WriteBatch, *, every: float) -> Callable[[], None] | None:
        """The numbers found since they were last saved."""
        states = self._numbers.unsaved(every)
        for index, state in states.items():
            batch.checkpoint(self.record, self.execution, index=index, state=state)
        return partial(self._numbers.saved, list(states)) if states else None

    def result(self) -> dict[str, Any]:
        """The job's result, JSON."""
        return self._numbers.result()


class Numbers:
    """Nats and squared errors of a job's terms, NaN where not yet evaluated.

    Numbers of an earlier execution with the same model are kept.
    """

    def __init__(self, served: Served, started: Started, spec: LikelihoodSpec) -> None:
        assert spec.seed is not None
        self._spec, self._seed, self._model = spec, spec.seed, served.model
        self._x_start = uploaded(started)
        n = len(self._x_start)
        self._indices = np.array(spec.indices or range(n), np.int64)
        self._plan = plan_of(spec, self._model, self._indices)
        self._client = started.record.client
        self._unsaved: set[int] = set()
        self._saved_at = time.monotonic()
        self._found = np.full((2, *self._plan.row.shape), math.nan)  # nats, squared errors
        if started.earlier_digest in (None, served.model.digest):
            for image, raw in started.states.items():
                self._unpack(image, raw)

    def task(self, execution: str) -> TermTask:
        """The terms that are missing."""
        spec = self._spec
        return TermTask(
            id=execution,
            model=self._model,
            seed=self._seed,
            x_start=self._x_start.to(self._model.device),
            indices=self._indices,
            plan=self._plan,
            left=np.flatnonzero(np.isnan(self._found[0])),
            variance=check_variance(self._model, spec.variance),
            class_label=spec.class_label,
            deterministic=spec.deterministic,
            urgent=spec.priority == "high",
            client=self._client,
        )

    def take(self, event: Event) -> None:
        """Write down what was found."""
        if not isinstance(event, Terms):
            return
        image, draw = np.divmod(event.places, self._found.shape[2])
        self._found[0, image, draw] = event.nats
        self._found[1, image, draw] = event.squared_error
        self._unsaved.update(image.tolist())

    def unsaved(self, every: float) -> dict[int, bytes]:
        """image → what is known of it, if that changed, and it is time: seconds since `saved`."""
        if time.monotonic() < self._saved_at + every:
            return {}
        found = self._found.astype("<f8")
        return {image: _MAGIC + found[:, image].tobytes() for image in self._unsaved}

    def saved(self, images: Iterable[int]) -> None:
        """These are in the store, as `unsaved` gave them."""
        self._unsaved.difference_update(images)
        self._saved_at = time.monotonic()

    def _unpack(self, image: int, raw: bytes) -> None:
        """What `unsaved` gave. Anything else is left out: those terms are evaluated again."""
        known = self._found[:, image] if image < self._found.shape[1] else np.zeros(0)
        if raw.startswith(_MAGIC) and len(raw) == len(_MAGIC) + known.nbytes:
            numbers = np.frombuffer(raw, "<f8", offset=len(_MAGIC))
            self._found[:, image] = numbers.reshape(known.shape)

    def result(self) -> dict[str, Any]:
        """The job's result, JSON. All terms must be there."""
        nats, squares = (torch.from_numpy(found) for found in self._found)
        prior = prior_nats(self._model.schedule, self._x_start)
        bound = Likelihood(self._plan, prior, nats, squares, self._x_start[0].numel())
        images = [self._image(bound, i) for i in range(len(prior))]
        totals = bound.bits_per_dim
        error = float(totals.std()) / len(totals) ** 0.5 if len(totals) > 1 else None
        bits = _bits(bound).model_copy(update={"standard_error": error})
        crop, unpadded = self._model.config.crop, None
        if crop is not None:
            unpadded = self._model.shape[0] * crop[0] * crop[1]
        result = LikelihoodResult(
            **bits.model_dump(),
            dims=bound.dims,
            dims_unpadded=unpadded,
            bits_per_unpadded_dim=unpadded and bits.bits_per_dim * bound.dims / unpadded,
            images=images,
        )
        return result.model_dump(exclude_none=True)

    def _image(self, bound: Likelihood, i: int) -> ImageBits:
        error = None
        if self._spec.mode == "monte_carlo":
            error = float(bound.standard_error[i])
        terms = None
        if self._spec.terms is not None:
            at = [t - 1 for t in self._spec.terms]
            terms = TermValues(
                t=list(self._spec.terms),
                bits_per_dim=bits_per_dim(bound.nats[i, at], bound.dims).tolist(),
                rmse=(127.5 * bound.squared_error[i, at].sqrt()).tolist(),
            )
        parts = _bits(bound, i).model_dump(exclude={"standard_error"})
        known = error if error is not None and math.isfinite(error) else None
        return ImageBits(**parts, index=i, standard_error=known, terms=terms)


def plan_of(spec: LikelihoodSpec, model: Model, indices: NDArray[np.int64]) -> Plan:
    """Which terms of which image: the plan that the library and `ddpm evaluate` make."""
    table = bound_table(model.schedule)
    if spec.mode == "full":
        return full_plan(table, len(indices))
    assert spec.seed is not None and spec.samples is not None
    keys = torch.from_numpy(indices)
    return monte_carlo_plan(table, seed=spec.seed, indices=keys, samples=spec.samples)


def _bits(bound: Likelihood, i: int | None = None) -> Bits:
    """The bound and its parts of one image, or means over all."""

    def value(nats: Tensor) -> float:
        bits = bits_per_dim(nats, bound.dims)
        return float(bits.mean() if i is None else bits[i])

    parts = {"L_T": bound.prior, "L_t": bound.transitions, "L_0": bound.decoder}
    values = {name: value(nats) for name, nats in parts.items()}
    return Bits(bits_per_dim=sum(values.values()), **values)
