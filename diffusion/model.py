"""A trained model: network, schedule and parameterisation. Its folder: `diffusion.checkpoint`."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffusion import cores
from diffusion.checks import as_tuple
from diffusion.files import CheckpointError
from diffusion.parameterization import coefficients_at, reading_table, x_start_coefficients
from diffusion.presets import Preset, presets_of
from diffusion.samplers import SamplingDefaults, build_table, samplers_of
from diffusion.schedule import Schedule, ScheduleConfig
from diffusion.table import SamplerError, SamplerTable, check_name
from diffusion.tuned import TUNED, tuned_table
from diffusion.unet import UNet
from diffusion.unet_config import UNetConfig

FORMAT = 1
MAX_NAME = 200  # characters of a class name


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
        names = as_tuple("class_names", self.class_names, error=CheckpointError)
        object.__setattr__(self, "class_names", names)
        if self.crop is not None:
            crop = as_tuple("crop", self.crop, error=CheckpointError)
            object.__setattr__(self, "crop", crop)
        if self.schedule.kind == "learned":
            raise CheckpointError("schedule: kind = 'learned' is for training; a model lists betas")
        x_start_coefficients(self.schedule.build(), self.prediction)
        for name in self.class_names:
            if not isinstance(name, str) or len(name) > MAX_NAME:
                raise CheckpointError(
                    f"class_names: {name!r:.200}: must be a text of at most {MAX_NAME} characters"
                )
        _check_crop(self.crop, self.network.image_size)
        if self.class_names and len(self.class_names) != self.network.num_classes:
            raise CheckpointError(
                f"class_names: {len(self.class_names)} names for "
                f"num_classes = {self.network.num_classes}"
            )
        steps, T = self.sampling.steps or 1, self.schedule.build().T
        if steps > T:
            raise CheckpointError(f"sampling: steps = {steps}: must be at most T = {T}")
        if self.sampling.variance == "learned" and not self.network.learned_variance:
            raise CheckpointError("sampling: variance = 'learned' needs learned_variance = true")

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        sampling = dataclasses.asdict(self.sampling)
        out: dict[str, Any] = {
            "format": FORMAT,
            "network": dataclasses.asdict(self.network),
            "schedule": self.schedule.to_dict(),
            "prediction": self.prediction,
            "class_names": list(self.class_names),
            "sampling": {name: value for name, value in sampling.items() if value is not None},
        }
        if self.crop is not None:
            out["crop"] = list(self.crop)
        return out

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`. Raises CheckpointError naming an unknown or bad field."""
        fields = {"sampling": {}, **raw}
        version = fields.pop("format", None)
        if version != FORMAT:
            raise CheckpointError(f"format = {version!r}: this version reads format {FORMAT}")
        try:
            for name, part in _PARTS.items():
                if name not in fields:
                    raise CheckpointError(f"{name}: missing")
                fields[name] = part(**_known(part, fields[name], name))
            return cls(**_known(cls, fields))
        except (ArithmeticError, TypeError, ValueError) as error:
            raise CheckpointError(str(error)) from error


_PARTS = {"network": UNetConfig, "schedule": ScheduleConfig, "sampling": SamplingDefaults}


def _known(kind: Any, raw: object, name: str = "") -> dict[str, Any]:
    """The fields of a dataclass, or CheckpointError naming what is none."""
    if not isinstance(raw, dict):
        raise CheckpointError(f"{name} = {raw!r:.200}: must be an object")
    if unknown := raw.keys() - {field.name for field in dataclasses.fields(kind)}:
        raise CheckpointError(f"{f'{name}.' if name else ''}{min(unknown)}: unknown field")
    return raw


def _check_crop(crop: tuple[int, int] | None, side: int) -> None:
    if crop is None:
        return
    ok = all(isinstance(length, int) and 1 <= length <= side for length in crop)
    if len(crop) != 2 or not ok:
        raise CheckpointError(f"crop = {crop!r:.200}: must be a height and a width, each 1..{side}")


@dataclass(frozen=True, eq=False)
class Estimate:
    """What a network's output says: x̂_0, not clipped, and ε̂, both [N, C, H, W].

    v: the half of a learned variance, [N, C, H, W], or None.
    """

    x_start: Tensor
    eps: Tensor
    v: Tensor | None = None

    @property
    def finite(self) -> Tensor:
        """Whether all that the network said of a sample are finite numbers, bool [N]."""
        finite = self.eps.isfinite()
        return (finite if self.v is None else finite & self.v.isfinite()).flatten(1).all(dim=1)


