"""The reverse chain from any point of it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from jobs.cards import ModelCard
from jobs.errors import SpecError
from jobs.kinds.chain import ChainSpec, Kept
from jobs.kinds.common import Input, Place, Timestep, check_timestep
from jobs.settings import Settings

SAMPLER = "ddpm"


class SnapshotSource(Kept):
    """An x_t that another job kept."""

    t: Timestep
    index: int = Field(0, ge=0, description="of the image in that job")


class ReconstructSpec(ChainSpec):
    """Denoise from any point of a chain: `num_images` samples of p_θ(x_0|x_t) from one x_t."""

    takes: ClassVar[frozenset[Input]] = frozenset({"pictures", "x_t", "snapshot"})
    most_pictures: ClassVar[int | None] = 1
    summarized: ClassVar[bool] = True

    kind: Literal["reconstruct"] = "reconstruct"
    num_images: int = Field(1, ge=1, description="samples from the one x_t")
    source: Literal["image", "x_t"] | SnapshotSource = Field(
        "image",
        description="`image`: an uploaded picture, noised to t with the ε that POST /noise gives "
        "its first image at the same seed; `x_t`: an uploaded array; or a snapshot of a job",
    )
    t: Timestep | None = Field(
        None, description="where the chain starts: 1..T; a snapshot brings its own"
    )

    @property
    def count(self) -> int:
        """`num_images`."""
        return self.num_images

    @property
    def input(self) -> Input:
        """A picture, or an x_t, whether it was uploaded or kept by a job."""
        return "pictures" if self.source == "image" else "x_t"

    @property
    def places(self) -> list[Place]:
        """Of a snapshot, its own."""
        source = self.source
        return [Place(source.t, source.index)] if isinstance(source, SnapshotSource) else []

    def own_sampler(self, card: ModelCard) -> str:
        """The model's own if its chains from one x_t differ, else ddpm."""
        own = super().own_sampler(card)
        if own not in card.samplers or card.samplers[own].draws or SAMPLER not in card.samplers:
            return own
        return SAMPLER

    def first_t(self, card: ModelCard) -> int:
        """t of the one x_t."""
        if isinstance(self.source, SnapshotSource):
            if self.t not in (None, self.source.t):
                raise SpecError("/t", f"{self.t}: the source is at t = {self.source.t}")
            check_timestep("/source/t", self.source.t, card)
            return self.source.t
        if self.t is None:
            raise SpecError("/t", f"is needed: where the chain starts, 1..{card.T}")
        check_timestep("/t", self.t, card)
        return self.t

    def check_inputs(self, count: int) -> None:
        """One image or x_t."""
        if count != 1:
            raise SpecError("/images", f"{count} pictures: must be one")

    def defaults(self, card: ModelCard, settings: Settings) -> dict[str, Any]:
        """Values for the fields that were left out."""
        return {**super().defaults(card, settings), "t": self.first_t(card)}
