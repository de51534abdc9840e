from __future__ import annotations

import json
import logging
import os
import re
import shutil
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import diffusion
from diffusion import Model, ModelConfig, UNet, UNetConfig, cores
from diffusion.samplers import build_table
from diffusion.speed import prepare
from worker.engine.lane import EngineOptions
from worker.engine.loop import Engine
from worker.engine.tasks import Event, Failed, Finished, Images, Start, Task
from worker.models import ModelFolder, Served
from worker.network import compiling, in_process
from worker.network.compiling import TOLERANCE, Compiler, difference
from worker.network.costs import Shape
from worker.network.network import ANY_ROWS, Network, Tile, example
from worker.network.networks import Networks


@pytest.fixture
def served(tmp_path: Path, make_model: Callable[..., Model]) -> Served:
    diffusion.save(make_model(), tmp_path / "models" / "tiny")
    (one,) = ModelFolder(tmp_path / "models", queue="q").rescan().loaded
    return one


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny network's steps take no time."""
    monkeypatch.setattr(compiling, "WORTH_S", 0.0)


def run(engine: Engine, model: Model, steps: int) -> None:
    table = build_table(model.schedule, steps=steps)
    engine.submit(Task(id="a", model=model, table=table, seed=1, starts=(Start(0),)))
    while engine.tick():
        pass


