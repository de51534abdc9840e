import numpy as np
import pytest

from training.frechet import frechet_distance


def test_gaussians_with_diagonal_covariance_have_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    n, mean, scales = 200_000, np.array([1.0, -2.0, 0.5]), np.array([2.0, 0.5, 1.5])
    distance = frechet_distance(rng.normal(size=(n, 3)), mean + scales * rng.normal(size=(n, 3)))
    assert distance == pytest.approx(np.sum(mean**2) + np.sum((scales - 1) ** 2), rel=0.01)


def test_a_set_is_at_distance_zero_from_itself_and_a_shift_counts_squared() -> None:
    features = np.random.default_rng(1).normal(size=(50, 4)) @ np.diag([1.0, 2.0, 0.0, 3.0])
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(features, features + 3.0) == pytest.approx(4 * 9.0)


def test_sets_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(5, 3\) and \(5, 2\)"):
        frechet_distance(np.zeros((5, 3)), np.zeros((5, 2)))
