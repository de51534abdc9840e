"""What the kinds that walk the reverse chain share: how to walk it, and what to keep of it."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from jobs.cards import ModelCard
from jobs.errors import SpecError
from jobs.kinds.common import (
    JobSpec,
    Label,
    Plan,
    SnapshotKind,
    SpecWarning,
    Strict,
    Timestep,
    check_timestep,
    label_of,
)
from jobs.settings import Settings

DEFAULT_STEPS = 100


class Snapshots(Strict):
    """Which states of the chain to keep: each holds the x_t that enters a step, or what the
    network finds there (`x_start`, `eps`)."""

    every: int | None = Field(
        None, ge=1, description="every k-th step, counted from the first (the largest t)"
    )
    at: tuple[Timestep, ...] | None = Field(
        None,
        min_length=1,
        max_length=10_000,
        description="at these t; each taken at the nearest t the chain visits",
    )
    kinds: tuple[SnapshotKind, ...] = Field(("x_t",), min_length=1, max_length=3)
    preview_px: int | None = Field(
        None, ge=8, le=512, description="put a PNG with this longer side into each snapshot event"
    )

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if (self.every is None) == (self.at is None):
            raise ValueError("give either `every` or `at`")
        return self

    def count(self, steps: int) -> int:
        """How many times a chain of so many steps is looked at, at most."""
        if self.at is not None:
            return min(len(set(self.at)), steps)
        assert self.every is not None
        return -(-steps // self.every)


class Kept(Strict):
    """States that another job kept, to start from."""

    job: str = Field(max_length=100, description="id of the job")


class PathSpec(JobSpec):
    """What a walk along the chain can be told, up or down, and what to keep of it."""

    reaches: ClassVar[str] = "the chain starts at t"

    steps: int | None = None
    class_label: Label | None = Field(
        None, description="what to draw, by number or name; absent: anything"
    )
    guidance: float = Field(1.0, ge=0, le=50, description="ε_u + g(ε_c − ε_u); 1 is off")
    snapshots: Snapshots | None = None

    def chains(self, num_inputs: int) -> int:
        """How many chains there are, for so many inputs."""
        raise NotImplementedError

    def rows(self, card: ModelCard) -> int:
        """Rows of the filled spec's table."""
        raise NotImplementedError

    def first_t(self, card: ModelCard) -> int:
        """The paper's t at the noisy end: of the state that enters the first step down."""
        return card.T

    @property
    def snapshot_kinds(self) -> tuple[SnapshotKind, ...]:
        """As asked for."""
        return () if self.snapshots is None else tuple(dict.fromkeys(self.snapshots.kinds))

    @property
    def preview_px(self) -> int:
        """As asked for."""
        return (self.snapshots and self.snapshots.preview_px) or 0

    @property
    def bytes_field(self) -> str:
        """Pointer of the field that makes the outputs large."""
        return "/snapshots" if self.snapshots is not None else self.count_field

    def check(self, card: ModelCard, settings: Settings) -> None:
        """Raise SpecError for what this model or these limits do not allow."""
        super().check(card, settings)
        self._check_steps(card)
        label_of(self.class_label, card)
        if self.guidance != 1.0 and self.class_label is None:
            raise SpecError("/guidance", "needs a class_label")
        if self.guidance != 1.0 and card.null_label is None:
            raise SpecError("/guidance", f"model {card.name} was trained without label dropping")

    def _check_steps(self, card: ModelCard) -> None:
        first = self.first_t(card)
        whole = first == card.T
        if self.steps is not None and self.steps > first:
            limit = f"model {card.name} has T" if whole else self.reaches
            raise SpecError("/steps", f"{self.steps}: {limit} = {first}")
        for i, t in enumerate(self.snapshots.at or () if self.snapshots else ()):
            check_timestep(f"/snapshots/at/{i}", t, card)
            if t > first:
                raise SpecError(f"/snapshots/at/{i}", f"{t}: {self.reaches} = {first}")

    def defaults(self, card: ModelCard, settings: Settings) -> dict[str, Any]:
        """Values for the fields that were left out."""
        label = label_of(self.class_label, card)
        return {**super().defaults(card, settings), "class_label": label}

    @property
    def evaluations_a_row(self) -> int:
        """Network evaluations that a row of one chain takes."""
        return 2 if self.guidance != 1.0 else 1

    def plan(self, card: ModelCard, num_inputs: int) -> Plan:
        """Cost of a filled spec; the images come out of as many chains."""
        rows, count = self.rows(card), self.chains(num_inputs)
        kept = 1
        if self.snapshots is not None:
            kept += self.snapshots.count(rows) * len(set(self.snapshots.kinds))
        return Plan(
            images=count,
            evaluations=count * rows * self.evaluations_a_row,
            output_bytes=count * kept * card.plane_bytes,
        )


