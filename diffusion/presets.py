"""Ways to sample a model by name, for who does not want to choose: fast, balanced, faithful.

A model may say its own in `card.json`, chosen from what was measured of it
(`ddpm evaluate --quality`). For the others: fast is DDIM in 20 steps, balanced the model's own
default, faithful the paper's chain of all T. A consistency model, which has no other sampler, takes
1 evaluation, its default, and 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusion.samplers import DEFAULT_STEPS, SAMPLERS, SamplingDefaults
from diffusion.spacings import SPACINGS
from diffusion.table import SamplerError, check_name
from diffusion.tuned import TUNED

PRESETS = ("fast", "balanced", "faithful")
FAST_STEPS = 20


@dataclass(frozen=True)
class Preset:
    """A sampler with its number of steps, for a chain from noise, and its spacing.

    Raises SamplerError naming the field.
    """

    sampler: str
    steps: int
    spacing: str = "uniform"

    def __post_init__(self) -> None:
        check_name("sampler", self.sampler, (*SAMPLERS, TUNED))
        check_name("spacing", self.spacing, SPACINGS)
        if type(self.steps) is not int or self.steps < 1:
            raise SamplerError(f"steps = {self.steps!r:.200}: must be an integer, 1 or more")


def read_presets(raw: Any) -> dict[str, Preset]:
    """Presets from JSON: {name: {sampler, steps, spacing}}. Raises SamplerError."""
    if not isinstance(raw, Mapping):
        raise SamplerError(f"presets = {raw!r:.200}: must be an object")
    found = {}
    for name, fields in raw.items():
        check_name("presets", name, PRESETS)
        try:
            found[name] = Preset(**fields)
        except TypeError as error:
            raise SamplerError(f"presets: {name}: must be sampler, steps and spacing") from error
        except SamplerError as error:
            raise SamplerError(f"presets: {name}: {error}") from error
    return found


def presets_of(
    sampling: SamplingDefaults, T: int, own: Mapping[str, Preset] | None = None
) -> dict[str, Preset]:
    """Every preset of a model with this default and T; own: what it says of itself."""
    steps = min(sampling.steps or DEFAULT_STEPS, T)
    fast, faithful = Preset("ddim", min(FAST_STEPS, T)), Preset("ddpm", T)
    if sampling.sampler == "consistency":
        fast, faithful = (Preset(sampling.sampler, min(n, T), sampling.spacing) for n in (1, 4))
    balanced = Preset(sampling.sampler, steps, sampling.spacing)
    found = {"fast": fast, "balanced": balanced, "faithful": faithful, **(own or {})}
    for name, preset in found.items():
        if preset.steps > T:
            raise SamplerError(f"presets: {name}: steps = {preset.steps}: must be at most T = {T}")
    return found
