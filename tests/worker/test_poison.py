"""Model folders that cannot be served, of every sort: none harms another, each says why."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import diffusion
from diffusion import CheckpointError, Model, UNetConfig
from diffusion.size import feature_bytes
from jobs.cards import ModelCard
from worker import memory
from worker.memory import free_bytes
from worker.models import ModelFolder

Service = Any  # of conftest.py; tests cannot import it
DIGITS = "9" * 5000


def within(part: str, **values: Any) -> Callable[[dict[str, Any]], str]:
    """The configuration with other values in a part of it ("": at the top)."""

    def poison(config: dict[str, Any]) -> str:
        (config[part] if part else config).update(values)
        return json.dumps(config)

    return poison


def digits(config: dict[str, Any]) -> str:
    config["network"]["image_size"] = "DIGITS"
    return json.dumps(config).replace('"DIGITS"', DIGITS)


WIDE = {"image_size": 4096, "channels": [8192] * 6, "attention": [False] * 6}
# What the folder holds → part of what the log must say of it.
POISON: dict[str, tuple[Callable[[dict[str, Any]], str], str]] = {
    "channels": (within("network", channels=[10**9, 10**9]), "channels = 1000000000: must be an"),
    "levels": (within("network", channels=[8] * 10**5), "must be 1..12 levels"),
    "image_size": (within("network", image_size=10**9), "image_size = 1000000000: must be an"),
    "res_blocks": (within("network", res_blocks=10**9), "res_blocks = 1000000000: must be an"),
    "groups": (within("network", groups=10**12), "groups = 1000000000000: must be an"),
    "classes": (within("network", num_classes=10**9), "num_classes = 1000000000: must be an"),
    "flag": (within("network", null_class="no"), "null_class = 'no': must be true or false"),
    "eps": (within("network", norm_eps=float("nan")), "norm_eps = nan: must be"),
    "head_dim": (within("network", head_dim=0.5), "head_dim = 0.5: must be"),
    "no_network": (within("", network=[]), "config.json: "),
    "attention": (
        within("network", image_size=2048, channels=[8, 8], attention=[True, False]),
        "no level with attention is wider than 256",
    ),
    "large": (within("network", **WIDE), "too large for this machine: about"),
    "T": (within("schedule", T=10**12), "T = 1000000000000: must be an integer 1..10000"),
    "T_text": (within("schedule", T="1000"), "T = '1000': must be an integer"),
    "betas": (within("schedule", kind="betas", T=1, betas=[10**400]), "config.json: "),
    "kind": (within("schedule", kind={}), "config.json: "),
    "beta_end": (within("schedule", beta_end={}), "config.json: "),
    "names": (within("", class_names=[{"a": 1}] * 3), "class_names: {'a': 1}: must be a text"),
    "long_names": (within("", class_names=["x" * 10**6] * 3), "must be a text of at most 200"),
    "crop": (within("", crop=[10**9, 1]), "crop = (1000000000, 1): must be a height"),
    "clip": (within("sampling", clip="yes"), "clip = 'yes': must be true or false"),
    "nested": (lambda config: "[" * 10**5 + "]" * 10**5, "nested too deeply"),
    "nested_object": (lambda config: '{"a":' * 10**5 + "1" + "}" * 10**5, "nested too deeply"),
    "digits": (digits, "cannot be read"),
    "huge": (lambda config: " " * (17 * 2**20), "bytes; must be at most"),
}


@pytest.fixture
def good(tmp_path: Path, make_model: Callable[..., Model]) -> Path:
    diffusion.save(make_model(), tmp_path / "good")
    return tmp_path / "good"


def poisoned(good: Path, name: str, text: str) -> Path:
    """A folder with the good one's weights and another configuration."""
    folder = good.parent / name
    folder.mkdir()
    (folder / "config.json").write_text(text)
    (folder / "model.safetensors").hardlink_to(good / "model.safetensors")
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


