"""Token-level DPO against NumPy, its limits, and where its gradient flows."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import Loss, PairLogProbs, TokenLogProbs, dpo, tdpo1, tdpo2
from jaxalign.losses.table import loss_row

LENGTHS = np.array([[3, 5], [6, 1], [2, 2]])


@pytest.fixture
def tokens(rng):
    def log_probs():
        return jnp.asarray(-rng.gamma(1.0, 2.0, size=(3, 6)), jnp.float32)

    def divergences():
        return jnp.asarray(rng.gamma(1.0, 0.5, size=(3, 6)), jnp.float32)

    position = np.arange(6)
    return TokenLogProbs(
        chosen=log_probs(),
        rejected=log_probs(),
        reference_chosen=log_probs(),
        reference_rejected=log_probs(),
        chosen_kl=divergences(),
        rejected_kl=divergences(),
        chosen_mask=jnp.asarray(position < LENGTHS[:, :1]),
        rejected_mask=jnp.asarray(position < LENGTHS[:, 1:]),
    )


def sums(tokens):
    """(h, K_w, K_l) in NumPy, one row at a time."""
    rows = []
    for i, (lw, ll) in enumerate(LENGTHS):
        r_w = np.asarray(tokens.chosen - tokens.reference_chosen)[i, :lw].sum()
        r_l = np.asarray(tokens.rejected - tokens.reference_rejected)[i, :ll].sum()
        k_w = np.asarray(tokens.chosen_kl)[i, :lw].sum()
        rows.append((r_w - r_l, k_w, np.asarray(tokens.rejected_kl)[i, :ll].sum()))
    return np.array(rows).T


def test_tdpo1_in_closed_form(tokens):
    h, k_w, k_l = sums(tokens)
    expected = np.log1p(np.exp(-0.3 * (h - (k_l - k_w))))
    np.testing.assert_allclose(tdpo1(tokens, beta=0.3), expected, rtol=1e-5)


def test_tdpo2_in_closed_form(tokens):
    h, k_w, k_l = sums(tokens)
    expected = np.log1p(np.exp(-0.3 * (h - 0.7 * (k_l - k_w))))
    np.testing.assert_allclose(tdpo2(tokens, beta=0.3, alpha=0.7), expected, rtol=1e-5)
    np.testing.assert_allclose(tdpo2(tokens, alpha=1.0), tdpo1(tokens), rtol=1e-6)


def test_without_divergences_it_is_dpo(tokens):
    def total(values, mask):
        return jnp.where(mask, values, 0).sum(-1)

    pairs = PairLogProbs(
        chosen=total(tokens.chosen, tokens.chosen_mask),
        rejected=total(tokens.rejected, tokens.rejected_mask),
        reference_chosen=total(tokens.reference_chosen, tokens.chosen_mask),
        reference_rejected=total(tokens.reference_rejected, tokens.rejected_mask),
        chosen_length=tokens.chosen_mask.sum(-1),
        rejected_length=tokens.rejected_mask.sum(-1),
    )
    np.testing.assert_allclose(tdpo2(tokens, alpha=0.0), dpo(pairs), rtol=1e-5)


def test_where_the_gradient_flows(tokens):
    """TDPO2 stops it at the chosen response's divergence; TDPO1 does not."""

    def slopes(loss):
        def total(chosen_kl, rejected_kl):
            return loss(replace(tokens, chosen_kl=chosen_kl, rejected_kl=rejected_kl)).sum()

        return jax.grad(total, argnums=(0, 1))(tokens.chosen_kl, tokens.rejected_kl)

    in_chosen, in_rejected = slopes(tdpo1)
    assert (np.asarray(in_chosen)[tokens.chosen_mask] < 0).all()
    np.testing.assert_array_equal(np.asarray(in_chosen)[~tokens.chosen_mask], 0)
    assert (np.asarray(in_rejected)[tokens.rejected_mask] > 0).all()
    in_chosen, in_rejected = slopes(tdpo2)
    np.testing.assert_array_equal(in_chosen, 0)
    assert (np.asarray(in_rejected)[tokens.rejected_mask] > 0).all()


def test_what_stands_at_padding_is_never_read(tokens):
    dirty = replace(tokens, chosen=jnp.where(tokens.chosen_mask, tokens.chosen, jnp.nan))
    dirty = replace(dirty, rejected_kl=jnp.where(tokens.rejected_mask, tokens.rejected_kl, jnp.inf))
    np.testing.assert_array_equal(tdpo2(dirty), tdpo2(tokens))
    slope = jax.grad(lambda chosen: tdpo1(replace(dirty, chosen=chosen)).sum())(dirty.chosen)
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("loss", [tdpo1, tdpo2])
def test_documented_like_every_loss(loss):
    row = loss_row(Loss(loss, "tokens"))
    assert row.formula
    assert row.slopes
    assert row.arxiv == ("2404.11999",)
