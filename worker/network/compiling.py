"""Compiled code for the batch shapes that are used: made in the background, swapped in when ready.

A process of low priority exports the network and compiles it ahead of time; the worker serves
eagerly meanwhile, then loads the result in milliseconds. The code is kept on disk, so the next
start has it at once. It is built for this processor, this number of threads and these weights.
On a GPU it fills Inductor's cache instead, and the worker builds from it in a thread: see
`worker.network.in_process`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import math
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Protocol

import torch

import diffusion.graphs
import diffusion.speed
import diffusion.unet
import diffusion.winograd
from diffusion import cores
from jobs.processes import command_of, environment
from worker.network import in_process
from worker.network.compiled import Compiled
from worker.network.network import ANY_ROWS, Forward, Network, Tile, example
from worker.network.networks import Networks

log = logging.getLogger("ddpm.worker")
MOST_SHAPES = 7  # compiled a model; on a GPU there is but one, for all sizes
COSTS = 0.15  # of the network's speed, while one is being compiled
KEEP_S = 30 * 86_400.0
# Seconds of stepping before a size is compiled, which takes half a minute of one core and makes its
# steps a quarter to a half faster: soon repaid where there is more to come. A worker that was found
# idle so many times in a row has nothing to lose.
WORTH_S = 10.0
WORTH_IDLE_S = 1.0
IDLE_LOOKS = 5
REST_S = 300.0  # once the folder, or the machine, cannot give what it takes
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # of the largest output


# Where the operations come from that are compiled, and how they are: code of another state of
# these files is another code.
SOURCES = (
    diffusion.unet.__file__,
    *map(str, sorted(Path(diffusion.unet.__file__).parent.glob("*_layers.py"))),
    *map(str, sorted(Path(diffusion.winograd.__file__).parent.glob("*.[ph]*"))),
    diffusion.speed.__file__,
    cores.__file__,
    diffusion.graphs.__file__,
    in_process.__file__,
    str(Path(__file__).with_name("compile_one.py")),
)


class Compilable(Protocol):
    """A model with the folder that another process can load it from."""

    @property
    def name(self) -> str: ...

    @property
    def model(self) -> diffusion.Model: ...

    @property
    def folder(self) -> Path: ...


@dataclass(frozen=True, eq=False)
class Job:
    """One tile of one model being compiled."""

    served: Compilable
    network: Network
    tile: Tile
    package: Path
    process: subprocess.Popen[bytes]
    lock: IO[bytes]  # held while it goes on


class Compiler:
    """Looks, whenever `poll` is called, at what is worth compiling, and at what is ready."""

    def __init__(self, networks: Networks, folder: Path, *, enabled: bool = True) -> None:
        self._networks = networks
        self._folder = folder
        self._job: Job | None = None
        # Building code takes seconds, and no heartbeat may wait for it.
        self._beside = ThreadPoolExecutor(1, "compiled", initializer=cores.keep_to_one)
        self._building: Future[None] | None = None
        self._tried: set[Path] = set()
        self._idle_looks = 0
        self._rests_until = -math.inf  # time.monotonic()
        self._enabled = enabled and _usable(folder)
        if self._enabled:
            _sweep(folder)

    def poll(self, served: Iterable[Compilable], *, busy: bool = True) -> None:
        """Call every few seconds. Never raises for a compilation that fails, nor for a folder or a
        machine that cannot do it now: eager code serves, and it is tried again later."""
        if not self._enabled or time.monotonic() < self._rests_until:
            return
        self._idle_looks = 0 if busy else self._idle_looks + 1
        try:
            self._look(served)
        except OSError as error:
            log.warning("nothing is compiled for %.0f minutes: %s", REST_S / 60, error)
            self._rests_until = time.monotonic() + REST_S
            self._enabled = _usable(self._folder)  # makes it anew, if it has been cleared away

    def _look(self, served: Iterable[Compilable]) -> None:
        if self._job is not None and self._job.process.poll() is not None:
            job, self._job = self._job, None
            job.lock.close()
            self._collect(job)
        if self.working:
            return
        wanted = self._most_wanted(served)
        if wanted is not None:
            self._begin(*wanted)

    @property
    def working(self) -> bool:
        """Whether something is being compiled, or built of what was."""
        building = self._building is not None and not self._building.done()
        return building or self._job is not None

    @property
    def leaves(self) -> float:
        """The share of its speed that the network keeps beside what is being compiled."""
        return 1 - COSTS if self.working else 1.0

    def take_up(self, one: Compilable) -> None:
        """Use all code of a model that was made in an earlier life, whatever is asked for."""
        network = self._networks.prepare(one.model)
        for tile in {network.tile(shape.rows) for shape in network.eager_shapes}:
            package = self._package(one, network, tile)
            if self._enabled and package.is_file():
                self._tried.add(package)
                self._swap_in(one, network, tile, package)

    def close(self) -> None:
        """End a compilation that is under way."""
        self._beside.shutdown(wait=False, cancel_futures=True)
        if self._job is not None:
            self._job.process.kill()
            self._job.process.wait()
            self._job.lock.close()

    def _package(self, served: Compilable, network: Network, tile: Tile) -> Path:
        """What was compiled; in process, a marker: Inductor's cache has it."""
        kind = "json" if network.in_process else "pt2"
        return self._folder / f"{_key(served, network, tile)}.{kind}"

    def _most_wanted(
        self, served: Iterable[Compilable]
    ) -> tuple[Compilable, Network, Tile, Path] | None:
        best = None
        most = WORTH_IDLE_S if self._idle_looks >= IDLE_LOOKS else WORTH_S
        for one in served:
            network = self._networks.prepare(one.model)
            for tile, spent in _spent(network).items():
                package = self._package(one, network, tile)
                if package in self._tried:
                    continue
                if package.is_file():  # made in an earlier life
                    spent = math.inf
                if spent > most:
                    best, most = (one, network, tile, package), spent
        return best

    def _begin(self, served: Compilable, network: Network, tile: Tile, package: Path) -> None:
        if package.is_file():
            self._tried.add(package)
            self._take(served, network, tile, package)
            return
        if network.model.device.type == "cpu" and shutil.which("g++") is None:
            log.info("no g++ here: the network stays uncompiled")
            self._enabled = False
            return
        lock = _lock(self._folder)
        if lock is None:  # another worker's turn; what it makes may be what is wanted here
            return
        log.info("compiling %s for %s in the background", served.name, tile)
        try:
            process = self._compile(served, network, tile, package)
        except OSError:
            lock.close()
            raise
        self._tried.add(package)
        self._job = Job(served, network, tile, package, process, lock)

    def _compile(
        self, served: Compilable, network: Network, tile: Tile, package: Path
    ) -> subprocess.Popen[bytes]:
        arguments = [str(served.folder), served.model.digest, str(network.model.device)]
        arguments += [str(network.dtype).removeprefix("torch."), str(tile.rows)]
        arguments += [str(tile.threads), str(package)]
        with package.with_suffix(".log").open("wb") as output:
            return subprocess.Popen(
                command_of("worker.network.compile_one", *arguments),
                stdout=output,
                stderr=output,
                env={**environment(), "TORCHINDUCTOR_CACHE_DIR": str(_inductor(self._folder))},
            )

    def _collect(self, job: Job) -> None:
        if job.process.returncode == 0:
            self._take(job.served, job.network, job.tile, job.package)
            return
        output = job.package.with_suffix(".log").read_text(errors="replace").strip()
        reason = (output.splitlines() or [f"exit status {job.process.returncode}"])[-1]
        name = job.served.name
        log.warning("%s of %s stay uncompiled: %s", job.tile, name, reason)

    def _take(self, served: Compilable, network: Network, tile: Tile, package: Path) -> None:
        if network.in_process:
            work = (served, network, tile, package)
            self._building = self._beside.submit(self._swap_in, *work)
        else:
            self._swap_in(served, network, tile, package)

    def _swap_in(self, served: Compilable, network: Network, tile: Tile, package: Path) -> None:
        try:
            package.touch()
            forward = load(package, network)
            error = difference(network, forward, tile)
        except Exception as failure:
            log.warning("compiled code of %s cannot be used: %s", served.name, failure)
            with contextlib.suppress(OSError):  # it is tried once, whether it stays or not
                package.unlink()
            return
        if not error <= TOLERANCE[network.dtype]:
            log.warning("compiled code of %s differs by %.2g: not used", served.name, error)
            return
        network.add_compiled(tile, forward)
        log.info("%s of %s run compiled code, which differs by %.1g", tile, served.name, error)


