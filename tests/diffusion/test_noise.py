from __future__ import annotations

import hashlib
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from diffusion.noise import (
    MAX_SEED,
    VERSION,
    Purpose,
    _normals_on_device,
    check_seed,
    image_normals,
    normal_table,
    normals,
    philox,
    uniform_words,
)

# Known answers of the Random123 reference implementation: counter, key, output.
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def reference_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's own integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (p1 >> 32) ^ c1 ^ k0,
            p1 & 0xFFFFFFFF,
            (p0 >> 32) ^ c3 ^ k1,
            p0 & 0xFFFFFFFF,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def words(counter: list[int], key: list[int]) -> list[int]:
    out = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    return [int(word) for word in out]


def draw(seeds: list[int], indices: list[int], rows: list[int], shape: tuple[int, ...]) -> Tensor:
    return normals(
        torch.tensor(seeds),
        torch.tensor(indices),
        rows=torch.tensor(rows),
        purpose=Purpose.STEP,
        shape=shape,
    )


@pytest.mark.parametrize(("counter", "key", "wanted"), KNOWN)
def test_philox_known_answers(counter: list[int], key: list[int], wanted: list[int]) -> None:
    assert words(counter, key) == wanted
    assert reference_philox(counter, key) == wanted


def test_philox_agrees_with_big_integers_on_many_counters() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**32, size=(6, 200), dtype=np.int64)
    out = philox(
        tuple(torch.from_numpy(v) for v in values[:4]),
        tuple(torch.from_numpy(v) for v in values[4:]),
    )
    found = torch.stack(out).T.tolist()
    wanted = [reference_philox(list(v[:4]), list(v[4:])) for v in values.T.tolist()]
    assert found == wanted


def test_the_table_of_normals_is_pinned() -> None:
    table = normal_table()
    assert table.shape == (65536,)
    assert table.dtype == torch.float32
    digest = hashlib.sha256(table.numpy().astype("<f4").tobytes()).hexdigest()
    assert digest == "1cfbba1e07e34386a57626f82aeb43e6ed54ba70a3ea6b7d964dc66a841074a8"


def test_the_table_holds_the_inverse_normal_distribution() -> None:
    table = normal_table().double()
    for i in (0, 1, 777, 32767, 32768, 65535):
        wanted = NormalDist().inv_cdf((i + 0.5) / 65536)
        assert table[i].item() == pytest.approx(wanted, rel=1e-6)
    assert torch.equal(table, -table.flip(0))
    assert bool((table.diff() > 0).all())
    assert table.square().mean().item() == pytest.approx(0.99998, abs=5e-6)
    assert table.max().item() < 4.33


def test_each_block_gives_eight_normals_low_half_first() -> None:
    seed, index, row = MAX_SEED, 3, 17
    found = draw([seed], [index], [row], (2, 3, 3))[0].flatten()  # 18 elements: 3 blocks
    table, wanted = normal_table(), []
    for block in range(3):
        counter = [index, row, int(Purpose.STEP), block]
        for word in reference_philox(counter, [seed & 0xFFFFFFFF, seed >> 32]):
            wanted += [table[word & 0xFFFF], table[word >> 16]]
    assert torch.equal(found, torch.stack(wanted[:18]))


def test_noise_is_pinned() -> None:
    """What a seed draws changes only with the version, which manifests carry."""
    assert VERSION == 2 and [int(Purpose.STEP), int(Purpose.CORRECTOR)] == [8, 9]
    z = draw([0, 1, MAX_SEED], [0, 5, 2**31], [0, 999, 7], (1, 28, 28))
    digest = hashlib.sha256(z.numpy().astype("<f4").tobytes()).hexdigest()
    assert digest == "6fadece1a25001652ab257a39837adba4fea461d7e39000c388e74acf8c087c2"


