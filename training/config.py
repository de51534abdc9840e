"""The training configuration: one TOML file, every key overridable on the command line.

It is stored beside each checkpoint, so a run can be understood and repeated from its folder.
"""

from __future__ import annotations

import json
import tomllib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from diffusion.files import CheckpointError
from diffusion.model import ModelConfig
from diffusion.parameterization import PREDICTIONS
from diffusion.samplers import SamplingDefaults
from diffusion.schedule import ScheduleConfig, ScheduleError
from diffusion.table import SamplerError
from diffusion.unet_config import NetworkConfigError, UNetConfig

SHIPPED = Path(__file__).parent / "configs"
CONSISTENT = {"sampler": "consistency", "spacing": "trailing", "steps": 2}  # sampling
RENAMED = {"sigma": "variance"}  # of the whole file: what a key was called until 0.2


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names key, value and what is allowed."""


class Section(BaseModel):
    """Base of every table of the file: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class DataConfig(Section):
    """Where the images come from and how they are made to fit.

    source: a folder of images (one folder a class), a .parquet file, glob or folder, or a dataset
    id of the hub. split: of a folder of images, the folder in it to take alone (default: all of
    it); else the split's name, or what names of parquet files begin with (default: train).
    image_column, label_column: of parquet files and hub datasets.
    fit: error refuses an image whose size is not the network's; pad centres it on black;
    resize scales its shorter side and crops the centre. in_memory: decode once and keep the
    bytes (auto: if they take under 4 GiB).
    """

    source: str
    split: str | None = Field(default=None, min_length=1)
    image_column: str = "image"
    label_column: str = "label"
    fit: Literal["error", "pad", "resize"] = "error"
    flips: bool = False
    in_memory: Literal["auto", "always", "never"] = "auto"
    limit: int | None = Field(default=None, ge=1)


