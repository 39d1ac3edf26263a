"""What the paper finds and expects, and whether it holds for the chat models: two tables."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.gradient_entanglement.small_rows import at_accuracy, change, mean
from experiments.page import table
from experiments.rows import Rows

WATCHED = {
    "dpo_adamw_polite": "135M, AdamW",
    "dpo_sgd_polite": "135M, SGD",
    "second_dpo": "270M, AdamW",
    "dpo_adamw_ultrafeedback": "135M, UltraFeedback",
}
"""Run of DPO -> its column; of polite pairs where no other data is named."""
SAME_WEIGHTS = ("dpo", "simpo", "ipo", "kto", "rdpo")
"""Losses whose two weights are the same, or nearly."""
WITH_SFT = ("cpo", "rrhf", "orpo", "slic", "rpo")
"""Losses with a term on the chosen response alone that is always there."""
CORRECTING = ("sppo", "dpop")
"""Losses that weigh chosen more once its log-prob has fallen."""


@dataclass(frozen=True)
class Finding:
    """A sentence of the paper, or of its conditions, and what a run says of it."""

    holds: bool
    measured: str

    def __str__(self) -> str:
        return f"{'yes' if self.holds else 'no'}: {self.measured}"


def ends(rows: Rows, name: str) -> tuple[float, float]:
    """The changes of held-out chosen and rejected over a run, in nats."""
    chosen, rejected = (change(rows[name], side)[-1] for side in ("chosen", "rejected"))
    return float(chosen), float(rejected)


def both_fall(rows: Rows, name: str) -> Finding:
    """Held-out chosen falls together with rejected."""
    chosen, rejected = ends(rows, name)
    return Finding(max(chosen, rejected) < 0, f"{chosen:+.2f} and {rejected:+.2f} nats")


def in_step(rows: Rows, name: str) -> Finding:
    """From one evaluation to the next, held-out chosen and rejected move in the same direction."""
    moves = [np.sign(np.diff(change(rows[name], side))) for side in ("chosen", "rejected")]
    same = moves[0] == moves[1]
    return Finding(bool(np.mean(same) > 0.5), f"{np.sum(same)} of {len(same)} times")


def longer_rejected(rows: Rows, name: str) -> Finding:
    """The rejected gradient is the longer one."""
    ratio = mean(rows[name], "norm_ratio")
    return Finding(ratio > 1, f"{ratio:.2f} times")


def own_case(rows: Rows, name: str) -> Finding:
    """The two gradients of a pair say where held-out log-probs go."""
    row = rows[name]
    ideal = mean(row, "ideal")
    chosen, rejected = ends(rows, name)
    parted = chosen > 0 > rejected
    return Finding((ideal > 0.5) == parted, f"{ideal:.0%} of the pairs are ideal")


def own_part(rows: Rows, name: str) -> Finding:
    """In the step that learns from a pair, its chosen rises and its rejected falls."""
    moves = [
        np.array(rows[name]["training"][f"entanglement/ledger/realised_{side}"]["value"])
        for side in ("chosen", "rejected")
    ]
    does = (moves[0] > 0) & (moves[1] < 0)
    return Finding(bool(np.mean(does) > 0.5), f"{np.sum(does)} of {len(does)} batches")


OF_DPO = {
    "a pair's chosen rises and its rejected falls in the step that learns from it": own_part,
    "held-out chosen falls together with rejected": both_fall,
    "both move in the same direction between evaluations": in_step,
    "the rejected gradient is longer than the chosen one": longer_rejected,
    "the pairs' own condition says where held-out log-probs go": own_case,
}
"""Finding on DPO -> its test."""


def of_losses(
    rows: Rows, losses: Sequence[str], chosen_up: bool, rule: str = "adamw"
) -> tuple[str, str]:
    """With which of the losses chosen goes where it should, and with which it does not."""
    runs = {x: f"{x}_{rule}_polite" for x in losses}
    found = {x: ends(rows, name)[0] for x, name in runs.items() if name in rows}
    does = [f"{x} {value:+.1f}" for x, value in found.items() if (value > 0) == chosen_up]
    does_not = [f"{x} {value:+.1f}" for x, value in found.items() if (value > 0) != chosen_up]
    return ", ".join(does), ", ".join(does_not)


def page(rows: Rows, accuracy: float) -> str:
    """Two tables: the findings on DPO, by run, and those on losses and mitigations.

    Args:
      rows: of the runs.
      accuracy: at which mitigations are compared.
    """
    runs = [name for name in WATCHED if name in rows]
    first = [[text, *(str(test(rows, x)) for x in runs)] for text, test in OF_DPO.items()]
    expected = (
        ("losses with equal or similar weights lower chosen", SAME_WEIGHTS, False),
        ("losses with an SFT term raise it", WITH_SFT, True),
        ("losses that weigh chosen more once it has fallen raise it", CORRECTING, True),
    )
    second = [[text, *of_losses(rows, losses, up)] for text, losses, up in expected]
    by_sgd = [
        [f"SGD: {text}", *of_losses(rows, losses, up, "sgd")] for text, losses, up in expected
    ]
    second += [line for line in by_sgd if any(line[1:])]
    plain = at_accuracy(rows[next(iter(WATCHED))], accuracy)
    better, worse = [], []
    for name in ("normalised", "centred", "differing"):
        at = at_accuracy(rows[f"cure_{name}"], accuracy) if f"cure_{name}" in rows else None
        if at and plain:
            (better if at["chosen"] > plain["chosen"] else worse).append(
                f"{name} {at['chosen'] - plain['chosen']:+.1f}"
            )
    title = "the paper's mitigations keep more of chosen than DPO at the same accuracy"
    second.append([title, ", ".join(better), ", ".join(worse)])
    return "\n".join(
        [
            "What the paper and its condition say of DPO, and whether it holds:\n",
            table(("finding", *(WATCHED[name] for name in runs)), first),
            "What they lead one to expect of losses and mitigations, and what held-out chosen did "
            "(nats; 135M, polite\npairs, AdamW if nothing else is said; of mitigations, less what "
            "DPO did):\n",
            table(("expected", "did", "did not"), second),
        ]
    )
