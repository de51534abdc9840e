"""The networks of an engine: each made ready once, by whoever needs it first."""

from __future__ import annotations

import threading
from collections.abc import Collection
from typing import NamedTuple

import torch

from diffusion.model import Model
from worker.network.network import Network, worker_dtype
from worker.network.threads import with_team


class LaneKey(NamedTuple):
    """The digest of a model, whether deterministic, and whether for terms and not for chains."""

    digest: str
    exact: bool = False
    terms: bool = False


def lane_key(model: Model, *, exact: bool = False, terms: bool = False) -> LaneKey:
    """The key of a model in one mode."""
    return LaneKey(model.digest or str(id(model)), exact, terms)


class Networks:
    """May be used from any thread.

    dtype: None: as a probe of the device advises. max_rows: the largest batch.
    """

    def __init__(self, dtype: torch.dtype | None, max_rows: int) -> None:
        self._dtype = dtype
        self._max_rows = max_rows
        self._ready: dict[LaneKey, Network] = {}
        self._preparing = threading.Lock()

    def prepare(self, model: Model, *, exact: bool = False, terms: bool = False) -> Network:
        """Make a model's network ready: data type, memory layout, first small batches.

        exact: rows that depend on nothing beside them. terms: for likelihoods, in float32.
        """
        key = _key(model, exact, terms)
        if key in self._ready:
            return self._ready[key]
        with self._preparing:
            if key not in self._ready:
                self._ready[key] = with_team(lambda: self._make(model, key))
            return self._ready[key]

    def _make(self, model: Model, key: LaneKey) -> Network:
        in_float32 = key.exact or key.terms
        dtype = torch.float32 if in_float32 else self._dtype or worker_dtype(model)
        return Network(model, dtype=dtype, max_rows=self._max_rows, exact=key.exact)

    def is_prepared(self, model: Model, *, exact: bool = False, terms: bool = False) -> bool:
        """Whether a task of this model can be submitted without a wait."""
        return _key(model, exact, terms) in self._ready

    def keep_only(self, digests: Collection[str]) -> None:
        """Let go of other models."""
        for key in [key for key in self._ready if key.digest not in digests]:
            del self._ready[key]

    def sampling(self) -> dict[LaneKey, Network]:
        """Those that sample and are not deterministic."""
        ready = dict(self._ready)
        return {key: net for key, net in ready.items() if key == LaneKey(key.digest)}


def _key(model: Model, exact: bool, terms: bool) -> LaneKey:
    return lane_key(model, exact=exact, terms=terms and not exact)  # an exact one serves both