def test_nothing_is_compiled_where_it_is_switched_off(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(lambda events: None)
    for _ in range(3):
        run(engine, served.model, 50)
    Compiler(engine.networks, tmp_path / "cache", enabled=False).poll([served])
    assert not (tmp_path / "cache").exists()


def test_without_a_compiler_it_says_so_once(
    served: Served,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="ddpm.worker")
    monkeypatch.setenv("PATH", str(tmp_path))
    engine = Engine(lambda events: None)
    for _ in range(3):
        run(engine, served.model, 50)
    compiler = Compiler(engine.networks, tmp_path / "cache")
    compiler.poll([served])
    compiler.poll([served])
    assert caplog.text.count("no g++ here") == 1


def test_a_size_is_compiled_once_its_steps_took_long_enough(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sooner if there is nothing else to do; and what takes most of the time comes first."""
    engine = Engine(lambda events: None)
    network = engine.networks.prepare(served.model)
    network.costs.spent = {1: 1.5, 4: 0.9}
    monkeypatch.setattr(compiling, "WORTH_S", 10.0)
    begun: list[int] = []
    monkeypatch.setattr(Compiler, "_begin", lambda self, *wanted: begun.append(wanted[2].rows))
    compiler = Compiler(engine.networks, tmp_path / "cache")
    for _ in range(compiling.IDLE_LOOKS):
        assert not begun
        compiler.poll([served], busy=False)
    assert begun == [1]
    compiler.poll([served], busy=True)
    assert begun == [1]
    network.costs.spent = {1: 11.0, 3: 4.0, 4: 8.0}
    compiler.poll([served], busy=True)
    assert begun == [1, network.tile(4).rows]


def test_one_worker_compiles_at_a_time(served: Served, tmp_path: Path) -> None:
    engine = Engine(lambda events: None)
    engine.networks.prepare(served.model).costs.spent[1] = 60.0
    folder = tmp_path / "cache"
    mine, others = Compiler(engine.networks, folder), compiling._lock(folder)
    assert others is not None
    mine.poll([served])
    assert mine.leaves == 1 and not list(folder.glob("*.log"))
    others.close()
    mine.poll([served])
    assert mine.leaves < 1 and compiling._lock(folder) is None
    mine.close()


def test_a_folder_that_others_may_write_to_is_refused(
    served: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o777)
    engine = Engine(lambda events: None)
    for _ in range(3):
        run(engine, served.model, 50)
    Compiler(engine.networks, folder).poll([served])
    assert "others may write" in caplog.text
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_refused(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even by root: /proc is ours and takes no file, like a disk that is read-only."""
    caplog.set_level(logging.INFO, logger="ddpm.worker")
    engine = Engine(lambda events: None)
    engine.networks.prepare(served.model).costs.spent[1] = 60.0
    compiler = Compiler(engine.networks, Path("/proc/self"))
    assert "no compiled code: /proc/self cannot be written to" in caplog.text
    compiler.poll([served])
    assert not compiler.working


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_folder_that_goes_halts_the_compiling_and_nothing_else(
    served: Served,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    """Whoever clears a cache does not know that it is in use; after a rest it is made anew."""
    folder = tmp_path / "cache"
    engine = Engine(lambda events: None)
    engine.networks.prepare(served.model).costs.spent = {1: 60.0, 4: 50.0}
    compiler = Compiler(engine.networks, folder)
    if when == "while":
        shutil.rmtree(served.folder)  # so that the other process fails
        compiler.poll([served])
        assert compiler._job is not None
        compiler._job.process.wait()
    shutil.rmtree(folder)
    for _ in range(3):
        compiler.poll([served])
        assert not compiler.working
    assert caplog.text.count("nothing is compiled for 5 minutes") == 1
    monkeypatch.setattr(compiler, "_rests_until", 0.0)
    compiler.poll([served])
    assert compiler.working
    compiler.close()


def test_a_machine_that_can_start_no_process_is_asked_again_later(
    served: Served,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine(lambda events: None)
    engine.networks.prepare(served.model).costs.spent[1] = 60.0
    compiler = Compiler(engine.networks, tmp_path / "cache")
    with monkeypatch.context() as patched:
        patched.setattr(compiling, "command_of", lambda *of: [str(tmp_path / "none"), *of])
        compiler.poll([served])
    assert "nothing is compiled for 5 minutes: [Errno 2]" in caplog.text
    compiler.poll([served])
    assert compiler._job is None
    monkeypatch.setattr(compiler, "_rests_until", 0.0)
    compiler.poll([served])
    assert compiler.working
    compiler.close()


def test_what_cannot_be_begun_keeps_no_other_worker_waiting(
    served: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "cache"
    engine = Engine(lambda events: None)
    network = engine.networks.prepare(served.model)
    network.costs.spent[1] = 60.0
    compiler = Compiler(engine.networks, folder)
    compiler._package(served, network, network.tile(1)).with_suffix(".log").mkdir()
    compiler.poll([served])
    assert "nothing is compiled" in caplog.text
    lock = compiling._lock(folder)
    assert lock is not None
    lock.close()


# A worker that compiles what it has stepped at all.
EAGER = """
from worker.network import compiling
compiling.WORTH_S = compiling.WORTH_IDLE_S = 0.0
"""


def test_a_worker_whose_cache_is_unusable_serves_on(
    service: Any, nursery: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "cache" / "compiled"
    folder.mkdir(mode=0o700, parents=True)
    (folder / "compiling.lock").mkdir()  # no file can be opened there, not even by root
    options = {"DDPM_COMPILE": "1", "DDPM_CACHE_DIR": str(folder.parent)}
    worker = nursery.worker(service, fault=EAGER, **options)
    job = service.admit(steps=1000, num_images=64, corrector_steps=9)  # does not end by itself
    service.until(lambda: not worker.alive() or "nothing is compiled" in service.log.read_text())
    assert worker.alive()
    service.store.cancel(job)
    assert service.ended(job, "canceled").crashes == 0


def test_a_failed_compilation_leaves_the_eager_code(
    served: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(lambda events: None)
    for _ in range(3):
        run(engine, served.model, 50)
    compiler = Compiler(engine.networks, tmp_path / "cache")
    shutil.rmtree(served.folder)  # so that the other process cannot load it
    deadline = time.monotonic() + 60
    while "stay uncompiled" not in caplog.text:
        compiler.poll([served])
        assert time.monotonic() < deadline
        time.sleep(0.1)
    compiler.close()
    assert all(not shape.compiled for shape in engine.networks.prepare(served.model).shapes)
    run(engine, served.model, 5)


def test_old_code_is_swept(tmp_path: Path) -> None:

    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    for name, age in (("old.pt2", 40), ("new.pt2", 1)):
        (folder / name).write_bytes(b"")
        then = time.time() - age * 86_400
        os.utime(folder / name, (then, then))
    Compiler(Networks(None, 64), folder)
    assert [path.name for path in folder.iterdir()] == ["new.pt2"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.timeout(900)
def test_compiled_code_is_swapped_in_and_kept(served: Served, tmp_path: Path) -> None:
    events: list[Event] = []
    engine = Engine(events.extend, EngineOptions(dtype=torch.float32))
    for _ in range(3):
        run(engine, served.model, 50)
    compiler = Compiler(engine.networks, tmp_path / "cache")
    network = engine.networks.prepare(served.model)
    deadline = time.monotonic() + 800
    while not any(shape.compiled for shape in network.shapes):
        compiler.poll([served])
        engine.tick()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    compiler.close()
    assert network.shapes[0] == Shape(1, compiled=True) and not network.shapes[-1].compiled
    tile = network.tile(1)
    assert difference(network, network._compiled[tile], tile) < TOLERANCE[network.dtype]
    assert convolutions(next((tmp_path / "cache").glob("*.pt2"))) == {"mkldnn__convolution"}
    run(engine, served.model, 20)
    (images,) = [e for e in events if isinstance(e, Images)][-1:]
    expected = diffusion.sample(
        served.model, 1, seed=1, steps=20, dtype=torch.float32, variance="large"
    )
    torch.testing.assert_close(images.x.clamp(-1, 1), expected, atol=1e-4, rtol=0)
    again = Engine(lambda events: None, EngineOptions(dtype=torch.float32))
    run(again, served.model, 2)
    began = time.monotonic()
    Compiler(again.networks, tmp_path / "cache").poll([served])  # at once, from the disk
    again.tick()
    assert any(shape.compiled for shape in again.networks.prepare(served.model).shapes)
    assert time.monotonic() - began < 5


def convolutions(package: Path) -> set[str]:
    """What kinds of them compiled code calls: mkldnn's have their weights packed beforehand."""
    with zipfile.ZipFile(package) as archive:
        sources = [name for name in archive.namelist() if name.endswith(".wrapper.cpp")]
        code = "".join(archive.read(name).decode() for name in sources)
    return set(re.findall(r"aoti_torch_cpu_((?:mkldnn__)?convolution)", code))


def test_the_key_covers_all_code_that_is_compiled(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Networks(None, 8).prepare(served.model)
    keys = {compiling._key(served, network, network.tile(1))}
    for file in compiling.SOURCES:
        edited = tmp_path / Path(file).name
        edited.write_text(Path(file).read_text() + "# edited\n")
        sources = tuple(str(edited) if other == file else other for other in compiling.SOURCES)
        monkeypatch.setattr(compiling, "SOURCES", sources)
        compiling._source.cache_clear()
        keys.add(compiling._key(served, network, network.tile(1)))
        monkeypatch.undo()
    compiling._source.cache_clear()
    assert len(keys) == 1 + len(compiling.SOURCES)


def test_no_operation_comes_from_a_file_outside_of_the_key(served: Served) -> None:
    fast = prepare(served.model, dtype=torch.float32)
    with torch.no_grad():
        program = torch.export.export(fast.network, example(served.model, 2), strict=False)
    traces = [str(node.meta.get("stack_trace", "")) for node in program.graph.nodes]
    root = str(Path(diffusion.__file__).parents[1])
    ours = {
        file
        for trace in traces
        for file in re.findall(r'File "([^"]+)"', trace)
        if file.startswith(root) and "/.venv/" not in file and "/tests/" not in file
    }
    assert any(file.endswith("unet.py") for file in ours)
    assert ours <= set(compiling.SOURCES)


@pytest.fixture
def smallest(tmp_path: Path) -> Served:
    """A model that compiles as fast as any."""
    network = UNetConfig(
        image_size=8,
        in_channels=1,
        channels=(8,),
        attention=(False,),
        res_blocks=1,
        groups=4,
        num_classes=3,
        null_class=True,
    )
    torch.manual_seed(0)
    unet = UNet(network)
    for weight in unet.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    model = Model(ModelConfig(network=network), unet.eval().requires_grad_(False))
    diffusion.save(model, tmp_path / "models" / "smallest")
    (one,) = ModelFolder(tmp_path / "models", queue="q").rescan().loaded
    return one


def in_process_network(model: Model, max_rows: int = 64) -> Network:
    """As on a GPU."""
    return Networks(torch.float32, max_rows, in_process=True).prepare(model)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("available", [1, 2, 3, 6, 16])
def test_compiled_code_is_called_alike_by_all_cores(
    model: Model, available: int, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whichever shape; and those for which it is not there yet stay eager."""
    monkeypatch.setattr(cores, "count", lambda: available)
    monkeypatch.setitem(vars(model), "is_large", large)
    network = Networks(torch.float32, 64, in_process=False).prepare(model)
    called: list[int] = []

    def compiled(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        called.append(x.shape[0])
        return model.output(x, t, labels)

    eager = [shape.rows for shape in network.shapes]
    assert eager == [shape.rows for shape in network.eager_shapes]
    for size in (8, 1, 4, 2, 16):
        for threads in range(1, available + 1):
            network.add_compiled(Tile(size, threads), compiled)
        rows = [shape.rows for shape in network.shapes]
        assert rows == sorted(set(rows)), "one of each, by size"
        assert rows[0] == 1
        for waiting in range(1, 65):
            chosen = network.costs.best(waiting, network.shapes)
            network.costs.record(chosen, 0.1 + chosen.rows)
            x, t, labels = example(model, min(waiting, chosen.rows))
            called.clear()
            with torch.inference_mode():
                network.output(x, t, labels, chosen)
            assert bool(called) == chosen.compiled
            if not chosen.compiled:
                continue
            assert sum(called) >= len(x) and set(called) == {network.tile(chosen.rows).rows}
            if not large:
                assert sum(called) == chosen.rows and len(called) % min(len(x), available) == 0
    assert all(shape.compiled for shape in network.shapes)


def test_what_is_compiled_in_process_serves_all_sizes(model: Model) -> None:
    network = in_process_network(model)
    network.costs.spent = {1: 3.0, 3: 4.0, 64: 5.0}
    tile = network.tile(1)
    assert tile == network.tile(64) and tile.rows == ANY_ROWS
    assert compiling._spent(network) == {tile: 12.0}
    called: list[int] = []

    def compiled(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        called.append(x.shape[0])
        return model.output(x, t, labels)

    network.add_compiled(tile, compiled)
    assert all(shape.compiled for shape in network.shapes)
    assert network.provenance()["compiled_batches"] == [shape.rows for shape in network.shapes]
    x, t, labels = example(model, 5)
    for shape in network.shapes[4:]:
        found = network.output(x, t, labels, shape)
        torch.testing.assert_close(found, model.output(x, t, labels), atol=1e-4, rtol=0)
    assert called == [shape.rows for shape in network.shapes[4:]], "padded to the shape, one call"
    assert difference(network, compiled, tile) < 1e-4


def test_what_is_built_in_process_holds_up_no_heartbeat(
    served: Served,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nor does what it is built of end with a failure: the marker goes, eager code serves."""
    caplog.set_level(logging.INFO, logger="ddpm.worker")
    networks = Networks(torch.float32, 8, in_process=True)
    network = networks.prepare(served.model)
    compiler = Compiler(networks, tmp_path / "cache")
    marker = compiler._package(served, network, network.tile(1))
    marker.write_text("{}")
    go_on = threading.Event()

    caches: list[str] = []

    def build(*arguments: object, **options: object) -> None:
        caches.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        assert go_on.wait(60)
        raise RuntimeError("no kernel image")

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # set back at the end
    monkeypatch.setattr(in_process, "build", build)
    network.costs.spent = {1: 60.0}
    compiler.poll([served])
    assert compiler.working and compiler.leaves < 1
    compiler.poll([served])  # nothing else meanwhile
    go_on.set()
    compiler._beside.shutdown()  # once it is done
    assert caches == [str(tmp_path / "cache" / "inductor")]
    assert "cannot be used: no kernel image" in caplog.text and not marker.exists()
    compiler.poll([served])  # not once more
    assert compiler.leaves == 1 and not any(shape.compiled for shape in network.shapes)
    compiler.close()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when it begins to compile
def test_code_that_another_process_has_tried_is_built_in_this_one(
    smallest: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # set back at the end
    monkeypatch.setattr(cores, "_cores", 1)  # as in a worker
    events: list[Event] = []
    engine = Engine(events.extend, EngineOptions(dtype=torch.float32))
    engine.networks = Networks(torch.float32, 64, in_process=True)
    network, model = engine.networks.prepare(smallest.model), smallest.model
    network.costs.spent = {1: 60.0}
    compiler = Compiler(engine.networks, tmp_path / "cache")
    deadline = time.monotonic() + 800
    compiler.poll([smallest])
    while compiler.working:
        assert time.monotonic() < deadline
        time.sleep(0.2)
        compiler.poll([smallest])
    compiler.close()
    marker = compiler._package(smallest, network, network.tile(1))
    assert json.loads(marker.read_text())["model"] == model.digest
    assert all(shape.compiled for shape in network.shapes)
    graphs = counters["stats"]["unique_graphs"]
    forward = network._compiled[network.tile(1)]
    assert 0 < difference(network, forward, network.tile(1)) < TOLERANCE[torch.float32]
    table = build_table(model.schedule, sampler="ddim", steps=5)
    in_python: list[str] = []

    def seen(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code is UNet.embed.__code__:
            in_python.append(frame.f_code.co_name)

    threading.setprofile(seen)
    engine.start()  # on a thread of its own
    for n in (1, 2, 7):
        starts = tuple(Start(i, class_label=i % 3) for i in range(n))
        engine.submit(Task(id=str(n), model=model, table=table, seed=n, starts=starts))
    while sum(isinstance(event, Finished | Failed) for event in list(events)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    engine.stop()
    threading.setprofile(None)
    assert not in_python, "it ran eagerly"
    for n in (1, 2, 7):
        expected = diffusion.sample(
            model, n, seed=n, sampler="ddim", steps=5, dtype=torch.float32,
            class_label=[i % 3 for i in range(n)],
        )  # fmt: skip
        for e in (e for e in events if isinstance(e, Images) and e.task_id == str(n)):
            found = e.x.clamp(-1, 1)
            torch.testing.assert_close(found, expected[list(e.indices)], atol=1e-4, rtol=0)
    assert counters["stats"]["unique_graphs"] == graphs, "the engine compiled"
    exact = engine.networks.prepare(model, exact=True)
    assert not any(shape.compiled for shape in exact.shapes)
