"""The Fréchet distance between two sets of features (Heusel et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Gaussian:
    """The normal distribution of features [N, F]: μ [F], Σ^½ [F, F] and tr Σ."""

    mean: NDArray[np.float64]
    root: NDArray[np.float64]
    trace: float

    @classmethod
    def of(cls, features: NDArray[Any]) -> Gaussian:
        """Of two rows or more."""
        values = features.astype(np.float64)
        sigma = np.atleast_2d(np.cov(values, rowvar=False))
        return cls(values.mean(0), _sqrt_psd(sigma), float(np.trace(sigma)))

    def distance(self, other: Gaussian) -> float:
        """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2(Σ_a Σ_b)^½)."""
        # tr (Σ_a Σ_b)^½ is the sum of the singular values of Σ_a^½ Σ_b^½: no root of a rounding
        # error.
        overlap = np.linalg.svd(self.root @ other.root, compute_uv=False).sum()
        apart = np.square(self.mean - other.mean).sum()
        return float(apart + self.trace + other.trace - 2 * overlap)


def frechet_distance(a: NDArray[Any], b: NDArray[Any]) -> float:
    """The distance of the normal distributions of features [N, F] and [M, F].

    Raises ValueError unless both have at least two rows and the same number of features.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features: shapes {a.shape} and {b.shape} must be [N ≥ 2, F], same F")
    return Gaussian.of(a).distance(Gaussian.of(b))


def _sqrt_psd(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * np.sqrt(values.clip(min=0))) @ vectors.T)
