"""Likelihoods by the flow: the strands of a job as they end, and the result that they make."""

from __future__ import annotations

import logging
import math
import struct
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion.flow import FlowLikelihood, flow_table
from diffusion.spacings import spaced_timesteps
from jobs.kinds.likelihood import LikelihoodSpec
from jobs.results import DensityOfImage, FlowResult
from jobs.store.started import Started
from worker.engine.flows import FlowTask
from worker.engine.tasks import Canceled, Checkpoint, Densities, Event, Start, States
from worker.kinds.inputs import uploaded
from worker.models import Served

log = logging.getLogger("ddpm.worker")
_HEADER = struct.Struct("<4sId")  # magic, next row, nats so far; x̃ follows unless it has ended
_MAGIC = b"fl1\0"


class Strands:
    """The strands of a job (image·draws + draw): ln p_0 of those that ended, states of others.

    What an earlier execution with the same model saved is kept.
    """

    def __init__(self, served: Served, started: Started, spec: LikelihoodSpec) -> None:
        assert spec.seed is not None and spec.draws is not None and spec.steps is not None
        self._spec, self._seed, self._draws = spec, spec.seed, spec.draws
        self._model, self._client = served.model, started.record.client
        self._x_start = uploaded(started)
        n, schedule = len(self._x_start), served.model.schedule
        self._indices = np.array(spec.indices or range(n), np.int64)
        self._table = flow_table(schedule, spaced_timesteps(schedule.T, spec.steps))
        self._found = np.full(n * self._draws, math.nan)
        self._resumed: dict[int, tuple[int, float, Tensor]] = {}  # row, nats, x̃
        self._unsaved: dict[int, bytes] = {}
        self._saved_at = time.monotonic()
        if started.earlier_digest in (None, served.model.digest):
            for strand, raw in started.states.items():
                self._unpack(strand, raw)

    def task(self, execution: str) -> FlowTask:
        """The strands that have not ended."""
        spec = self._spec
        return FlowTask(
            id=execution,
            model=self._model,
            table=self._table,
            seed=self._seed,
            x_start=self._x_start.to(self._model.device),
            indices=self._indices,
            draws=self._draws,
            starts=tuple(self._start(int(i)) for i in np.flatnonzero(np.isnan(self._found))),
            nats={strand: nats for strand, (_, nats, _) in self._resumed.items()},
            deterministic=spec.deterministic,
            urgent=spec.priority == "high",
            client=self._client,
        )

    def _start(self, strand: int) -> Start:
        label = self._spec.class_label
        assert not isinstance(label, str)  # names became numbers at admission
        row, _, x = self._resumed.get(strand, (0, 0.0, None))
        return Start(strand, row=row, x_t=x, class_label=label)

    def take(self, event: Event) -> None:
        """Write down what was found."""
        match event:
            case Densities():
                self._found[event.strands] = event.nats
                for strand, nats in zip(event.strands.tolist(), event.nats.tolist(), strict=True):
                    self._unsaved[strand] = _HEADER.pack(_MAGIC, len(self._table), nats)
            case Checkpoint(states=States() as states) | Canceled(states=States() as states):
                assert states.nats is not None
                rows, x = states.rows.tolist(), states.x_t.cpu().numpy().astype("<f4")
                for i, strand in enumerate(states.indices.tolist()):
                    header = _HEADER.pack(_MAGIC, rows[i], float(states.nats[i]))
                    self._unsaved[strand] = header + x[i].tobytes()

    def unsaved(self, every: float) -> dict[int, bytes]:
        """strand → its state, if that changed, and it is time: seconds since `saved`."""
        return dict(self._unsaved) if time.monotonic() >= self._saved_at + every else {}

    def saved(self, strands: Iterable[int]) -> None:
        """These are in the store, as `unsaved` gave them."""
        for strand in strands:
            self._unsaved.pop(strand, None)
        self._saved_at = time.monotonic()

    def _unpack(self, strand: int, raw: bytes) -> None:
        """What `unsaved` gave. Anything else is left out: that strand begins again."""
        shape, rows = self._model.shape, len(self._table)
        if len(raw) < _HEADER.size or not 0 <= strand < len(self._found):
            return
        magic, row, nats = _HEADER.unpack_from(raw)
        x = np.frombuffer(raw, np.uint8, offset=_HEADER.size)
        if magic != _MAGIC or x.nbytes != (0 if row == rows else 4 * math.prod(shape)):
            log.warning("strand %d starts over: its state is of another version", strand)
        elif row == rows:
            self._found[strand] = nats
        elif row < rows:
            values = x.view("<f4").astype(np.float32).reshape(shape)
            self._resumed[strand] = (row, nats, torch.from_numpy(values))

    def result(self) -> dict[str, Any]:
        """The job's result, JSON. All strands must have ended."""
        nats = torch.from_numpy(self._found).view(len(self._x_start), self._draws)
        found = FlowLikelihood(nats, self._x_start[0].numel())
        crop, bits = self._model.config.crop, found.bits_per_dim
        unpadded = None if crop is None else self._model.shape[0] * crop[0] * crop[1]
        mean, dims = float(bits.mean()), found.dims
        result = FlowResult(
            bits_per_dim=mean,
            standard_error=_known(float(bits.std()) / len(bits) ** 0.5) if len(bits) > 1 else None,
            dims=dims,
            dims_unpadded=unpadded,
            bits_per_unpadded_dim=unpadded and mean * dims / unpadded,
            images=[
                DensityOfImage(
                    index=i,
                    bits_per_dim=float(bits[i]),
                    standard_error=_known(float(error) / dims / math.log(2)),
                    log_density=float(found.mean[i]),
                )
                for i, error in enumerate(_errors(found))
            ],
        )
        return result.model_dump(exclude_none=True)


def _errors(found: FlowLikelihood) -> Tensor:
    """Standard errors [N] in nats; NaN of a single draw."""
    if found.log_density.shape[1] < 2:
        return torch.full_like(found.mean, math.nan)
    return found.standard_error


def _known(error: float) -> float | None:
    return error if math.isfinite(error) else None