@pytest.mark.parametrize("name", sorted(POISON))
def test_a_poisoned_configuration_is_refused_in_a_sentence(good: Path, name: str) -> None:
    make, said = POISON[name]
    folder = poisoned(good, "bad", make(config_of(good)))
    with pytest.raises(CheckpointError) as refused:
        diffusion.load(folder, memory=free_bytes("cpu"))
    assert str(refused.value).startswith(str(folder)) and said in str(refused.value)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("name", ["model.safetensors", "card.json", "thumbnail.png"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(good: Path, name: str) -> None:
    (good / name).unlink(missing_ok=True)
    os.mkfifo(good / name)
    folder = ModelFolder(good.parent, queue="ddpm")
    folder.rescan()
    assert set(folder.served) == (set() if name == "model.safetensors" else {"good"})


def test_a_fresh_worker_serves_the_good_model_among_all_the_poison(
    service: Service, good: Path
) -> None:
    for name, (make, _) in POISON.items():
        poisoned(good, name, make(config_of(good)))
    theirs = poisoned(good, "theirs", json.dumps({"_class_name": "UNet2DModel"}))
    (theirs / "scheduler_config.json").write_text(json.dumps({"num_train_timesteps": 10**12}))
    (good.parent / "not a name").mkdir()
    for path in good.iterdir():
        (good.parent / "not a name" / path.name).hardlink_to(path)
    service.models = good.parent
    process = service.worker()
    names = [*POISON, "theirs"]
    # A worker lives from its first model on, and looks at all others meanwhile.
    service.until(
        lambda: all(f"model {name} cannot be served: " in service.log.read_text() for name in names)
    )
    assert set(service.store.cards()) == {"good"}
    log = service.log.read_text()
    for name in POISON:
        assert log.count(f"model {name} cannot be served: ") == 1, name
    assert log.count("folder 'not a name' is not served: the name of a model must be") == 1
    assert "Traceback" not in log  # each was foreseen
    assert psutil.Process(process.pid).memory_info().rss < 2 * 2**30
    peak = Path(f"/proc/{process.pid}/status")
    if peak.exists():
        (line,) = [line for line in peak.read_text().splitlines() if line.startswith("VmHWM")]
        assert int(line.split()[1]) * 1024 < 2 * 2**30


def test_any_exception_is_held_by_its_folder(
    good: Path, make_model: Callable[..., Model], caplog: pytest.LogCaptureFixture
) -> None:
    diffusion.save(make_model(seed=1), good.parent / "aaa")
    shown: list[str] = []

    def prepare(served: Any) -> None:
        if served.name == "aaa":
            raise MemoryError

    folder = ModelFolder(good.parent, queue="q")
    changes = folder.rescan(prepare=prepare, publish=lambda served: shown.append(served.name))
    assert [served.name for served in changes.loaded] == shown == ["good"]
    assert set(folder.served) == {"good"}
    assert "model aaa cannot be served: MemoryError()" in caplog.text
    assert folder.rescan(prepare=prepare).loaded == ()  # not again until it changes


def test_a_card_that_could_not_be_published_is_tried_again(good: Path) -> None:
    folder = ModelFolder(good.parent, queue="q")

    def away(served: Any) -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        folder.rescan(publish=away)
    shown: list[str] = []
    folder.rescan(publish=lambda served: shown.append(served.name))
    assert shown == ["good"]


def test_each_model_is_published_before_the_next_is_loaded(
    good: Path, make_model: Callable[..., Model]
) -> None:
    diffusion.save(make_model(seed=1), good.parent / "aaa")
    (good.parent / "aaa" / "larger").write_bytes(bytes(10))
    steps: list[str] = []
    ModelFolder(good.parent, queue="q").rescan(
        prepare=lambda served: steps.append(f"prepare {served.name}"),
        publish=lambda served: steps.append(f"publish {served.name}"),
    )
    assert steps == ["prepare good", "publish good", "prepare aaa", "publish aaa"]


def test_the_estimate_covers_what_a_forward_pass_takes() -> None:
    config = UNetConfig(image_size=32, in_channels=1, channels=(64, 64), attention=(False, False))
    # Kept for the way up at the least: the input, and each block's output (and the halved one).
    least = 4 * (64 * 32 * 32 * 3 + 64 * 16 * 16 * 3)
    assert least < feature_bytes(config) < 20 * least
    assert feature_bytes(UNetConfig()) < 2**30


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = free_bytes("cpu")
    if os.path.exists("/proc/meminfo"):
        assert here is not None and here > 2**20
    for name, value in {"max": "1000000", "current": "400000", "stat": "inactive_file 5"}.items():
        (tmp_path / f"memory.{name}").write_text(value)
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    assert free_bytes("cpu") == 600_005
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes("cpu") != 600_005


def test_the_card_of_the_largest_schedule_is_accepted(make_model: Callable[..., Model]) -> None:
    from worker.models import card_of

    card = card_of(make_model(T=10_000), "m", "q")
    assert ModelCard.model_validate_json(card.model_dump_json()).T == 10_000
