from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import diffusion
from diffusion import Model
from diffusion.samplers import build_table
from diffusion.speed import prepare
from worker.engine.lane import EngineOptions
from worker.engine.loop import Engine
from worker.engine.tasks import Event, Images, Start, Task
from worker.models import ModelFolder, Served
from worker.network import compiling
from worker.network.compiling import TOLERANCE, Compiler, difference, example
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
    (shape,) = [shape for shape in network.shapes if shape.compiled]
    assert shape.rows == 1
    tile = network.tile(1)
    assert difference(network, network._compiled[tile], tile) < TOLERANCE[network.dtype]
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
