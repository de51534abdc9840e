"""The forward process of uploaded images."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from jobs.cards import ModelCard
from jobs.errors import SpecError
from jobs.kinds.common import CommonSpec, Plan, Timestep, check_timestep
from jobs.settings import Settings


class NoiseSpec(CommonSpec):
    """The forward process: x_t of uploaded images at many t. The results are snapshots."""

    work_field: ClassVar[str] = "/t"
    bytes_field: ClassVar[str] = "/t"
    kind: Literal["noise"] = "noise"
    t: tuple[Timestep, ...] = Field(min_length=1, max_length=10_000)
    mode: Literal["closed", "stepwise"] = Field(
        "closed", description="q(x_t|x_0) with one ε for all t, or the chain step by step"
    )
    kinds: tuple[Literal["x_t", "eps"], ...] = Field(("x_t",), min_length=1, max_length=2)

    def check(self, card: ModelCard, settings: Settings) -> None:
        """Raise SpecError for what this model or these limits do not allow."""
        self.check_common(card, settings)
        for i, t in enumerate(self.t):
            check_timestep(f"/t/{i}", t, card)
            if t in self.t[:i]:
                raise SpecError(f"/t/{i}", f"{t}: is there twice")

    def fill(self, card: ModelCard, settings: Settings) -> NoiseSpec:
        """The same request with every default written out."""
        return self.model_copy(update=self.common_defaults(card, settings))

    def plan(self, card: ModelCard, num_inputs: int) -> Plan:
        """Cost of a filled spec for so many images: no network evaluation at all."""
        planes = len(self.t) * len(set(self.kinds))
        return Plan(
            images=num_inputs, evaluations=0, output_bytes=num_inputs * planes * card.plane_bytes
        )
