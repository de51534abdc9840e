"""What a measurement keeps of an image, as a request says it: `diffusion.operators` by name."""

from __future__ import annotations

import base64
import binascii
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from jobs.decoding import open_picture
from jobs.errors import PictureError, SpecError
from jobs.kinds.common import Shape, Strict

OperatorName = Literal["mask", "average_pool", "gray", "blur", "identity"]
GREY_WEIGHTS = (0.299, 0.587, 0.114)
_MOST_MASK = 1_000_000  # characters of base64
_MOST_KERNEL = 1e6  # sum of what its values are without sign: float32 has to hold what comes of it
_LONGEST_KERNEL = 63
# Each option, and the operator it is of.
_OPTIONS = {
    "boxes": "mask",
    "mask": "mask",
    "factor": "average_pool",
    "weights": "gray",
    "deviation": "blur",
    "kernel": "blur",
}
_Row = Annotated[tuple[float, ...], Field(min_length=1, max_length=_LONGEST_KERNEL)]


class OperatorSpec(Strict):
    """A of y = A x_0 + σ_y n: which parts of an image, or what of it, was measured."""

    name: OperatorName = Field(
        description="`mask`: fill in what is not known; `average_pool`: make larger; `gray`: "
        "colour; `blur`: sharpen; `identity`: denoise"
    )
    boxes: tuple[tuple[int, int, int, int], ...] | None = Field(
        None,
        min_length=1,
        max_length=1000,
        description="mask: what to fill in, each [x0, y0, x1, y1] in pixels from the upper left, "
        "x1 and y1 excluded",
        examples=[[[0, 16, 32, 32]]],
    )
    mask: str | None = Field(
        None,
        max_length=_MOST_MASK,
        description="mask: base64 PNG of the model's size: white (128 or more) is filled in, black "
        "is known; instead of `boxes`",
    )
    factor: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="average_pool: side of a block, which must divide the "
        "model's; the picture is so many times smaller",
    )
    weights: tuple[float, ...] | None = Field(
        None,
        max_length=16,
        description="gray: of the channels; default those of BT.601 for red, green and blue",
    )
    deviation: float | None = Field(
        None, gt=0, le=1000, description="blur: of a Gaussian, in pixels; the image's ends meet"
    )
    kernel: tuple[_Row, ...] | None = Field(
        None,
        min_length=1,
        max_length=_LONGEST_KERNEL,
        description="blur: rows of a kernel with odd sides, instead of `deviation`",
    )

    def check(self, shape: Shape) -> None:
        """Raise SpecError, naming the option, unless this fits an image of the shape."""
        for option, owner in _OPTIONS.items():
            if getattr(self, option) is not None and self.name != owner:
                raise SpecError(f"/operator/{option}", f"is for {owner}, not {self.name}")
        getattr(self, f"_check_{self.name}")(shape)

    def measured(self, shape: Shape) -> Shape:
        """The shape of what A makes of an image. Raises SpecError as `check` does."""
        self.check(shape)
        c, h, w = shape
        if self.name == "average_pool":
            assert self.factor is not None
            return c, h // self.factor, w // self.factor
        return (1, h, w) if self.name == "gray" else shape

    @property
    def bound(self) -> float:
        """The largest value that A makes of an image in [−1, 1]."""
        if self.name == "gray":
            return sum(abs(weight) for weight in self.weights or GREY_WEIGHTS)
        if self.kernel is not None:
            return sum(abs(value) for row in self.kernel for value in row)
        return 1.0

    def known(self, shape: Shape) -> NDArray[np.bool_]:
        """Of a mask, bool [H, W]: what is not to be filled in. Raises SpecError."""
        _, h, w = shape
        if self.mask is not None:
            return _read_mask(self.mask, h, w)
        known = np.ones((h, w), bool)
        for i, (x0, y0, x1, y1) in enumerate(self.boxes or ()):
            if not (0 <= x0 < x1 <= w and 0 <= y0 < y1 <= h):
                raise SpecError(
                    f"/operator/boxes/{i}",
                    f"{[x0, y0, x1, y1]}: must be [x0, y0, x1, y1] with 0 ≤ x0 < x1 ≤ {w} and "
                    f"0 ≤ y0 < y1 ≤ {h}",
                )
            known[y0:y1, x0:x1] = False
        return known

    def _check_mask(self, shape: Shape) -> None:
        given = [option for option in ("boxes", "mask") if getattr(self, option) is not None]
        if len(given) != 1:
            what = " and ".join(given) or "nothing"
            raise SpecError(f"/operator/{(given or ['boxes'])[-1]}", f"{what}: give one of the two")
        known = self.known(shape)
        if not known.any():
            raise SpecError(
                f"/operator/{given[0]}", "nothing is known: some pixel must not be filled in"
            )

    def _check_average_pool(self, shape: Shape) -> None:
        if self.factor is None:
            raise SpecError("/operator/factor", "is needed: the side of a block")
        _, h, w = shape
        if h % self.factor or w % self.factor:
            raise SpecError("/operator/factor", f"{self.factor}: does not divide {w} × {h}")

    def _check_gray(self, shape: Shape) -> None:
        channels = shape[0]
        if channels == 1:
            raise SpecError("/operator/name", "gray: the model's images have one channel alone")
        weights = self.weights or GREY_WEIGHTS
        if len(weights) != channels:
            raise SpecError(
                "/operator/weights", f"{len(weights)}: must be one for each of {channels} channels"
            )
        if not any(weights):
            raise SpecError("/operator/weights", "nothing is known: all are 0")

    def _check_blur(self, shape: Shape) -> None:
        given = [option for option in ("deviation", "kernel") if getattr(self, option) is not None]
        if len(given) != 1:
            what = " and ".join(given) or "nothing"
            raise SpecError(
                f"/operator/{(given or ['deviation'])[-1]}", f"{what}: give one of the two"
            )
        if self.kernel is None:
            return
        rows, columns = len(self.kernel), len(self.kernel[0])
        _, h, w = shape
        even = not (rows % 2 and columns % 2) or any(len(row) != columns for row in self.kernel)
        if even or rows > h or columns > w:
            raise SpecError(
                "/operator/kernel",
                f"{rows} rows of {columns}: must be equally long, odd in number and length, and at "
                f"most {h} of {w}",
            )
        if (total := sum(abs(value) for row in self.kernel for value in row)) > _MOST_KERNEL:
            raise SpecError(
                "/operator/kernel", f"its values sum to {total:g}: must be at most {_MOST_KERNEL:g}"
            )
        if not any(value for row in self.kernel for value in row):
            raise SpecError("/operator/kernel", "nothing is known: all is 0")

    def _check_identity(self, shape: Shape) -> None:
        """Fits any image."""


@lru_cache(maxsize=8)  # a request is asked several times
def _read_mask(text: str, h: int, w: int) -> NDArray[np.bool_]:
    payload = text.partition(",")[2] if text.startswith("data:") else text
    try:
        raw = base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise SpecError("/operator/mask", f"is not base64: {error}") from error
    try:
        picture = open_picture(raw, max_pixels=max(h * w, 1 << 20))
        if picture.size != (w, h):
            width, height = picture.size
            raise SpecError("/operator/mask", f"{width} × {height}: must be {w} × {h}")
        grey = np.asarray(picture.decode(1), dtype=np.uint8)
    except PictureError as error:
        raise SpecError("/operator/mask", str(error)) from error
    known: NDArray[np.bool_] = grey < 128
    known.flags.writeable = False
    return known
