"""The smaller parts of a worker: states as bytes, the model folder, noising, snapshot rows."""

from __future__ import annotations

import gc
import json
import shutil
import struct
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import diffusion
from diffusion import Model
from diffusion.device import DeviceError, pick_device
from diffusion.encoding import encoding_table
from diffusion.samplers import SAMPLERS, SamplingDefaults, build_table
from diffusion.spacings import spaced_timesteps
from jobs.kinds.chain import Snapshots
from jobs.kinds.generate import GenerateSpec
from jobs.kinds.table import admit
from jobs.settings import Settings
from worker import memory, models
from worker.commands import worker as worker_command
from worker.kinds.chain_state import StateError, pack, unpack
from worker.kinds.chains import snapshot_rows, spec_table
from worker.kinds.generate import GenerateFlight
from worker.kinds.inputs import x_start_of
from worker.kinds.noise import closed, stepwise
from worker.models import ModelFolder, card_of
from worker.network.networks import Networks
from worker.rq import check

SHAPE = (3, 8, 8)


def test_a_chains_state_survives_as_bytes() -> None:
    planes = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0)).unbind()
    for held in (1, 2, 3):
        row, found = unpack(pack(17, *planes[:held]), SHAPE)
        assert row == 17
        assert found[held:] == (None,) * (3 - held)
        for plane, wanted in zip(found, planes[:held], strict=False):
            assert plane is not None and torch.equal(plane, wanted)
    assert len(pack(3, planes[0])) < 4 * planes[0].numel() + 16
    # As the release before wrote it.
    assert pack(3, *planes[:2])[:9] == struct.pack("<4sI?", b"xt2\0", 3, True)


OTHER_BYTES = {"none": b"", "magic": bytes(9 + 4 * 192), "length": bytes(100)}


@pytest.mark.parametrize("raw", OTHER_BYTES.values(), ids=OTHER_BYTES.keys())
def test_other_bytes_are_no_state(raw: bytes) -> None:
    with pytest.raises(StateError, match="bytes"):
        unpack(raw, SHAPE)


def test_the_folder_is_reread_and_each_model_loaded_once(
    tmp_path: Path, make_model: Callable[..., Model]
) -> None:
    folder = ModelFolder(tmp_path / "models", queue="q")
    assert folder.rescan().loaded == ()  # no folder yet
    diffusion.save(make_model(seed=1), tmp_path / "models" / "one")
    (served,) = folder.rescan().loaded
    assert served.name == "one" and served.card.queue == "q"
    assert folder.rescan().loaded == ()
    diffusion.save(make_model(seed=2), tmp_path / "models" / "two")
    diffusion.save(make_model(seed=3), tmp_path / "models" / "one")
    assert {s.name for s in folder.rescan().loaded} == {"one", "two"}
    assert folder.served["one"].model.digest != served.model.digest
    shutil.rmtree(tmp_path / "models" / "two")
    assert folder.rescan().gone == ("two",)
    assert set(folder.served) == {"one"}


def test_the_model_of_requests_that_name_none_waits_for_no_other(
    tmp_path: Path, make_model: Callable[..., Model]
) -> None:
    for seed, name in enumerate(("fast", "mnist", "other")):
        diffusion.save(make_model(seed=seed), tmp_path / name)
    (tmp_path / "mnist" / "notes").write_bytes(bytes(10_000))  # the largest
    folder = ModelFolder(tmp_path, queue="q")
    assert [served.name for served in folder.rescan(only_first=True).loaded] == ["mnist"]
    assert {served.name for served in folder.rescan().loaded} == {"fast", "other"}
    assert folder.rescan().loaded == ()
    folder = ModelFolder(tmp_path, queue="q", first="other")
    assert folder.rescan().loaded[0].name == "other"


def test_a_model_for_which_memory_was_short_is_tried_again(
    tmp_path: Path,
    make_model: Callable[..., Model],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = tmp_path / "group"
    group.mkdir()
    for name, value in {"max": "200000", "current": "100000", "stat": "inactive_file 5"}.items():
        (group / f"memory.{name}").write_text(value)
    monkeypatch.setattr(memory, "_GROUP", group)  # a container with next to no memory
    diffusion.save(make_model(), tmp_path / "models" / "one")
    folder = ModelFolder(tmp_path / "models", queue="q")
    assert folder.rescan().loaded == ()
    (group / "memory.max").write_text(str(2**33))
    assert folder.rescan().loaded == (), "not before a minute is over"
    monkeypatch.setattr(models, "AGAIN_S", 0.0)
    (group / "memory.max").write_text("200000")
    monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + 61)
    assert folder.rescan().loaded == () and folder.rescan().loaded == ()
    assert caplog.text.count("model one cannot be served") == 1, "it is told once"
    (group / "memory.max").write_text(str(2**33))
    [served] = folder.rescan().loaded
    assert served.name == "one" and folder.rescan().loaded == ()


