from __future__ import annotations

import json

import numpy as np
import pytest
from pydantic import ValidationError

from jobs.cards import (
    ModelCard,
    Preset,
    SamplerTraits,
    Sampling,
    from_store,
    schedule_tables,
    to_store,
)
from jobs.errors import SpecError
from jobs.kinds.chain import ChainSpec, Snapshots
from jobs.kinds.common import JobSpec
from jobs.kinds.encode import EncodeSpec
from jobs.kinds.generate import GenerateSpec
from jobs.kinds.interpolate import InterpolateSpec
from jobs.kinds.likelihood import LikelihoodSpec
from jobs.kinds.noise import NoiseSpec
from jobs.kinds.reconstruct import ReconstructSpec, SnapshotSource
from jobs.kinds.stored import stored
from jobs.kinds.table import admit, parse
from jobs.settings import Settings

PLANE = 4 * 8 * 8


def plan_of(card: ModelCard, **fields: object) -> tuple[int, int]:
    """(image-steps, output planes) of a generate request."""
    spec = GenerateSpec.model_validate(fields)
    _, plan = admit(spec, card, Settings())
    return plan.evaluations, plan.output_bytes // PLANE


@pytest.mark.parametrize(
    ("fields", "evaluations", "planes"),
    [
        ({}, 100, 1),
        ({"num_images": 3, "steps": 7}, 21, 3),
        ({"class_label": 1, "guidance": 2.0, "steps": 10}, 20, 1),
        ({"steps": 10, "snapshots": Snapshots(every=3)}, 10, 1 + 4),
        ({"steps": 10, "snapshots": Snapshots(every=100)}, 10, 1 + 1),
        ({"steps": 10, "snapshots": Snapshots(at=(5, 5, 9), kinds=("x_t", "eps"))}, 10, 1 + 4),
        ({"steps": 1, "snapshots": Snapshots(at=(1, 2, 3))}, 1, 1 + 1),
    ],
)
def test_cost(card: ModelCard, fields: dict[str, object], evaluations: int, planes: int) -> None:
    assert plan_of(card, **fields) == (evaluations, planes)


def test_cost_of_langevin(card: ModelCard) -> None:
    assert plan_of(card, sampler="langevin", steps=10, corrector_steps=4)[0] == 40
    assert plan_of(card, sampler="ddim", steps=10, corrector_steps=4)[0] == 46
    without = {name: its for name, its in card.samplers.items() if name != "langevin"}
    card = card.model_copy(update={"samplers": without})
    with pytest.raises(SpecError, match="/corrector_steps"):
        plan_of(card, sampler="ddim", steps=10, corrector_steps=4)


def test_cost_of_noise(card: ModelCard) -> None:
    spec = NoiseSpec(t=(1, 5, 9), kinds=("x_t", "eps"))
    _, plan = admit(spec, card, Settings(), num_inputs=2)
    assert (plan.images, plan.evaluations, plan.output_bytes) == (2, 0, 12 * PLANE)


def test_filling_takes_the_models_own_defaults(card: ModelCard) -> None:
    own = card.model_copy(
        update={
            "sampling": Sampling(sampler="ddpm", variance="large", spacing="leading"),
            "betas": card.betas[:50],
        }
    )
    filled, _ = admit(GenerateSpec(), own, Settings(ttl_s=60))
    assert isinstance(filled, GenerateSpec)
    assert (filled.variance, filled.spacing, filled.steps) == ("large", "leading", 50)
    assert filled.ttl_s == 60 and filled.seed is not None and filled.model == "mnist"
    ddim, _ = admit(GenerateSpec(sampler="ddim"), card, Settings())
    assert isinstance(ddim, GenerateSpec) and ddim.eta == 0.0 and ddim.variance is None


def with_traits(card: ModelCard) -> ModelCard:
    """A card as workers publish it: with presets, and with what samplers need."""
    presets = {"fast": Preset(sampler="ddim", steps=20, spacing="trailing")}
    least = {"ddpm": 20, "ddim": 10, "langevin": 200}
    samplers = {
        name: its.model_copy(update={"least": least.get(name, 1)})
        for name, its in card.samplers.items()
    }
    return card.model_copy(update={"presets": presets, "samplers": samplers})


