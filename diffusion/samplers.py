"""The samplers: each a function that makes a table, and an entry in SAMPLERS.

Ancestral sampling: Ho et al. 2020, algorithm 2; over a sub-sequence, with the posterior of each
jump. DDIM: Song et al. 2021, eq. 12. Of a consistency model: Song et al. 2023, algorithm 1.
DPM-Solver++ and UniPC: `diffusion.multistep`. Annealed Langevin dynamics and correctors:
`diffusion.langevin`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from diffusion.checks import check_flags, check_real, check_whole
from diffusion.langevin import annealed_langevin, with_correctors
from diffusion.multistep import dpmpp_2m, dpmpp_3m, unipc
from diffusion.schedule import Schedule
from diffusion.spacings import LEVEL_SPACINGS, SPACINGS, spaced_times
from diffusion.table import (
    SamplerError,
    SamplerTable,
    check_name,
    checked_timesteps,
    empty_rows,
    put,
    stepping,
)
from diffusion.travel import with_travel

VARIANCES = ("large", "small", "learned")
LANDINGS = ("next", "stride")
DEFAULT_STEPS = 100


def ancestral(
    schedule: Schedule, timesteps: Sequence[float], *, variance: str = "large", clip: bool = True
) -> SamplerTable:
    """DDPM over any descending sub-sequence; the last row lands on the image, without noise.

    variance: σ² of each jump t→s: large β = 1 − ᾱ_t/ᾱ_s, small β̃, or learned, exp(f ln β +
    (1−f) ln β̃) with f = (v+1)/2 from the network (Nichol, Dhariwal 2021, eq. 15).
    """
    check_name("variance", variance, VARIANCES)
    ts = checked_timesteps(schedule.T, timesteps)
    rows, spread = empty_rows(len(ts), clip), np.zeros(len(ts))
    for i, (t, s) in enumerate(zip(ts, [*ts[1:], -1], strict=True)):
        jump = schedule.jump(t, s)
        # The learned σ = (β β̃)^¼ exp(spread·v) is their geometric mean at v = 0.
        middle = math.sqrt(jump.beta * jump.variance)
        sigma2 = {"large": jump.beta, "small": jump.variance, "learned": middle}[variance]
        noise = math.sqrt(sigma2) if s >= 0 else 0.0
        put(rows, i, a=jump.coef_x_start, b=jump.coef_x_t, c=noise)
        if variance == "learned" and s >= 0:
            spread[i] = 0.25 * math.log(jump.beta / jump.variance)
    return replace(stepping(ts, rows), spread=spread)


def ddim(
    schedule: Schedule,
    timesteps: Sequence[float],
    *,
    eta: float = 0.0,
    clip: bool = True,
    rederive_eps: bool = True,
    landing: str = "next",
    stride: int = 1,
    branch: bool = False,
) -> SamplerTable:
    """DDIM: x_s = √ᾱ_s x̂_0 + √(1−ᾱ_s−σ²) ε̂ + σ z with σ² = η² β̃ of the jump.

    rederive_eps: ε̂ is the one that agrees with the clipped x̂_0, else the network's own. η = 1 with
    the first is ancestral sampling with σ² small. landing: the s of each row is the t of the
    `next`, and −1 (the image) after the last; or it is `stride` lower than t, but not below −1.
    branch: the first t is that of another chain's x_t, and not of the spacing: its row lands on the
    next one in any case.
    """
    check_name("landing", landing, LANDINGS)
    check_real("eta", eta, least=0, most=1, error=SamplerError)
    ts = checked_timesteps(schedule.T, timesteps)
    rows = empty_rows(len(ts), clip)
    landings = [*ts[1:], -1]
    if landing == "stride":
        strides = [t - stride if t >= stride else -1 for t in ts]
        landings = [*landings[:1], *strides[1:]] if branch else strides
    for i, (t, s) in enumerate(zip(ts, landings, strict=True)):
        sigma2 = eta**2 * schedule.jump(t, s).variance
        a = math.sqrt(schedule.alpha_bar(s))
        direction = math.sqrt(max(schedule.one_minus_alpha_bar(s) - sigma2, 0.0))
        if rederive_eps:  # ε̂ = (x − √ᾱ_t x̂_0)/√(1−ᾱ_t)
            b = direction / math.sqrt(schedule.one_minus_alpha_bar(t))
            a -= b * math.sqrt(schedule.alpha_bar(t))
            put(rows, i, a=a, b=b, c=math.sqrt(sigma2))
        else:
            put(rows, i, a=a, c=math.sqrt(sigma2), e=direction)
    return stepping(ts, rows)


def consistency(
    schedule: Schedule, timesteps: Sequence[float], *, clip: bool = True
) -> SamplerTable:
    """x_s = √ᾱ_s x̂_0 + √(1−ᾱ_s) z: to the image, and with fresh noise to the next timestep.

    For a model whose x̂_0 is a sample, not a mean: one trained with the objective `consistency`.
    """
    ts = checked_timesteps(schedule.T, timesteps)
    rows = empty_rows(len(ts), clip)
    for i, s in enumerate([*ts[1:], -1]):
        noise = math.sqrt(schedule.one_minus_alpha_bar(s))
        put(rows, i, a=math.sqrt(schedule.alpha_bar(s)), c=noise)
    return stepping(ts, rows)


@dataclass(frozen=True)
class Sampler:
    """One way to walk the reverse chain.

    table: (schedule, timesteps, clip=…, …) → SamplerTable. takes: which of `build_table`'s options
    it is told besides. corrector_only: it is made of Langevin steps, `corrector_steps` at each
    level; after the rows of any other, correctors can follow. least: evaluations from pure noise,
    of a T of 1000, below which what comes out is clearly worse. own_only: it is for models that are
    trained for it, and say so as their default. draws: by default each of its steps adds noise, so
    that chains from one x_t differ. open_end: spacings by noise level leave out the
    image's end of the schedule, where x̂_0 is x but for rounding.
    """

    table: Callable[..., SamplerTable]
    takes: tuple[str, ...] = ()
    corrector_only: bool = False
    least: int = 1
    own_only: bool = False
    draws: bool = False
    open_end: bool = False

    @property
    def options(self) -> tuple[str, ...]:
        """What a request may tell it: which of eta and variance."""
        return tuple(name for name in self.takes if name in ("eta", "variance"))

    def needs(self, length: int, T: int) -> int:
        """Evaluations that a chain over `length` of T timesteps should have, in proportion.

        One that visits them all can do no more, unless it is made of Langevin steps alone.
        """
        needed = math.ceil(self.least * length / T)
        return needed if self.corrector_only else min(needed, length)


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(ancestral, ("variance",), least=20, draws=True),
    "ddim": Sampler(ddim, ("eta", "rederive_eps", "landing", "stride", "branch"), least=10),
    "dpmpp_2m": Sampler(dpmpp_2m, least=8),
    "dpmpp_3m": Sampler(dpmpp_3m, least=8),
    "unipc": Sampler(unipc, least=6),
    "consistency": Sampler(consistency, own_only=True, draws=True, open_end=True),
    "langevin": Sampler(
        annealed_langevin,
        ("corrector_steps", "branch"),
        corrector_only=True,
        least=200,
        draws=True,
    ),
}


class FewStepsWarning(UserWarning):
    """A sampler has so few steps that its images are clearly worse than the model's."""


