"""Images from noise."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from jobs.kinds.chain import ChainSpec


class GenerateSpec(ChainSpec):
    """The reverse chain: `num_images` images from noise."""

    whole: ClassVar[bool] = True

    kind: Literal["generate"] = "generate"
    num_images: int = Field(1, ge=1)

    @property
    def count(self) -> int:
        """`num_images`."""
        return self.num_images