def load(package: Path, network: Network) -> Forward:
    """The compiled network (x, labels and t of the right size) → raw output, for all cores."""
    if not network.in_process:
        return Compiled(package, cores.count())
    in_process.use_cache(_inductor(package.parent))
    return in_process.build(network.model, network.dtype, threads=1)  # no processes of ours stay


def _inductor(folder: Path) -> Path:
    return folder / "inductor"


@torch.inference_mode()
def difference(network: Network, forward: Forward, tile: Tile) -> float:
    """How far compiled code is from eager code on some batch, relative to its largest value."""
    if tile.rows == ANY_ROWS:
        tiles = [Tile(rows, tile.threads) for rows in in_process.SIZES]
        return max(difference(network, forward, tile) for tile in tiles)
    x, t, labels = example(network.model, tile.rows)
    eager = network.eager(x, t, labels)
    if network.in_process:  # by this thread, with whose settings it was made
        compiled = forward(x, t, labels).float()
    else:
        compiled = cores.side_by_side(forward, x, t, labels, parts=1, threads=tile.threads).float()
    return float((compiled - eager).abs().max() / eager.abs().max().clamp(min=1e-12))


def _spent(network: Network) -> dict[Tile, float]:
    """Seconds of stepping uncompiled in batches that would call a tile; the few most."""
    spent: dict[Tile, float] = {}
    for rows, seconds in network.costs.spent.copy().items():
        tile = network.tile(1 << (rows - 1).bit_length())
        spent[tile] = spent.get(tile, 0.0) + seconds
    most = sorted(spent, key=lambda tile: spent[tile], reverse=True)[:MOST_SHAPES]
    return {tile: spent[tile] for tile in most}


