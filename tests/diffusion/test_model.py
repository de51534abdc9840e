from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion import CheckpointError, Model, ModelConfig, ScheduleConfig, UNetConfig, load, save
from diffusion.parameterization import PREDICTIONS, to_eps, to_x_start
from diffusion.samplers import SamplingDefaults
from tests.diffusion.networks import SHORT, TINY, build_model


@pytest.fixture
def folder(model: Model, tmp_path: Path) -> Path:
    save(model, tmp_path / "model")
    return tmp_path / "model"


def outputs_agree(first: Model, second: Model) -> bool:
    x, t = torch.randn(2, *first.shape), torch.tensor([0, 57])
    return torch.equal(first.eps(x, t), second.eps(x, t))


# The folder


def test_a_checkpoint_comes_back_to_the_bit(tmp_path: Path) -> None:
    model = build_model(
        class_names=("zero", "one", "zwei"),
        prediction="v",
        crop=(6, 7),
        sampling=SamplingDefaults("ddim", variance="small", clip=False, spacing="leading"),
        schedule=ScheduleConfig.from_betas([0.01 * (i + 1) for i in range(60)]),
    )
    save(model, tmp_path / "a" / "b")
    back = load(tmp_path / "a" / "b")
    assert back.config == model.config
    assert outputs_agree(model, back)
    for name, weight in model.network.state_dict().items():
        assert torch.equal(weight, back.network.state_dict()[name])
    assert not back.network.training
    assert not any(p.requires_grad for p in back.network.parameters())


def test_the_folder_holds_two_files_and_no_code(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text())["format"] == 1


def test_the_digest_is_that_of_config_and_weights(folder: Path) -> None:
    content = (folder / "config.json").read_bytes() + (folder / "model.safetensors").read_bytes()
    assert load(folder).digest == hashlib.sha256(content).hexdigest()


def test_saving_again_replaces_the_checkpoint(folder: Path) -> None:
    before = load(folder).digest
    save(build_model(dataclasses.replace(TINY, res_blocks=2)), folder)
    assert load(folder).config.network.res_blocks == 2
    assert load(folder).digest != before


def test_a_config_without_sampling_defaults_has_ours(folder: Path) -> None:
    edit(folder, lambda raw: raw.pop("sampling"))
    assert load(folder).config.sampling == SamplingDefaults()


