"""What users bring along fails in one line that shows their own line."""

import jax.numpy as jnp
import pytest

from jaxalign.cli import main
from jaxalign.errors import UserError
from jaxalign.runs.experiment import load_config
from jaxalign.stages.find import find_algorithm, find_loss

LOSSES = """
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

def good(pairs: PairLogProbs, beta=0.1, **more):
    return jax.nn.softplus(-beta * pairs.margin)

def of_tokens(tokens: TokenLogProbs, *, beta: float = 0.1):
    return -beta * (tokens.chosen * tokens.chosen_mask).sum(-1)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(LOSSES)
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

    loss, *_ = find_loss("own.py:of_two", {})
    four = dict.fromkeys(PairLogProbs.__dataclass_fields__, jnp.ones(4))
    four |= {name: jnp.ones(4, int) for name in ("chosen_length", "rejected_length")}
    with pytest.raises(UserError, match=r"^loss: own.py:of_two: TypeError: .*: return pairs.mar"):
        loss(PairLogProbs(**four))


@pytest.mark.parametrize("name", ["flat", "stopped"])
def test_a_loss_without_gradient_is_warned_of(folder, name, capsys):
    find_loss(f"own.py:{name}", {})
    assert f"own.py:{name}: its gradient is zero on all pairs" in capsys.readouterr().err


def test_losses_that_can_be_trained(folder, capsys):
    assert find_loss("own.py:good", {"beta": 0.2, "anything": 1.0})[1:] == (False, False)
    assert find_loss("own.py:of_tokens", {"beta": 0.2})[1:] == (True, False)  # a string annotation
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


def test_algorithms_take_whole_numbers_and_fail_in_one_line(folder):
    with pytest.raises(UserError, match=r"rollout.options: minibatches: 2.5 is not a whole"):
        find_algorithm("ppo", {"minibatches": 2.5})
    (folder / "algorithms.py").write_text("def mine(*, tau):\n    return 1 / tau\n")
    with pytest.raises(UserError, match=r"needs tau; set --rollout.options tau VALUE"):
        find_algorithm("algorithms.py:mine", {})
    with pytest.raises(UserError, match=r"ZeroDivisionError: .*algorithms.py:2: return 1 / tau"):
        find_algorithm("algorithms.py:mine", {"tau": 0.0})
    with pytest.raises(UserError, match=r"returned float$"):
        find_algorithm("algorithms.py:mine", {"tau": 1.0})


BEGIN = "from jaxalign.config import *\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def config(:\n", "e.py: SyntaxError: invalid syntax (at "),
        ("def config(:\n", "e.py:1: def config(:)"),
        ("import nothing_of_this_name\n", "e.py:1: import nothing_of_this_name"),
        ("def config():\n    return 1 / 0\n", "e.py:2: return 1 / 0"),
        ("raise SystemExit('bye')\n", "SystemExit: bye (at "),
        ("", "e.py: has no function config()"),
        ("def config(scale, more):\n    pass\n", "missing 1 required positional argument"),
        ("def config():\n    return {}\n", "config() returned dict, not a TrainConfig"),
        (
            f"{BEGIN}def config():\n    return TrainConfig(stft=StageConfig())\n",
            "e.py:3: return TrainConfig(stft=StageConfig())",
        ),
        (f"{BEGIN}def config():\n    return TrainConfig(holdout=2.0)\n", "holdout: 2.0 is not in"),
        ("config = 3\n", "has no function config()"),
        ("\0", "SyntaxError: "),
        ("x = '\udcff'\n", "SyntaxError: "),
    ],
)
def test_an_experiment_that_cannot_be_read_says_where(folder, text, said):
    (folder / "e.py").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as error:
        load_config("e.py", "tiny")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags", [[], ["--debug"]])
def test_the_traceback_is_there_where_it_is_asked_for(folder, capsys, flags):
    (folder / "e.py").write_text("def config():\n    return 1 / 0\n")
    assert main(["train", "e.py", *flags]) == 2
    err = capsys.readouterr().err
    assert ("Traceback" in err) == bool(flags)
    assert "ZeroDivisionError: division by zero (at " in err.splitlines()[-1]


def test_the_environment_asks_for_tracebacks_too(folder, capsys, monkeypatch):
    monkeypatch.setenv("JAXALIGN_DEBUG", "1")
    assert main(["losses", "dqo"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("JAXALIGN_DEBUG", "0")
    assert main(["losses", "dqo"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a:b/own.py", "#1/own.py", "a b/own.py"])
def test_odd_folders_are_fine(folder, name):
    path = folder / name
    path.parent.mkdir()
    path.write_text("def good(pairs):\n    return -pairs.margin\n")
    assert find_loss(f"{path}:good", {})[1:] == (False, False)
    with pytest.raises(UserError, match=r"names no function; write FILE.py:FUNCTION"):
        find_loss(f"x:{path}", {})
