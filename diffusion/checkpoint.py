"""The folder a model is kept in: loaded, saved, converted.

A folder holds `config.json` and `model.safetensors`; nothing in it is ever executed. A diffusers
folder (`model_index.json`) loads as well: see `diffusion.diffusers.folder`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from diffusion.about import About, own_presets, read_about, write_about
from diffusion.diffusers.folder import export_diffusers, is_diffusers_folder, load_diffusers
from diffusion.files import (
    CheckpointError,
    digest_of,
    naming,
    read_json,
    read_weights,
    write_json,
    write_weights,
)
from diffusion.model import Model, ModelConfig, build_network
from diffusion.samplers import samplers_of
from diffusion.size import check_memory
from diffusion.table import SamplerError, SamplerTable
from diffusion.tuned import TUNED_NAME, read_tuned, write_tuned

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
FORMS = ("ours", "diffusers")


def load(
    folder: str | Path, device: str | torch.device = "cpu", *, memory: int | None = None
) -> Model:
    """Load a checkpoint folder, ours or one of diffusers, ready to evaluate.

    memory: bytes that it may take; by default nobody asks. Raises CheckpointError: no such folder,
    a missing or broken file, a model that is too large, weights that do not fit.
    """
    folder = Path(folder)
    if is_diffusers_folder(folder):
        return load_diffusers(folder, device, memory=memory)
    files = (folder / CONFIG_NAME, folder / WEIGHTS_NAME)
    raw = read_json(files[0])
    with naming(files[0]):
        config = ModelConfig.from_dict(raw)
        check_memory(config.network, files[1:], memory)
    weights = read_weights(files[1])
    with naming(files[1]):
        network = build_network(config, weights, device)
    T, samplers = config.schedule.T, samplers_of(config.sampling)
    try:
        tuned = _tables(folder, T)
        presets = own_presets(folder, T, samplers=samplers, tuned=tuned)
        return Model(config, network, digest_of(files), presets=presets, tuned=tuned)
    except SamplerError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def _tables(folder: Path, T: int) -> dict[int, SamplerTable]:
    """What was tuned for these weights."""
    if not (folder / TUNED_NAME).exists():
        return {}
    found = read_tuned(folder, weights=digest_of([folder / WEIGHTS_NAME]))
    return {rows: tuned.table(T) for rows, tuned in found.items()}


def save(model: Model, folder: str | Path) -> None:
    """Write config.json and model.safetensors; each file appears whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(model.network.state_dict(), folder / WEIGHTS_NAME)
    write_json(model.config.to_dict(), folder / CONFIG_NAME)


def convert(
    source: str | Path,
    target: str | Path,
    to: str = "ours",
    *,
    sampling: Mapping[str, object] | None = None,
) -> None:
    """Rewrite a checkpoint folder in our form or in diffusers' (`to`: ours or diffusers).

    sampling: fields of `SamplingDefaults` to change, as where diffusers lacks what the model says.
    What the folder says of the model goes along; into our form, its tuned tables do too. Raises
    CheckpointError, also if `target` already holds anything.
    """
    if to not in FORMS:
        raise CheckpointError(f"to = {to!r}: must be {' or '.join(FORMS)}")
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: already exists; give a new or an empty folder")
    model = load(source)
    if sampling:
        model = Model(_resampled(model.config, sampling), model.network, tuned=model.tuned)
    write = save if to == "ours" else export_diffusers
    write(model, target)
    with suppress(CheckpointError):  # what is wrong with its card keeps no model from being used
        if (about := read_about(source)) != About():
            write_about(about, target)
    if to == "ours" and model.tuned:
        tables = read_tuned(Path(source), weights=digest_of([Path(source) / WEIGHTS_NAME]))
        write_tuned(tables.values(), target, weights=digest_of([target / WEIGHTS_NAME]))


def _resampled(config: ModelConfig, sampling: Mapping[str, Any]) -> ModelConfig:
    """The config with other sampling defaults."""
    known = [field.name for field in dataclasses.fields(config.sampling)]
    for name in sampling:
        if name not in known:
            raise CheckpointError(f"sampling: {name}: must be one of {', '.join(known)}")
    own = config.sampling
    if sampling.get("sampler", own.sampler) != own.sampler:
        own = dataclasses.replace(own, steps=None)  # they were those of the sampler that goes
    try:
        changed = dataclasses.replace(own, **sampling)
    except SamplerError as error:
        raise CheckpointError(f"sampling: {error}") from error
    return dataclasses.replace(config, sampling=changed)
