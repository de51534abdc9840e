"""The forward process of uploaded images."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from jobs.cards import ModelCard
from jobs.errors import SpecError
from jobs.kinds.common import Gift, Input, JobSpec, Plan, SnapshotKind, Timestep, check_timestep
from jobs.outputs import snapshot_name
from jobs.settings import Settings


class NoiseSpec(JobSpec):
    """The forward process: x_t of uploaded images at many t. The results are snapshots."""

    takes: ClassVar[frozenset[Input]] = frozenset({"pictures"})
    gives: ClassVar[frozenset[Gift]] = frozenset({"snapshots"})
    runs_network: ClassVar[bool] = False
    film_rises: ClassVar[bool] = True

    kind: Literal["noise"] = "noise"
    t: tuple[Timestep, ...] = Field(min_length=1, max_length=10_000)
    mode: Literal["closed", "stepwise"] = Field(
        "closed", description="q(x_t|x_0) with one ε for all t, or the chain step by step"
    )
    kinds: tuple[Literal["x_t", "eps"], ...] = Field(("x_t",), min_length=1, max_length=2)

    def check(self, card: ModelCard, settings: Settings) -> None:
        """Raise SpecError for what this model or these limits do not allow."""
        super().check(card, settings)
        for i, t in enumerate(self.t):
            check_timestep(f"/t/{i}", t, card)
            if t in self.t[:i]:
                raise SpecError(f"/t/{i}", f"{t}: is there twice")

    @property
    def snapshot_kinds(self) -> tuple[SnapshotKind, ...]:
        """As asked for."""
        return tuple(dict.fromkeys(self.kinds))

    @property
    def level_ts(self) -> tuple[int, ...]:
        """All."""
        return self.t

    @property
    def work_field(self) -> str:
        """`t`."""
        return "/t"

    @property
    def bytes_field(self) -> str:
        """`t`."""
        return "/t"

    def grid(self, images: int) -> list[str]:
        """A row an image: its x_t (or ε, if that is all there is), t from left to right."""
        kind = "x_t" if "x_t" in self.kinds else self.kinds[0]
        return [snapshot_name(t, kind, i) for i in range(images) for t in sorted(self.t)]

    @property
    def grid_columns(self) -> int:
        """As many as there are t."""
        return len(self.t)

    def plan(self, card: ModelCard, num_inputs: int) -> Plan:
        """Cost of a filled spec for so many images: no network evaluation at all."""
        planes = len(self.t) * len(set(self.kinds))
        return Plan(
            images=num_inputs, evaluations=0, output_bytes=num_inputs * planes * card.plane_bytes
        )
