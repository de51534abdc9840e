"""The loss of a batch, as configured: noise it, run the network, apply the objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from diffusion.bound import bound_table
from diffusion.forward import q_sample
from diffusion.learned_schedule import LearnedSchedule
from diffusion.model import ModelConfig
from diffusion.parameterization import to_x_start
from diffusion.schedule import Schedule, ScheduleConfig
from training.batches import Batch
from training.config import TrainConfig
from training.dropout import what_is_kept
from training.objectives import OBJECTIVES, Pass, learned_forward

FORWARD_PROCESS = "forward_process"  # the submodule of a network that trains its schedule too


class Loss:
    """One loss an image; `schedule` is fixed, or `process` is trained in its place."""

    def __init__(
        self, config: TrainConfig, schedule: Schedule, process: LearnedSchedule | None = None
    ) -> None:
        self.config, self.schedule, self.process = config, schedule, process
        self.table = bound_table(schedule)
        self.objective = OBJECTIVES[config.objective] if process is None else learned_forward

    def __call__(
        self, network: Callable[..., Tensor], batch: Batch, *, dtype: torch.dtype
    ) -> Tensor:
        """[N]; dtype: bfloat16 runs the network under autocast."""
        config = self.config
        target = None if batch.r is None else self._earlier(network, batch, batch.r, dtype)
        x_t, out = self._output(network, batch, batch.t, dtype)
        return self.objective(
            Pass(
                schedule=self.schedule,
                table=self.table,
                prediction=config.prediction,
                variance=config.variance,
                x_start=batch.x_start,
                x_t=x_t,
                t=batch.t,
                eps=batch.eps,
                out=out,
                gamma=config.min_snr_gamma,
                hybrid_weight=config.hybrid_weight,
                process=self.process,
                r=batch.r,
                target=target,
                huber=config.consistency.huber,
                sigma_power=config.consistency.sigma_power,
            )
        )

    def _output(
        self, network: Callable[..., Tensor], batch: Batch, t: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """x_t of the batch at t, and what the network makes of it, float32."""
        process = self.process
        if process is None:
            x_t = q_sample(self.schedule, batch.x_start, t, batch.eps)
        else:
            x_t = process.q_sample(batch.x_start, t, batch.eps)
        x_t = x_t.contiguous(memory_format=torch.channels_last)
        device = batch.x_start.device.type
        seeds, kept = batch.dropping, []  # of one seed the same at r as at t
        if seeds is not None:
            kept = [what_is_kept(self.config.network, seeds)]
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = network(x_t, t, batch.class_label, *kept)
        return x_t, out.float()

    @torch.no_grad()
    def _earlier(
        self, network: Callable[..., Tensor], batch: Batch, r: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """x̂_0 at r, or x_0 itself where r = −1: without gradient, with the dropout of t's."""
        at_image, device = r < 0, batch.x_start.device
        # On a GPU the question would wait for the device in each step, which costs more.
        if device.type == "cpu" and bool(at_image.all()):
            return batch.x_start
        r = r.clamp(min=0)
        # What a generator draws here it draws again at t, where it stands as it did.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            x_r, out = self._output(network, batch, r, dtype)
        found = to_x_start(self.schedule, self.config.prediction, x_t=x_r, t=r, out=out)
        return torch.where(at_image.view(-1, 1, 1, 1), batch.x_start, found)


def attach_process(network: nn.Module, config: TrainConfig) -> LearnedSchedule | None:
    """Give the network the forward process to train, if so configured.

    As a submodule, it is optimised, averaged, saved and shared among processes with the rest.
    """
    if not config.learns_schedule:
        return None
    process = LearnedSchedule(config.schedule.build())
    network.add_module(FORWARD_PROCESS, process)
    return process


def split_process(
    state: dict[str, Tensor], config: ModelConfig
) -> tuple[dict[str, Tensor], ModelConfig]:
    """The network's own weights, and the config with the betas that were trained, if any."""
    prefix = FORWARD_PROCESS + "."
    own = {name: value for name, value in state.items() if not name.startswith(prefix)}
    if len(own) == len(state):
        return own, config
    process = LearnedSchedule(config.schedule.build())
    process.load_state_dict(
        {name.removeprefix(prefix): state[name].cpu() for name in state if name not in own}
    )
    return own, replace(config, schedule=ScheduleConfig.from_betas(process.betas()))
