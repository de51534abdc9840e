"""Model cards: what a worker publishes of a model, and all that the API knows of it."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

Float64 = NDArray[np.float64]


class SamplerTraits(BaseModel):
    """What a sampler can be told. options: which of eta and variance. corrector_only: it is made
    of Langevin steps, `corrector_steps` a level, and of nothing else. least: evaluations from pure
    noise, of a T of 1000, below which what comes out is clearly worse. steps: the only numbers of
    them that there are, of tables made for chains from noise; empty: any. tables: of each of those,
    the SHA-256 (hex) of its table. draws: by default its steps add noise, so that chains from one
    x_t differ; of an older worker's samplers nothing is known."""

    model_config = ConfigDict(frozen=True)

    options: tuple[str, ...] = ()
    corrector_only: bool = False
    least: int = 1
    steps: tuple[int, ...] = ()
    tables: dict[int, str] = {}
    draws: bool = True

    def needs(self, length: int, T: int) -> int:
        """Evaluations that a chain over `length` of T timesteps should have, in proportion.

        One that visits them all can do no more, unless it is made of Langevin steps alone.
        """
        needed = math.ceil(self.least * length / T)
        return needed if self.corrector_only else min(needed, length)


class Preset(BaseModel):
    """A sampler with its steps, for a chain from noise, and its spacing."""

    model_config = ConfigDict(frozen=True)

    sampler: str
    steps: int
    spacing: str


class Sampling(BaseModel):
    """How a model is meant to be sampled: what holds where a request says nothing."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    sampler: str
    variance: str
    spacing: str


# What release 0.1 understands of a card: it refuses any other field, so these alone stand where
# it looks, and the rest beside them. Its own cards name their samplers without traits.
_FIELDS_0_1 = frozenset(
    {"name", "digest", "queue", "shape", "betas", "class_names", "null_label", "prediction"}
    | {"learned_variance", "samplers", "sampling", "parameters", "schedule_kind", "description"}
)
_TRAITS_0_1 = {
    "ddpm": SamplerTraits(options=("variance",)),
    "ddim": SamplerTraits(options=("eta",)),
    "dpmpp_2m": SamplerTraits(),
    "langevin": SamplerTraits(corrector_only=True),
}
_SPACINGS_0_1 = ("uniform", "quadratic", "leading", "trailing")


class ModelCard(BaseModel):
    """A model that some worker serves (or served: cards outlive workers).

    betas: the forward variances β_1..β_T; every other schedule table follows from them.
    null_label: the label that means "no label", or None where the network has none.
    digest: SHA-256 (hex) of the weights and the configuration.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="ignore",  # of a newer worker
        json_schema_extra={
            "example": {
                "name": "mnist",
                "digest": "9f2c…",
                "queue": "ddpm",
                "shape": [1, 32, 32],
                "betas": [0.0001, 0.02],
                "class_names": ["0", "1"],
                "null_label": 2,
                "prediction": "epsilon",
                "learned_variance": False,
                "samplers": {"ddpm": {"options": ["variance"]}, "ddim": {"options": ["eta"]}},
                "spacings": ["uniform", "quadratic"],
                "sampling": {"sampler": "ddpm", "variance": "small", "spacing": "uniform"},
                "parameters": 1623169,
            }
        },
    )

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    digest: str
    queue: str
    shape: tuple[int, int, int]  # C, H, W
    betas: tuple[float, ...] = Field(min_length=1, repr=False)
    class_names: tuple[str, ...] = ()
    null_label: int | None = None
    prediction: str = "epsilon"
    learned_variance: bool = False
    samplers: dict[str, SamplerTraits] = Field(
        default=_TRAITS_0_1, description="what each can be told"
    )
    spacings: tuple[str, ...] = _SPACINGS_0_1
    sampling: Sampling = Sampling(sampler="ddpm", variance="large", spacing="uniform")
    steps: int | None = Field(
        None, description="of its own sampler where a request says nothing; none: 100, or all"
    )
    presets: dict[str, Preset] = Field(
        default={}, description="ways to sample it by name; none on the card of an older worker"
    )
    noise: int = Field(1, description="version of what a seed draws")
    parameters: int | None = None
    schedule_kind: str = "betas"
    description: str = ""
    thumbnail: str = Field("", repr=False, description="base64 PNG")

    @property
    def T(self) -> int:
        """Number of diffusion steps."""
        return len(self.betas)

    @property
    def num_classes(self) -> int:
        """Labels a request may ask for: 0..num_classes − 1; 0 for an unconditional model."""
        return len(self.class_names)

    @property
    def corrects(self) -> bool:
        """Whether Langevin steps can follow the steps of any sampler."""
        return any(sampler.corrector_only for sampler in self.samplers.values())

    @property
    def plane_bytes(self) -> int:
        """Bytes of one image, x_t, x̂_0 or ε as float32."""
        c, h, w = self.shape
        return 4 * c * h * w


def to_store(card: ModelCard) -> tuple[str, str]:
    """JSON of what release 0.1 understands of a card, and of the rest, tied to it by the digest."""
    raw = card.model_dump(mode="json")
    old = {name: value for name, value in raw.items() if name in _FIELDS_0_1}
    new = {name: value for name, value in raw.items() if name not in _FIELDS_0_1}
    names = [name for name in raw["samplers"] if name in _TRAITS_0_1]
    more = {"digest": card.digest, "samplers": raw["samplers"], "sampling": raw["sampling"], **new}
    sampling = dict(raw["sampling"])  # of what it knows: it would refuse all that says nothing
    if sampling["sampler"] not in names:
        sampling["sampler"] = names[0] if names else sampling["sampler"]
    if sampling["spacing"] not in _SPACINGS_0_1:
        sampling["spacing"] = _SPACINGS_0_1[0]
    return json.dumps({**old, "samplers": names, "sampling": sampling}), json.dumps(more)


def from_store(old: bytes, more: bytes | None) -> ModelCard:
    """Inverse of `to_store`; `more` of another digest is an earlier model's."""
    raw = json.loads(old)
    raw["samplers"] = {name: _TRAITS_0_1[name] for name in raw["samplers"] if name in _TRAITS_0_1}
    beside = json.loads(more) if more else {}
    if beside.get("digest") == raw["digest"]:
        raw |= beside
    return ModelCard.model_validate(raw)


def alpha_bars(card: ModelCard) -> Float64:
    """ᾱ_t for t = 1..T, float64 [T]."""
    return np.asarray(np.cumprod(1.0 - np.asarray(card.betas)), dtype=np.float64)


def schedule_tables(card: ModelCard) -> dict[str, Any]:
    """β, ᾱ, SNR and β̃ as lists for t = 1..T (Ho et al. 2020, equations 4 and 7).

    1 − ᾱ_t is formed as −expm1(Σ ln(1 − β_s)), which keeps its relative accuracy at small t.
    """
    betas = np.asarray(card.betas, dtype=np.float64)
    with np.errstate(divide="ignore"):  # β_T = 1 rightly gives 1 − ᾱ_T = 1
        rest = -np.expm1(np.cumsum(np.log1p(-betas)))
    bars = alpha_bars(card)
    rest_prev = np.append(0.0, rest[:-1])
    return {
        "t": list(range(1, card.T + 1)),
        "beta": betas.tolist(),
        "alpha_bar": bars.tolist(),
        "snr": (bars / rest).tolist(),
        "posterior_variance": (betas * rest_prev / rest).tolist(),
    }
