"""The model folder: what is in it, each loaded once, reread while the worker runs.

A sub-folder is a model if it is a checkpoint of ours or of diffusers; its name is the model's. A
new or changed one serves without a restart; a chain that runs keeps the weights it began with.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import torch

import diffusion
from diffusion import CheckpointError, Model
from diffusion.samplers import SAMPLERS
from jobs.cards import ModelCard, Sampling

log = logging.getLogger("ddpm.worker")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MARKS = ("config.json", "model_index.json")
Signature = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, eq=False)
class Served:
    """A loaded model under its name."""

    name: str
    model: Model
    card: ModelCard
    folder: Path


@dataclass(frozen=True)
class Changes:
    """What a rescan found: models new or changed, and names that are gone."""

    loaded: tuple[Served, ...] = ()
    gone: tuple[str, ...] = ()


class ModelFolder:
    """The models of one folder that this worker serves."""

    def __init__(
        self,
        root: Path,
        *,
        queue: str,
        device: str | torch.device = "cpu",
        names: tuple[str, ...] = (),
    ) -> None:
        """names: serve only these; none given: all."""
        self.root = root
        self._queue = queue
        self._device = device
        self._names = names
        self._served: dict[str, Served] = {}
        self._seen: dict[str, Signature] = {}

    @property
    def served(self) -> dict[str, Served]:
        """Name → model."""
        return dict(self._served)

    def rescan(self) -> Changes:
        """Load what is new or changed, drop what is gone. A broken folder is named in the log,
        once, and tried again when it changes."""
        found = self._folders()
        loaded = []
        for name, folder in found.items():
            signature = _signature(folder)
            if self._seen.get(name) == signature:
                continue
            self._seen[name] = signature
            served = self._load(name, folder)
            if served is not None:
                self._served[name] = served
                loaded.append(served)
        gone = [name for name in self._seen if name not in found]
        for name in gone:
            del self._seen[name]
        was_served = tuple(name for name in gone if self._served.pop(name, None) is not None)
        return Changes(tuple(loaded), was_served)

    def _folders(self) -> dict[str, Path]:
        if not self.root.is_dir():
            return {}
        return {
            folder.name: folder
            for folder in sorted(self.root.iterdir())
            if _NAME.fullmatch(folder.name)
            and (not self._names or folder.name in self._names)
            and any((folder / mark).is_file() for mark in _MARKS)
        }

    def _load(self, name: str, folder: Path) -> Served | None:
        try:
            model = diffusion.load(folder, self._device)
        except (CheckpointError, OSError) as error:
            log.error("model %s cannot be served: %s", name, error)
            return None
        log.info("model %s: %d parameters, digest %s", name, _parameters(model), model.digest[:12])
        return Served(name, model, card_of(model, name, self._queue), folder)


def card_of(model: Model, name: str, queue: str) -> ModelCard:
    """What the API has to know of a model."""
    config, network = model.config, model.config.network
    labels = config.class_names or tuple(str(i) for i in range(network.num_classes))
    return ModelCard(
        name=name,
        digest=model.digest,
        queue=queue,
        shape=model.shape,
        betas=tuple(model.schedule.betas.tolist()),
        class_names=labels,
        null_label=network.null_label,
        prediction=config.prediction,
        learned_variance=network.learned_variance,
        samplers=SAMPLERS,
        sampling=Sampling(
            sampler=config.sampling.sampler,
            variance=config.sampling.variance,
            spacing=config.sampling.spacing,
        ),
        parameters=_parameters(model),
        schedule_kind=config.schedule.kind,
    )


def _parameters(model: Model) -> int:
    return sum(parameter.numel() for parameter in model.network.parameters())


def _signature(folder: Path) -> Signature:
    """Names, sizes and times of the files, so that a change is seen without reading them."""
    entries = []
    for path in sorted(folder.rglob("*")):
        try:
            stat = path.stat()
        except OSError:  # being replaced: the next look sees it
            continue
        entries.append((str(path.relative_to(folder)), stat.st_size, stat.st_mtime_ns))
    return tuple(entries)