def test_noise_is_the_same_in_any_batch_order_and_subset() -> None:
    seeds, indices, rows = [3, 3, 2**40, 7], [0, 1, 0, 9], [5, 5, 0, 12]
    batch = draw(seeds, indices, rows, (1, 8, 8))
    for i in range(4):
        alone = draw([seeds[i]], [indices[i]], [rows[i]], (1, 8, 8))
        assert torch.equal(batch[i : i + 1], alone)
    order = [2, 0, 3]
    first, second, third = ([values[i] for i in order] for values in (seeds, indices, rows))
    mixed = draw(first, second, third, (1, 8, 8))
    assert torch.equal(mixed, batch[order])


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 5, 7), (1, 1, 1)])
def test_the_path_of_a_cpu_gives_what_a_device_computes(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    seeds = torch.cat([torch.randint(0, MAX_SEED, (6,), generator=generator), torch.tensor([0])])
    indices, rows = torch.randint(0, 2**31, (2, 7), generator=generator)
    purposes = torch.tensor([*Purpose][:7])
    device = _normals_on_device((seeds, indices, rows, purposes), math.prod(shape))
    cpu = normals(seeds, indices, rows=rows, purpose=purposes, shape=shape)
    assert torch.equal(cpu, device.view(-1, *shape))


def test_purposes_may_differ_within_a_batch() -> None:
    seeds, zero = torch.tensor([4, 4]), torch.zeros(2, dtype=torch.long)
    purposes = torch.tensor([int(Purpose.X_T), int(Purpose.CORRECTOR)])
    mixed = normals(seeds, zero, rows=zero, purpose=purposes, shape=(10,))
    for i, purpose in enumerate((Purpose.X_T, Purpose.CORRECTOR)):
        alone = normals(seeds, zero, rows=zero, purpose=purpose, shape=(10,))
        assert torch.equal(mixed[i], alone[i])


def test_every_part_of_the_key_makes_another_stream() -> None:
    """Seed (both halves), image, row and purpose: samples of different streams do not correlate."""
    keys = [(s, i, r, p) for s in (0, 1, 2**32) for i in (0, 1) for r in (0, 1) for p in (0, 1)]
    seeds, indices, rows, purposes = (torch.tensor(column) for column in zip(*keys, strict=True))
    z = normals(seeds, indices, rows=rows, purpose=purposes, shape=(4096,)).double()
    correlation = np.corrcoef(z.numpy()) - np.eye(len(keys))
    assert np.abs(correlation).max() < 5 / math.sqrt(4096)


def test_noise_is_normal() -> None:
    z = draw([11] * 16, list(range(16)), [0] * 16, (64, 64)).flatten()
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    neighbours = (z[1:].double() * z[:-1].double()).mean().item()
    assert abs(neighbours) < 4 / math.sqrt(z.numel())


def test_no_global_random_state_is_used() -> None:
    before = torch.get_rng_state()
    torch.manual_seed(1)
    first = draw([1], [0], [0], (64,))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(draw([1], [0], [0], (64,)), first)
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(before)


def test_uniform_words_are_the_first_block() -> None:
    zero = torch.zeros(2, dtype=torch.long)
    seeds, indices = torch.tensor([9, MAX_SEED]), torch.tensor([4, 5])
    found = uniform_words(seeds, indices, rows=zero + 6, purpose=Purpose.X_T)
    for i, (seed, index) in enumerate(((9, 4), (MAX_SEED, 5))):
        key = [seed & 0xFFFFFFFF, seed >> 32]
        assert found[i].tolist() == reference_philox([index, 6, 0, 0], key)


def test_image_normals_shares_seed_and_row() -> None:
    indices = torch.tensor([2, 8])
    found = image_normals(MAX_SEED, indices, row=3, purpose=Purpose.STEP, shape=(1, 4, 4))
    assert torch.equal(found, draw([MAX_SEED] * 2, [2, 8], [3, 3], (1, 4, 4)))


@pytest.mark.parametrize("seed", [-1, 2**53])
def test_seeds_out_of_range_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"seed = {seed}: must be an integer from 0 to"):
        check_seed(seed)
    with pytest.raises(ValueError, match="seed = "):
        image_normals(seed, torch.arange(1), row=0, purpose=Purpose.X_T, shape=(4,))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_noise_is_the_same_on_a_gpu() -> None:
    seeds, indices = torch.tensor([0, MAX_SEED]), torch.tensor([0, 7])
    rows = torch.tensor([0, 999])
    on_cpu = normals(seeds, indices, rows=rows, purpose=Purpose.STEP, shape=(3, 32, 32))
    on_gpu = normals(
        seeds.cuda(), indices.cuda(), rows=rows.cuda(), purpose=Purpose.STEP, shape=(3, 32, 32)
    )
    assert torch.equal(on_gpu.cpu(), on_cpu)
