"""The words of each kind's route in the documentation: what it does, and examples of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from app.views import EXAMPLE_ID


@dataclass(frozen=True)
class Words:
    """description: default, what the spec says of itself. examples: as OpenAPI has them."""

    description: str = ""
    examples: dict[str, Any] = field(default_factory=dict)


_PICTURE = "iVBORw0KGgo…"


WORDS: dict[str, Words] = {
    "generate": Words(
        "Reverse chain: images from noise.",
        {
            "seven": {"summary": "One digit", "value": {"class_label": 7}},
            "chain": {
                "summary": "Four images in 50 DDIM steps, with the chain's x̂_0 every tenth step",
                "value": {
                    "num_images": 4,
                    "seed": 1,
                    "sampler": "ddim",
                    "steps": 50,
                    "snapshots": {"every": 10, "kinds": ["x_start"]},
                },
            },
            "guided": {
                "summary": "Guidance away from the unconditional",
                "value": {"class_label": 3, "guidance": 2.5, "deterministic": True},
            },
        },
    ),
    "noise": Words(
        "Forward process: x_t of uploaded images at many t.",
        {
            "four": {
                "summary": "x_t at four t",
                "value": {"t": [1, 250, 500, 1000], "seed": 0, "images": [_PICTURE], "fit": "pad"},
            }
        },
    ),
    "reconstruct": Words(
        "Denoise from any point of a chain: an image noised to t, a snapshot of a job, or an "
        "x_t.\n\n"
        "`num_images` samples of p(x_0|x_t) come from the one x_t; `steps` counts the "
        "evaluations from there down to the image.",
        {
            "image": {
                "summary": "Four samples of p(x_0|x_t) from one picture, noised to t",
                "value": {"images": [_PICTURE], "t": 400, "num_images": 4, "seed": 1},
            },
            "branch": {
                "summary": "Go on from a snapshot of an earlier job, with other noise",
                "value": {
                    "source": {"job": EXAMPLE_ID, "t": 505, "index": 0},
                    "num_images": 4,
                    "seed": 2,
                },
            },
            "x_t": {
                "summary": "From an array of your own, as base64 .npy",
                "value": {"x_t": "k05VTVBZAQB2AHsn…", "t": 250, "sampler": "ddim", "steps": 50},
            },
        },
    ),
    "restore": Words(
        "Samples of images that agree with a measurement y = A x_0 + noise: fill in a part, make "
        "larger, colour, sharpen, denoise.\n\n"
        "The picture is the measurement itself: of the model's size for `mask` (what is filled in "
        "may hold anything), `blur` and `identity`, smaller by the factor for `average_pool`, grey "
        "for `gray`. Several samples show several answers: `urls.mean` is their mean, `urls.std` "
        "where they differ, and `images[].residual` how far A x is from y.",
        {
            "mask": {
                "summary": "Eight ways to fill in the lower half",
                "value": {
                    "images": [_PICTURE],
                    "operator": {"name": "mask", "boxes": [[0, 16, 32, 32]]},
                    "num_images": 8,
                    "seed": 1,
                },
            },
            "larger": {
                "summary": "Four times as large",
                "value": {
                    "images": [_PICTURE],
                    "operator": {"name": "average_pool", "factor": 4},
                    "num_images": 4,
                },
            },
            "denoise": {
                "summary": "Take away noise of 25 grey levels, from an array that is not clipped",
                "value": {"y": "k05VTVBZAQB2AHsn…", "operator": {"name": "identity"}, "noise": 25},
            },
        },
    ),
    "encode": Words(
        "The x_T of images, by the probability flow from the image up to the noise.\n\n"
        "They are the job's snapshots, as `.npy` too: the source of a `/reconstruct` with ddim and "
        "as many steps, which leads back to the image, and of an `/interpolate` on the sphere.",
        {
            "two": {
                "summary": "The x_T of two pictures",
                "value": {"images": [_PICTURE, _PICTURE], "steps": 100},
            }
        },
    ),
    "interpolate": Words(
        "Two images noised to t with one ε, mixed there by each λ, and denoised; or two encodings, "
        "mixed on the sphere.\n\n"
        "All chains share their noise: image i differs from its neighbours by λ alone.",
        {
            "sphere": {
                "summary": "Between the x_T of two images that POST /encode found",
                "value": {
                    "path": "sphere",
                    "source": {"job": EXAMPLE_ID, "indices": [0, 1]},
                    "t": 1000,
                    "lambdas": [0.0, 0.25, 0.5, 0.75, 1.0],
                },
            },
            "five": {
                "summary": "From one picture to another in five images",
                "value": {
                    "images": [_PICTURE, _PICTURE],
                    "t": 500,
                    "lambdas": [0.0, 0.25, 0.5, 0.75, 1.0],
                    "seed": 3,
                },
            },
        },
    ),
    "likelihood": Words(
        "The bound on −log p of images in bits/dim, by term. The numbers are the job's `result`."
        "\n\nWith `mode: flow` it is their density by the probability flow instead: an estimate, "
        "with a standard error over its draws, and no bound.",
        {
            "estimate": {
                "summary": "An unbiased estimate from 50 evaluations an image",
                "value": {"images": [_PICTURE], "mode": "monte_carlo", "samples": 50, "seed": 0},
            },
            "full": {
                "summary": "All terms of the bound, and three of them told one by one",
                "value": {"images": [_PICTURE], "mode": "full", "terms": [1, 100, 1000], "seed": 0},
            },
            "flow": {
                "summary": "The density by the flow, and how sure that is",
                "value": {"images": [_PICTURE], "mode": "flow", "draws": 8, "seed": 0},
            },
        },
    ),
}
