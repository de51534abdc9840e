"""What compiled code and training run on a CPU in place of torch's own layers."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion import UNet, cpu_layers, gpu_layers
from tests.diffusion.networks import TINY, randomize


def check(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Values and gradients to all inputs."""
    found, expected = ours(*inputs), theirs(*inputs)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    up = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for one, other in zip(
        torch.autograd.grad(found, inputs, up),
        torch.autograd.grad(expected, inputs, up),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def leaf(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).requires_grad_()


@pytest.mark.parametrize("channels", [8, 16, 24])
def test_group_norm(channels: int) -> None:
    offset = 3 * leaf(channels, 1, 1, seed=2).detach()
    check(
        lambda x, w, b: cpu_layers.group_norm(x + offset, 8, weight=w, bias=b, eps=1e-6),
        lambda x, w, b: F.group_norm(x + offset, 8, w, b, 1e-6),
        leaf(3, channels, 5, 6),
        leaf(channels, seed=3),
        leaf(channels, seed=4),
    )


@pytest.mark.parametrize("layers", [cpu_layers, gpu_layers], ids=["cpu", "gpu"])
def test_group_norm_keeps_its_digits_under_autocast(layers: ModuleType) -> None:
    """The difference of two moments is nothing for bfloat16."""
    x = 3 + leaf(2, 16, 8, 8).detach()
    weight, bias = leaf(16, seed=3).detach(), leaf(16, seed=4).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layers.group_norm(x, 4, weight=weight, bias=bias, eps=1e-6)
    torch.testing.assert_close(found, F.group_norm(x, 4, weight, bias, 1e-6), atol=2e-5, rtol=0)


def test_silu() -> None:
    check(cpu_layers.silu, F.silu, (20 * leaf(1000)).detach().requires_grad_())


def test_silu_at_the_ends() -> None:
    """No 0·∞ and no overflow that shows, nor in the gradient."""
    x = torch.tensor([-200.0, -90.0, 0.0, 90.0, 200.0], requires_grad=True)
    out = cpu_layers.silu(x)
    assert out.tolist() == pytest.approx(F.silu(x).tolist(), abs=1e-30)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient.tolist() == pytest.approx([0, 0, 0.5, 1, 1], abs=1e-30)


def test_silu_of_every_bfloat16() -> None:
    """Off by one in the last digit where rounding was a near thing, and below 1e-5 by that."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()]
    expected = F.silu(x.double())
    found = cpu_layers.silu_forward(x).double()
    torch.testing.assert_close(found, expected, rtol=2**-8, atol=1e-5)
    plain = expected.abs() > 1e-4
    same = (found == expected.to(torch.bfloat16).double())[plain]
    assert plain.sum() > 15_000 and same.double().mean() > 0.99


def test_silu_of_float32() -> None:
    """To a millionth, or so much of the value; far below 0 both are nothing."""
    x = torch.cat(
        [torch.linspace(-30, 30, 60_001), torch.tensor([-1e30, -200.0, -90.0, 200.0, 1e30])]
    )
    found, expected = cpu_layers.silu_forward(x).double(), F.silu(x.double())
    torch.testing.assert_close(found, expected, rtol=5e-7, atol=1e-6)


def test_double() -> None:
    check(cpu_layers.double, lambda x: F.interpolate(x, scale_factor=2.0), leaf(2, 3, 4, 5))


def test_double_keeps_channels_last() -> None:
    x = leaf(2, 3, 4, 5).detach().to(memory_format=torch.channels_last)
    assert cpu_layers.double(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (4, 5), (6, 2)])
def test_doubled_convolution(height: int, width: int) -> None:
    check(
        cpu_layers.doubled_convolution,
        lambda x, w, b: F.conv2d(F.interpolate(x, scale_factor=2.0), w, b, padding=1),
        leaf(2, 3, height, width),
        leaf(7, 3, 3, 3, seed=3),
        leaf(7, seed=4),
    )


def test_doubled_convolution_keeps_channels_last() -> None:
    x = leaf(2, 3, 4, 5).detach().to(memory_format=torch.channels_last)
    out = cpu_layers.doubled_convolution(x, leaf(7, 3, 3, 3).detach(), None)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_attend() -> None:
    q, k, v = (leaf(2, 3, 16, 8, seed=seed) for seed in range(3))
    check(cpu_layers.attend, F.scaled_dot_product_attention, q, k, v)


@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_attend_forward_of_bfloat16(spread: float) -> None:
    """Not further from the exact values than torch's own; weights of one and of nothing, too."""
    q, k, v = (leaf(2, 3, 64, 8, seed=seed).detach().to(torch.bfloat16) for seed in range(3))
    q = q * spread
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    ours = (cpu_layers.attend_forward(q, k, v) - exact).square().mean()
    theirs = (cpu_layers.attend(q, k, v) - exact).square().mean()
    assert ours <= 1.1 * theirs < 1e-3


@pytest.mark.parametrize("spread", [1.0, 30.0, 1000.0])
def test_attend_forward_of_float32(spread: float) -> None:
    q, k, v = (leaf(2, 3, 64, 8, seed=seed).detach() for seed in range(3))
    exact = F.scaled_dot_product_attention(spread * q.double(), k.double(), v.double())
    # What the scores are rounded by, the weights are off by.
    difference = (cpu_layers.attend_forward(spread * q, k, v) - exact).abs().max()
    assert difference < 4e-6 + 4e-7 * spread


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # torch's own
def test_compiled_training_has_the_gradients_of_eager_training() -> None:
    """The whole network, with every layer above in it; traced, but not turned into C++."""
    network = randomize(UNet(TINY)).requires_grad_()
    x, t = leaf(2, TINY.in_channels, TINY.image_size, TINY.image_size).detach(), torch.arange(2)

    def gradients(forward: Callable[..., Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(forward(x, t).square().mean(), [*network.parameters()]))

    eager, compiled = gradients(network), gradients(torch.compile(network, backend="aot_eager"))
    for one, other in zip(compiled, eager, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)