def few_steps(sampler: str, evaluations: int, length: int, T: int) -> str | None:
    """What to warn of where a chain over `length` of T timesteps has too few evaluations."""
    needed = SAMPLERS[sampler].needs(length, T)
    if evaluations >= needed:
        return None
    return (
        f"{evaluations} evaluation{'s are' if evaluations > 1 else ' is'} few for {sampler}, which "
        f"wants {needed} or more here"
    )


@dataclass(frozen=True)
class SamplingDefaults:
    """How a model is meant to be sampled: what holds where the caller says nothing.

    sampler, variance, clip, spacing: as in the functions below. steps: of this sampler; None, and
    for any other sampler: 100, or all where there are fewer. A `learned` variance is that of
    a network with `learned_variance`. Two conventions of ddim: rederive_eps, whether ε̂ is the one
    that agrees with the clipped x̂_0, or the network's own as in diffusers; landing, whether a step
    lands on the `next` timestep, or T // steps lower (`stride`) as in diffusers.
    """

    sampler: str = "ddpm"
    variance: str = "large"
    clip: bool = True
    spacing: str = "uniform"
    rederive_eps: bool = True
    landing: str = "next"
    steps: int | None = None

    def __post_init__(self) -> None:
        check_name("sampler", self.sampler, SAMPLERS)
        check_name("variance", self.variance, VARIANCES)
        check_name("spacing", self.spacing, SPACINGS)
        check_name("landing", self.landing, LANDINGS)
        for name in ("clip", "rederive_eps"):
            check_flags(**{name: getattr(self, name)}, error=SamplerError)
            object.__setattr__(self, name, bool(getattr(self, name)))  # JSON knows no NumPy
        if self.steps is not None and (type(self.steps) is not int or self.steps < 1):
            raise SamplerError(f"steps = {self.steps!r:.200}: must be an integer, 1 or more")

    def options(self, most: int, **given: Any) -> dict[str, Any]:
        """Keywords of `build_table`: what is given and not None, else these; at most `most` steps.

        A number of steps that is given is left as it is.
        """
        said = {name: value for name, value in given.items() if value is not None}
        found = asdict(self) | said
        if "steps" not in said:
            own = self.steps if found["sampler"] == self.sampler else None
            found["steps"] = min(own or DEFAULT_STEPS, most)
        return found


