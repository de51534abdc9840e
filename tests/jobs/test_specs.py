from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from jobs.cards import ModelCard, Sampling, schedule_tables
from jobs.errors import SpecError
from jobs.kinds.chain import Snapshots
from jobs.kinds.common import JobSpec
from jobs.kinds.generate import GenerateSpec
from jobs.kinds.interpolate import InterpolateSpec
from jobs.kinds.likelihood import LikelihoodSpec
from jobs.kinds.noise import NoiseSpec
from jobs.kinds.reconstruct import ReconstructSpec, SnapshotSource
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


def test_a_guided_reconstruction_costs_twice(card: ModelCard) -> None:
    spec = ReconstructSpec(t=40, num_images=3, class_label=1, guidance=2.0)
    assert admit(spec, card, Settings(), 1)[1].evaluations == 3 * 40 * 2
