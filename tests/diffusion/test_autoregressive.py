"""The masking chain of T = D steps: its bound is the autoregressive log-likelihood, exactly."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from diffusion.theory.autoregressive import MaskingChain

K, D = 3, 4


@pytest.fixture(scope="module")
def chain() -> MaskingChain:
    raw = np.random.Generator(np.random.Philox(key=1)).gamma(0.5, size=(K,) * D) + 1e-3
    return MaskingChain(raw / raw.sum())


@pytest.fixture(scope="module")
def everything() -> np.ndarray:
    return np.array(list(product(range(K), repeat=D)), dtype=np.int64)


def test_the_bound_is_the_log_likelihood(chain: MaskingChain, everything: np.ndarray) -> None:
    terms = chain.terms(everything)
    np.testing.assert_allclose(terms.sum(1), -chain.log_likelihood(everything), rtol=1e-12)
    assert np.all(terms >= 0) and np.all(terms[:, D] == 0)


def test_the_bound_by_brute_force_over_all_states(chain: MaskingChain) -> None:
    """Equation 5 from transition matrices over all (K+1)^D states, posteriors by Bayes' rule."""
    states = np.array(list(product(range(K + 1), repeat=D)), dtype=np.int64)
    index = {tuple(state): i for i, state in enumerate(states.tolist())}
    n = len(states)
    q = np.zeros((D + 1, n, n))  # q[t, i, j] = q(x_t = j | x_{t−1} = i)
    p = np.zeros((D + 1, n, n))  # p[t, j, i] = p_θ(x_{t−1} = i | x_t = j)
    for t in range(1, D + 1):
        for i, state in enumerate(states):
            masked = state.copy()
            masked[t - 1] = K
            q[t, i, index[tuple(masked.tolist())]] = 1
        for j, state in enumerate(states):
            if np.all(state[:t] == K) and np.all(state[t:] < K):
                for value, share in enumerate(chain.p_step(state[None], t)[0]):
                    filled = state.copy()
                    filled[t - 1] = value
                    p[t, j, index[tuple(filled.tolist())]] = share
    blank = index[(K,) * D]
    for x_start in ([0, 1, 2, 0], [2, 2, 1, 0]):
        start = index[tuple(x_start)]
        marginals = [np.eye(n)[start]]  # q(x_t | x_0)
        for t in range(1, D + 1):
            marginals.append(marginals[-1] @ q[t])
        assert marginals[D][blank] == 1  # so L_T = KL(q(x_T|x_0) ‖ p(x_T)) = 0
        bound = -np.log(p[1][marginals[1].argmax(), start])  # L_0
        for t in range(2, D + 1):
            for j in np.flatnonzero(marginals[t]).tolist():
                posterior = marginals[t - 1] * q[t][:, j]
                posterior /= posterior.sum()
                seen = posterior > 0
                kl = np.sum(posterior[seen] * np.log(posterior[seen] / p[t][j][seen]))
                bound += marginals[t][j] * kl
        x = np.array([x_start], dtype=np.int64)
        assert bound == pytest.approx(float(chain.terms(x).sum()), rel=1e-12)
        assert bound == pytest.approx(-float(chain.log_likelihood(x)[0]), rel=1e-12)


def test_the_mean_bound_is_the_cross_entropy(chain: MaskingChain, everything: np.ndarray) -> None:
    """On data from p_θ itself the bound is the entropy: nothing is lost by the chain."""
    weights = chain.joint.ravel()
    entropy = -float(np.sum(weights * np.log(weights)))
    assert float(weights @ chain.terms(everything).sum(1)) == pytest.approx(entropy, rel=1e-12)


def test_the_reverse_chain_samples_the_joint(chain: MaskingChain, everything: np.ndarray) -> None:
    n = 100_000
    uniforms = np.random.Generator(np.random.Philox(key=2)).random((n, D))
    steps = chain.sample(uniforms)
    assert np.all(steps[0] == K)
    for t in range(D + 1):
        np.testing.assert_array_equal(steps[D - t], chain.q_sample(steps[D], t))
    code = steps[D] @ K ** np.arange(D - 1, -1, -1)
    found = np.bincount(code, minlength=K**D) / n
    wanted = chain.joint[tuple(everything.T)]
    assert np.all(np.abs(found - wanted) < 5 * np.sqrt(wanted / n))


def test_a_joint_must_be_a_distribution() -> None:
    for joint in (np.ones((2, 2)), np.array([[1.0, 0.0], [0.0, 0.0]]), np.full((2, 3), 1 / 6)):
        with pytest.raises(ValueError, match="joint"):
            MaskingChain(joint)