class Model:
    """ε_θ with its schedule. Tensors are [N, C, H, W] in [−1, 1]; t is [N], an index 0..T−1."""

    def __init__(
        self,
        config: ModelConfig,
        network: UNet,
        digest: str = "",
        *,
        presets: Mapping[str, Preset] | None = None,
        tuned: Mapping[int, SamplerTable] | None = None,
    ) -> None:
        """presets: its own, beside those that every model has. tuned: rows → a learned table."""
        self.config = config
        self.network = network
        self.schedule: Schedule = config.schedule.build()
        self.digest = digest
        self.presets = presets_of(config.sampling, self.schedule.T, presets)
        self.tuned = dict(tuned or {})
        self._reading = torch.tensor(reading_table(self.schedule, config.prediction))  # [4, T]
        # How `output` evaluates the network: `prepare` puts something quicker here on a GPU.
        self.evaluator: cores.Network = network

    def __repr__(self) -> str:
        network, schedule = self.config.network, self.config.schedule
        classes = f"{network.num_classes} classes" if network.num_classes else "no classes"
        count = sum(parameter.numel() for parameter in self.network.parameters())
        return (
            f"<Model {'×'.join(map(str, self.shape))}, {classes}, T = {self.schedule.T} "
            f"({schedule.kind}), predicts {self.config.prediction}, {count:,} parameters, "
            f"{self.device}{f', digest {self.digest[:12]}' if self.digest else ''}>"
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.network.conv_in.weight.device

    @functools.cached_property
    def is_large(self) -> bool:
        """Whether single rows are worth several cores: see `cores`."""
        return sum(weight.numel() for weight in self.network.parameters()) >= cores.LARGE

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        network = self.config.network
        return network.in_channels, network.image_size, network.image_size

    def table(
        self,
        *,
        sampler: str,
        steps: int,
        start: int | None = None,
        corrector_steps: int | None = None,
        travel: int = 1,
        **options: Any,
    ) -> SamplerTable:
        """The table of a named sampler: see `build_table`; `tuned` is that of the model's own.

        Raises SamplerError naming the option.
        """
        if sampler != TUNED:
            known = samplers_of(self.config.sampling)
            check_name("sampler", sampler, (*known, TUNED) if self.tuned else known)
            options |= {"start": start, "corrector_steps": corrector_steps, "travel": travel}
            return build_table(self.schedule, sampler=sampler, steps=steps, **options)
        if start is not None:
            raise SamplerError("sampler = 'tuned': is for chains from noise")
        if corrector_steps or travel != 1:
            raise SamplerError("sampler = 'tuned': takes neither Langevin steps nor travel")
        return tuned_table(self.tuned, steps)

    def eps(self, x_t: Tensor, t: Tensor, class_label: Tensor | None = None) -> Tensor:
        """ε̂ = ε_θ(x_t, t), float32, whatever the network predicts; arguments as of `estimate`."""
        return self.estimate(x_t, t, class_label).eps

    def estimate(self, x_t: Tensor, t: Tensor, class_label: Tensor | None = None) -> Estimate:
        """What the network finds in x_t, float32.

        x_t: [N, C, H, W]; t: [N] int64, index 0..T−1, or float64, any time between;
        class_label: [N] int64, or None for no label. Raises ValueError for labels that an
        unconditional network gets, or that one without a null label lacks.
        """
        return self.read(self.output(x_t, t, class_label), x_t, t)

    def output(self, x_t: Tensor, t: Tensor, class_label: Tensor | None = None) -> Tensor:
        """The network's raw output, float32 [N, C or 2C, H, W]."""
        dtype = self.network.conv_in.weight.dtype
        out = cores.evaluate(self.evaluator, x_t.to(dtype), t, class_label, large=self.is_large)
        return out.to(torch.promote_types(x_t.dtype, torch.float32))

    def read(self, out: Tensor, x_t: Tensor, t: Tensor) -> Estimate:
        """The estimate that a raw output [N, C or 2C, H, W] at x_t [N, C, H, W] stands for.

        x̂_0 and ε̂ each come straight from the output: by way of the other x̂_0 would lose what a
        division by √ᾱ_t loses, which is everything where ᾱ_T = 0.
        """
        if t.is_floating_point():
            reading = coefficients_at(self.schedule, self.config.prediction, t)
        else:
            if self._reading.device != x_t.device:
                self._reading = self._reading.to(x_t.device)
            reading = self._reading[:, t]
        r_x, r_out, e_x, e_out = reading.to(x_t.dtype).view(4, -1, 1, 1, 1)
        channels = x_t.shape[1]
        v = out[:, channels:] if out.shape[1] > channels else None
        out = out[:, :channels]
        eps = out if self.config.prediction == "epsilon" else e_x * x_t + e_out * out
        return Estimate(r_x * x_t + r_out * out, eps, v)


def check_model(model: object) -> None:
    """Raise TypeError for a folder's name, which is taken for its model most easily."""
    if isinstance(model, str | os.PathLike):
        raise TypeError(f"model = {model!r:.80}: must be a Model; diffusion.load reads a folder")


def build_network(
    config: ModelConfig, weights: dict[str, Tensor], device: str | torch.device = "cpu"
) -> UNet:
    """The network with these weights, in evaluation mode, gradients off.

    Raises CheckpointError for a tensor that is missing, unknown, of another shape or not finite.
    """
    with torch.device("meta"):
        network = UNet(config.network)
    _check_fit(network.state_dict(), weights)
    _check_finite(weights)
    _keep_float32(torch.device(device))
    network = network.to_empty(device=device)
    network.load_state_dict(weights, strict=True)
    return network.eval().requires_grad_(False)


def _keep_float32(device: torch.device) -> None:
    """Let float32 mean float32 on a GPU: by default torch lets its convolutions round to TF32.

    Those 10 bits would be in every figure, x_t's own among them. Set it again after loading to get
    that back.
    """
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False


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


def _check_finite(weights: Mapping[str, Tensor]) -> None:
    bad = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if bad:
        first, more = weights[bad[0]], f" (and {len(bad) - 1} more tensors)" * (len(bad) > 1)
        raise CheckpointError(
            f"weights: {bad[0]}: {int((~first.isfinite()).sum())} of its {first.numel()} numbers "
            f"are NaN or infinite{more}: the training that wrote them had diverged"
        )
