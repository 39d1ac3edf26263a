"""PCA and the probe on clouds whose geometry is known."""

import numpy as np

from jaxalign.representation.separability import (
    principal_components,
    probe_accuracy,
    separability,
)


def test_components_are_those_of_the_covariance(rng):
    """Eigenvectors of the covariance matrix, largest first, and their shares of the trace."""
    states = (
        rng.normal(size=(200, 5)) * [5, 3, 1, 0.5, 0.1] @ np.linalg.qr(rng.normal(size=(5, 5)))[0]
    )
    found = principal_components(states, 3)
    values, vectors = np.linalg.eigh(np.cov(states.T))
    np.testing.assert_allclose(found.explained, values[::-1][:3] / values.sum(), rtol=1e-9)
    np.testing.assert_allclose(np.abs(np.sum(found.axes.T * vectors[:, ::-1][:, :3], 0)), 1)
    np.testing.assert_allclose(found(states).var(0, ddof=1), values[::-1][:3], rtol=1e-9)


def test_the_probe_finds_a_planted_side_and_nothing_where_there_is_none(rng):
    noise = rng.normal(size=(2, 300, 6))
    fitted = np.arange(300) < 150
    planted = np.array([0, 4.0, 0, 0, 0, 0])
    assert probe_accuracy(noise[0] + planted, noise[1] - planted, fitted) > 0.99
    # 300 held-out states: five standard deviations around one half
    assert abs(probe_accuracy(noise[0], noise[1], fitted) - 0.5) < 0.15
    both = separability(
        np.stack([noise[0], noise[0] + planted], 1), np.stack([noise[1]] * 2, 1), fitted
    )
    assert both[1] > both[0]


def test_the_probe_knows_neither_scale_nor_shift(rng):
    positive, negative = rng.normal(size=(2, 80, 3))
    positive += [0.4, 0, 0]
    fitted = rng.random(80) < 0.5
    plain = probe_accuracy(positive, negative, fitted)
    assert plain == probe_accuracy(7 + 50 * positive, 7 + 50 * negative, fitted)
