"""A loss by name: those of the table, and a user's own, which fail in one line of their own."""

import jax.numpy as jnp
import pytest

from jaxalign.errors import UserError
from jaxalign.losses import BATCH_COUPLED, LOSSES, PREFERENCE_LOSSES
from jaxalign.losses.lookup import couples_pairs, find_loss, reads_reference

OWN = """
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxalign.losses import PairLogProbs, TokenLogProbs

def integer(pairs):
    return (pairs.margin > 0).astype(int)

def boolean(pairs):
    return pairs.margin > 0

def with_numpy(pairs):
    return jnp.asarray(np.array(pairs.margin))

def branching(pairs):
    return pairs.margin if pairs.margin[0] > 0 else -pairs.margin

def nothing():
    return 0

def required(pairs, *, tau, rho):
    return pairs.margin * tau

def scalar(pairs):
    return pairs.margin.mean()

def too_few(pairs):
    return pairs.margin[:1]

def nan(pairs):
    return jnp.log(pairs.margin)

def nan_gradient(pairs):
    return jnp.sqrt(jnp.abs(pairs.margin))

def none(pairs):
    pass

def two(pairs):
    return pairs.margin, pairs.margin

def typo(pairs):
    return pairs.margn

def raises(pairs):
    raise RuntimeError("two\\nlines")

def leaves(pairs):
    raise SystemExit(3)

def of_two(pairs):
    return pairs.margin * jnp.ones(2)

def flat(pairs):
    return jnp.zeros(2)

def stopped(pairs):
    return jax.lax.stop_gradient(pairs.margin)

def hinge(pairs: PairLogProbs, *, beta=0.1):
    return jax.nn.relu(1 - beta * pairs.margin)

def free(pairs: PairLogProbs):
    return pairs.rejected - pairs.chosen

def centred(pairs: PairLogProbs):
    return jax.nn.softplus(pairs.margin.mean() - pairs.margin)

def good(pairs: PairLogProbs, beta=0.1, **more):
    return jax.nn.softplus(-beta * pairs.margin)

def of_tokens(tokens: TokenLogProbs, *, beta: float = 0.1):
    return -beta * (tokens.chosen * tokens.chosen_mask).sum(-1)
"""


@pytest.fixture(autouse=True)
def strict_dtypes():
    """Off here: a user's own loss may promote dtypes."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JAXALIGN_DEBUG", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("integer", "loss: own.py:integer returns int32, which has no gradient"),
        ("boolean", "loss: own.py:boolean returns bool, which has no gradient"),
        ("with_numpy", "TracerArrayConversionError: "),
        ("with_numpy", "own.py:16: return jnp.asarray(np.array(pairs.margin)))"),
        ("branching", "own.py:19: return pairs.margin if pairs.margin[0] > 0"),
        ("nothing", "takes no pairs"),
        ("required", "needs tau, rho; set --loss-options tau VALUE rho VALUE"),
        ("scalar", "returns shape () for two pairs instead of one value per pair"),
        ("too_few", "returns shape (1,) for two pairs"),
        ("nan", "the value is not finite where the policy is its reference: -inf, -inf"),
        ("nan_gradient", "the gradient of chosen is not finite where the policy is its reference"),
        ("none", "returns a NoneType instead of one value per pair"),
        ("two", "returns a tuple instead of one value per pair"),
        ("typo", "AttributeError: 'PairLogProbs' object has no attribute 'margn'"),
        ("typo", "own.py:46: return pairs.margn)"),
        ("raises", "RuntimeError: two (at "),
        ("leaves", "SystemExit: 3 (at "),
    ],
)
def test_a_loss_that_cannot_be_trained_says_where(folder, name, said):
    with pytest.raises(UserError) as error:
        find_loss(f"own.py:{name}", {})
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_loss_that_fits_two_pairs_alone_says_where(folder):
    from jaxalign.losses import PairLogProbs

    loss = find_loss("own.py:of_two", {}).function
    four = dict.fromkeys(PairLogProbs.__dataclass_fields__, jnp.ones(4))
    del four["divergence"]
    four |= {name: jnp.ones(4, int) for name in ("chosen_length", "rejected_length")}
    with pytest.raises(UserError, match=r"^loss: own.py:of_two: TypeError: .*: return pairs.mar"):
        loss(PairLogProbs(**four))


@pytest.mark.parametrize("name", ["flat", "stopped"])
def test_a_loss_without_gradient_is_warned_of(folder, name, capsys):
    find_loss(f"own.py:{name}", {})
    assert f"own.py:{name}: its gradient is zero on all pairs" in capsys.readouterr().err


def test_losses_that_can_be_trained(folder, capsys):
    good = find_loss("own.py:good", {"beta": 0.2, "anything": 1.0})
    assert (good.reads, good.coupled) == ("pairs", False)
    tokens = find_loss("own.py:of_tokens", {"beta": 0.2})
    assert (tokens.reads, tokens.coupled) == ("tokens", False)  # a string annotation
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("dpo", {"beta": -1.0}, "loss_options: dpo: beta = -1.0: must be > 0"),
        ("tdpo1", {"beta": 0.0}, "loss_options: tdpo1: beta = 0.0: must be > 0"),
        ("bradley_terry", {"centering": -1.0}, "loss_options: bradley_terry: centering = -1.0"),
        ("exo", {"label_smoothing": 0.9}, "loss_options: exo: label_smoothing = 0.9"),
    ],
)
def test_hyperparameters_of_the_table_are_checked_before_training(name, options, said):
    with pytest.raises(UserError) as error:
        find_loss(name, options)
    assert str(error.value).startswith(said)


@pytest.mark.parametrize("name", ["a:b/own.py", "#1/own.py", "a b/own.py"])
def test_odd_folders_are_fine(folder, name):
    path = folder / name
    path.parent.mkdir()
    path.write_text("def good(pairs):\n    return -pairs.margin\n")
    good = find_loss(f"{path}:good", {})
    assert (good.reads, good.coupled) == ("pairs", False)
    with pytest.raises(UserError, match=r"names no function; write FILE.py:FUNCTION"):
        find_loss(f"x:{path}", {})


def test_a_loss_of_ones_own_is_found_to_read_and_to_couple_what_it_does(folder):
    own = find_loss("own.py:hinge", {"beta": 0.2})
    assert (own.reads, own.coupled, own.needs_reference) == ("pairs", False, True)
    assert find_loss("own.py:free", {}).reads == "policy_pairs"
    assert not find_loss("own.py:free", {}).needs_reference
    own = find_loss("own.py:centred", {})
    assert (own.reads, own.coupled) == ("pairs", True)
    own = find_loss("own.py:of_tokens", {})
    assert (own.reads, own.coupled) == ("tokens", False)


def test_what_the_probe_finds_in_the_tables_losses_is_what_the_table_says():
    found = {name for name, loss in PREFERENCE_LOSSES.items() if couples_pairs(loss, {})}
    assert found == BATCH_COUPLED
    for loss in LOSSES:
        if loss.name in PREFERENCE_LOSSES:
            assert loss.needs_reference == reads_reference(loss.function, {}), loss.name


def test_which_losses_read_the_reference():
    needs = {name for name, loss in PREFERENCE_LOSSES.items() if reads_reference(loss, {})}
    assert {"dpo", "ipo", "kto", "dpop"} <= needs
    assert not needs & {"simpo", "cpo", "orpo", "rrhf", "slic"}


def test_losses_that_do_not_return_a_value_per_pair_are_refused():
    with pytest.raises(ValueError, match="instead of one value per pair"):
        couples_pairs(lambda pairs: pairs.margin.mean(), {})