def _key(served: Compilable, network: Network, tile: Tile) -> str:
    """Everything that compiled code depends on."""
    parts = (
        served.model.digest,
        _source(),
        str((network.dtype, network.model.device, *tile, "t in float32")),
        torch.__version__,
        _processor(),
        torch.cuda.get_device_name(device)
        if (device := network.model.device).type == "cuda"
        else "",
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


@cache
def _source() -> str:
    return "\0".join(Path(file).read_text(encoding="utf-8") for file in SOURCES)


@cache
def _processor() -> str:
    """The processor and its instructions: code built for another may crash here."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def _sweep(folder: Path) -> None:
    """Delete code that was not used for a month."""
    limit = time.time() - KEEP_S
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another worker may sweep as well
            if path.is_file() and path.stat().st_mtime < limit:
                path.unlink()


def _lock(folder: Path) -> IO[bytes] | None:
    """Held, one compilation goes on in this folder; None: another worker has it. It ends with the
    file's being closed, or its process."""
    file = (folder / "compiling.lock").open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def _usable(folder: Path) -> bool:
    """Whether code can be put into this folder, and only by us."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        stat = folder.stat()
    except OSError as error:
        log.info("no compiled code: %s cannot be made (%s)", folder, error.strerror)
        return False
    if stat.st_uid != os.getuid() or stat.st_mode & 0o022:
        log.warning("no compiled code: others may write to %s", folder)
        return False
    try:
        with tempfile.TemporaryFile(dir=folder):  # its permissions do not tell of a read-only disk
            return True
    except OSError as error:
        log.info("no compiled code: %s cannot be written to (%s)", folder, error.strerror)
        return False