def test_a_preset_stands_for_sampler_steps_and_spacing(card: ModelCard) -> None:
    card = with_traits(card)
    filled, plan = admit(GenerateSpec(preset="fast", num_images=2, eta=0.5), card, Settings())
    assert isinstance(filled, GenerateSpec)
    assert (filled.sampler, filled.steps, filled.spacing, filled.eta) == (
        "ddim",
        20,
        "trailing",
        0.5,
    )
    assert plan.evaluations == 40
    # In the store there is none, so that every version reads what it stands for.
    assert filled.preset is None and "preset" not in stored(filled)
    # From lower down in proportion.
    lower, _ = admit(ReconstructSpec(preset="fast", t=101), card, Settings(), 1)
    assert isinstance(lower, ReconstructSpec) and lower.steps == 3


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"sampler": "ddpm"}, "/sampler"),
        ({"steps": 5}, "/steps"),
        ({"spacing": "uniform"}, "/spacing"),
    ],
)
def test_nothing_stands_beside_a_preset_that_it_says_itself(
    card: ModelCard, fields: dict[str, object], pointer: str
) -> None:
    spec = GenerateSpec.model_validate({"preset": "fast", **fields})
    with pytest.raises(SpecError, match=f"{pointer}: is what preset = fast says"):
        admit(spec, with_traits(card), Settings())


def test_a_preset_that_a_model_lacks_is_refused(card: ModelCard) -> None:
    with pytest.raises(SpecError, match="/preset: faithful: model mnist has fast"):
        admit(GenerateSpec(preset="faithful"), with_traits(card), Settings())
    with pytest.raises(SpecError, match="/preset: fast: model mnist has none"):
        admit(GenerateSpec(preset="fast"), card, Settings())


def test_tables_made_for_a_model_come_in_few_sizes_and_begin_with_noise(card: ModelCard) -> None:
    made = {
        **card.samplers,
        "tuned": SamplerTraits(steps=(4, 6), tables={4: "of four", 6: "of six"}),
    }
    card = card.model_copy(update={"samplers": made})
    filled, plan = admit(GenerateSpec(sampler="tuned"), card, Settings())
    assert isinstance(filled, GenerateSpec) and plan.evaluations == 6
    assert filled.spacing is None and admit(filled, card, Settings()) == (filled, plan)
    for fields, message in (
        ({"steps": 5}, "/steps: 5: tuned is made for 4, 6"),
        ({"spacing": "karras"}, "/spacing: is no choice with sampler tuned"),
        ({"corrector_steps": 1}, "/corrector_steps: is no choice"),
        ({"eta": 0.5}, "/eta: is for sampler ddim, not tuned"),
    ):
        with pytest.raises(SpecError, match=message):
            admit(GenerateSpec.model_validate({"sampler": "tuned", **fields}), card, Settings())
    other = {"noise": card.noise, "table": "of another"}
    with pytest.raises(SpecError, match=r"/provenance/table: 'of another': .* of sampler tuned"):
        admit(GenerateSpec(sampler="tuned", steps=4, provenance=other), card, Settings())
    made_with = {"noise": card.noise, "table": "of four"}
    with pytest.raises(SpecError, match="/provenance/table"):  # the table of another number
        admit(GenerateSpec(sampler="tuned", steps=6, provenance=made_with), card, Settings())
    admit(GenerateSpec(sampler="tuned", steps=4, provenance=made_with), card, Settings())
    with pytest.raises(SpecError, match="/sampler: tuned: is for images from noise alone"):
        admit(ReconstructSpec(sampler="tuned", t=1000), card, Settings(), 1)


@pytest.mark.parametrize(
    ("fields", "warned"),
    [
        (
            {"sampler": "langevin", "steps": 20},
            "20 evaluations are few for langevin, which wants 200",
        ),
        ({"sampler": "langevin", "steps": 100, "corrector_steps": 2}, None),
        ({"steps": 19}, "19 evaluations are few for ddpm, which wants 20"),
        ({"steps": 20}, None),
        ({"sampler": "ddim", "steps": 9}, "9 evaluations are few for ddim, which wants 10"),
    ],
)
def test_too_few_steps_are_warned_of(
    card: ModelCard, fields: dict[str, object], warned: str | None
) -> None:
    card = with_traits(card)
    filled, _ = admit(GenerateSpec.model_validate(fields), card, Settings())
    found = [(w.pointer, w.detail.split(" or")[0]) for w in filled.warnings(card)]
    assert found == ([] if warned is None else [("/steps", warned)])