def check_options(sampler: str, given: Mapping[str, object]) -> None:
    """Raise SamplerError for an option that is given (not None) and that the sampler does not take.

    sampler: a name that is known, or one without options.
    """
    takes = SAMPLERS[sampler].takes if sampler in SAMPLERS else ()
    for option, value in given.items():
        if value is not None and option not in takes:
            takers = " or ".join(name for name, its in SAMPLERS.items() if option in its.takes)
            raise SamplerError(f"{option} = {value!r:.80}: is for sampler {takers}, not {sampler}")


def samplers_of(sampling: SamplingDefaults) -> dict[str, Sampler]:
    """Those that a model of this default can be sampled with."""
    own = sampling.sampler
    return {name: its for name, its in SAMPLERS.items() if name == own or not its.own_only}


def build_table(
    schedule: Schedule,
    *,
    sampler: str = "ddpm",
    steps: int = 100,
    spacing: str = "uniform",
    eta: float = 0.0,
    variance: str = "large",
    clip: bool = True,
    rederive_eps: bool = True,
    landing: str = "next",
    corrector_steps: int | None = None,
    start: int | None = None,
    travel: int = 1,
) -> SamplerTable:
    """The table of a named sampler. Raises SamplerError naming the option.

    rederive_eps and landing are of ddim: see `SamplingDefaults`.

    start: index of the x_t that is to enter the first row, for a chain that does not begin with
    noise: the `steps` timesteps then lie in start..0, and the first is `start` in any spacing; its
    row lands on the second, whatever `landing` says.
    corrector_steps: Langevin steps at each level: after every step but the last (default none);
    for langevin, which has nothing else, 1 by default. So its rows are steps·corrector_steps, those
    of all others steps + (steps − 1)·corrector_steps.
    travel: how often each jump but the last is walked, (steps − 1)·travel + 1 rows; see
    `diffusion.travel`. Not with Langevin steps.
    """
    check_name("sampler", sampler, SAMPLERS)
    check_name("landing", landing, LANDINGS)
    check_flags(clip=clip, rederive_eps=rederive_eps, error=SamplerError)
    if start is not None and not 0 <= start < schedule.T:
        raise SamplerError(f"start = {start}: must be 0..{schedule.T - 1}")
    T = schedule.T if start is None else start + 1
    timesteps = spaced_times(schedule, steps, spacing, T=T)
    if SAMPLERS[sampler].open_end and spacing in LEVEL_SPACINGS and steps < T:
        timesteps = spaced_times(schedule, steps + 1, spacing, T=T)[:-1]
    if start is not None:
        timesteps = [start, *timesteps[1:]]
    if corrector_steps is not None:
        check_whole("corrector_steps", corrector_steps, least=0, error=SamplerError)
    chosen = SAMPLERS[sampler]
    told: dict[str, object] = {
        "eta": eta,
        "variance": variance,
        "rederive_eps": rederive_eps,
        "landing": landing,
        "stride": (schedule.T if start is None else start + 1) // steps,
        "corrector_steps": 1 if corrector_steps is None else corrector_steps,
        "branch": start is not None,
    }
    takes = {name: told[name] for name in chosen.takes}
    table = chosen.table(schedule, timesteps, clip=clip, **takes)
    if not chosen.corrector_only:
        table = with_correctors(table, schedule, steps=corrector_steps or 0)
    return with_travel(table, schedule, times=travel)
