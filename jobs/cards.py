"""Model cards: what a worker publishes of a model, and all that the API knows of it."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

Float64 = NDArray[np.float64]
SAMPLERS = ("ddpm", "ddim", "dpmpp_2m")


class Sampling(BaseModel):
    """How a model is meant to be sampled: what holds where a request says nothing."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    sampler: str = "ddpm"
    variance: str = "small"
    spacing: str = "uniform"


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
                "samplers": list(SAMPLERS),
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
    samplers: tuple[str, ...] = SAMPLERS
    sampling: Sampling = Sampling()
    parameters: int | None = None
    schedule_kind: str = "betas"
    description: str = ""

    def stored(self) -> str:
        """The JSON for the store. What is None goes unsaid: older versions know no field that is
        newer than they are, so such a field is None unless it matters."""
        return self.model_dump_json(exclude_none=True)

    @property
    def T(self) -> int:
        """Number of diffusion steps."""
        return len(self.betas)

    @property
    def num_classes(self) -> int:
        """Labels a request may ask for: 0..num_classes − 1; 0 for an unconditional model."""
        return len(self.class_names)

    @property
    def plane_bytes(self) -> int:
        """Bytes of one image, x_t, x̂_0 or ε as float32."""
        c, h, w = self.shape
        return 4 * c * h * w


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