def test_a_short_chain_needs_less(card: ModelCard) -> None:
    card = with_traits(card)
    for steps, t, warned in ((3, 300, False), (2, 300, True), (1, 1, False)):
        filled, _ = admit(ReconstructSpec(sampler="ddim", steps=steps, t=t), card, Settings(), 1)
        assert bool(filled.warnings(card)) == warned
    short = card.model_copy(update={"betas": card.betas[:5]})  # all there are
    assert not admit(GenerateSpec(steps=5), short, Settings())[0].warnings(short)


def test_a_filled_spec_is_a_fixed_point_and_survives_json(card: ModelCard) -> None:
    filled, plan = admit(
        GenerateSpec(class_label=3, snapshots=Snapshots(at=(7,))), card, Settings()
    )
    assert parse(filled.model_dump_json()) == filled
    assert admit(filled, card, Settings()) == (filled, plan)


def test_a_manifest_of_another_noise_is_refused_by_name(card: ModelCard) -> None:
    """One that says nothing of it is of the first version."""
    second = card.model_copy(update={"noise": 2})
    for served, provenance in (
        (second, {"noise": 2}),
        (card, {"noise": 1}),
        (card, {"torch": "2"}),
    ):
        admit(GenerateSpec(provenance=provenance), served, Settings())
    for served, provenance in ((second, {"noise": 1}), (second, {}), (card, {"noise": 2})):
        with pytest.raises(SpecError, match="another version of the noise") as refused:
            admit(GenerateSpec(provenance=provenance), served, Settings())
        assert refused.value.pointer == "/provenance/noise"
    admit(GenerateSpec(), second, Settings())


def test_steps_are_the_models_own_for_its_own_sampler(card: ModelCard) -> None:
    own = card.model_copy(
        update={
            "steps": 20,
            "sampling": Sampling(sampler="ddim", variance="small", spacing="uniform"),
        }
    )
    for fields, steps in (
        ({}, 20),
        ({"sampler": "ddim"}, 20),
        ({"sampler": "ddpm"}, 100),
        ({"steps": 7}, 7),
    ):
        spec, _ = admit(GenerateSpec.model_validate(fields), own, Settings())
        assert isinstance(spec, GenerateSpec) and spec.steps == steps
    part, _ = admit(ReconstructSpec(t=9), own, Settings(), 1)
    assert isinstance(part, ReconstructSpec) and part.steps == 9


def test_images_from_one_x_t_are_of_a_sampler_that_draws_noise(card: ModelCard) -> None:
    quiet = SamplerTraits(draws=False)
    unipc = Sampling(sampler="unipc", variance="small", spacing="trailing")
    samplers = {**card.samplers, "unipc": quiet}
    own = card.model_copy(update={"steps": 8, "sampling": unipc, "samplers": samplers})

    def found(spec: ChainSpec, served: ModelCard = own) -> tuple[str | None, int | None]:
        filled, _ = admit(spec, served, Settings(), spec.input is not None)
        assert isinstance(filled, ChainSpec)
        return filled.sampler, filled.steps

    assert found(GenerateSpec()) == ("unipc", 8)
    assert found(ReconstructSpec(t=400)) == ("ddpm", 100)
    assert found(ReconstructSpec(t=400, sampler="unipc")) == ("unipc", 8)
    only = own.model_copy(update={"samplers": {"unipc": quiet}})
    assert found(ReconstructSpec(t=400), only) == ("unipc", 8)
    old, more = to_store(own)  # release 0.1 is told of a sampler that it knows
    assert json.loads(old)["sampling"]["sampler"] in json.loads(old)["samplers"]
    assert from_store(old.encode(), more.encode()) == own


def test_seeds_are_drawn_anew(card: ModelCard) -> None:
    seeds = {admit(GenerateSpec(), card, Settings())[0].seed for _ in range(20)}
    assert len(seeds) == 20


def test_labels(card: ModelCard) -> None:
    must = card.model_copy(update={"null_label": None})
    with pytest.raises(SpecError, match="needs a label"):
        plan_of(must)
    with pytest.raises(SpecError, match="without label dropping"):
        plan_of(must, class_label=1, guidance=2.0)
    plain = card.model_copy(update={"class_names": (), "null_label": None})
    with pytest.raises(SpecError, match="no classes"):
        plan_of(plain, class_label=1)
    assert plan_of(plain)[0] == 100


