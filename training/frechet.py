"""The Fréchet distance between two sets of features (Heusel et al. 2017)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def frechet_distance(a: NDArray[Any], b: NDArray[Any]) -> float:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2(Σ_a Σ_b)^½) of features [N, F] and [M, F].

    Raises ValueError unless both have at least two rows and the same number of features.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features: shapes {a.shape} and {b.shape} must be [N ≥ 2, F], same F")
    a, b = a.astype(np.float64), b.astype(np.float64)
    sigma_a, sigma_b = (np.atleast_2d(np.cov(v, rowvar=False)) for v in (a, b))
    # tr (Σ_a Σ_b)^½ is the sum of the singular values of Σ_a^½ Σ_b^½: no root of a rounding error.
    overlap = np.linalg.svd(_sqrt_psd(sigma_a) @ _sqrt_psd(sigma_b), compute_uv=False).sum()
    trace = np.trace(sigma_a) + np.trace(sigma_b)
    return float(np.square(a.mean(0) - b.mean(0)).sum() + trace - 2 * overlap)


def _sqrt_psd(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * np.sqrt(values.clip(min=0))) @ vectors.T)
