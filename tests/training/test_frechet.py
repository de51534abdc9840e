import threading

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion import cores
from training.features import FeatureError, look
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


@pytest.mark.parametrize("classified", [False, True])
def test_each_core_looks_at_its_own_images(
    monkeypatch: pytest.MonkeyPatch, classified: bool
) -> None:
    monkeypatch.setattr(cores, "_cores", 2)
    threads = set()

    def features(images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        assert torch.is_inference_mode_enabled() and torch.get_num_threads() == 1
        threads.add(threading.get_ident())
        seen = images.flatten(1)
        return (seen, seen[:, :3]) if classified else seen

    images = torch.randn(7, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    looked = look(features, images)
    assert len(threads) == 2
    np.testing.assert_array_equal(looked.features, images.flatten(1).numpy())
    if classified:
        assert looked.labels is not None
        np.testing.assert_array_equal(looked.labels, images.flatten(1)[:, :3].argmax(1).numpy())
    else:
        assert looked.labels is None
    with pytest.raises(FeatureError, match=r"gave shape \[\d, 1, 2, 2\], not \[N, F\]"):
        look(lambda images: images, images)
