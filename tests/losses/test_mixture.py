"""Weighted sums of losses are the sums of their parts, in value, slopes and statistics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.entanglement import coefficients
from jaxalign.errors import UserError
from jaxalign.losses import (
    PREFERENCE_LOSSES,
    Statistics,
    bco,
    beta_dpo,
    cpo,
    dpo,
    kto,
    members_in,
    rpo,
    sft,
    simpo,
    statistics_of,
    weighted,
    with_statistics,
)
from jaxalign.losses.lookup import find_loss, own_loss
from tests.losses.test_every_loss import random_pairs


def test_the_sum_is_the_weighted_sum_of_values_and_of_slopes(rng):
    pairs = random_pairs(rng)
    mixture = weighted([(dpo, 0.8), (simpo, 0.3), (kto, 2.0)])
    options = {"dpo.beta": 0.3, "simpo.gamma": 1.0, "kto.lambda_undesirable": 1.5}
    own = [(dpo, 0.8, {"beta": 0.3}), (simpo, 0.3, {"gamma": 1.0})]
    own += [(kto, 2.0, {"lambda_undesirable": 1.5})]
    expected = sum(weight * loss(pairs, **given) for loss, weight, given in own)
    np.testing.assert_allclose(mixture(pairs, **options), expected, rtol=1e-6)
    found = coefficients(mixture, pairs, **options)
    parts = [(weight, coefficients(loss, pairs, **given)) for loss, weight, given in own]
    for side in ("chosen", "rejected"):
        wanted = sum(weight * getattr(part, side) for weight, part in parts)
        np.testing.assert_allclose(getattr(found, side), wanted, rtol=1e-5)


def test_rpo_is_dpo_and_sft(rng):
    """Pang et al., equation 1, and the project's own function of it."""
    pairs = random_pairs(rng)
    mixture = weighted([(dpo, 1.0), (sft, 0.7)])
    np.testing.assert_allclose(
        mixture(pairs, **{"dpo.beta": 0.2}), rpo(pairs, beta=0.2, alpha=0.7), rtol=1e-6
    )
    found = coefficients(mixture, pairs, **{"dpo.beta": 0.2})
    wanted = coefficients(rpo, pairs, beta=0.2, alpha=0.7)
    np.testing.assert_allclose(found.ratio, wanted.ratio, rtol=1e-5)


def test_cpo_is_a_loss_without_reference_and_a_sum_of_log_probs(rng):
    """CPO's own supervised term is a sum over tokens: with lengths of 1 both are the same."""
    pairs = dataclasses.replace(random_pairs(rng), chosen_length=jnp.ones(7, jnp.int32))
    alone = dataclasses.replace(
        pairs, reference_chosen=jnp.zeros(7), reference_rejected=jnp.zeros(7)
    )
    mixture = weighted([(dpo, 1.0), (sft, 1.0)])
    np.testing.assert_allclose(mixture(alone), cpo(pairs, beta=0.1, lambda_=1.0), rtol=1e-6)


def test_statistics_of_members_are_kept_under_their_names(rng):
    mixture = weighted([(bco, 0.5), (dpo, 1.0), (beta_dpo, 2.0)])
    joined, own = statistics_of(mixture), [statistics_of(bco), statistics_of(beta_dpo)]
    assert set(joined.start) == {
        "bco.mean_log_ratio",
        "bco.responses",
        "beta_dpo.threshold",
    }
    running = {name: jnp.float32(value) for name, value in joined.start.items()}
    apart = [{name: jnp.float32(x) for name, x in one.start.items()} for one in own]
    for _ in range(3):
        pairs, weight = random_pairs(rng), jnp.array([1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0])
        running = joined.update(running, pairs, weight)
        apart = [one.update(x, pairs, weight) for one, x in zip(own, apart, strict=True)]
        first, second = (one.of(pairs, weight, x) for one, x in zip(own, apart, strict=True))
        found = mixture(pairs, **joined.of(pairs, weight, running))
        expected = 0.5 * bco(pairs, **first) + dpo(pairs) + 2 * beta_dpo(pairs, **second)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert set(running) == set(joined.start)


def test_losses_of_single_pairs_have_no_statistics():
    assert statistics_of(weighted([(dpo, 1.0), (sft, 0.2)])) is None


