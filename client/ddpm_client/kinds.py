"""The kinds of job: for each what a request may say, and the method that makes one.

A new kind is a TypedDict and a method here; both clients have it then. The fields are explained
in the service's documentation (`/docs`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic, Literal, NotRequired, Required, TypedDict, TypeVar, Unpack

from ddpm_client.pictures import Array, Picture

J = TypeVar("J")
Variance = Literal["large", "small", "learned"]
SnapshotKind = Literal["x_t", "x_start", "eps"]


class Options(TypedDict, total=False):
    """How a job is asked for, whatever its kind: not part of the request.

    wait: until it has ended (the default), and raise JobEnded unless it succeeded; False: the job
    is there at once. timeout: seconds to wait, then WaitTimeout; as long as the job is not taken
    in, what stands in its way is raised, and its answer may take the client's timeout longer.
    idempotency_key: the same key and request give the same job; one is made up if absent, so that
    no retry makes a second job.
    """

    wait: bool
    timeout: float | None
    idempotency_key: str


class Common(Options, total=False):
    """What every kind of job can be told."""

    model: str
    model_digest: str
    seed: int
    deterministic: bool
    format: Literal["png", "webp", "npy"]
    ttl_s: int
    deadline_s: float
    webhook_url: str
    priority: Literal["normal", "high"]
    provenance: Mapping[str, Any]


class Snapshots(TypedDict, total=False):
    """Which states of the chain to keep: either `every` k-th step, or `at` these t."""

    every: int
    at: Sequence[int]
    kinds: Sequence[SnapshotKind]
    preview_px: int


class Chain(Common, total=False):
    """How to walk the reverse chain."""

    preset: Literal["fast", "balanced", "faithful"]
    sampler: str
    steps: int
    spacing: str
    eta: float
    variance: Variance
    corrector_steps: int
    clip: bool
    class_label: int | str
    guidance: float
    snapshots: Snapshots


class Pictures(TypedDict, total=False):
    """Pictures to work on: files, bytes of files, PIL images, or uint8 arrays [H,W] or [H,W,C]."""

    images: Picture | Sequence[Picture]
    fit: Literal["error", "pad", "resize"]


class Generate(Chain, total=False):
    """The reverse chain, from noise."""

    num_images: int


class Noise(Common, Pictures, total=False):
    """The forward process, of pictures at many t."""

    t: Required[Sequence[int]]
    mode: Literal["closed", "stepwise"]
    kinds: Sequence[Literal["x_t", "eps"]]


class SnapshotOf(TypedDict):
    """A snapshot that an earlier job kept."""

    job: str
    t: int
    index: NotRequired[int]


class Reconstruct(Chain, Pictures, total=False):
    """From the middle of a chain: of a picture, an x_t, or a snapshot of a job."""

    num_images: int
    source: Literal["image", "x_t"] | SnapshotOf
    t: int
    x_t: Array


class Operator(TypedDict, total=False):
    """What a measurement keeps of an image. mask: a picture, white where it is to be filled in."""

    name: Required[Literal["mask", "average_pool", "gray", "blur", "identity"]]
    boxes: Sequence[Sequence[int]]
    mask: Picture
    factor: int
    weights: Sequence[float]
    deviation: float
    kernel: Sequence[Sequence[float]]


class Restore(Chain, Pictures, total=False):
    """Samples given a measurement: a picture, or an array y of images that lie in [−1, 1]."""

    operator: Required[Operator]
    num_images: int
    source: Literal["image", "y"]
    y: Array
    noise: float
    method: Literal["projection", "moment"]
    solver_steps: int
    travel: int


class Encode(Common, Pictures, total=False):
    """From pictures to their x_T, which are the job's snapshots."""

    t: int
    steps: int
    order: Literal[1, 2]
    iterations: int
    class_label: int | str
    guidance: float
    snapshots: Snapshots


class PairOf(TypedDict):
    """Two snapshots that an earlier job kept."""

    job: str
    indices: NotRequired[Sequence[int]]


class Interpolate(Chain, Pictures, total=False):
    """Between two pictures, or two encodings."""

    path: Literal["line", "sphere"]
    source: Literal["image"] | PairOf
    t: Required[int]
    lambdas: Required[Sequence[float]]


class Likelihood(Common, Pictures, total=False):
    """The bound on −log p of pictures, or their density by the flow."""

    mode: Literal["full", "monte_carlo", "flow"]
    samples: int
    variance: Variance
    class_label: int | str
    indices: Sequence[int]
    terms: Sequence[int]
    draws: int
    steps: int


KINDS: dict[str, type] = {
    "generate": Generate,
    "noise": Noise,
    "reconstruct": Reconstruct,
    "restore": Restore,
    "encode": Encode,
    "interpolate": Interpolate,
    "likelihood": Likelihood,
}


class Kinds(Generic[J]):
    """One method a kind. J: what it returns, a Job or an awaitable of one."""

    def create(self, kind: str, **request: Any) -> J:
        """A job of any kind, also of one that this client has no method for; with `**job.manifest`,
        the job that makes the same images again."""
        raise NotImplementedError

    def generate(self, **request: Unpack[Generate]) -> J:
        """Images from noise."""
        return self.create("generate", **request)

    def noise(self, **request: Unpack[Noise]) -> J:
        """x_t of pictures at many t; they are the job's snapshots."""
        return self.create("noise", **request)

    def reconstruct(self, **request: Unpack[Reconstruct]) -> J:
        """Images from any point of a chain."""
        return self.create("reconstruct", **request)

    def restore(self, **request: Unpack[Restore]) -> J:
        """Images given what was measured: filled in, larger, coloured, sharper, without noise."""
        return self.create("restore", **request)

    def encode(self, **request: Unpack[Encode]) -> J:
        """The x_T of pictures: `reconstruct` and `interpolate` go on from there."""
        return self.create("encode", **request)

    def interpolate(self, **request: Unpack[Interpolate]) -> J:
        """Images between two pictures."""
        return self.create("interpolate", **request)

    def likelihood(self, **request: Unpack[Likelihood]) -> J:
        """Bits/dim of pictures: the numbers are the job's `result`."""
        return self.create("likelihood", **request)
