"""How the rows of a batch are dealt to the cores, and how many cores there are."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion import cores

ROOT = Path(__file__).parents[2]


def fake(root: Path, groups: str, files: dict[str, str]) -> Path:
    """A tree as the kernel shows it."""
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_quota_of_version_2_is_the_least_of_all_groups_above(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/a/b"
    files = {
        f"{group}/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/a/cpu.max": "50000 100000\n",
    }
    assert cores.quota(fake(tmp_path, "0::/a/b\n", files)) == 0.5
    fake(tmp_path, "0::/a/b\n", {"sys/fs/cgroup/a/cpu.max": "max 100000\n"})
    assert cores.quota(tmp_path) == 1.5


def test_quota_in_a_container_of_version_2(tmp_path: Path) -> None:
    """Its group is the root of what is mounted there, whatever path the process is told."""
    files = {"sys/fs/cgroup/cpu.max": "25000 50000\n"}
    assert cores.quota(fake(tmp_path / "own", "0::/\n", files)) == 0.5
    assert cores.quota(fake(tmp_path / "host", "0::/../docker/123\n", files)) == 0.5


def test_quota_of_version_1(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/cpu,cpuacct/x"
    files = {f"{folder}/cpu.cfs_quota_us": "200000\n", f"{folder}/cpu.cfs_period_us": "100000\n"}
    root = fake(tmp_path, "4:memory:/y\n3:cpu,cpuacct:/x\n", files)
    assert cores.quota(root) == 2
    (root / folder / "cpu.cfs_quota_us").write_text("-1\n")
    assert cores.quota(root) is None


def test_no_quota(tmp_path: Path) -> None:
    assert cores.quota(tmp_path) is None  # no Linux
    assert cores.quota(fake(tmp_path, "0::/\n", {})) is None
    assert cores.quota(fake(tmp_path, "0::/\n", {"sys/fs/cgroup/cpu.max": "nonsense"})) is None


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[tuple[Path, Path, str]]:
    """A control group of this test's own: its folder, the file of its quota, and the format."""
    for mount, file, form in (
        ("/sys/fs/cgroup/cpu", "cpu.cfs_quota_us", "{quota}"),
        ("/sys/fs/cgroup", "cpu.max", "{quota} 100000"),
    ):
        folder = Path(mount) / f"ddpm-test-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            (folder / file).write_text(form.format(quota=100_000))
        except OSError:
            folder.rmdir()
            continue
        yield folder, folder / file, form
        folder.rmdir()
        return
    pytest.skip("no control group can be made here")