@pytest.mark.parametrize(
    "text",
    ['{"kind": "generate", "num_images": true}', '{"kind": "generate", "eta": "0.5"}',
     '{"kind": "generate", "guidance": NaN}', '{"kind": "other"}', "{}", "[]",
     '{"kind": "noise"}', '{"kind": "generate", "num_imagse": 1}'],
)  # fmt: skip
def test_nothing_is_guessed(text: str) -> None:
    with pytest.raises((ValidationError, SpecError)):
        parse(text)


def test_schedule_tables_end_points() -> None:
    card = ModelCard(name="m", digest="d", queue="q", shape=(1, 1, 1), betas=(0.5, 1.0))
    tables = schedule_tables(card)
    np.testing.assert_allclose(tables["alpha_bar"], [0.5, 0.0])
    np.testing.assert_allclose(tables["snr"], [1.0, 0.0])
    np.testing.assert_allclose(tables["posterior_variance"], [0.0, 0.5])


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://elsewhere:1/2")
    monkeypatch.setenv("DDPM_MAX_IMAGES", "7")
    monkeypatch.setenv("DDPM_API_KEYS", "a, b,")
    settings = Settings()
    assert settings.redis_url == "redis://elsewhere:1/2" and settings.max_images == 7
    assert [key.get_secret_value() for key in settings.api_keys] == ["a", "b"]
    assert "a" not in repr(settings.api_keys)


PICTURES: dict[str, tuple[JobSpec, int]] = {
    "reconstruct": (ReconstructSpec(t=40), 1),
    "branch": (ReconstructSpec(source=SnapshotSource(job="a", t=7), sampler="ddim"), 1),
    "interpolate": (InterpolateSpec(t=9, lambdas=(0.0, 0.5), snapshots=Snapshots(every=4)), 2),
    "estimate": (LikelihoodSpec(indices=(4, 2)), 2),
    "full": (LikelihoodSpec(mode="full", terms=(1,)), 3),
}


@pytest.mark.parametrize("name", PICTURES)
def test_filled_specs_about_pictures_are_fixed_points_too(card: ModelCard, name: str) -> None:
    spec, inputs = PICTURES[name]
    filled, plan = admit(spec, card, Settings(), inputs)
    assert parse(filled.model_dump_json()) == filled
    assert admit(filled, card, Settings(), inputs) == (filled, plan)


@pytest.mark.parametrize(
    ("name", "images", "evaluations", "output_bytes"),
    [
        ("reconstruct", 1, 40, PLANE),
        ("branch", 1, 7, PLANE),
        ("interpolate", 2, 2 * 9, 2 * (1 + 3) * PLANE),
        ("estimate", 2, 2 * 20, 2 * 20 * 16),
        ("full", 3, 3 * 1000, 3 * 1000 * 16),
    ],
)
def test_cost_of_work_on_pictures(
    card: ModelCard, name: str, images: int, evaluations: int, output_bytes: int
) -> None:
    spec, inputs = PICTURES[name]
    _, plan = admit(spec, card, Settings(), inputs)
    assert (plan.images, plan.evaluations) == (images, evaluations)
    assert plan.output_bytes == output_bytes


def test_the_flow_needs_a_signal_at_its_end(card: ModelCard) -> None:
    without = card.model_copy(update={"betas": (*card.betas[:-1], 1.0)})
    admit(LikelihoodSpec(mode="full"), without, Settings(), 1)
    admit(LikelihoodSpec(mode="flow"), card, Settings(), 1)
    with pytest.raises(SpecError, match="β_T = 1, so that the flow has no end") as refused:
        admit(LikelihoodSpec(mode="flow"), without, Settings(), 1)
    assert refused.value.pointer == "/mode"


def test_a_guided_reconstruction_costs_twice(card: ModelCard) -> None:
    spec = ReconstructSpec(t=40, num_images=3, class_label=1, guidance=2.0)
    assert admit(spec, card, Settings(), 1)[1].evaluations == 3 * 40 * 2


def test_an_encoding_of_few_timesteps_is_warned_of(card: ModelCard) -> None:
    card = card.model_copy(update={"samplers": {"ddim": SamplerTraits(least=10)}})
    for steps, warned in ((5, True), (10, False), (None, False)):
        filled, _ = admit(EncodeSpec(steps=steps), card, Settings(), 1)
        found = [(warning.pointer, warning.detail) for warning in filled.warnings(card)]
        said = f"{steps} evaluations are few for ddim, which wants 10 or more here"
        assert found == [("/steps", said)] * warned
    assert not admit(EncodeSpec(steps=5, t=400), card, Settings(), 1)[0].warnings(card)
