"""A trained model: network, schedule and parameterisation, and the folder it is kept in.

A folder holds `config.json` and `model.safetensors`; nothing in it is ever executed. A diffusers
folder (`model_index.json`) loads as well: see `diffusion.diffusers.folder`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion.forward import gather
from diffusion.parameterization import eps_coefficients, x_start_coefficients
from diffusion.samplers import SamplingDefaults
from diffusion.schedule import Schedule, ScheduleConfig
from diffusion.unet import UNet, UNetConfig

FORMAT = 1
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


class CheckpointError(ValueError):
    """A folder that is no usable checkpoint; the message says which file and why."""


@dataclass(frozen=True)
class ModelConfig:
    """All that is needed, beside the weights, to use a model.

    prediction: epsilon, sample, v or mean. class_names: empty for an unconditional model.
    crop: the (height, width) of the data inside the padded image, for display and bits/dim.
    sampling: what `sample` does where its caller says nothing.
    """

    network: UNetConfig = field(default_factory=UNetConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    prediction: str = "epsilon"
    class_names: tuple[str, ...] = ()
    crop: tuple[int, int] | None = None
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", tuple(self.class_names))
        if self.crop is not None:
            object.__setattr__(self, "crop", tuple(self.crop))
        if self.schedule.kind == "learned":
            raise CheckpointError("schedule: kind = 'learned' is for training; a model lists betas")
        x_start_coefficients(self.schedule.build(), self.prediction)
        if self.class_names and len(self.class_names) != self.network.num_classes:
            raise CheckpointError(
                f"class_names: {len(self.class_names)} names for "
                f"num_classes = {self.network.num_classes}"
            )
        if self.sampling.variance == "learned" and not self.network.learned_variance:
            raise CheckpointError("sampling: variance = 'learned' needs learned_variance = true")

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        out: dict[str, Any] = {
            "format": FORMAT,
            "network": dataclasses.asdict(self.network),
            "schedule": self.schedule.to_dict(),
            "prediction": self.prediction,
            "class_names": list(self.class_names),
            "sampling": dataclasses.asdict(self.sampling),
        }
        if self.crop is not None:
            out["crop"] = list(self.crop)
        return out

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`. Raises CheckpointError naming an unknown or bad field."""
        fields = dict(raw)
        version = fields.pop("format", None)
        if version != FORMAT:
            raise CheckpointError(f"format = {version!r}: this version reads format {FORMAT}")
        try:
            fields["network"] = UNetConfig(**fields["network"])
            fields["schedule"] = ScheduleConfig(**fields["schedule"])
            fields["sampling"] = SamplingDefaults(**fields.get("sampling", {}))
            return cls(**fields)
        except KeyError as error:
            raise CheckpointError(f"{error.args[0]}: missing") from error
        except (TypeError, ValueError) as error:
            raise CheckpointError(str(error)) from error


class Model:
    """ε_θ with its schedule. Tensors are [N, C, H, W] in [−1, 1]; t is [N], an index 0..T−1."""

    def __init__(self, config: ModelConfig, network: UNet, digest: str = "") -> None:
        self.config = config
        self.network = network
        self.schedule: Schedule = config.schedule.build()
        self.digest = digest
        self._eps_coefficients = eps_coefficients(self.schedule, config.prediction)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.network.conv_in.weight.device

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        network = self.config.network
        return network.in_channels, network.image_size, network.image_size

    def eps(self, x_t: Tensor, t: Tensor, class_label: Tensor | None = None) -> Tensor:
        """ε̂ = ε_θ(x_t, t), float32, converted from whatever the network predicts.

        x_t: [N, C, H, W]; t: [N] int64, index 0..T−1; class_label: [N] int64, or None for no
        label. Raises ValueError for labels that an unconditional network gets, or that one
        without a null label lacks.
        """
        return self.eps_from_output(self.output(x_t, t, class_label), x_t, t)

    def output(self, x_t: Tensor, t: Tensor, class_label: Tensor | None = None) -> Tensor:
        """The network's raw output, float32 [N, C or 2C, H, W]."""
        dtype = self.network.conv_in.weight.dtype
        out: Tensor = self.network(x_t.to(dtype), t, class_label)
        return out.to(torch.promote_types(x_t.dtype, torch.float32))

    def eps_from_output(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """ε̂ [N, C, H, W] of a raw output; a learned variance's half is left out."""
        out = out[:, : self.config.network.in_channels]
        if self.config.prediction == "epsilon":
            return out
        e_x, e_out = self._eps_coefficients
        return gather(e_x, t, x_t) * x_t + gather(e_out, t, x_t) * out


def digest_of(files: Iterable[Path]) -> str:
    """SHA-256 (hex) over the contents of these files, in this order."""
    sha = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                sha.update(chunk)
    return sha.hexdigest()


def save(model: Model, folder: str | Path) -> None:
    """Write config.json and model.safetensors; each file appears whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(model.network.state_dict(), folder / WEIGHTS_NAME)
    write_json(model.config.to_dict(), folder / CONFIG_NAME)


def write_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    tensors = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
    save_file(tensors, temporary, metadata={"format": "pt"})
    # save_file gives them to their owner alone; a service under another user must read them too.
    temporary.chmod(0o644)
    temporary.replace(path)


def write_json(value: Mapping[str, Any], path: Path) -> None:
    """A JSON file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def load(folder: str | Path, device: str | torch.device = "cpu") -> Model:
    """Load a checkpoint folder, ours or one of diffusers, ready to evaluate.

    Raises CheckpointError: no such folder, a missing or broken file, weights that do not fit.
    """
    from diffusion.diffusers.folder import is_diffusers_folder, load_diffusers  # needs this module

    folder = Path(folder)
    if is_diffusers_folder(folder):
        return load_diffusers(folder, device)
    files = (folder / CONFIG_NAME, folder / WEIGHTS_NAME)
    raw, weights = read_json(files[0]), read_weights(files[1])
    with naming(files[0]):
        config = ModelConfig.from_dict(raw)
    with naming(files[1]):
        network = build_network(config, weights, device)
    return Model(config, network, digest_of(files))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file's name before the message of a CheckpointError."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def build_network(
    config: ModelConfig, weights: dict[str, Tensor], device: str | torch.device = "cpu"
) -> UNet:
    """The network with these weights, in evaluation mode, gradients off.

    Raises CheckpointError for a tensor that is missing, unknown or of another shape.
    """
    with torch.device("meta"):
        network = UNet(config.network)
    _check_fit(network.state_dict(), weights)
    network = network.to_empty(device=device)
    network.load_state_dict(weights, strict=True)
    return network.eval().requires_grad_(False)


def _check_fit(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is not part of it" for name in found if name not in wanted]
    problems += [
        f"{name} has the shape {list(found[name].shape)}, must be {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(f"weights do not fit the network: {problems[0]}{more}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError otherwise."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; is this a checkpoint folder?") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return raw


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file; CheckpointError otherwise."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: broken weights file: {error}") from error
