from __future__ import annotations

import math

import pytest
import torch

from diffusion import UNet, UNetConfig
from diffusion.unet import timestep_embedding
from diffusion.unet_config import NetworkConfigError
from tests.diffusion.networks import TINY, build_model, randomize

PAPER = UNetConfig()
PAPER_256 = UNetConfig(
    image_size=256,
    channels=(128, 128, 256, 256, 512, 512),
    attention=(False, False, False, False, True, False),
)
MNIST = UNetConfig(
    in_channels=1, channels=(32, 64, 64), attention=(False, True, False), num_classes=0
)


def count_parameters(config: UNetConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(config).parameters())


@pytest.mark.parametrize(
    ("config", "count"),
    [(PAPER, 35_746_307), (PAPER_256, 113_673_219), (MNIST, 1_623_169)],
    ids=["paper", "paper-256", "mnist"],
)
def test_parameter_counts(config: UNetConfig, count: int) -> None:
    assert count_parameters(config) == count


def test_labels_add_one_row_each() -> None:
    labelled = UNetConfig(
        in_channels=1,
        channels=(32, 64, 64),
        attention=(False, True, False),
        num_classes=10,
        null_class=True,
    )
    assert count_parameters(labelled) == count_parameters(MNIST) + 11 * 4 * 32


def test_timestep_features_by_hand() -> None:
    t, dim = torch.tensor([0, 7, 999]), 8
    found = timestep_embedding(t, dim)
    for i, step in enumerate(t.tolist()):
        angles = [step * math.exp(-math.log(10_000) * k / 3) for k in range(4)]
        wanted = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        torch.testing.assert_close(found[i], torch.tensor(wanted), rtol=0, atol=1e-4)
    flipped = timestep_embedding(t, dim, cos_first=True)
    assert torch.equal(flipped, torch.cat([found[:, 4:], found[:, :4]], dim=1))
    shifted = timestep_embedding(t, dim, freq_shift=0)
    assert shifted[1, 1].item() == pytest.approx(math.sin(7 * 10_000**-0.25), abs=1e-5)


@torch.inference_mode()
def test_a_fresh_network_predicts_almost_nothing() -> None:
    torch.manual_seed(0)
    out = UNet(TINY)(torch.randn(2, 1, 8, 8), torch.tensor([0, 50]))
    assert 0 < out.abs().max() < 1e-3  # the last convolution starts at the scale 1e-10


def test_the_shape_of_the_output() -> None:
    network = UNet(UNetConfig(**{**vars(TINY), "in_channels": 2, "learned_variance": True}))
    out = network(torch.randn(3, 2, 8, 8), torch.tensor([0, 1, 2]), torch.tensor([0, 1, 3]))
    assert out.shape == (3, 4, 8, 8)


def test_rows_of_a_batch_do_not_touch_each_other() -> None:
    model = build_model()
    x, t, labels = torch.randn(3, 1, 8, 8), torch.tensor([5, 90, 31]), torch.tensor([0, 3, 2])
    batch = model.network(x, t, labels)
    for i in range(3):
        alone = model.network(x[i : i + 1], t[i : i + 1], labels[i : i + 1])
        torch.testing.assert_close(batch[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_time_and_label_reach_the_output() -> None:
    network = build_model().network
    x = torch.randn(1, 1, 8, 8)
    outs = [
        network(x, torch.tensor([t]), torch.tensor([label]))
        for t, label in ((0, 0), (9, 0), (0, 1))
    ]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (outs[i] - outs[j]).abs().max() > 1e-3


def test_no_label_means_the_null_label() -> None:
    network = build_model().network
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 4])
    assert torch.equal(network(x, t), network(x, t, torch.tensor([3, 3])))


def test_labels_are_refused_where_they_mean_nothing_and_demanded_where_needed() -> None:
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([3])
    with pytest.raises(ValueError, match="class_label: this network is unconditional"):
        UNet(UNetConfig(**{**vars(TINY), "num_classes": 0, "null_class": False}))(x, t, t)
    with pytest.raises(ValueError, match=r"class_label = None: .* needs a label 0\.\.2"):
        UNet(UNetConfig(**{**vars(TINY), "null_class": False}))(x, t)


def test_every_weight_receives_a_gradient() -> None:
    network = UNet(TINY)
    randomize(network)
    network.requires_grad_(True)
    x, t, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 9, 50, 99]), torch.tensor([0, 1, 2, 3])
    network(x, t, labels).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_dropout_acts_in_training_only() -> None:
    network = UNet(UNetConfig(**{**vars(TINY), "dropout": 0.5}))
    randomize(network)
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([3])
    assert torch.equal(network(x, t), network(x, t))
    network.train()
    assert not torch.equal(network(x, t), network(x, t))


def test_lists_from_json_make_the_same_config() -> None:
    raw = {**vars(TINY), "channels": [8, 16], "attention": [False, True]}
    assert UNetConfig(**raw) == TINY
    assert hash(UNetConfig(**raw)) == hash(TINY)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 0}, "image_size = 0: must be an integer 1..4096"),
        ({"image_size": 9}, "image_size = 9: must be a multiple of 2 for 2 levels"),
        ({"image_size": "8"}, "image_size = '8': must be an integer 1..4096"),
        ({"in_channels": 0}, "in_channels = 0"),
        ({"channels": ()}, r"channels = \(\): must be 1..12 levels"),
        ({"channels": (8, 18)}, "channels = 18: must be multiples of groups = 4"),
        ({"channels": (9, 9), "groups": 3}, "channels = 9: must be an even first width"),
        ({"attention": (True,)}, r"attention = \(True,\): must be one flag for each of the 2"),
        ({"res_blocks": 0}, "res_blocks = 0"),
        ({"head_dim": 5}, "head_dim = 5: must be None or a divisor of 16"),
        ({"head_dim": 0}, "head_dim = 0"),
        ({"downsample_padding": 2}, "downsample_padding = 2: must be 0 or 1"),
        ({"freq_shift": 4}, "freq_shift = 4: must be below 4"),
        ({"dropout": 1.0}, "dropout = 1.0: must be 0 ≤ dropout < 1"),
        (
            {"num_classes": -1, "null_class": False},
            "num_classes = -1: must be an integer 0..100000",
        ),
        ({"num_classes": 0}, "null_class = True"),
    ],
)
def test_impossible_networks_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(NetworkConfigError, match=message):
        UNetConfig(**{**vars(TINY), **fields})


def test_heads_need_only_divide_the_widths_that_attend() -> None:
    fields = {**vars(TINY), "head_dim": 16}  # the first level, 8 wide, has no attention
    network = UNet(UNetConfig(**fields))
    assert network(torch.randn(1, 1, 8, 8), torch.tensor([0])).shape == (1, 1, 8, 8)


@pytest.mark.parametrize(("groups", "deaf"), [(4, []), (8, [0])])
def test_levels_that_hear_nothing_of_t_and_label(groups: int, deaf: list[int]) -> None:
    config = UNetConfig(**{**vars(TINY), "groups": groups})
    assert config.deaf_levels == deaf
    network = UNet(config)
    randomize(network)
    generator = torch.Generator().manual_seed(0)
    for i, level in enumerate(network.down):
        x = torch.randn(1, level.res[0].conv1.in_channels, 8, 8, generator=generator)
        one, other = level.res[0].emb(torch.randn(2, 1, 32, generator=generator))
        change = (level(0, x, one) - level(0, x, other)).abs().max()
        assert change < 1e-4 if i in deaf else change > 0.1
