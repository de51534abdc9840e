"""The model folder: what is in it, each loaded once, reread while the worker runs.

A sub-folder is a model if it is a checkpoint of ours or of diffusers; its name is the model's. A
new or changed one serves without a restart; a chain that runs keeps the weights it began with.
"""

from __future__ import annotations

import base64
import logging
import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path

import torch

import diffusion
from diffusion import CheckpointError, Model, noise
from diffusion.about import About, read_about
from diffusion.files import NoRoomError
from diffusion.samplers import samplers_of
from diffusion.spacings import SPACINGS
from diffusion.table import SamplerTable
from diffusion.tuned import TUNED, table_digest
from jobs.cards import ModelCard, Preset, SamplerTraits, Sampling
from jobs.settings import MODEL_OF_NO_NAME
from worker.memory import free_bytes
from worker.network.out_of_memory import is_out_of_memory

log = logging.getLogger("ddpm.worker")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MARKS = ("config.json", "model_index.json")
AGAIN_S = 60.0  # after a failure that may pass by itself
_TABLES = 256  # kept of a model
Signature = tuple[tuple[str, int, int], ...]
Options = tuple[tuple[str, object], ...]  # of a sampler: names and values


@dataclass(frozen=True, eq=False)
class Served:
    """A loaded model under its name."""

    name: str
    model: Model
    card: ModelCard
    folder: Path

    @cached_property
    def table(self) -> Callable[[Options], SamplerTable]:
        """Options of a sampler → its table; the last ones are kept for as long as the model is."""
        return lru_cache(maxsize=_TABLES)(partial(_table, self.model))


def _table(model: Model, options: Options) -> SamplerTable:
    return model.table(**(asdict(model.config.sampling) | dict(options)))


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
        first: str = MODEL_OF_NO_NAME,
    ) -> None:
        """names: serve only these; none given: all. first: the one that is not to wait for others,
        since requests that name none mean it."""
        self.root = root
        self._queue = queue
        self._device = device
        self._names = names
        self._first = first
        self._served: dict[str, Served] = {}
        self._seen: dict[str, Signature] = {}
        self._misnamed: set[str] = set()
        self._again_at: dict[str, float] = {}  # of folders that failed for what may pass

    @property
    def served(self) -> dict[str, Served]:
        """Name → model."""
        return dict(self._served)

    def rescan(
        self,
        *,
        prepare: Callable[[Served], object] = lambda _: None,
        publish: Callable[[Served], object] = lambda _: None,
        only_first: bool = False,
    ) -> Changes:
        """Load what is new or changed, `first` first, then smallest first; drop what is gone.

        Each model is prepared and published before the next is looked at. A folder that cannot be
        loaded or prepared, for whatever reason, is named in the log, once, and tried again when it
        changes; each minute too, where memory was short or its disk failed. What `publish` raises
        is not the folder's fault: it goes to the caller, and that model is tried again at the next
        call. only_first: once one is served, all others are left to the next call.
        """
        found = self._folders()
        signatures = {name: _signature(folder) for name, folder in found.items()}
        changed = [
            name for name in found if self._seen.get(name) != signatures[name] or self._is_due(name)
        ]
        loaded = []
        sizes = {name: sum(size for _, size, _ in signatures[name]) for name in changed}
        for name in sorted(changed, key=lambda name: (name != self._first, sizes[name])):
            if self._seen.get(name) != signatures[name]:
                self._again_at.pop(name, None)
            self._seen[name] = signatures[name]
            served = self._load(name, found[name], prepare)
            if served is not None:
                self._served[name] = served
                loaded.append(served)
                self._publish(served, publish)
                if only_first:
                    break
        gone = [name for name in self._seen if name not in found]
        for name in gone:
            del self._seen[name]
            self._again_at.pop(name, None)
        was_served = tuple(name for name in gone if self._served.pop(name, None) is not None)
        return Changes(tuple(loaded), was_served)

    def _folders(self) -> dict[str, Path]:
        if not self.root.is_dir():
            return {}
        models = [
            folder
            for folder in sorted(self.root.iterdir())
            if not folder.name.startswith(".") and any((folder / mark).is_file() for mark in _MARKS)
        ]
        misnamed = {folder.name for folder in models if not _NAME.fullmatch(folder.name)}
        for name in sorted(misnamed - self._misnamed):
            log.error(
                "folder %r is not served: the name of a model must be 1 to 100 of the letters "
                "A-Z and a-z, digits, '.', '_' and '-', and begin with a letter or digit",
                name,
            )
        self._misnamed = misnamed
        wanted = self._names or {folder.name for folder in models}
        return {f.name: f for f in models if f.name in wanted and f.name not in misnamed}

    def _load(self, name: str, folder: Path, prepare: Callable[[Served], object]) -> Served | None:
        try:
            model = diffusion.load(folder, self._device, memory=free_bytes(self._device))
            served = Served(name, model, card_of(model, name, self._queue, _about(folder)), folder)
            prepare(served)
        except Exception as error:  # whatever it is, it is this folder's, and no other's
            self._failed(name, error)
            return None
        self._again_at.pop(name, None)
        log.info("model %s: %d parameters, digest %s", name, _parameters(model), model.digest[:12])
        return served

    def _is_due(self, name: str) -> bool:
        """Whether a folder that failed as it is may be tried again."""
        return time.monotonic() >= self._again_at.get(name, math.inf)

    def _failed(self, name: str, error: Exception) -> None:
        """Say so, once for the folder as it is; and when it is tried again, if it is."""
        told = name in self._again_at
        if may_pass(error):
            self._again_at[name] = time.monotonic() + AGAIN_S
        else:
            self._again_at.pop(name, None)
        if told and name in self._again_at:
            return
        if isinstance(error, CheckpointError | OSError):
            log.error("model %s cannot be served: %s", name, error)
        else:
            log.error("model %s cannot be served: %r", name, error, exc_info=error)

    def _publish(self, served: Served, publish: Callable[[Served], object]) -> None:
        try:
            publish(served)
        except Exception:
            del self._seen[served.name]
            raise