class OptimizerConfig(Section):
    """Adam: a linear warm-up, a constant rate, a linear decay to zero over the last steps."""

    learning_rate: float = Field(default=2e-4, gt=0)
    warmup_steps: int = Field(default=5000, ge=0)
    decay_steps: int = Field(default=0, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    grad_clip: float = Field(default=1.0, gt=0)


class ConsistencyConfig(Section):
    """The stages of objective = "consistency": see `training.consistency`.

    gaps: of each stage, 1 − σ_r/σ_t; 1 is r at the image, where the loss is a denoiser's.
    stage_steps: optimizer steps a stage; the last goes on to the end.
    huber: c of the pseudo-Huber distance √(Δ² + c²) − c, with Δ the root mean square difference.
    sigma_power: p of the weight σ_t^−p/(1 − σ_r/σ_t); 1 is Easy Consistency Tuning's.
    """

    gaps: tuple[float, ...] = Field(default=(1, 1 / 2, 1 / 4, 1 / 8, 1 / 16), min_length=1)
    stage_steps: int = Field(default=2000, ge=1)
    huber: float = Field(default=5.4e-4, gt=0)
    sigma_power: float = Field(default=0.5, ge=0, le=2)

    @field_validator("gaps")
    @classmethod
    def _gaps(cls, gaps: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 < gap <= 1 for gap in gaps):
            raise ValueError("must be numbers above 0, and 1 at most")
        return gaps


class TrainConfig(Section):
    """Everything of one training run. Lengths are in optimizer steps.

    batch_size: images an optimizer step, over all processes; accumulate: backward passes it is
    cut into. label_dropout: share of rows that train the null label. ema_decay: of the averaged
    weights, warmed up as min(ema_decay, (1+n)/(10+n)). objective: see `training.objectives`;
    hybrid_weight is its λ, min_snr_gamma its γ. variance: σ² in the bound. timesteps: of training,
    uniform or by importance. schedule.kind = "learned": trained too, from linear.
    """

    data: DataConfig
    network: UNetConfig = Field(default_factory=UNetConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    sampling: SamplingDefaults = Field(default_factory=SamplingDefaults)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    prediction: str = "epsilon"
    objective: Literal["simple", "vlb", "hybrid", "min_snr", "balanced", "consistency"] = "simple"
    consistency: ConsistencyConfig = Field(default_factory=ConsistencyConfig)
    variance: Literal["large", "small", "learned"] = "large"
    timesteps: Literal["uniform", "importance"] = "uniform"
    hybrid_weight: float = Field(default=1e-3, gt=0)
    min_snr_gamma: float = Field(default=5.0, gt=0)
    steps: int = Field(default=800_000, ge=1)
    batch_size: int = Field(default=128, ge=1)
    accumulate: int = Field(default=1, ge=1)
    label_dropout: float = Field(default=0.1, ge=0, le=1)
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    seed: int = Field(default=0, ge=0, le=2**53 - 1)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    device: str = "auto"
    log_every: int = Field(default=50, ge=1)
    checkpoint_every: int = Field(default=1000, ge=1)
    sample_every: int = Field(default=5000, ge=0)
    sample_images: int = Field(default=64, ge=1)
    sample_steps: int = Field(default=50, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _sampled_as_trained(cls, raw: Any) -> Any:
        """A consistency model is to be sampled as one, unless the file says otherwise."""
        if not isinstance(raw, dict) or raw.get("objective") != "consistency":
            return raw
        said = raw.get("sampling", {})
        return raw | {"sampling": CONSISTENT | said} if isinstance(said, dict) else raw

    @field_validator("network", mode="before")
    @classmethod
    def _network(cls, raw: object) -> object:
        return _build(UNetConfig, raw)

    @field_validator("schedule", mode="before")
    @classmethod
    def _schedule(cls, raw: object) -> object:
        return _build(ScheduleConfig, raw)

    @field_validator("sampling", mode="before")
    @classmethod
    def _sampling(cls, raw: object) -> object:
        return _build(SamplingDefaults, raw)

    @field_validator("prediction")
    @classmethod
    def _prediction(cls, name: str) -> str:
        if name not in PREDICTIONS:
            raise ValueError(f"must be one of {', '.join(PREDICTIONS)}")
        return name

    @model_validator(mode="after")
    def _lengths(self) -> TrainConfig:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size = {self.batch_size}: must be a multiple of "
                f"accumulate = {self.accumulate}"
            )
        if self.sample_steps > self.schedule.T:
            raise ValueError(f"sample_steps = {self.sample_steps}: must be 1..{self.schedule.T}")
        return self

    @model_validator(mode="after")
    def _buildable(self) -> TrainConfig:
        if self.learns_schedule and self.schedule.T < 2:
            raise ValueError(f"schedule.T = {self.schedule.T}: must be 2 or more to be learned")
        try:
            self.schedule.build()
        except ScheduleError as error:
            raise ValueError(f"schedule: {error}") from error
        return self

    @model_validator(mode="after")
    def _objective(self) -> TrainConfig:
        learned = self.variance == "learned"
        if learned != self.network.learned_variance:
            raise ValueError(
                f"variance = {self.variance!r}: network.learned_variance must be "
                f"{str(learned).lower()}"
            )
        allowed = ("vlb", "hybrid") if learned else (
            "simple", "vlb", "min_snr", "balanced", "consistency"
        )  # fmt: skip
        if self.objective not in allowed:
            raise ValueError(
                f"objective = {self.objective!r}: must be one of {', '.join(allowed)} with "
                f"variance = {self.variance!r}"
            )
        way = (self.objective, self.prediction)
        if self.learns_schedule and way != ("vlb", "epsilon"):
            raise ValueError(
                "schedule.kind = 'learned': needs objective = 'vlb' and prediction = 'epsilon'"
            )
        return self

    @property
    def learns_schedule(self) -> bool:
        """Whether the forward process is trained with the network."""
        return self.schedule.kind == "learned"

    def model(
        self, class_names: Sequence[str] = (), crop: tuple[int, int] | None = None
    ) -> ModelConfig:
        """What the checkpoint says of the model."""
        names = tuple(class_names) if self.network.num_classes else ()
        # A forward process in training starts as its linear namesake.
        schedule = replace(self.schedule, kind="linear") if self.learns_schedule else self.schedule
        try:
            return ModelConfig(self.network, schedule, self.prediction, names, crop, self.sampling)
        except CheckpointError as error:
            raise ConfigError(str(error)) from error


def _build(kind: type[Any], raw: object) -> object:
    """A frozen dataclass from its table; errors become pydantic's, so they name the key."""
    if not isinstance(raw, dict):
        return raw
    known = kind.__dataclass_fields__
    for key in raw:
        if key not in known:
            raise ValueError(f"unknown key {key!r}; allowed: {', '.join(known)}")
    try:
        return kind(**raw)
    except (NetworkConfigError, SamplerError, ScheduleError, TypeError) as error:
        raise ValueError(str(error)) from error


def shipped_configs() -> list[str]:
    """Names of the configurations in the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a TOML file, apply `key.sub=value` overrides (values in TOML syntax or plain text).

    path: may also be a run's train.json, or the name of a configuration that comes with us.
    Raises ConfigError: no such file, bad TOML, an unknown key, a value out of range.
    """
    path = Path(path)
    if not path.exists() and str(path) in shipped_configs():
        path = SHIPPED / f"{path}.toml"
    read = json.loads if path.suffix == ".json" else tomllib.loads
    try:
        raw = read(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: no such file or folder; the names {', '.join(shipped_configs())} stand for "
            "configurations that come with this package"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        what = "JSON" if path.suffix == ".json" else "TOML"
        raise ConfigError(f"{path}: not valid {what}: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must be a table of keys and values")
    raw = renamed(raw, str(path))
    apply_overrides(raw, overrides)
    return parse_config(raw, str(path))


def parse_config(raw: dict[str, Any], origin: str) -> TrainConfig:
    """Validate a decoded configuration. Raises ConfigError naming every bad key."""
    raw = renamed(raw, origin)
    try:
        return TrainConfig.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise ConfigError(f"{origin}: " + "; ".join(lines)) from error


def _explain(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"]) or "configuration"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{key}: missing"
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key"
    shown = problem.get("input")
    return f"{key}: {message}" if isinstance(shown, dict) else f"{key} = {shown!r}: {message}"


def renamed(raw: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The configuration with the names that keys have today; FutureWarning names an old one."""
    for old in RENAMED.keys() & raw.keys():
        _warn_of(old, origin)
    return {RENAMED.get(key, key): value for key, value in raw.items()}


def _warn_of(old: str, origin: str) -> None:
    warnings.warn(
        f"{origin}: the key {old} is now called {RENAMED[old]}; its old name will go in 1.0",
        FutureWarning,
        stacklevel=2,
    )


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Put `key.sub=value` words into a decoded configuration. Raises ConfigError."""
    for override in overrides:
        _apply(raw, override)


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.lstrip("-").partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: must look like key=value or table.key=value")
    *tables, last = key.replace("-", "_").split(".")
    if not tables and last in RENAMED:
        _warn_of(last, f"override {override!r}")
        last = RENAMED[last]
    table = raw
    for name in tables:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"override {override!r}: {name} is not a table")
    table[last] = _parse_value(text)


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
