"""Laws that hold for every row of the table: a new loss is tested the moment it is listed."""

import inspect
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxalign.losses import BATCH_COUPLED, PREFERENCE_LOSSES, PairLogProbs, statistics_of

every_loss = pytest.mark.parametrize(
    "loss", PREFERENCE_LOSSES.values(), ids=PREFERENCE_LOSSES.keys()
)
alone = {name: loss for name, loss in PREFERENCE_LOSSES.items() if name not in BATCH_COUPLED}
coupled = {name: loss for name, loss in PREFERENCE_LOSSES.items() if name in BATCH_COUPLED}


def random_pairs(rng, pairs=7, dtype=np.float32):
    def log_probs():
        return jnp.asarray(-rng.gamma(4.0, 3.0, size=pairs), dtype)

    def lengths():
        return jnp.asarray(rng.integers(1, 30, size=pairs), jnp.int32)

    return PairLogProbs(
        chosen=log_probs(),
        rejected=log_probs(),
        reference_chosen=log_probs(),
        reference_rejected=log_probs(),
        chosen_length=lengths(),
        rejected_length=lengths(),
    )


def rows(pairs, index):
    return jax.tree.map(lambda field: field[index], pairs)


def batch_statistics(loss, pairs, weight=None):
    """What the training step passes to a loss for its first batch, but for beta-DPO's M_0.

    That one a loss by itself holds at its start (its own test is in test_statistics.py).
    """
    statistics = statistics_of(loss)
    if statistics is None:
        return {}
    dtype = pairs.chosen.dtype
    running = {name: jnp.asarray(value, dtype) for name, value in statistics.start.items()}
    if statistics.update is not None:
        running = statistics.update(running, pairs, weight)
    taken = statistics.of(pairs, weight, running)
    return {name: value for name, value in taken.items() if name != "threshold"}


def hyperparameters(loss):
    """Name and parameter of everything after the pairs."""
    return list(inspect.signature(loss).parameters.items())[1:]


def extreme_pairs():
    """Every combination of log-probs in {0, -1e-3, -1, -1e4} and of lengths in {1, 1000}."""
    ends = [0.0, -1e-3, -1.0, -1e4]
    grid = np.array(np.meshgrid(ends, ends, ends, ends, [1, 1000], [1, 1000])).reshape(6, -1)
    log_probs = [jnp.asarray(row, jnp.float32) for row in grid[:4]]
    lengths = [jnp.asarray(row, jnp.int32) for row in grid[4:]]
    return PairLogProbs(
        chosen=log_probs[0],
        rejected=log_probs[1],
        reference_chosen=log_probs[2],
        reference_rejected=log_probs[3],
        chosen_length=lengths[0],
        rejected_length=lengths[1],
    )


@pytest.mark.parametrize("loss", alone.values(), ids=alone.keys())
def test_each_pair_is_alone(loss, rng):
    """Neither the order of a batch nor the company in it changes a pair's loss."""
    pairs = random_pairs(rng)
    order = rng.permutation(7)
    np.testing.assert_allclose(loss(rows(pairs, order)), loss(pairs)[order], rtol=1e-6)
    np.testing.assert_allclose(loss(rows(pairs, slice(3))), loss(pairs)[:3], rtol=1e-6)


@pytest.mark.parametrize("loss", coupled.values(), ids=coupled.keys())
def test_a_coupled_pair_depends_on_the_company_but_not_on_the_order(loss, rng):
    pairs = random_pairs(rng)
    order = rng.permutation(7)
    np.testing.assert_allclose(loss(rows(pairs, order)), loss(pairs)[order], rtol=1e-5)
    company = jnp.where(jnp.arange(7) < 3, 0.0, 100.0)  # the last four rows move far away
    moved = replace(
        pairs,
        chosen=pairs.chosen + company,
        reference_chosen=pairs.reference_chosen - company,
    )
    assert not np.allclose(loss(moved)[:3], loss(pairs)[:3])


@pytest.mark.parametrize("loss", coupled.values(), ids=coupled.keys())
def test_micro_batches_with_the_statistics_of_the_whole_batch_add_up_to_it(loss, rng):
    pairs = random_pairs(rng)
    statistics = batch_statistics(loss, pairs)
    np.testing.assert_allclose(loss(pairs, **statistics), loss(pairs), rtol=1e-6)
    for part in (slice(0, 2), slice(2, 7)):
        own = {name: x[part] if x.ndim else x for name, x in statistics.items()}
        np.testing.assert_allclose(loss(rows(pairs, part), **own), loss(pairs)[part], rtol=1e-5)