# Broken folders


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def test_a_missing_folder_or_file_is_named(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere/config.json: no such file"):
        load(folder / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors: no such file"):
        load(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "\xff"])
def test_a_config_that_is_no_json_object_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config.json: "):
        load(folder)


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_truncated_weights_are_refused(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model.safetensors: broken weights file"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(format=2), "format = 2: this version reads format 1"),
        (lambda raw: raw.pop("format"), "format = None"),
        (lambda raw: raw.pop("network"), "network: missing"),
        (lambda raw: raw.pop("schedule"), "schedule: missing"),
        (lambda raw: raw.update(colour="red"), "colour: unknown field"),
        (lambda raw: raw["network"].update(depth=3), "network.depth: unknown field"),
        (lambda raw: raw.update(network=5), "network = 5: must be an object"),
        (lambda raw: raw.update(sampling=None), "sampling = None: must be an object"),
        (lambda raw: raw["network"].update(channels=8), "channels = 8: must be a list"),
        (lambda raw: raw["network"].update(attention=True), "attention = True: must be a list"),
        (lambda raw: raw.update(class_names="abc"), "class_names = 'abc': must be a list"),
        (lambda raw: raw.update(class_names=None), "class_names = None: must be a list"),
        (lambda raw: raw.update(crop=5), "crop = 5: must be a list"),
        (
            lambda raw: raw.update(schedule={"kind": "betas", "T": 1, "betas": 3}),
            "betas = 3: must be a list",
        ),
        (
            lambda raw: raw.update(schedule={"kind": "betas", "T": 1, "betas": ["x"]}),
            r"betas\[0\] = 'x': must be a finite number",
        ),
        (lambda raw: raw["network"].update(res_blocks=0), "res_blocks = 0"),
        (lambda raw: raw["schedule"].update(kind="cubic"), "kind = 'cubic'"),
        (lambda raw: raw["schedule"].update(beta_end=2.0), r"beta_end = 2.0: must be 0\.\.1"),
        (lambda raw: raw["sampling"].update(sampler="euler"), "sampler = 'euler'"),
        (lambda raw: raw["sampling"].update(variance="learned"), "learned_variance"),
        (lambda raw: raw.update(prediction="x0"), "prediction = 'x0'"),
        (lambda raw: raw.update(class_names=["a"]), "class_names: 1 names for num_classes = 3"),
    ],
)
def test_bad_fields_are_named(
    folder: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit(folder, change)
    with pytest.raises(CheckpointError, match=rf"config.json: .*{message}"):
        load(folder)


def test_weights_of_another_network_are_refused(folder: Path) -> None:
    edit(folder, lambda raw: raw["network"].update(channels=[8, 24]))
    message = r"safetensors: weights do not fit the network: "
    wider = (
        r"down.1.res.0.conv1.weight has the shape \[16, 8, 3, 3\], must be \[24, 8, 3, 3\] \(and "
    )
    with pytest.raises(CheckpointError, match=message + wider):
        load(folder)
    edit(folder, lambda raw: raw["network"].update(channels=[8, 16], res_blocks=2))
    with pytest.raises(CheckpointError, match=message + "down.0.res.1.norm1.weight is missing"):
        load(folder)
    edit(folder, lambda raw: raw["network"].update(res_blocks=1, num_classes=0, null_class=False))
    with pytest.raises(CheckpointError, match=message + "label.weight is not part of it"):
        load(folder)


# The model


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_eps_is_converted_from_any_parameterisation(prediction: str) -> None:
    model = build_model(prediction=prediction)
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0, 40, 99])
    out = model.output(x, t)
    wanted = to_eps(model.schedule, prediction, x_t=x, t=t, out=out)
    torch.testing.assert_close(model.eps(x, t), wanted, rtol=1e-6, atol=1e-6)
    if prediction == "epsilon":
        assert torch.equal(model.eps(x, t), out)


@pytest.mark.parametrize("prediction", ["v", "sample"])
@pytest.mark.parametrize("t", [0, 500, 999])
def test_x_start_comes_straight_from_the_output(prediction: str, t: int) -> None:
    """By way of ε in float32 it was 0.005 off at the last t of the cosine schedule."""
    model = build_model(prediction=prediction, schedule=ScheduleConfig("cosine"))
    generator = torch.Generator().manual_seed(0)
    x, out = torch.randn(2, 1, 1, 8, 8, generator=generator).unbind(0)
    at = torch.tensor([t])
    found = model.read(out, x, at)
    wanted = to_x_start(model.schedule, prediction, x_t=x.double(), t=at, out=out.double())
    assert (found.x_start - wanted).abs().max() < 1e-6
    eps = to_eps(model.schedule, prediction, x_t=x.double(), t=at, out=out.double())
    torch.testing.assert_close(found.eps.double(), eps, rtol=1e-5, atol=1e-6)


def test_a_learned_variance_is_no_part_of_eps() -> None:
    model = build_model(dataclasses.replace(TINY, learned_variance=True))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0, 99])
    out = model.output(x, t)
    assert out.shape == (2, 2, 8, 8)
    assert torch.equal(model.eps(x, t), out[:, :1])


def test_shape_and_device(model: Model) -> None:
    assert model.shape == (1, 8, 8)
    assert model.device == torch.device("cpu")


def test_eps_keeps_double_precision(model: Model) -> None:
    x, t = torch.randn(1, 1, 8, 8, dtype=torch.float64), torch.tensor([4])
    model.network.double()
    assert model.eps(x, t).dtype == torch.float64
    model.network.bfloat16()
    assert model.eps(x.float(), t).dtype == torch.float32


def test_a_config_survives_json() -> None:
    config = ModelConfig(UNetConfig(), ScheduleConfig("cosine", T=9), crop=(28, 28))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_class_names_must_be_as_many_as_the_classes() -> None:
    with pytest.raises(CheckpointError, match="class_names: 2 names for num_classes = 3"):
        ModelConfig(TINY, SHORT, class_names=("a", "b"))
