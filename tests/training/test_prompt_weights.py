"""Weights of shifted prompts against scikit-learn's and TRL's definitions, written out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize

from jaxalign.evaluation.logistic import fit_logistic
from jaxalign.losses import bco_unpaired
from jaxalign.models.decoder import hidden_states, init_params
from jaxalign.training.objectives import Policy
from jaxalign.training.prompt_weights import density_ratios, prompt_embeddings
from jaxalign.training.step import gradients
from tests.training.test_labelled import CONFIG, batch_of, objective_of


def test_ratios_are_those_of_a_balanced_classifier(rng):
    """scikit-learn's objective with class_weight="balanced" and C = 1, then TRL's clip."""
    desirable = np.arange(60) % 3 == 0
    x = rng.normal(size=(60, 4)) + 2.0 * desirable[:, None]
    found = density_ratios(np.float32(x), desirable, fit=fit_logistic, seed=0)
    balance = np.where(desirable, 60 / (2 * 20), 60 / (2 * 40))

    def objective(w):
        z = x @ w[:4] + w[4]
        return balance @ (np.logaddexp(0, z) - desirable * z) + 0.5 * w[:4] @ w[:4]

    w = minimize(objective, np.zeros(5), tol=1e-12).x
    p = 1 / (1 + np.exp(-(x @ w[:4] + w[4])))
    expected = np.where(desirable, 1.0, np.clip(p / (1 - p + 1e-8), 0.5, 10.0))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert {0.5, 1.0} < set(found.tolist())


def test_prompts_of_one_law_have_weights_of_about_one(rng):
    desirable = np.arange(4000) % 4 == 0
    found = density_ratios(
        np.float32(rng.normal(size=(4000, 2))), desirable, fit=fit_logistic, seed=0
    )
    assert np.abs(found - 1).max() < 0.4


def test_embeddings_are_means_over_the_prompt(rng):
    params = init_params(CONFIG, jax.random.key(1))
    batch = batch_of(rng)[1].responses
    found = prompt_embeddings(Policy(config=CONFIG), params, batch)
    states = hidden_states(params, CONFIG, batch.tokens[:, 0])
    for row, length in enumerate(np.asarray(batch.prompt_length)[:, 0]):
        np.testing.assert_allclose(found[row], states[row, :length].mean(0), rtol=1e-4, atol=1e-6)


def test_weights_multiply_losses_and_nothing_else(rng):
    """The mean is over the number of responses, and the shift of the loss is that without them."""
    policy, reference = (init_params(CONFIG, jax.random.key(seed)) for seed in (0, 1))
    batch, frozen = batch_of(rng)[1], {"policy": None, "reference": reference}
    objective = objective_of(bco_unpaired, beta=0.3)
    weights = jnp.where(batch.desirable, 1.0, jnp.asarray(rng.uniform(0.5, 10, 8), jnp.float32))
    outputs = objective.forward(policy, frozen, batch, None)
    pairs = objective.as_labelled(outputs, batch)
    expected = (bco_unpaired(pairs, beta=0.3) * weights).mean()
    weighted = dataclasses.replace(batch, importance=weights)
    for parts in (1, 4):
        _, metrics, _ = gradients(
            objective, policy, frozen, weighted, jax.random.key(0), micro_batches=parts
        )
        np.testing.assert_allclose(metrics["loss"].value(), expected, rtol=1e-5)
        mean = weights[~batch.desirable].mean()
        np.testing.assert_allclose(metrics["importance"].value(), mean, rtol=1e-5)
