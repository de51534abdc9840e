"""What a likelihood job answers: its `result`. All in bits/dim, but for `rmse` and densities."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class TermValues(BaseModel):
    """Single terms: at t the network sees x_t, and the term is L_{t−1}."""

    t: list[int]
    bits_per_dim: list[float]
    rmse: list[float] = Field(description="of x̂_0(x_t) against the image, on 0..255")


class DensityOfImage(BaseModel):
    """The density of one image by the flow. standard_error: over its draws, of two or more."""

    index: int
    bits_per_dim: float
    standard_error: float | None = None
    log_density: float = Field(description="ln p_0 where images lie in [−1, 1], nats")


class FlowResult(BaseModel):
    """Means over the images, of estimates of the density: no bound. standard_error: over the
    images, where there are two or more."""

    bits_per_dim: float
    standard_error: float | None = None
    dims: int = Field(description="D: the numbers in one image")
    dims_unpadded: int | None = Field(None, description="without a margin, as in LikelihoodResult")
    bits_per_unpadded_dim: float | None = Field(
        None, description="bits_per_dim · dims / dims_unpadded"
    )
    images: list[DensityOfImage]


class Bits(BaseModel):
    """The bound and its parts: bits_per_dim = L_T + L_t + L_0."""

    bits_per_dim: float
    standard_error: float | None = None
    L_T: float = Field(description="KL of q(x_T|x_0) from N(0, I)")
    L_t: float = Field(description="the sum L_1 + … + L_{T−1}")
    L_0: float = Field(description="−log p(x_0|x_1), of the discretised Gaussian")


class ImageBits(Bits):
    """The bound of one image. standard_error: of a Monte Carlo estimate, L_0 included."""

    index: int
    terms: TermValues | None = None


class LikelihoodResult(Bits):
    """Means over the images. standard_error: over the images, where there are two or more."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "bits_per_dim": 1.65,
                "L_T": 0.00002,
                "L_t": 1.2,
                "L_0": 0.45,
                "dims": 1024,
                "images": [
                    {
                        "index": 0,
                        "bits_per_dim": 1.65,
                        "standard_error": 0.03,
                        "L_T": 0.00002,
                        "L_t": 1.2,
                        "L_0": 0.45,
                    }
                ],
            }
        }
    )

    dims: int = Field(description="D: the numbers in one image")
    dims_unpadded: int | None = Field(
        None, description="without the margin that the model's images were padded with, if any"
    )
    bits_per_unpadded_dim: float | None = Field(
        None, description="bits_per_dim · dims / dims_unpadded"
    )
    images: list[ImageBits]
