"""Who prefers what in `summarisation.py`: classifiers of sentiment, from reviews people rated.

Logistic regression on the presence of words and of pairs of words, on the reviews of films of the
Large Movie Review data set. Its training set makes the labeller, from which preference and reward
model learn; its test set, of other films, makes the judge, which nobody is trained on.
"""

import json
import lzma
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import optax
from jaxtyping import Float64

from jaxalign.evaluation.verdicts import Verdicts


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """P(positive) of a text."""

    columns: dict[str, int]
    weights: np.ndarray
    bias: float

    def scores(self, texts: Sequence[str]) -> Float64[np.ndarray, " n"]:
        """Log-odds that each text is positive."""
        found = [
            sum(self.weights[self.columns[x]] for x in terms(text) if x in self.columns)
            for text in texts
        ]
        return self.bias + np.array(found, np.float64)

    def preferences(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
    ) -> Verdicts:
        """The more positive continuation wins; equal scores are a tie."""
        apart = self.scores(first) - self.scores(second)
        return Verdicts(preference=0.5 + 0.5 * np.sign(apart), reasons=("",) * len(prompts))


def terms(text: str) -> set[str]:
    """Words and pairs of neighbouring words."""
    words = re.findall(r"[a-z']+", text.lower())
    return set(words) | {f"{one} {other}" for one, other in pairwise(words)}


def labelled(path: Path) -> tuple[list[str], np.ndarray]:
    """Reviews and whether they are positive."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [row["text"] for row in rows], np.array([row["label"] == 1 for row in rows])


def fit(texts: Sequence[str], positive: np.ndarray, *, penalty: float = 1e-4) -> Classifier:
    """Logistic regression with a squared penalty, by L-BFGS.

    Args:
      texts: reviews.
      positive: their labels.
      penalty: on the squared weights, per review.
    """
    import jax
    import jax.numpy as jnp

    counts = Counter(term for text in texts for term in terms(text))
    columns = {term: at for at, term in enumerate(sorted(x for x, n in counts.items() if n > 9))}
    pairs = [
        (row, columns[x]) for row, text in enumerate(texts) for x in terms(text) if x in columns
    ]
    rows, places = (jnp.asarray(x) for x in np.array(pairs).T)
    sign = jnp.asarray(np.where(positive, 1.0, -1.0))

    def loss(params: tuple[jax.Array, jax.Array]) -> jax.Array:
        weights, bias = params
        odds = bias + jax.ops.segment_sum(weights[places], rows, num_segments=len(texts))
        return -jnp.mean(jax.nn.log_sigmoid(sign * odds)) + penalty * jnp.sum(weights**2)

    solver = optax.lbfgs()
    params = jnp.zeros(len(columns)), jnp.zeros(())
    value_and_grad = optax.value_and_grad_from_state(loss)

    @jax.jit
    def step(params, state):
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(params, updates), state

    state = solver.init(params)
    for _ in range(60):
        params, state = step(params, state)
    return Classifier(columns=columns, weights=np.asarray(params[0]), bias=float(params[1]))


def two_classifiers(folder: Path) -> tuple[Classifier, Classifier, dict[str, float]]:
    """Labeller and judge, and the accuracy of each on the other's reviews."""
    train, test = (labelled(folder / f"{name}.jsonl.xz") for name in ("train", "test"))
    labeller, judge = fit(*train), fit(*test)
    accuracy = {
        name: float(np.mean((own.scores(texts) > 0) == positive))
        for name, own, (texts, positive) in (("labeller", labeller, test), ("judge", judge, train))
    }
    return labeller, judge, accuracy