def test_a_mixture_is_found_by_its_members():
    loss = find_loss("dpo:0.8 bco:0.2 sft", {"bco.beta": 0.1})
    assert (loss.name, loss.reads, loss.coupled) == ("dpo:0.8 bco:0.2 sft:1", "pairs", True)
    assert find_loss("simpo:1 sft:0.5", {}).reads == "policy_pairs"
    assert find_loss("scit:1 scit_mean:1", {}).contrastive
    checked = own_loss(weighted([(dpo, 1.0), (kto, 0.2)]), {"dpo.beta": 0.3})
    assert (checked.reads, checked.coupled) == ("pairs", True)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_every_loss_can_be_a_member(name, rng):
    if find_loss(name, {}).contrastive:
        pytest.skip("contrastive losses are mixed among themselves")
    other = "dpo" if name == "sft" else "sft"
    pairs, loss = random_pairs(rng), find_loss(f"{name}:0.5 {other}:2", {}).function
    expected = 0.5 * PREFERENCE_LOSSES[name](pairs) + 2 * PREFERENCE_LOSSES[other](pairs)
    np.testing.assert_allclose(jax.jit(loss)(pairs), expected, rtol=1e-5)


def test_a_function_of_ones_own_is_a_member_with_its_statistics(tmp_path, monkeypatch, rng):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_member.py").write_text(
        "def hinge(pairs, *, beta=1.0, delta=1.0):\n"
        "    import jax\n"
        "    return jax.nn.relu(delta - beta * (pairs.margin - pairs.margin.mean()))\n"
    )
    loss = find_loss("dpo:1 own_member.py:hinge:0.25", {"hinge.delta": 2.0})
    assert loss.name == "dpo:1 hinge:0.25"
    assert loss.coupled
    pairs = random_pairs(rng)
    margin = np.asarray(pairs.margin, np.float64)
    expected = dpo(pairs) + 0.25 * np.maximum(2.0 - (margin - margin.mean()), 0)
    np.testing.assert_allclose(loss.function(pairs, **{"hinge.delta": 2.0}), expected, rtol=1e-5)


def test_a_declared_name_is_not_lost():
    @with_statistics(Statistics(batch=lambda pairs, weight: {"mean": pairs.margin.mean()}))
    def own(pairs, *, mean):
        return pairs.margin - mean

    taken = statistics_of(weighted([(own, 1.0), (dpo, 1.0)])).batch
    pairs = random_pairs(np.random.default_rng(0))
    assert set(taken(pairs, None)) == {"own.mean"}


@pytest.mark.parametrize(
    ("text", "members"),
    [
        ("dpo", []),
        ("dpo:1.0 sft:0.2", [("dpo", 1.0), ("sft", 0.2)]),
        ("dpo sft:2e-1", [("dpo", 1.0), ("sft", 0.2)]),
        ("dpo sft", [("dpo", 1.0), ("sft", 1.0)]),
        ("own.py:mine", []),
        ("own.py:mine:.5", [("own.py:mine", 0.5)]),
        ("my losses.py:mine", []),
    ],
)
def test_names_and_weights_are_read(text, members):
    assert members_in(text, PREFERENCE_LOSSES) == members


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("dpo:1 tdpo1:1", {}, "tdpo1 reads distributions at every token, so it cannot be mixed"),
        ("dpo:1 bradley_terry:1", {}, "bradley_terry reads scores, so it cannot be mixed"),
        ("dpo:1 scit:1", {}, "scit compares one response under two instructions"),
        ("dpo:1 dpo:0.5", {}, "dpo is in the mixture twice"),
        ("dpo:1 sft:-0.5", {}, "sft:-0.5: a weight must be >= 0"),
        ("dpo:1 sft:0.5", {"beta": 0.3}, r"beta: in a mixture, name the loss .* e.g. dpo.beta"),
        ("dpo:1 sft:0.5", {"ipo.tau": 0.3}, "the losses are dpo, sft"),
        ("dpo:1 sft:0.5", {"dpo.beta": -1.0}, "beta = -1.0: must be > 0"),
    ],
)
def test_what_cannot_be_mixed_is_refused_in_one_line(text, options, message):
    with pytest.raises(UserError, match=message) as raised:
        find_loss(text, options)
    assert "\n" not in str(raised.value)


def test_a_partial_function_is_refused():
    import functools

    with pytest.raises(UserError, match="set options by name"):
        weighted([(functools.partial(dpo, beta=1.0), 1.0)])
    with pytest.raises(UserError, match="at least one loss"):
        weighted([])
