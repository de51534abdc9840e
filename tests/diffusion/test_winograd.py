"""Convolutions with a quarter of the products: the operation, the code, and who takes them."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from diffusion import UNet, UNetConfig, cores, winograd
from diffusion.unet import Conv3x3, Upsample

Convolution = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
CLOSE = 2e-5  # of the largest value
SHAPES = [  # N, C, K, H, W of x
    (1, 16, 16, 4, 4),
    (3, 48, 32, 8, 12),  # no whole block of tiles, none of 64 channels
    (7, 32, 80, 16, 16),
    (2, 128, 64, 20, 8),
]
needs_gcc = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


def inputs(n: int, c: int, k: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, c, height, width, generator=generator)
    weight = torch.randn(k, c, 3, 3, generator=generator) / (3 * c**0.5)
    return x, weight, torch.randn(k, generator=generator)


def check(convolve: Convolution, shape: tuple[int, int, int, int, int], doubled: bool) -> None:
    x, weight, bias = inputs(*shape)
    found = convolve(x, weight, bias, doubled)
    seen = F.interpolate(x, scale_factor=2.0) if doubled else x
    expected = F.conv2d(seen.double(), weight.double(), bias.double(), padding=1)
    assert found.shape == expected.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert (found - expected).abs().max() < CLOSE * expected.abs().max()


@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_operation(shape: tuple[int, int, int, int, int], doubled: bool) -> None:
    check(lambda x, w, b, d: winograd.convolution(x, w, b, doubled=d), shape, doubled)


def test_without_a_bias() -> None:
    x, weight, _ = inputs(2, 16, 16, 8, 8)
    found = winograd.convolution(x, weight, None)
    torch.testing.assert_close(found, F.conv2d(x, weight, padding=1), rtol=0, atol=1e-4)


def instructions() -> list[str]:
    """GCC's options for the sets that this processor has."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return ["-march=native"]
    return (
        ["-march=native"] + ["-mavx2 -mfma"] * ("avx2" in flags) + ["-mno-avx"] * ("avx" in flags)
    )


@pytest.fixture(scope="module", params=instructions())
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Convolution:
    """The code itself, for one set of instructions."""
    folder = tmp_path_factory.mktemp("winograd")
    kernel = Path(winograd.__file__).with_name("kernel.h")
    (folder / "called.cpp").write_text(
        f'#include "{kernel}"\n'
        'extern "C" void convolve(const float* x, const float* u, const float* bias, float* y,'
        " const ddpm_winograd::Sizes* sizes) { ddpm_winograd::convolve(x, u, bias, y, *sizes); }\n"
    )
    command = ["g++", "-std=c++20", "-shared", "-fPIC", "-Wall", "-Werror", *request.param.split()]
    subprocess.run([*command, "called.cpp", "-o", "called.so"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "called.so"))

    def convolve(x: Tensor, weight: Tensor, bias: Tensor, doubled: bool) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        u = winograd.transformed(weight)
        n, _, height, width = x.shape
        sides = (height << doubled, width << doubled)
        y = torch.full((n, weight.shape[0], *sides), torch.nan)
        y = y.contiguous(memory_format=torch.channels_last)
        sizes = (ctypes.c_size_t * 6)(n, *sides, x.shape[1], weight.shape[0], doubled)
        pointers = [ctypes.c_void_p(v.data_ptr()) for v in (x, u, bias, y)]
        library.convolve(*pointers, sizes)
        return y

    return convolve


@needs_gcc
@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_code(
    compiled: Convolution, shape: tuple[int, int, int, int, int], doubled: bool
) -> None:
    check(compiled, shape, doubled)


@needs_gcc
def test_rows_of_the_code_stand_alone(compiled: Convolution) -> None:
    """To the bit: which row has which place in a block makes no difference."""
    x, weight, bias = inputs(7, 32, 48, 12, 8)
    whole = compiled(x, weight, bias, False)
    for i in range(7):
        assert torch.equal(compiled(x[i : i + 1], weight, bias, False)[0], whole[i])