@pytest.mark.parametrize(("quota", "expected"), [(0.5, 1), (1, 1), (1.5, 2)])
def test_a_process_counts_what_its_control_group_allows(
    limited: tuple[Path, Path, str], quota: float, expected: int
) -> None:
    folder, file, form = limited
    file.write_text(form.format(quota=int(quota * 100_000)))
    script = (
        "import os; from pathlib import Path\n"
        f"Path({str(folder / 'cgroup.procs')!r}).write_text(str(os.getpid()))\n"
        "from diffusion import cores; print(cores.quota(), cores.usable(), cores.count())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    found = done.stdout.split()
    allowed = min(expected, len(os.sched_getaffinity(0)))
    assert found == [str(float(quota)), str(allowed), str(allowed)], done.stderr


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("available", [1, 2, 3, 4, 6, 16, 96])
def test_dealing_uses_no_more_cores_than_there_are(available: int, large: bool) -> None:
    for rows in range(1, 300):
        parts, threads = cores.deal(rows, available, large=large)
        assert 1 <= parts <= rows
        assert threads >= 1 and parts * threads <= available
    assert cores.deal(256, 2, large=large) == (2, 1)
    assert cores.deal(1, 2, large=large) == (1, 2 if large else 1)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("labelled", [False, True])
def test_parts_are_the_whole(rows: int, labelled: bool) -> None:
    threads = set()

    def network(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        threads.add(threading.get_ident())
        assert not torch.is_grad_enabled()
        assert torch.get_num_threads() == 1
        return x * t.view(-1, 1) + (0 if labels is None else labels.view(-1, 1))

    x, t = torch.randn(rows, 3), torch.arange(rows)
    labels = torch.arange(rows) * 10 if labelled else None
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            expected = x * t.view(-1, 1) + (t * 10 if labelled else 0 * t).view(-1, 1)
            for parts in range(1, rows + 1):
                threads.clear()
                found = cores.side_by_side(network, x, t, labels, parts=parts)
                assert torch.equal(found, expected)
                assert found.is_inference() == (mode is torch.inference_mode)
                assert len(threads) == parts


FAULTS = """
import resource, torch
from diffusion import cores

cores.use(2)

def evaluate(x, t, labels):
    found = [x + i for i in range(8)]  # 8 MiB a core, freed at the end
    return found[0]

x, t = torch.zeros(2, 2**18), torch.zeros(2)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for i in range(20):
    if i == 10:  # either thread has had either part by then, or most likely
        before = faults()
    cores.evaluate(evaluate, x, t, None)
print((faults() - before) // 10)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="others decide for themselves")
def test_evaluations_get_the_memory_that_those_before_freed() -> None:
    """Counted in pages that the system had to hand out, each of them cleared, an evaluation: of
    itself, glibc gives 4,000 back. The system may hand a few hundred out once more, where other
    processes decide which thread comes first."""
    run = [sys.executable, "-c", FAULTS]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 400


def test_an_error_in_one_part_is_raised_once_all_have_ended() -> None:
    ended = []

    def network(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        if 0 in t:
            raise ValueError("labels: wrong")
        threading.Event().wait(0.1)
        ended.append(len(t))
        return x

    with torch.no_grad(), pytest.raises(ValueError, match="labels: wrong"):
        cores.side_by_side(network, torch.zeros(4, 1), torch.arange(4), None, parts=2)
    assert ended == [2]


def test_a_network_in_a_network_is_part_of_the_part() -> None:
    def network(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return cores.evaluate(lambda x, t, labels: x + 1, x, t, labels)

    with torch.no_grad():
        found = cores.side_by_side(network, torch.zeros(8, 1), torch.arange(8), None, parts=2)
    assert found.eq(1).all()


def test_two_threads_never_compile_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Double(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
            return x * 2

    compiling = threading.Lock()
    compiled_for, ran_in = [], set()

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        with compiling:
            compiled_for.append(threading.get_ident())

            def run(*inputs: Tensor) -> Any:
                ran_in.add(threading.get_ident())
                return graph.forward(*inputs)

            return run

    network = Double()
    network.compile(backend=backend)
    monkeypatch.setattr(cores, "_cores", 2)
    with torch.no_grad():
        for rows, threads in ((8, 1), (8, 2), (9, 1), (9, 2)):  # sizes never met run in turn
            ran_in.clear()
            found = cores.evaluate(network, torch.ones(rows, 1), torch.arange(rows), None)
            assert found.eq(2).all() and len(found) == rows
            assert len(ran_in) == threads
    assert len(compiled_for) == 2 and len(set(compiled_for)) == 1


def test_a_call_of_a_new_kind_has_its_turn() -> None:
    first = cores.FirstTimes()
    assert first.any_new([4]) and first.any_new([4, 5])
    assert not first.any_new([5]) and not first.any_new([4, 5])
    running, most = 0, 0

    def call() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        threading.Event().wait(0.05)
        running -= 1

    cores.together([call] * 3, in_turn=True)
    assert most == 1


def test_who_is_done_takes_the_next_call() -> None:
    slow, made_by = threading.Event(), {}

    def call(i: int) -> int:
        made_by[i] = threading.get_ident()
        if i == 0:
            assert slow.wait(10)
        elif i == 4:
            slow.set()
        return i

    calls = [partial(call, i) for i in range(5)]
    assert cores.together(calls, at_once=2) == [0, 1, 2, 3, 4]
    assert len({made_by[i] for i in (1, 2, 3, 4)} - {made_by[0]}) == 1


def test_a_call_that_fails_among_more_calls_than_threads() -> None:
    made = []

    def call(i: int) -> None:
        made.append(i)
        if i == 1:
            raise ValueError("of call 1")

    with pytest.raises(ValueError, match="of call 1"):
        cores.together([partial(call, i) for i in range(4)], at_once=2)
    assert made.count(1) == 1 and {0, 1} <= set(made)


def test_gradients_by_x_are_those_of_the_network_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """By rows dealt to threads, as often as they are asked for; each core works on its own rows."""
    monkeypatch.setattr(cores, "_cores", 2)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 1, 3))
    network.double().requires_grad_(False)
    threads = set()

    def forward(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None and len(x) == len(t) == len(labels)
        threads.add(threading.current_thread().name)
        return (t + labels).view(-1, 1, 1, 1) * network(x)

    x = torch.randn(7, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    t, labels = torch.rand(7).double(), torch.arange(7)
    out = cores.evaluate(forward, x, t, labels)
    dealt = set(threads)
    alone = forward(x, t, labels)
    assert len(dealt) == 2 and threading.current_thread().name not in dealt
    assert torch.equal(out.detach(), alone.detach())
    for v in (torch.ones_like(out), torch.randn_like(out)):
        [found] = torch.autograd.grad(out, x, v, retain_graph=True)
        [expected] = torch.autograd.grad(alone, x, v, retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    [once] = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(once.square().sum(), x)


def test_a_network_that_learns_is_not_dealt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_cores", 2)
    conv = nn.Conv2d(1, 1, 3)
    network = Labelless(conv)
    x = torch.randn(4, 1, 8, 8, requires_grad=True)
    cores.evaluate(network, x, torch.zeros(4), None).sum().backward()
    assert conv.weight.grad is not None and x.grad is not None


class Labelless(nn.Module):
    """A network of x alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]