@pytest.mark.parametrize("loss", coupled.values(), ids=coupled.keys())
def test_rows_of_weight_zero_do_not_enter_the_statistics(loss, rng):
    pairs = random_pairs(rng)
    weight = jnp.array([1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    kept = np.flatnonzero(weight)
    statistics = batch_statistics(loss, pairs, weight)
    alone = loss(rows(pairs, kept))
    np.testing.assert_allclose(loss(pairs, **statistics)[kept], alone, rtol=1e-5)


@pytest.mark.parametrize("loss", coupled.values(), ids=coupled.keys())
def test_no_gradient_flows_through_the_statistics(loss, rng):
    """A pair's slope is that with the statistics held, and no pair moves another."""
    pairs = random_pairs(rng)
    statistics = batch_statistics(loss, pairs)

    def values(chosen, **given):
        return loss(replace(pairs, chosen=chosen), **given)

    free = jax.jacrev(values)(pairs.chosen)
    held = jax.jacrev(lambda chosen: values(chosen, **statistics))(pairs.chosen)
    np.testing.assert_allclose(free, held, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(free, np.diag(np.diag(free)), atol=1e-8)


@every_loss
def test_jit_changes_nothing(loss, rng):
    pairs = random_pairs(rng)
    np.testing.assert_allclose(jax.jit(loss)(pairs), loss(pairs), rtol=1e-5)


@every_loss
def test_one_float_per_pair(loss, rng):
    value = loss(random_pairs(rng, pairs=5))
    assert value.shape == (5,)
    assert value.dtype == jnp.float32


@every_loss
def test_gradient_against_finite_differences(loss, rng):
    with jax.enable_x64(True):
        pairs = random_pairs(rng, dtype=np.float64)

        statistics = batch_statistics(loss, pairs)

        def total(chosen, rejected):  # check_grads probes with NumPy arrays
            chosen, rejected = jnp.asarray(chosen), jnp.asarray(rejected)
            moved = replace(pairs, chosen=chosen, rejected=rejected)
            if loss.__name__ == "alpha_dpo":  # its target is held: the reference moves along
                moved = replace(
                    moved,
                    reference_chosen=pairs.reference_chosen + chosen - pairs.chosen,
                    reference_rejected=pairs.reference_rejected + rejected - pairs.rejected,
                )
            return loss(moved, **statistics).sum()

        check_grads(total, (pairs.chosen, pairs.rejected), order=1, modes=["rev"], rtol=1e-5)


@every_loss
def test_every_hyperparameter_moves_the_loss(loss, rng):
    pairs = random_pairs(rng)
    for name, parameter in hyperparameters(loss):
        moved = loss(pairs, **{name: moved_value(parameter, pairs)})
        assert not np.allclose(moved, loss(pairs)), f"{loss.__name__} ignores {name}"


def moved_value(parameter, pairs):
    if parameter.default is None:  # a batch statistic: a scalar, or one value per pair
        per_pair = "pairs" in str(parameter.annotation)
        return jnp.full_like(pairs.chosen, 3.0) if per_pair else jnp.asarray(3.0)
    return parameter.default * 1.02 + 0.01


@every_loss
def test_hyperparameters_are_keyword_only_and_have_defaults(loss):
    first, *rest = inspect.signature(loss).parameters.values()
    assert first.name == "pairs"
    for parameter in rest:
        assert parameter.kind is parameter.KEYWORD_ONLY
        assert parameter.default is not parameter.empty


@every_loss
def test_docstring_states_formula_shapes_and_source(loss):
    documentation = inspect.getdoc(loss)
    for part in (".. math::", "Args:", "[pairs]", "Returns:", "Slopes:", "References:", "arXiv:"):
        assert part in documentation, f"{loss.__name__}: docstring lacks {part!r}"
    for name, _ in hyperparameters(loss):
        assert f"{name}:" in documentation, f"{loss.__name__}: {name} is undocumented"


@every_loss
def test_extremes_keep_value_and_slope_finite(loss):
    pairs = extreme_pairs()

    def each(chosen, rejected):
        value = loss(replace(pairs, chosen=chosen, rejected=rejected))
        return value.sum(), value

    slopes, value = jax.grad(each, argnums=(0, 1), has_aux=True)(pairs.chosen, pairs.rejected)
    assert np.isfinite(value).all()
    assert np.isfinite(slopes[0]).all()
    assert np.isfinite(slopes[1]).all()


@every_loss
def test_extremes_in_float32_agree_with_float64(loss):
    if loss.__name__ == "orpo":  # the odds of certainty end at the dtype's resolution
        pytest.skip("certainty has larger odds in float64, on purpose")
    single = loss(extreme_pairs())
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, extreme_pairs()
        )
        double = loss(wide)
    np.testing.assert_allclose(single, double, rtol=3e-4, atol=1e-5)


@every_loss
def test_empty_rows_that_fill_up_a_batch_stay_finite(loss):
    zero, none = jnp.zeros(3), jnp.zeros(3, jnp.int32)

    def total(chosen, rejected):
        return loss(
            PairLogProbs(
                chosen=chosen,
                rejected=rejected,
                reference_chosen=zero,
                reference_rejected=zero,
                chosen_length=none,
                rejected_length=none,
            )
        ).sum()

    value, slopes = jax.value_and_grad(total, argnums=(0, 1))(zero, zero)
    assert np.isfinite([value, *np.ravel(slopes)]).all()