@pytest.mark.parametrize(
    ("shape", "dtype", "taken"),
    [
        ((1, 16, 16, 8, 8), torch.float32, True),
        ((1, 16, 16, 8, 8), torch.bfloat16, False),
        ((1, 16, 16, 8, 8), torch.float64, False),
        ((1, 17, 16, 8, 8), torch.float32, False),
        ((1, 16, 8, 8, 8), torch.float32, False),
        ((1, 16, 16, 8, 6), torch.float32, False),
        ((1, 16, 16, 4, 4), torch.float32, False),  # too few pixels
        ((4, 16, 16, 4, 4), torch.float32, True),
        ((8, 256, 256, 8, 8), torch.float32, False),  # too many weights
    ],
)
def test_suits(shape: tuple[int, int, int, int, int], dtype: torch.dtype, taken: bool) -> None:
    x, weight, _ = inputs(*shape)
    assert winograd.suits(x.to(dtype), weight.to(dtype)) is taken


@pytest.mark.usefixtures("a_team")
def test_a_team_keeps_torchs_own() -> None:
    x, weight, _ = inputs(4, 16, 16, 8, 8)
    assert not winograd.suits(x, weight)


@pytest.fixture
def a_team() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_by_itself_a_layer_is_compiled_as_torch_has_it() -> None:
    """Without the code's options, and with gradients by weights alone, as for fine tuning."""
    layer, x = Conv3x3(16, 16), torch.randn(4, 16, 8, 8)
    expected = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    layer.compile(backend="aot_eager")
    found = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    torch.testing.assert_close(found, expected)


def test_a_gradient_by_x_keeps_torchs_own() -> None:
    """Of a copy for evaluation, compiled: it is differentiated by x where something is restored."""
    one, two = Conv3x3(16, 16).requires_grad_(False), Upsample(16).requires_grad_(False)
    one.fewer_products = two.conv.fewer_products = True
    x = torch.randn(4, 16, 8, 8, requires_grad=True)
    for layer in (one, two):
        expected = torch.autograd.grad(layer(x).square().sum(), x)
        compiled = torch.compile(layer, backend="aot_eager")
        found = torch.autograd.grad(compiled(x).square().sum(), x)
        torch.testing.assert_close(found, expected)


def test_what_a_network_is_exported_with() -> None:
    """All 3×3 convolutions of stride 1 between feature maps of float32, and none of bfloat16."""
    config = UNetConfig(
        image_size=16, channels=(16, 32), attention=(False, False), res_blocks=1, groups=8
    )
    network = UNet(config).requires_grad_(False)
    for module in network.modules():
        if isinstance(module, Conv3x3):
            module.fewer_products = True
    x, t = torch.zeros(4, 3, 16, 16), torch.zeros(4)
    suit = sum(isinstance(module, Conv3x3) for module in network.modules())
    with torch.no_grad():
        for dtype, count in ((torch.float32, suit), (torch.bfloat16, 0)):
            network.to(dtype)
            network.conv_in.float()
            program = torch.export.export(network, (x, t), strict=False)
            calls = [n for n in program.graph.nodes if n.target == torch.ops.ddpm.winograd.default]
            assert len(calls) == count
    assert suit == 4 + 4 + 8 + 1  # down, the middle, up, doubled


@needs_gcc
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # torch's own
def test_compiled_by_inductor() -> None:
    """The code is called, and not Python."""

    class Layers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Conv3x3(16, 32), Upsample(32)
            self.one.fewer_products = self.two.conv.fewer_products = True

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.two(self.one(x).relu())
            return out

    layers = Layers().requires_grad_(False)
    x = torch.randn(4, 16, 8, 8)
    expected = layers(x)
    layers.compile(options=cores.compile_options())
    with torch.inference_mode():
        _, code = run_and_get_code(layers, x)
        with torch.profiler.profile() as profile:
            found = layers(x)
    assert "".join(code).count("aoti_torch_cpu_winograd(") >= 1 + 2  # its definition
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert not [event for event in profile.events() if event.name == "ddpm::winograd"]
