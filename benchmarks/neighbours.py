"""What busy processes beside ours cost: the network, training, the service, a peer.

    .venv/bin/python benchmarks/neighbours.py [--seconds 20] [--only network]

A neighbour is a process that computes without a pause on one core. "rows apart" is how networks
are evaluated here, "a team" what torch does by itself: all cores inside each operation.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from serving import HERE, OUR_PORT, PEER_PORT, PEERS, Client, ask_peer, ask_us, closed_loop, server
from training_speed import CONFIG, write_pictures

import diffusion
from diffusion import cores
from diffusion.checkpoint import convert
from diffusion.speed import fast_dtype, prepare
from training.config import load_config
from training.trainer import Trainer
from worker.bench.load import image_steps

BUSY = (0, 1, 2)
STEPS = 24  # of training by several processes
PATIENCE = 30.0  # seconds beyond the window for answers; the peer may give none


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that never wait."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@torch.inference_mode()
def forward_rates(
    folder: Path, how: str, rows: int, seconds: float, *, compiled: bool
) -> list[float]:
    """Rows/s of one network beside 0, 1 and 2 neighbours, compiled with none beside it.

    how: apart, as the command line's tools do it, or team.
    """
    if how == "apart":
        cores.use(cores.usable())
    model = diffusion.load(folder, "cpu")
    fast = prepare(model, dtype=fast_dtype(model), compile=compiled)
    x, t = torch.randn(rows, *model.shape), torch.arange(rows) % model.schedule.T
    labels = torch.zeros_like(t) if model.config.network.num_classes else None

    def evaluate() -> None:
        if how == "apart":
            fast.output(x, t, labels)
        else:
            fast.evaluator(x, t, labels)

    evaluate()
    rates = []
    for busy in BUSY:
        with neighbours(busy):
            evaluate()
            count, began = 0, time.perf_counter()
            while time.perf_counter() - began < seconds:
                evaluate()
                count += 1
            rates.append(count * rows / (time.perf_counter() - began))
    return rates


def row(name: str, rates: list[float]) -> None:
    """One line: the rates, and each against that alone."""
    shares = " | ".join(f"{rate / rates[0]:.2f}" if rates[0] else "" for rate in rates[1:])
    print(f"| {name} | {' | '.join(f'{rate:.0f}' for rate in rates)} | {shares} |", flush=True)


def network(folder: Path, seconds: float, *, compiled: bool) -> None:
    """The forward of a batch, in processes of their own, by turns."""
    code = "under torch.compile, " * compiled
    print("\n| rows/s | alone | beside 1 | beside 2 | 1 / alone | 2 / alone |")
    print("|---|---|---|---|---|---|")
    for rows in (1, 4, 16, 64):
        for how in ("apart", "team"):
            command = [sys.executable, __file__, "--model", str(folder), "--one", how]
            command += ["--rows", str(rows), "--seconds", str(seconds)]
            command += ["--compiled"] * compiled
            rates = [float(word) for word in subprocess.check_output(command, text=True).split()]
            row(f"{code}{rows} rows, {'apart' if how == 'apart' else 'a team'}", rates)


def training(seconds: float, compiled: bool, dropout: float) -> None:
    """Steps of the trainer on the MNIST configuration, batches of 32, by turns."""
    cores.use(cores.count())
    print("\n| images/s | alone | beside 1 | beside 2 | 1 / alone | 2 / alone |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        write_pictures(Path(scratch) / "images")
        ways = {"a team": False, "rows apart": True}
        steps = {
            name: trainer_step(Path(scratch), compiled, dropout, apart=apart)
            for name, apart in ways.items()
        }
        for step in steps.values():
            for _ in range(3):
                step()
        rates: dict[str, list[float]] = {name: [] for name in steps}
        for busy in BUSY:
            with neighbours(busy):
                for name, step in steps.items():
                    rates[name].append(step_rate(step, seconds))
    for name in steps:
        how = ["compiled" if compiled else "eager"] + [f"dropout {dropout:g}"] * (dropout > 0)
        row(", ".join([*how, name]), rates[name])


def trainer_step(
    folder: Path, compiled: bool, dropout: float, *, apart: bool
) -> Callable[[], None]:
    """One optimizer step of a trainer; apart: with its rows dealt to the cores."""
    options = [f"data.source={folder / 'images'}", f"compile={str(compiled).lower()}"]
    options.append(f"network.dropout={dropout}")
    trainer = Trainer(load_config(CONFIG, options), folder / "run", progress=False)
    if apart:
        return trainer.stepper()
    trainer.dealt = None
    step = trainer.stepper()

    def by_team() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(cores.count())
        step()
        torch.set_num_threads(before)

    return by_team


def several(compiled: bool, dropout: float) -> None:
    """The trainer in one process and in as many as there are cores, as torchrun starts them."""
    print("\n| images/s | alone | beside 1 | beside 2 | 1 / alone | 2 / alone |")
    print("|---|---|---|---|---|---|")
    options = ["--dropout", str(dropout), *["--compiled"] * compiled]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node"]
    with tempfile.TemporaryDirectory() as scratch:
        write_pictures(Path(scratch) / "images")
        for processes in (1, cores.usable()):
            launch = [] if processes == 1 else [*torchrun, str(processes)]
            command = [sys.executable, *launch, __file__, "--member", scratch, *options]
            rates = []
            for busy in BUSY:
                with neighbours(busy):
                    said = subprocess.check_output(command, text=True)
                rates.append(float(said.split()[-1]))
            row(f"{processes} process{'es' if processes > 1 else ''}", rates)


def member(folder: Path, compiled: bool, dropout: float) -> None:
    """One process of those: the first prints images/s of so many steps of them all."""
    cores.use(cores.count())
    options = [f"data.source={folder / 'images'}", f"compile={str(compiled).lower()}"]
    options.append(f"network.dropout={dropout}")
    trainer = Trainer(load_config(CONFIG, options), folder / "run", progress=False)
    step = trainer.stepper()
    for _ in range(3):
        step()
    trainer.accelerator.wait_for_everyone()
    began = time.perf_counter()
    for _ in range(STEPS):  # the gradients of each are those of all processes
        step()
    if trainer.accelerator.is_main_process:
        print(STEPS * trainer.config.batch_size / (time.perf_counter() - began))


def step_rate(step: Callable[[], None], seconds: float) -> float:
    """Images/s."""
    count, began = 0, time.perf_counter()
    while count < 3 or time.perf_counter() - began < seconds:
        step()
        count += 1
    return count * 32 / (time.perf_counter() - began)


async def served(ask: Client, seconds: float) -> float:
    """Image-steps/s: ours as the service counts them, the peer's when their job has ended."""
    if ask is ask_peer:  # which takes seconds a batch: a short window would hold none
        return await closed_loop(ask, 3 * seconds, patience=PATIENCE)
    url = f"http://127.0.0.1:{OUR_PORT}"
    load = asyncio.create_task(closed_loop(ask, seconds, patience=0))
    await asyncio.sleep(seconds / 3)
    before, began = image_steps(url), time.perf_counter()
    await asyncio.sleep(seconds)
    rate = (await asyncio.to_thread(image_steps, url) - before) / (time.perf_counter() - began)
    await load
    return rate