def few_steps(
    card: ModelCard, sampler: str, evaluations: int, length: int
) -> tuple[SpecWarning, ...]:
    """What to warn of where a chain over `length` timesteps has too few evaluations."""
    needed = card.samplers[sampler].needs(length, card.T) if sampler in card.samplers else 0
    if evaluations >= needed:
        return ()
    detail = (
        f"{evaluations} evaluation{'s are' if evaluations > 1 else ' is'} few for {sampler}, which "
        f"wants {needed} or more here"
    )
    return (SpecWarning(pointer="/steps", detail=detail),)


class ChainSpec(PathSpec):
    """How to walk the reverse chain, from wherever it starts, and what to keep of it.

    table_fields: those that say which table of a sampler it is. whole: its chains begin with noise
    and are held to nothing.
    """

    whole: ClassVar[bool] = False

    count_field: ClassVar[str] = "/num_images"
    table_fields: ClassVar[tuple[str, ...]] = (
        "sampler", "steps", "spacing", "eta", "variance", "corrector_steps", "clip",
    )  # fmt: skip

    preset: Literal["fast", "balanced", "faithful"] | None = Field(
        None,
        description="sampler, steps and spacing in a word: one of the model's `presets`; none of "
        "the three may stand beside it, and the answer's `request` has them in its place",
    )
    sampler: str | None = Field(
        None,
        max_length=100,
        description="one of the model's `samplers` (GET /models); default: the model's own, "
        "but for many images from one x_t ddpm, where its own adds no noise",
        examples=["ddpm"],
    )
    steps: int | None = Field(
        None,
        ge=1,
        description="network evaluations an image, from the t where the chain starts down to the "
        "image (so at most that t); default: the model's own for its own sampler, else 100, or all "
        "where there are fewer",
    )
    spacing: str | None = Field(
        None,
        max_length=100,
        description="of the timesteps, one of the model's `spacings`; default: the model's own, "
        "mostly uniform",
        examples=["uniform"],
    )
    eta: float | None = Field(None, ge=0, le=1, description="ddim only: 0 deterministic (default)")
    variance: Literal["large", "small", "learned"] | None = Field(
        None, description="ddpm only: β, β̃ or the network's own; default: the model's own"
    )
    corrector_steps: int | None = Field(
        None, ge=0, le=100, description="Langevin steps after each step (langevin: a level)"
    )
    clip: bool | None = Field(
        None,
        description="whether x̂_0 is clipped to [−1, 1]; default: the model's own, but not after an "
        "encoding, of which it would spoil the way back",
    )

    @property
    def count(self) -> int:
        """How many chains there are, which is how many images come out."""
        raise NotImplementedError

    def chains(self, num_inputs: int) -> int:
        """`count`."""
        return self.count

    def after(self, source: JobSpec) -> Self:
        """Not clipped where the source was not, if nothing is said of it."""
        return self if source.clips or self.clip is not None else self.unclipped()

    def unclipped(self) -> Self:
        """With clip = False."""
        return self.model_copy(update={"clip": False})

    def plain(self, card: ModelCard) -> Self:
        """With sampler, steps and spacing for the preset: fewer steps from lower down."""
        if self.preset is None:
            return self
        for name in ("sampler", "steps", "spacing"):
            if getattr(self, name) is not None:
                raise SpecError(
                    f"/{name}", f"is what preset = {self.preset} says: give one of them"
                )
        if self.preset not in card.presets:
            known = ", ".join(card.presets) or "none"
            raise SpecError("/preset", f"{self.preset}: model {card.name} has {known}")
        found = card.presets[self.preset]
        steps = math.ceil(found.steps * self.first_t(card) / card.T)
        said = {"sampler": found.sampler, "steps": steps}
        if not (its := card.samplers.get(found.sampler)) or not its.steps:
            said["spacing"] = found.spacing
        return self.model_copy(update={"preset": None, **said})

    def warnings(self, card: ModelCard) -> tuple[SpecWarning, ...]:
        """Fewer steps than the sampler needs."""
        assert self.sampler is not None
        return few_steps(card, self.sampler, self.rows(card), self.first_t(card))

    def own_sampler(self, card: ModelCard) -> str:
        """The sampler where a request names none."""
        return card.sampling.sampler

    def check(self, card: ModelCard, settings: Settings) -> None:
        """Raise SpecError for what this model or these limits do not allow."""
        super().check(card, settings)
        if self.count > settings.max_images:
            raise SpecError(
                self.count_field, f"{self.count}: must be at most {settings.max_images}"
            )
        self._check_sampler(card)
        self._check_table(card)

    def beyond(self, card: ModelCard) -> str | None:
        """A sampler or a spacing."""
        for name, known in (("sampler", card.samplers), ("spacing", card.spacings)):
            asked = getattr(self, name)
            if asked is not None and asked not in known:
                return f"spec/{name}: {asked[:60]} is not known here"
        return None

    def chosen_sampler(self, card: ModelCard) -> str:
        """The one that is asked for, else this kind's own."""
        return self.own_sampler(card) if self.sampler is None else self.sampler

    def _check_sampler(self, card: ModelCard) -> None:
        name = self.chosen_sampler(card)
        if name not in card.samplers:
            raise SpecError(
                "/sampler", f"{name}: model {card.name} runs {', '.join(card.samplers)}"
            )
        sampler = card.samplers[name]
        for option in ("eta", "variance"):
            if getattr(self, option) is not None and option not in sampler.options:
                takers = [other for other, its in card.samplers.items() if option in its.options]
                raise SpecError(f"/{option}", f"is for sampler {' or '.join(takers)}, not {name}")
        if sampler.steps:
            self._check_made(name, sampler.steps)
        if self.spacing is not None and self.spacing not in card.spacings:
            raise SpecError("/spacing", f"{self.spacing}: must be {', '.join(card.spacings)}")
        if self.variance == "learned" and not card.learned_variance:
            raise SpecError("/variance", f"model {card.name} has no learned variance")
        if self.corrector_steps and not card.corrects:
            raise SpecError("/corrector_steps", f"model {card.name} runs no Langevin steps")
        if self.corrector_steps == 0 and sampler.corrector_only:
            raise SpecError("/corrector_steps", f"0: {name} needs 1 or more")

    def _check_table(self, card: ModelCard) -> None:
        """A manifest of a table that was made for the model is not run with another one."""
        made_with = (self.provenance or {}).get("table")
        name = self.chosen_sampler(card)
        if made_with is None or not (known := card.samplers[name].tables):
            return
        now = known.get(self.steps or max(known))
        if made_with != now:
            raise SpecError(
                "/provenance/table",
                f"{made_with!r:.100}: model {card.name} has another table of sampler {name} now, "
                f"{now}, so the images cannot be made again here; without `provenance`, others "
                "like them can",
            )

    def _check_made(self, name: str, allowed: tuple[int, ...]) -> None:
        """A sampler whose tables are made for a model is asked for nothing else."""
        if not self.whole:
            raise SpecError("/sampler", f"{name}: is for images from noise alone, POST /generate")
        if self.steps is not None and self.steps not in allowed:
            known = ", ".join(map(str, allowed))
            raise SpecError("/steps", f"{self.steps}: {name} is made for {known}")
        for field in ("spacing", "clip", "corrector_steps"):
            if getattr(self, field) not in (None, 0):
                raise SpecError(f"/{field}", f"is no choice with sampler {name}")

    def defaults(self, card: ModelCard, settings: Settings) -> dict[str, Any]:
        """Values for the fields that were left out."""
        defaults = super().defaults(card, settings)
        name = self.chosen_sampler(card)
        sampler = card.samplers[name]
        defaults["sampler"] = name
        if sampler.steps:
            defaults["steps"] = self.steps or max(sampler.steps)
        else:
            defaults["spacing"] = self.spacing or card.sampling.spacing
            own = card.steps if name == card.sampling.sampler else None
            defaults["steps"] = self.steps or min(own or DEFAULT_STEPS, self.first_t(card))
        if "eta" in sampler.options and self.eta is None:
            defaults["eta"] = 0.0
        if "variance" in sampler.options and self.variance is None:
            defaults["variance"] = card.sampling.variance
        if self.corrector_steps is None:
            defaults["corrector_steps"] = 1 if sampler.corrector_only else 0
        return defaults

    def rows(self, card: ModelCard) -> int:
        """Rows of the filled spec's table."""
        assert self.sampler is not None
        assert self.steps is not None and self.corrector_steps is not None
        # A corrector follows every step but the last, unless there is nothing else.
        alone = card.samplers[self.sampler].corrector_only
        levels = self.steps if alone else self.steps - 1
        predictors = 0 if alone else self.steps
        return predictors + levels * self.corrector_steps
