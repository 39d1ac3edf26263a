"""The theory's worlds: closed form beside autodiff beside a real step, and reference values."""

import numpy as np
import pytest

from experiments.gradient_entanglement import worlds

WORLDS = {
    "single token": worlds.single_token,
    "free logits": lambda seed: worlds.free_logits(seed, prefix=4),
    "shared logits": lambda seed: worlds.shared_logits(seed, boost_chosen=4.0, boost_rejected=3.0),
    "last layer": lambda seed: worlds.last_layer(seed, suffix=10, likeness=0.9, steps=12),
    "general": lambda seed: worlds.last_layer(
        seed, suffix=6, likeness=0.8, steps=4, prefix=3, extra_rejected=5, width=64
    ),
}


@pytest.mark.parametrize("name", WORLDS)
def test_closed_form_autodiff_and_a_real_step_agree(name):
    for seed in range(2):
        world = WORLDS[name](seed)
        np.testing.assert_allclose(worlds.by_autodiff(world), world.closed, rtol=1e-9, atol=1e-12)
        for weights in ((1.0, 1.0), (2.0, 0.5)):
            realised = worlds.one_step(world, weights)
            np.testing.assert_allclose(
                realised, worlds.predicted(world, weights), rtol=1e-3, atol=1e-4
            )


@pytest.mark.parametrize("prefix", [0, 4, 9])
def test_equal_weights_of_free_logits_are_always_ideal(prefix):
    for seed in range(20):
        chosen, rejected = worlds.one_step(worlds.free_logits(seed, prefix=prefix))
        assert chosen > 0 > rejected


def test_a_long_prefix_lifts_both_or_sinks_both_where_the_weights_differ():
    """Means over 50 draws at prefix 9; the reference: -3.9, -5.4 at 0.5 and +10.7, +7.8 at 2."""
    for ratio, expected in ((0.5, (-3.9, -5.4)), (2.0, (10.7, 7.8))):
        changes = [
            worlds.predicted(worlds.free_logits(seed, prefix=9), (ratio, 1.0)) for seed in range(50)
        ]
        np.testing.assert_allclose(np.mean(changes, axis=0), expected, atol=0.8)


@pytest.mark.parametrize(
    ("boosts", "expected"), [((4, 3), (-0.0895, -0.149)), ((5, 3), (-0.078, -0.268))]
)
def test_a_shared_suffix_token_falls_in_both(boosts, expected):
    changes = [
        worlds.predicted(worlds.shared_logits(s, boost_chosen=boosts[0], boost_rejected=boosts[1]))
        for s in range(50)
    ]
    np.testing.assert_allclose(np.mean(changes, axis=0), expected, rtol=0.15)


@pytest.mark.parametrize(
    ("suffix", "rho", "expected"),
    [
        (0, -0.03, (0.99, -1.01)),
        (10, 0.48, (0.85, -1.48)),
        (50, 0.77, (0.20, -3.66)),
        (100, 0.82, (-0.72, -6.82)),
        (200, 0.84, (-2.07, -13.3)),
    ],
)
def test_a_long_suffix_sinks_the_chosen_response(suffix, rho, expected):
    """The reference run: likeness 0.9, 12 supervised steps, mean of three draws."""
    drawn = [worlds.last_layer(s, suffix=suffix, likeness=0.9, steps=12) for s in range(3)]
    cosines = [w.closed[2] / np.sqrt(w.closed[0] * w.closed[1]) for w in drawn]
    np.testing.assert_allclose(np.mean(cosines), rho, atol=0.03)
    changes = np.mean([worlds.predicted(w) for w in drawn], axis=0)
    np.testing.assert_allclose(changes, expected, rtol=0.1, atol=0.15)
    for world in drawn:  # normalised gradients cure it
        n_w, n_l, _ = world.closed
        chosen, rejected = worlds.predicted(world, (n_w**-0.5, n_l**-0.5))
        assert chosen > 0 > rejected
