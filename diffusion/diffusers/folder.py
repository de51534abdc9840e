"""Checkpoint folders of diffusers, both ways: an unconditional or class-labelled image pipeline.

    model_index.json   scheduler/scheduler_config.json
    unet/config.json   unet/diffusion_pytorch_model.safetensors (or in parts: `stored`)

Also read: the flat layout of the oldest public checkpoints (all files in one folder), and a lone
`UNet2DModel` folder, which then has the default scheduler: the paper's schedule, ε-prediction.
What diffusers has no field for (class names, which label means "no label", the crop, some ways to
sample) we keep in `ddpm.json` beside them. diffusers itself is not needed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from diffusion.diffusers.config import NETWORK_CLASS, VERSION, read_network, write_network
from diffusion.diffusers.fields import Fields, is_integer, is_list
from diffusion.diffusers.scheduler import (
    DDIM,
    SCHEDULER_CLASSES,
    Process,
    read_scheduler,
    write_scheduler,
)
from diffusion.diffusers.stored import WEIGHTS_NAME, find_weights, read_stored
from diffusion.diffusers.weights import from_theirs, to_theirs
from diffusion.files import (
    CheckpointError,
    digest_of,
    naming,
    read_json,
    write_json,
    write_weights,
)
from diffusion.model import Model, ModelConfig, build_network
from diffusion.parameterization import PredictionError
from diffusion.size import check_memory
from diffusion.table import SamplerError
from diffusion.unet import UNet
from diffusion.unet_config import UNetConfig

INDEX_NAME = "model_index.json"
CONFIG_NAME = "config.json"  # of the network
SCHEDULER_NAME = "scheduler_config.json"
EXTRAS_NAME = "ddpm.json"
EXTRAS_FORMAT = 1
PIPELINES = ("DDPMPipeline", "DDIMPipeline")


def is_diffusers_folder(folder: Path) -> bool:
    """Whether diffusers wrote this folder, or would read it."""
    if (folder / INDEX_NAME).is_file() or _networks(folder):
        return True
    try:
        return "_class_name" in read_json(folder / CONFIG_NAME)
    except CheckpointError:
        return False


def load_diffusers(
    folder: str | Path, device: str | torch.device = "cpu", *, memory: int | None = None
) -> Model:
    """Load a diffusers folder, ready to evaluate. memory: bytes that it may take.

    Raises CheckpointError: a missing or broken file, a pickle, a field that cannot be honoured,
    a model that is too large, weights that do not fit.
    """
    folder = Path(folder)
    paths = [folder / INDEX_NAME] if (folder / INDEX_NAME).is_file() else []
    kind = _read_index(read_json(paths[0]), str(paths[0])) if paths else None
    if not paths and (networks := _networks(folder)) and not (folder / "scheduler").is_dir():
        raise CheckpointError(
            f"{folder}: no {INDEX_NAME}, so this is no whole pipeline; give a network of it: "
            + " or ".join(map(str, networks))
        )
    network_path = _part(folder, "unet") / CONFIG_NAME
    scheduler_path = _part(folder, "scheduler") / SCHEDULER_NAME
    extras_path = folder / EXTRAS_NAME
    weights_paths = find_weights(network_path.parent)

    raw_extras = read_json(extras_path) if extras_path.is_file() else {"format": EXTRAS_FORMAT}
    extras = Extras.read(raw_extras, str(extras_path))
    network = read_network(read_json(network_path), str(network_path), null_class=extras.null_class)
    if paths or scheduler_path.is_file():
        raw_scheduler = read_json(scheduler_path)
    else:  # a lone network
        raw_scheduler = {"_class_name": "DDPMScheduler"}
    process = read_scheduler(raw_scheduler, str(scheduler_path), kind)
    _check_variance(network, process, str(scheduler_path))
    with naming(folder):
        config = extras.complete(network, process)
        check_memory(network, weights_paths, memory)

    with torch.device("meta"):
        names = list(UNet(network).state_dict())
    weights = read_stored(weights_paths)
    with naming(weights_paths[0]):
        built = build_network(config, from_theirs(weights, names), device)
    paths += [network_path, scheduler_path, extras_path, *weights_paths]
    return Model(config, built, digest_of(path for path in paths if path.is_file()))


def export_diffusers(model: Model, folder: str | Path) -> None:
    """Write a folder that `DDPMPipeline.from_pretrained` (or `DDIMPipeline`) loads.

    A model with classes loads there too, but that pipeline passes no labels: call its `unet`.
    Raises CheckpointError for what diffusers cannot express.
    """
    folder = Path(folder)
    scheduler = write_scheduler(model.config)
    for part in ("unet", "scheduler"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    write_weights(to_theirs(model.network.state_dict()), folder / "unet" / WEIGHTS_NAME)
    write_json(write_network(model.config.network), folder / "unet" / CONFIG_NAME)
    write_json(scheduler, folder / "scheduler" / SCHEDULER_NAME)
    write_json(Extras.of(model.config, scheduler).to_dict(), folder / EXTRAS_NAME)
    index = {
        "_class_name": scheduler["_class_name"].replace("Scheduler", "Pipeline"),
        **VERSION,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", NETWORK_CLASS],
    }
    write_json(index, folder / INDEX_NAME)


def _networks(folder: Path) -> list[Path]:
    """Folders of networks within a pipeline, or in what a training script of diffusers saves."""
    paths = (folder / name for name in ("unet_ema", "unet"))
    return [path for path in paths if (path / CONFIG_NAME).is_file()]


def _part(folder: Path, name: str) -> Path:
    """The subfolder of a component, or the folder itself in the flat layout."""
    return folder / name if (folder / name).is_dir() else folder


def _read_index(raw: dict[str, Any], where: str) -> str:
    """The class of the scheduler that a pipeline samples with."""
    fields = Fields(raw, where)
    pipeline = raw.get("_class_name")
    if pipeline not in PIPELINES:
        raise fields.refuse("_class_name", pipeline, " or ".join(PIPELINES))
    fields.choice("unet", (["diffusers", NETWORK_CLASS],), None)
    allowed = tuple(["diffusers", name] for name in SCHEDULER_CLASSES)
    scheduler = fields.choice("scheduler", allowed, None)
    fields.done()
    return DDIM if pipeline == "DDIMPipeline" else str(scheduler[1])  # it converts any other


def _check_variance(network: UNetConfig, process: Process, where: str) -> None:
    """A learned variance takes both: a network that has it and a scheduler that reads it."""
    learned = process.sampling.variance == "learned"
    if learned and not network.learned_variance:
        raise CheckpointError(
            f"{where}: variance_type = 'learned_range': must be fixed_small or fixed_large for "
            f"a network with out_channels = in_channels = {network.in_channels}"
        )
    if network.learned_variance and not learned:
        raise CheckpointError(
            f"{where}: variance_type: must be learned_range (of DDPMScheduler) for a network with "
            f"out_channels = {network.out_channels} and in_channels = {network.in_channels}"
        )


@dataclasses.dataclass(frozen=True)
class Extras:
    """What a model's config holds and diffusers has no field for: the content of ddpm.json.

    sampling: those of the SamplingDefaults that the scheduler's config cannot say.
    """

    class_names: tuple[str, ...] = ()
    null_class: bool = False
    crop: tuple[int, int] | None = None
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, config: ModelConfig, scheduler: dict[str, Any]) -> Extras:
        """What is left to say beside a written scheduler config."""
        said = dataclasses.asdict(read_scheduler(scheduler, SCHEDULER_NAME).sampling)
        wanted = dataclasses.asdict(config.sampling)
        unsaid = {name: value for name, value in wanted.items() if value != said[name]}
        return cls(config.class_names, config.network.null_class, config.crop, unsaid)

    @classmethod
    def read(cls, raw: dict[str, Any], where: str) -> Extras:
        """From JSON. Raises CheckpointError naming an unknown or bad field."""
        fields = Fields(raw, where)
        fields.choice("format", (EXTRAS_FORMAT,), None)
        names = fields.take("class_names", [], _is_names, "a list of names")
        null_class = fields.flag("null_class", False)
        crop = fields.take("crop", None, _is_crop, "[height, width] or null")
        sampling = fields.take("sampling", {}, lambda v: isinstance(v, dict), "an object")
        fields.done()
        return cls(tuple(names), null_class, crop and tuple(crop), sampling)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"format": EXTRAS_FORMAT, **dataclasses.asdict(self)}

    def complete(self, network: UNetConfig, process: Process) -> ModelConfig:
        """The whole config of a model."""
        try:
            sampling = dataclasses.replace(process.sampling, **self.sampling)
        except (TypeError, SamplerError) as error:
            raise CheckpointError(f"sampling: {error}") from error
        try:
            return ModelConfig(
                network, process.schedule, process.prediction, self.class_names, self.crop, sampling
            )
        except PredictionError as error:
            raise CheckpointError(f"prediction_type and betas: {error}") from error


def _is_names(value: object) -> bool:
    return value == [] or is_list(value, lambda name: isinstance(name, str))


def _is_crop(value: Any) -> bool:
    return value is None or (is_list(value, is_integer) and len(value) == 2)
