"""The table of losses, read from the functions' signatures and docstrings alone.

python -m jaxalign.losses.table > docs/losses.md
"""

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jaxalign.losses import (
    BATCH_COUPLED,
    PREFERENCE_LOSSES,
    TOKEN_LOSSES,
    bradley_terry,
    hidden_state_distance,
    hidden_state_matching,
    kto_unpaired,
    nash_md_pg,
    ppo_policy,
    ppo_value,
    preference_model,
    regularised_policy_gradient,
    sft_sequence_sum,
    sft_token_mean,
    soft_label,
    sppo_soft,
    stable_alignment_rated,
    xpo,
)

ONLINE_LOSSES = {
    loss.__name__: loss
    for loss in (
        soft_label,
        xpo,
        sppo_soft,
        nash_md_pg,
        regularised_policy_gradient,
        ppo_policy,
        ppo_value,
    )
}

STATE_LOSSES = {loss.__name__: loss for loss in (hidden_state_matching, hidden_state_distance)}

OTHER_LOSSES = {
    loss.__name__: loss
    for loss in (
        kto_unpaired,
        stable_alignment_rated,
        bradley_terry,
        preference_model,
        sft_token_mean,
        sft_sequence_sum,
    )
}

PREAMBLE = r"""# Losses

*Written by `python -m jaxalign.losses.table > docs/losses.md`, from the code; do not edit.*

Every loss is a pure function `loss(pairs, *, hyperparameters)` from log-probabilities to one value
per pair, not reduced. Log-probabilities are summed over a response's tokens, the end-of-sequence
token included, in nats: $\log\pi_w$ of the chosen response and $\log\pi_l$ of the rejected one
under the policy, $\log\pi^{ref}$ under the reference; $L$ is the number of tokens. The gradient of
a pair's loss is $-d_w \nabla\log\pi_w + d_l \nabla\log\pi_l$. Losses marked with an asterisk see
their whole batch.
"""


@dataclass(frozen=True, kw_only=True)
class LossRow:
    """What the table says of one loss."""

    name: str
    summary: str
    formula: str  # LaTeX, the loss alone
    definitions: str  # LaTeX, the symbols it uses
    defaults: dict[str, str]  # name of a hyperparameter -> default, empty for a statistic
    slopes: str  # d_w / d_l
    source: str
    arxiv: tuple[str, ...]
    batch_coupled: bool

    @property
    def hyperparameters(self) -> str:
        """Names and defaults, as one would type them."""
        return ", ".join(
            f"{name}={value}" if value else name for name, value in self.defaults.items()
        )


def losses_table() -> list[LossRow]:
    """One row for each preference loss, in the order of `PREFERENCE_LOSSES`."""
    return [loss_row(name, loss) for name, loss in PREFERENCE_LOSSES.items()]


def loss_row(name: str, loss: Callable) -> LossRow:
    """The row of one loss."""
    documentation = inspect.getdoc(loss) or ""
    formula, _, definitions = formula_of(documentation).partition(r", \quad ")
    source = section(documentation, "References")
    return LossRow(
        name=name,
        summary=documentation.splitlines()[0] if documentation else "",
        formula=formula,
        definitions=definitions,
        defaults={
            parameter.name: "" if parameter.default is None else f"{parameter.default:g}"
            for parameter in inspect.signature(loss).parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty
        },
        slopes=section(documentation, "Slopes").removeprefix("d_w / d_l = "),
        source=source,
        arxiv=tuple(re.findall(r"arXiv:(\d{4}\.\d{5})", source)),
        batch_coupled=name in BATCH_COUPLED,
    )


def formula_of(documentation: str) -> str:
    """The body of the first `.. math::` directive, on one line."""
    block = re.search(r"\.\. math::(.*?)(?:\n\s*\n|\Z)", documentation, re.DOTALL)
    return " ".join(block.group(1).split()) if block else ""


def section(documentation: str, title: str) -> str:
    """The body of a docstring's section, on one line; empty where there is none."""
    block = re.search(rf"^{title}:\n((?:[ ]+.*\n?|\n)*)", documentation, re.MULTILINE)
    return " ".join(block.group(1).split()) if block else ""


def losses_markdown() -> str:
    """The page of losses: one Markdown table for each kind."""
    return "\n".join(
        [
            PREAMBLE,
            "## Preference losses\n",
            markdown_table(PREFERENCE_LOSSES),
            "## Token level\n",
            "On `TokenLogProbs`: per-token log-probabilities and divergences.\n",
            markdown_table(TOKEN_LOSSES),
            "## On sampled responses\n",
            "Labels are probabilities; policy gradients read `SampleLogProbs`, PPO reads tokens.\n",
            markdown_table(ONLINE_LOSSES),
            "## On hidden states\n",
            "Representation alignment: states at chosen layers and response positions.\n",
            markdown_table(STATE_LOSSES),
            "## Single and rated responses, reward models and supervised fine-tuning\n",
            markdown_table(OTHER_LOSSES),
        ]
    )


def markdown_table(losses: Mapping[str, Callable]) -> str:
    """A Markdown table of the given losses."""
    lines = [
        "| name | loss of a pair | defaults | $d_w / d_l$ | what it is, and source |",
        "|---|---|---|---|---|",
    ]
    lines += [markdown_line(loss_row(name, loss)) for name, loss in losses.items()]
    return "\n".join(lines) + "\n"


def markdown_line(row: LossRow) -> str:
    """One row in Markdown; formulas may not hold the bar that ends a cell."""
    formula = f"${row.formula}$"
    if row.definitions:
        formula += "<br>" + ", ".join(f"${part}$" for part in row.definitions.split(r", \quad "))
    defaults = ", ".join(f"`{part}`" for part in row.hyperparameters.split(", ") if part)
    source = re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", row.source)
    name = f"`{row.name}`" + (" \\*" if row.batch_coupled else "")
    cells = (name, formula, defaults, row.slopes, f"{row.summary} {source}")
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.stdout.write(losses_markdown())
