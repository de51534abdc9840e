"""Draw images from a model: the whole reverse chain as one call, or as a stream of its steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial

import torch
from torch import Tensor

from diffusion.checks import check_real, check_whole
from diffusion.condition import Condition
from diffusion.forward import alpha_bars
from diffusion.model import Estimate, Model, check_model
from diffusion.noise import Purpose, check_seed, image_normals, normals
from diffusion.presets import Preset
from diffusion.samplers import FewStepsWarning, check_options, few_steps
from diffusion.speed import fast_dtype, prepare
from diffusion.table import (
    COLUMNS,
    DeviceTable,
    SamplerError,
    SamplerTable,
    check_name,
    clip_x_start,
    remember,
    scale_noise,
    update,
)
from diffusion.tuned import TUNED

ClassLabel = int | Sequence[int] | Tensor | None


class NotFiniteError(ArithmeticError):
    """A network gave NaN or infinity; the message says at which t."""


@dataclass(frozen=True)
class Step:
    """One row of a chain, after its network evaluation.

    row: 0, 1, … of `rows` in all; t: index 0..T−1; x_t: what entered the step; x_start and eps:
    what was found there; x_next: what left it. All [N, C, H, W].
    """

    row: int
    rows: int
    t: int
    x_t: Tensor
    x_start: Tensor
    eps: Tensor
    x_next: Tensor


def guided_estimate(
    model: Model, x: Tensor, t: Tensor, *, class_label: Tensor | None, guidance: float = 1.0
) -> Estimate:
    """The model's estimate, with ε_u + g(ε_c − ε_u) for ε: classifier-free guidance.

    Ho, Salimans 2022; g = 1 is ε_c alone. x̂_0 follows, as all is linear in the network's output. v
    of a learned variance is as with the label alone.
    """
    if class_label is None or guidance == 1.0:
        return model.estimate(x, t, class_label)
    both = torch.cat([_null_labels(model, class_label, guidance), class_label])
    out_u, out_c = model.output(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
    mixed = out_u + guidance * (out_c - out_u)
    return replace(model.read(mixed, x, t), v=model.read(out_c, x, t).v)


def _null_labels(model: Model, class_label: Tensor, guidance: float) -> Tensor:
    null = model.config.network.null_label
    if null is None:
        raise SamplerError(f"guidance = {guidance}: needs a model with a null label")
    return torch.full_like(class_label, null)


@torch.inference_mode()
def chain(
    model: Model,
    table: SamplerTable,
    x_t: Tensor,
    *,
    seed: int = 0,
    indices: Tensor | None = None,
    class_label: Tensor | None = None,
    guidance: float = 1.0,
    condition: Condition | None = None,
) -> Iterator[Step]:
    """Run the rows of a table from x_t [N, C, H, W], yielding every Step.

    indices: [N], the image index that keys each image's noise (default 0..N−1). The noise of a
    row is keyed by its t, so that a chain that goes on from the x_t of another, in a table with
    that `start`, draws nothing that is in x_t already, the seed being the same or not. condition:
    on a measurement, see `diffusion.condition`. Raises
    NotFiniteError after the last row: clipping would hide an infinite x̂_0.
    """
    n = x_t.shape[0]
    indices = torch.arange(n, device=x_t.device) if indices is None else indices
    seeds = torch.full_like(indices, check_seed(seed))
    on_device = DeviceTable.of([table], x_t.device)
    noisy = on_device.coefficients[:, COLUMNS.index("c")] != 0
    x, x_start_prev, x_start_older = x_t, torch.zeros_like(x_t), torch.zeros_like(x_t)
    deep, between = table.depth > 1, table.between
    finite: list[Tensor] = []
    for row, noisy_row in enumerate(noisy.tolist()):
        rows = on_device.coefficients[row].expand(n, -1)
        t = (on_device.time if between[row] else on_device.t)[row].expand(n)
        evaluate = partial(guided_estimate, model, t=t, class_label=class_label, guidance=guidance)
        clip = partial(clip_x_start, rows)
        if condition is None:
            found = evaluate(x)
            x_start = clip(found.x_start)
        else:
            alpha_bar, r2 = alpha_bars(model.schedule, t, x)
            found, x_start = condition.estimate(evaluate, x, alpha_bar=alpha_bar, r2=r2, clip=clip)
        finite.append(found.finite.all())
        z = torch.zeros_like(x)
        if noisy_row:
            z = normals(
                seeds,
                indices,
                rows=torch.full_like(indices, int(table.noise[row])),
                purpose=Purpose(int(table.purpose[row])),
                shape=model.shape,
            )
        if table.spread[row] and found.v is not None:
            z = scale_noise(on_device.spread[row].expand(n), found.v, z)
        x_next = update(
            rows,
            x,
            x_start=x_start,
            eps=found.eps,
            x_start_prev=x_start_prev,
            z=z,
            x_start_older=x_start_older if deep else None,
        )
        yield Step(row, len(table), int(table.t[row]), x, x_start, found.eps, x_next)
        memory = on_device.memory[row].expand(n)
        x_start_older = x_start_prev
        x_start_prev = remember(memory, x_start=x_start, x=x, x_start_prev=x_start_prev)
        x = x_next
    # Asked once, at the end, so that a GPU need not wait for the host in each step.
    was_finite = torch.stack(finite).tolist()
    if not all(was_finite):
        first = int(table.t[was_finite.index(False)]) + 1
        raise NotFiniteError(f"t = {first}: the network's output is not finite (NaN or infinity)")


def sample(
    model: Model,
    num_images: int = 1,
    *,
    preset: str | None = None,
    sampler: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    class_label: ClassLabel = None,
    guidance: float = 1.0,
    spacing: str | None = None,
    eta: float | None = None,
    variance: str | None = None,
    clip: bool | None = None,
    rederive_eps: bool | None = None,
    landing: str | None = None,
    corrector_steps: int | None = None,
    travel: int = 1,
    condition: Condition | None = None,
    dtype: torch.dtype | None = None,
    compile: bool = False,
    batch_size: int = 64,
    on_step: Callable[[int, int, Step], None] | None = None,
) -> Tensor:
    """Images [num_images, C, H, W] in [−1, 1], float32.

    preset: fast, balanced or faithful, for sampler, steps and spacing (`diffusion.presets`).
    sampler, steps, spacing, variance, clip, rederive_eps, landing: by default as the model's config
    says (`SamplingDefaults`). eta: of ddim, by default 0. class_label: one label for all, or one an
    image. Image i depends on (seed, i) and not on `batch_size`. travel, condition: of
    `diffusion.restore`. dtype: of the network (default: bfloat16 where a probe finds it faster,
    else float32). compile: through torch.compile (about a minute at first; CompileError where no
    compiler works).
    on_step(first image of the batch, rows done, Step) is called after every evaluation.
    Raises SamplerError or ValueError naming the bad argument, NotFiniteError. Warns with
    FewStepsWarning where the sampler has too few steps.
    """
    check_model(model)
    if preset is not None:
        given = {"sampler": sampler, "steps": steps, "spacing": spacing}
        sampler, steps, spacing = astuple(chosen_preset(model, preset, given))
    check_whole("num_images", num_images, least=1, error=SamplerError)
    check_whole("batch_size", batch_size, least=1, error=SamplerError)
    check_guidance(guidance, class_label)
    if sampler == TUNED and steps is None:
        steps = max(model.tuned, default=1)
    chosen = model.config.sampling.options(
        model.schedule.T,
        sampler=sampler,
        steps=steps,
        spacing=spacing,
        variance=variance,
        clip=clip,
        rederive_eps=rederive_eps,
        landing=landing,
    )
    table = model.table(
        eta=0.0 if eta is None else eta, corrector_steps=corrector_steps, travel=travel, **chosen
    )
    own = {"eta": eta, "variance": variance, "rederive_eps": rederive_eps, "landing": landing}
    check_options(chosen["sampler"], own)
    if table.learned_variance and not model.config.network.learned_variance:
        raise SamplerError("variance = 'learned': this model has no learned variance")
    T = model.schedule.T
    if sampler != TUNED and (few := few_steps(chosen["sampler"], len(table), T, T)):
        warnings.warn(few, FewStepsWarning, stacklevel=2)
    labels = class_labels(model, class_label, num_images)
    fast = prepare(model, dtype=dtype or fast_dtype(model), compile=compile)
    batches = []
    for first in range(0, num_images, batch_size):
        indices = torch.arange(first, min(first + batch_size, num_images), device=model.device)
        x = image_normals(seed, indices, row=0, purpose=Purpose.X_T, shape=model.shape)
        steps_of_chain = chain(
            fast,
            table,
            x,
            seed=seed,
            indices=indices,
            class_label=None if labels is None else labels[indices],
            guidance=guidance,
            condition=condition,
        )
        for step in steps_of_chain:
            x = step.x_next
            if on_step is not None:
                on_step(first, step.row + 1, step)
        batches.append(x.clamp(-1, 1))
    return torch.cat(batches)


def chosen_preset(model: Model, name: str, given: Mapping[str, object]) -> Preset:
    """A preset of the model. Raises SamplerError for what is `given` beside it, which it says."""
    check_name("preset", name, model.presets)
    for field, value in given.items():
        if value is not None:
            raise SamplerError(f"{field} = {value!r}: not beside a preset, which says it")
    return model.presets[name]


def check_guidance(guidance: float, class_label: ClassLabel) -> None:
    """Raise SamplerError unless it is a number, and 1 where there is no label."""
    check_real("guidance", guidance, error=SamplerError)
    if guidance != 1.0 and class_label is None:
        raise SamplerError(f"guidance = {guidance}: needs a class_label to guide towards")


def class_labels(model: Model, class_label: ClassLabel, n: int) -> Tensor | None:
    """Labels [n] on the model's device, or None. Raises ValueError for one out of range."""
    network = model.config.network
    if class_label is None:
        if network.num_classes and network.null_label is None:
            raise ValueError(
                "class_label: this model has no null label; give one of "
                f"0..{network.num_classes - 1}"
            )
        return None
    if not network.num_classes:
        raise ValueError("class_label: this model is unconditional and takes none")
    wrong = f"class_label = {class_label!r:.80}: must be an int, or as many as images"
    try:
        labels = torch.as_tensor(class_label, device=model.device)
    except (RuntimeError, TypeError, ValueError) as error:  # a name, or a list that holds one
        raise ValueError(wrong) from error
    if labels.numel() and (labels.is_floating_point() or labels.dtype == torch.bool):
        raise ValueError(wrong)
    labels = labels.long()
    labels = labels.expand(n) if labels.ndim == 0 else labels
    if labels.shape != (n,):
        raise ValueError(f"class_label: {labels.numel()} labels for {n} images")
    bad = labels[(labels < 0) | (labels >= network.num_classes)]
    if bad.numel():
        raise ValueError(f"class_label = {int(bad[0])}: must be 0..{network.num_classes - 1}")
    return labels