def service(folder: Path, seconds: float, only: str | None, peer_dtype: str) -> None:
    """32 clients in a closed loop, jobs of 10 to 100 steps."""
    logs = Path(tempfile.mkdtemp(prefix="ddpm-bench-"))
    print(f"logs: {logs}", file=sys.stderr)
    os.environ["DDPM_MODELS"] = str(folder.resolve().parent)
    convert(folder, logs / "peer", "diffusers", sampling=PEERS)
    ours = [sys.executable, "-m", "ddpm", "up", "--port", str(OUR_PORT)]
    peer = [sys.executable, str(HERE / "peer.py"), str(logs / "peer"), str(PEER_PORT), peer_dtype]
    print("\n| image-steps/s | alone | beside 1 | beside 2 | 1 / alone | 2 / alone |")
    print("|---|---|---|---|---|---|")
    rates: dict[str, list[float]] = {}
    for name, command, port, path, ask in (
        ("ddpm-serve", ours, OUR_PORT, "readyz", ask_us),
        ("ddpm-serve, two workers", [*ours, "--workers", "2"], OUR_PORT, "readyz", ask_us),
        ("LitServe, diffusers", peer, PEER_PORT, "health", ask_peer),
    ):
        if only not in (None, name):
            continue
        if ask is ask_us:
            data = Path(tempfile.mkdtemp(dir=logs))
            command = [*command, "--data", str(data)]
        rates[name] = []
        for busy in BUSY:  # a server each: what one could not answer must not burden the next
            log = logs / f"{len(rates)}-{busy}.log"
            with server(command, f"http://127.0.0.1:{port}/{path}", log):
                with neighbours(busy):
                    rates[name].append(asyncio.run(served(ask, seconds)))
                print(f"{name}, beside {busy}: {rates[name][-1]:.0f}", file=sys.stderr, flush=True)
        row(name, rates[name])
    if only is not None:
        return
    one, two, theirs = rates.values()
    print(f"\ntwo workers / one, alone: {two[0] / one[0]:.2f}")
    against = ", ".join(
        f"{a / b:.2f}" if b else "it answered nothing" for a, b in zip(one, theirs, strict=True)
    )
    print(f"ddpm-serve / LitServe, alone, beside 1, beside 2: {against}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE.parent / "models" / "mnist")
    parser.add_argument("--seconds", type=float, default=20)
    parts = ("network", "training", "processes", "service")
    parser.add_argument("--only", choices=parts, help="default: all")
    parser.add_argument("--server", help="of the servers, only this one, by its row's name")
    parser.add_argument("--peer-dtype", default="bfloat16", help="bfloat16 or float32")
    parser.add_argument("--dropout", type=float, default=0.0, help="training with dropout")
    parser.add_argument(
        "--compiled", action="store_true", help="network and training, by torch.compile"
    )
    parser.add_argument("--one", choices=["apart", "team"], help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--member", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.member:
        member(arguments.member, arguments.compiled, arguments.dropout)
        return
    if arguments.one:
        how = {"how": arguments.one, "rows": arguments.rows, "seconds": arguments.seconds}
        print(*forward_rates(arguments.model, **how, compiled=arguments.compiled))
        return
    wanted = parts if arguments.only is None else (arguments.only,)
    if "network" in wanted:
        network(arguments.model, arguments.seconds / 5, compiled=arguments.compiled)
    if "training" in wanted:
        training(arguments.seconds / 2, arguments.compiled, arguments.dropout)
    if "processes" in wanted:
        several(arguments.compiled, arguments.dropout)
    if "service" in wanted:
        service(arguments.model, arguments.seconds, arguments.server, arguments.peer_dtype)


if __name__ == "__main__":
    main()
