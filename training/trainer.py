"""The training loop: any objective, EMA, warm-up, clipping, resumable to the bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor
from tqdm import tqdm

from diffusion import cores
from diffusion.device import pick_device
from diffusion.model import Model, ModelConfig, build_network
from diffusion.sampling import sample
from diffusion.speed import compiling, fast_dtype
from diffusion.unet import UNet
from training.batches import Batch, Batches
from training.config import ConfigError, OptimizerConfig, TrainConfig
from training.consistency import Stages
from training.data import load_images
from training.dropout import seeded
from training.ema import EMA
from training.gradients import Dealt, average
from training.keeper import Keeper
from training.loss import FORWARD_PROCESS, Loss, attach_process, split_process
from training.pictures import class_columns, grid, save_picture
from training.runlog import Meter, RunLog
from training.state import StateError
from training.stop import Stop
from training.timesteps import ImportanceTimesteps, Timesteps, UniformTimesteps


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Rate of optimizer step 0, 1, …: linear warm-up, constant, linear decay to 0 at the end."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    left = (steps - step) / config.decay_steps if config.decay_steps else 1.0
    return config.learning_rate * min(warm, left, 1.0)


class Trainer:
    """One run in one folder. `run()` trains to config.steps; see `training.state` for its files."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        *,
        init: Path | None = None,
        progress: bool = True,
    ) -> None:
        self.config, self.folder, self.progress = config, folder, progress
        device = pick_device(config.device) if config.device != "auto" else None
        torch.manual_seed(config.seed)  # the initial weights
        self.network = UNet(config.network)
        self.accelerator = Accelerator(
            # Told of nothing, accelerate takes several processes without a GPU for as many runs.
            cpu=device.type == "cpu" if device else not torch.accelerator.is_available(),
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=config.accumulate, sync_with_dataloader=False
            ),
        )
        self.device = self.accelerator.device
        self._check_batch()
        self.images = load_images(
            config.data,
            channels=config.network.in_channels,
            side=config.network.image_size,
            num_classes=config.network.num_classes,
            progress=progress and self.is_main,
        )
        self.model_config: ModelConfig = config.model(self.images.class_names, self._crop())
        self.schedule = config.schedule.build()
        process = attach_process(self.network, config)
        self.objective = Loss(config, self.schedule, process)
        self.timesteps: Timesteps = (
            ImportanceTimesteps(self.schedule.T, self.device)
            if config.timesteps == "importance"
            else UniformTimesteps(self.schedule.T)
        )
        self.batches = Batches(
            self.images,
            seed=config.seed,
            T=self.schedule.T,
            flips=config.data.flips,
            null_label=config.network.null_label,
            label_dropout=config.label_dropout,
            labelled=config.network.num_classes > 0,
            device=self.device,
            timesteps=self.timesteps,
            stages=self._stages(),
            drops=self._drops_by_image(),
        )
        self.network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        # Batches are all of one size: the first tells which of a GPU's kernels are quickest.
        torch.backends.cudnn.benchmark = True
        optimizer = config.optimizer
        with compiling():  # which torch's optimizers load, and which needs a folder for its code
            self.optimizer = torch.optim.Adam(
                self.network.parameters(),
                lr=optimizer.learning_rate,
                betas=(optimizer.beta1, optimizer.beta2),
                fused=self.device.type in ("cpu", "cuda"),
            )
        self._begun = init is not None or config.objective != "consistency"
        if init is not None:
            self._start_from(init)
        self.ema = EMA(self.network.parameters(), config.ema_decay)
        self.step = 0
        self.dtype = self._precision()
        self.dealt = self._dealt()
        self._recorded = False  # whether the compiled network is of CUDA graphs
        self._stop = Stop()
        self.keeper = Keeper(
            folder, config, self.network, self.ema, self.optimizer, self.timesteps, self.is_main
        )

    def _stages(self) -> Stages | None:
        if self.config.objective != "consistency":
            return None
        return Stages(self.config.consistency, self.schedule, self.config.batch_size)

    def _drops_by_image(self) -> bool:
        """Whether what is dropped is drawn image by image; on a GPU the whole pass draws."""
        return bool(self.config.network.dropout) and self.device.type == "cpu"

    def _check_batch(self) -> None:
        parts = self.accelerator.num_processes * self.config.accumulate
        if self.config.batch_size % parts:
            raise ConfigError(
                f"batch_size = {self.config.batch_size}: must be a multiple of processes × "
                f"accumulate = {parts}"
            )

    def _crop(self) -> tuple[int, int] | None:
        side = self.config.network.image_size
        padded = self.config.data.fit == "pad" and self.images.size != (side, side)
        return self.images.size if padded else None  # None, too, where sizes differ

    def _start_from(self, init: Path) -> None:
        from diffusion.checkpoint import load

        weights = load(init).network.state_dict()
        if self.objective.process is not None:  # it starts anew
            state = self.objective.process.state_dict(prefix=f"{FORWARD_PROCESS}.")
            weights = {**weights, **state}
        try:
            self.network.load_state_dict(weights)
        except RuntimeError as error:
            raise StateError(f"{init}: does not fit the configured network: {error}") from error

    def _precision(self) -> torch.dtype:
        if self.config.precision != "auto":
            return torch.bfloat16 if self.config.precision == "bf16" else torch.float32
        if self.device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
        return fast_dtype(Model(self.model_config, self.network))

    def _dealt(self) -> Dealt | None:
        """How rows are dealt to the cores of a CPU; None on a GPU."""
        if self.device.type != "cpu":
            return None
        large = Model(self.model_config, self.network).is_large
        parts, threads = cores.deal(self._micro(), cores.count(), large=large)
        parameters = list(self.network.parameters())
        return Dealt(parameters, parts=parts, threads=threads, compiled=self.config.compile)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return bool(self.accelerator.is_main_process)

    def resume(self) -> int:
        """Continue from the folder's state; returns its step."""
        self.step = self.keeper.load()
        self._begun = True
        return self.step

    def loss(self, network: Callable[..., Tensor], batch: Batch) -> Tensor:
        """The configured objective on a batch, a scalar: see `training.objectives`."""
        losses = self.objective(network, batch, dtype=self.dtype)
        weighted = (losses * self.timesteps.weight(batch.t)).mean()
        self._record(batch.t, losses)
        return weighted

    def run(self) -> None:
        """Train to config.steps, or until interrupted: either way the last step is on disk.

        Raises StateError if the run diverges: the last good checkpoint is on disk; ConfigError
        for consistency tuning of weights that nothing has trained; CompileError.
        """
        config = self.config
        if not self._begun:
            raise ConfigError(
                f"objective = {config.objective!r}: needs --init, the folder or the name of a "
                "trained model to start from"
            )
        self.keeper.save_config()
        network, optimizer = self._prepare()
        bar = tqdm(
            total=config.steps,
            initial=self.step,
            desc=self.folder.name,
            unit="step",
            disable=not (self.progress and self.is_main),
        )
        with self._stop.listening(), bar, RunLog.at(self.folder, self.step, self.is_main) as log:
            meter = Meter(config.batch_size)
            while self.step < config.steps and not self._asked_to_stop():
                rate = learning_rate(config.optimizer, self.step, config.steps)
                with compiling() if config.compile else nullcontext():
                    loss, norm = self._optimize(network, optimizer, rate)
                self.step += 1
                self.ema.update(self.step)
                meter.add(loss)
                self.keeper.add(loss)
                bar.update()
                if self.step % config.log_every == 0:
                    values = meter.read() | {"learning_rate": rate, "grad_norm": float(norm)}
                    self.keeper.check_losses(self.step)
                    bar.set_postfix(loss=f"{values['loss']:.4f}", im_s=f"{values['images_s']:.0f}")
                    if log is not None:
                        log.write(self.step, values)
                if self._due(config.checkpoint_every):
                    self.save()
                if config.sample_every and self._due(config.sample_every):
                    self.keeper.check(self.step)
                    with meter.paused():
                        if self.is_main:
                            self.save_samples(log)
        self.save()
        self.accelerator.end_training()

    def stepper(self) -> Callable[[], None]:
        """One optimizer step a call, with nothing written: for benchmarks and profilers."""
        network, optimizer = self._prepare()

        def step() -> None:
            self._optimize(network, optimizer, self.config.optimizer.learning_rate)
            self.step += 1
            self.ema.update(self.step)

        return step

    def _prepare(self) -> tuple[Callable[..., Tensor], Any]:
        """Network and optimizer as accelerate wraps them, compiled if configured."""
        self.network.train()
        if self.dealt is not None:  # the network as it is: `average` does what DDP's hooks would
            network, optimizer = self.network, self.accelerator.prepare(self.optimizer)
            options = cores.compile_options()
            compiled = torch.compile(network, options=options) if self.config.compile else network
            return compiled, optimizer
        network, optimizer = self.accelerator.prepare(self.network, self.optimizer)
        if not self.config.compile:
            return network, optimizer
        # A GPU would wait for Python, which starts a thousand kernels a step: as two CUDA graphs it
        # starts them at once. Their memory is written over by the next pass, so that no gradient
        # can wait there for another's.
        parts = self.config.accumulate * self.accelerator.num_processes
        self._recorded = self.device.type == "cuda" and parts == 1
        mode = "reduce-overhead" if self._recorded else None
        return torch.compile(network, mode=mode), optimizer

    def _asked_to_stop(self) -> bool:
        """Whether any process got a signal: all must leave the loop at the same step."""
        if self.accelerator.num_processes == 1:
            return self._stop.asked
        flag = torch.tensor(float(self._stop.asked), device=self.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _optimize(
        self, network: Callable[..., Tensor], optimizer: Any, rate: float
    ) -> tuple[Tensor, Tensor]:
        """One optimizer step over config.batch_size images; returns loss and gradient norm."""
        config, accelerator = self.config, self.accelerator
        for group in optimizer.param_groups:
            group["lr"] = rate
        micro = self._micro()
        total = torch.zeros((), device=self.device)
        norm = torch.zeros((), device=self.device)
        for part in range(config.accumulate):
            first = self._first(part)
            batch = self.batches.at(first, micro)
            if self._recorded:
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            with accelerator.accumulate(network), self._dropout(first):
                loss = self._backward(network, batch)
                if accelerator.sync_gradients:
                    if self.dealt is not None and accelerator.num_processes > 1:
                        average(list(self.network.parameters()), accelerator.reduce)
                    norm = accelerator.clip_grad_norm_(
                        self.network.parameters(), config.optimizer.grad_clip
                    )
                optimizer.step()
                optimizer.zero_grad()
            total += loss / config.accumulate
        return accelerator.reduce(total, "mean"), norm

    def _dropout(self, position: int) -> AbstractContextManager[None]:
        """What dropout draws in the pass that begins there, where the whole pass draws."""
        if not self.config.network.dropout or self._drops_by_image():
            return nullcontext()
        return seeded(self.device, self.config.seed, position)

    def _backward(self, network: Callable[..., Tensor], batch: Batch) -> Tensor:
        """Add the gradients of the configured loss on a batch, which is returned."""
        if self.dealt is None:
            loss = self.loss(network, batch)
            self.accelerator.backward(loss)
            return loss.detach()
        weight = self.timesteps.weight(batch.t) / len(batch.t)
        losses = self.dealt.backward(
            lambda rows: self.objective(network, rows, dtype=self.dtype),
            batch,
            weight / self.config.accumulate,
        )
        self._record(batch.t, losses)
        return (losses * weight).sum()

    def _record(self, t: Tensor, losses: Tensor) -> None:
        if self.config.timesteps == "importance":
            gather = self.accelerator.gather
            self.timesteps.record(gather(t), gather(losses.detach()))

    def _micro(self) -> int:
        """Images a backward pass of one process."""
        parts = self.config.accumulate * self.accelerator.num_processes
        return self.config.batch_size // int(parts)

    def _first(self, part: int = 0) -> int:
        """Position of this process' first image of a pass of the next step: the processes share a
        pass, one after the other."""
        processes, index = self.accelerator.num_processes, self.accelerator.process_index
        passes = part * int(processes) + int(index)
        return self.step * self.config.batch_size + passes * self._micro()

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or (self.step == self.config.steps)

    def averaged_model(self) -> Model:
        """The model with the averaged weights."""
        names = [name for name, _ in self.network.named_parameters()]
        weights, config = split_process(self.ema.state(names), self.model_config)
        return Model(config, build_network(config, weights, self.device))

    def save(self) -> None:
        """Write the model and the state. Raises StateError; what was there before stays whole."""
        self.keeper.add(self._trial())  # all others are of the weights before the last update
        self.keeper.save(self.averaged_model, self.step)

    @torch.no_grad()
    def _trial(self) -> Tensor:
        """The loss of the weights as they are, on the images that come next."""
        first, micro = self._first(), self._micro()
        losses = self.objective(self.network, self.batches.at(first, micro), dtype=self.dtype)
        loss: Tensor = self.accelerator.reduce(losses.mean(), "mean")
        return loss

    def save_samples(self, log: RunLog | None) -> Path:
        """A grid of samples of the averaged weights, one class a column where there are.

        By DDIM; of a consistency model by its own sampler.
        """
        config, classes = self.config, self.config.network.num_classes
        labels = [i % classes for i in range(config.sample_images)] if classes else None
        # A consistency model's own sampler takes a few evaluations, whatever sample_steps is.
        few = config.objective == "consistency"
        images = sample(
            self.averaged_model(),
            config.sample_images,
            sampler=None if few else "ddim",
            steps=None if few else config.sample_steps,
            seed=config.seed,
            class_label=labels,
            dtype=self.dtype,
        )
        picture = grid(images, columns=class_columns(len(images), classes))
        path = self.folder / "samples" / f"step-{self.step:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_picture(picture, path)
        if log is not None:
            log.picture(self.step, picture)
        return path