def may_pass(error: BaseException | None) -> bool:
    """Whether the same folder may load a minute later: memory was short, or its disk failed."""
    while error is not None:
        if isinstance(error, OSError | NoRoomError) or is_out_of_memory(error):
            return True
        error = error.__cause__
    return False


def _about(folder: Path) -> About:
    """What the folder says of its model; what is wrong with that keeps no model from serving."""
    try:
        return read_about(folder)
    except (CheckpointError, OSError) as error:
        log.warning("model %s is served without its description: %s", folder.name, error)
        return About()


def _tuned_traits(model: Model) -> SamplerTraits:
    tables = {steps: table_digest(table) for steps, table in sorted(model.tuned.items())}
    return SamplerTraits(steps=tuple(tables), tables=tables, draws=False)


def card_of(model: Model, name: str, queue: str, about: About | None = None) -> ModelCard:
    """What the API has to know of a model."""
    config, network, about = model.config, model.config.network, about or About()
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
        samplers={
            name: SamplerTraits(
                options=sampler.options,
                corrector_only=sampler.corrector_only,
                least=sampler.least,
                draws=sampler.draws,
            )
            for name, sampler in samplers_of(config.sampling).items()
        }
        | ({TUNED: _tuned_traits(model)} if model.tuned else {}),
        spacings=tuple(SPACINGS),
        sampling=Sampling(
            sampler=config.sampling.sampler,
            variance=config.sampling.variance,
            spacing=config.sampling.spacing,
        ),
        steps=config.sampling.steps,
        presets={name: Preset(**asdict(its)) for name, its in model.presets.items()},
        noise=noise.VERSION,
        parameters=_parameters(model),
        schedule_kind=config.schedule.kind,
        description=about.description,
        thumbnail=base64.b64encode(about.thumbnail).decode(),
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
