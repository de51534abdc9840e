"""Our network against diffusers' `UNet2DModel` with the same random weights."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import diffusion
from diffusion.checkpoint import convert
from diffusion.diffusers.folder import export_diffusers
from diffusion.samplers import SamplingDefaults
from tests.diffusion.networks import build_model, randomize
from tests.diffusion.steps import one_step


def down(*attention: int) -> dict[str, Any]:
    """Block types with attention where a flag is set, finest level first."""
    return {
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)],
    }


# The conventions of the paper and of the google/ddpm-* checkpoints.
GOOGLE = {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6}
CONFIGS: dict[str, dict[str, Any]] = {
    "paper": {
        **GOOGLE,
        **down(0, 1, 0, 0),
        "sample_size": 32,
        "block_out_channels": (128, 256, 256, 256),
        "attention_head_dim": None,
    },
    "small-grey": {
        **GOOGLE,
        **down(0, 1, 0),
        "sample_size": 32,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (32, 64, 64),
        "attention_head_dim": None,
    },
    "labels": {
        **down(1, 0),
        "sample_size": 16,
        "block_out_channels": (32, 48),
        "norm_num_groups": 16,
        "attention_head_dim": None,
        "num_class_embeds": 11,
        "dropout": 0.1,
    },
    "heads": {
        **down(1, 0, 1),
        "sample_size": 16,
        "block_out_channels": (32, 64, 96),
        "attention_head_dim": 8,
        "layers_per_block": 1,
    },
    "learned-variance": {
        **down(0, 0),
        "sample_size": 12,
        "in_channels": 2,
        "out_channels": 4,
        "block_out_channels": (24, 24),
        "norm_num_groups": 6,
        "layers_per_block": 3,
        "freq_shift": 0.5,
    },
    "one-level": {**down(1), "sample_size": 5, "block_out_channels": (32,)},
}


def build(diffusers: ModuleType, name: str) -> Any:
    """Their network, every weight random."""
    return randomize(diffusers.UNet2DModel(**CONFIGS[name]))


def inputs(network: Any, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """x, t and, for a network with classes, labels."""
    config = network.config
    generator = torch.Generator().manual_seed(1)
    shape = (batch, config.in_channels, config.sample_size, config.sample_size)
    t = torch.tensor([999, 3])[:batch]
    labels = torch.tensor([10, 0])[:batch] if config.num_class_embeds else None
    return torch.randn(shape, generator=generator), t, labels


def save_pipeline(diffusers: ModuleType, network: Any, folder: Path, **scheduler: Any) -> None:
    """What a user of diffusers has on disk."""
    if network.config.out_channels != network.config.in_channels:
        scheduler = {"variance_type": "learned_range", **scheduler}
    pipeline = diffusers.DDPMPipeline(network, diffusers.DDPMScheduler(**scheduler))
    pipeline.save_pretrained(folder)


def meaning(config: Any) -> dict[str, Any]:
    """A config without metadata, its sequences as lists."""
    fields = {name: value for name, value in config.items() if not name.startswith("_")}
    return {n: list(v) if isinstance(v, list | tuple) else v for n, v in fields.items()}


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_the_output_is_theirs(diffusers: ModuleType, tmp_path: Path, name: str) -> None:
    theirs = build(diffusers, name)
    save_pipeline(diffusers, theirs, tmp_path)
    model = diffusion.load(tmp_path)
    x, t, labels = inputs(theirs, batch=1 if name == "paper" else 2)
    wanted = theirs(x, t, labels).sample
    assert wanted.std() > 0.05  # the weights do something
    found = model.output(x, t, labels)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert torch.equal(model.eps(x, t, labels), found[:, : x.shape[1]])


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - {"paper"}))
@torch.inference_mode()
def test_our_export_is_their_model(diffusers: ModuleType, tmp_path: Path, name: str) -> None:
    theirs = build(diffusers, name)
    save_pipeline(diffusers, theirs, tmp_path / "theirs")
    export_diffusers(diffusion.load(tmp_path / "theirs"), tmp_path / "ours")
    back = diffusers.DDPMPipeline.from_pretrained(tmp_path / "ours").unet
    assert meaning(back.config) == meaning(theirs.config)
    for parameter, wanted in zip(back.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(parameter, wanted)
    x, t, labels = inputs(theirs)
    wanted = theirs(x, t, labels).sample
    assert (back(x, t, labels).sample - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@torch.inference_mode()
def test_a_checkpoint_of_ours_survives_the_way_there_and_back(
    diffusers: ModuleType, tmp_path: Path
) -> None:
    model = build_model(
        class_names=("a", "b", "c"),
        crop=(6, 6),
        prediction="v",
        sampling=SamplingDefaults("ddim", clip=False, landing="stride"),
    )
    diffusion.save(model, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", "diffusers")
    convert(tmp_path / "theirs", tmp_path / "back", "ours")
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "theirs" / "unet")
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 77]), torch.tensor([2, 3])
    wanted = model.output(x, t, labels)
    found = theirs(x, t, labels).sample
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    back = diffusion.load(tmp_path / "back")
    assert back.config == model.config
    assert diffusion.load(tmp_path / "theirs").config == model.config
    assert torch.equal(back.output(x, t, labels), wanted)


@torch.inference_mode()
def test_the_flat_layout_and_old_names_of_the_first_checkpoints(
    diffusers: ModuleType, tmp_path: Path
) -> None:
    """google/ddpm-* keep all files in one folder, with attention weights named otherwise."""
    from safetensors.torch import load_file, save_file

    theirs = build(diffusers, "small-grey")
    save_pipeline(diffusers, theirs, tmp_path)
    for part in ("unet", "scheduler"):
        for path in (tmp_path / part).iterdir():
            path.rename(tmp_path / path.name)
        (tmp_path / part).rmdir()
    weights_path = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    weights = {}
    for name, tensor in load_file(weights_path).items():
        for new_name, old_name in old.items():
            name = name.replace(new_name, old_name)
        weights[name] = tensor
    assert any("proj_attn" in name for name in weights)
    save_file(weights, weights_path, metadata={"format": "pt"})
    x, t, _ = inputs(theirs)
    wanted = theirs(x, t).sample
    found = diffusion.load(tmp_path).output(x, t)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@torch.inference_mode()
def test_a_lone_network_has_the_default_scheduler(diffusers: ModuleType, tmp_path: Path) -> None:
    theirs = build(diffusers, "one-level")
    theirs.save_pretrained(tmp_path)
    model = diffusion.load(tmp_path)
    x, t, _ = inputs(theirs)
    wanted = theirs(x, t).sample
    assert (model.output(x, t) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    betas = torch.tensor(model.schedule.betas, dtype=torch.float32)
    torch.testing.assert_close(betas, diffusers.DDPMScheduler().betas)


@torch.inference_mode()
def test_half_precision_weights_are_read_as_floats(diffusers: ModuleType, tmp_path: Path) -> None:
    theirs = build(diffusers, "one-level").half()
    save_pipeline(diffusers, theirs, tmp_path)
    model = diffusion.load(tmp_path)
    assert model.network.conv_in.weight.dtype == torch.float32
    assert torch.equal(model.network.conv_in.weight, theirs.conv_in.weight.float())


@torch.inference_mode()
def test_their_pipeline_draws_what_our_table_draws(diffusers: ModuleType, tmp_path: Path) -> None:
    """A whole picture: our export in their pipeline, the same noise through our table."""
    from diffusion.samplers import build_table

    model = build_model(
        diffusion.UNetConfig(8, 1, channels=(8, 16), attention=(False, True), groups=4),
        sampling=SamplingDefaults(variance="small", spacing="leading"),
    )
    export_diffusers(model, tmp_path)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    wanted = pipeline(2, generator, num_inference_steps=10, output_type="np").images

    defaults = model.config.sampling
    table = build_table(
        model.schedule, steps=10, spacing=defaults.spacing, variance=defaults.variance
    )
    generator.manual_seed(0)
    x = torch.randn(2, 1, 8, 8, generator=generator)
    for row, t in enumerate(table.t.tolist()):
        eps = model.eps(x, torch.tensor([t, t]))
        z = torch.randn(2, 1, 8, 8, generator=generator) if t > 0 else torch.zeros_like(x)
        _, x = one_step(model.schedule, table, row, x, eps, z=z)
    found = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(found, torch.from_numpy(wanted), rtol=0, atol=1e-4)