def test_a_broken_model_is_named_once_and_tried_again_when_it_changes(
    tmp_path: Path, make_model: Callable[..., Model], caplog: pytest.LogCaptureFixture
) -> None:
    diffusion.save(make_model(), tmp_path / "bad")
    weights = tmp_path / "bad" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    folder = ModelFolder(tmp_path, queue="q")
    assert folder.rescan().loaded == () and folder.rescan().loaded == ()
    assert caplog.text.count("model bad cannot be served") == 1
    assert "model.safetensors" in caplog.text
    weights.write_bytes(whole)
    assert len(folder.rescan().loaded) == 1


def test_only_the_named_models_are_served(tmp_path: Path, make_model: Callable[..., Model]) -> None:
    for name in ("one", "two", ".hidden", "not a name"):
        diffusion.save(make_model(), tmp_path / name)
    (tmp_path / "empty").mkdir()
    assert {s.name for s in ModelFolder(tmp_path, queue="q").rescan().loaded} == {"one", "two"}
    named = ModelFolder(tmp_path, queue="q", names=("two",))
    assert {s.name for s in named.rescan().loaded} == {"two"}


def test_a_diffusers_folder_is_served_too(tmp_path: Path, make_model: Callable[..., Model]) -> None:
    from diffusion.checkpoint import convert

    diffusion.save(make_model(classes=0), tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", "diffusers")
    cards = {s.name: s.card for s in ModelFolder(tmp_path, queue="q").rescan().loaded}
    assert cards["theirs"].betas == pytest.approx(cards["ours"].betas)


def test_the_conventions_of_an_imported_model_hold_for_its_jobs(
    tmp_path: Path, make_model: Callable[..., Model]
) -> None:
    from diffusion.checkpoint import convert

    diffusion.save(make_model(classes=0), tmp_path / "ours")
    changes = {"sampler": "ddim", "rederive_eps": False, "landing": "stride"}
    convert(tmp_path / "ours", tmp_path / "theirs", "diffusers", sampling=changes)
    served = {s.name: s for s in ModelFolder(tmp_path, queue="q").rescan().loaded}
    tables = {}
    for name in ("ours", "theirs"):
        spec, _ = admit(GenerateSpec(sampler="ddim", steps=7), served[name].card, Settings())
        assert isinstance(spec, GenerateSpec)
        table = spec_table(served[name], spec, from_noise=True)
        tables[name] = table.coefficients.tolist()
        made = GenerateFlight.provenance(served[name], spec)
        assert (made["rederive_eps"], made["landing"]) == (
            (True, "next") if name == "ours" else (False, "stride")
        )
    schedule = served["theirs"].model.schedule
    own = build_table(schedule, steps=7, **changes)  # type: ignore[arg-type]
    assert tables["theirs"] == own.coefficients.tolist()
    assert tables["ours"] == build_table(schedule, sampler="ddim", steps=7).coefficients.tolist()
    assert tables["ours"] != tables["theirs"]


def test_the_card_says_what_the_api_must_know(make_model: Callable[..., Model]) -> None:
    card = card_of(make_model(T=50), "tiny", "q")
    assert card.T == 50 and card.shape == (1, 8, 8)
    assert card.class_names == ("0", "1", "2") and card.null_label == 3
    assert tuple(card.samplers) == tuple(name for name in SAMPLERS if name != "consistency")
    assert json.loads(card.model_dump_json())["parameters"] > 0


def test_the_card_of_a_consistency_model_says_how_it_is_sampled(
    make_model: Callable[..., Model],
) -> None:
    model = make_model(T=50)
    own = SamplingDefaults("consistency", spacing="trailing", steps=2)
    fast = Model(replace(model.config, sampling=own), model.network)
    card = card_of(fast, "tiny", "q")
    assert tuple(card.samplers) == tuple(SAMPLERS)
    filled, plan = admit(GenerateSpec(num_images=3), card, Settings())
    assert isinstance(filled, GenerateSpec)
    assert (filled.sampler, filled.spacing, filled.steps) == ("consistency", "trailing", 2)
    assert plan.evaluations == 6
    assert not filled.warnings(card)
    assert admit(GenerateSpec(preset="faithful"), card, Settings())[1].evaluations == 4


def test_closed_noise_has_one_eps_and_stepwise_agrees_in_distribution(model: Model) -> None:
    schedule = model.schedule
    x_start = torch.full((2000, 1, 2, 2), 0.5)
    found = {n.t: n for n in closed(schedule, x_start, [0, 20, 49], seed=3)}
    assert list(found) == [0, 20, 49]
    assert torch.equal(found[0].eps, found[49].eps)
    chain = {n.t: n for n in stepwise(schedule, x_start, [0, 20, 49], seed=3)}
    for t, noised in chain.items():
        bar = schedule.alpha_bar(t)
        assert noised.x_t.mean() == pytest.approx(0.5 * bar**0.5, abs=0.05)
        assert noised.x_t.var() == pytest.approx(1 - bar, rel=0.06)
        again = bar**0.5 * x_start + (1 - bar) ** 0.5 * noised.eps
        torch.testing.assert_close(again, noised.x_t, atol=1e-5, rtol=0)


def test_uploaded_pixels_become_minus_one_to_one() -> None:
    pixels = np.array([0, 255], np.uint8).reshape(1, 1, 2, 1)
    assert x_start_of(pixels).flatten().tolist() == [-1.0, 1.0]


def test_snapshots_at_and_every(model: Model) -> None:
    table = build_table(model.schedule, steps=10)
    rows = partial(snapshot_rows, table)
    assert rows(None) == frozenset()
    assert rows(Snapshots(every=4)) == {0, 4, 8}
    t = table.t + 1
    assert rows(Snapshots(at=(50, int(t[3]), 1))) == {0, 3, 9}
    assert rows(Snapshots(at=(int(t[3]) - 1,))) == {3}


def test_on_the_way_up_a_snapshot_is_what_the_next_step_enters_with(model: Model) -> None:
    """Not what a step led to before it was mended, nor the image that it all begins with."""
    timesteps = spaced_timesteps(model.schedule.T, 4)[::-1]
    table = encoding_table(model.schedule, timesteps, iterations=1)
    entered = {int(table.t[row]): row for row in range(2, len(table), 2)}  # with what is mended
    up = partial(snapshot_rows, table, up_to=timesteps[-1] + 1)
    for t in timesteps[:-1]:
        assert up(Snapshots(at=(t + 1,))) == {entered[t]}
    assert up(Snapshots(every=1)) == {*entered.values()}
    assert up(Snapshots(at=(timesteps[-1] + 1,))) == frozenset()  # that is what comes of it all
    alone = encoding_table(model.schedule, [7], iterations=0)
    assert snapshot_rows(alone, Snapshots(every=1), up_to=8) == frozenset()
    plain = encoding_table(model.schedule, timesteps, iterations=0)
    assert snapshot_rows(plain, Snapshots(every=1), up_to=timesteps[-1] + 1) == {1, 2, 3}


def test_a_model_that_is_replaced_takes_its_weights_along(tmp_path: Path, model: Model) -> None:
    diffusion.save(model, tmp_path / "one")
    folder = ModelFolder(tmp_path, queue="ddpm")
    [served] = folder.rescan().loaded
    assert served.table((("steps", 5),)) is served.table((("steps", 5),))
    weights = weakref.ref(served.model)
    shutil.rmtree(tmp_path / "one")
    del served
    assert folder.rescan().gone == ("one",)
    gc.collect()
    assert weights() is None


def test_another_rq_is_refused_and_the_difference_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check.check_rq()

    def prepare_execution(self: object, job: object, colour: str) -> None: ...

    changed = {prepare_execution: "self job"}
    monkeypatch.setattr(check, "_SIGNATURES", changed)
    with pytest.raises(check.RQMismatch, match=r"prepare_execution takes \(self job colour\)"):
        check.check_rq()
    monkeypatch.setattr(check, "VERSION", "3.1.0")
    with pytest.raises(check.RQMismatch, match=r"RQ 3\.1\.0"):
        check.check_rq()


def test_a_device_that_is_not_there_is_named() -> None:
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(DeviceError, match="device = 'nonsense'"):
        pick_device("nonsense")


def test_the_command_says_that_there_is_no_redis(tmp_path: Path) -> None:
    env = {"REDIS_URL": f"unix://{tmp_path}/none.sock"}
    result = CliRunner().invoke(worker_command, ["--models", str(tmp_path)], env=env)
    assert result.exit_code == 1
    assert "no Redis at unix://" in result.output
    result = CliRunner().invoke(worker_command, ["--device", "nonsense"], env=env)
    assert result.exit_code == 1 and "device = 'nonsense'" in result.output
    result = CliRunner().invoke(worker_command, env={**env, "DDPM_DRAIN_S": "soon"})
    assert result.exit_code == 1 and "DDPM_DRAIN_S = 'soon'" in result.output


def test_networks_come_and_go_while_others_are_let_go_of(make_model: Callable[..., Model]) -> None:
    """The engine's thread lets go of them; the loader's makes one ready at the same time."""
    old, kept, new = (make_model(seed=seed, classes=0) for seed in (1, 2, 3))
    networks = Networks(torch.float32, 8)
    for model in (old, kept):
        networks.prepare(model)

    class Meanwhile(list[str]):
        def __contains__(self, digest: object) -> bool:
            networks.prepare(new)
            if digest == old.digest:
                networks.keep_only([kept.digest, new.digest])
            return super().__contains__(digest)

    networks.keep_only(Meanwhile([kept.digest, new.digest]))
    assert [networks.is_prepared(model) for model in (old, kept, new)] == [False, True, True]
