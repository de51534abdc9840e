"""The networks of an engine: each made ready once, by whoever needs it first."""

from __future__ import annotations

import threading
from collections.abc import Collection
from typing import Literal, NamedTuple

import torch

from diffusion.model import Model
from worker.network.network import Network, worker_dtype

# What a network is used for: chains; the terms of likelihoods; chains that need products with its
# Jacobian; likelihoods by the flow, which need them too.
Mode = Literal["chains", "terms", "products", "flow"]


class LaneKey(NamedTuple):
    """The digest of a model, whether deterministic, and what it is used for."""

    digest: str
    exact: bool = False
    mode: Mode = "chains"


def lane_key(model: Model, *, exact: bool = False, mode: Mode = "chains") -> LaneKey:
    """The key of a model in one mode."""
    return LaneKey(model.digest or str(id(model)), exact, mode)


class Networks:
    """May be used from any thread.

    dtype: None: as a probe of the device advises. max_rows: the largest batch.
    in_process: see `Network`.
    """

    def __init__(
        self, dtype: torch.dtype | None, max_rows: int, *, in_process: bool | None = None
    ) -> None:
        self._dtype = dtype
        self._max_rows = max_rows
        self._in_process = in_process
        self._ready: dict[LaneKey, Network] = {}
        self._preparing = threading.Lock()

    def prepare(self, model: Model, *, exact: bool = False, mode: Mode = "chains") -> Network:
        """Make a model's network ready: data type, memory layout, first small batches.

        exact: rows that depend on nothing beside them. mode: all but chains in float32.
        """
        key = _key(model, exact, mode)
        # Another thread may let go of it at any moment.
        if (ready := self._ready.get(key)) is not None:
            return ready
        with self._preparing:
            if (ready := self._ready.get(key)) is None:
                ready = self._ready[key] = self._make(model, key)
            return ready

    def _make(self, model: Model, key: LaneKey) -> Network:
        in_float32 = key.exact or key.mode != "chains"
        dtype = torch.float32 if in_float32 else self._dtype or worker_dtype(model)
        return Network(
            model,
            dtype=dtype,
            max_rows=self._max_rows,
            exact=key.exact,
            in_process=self._in_process,
        )

    def is_prepared(self, model: Model, *, exact: bool = False, mode: Mode = "chains") -> bool:
        """Whether a task of this model can be submitted without a wait."""
        return _key(model, exact, mode) in self._ready

    def keep_only(self, digests: Collection[str]) -> None:
        """Let go of other models."""
        for digest in {key.digest for key in list(self._ready)}:
            if digest not in digests:
                self.let_go(digest)

    def let_go(self, digest: str) -> None:
        """Let go of one model."""
        for key in list(self._ready):
            if key.digest == digest:
                self._ready.pop(key, None)

    def sampling(self) -> dict[LaneKey, Network]:
        """Those that sample and are not deterministic."""
        ready = dict(self._ready)
        return {key: net for key, net in ready.items() if key == LaneKey(key.digest)}


def _key(model: Model, exact: bool, mode: Mode) -> LaneKey:
    return lane_key(model, exact=exact, mode="chains" if exact else mode)  # an exact one serves all
