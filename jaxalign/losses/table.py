"""The table of losses, read from the functions' signatures and docstrings alone.

python -m jaxalign.losses.table > docs/losses.md
"""

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from docstring_parser import Docstring
from docstring_parser.google import DEFAULT_SECTIONS, GoogleParser, Section, SectionType

from jaxalign.losses import LOSSES, Loss, Reads

PARSER = GoogleParser(
    [
        *DEFAULT_SECTIONS,
        Section("Slopes", "slopes", SectionType.SINGULAR),
        Section("References", "references", SectionType.SINGULAR),
    ]
)

SECTIONS: tuple[tuple[str, str, tuple[Reads, ...]], ...] = (
    ("Preference losses", "", ("pairs", "policy_pairs")),
    (
        "Token level",
        "On `TokenLogProbs`: per-token log-probabilities and divergences.",
        ("tokens",),
    ),
    (
        "On sampled responses",
        "Labels are probabilities; policy gradients read `SampleLogProbs`. The losses of PPO, DAPO "
        "and CISPO have one value per token.",
        ("samples",),
    ),
    (
        "On hidden states",
        "Representation alignment: states at chosen layers and response positions.",
        ("states",),
    ),
    (
        "Feedback on single responses",
        "On `LabelledLogProbs`: each response is labelled desirable or not.",
        ("labelled",),
    ),
    (
        "Rated responses, reward models and supervised fine-tuning",
        "",
        ("responses", "scores"),
    ),
)
"""Heading, introduction and what the losses read, for each section of the page."""

PREAMBLE = r"""# Losses

*Written by `python -m jaxalign.losses.table > docs/losses.md`, from the code; do not edit.*

Every loss is a pure function `loss(pairs, *, hyperparameters)` from log-probabilities to one value
per pair, not reduced. Log-probabilities are summed over a response's tokens, the end-of-sequence
token included, in nats: $\log\pi_w$ of the chosen response and $\log\pi_l$ of the rejected one
under the policy, $\log\pi^{ref}$ under the reference; $L$ is the number of tokens. The gradient of
a pair's loss is $-d_w \nabla\log\pi_w + d_l \nabla\log\pi_l$. The value of a pair under a loss
marked with an asterisk depends on its whole batch.
"""


@dataclass(frozen=True, kw_only=True)
class LossRow:
    """One row of the table of losses."""

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
        return typed(self.defaults)


def losses_table(*reads: Reads) -> list[LossRow]:
    """The rows of the losses that read one of these, in the order of `LOSSES`."""
    return [loss_row(loss) for loss in LOSSES if loss.reads in reads]


def loss_row(loss: Loss) -> LossRow:
    """The row of one loss."""
    documentation = PARSER.parse(loss.function.__doc__ or "")
    formula, _, definitions = formula_of(documentation).partition(r", \quad ")
    source = section(documentation, "references")
    return LossRow(
        name=loss.name,
        summary=documentation.short_description or "",
        formula=formula,
        definitions=definitions,
        defaults=defaults_of(loss.function),
        slopes=section(documentation, "slopes").removeprefix("d_w / d_l = "),
        source=source,
        arxiv=tuple(re.findall(r"arXiv:(\d{4}\.\d{5})", source)),
        batch_coupled=loss.coupled,
    )


def defaults_of(function: Callable) -> dict[str, str]:
    """Name and default of each keyword-only argument that has one; of a statistic, ""."""
    return {
        one.name: "" if one.default is None else f"{one.default:g}"
        for one in inspect.signature(function).parameters.values()
        if one.kind is one.KEYWORD_ONLY and one.default is not one.empty
    }


def typed(defaults: Mapping[str, str]) -> str:
    """Names and defaults, as one would type them."""
    return ", ".join(f"{name}={value}" if value else name for name, value in defaults.items())


def formula_of(documentation: Docstring) -> str:
    """The body of the first `.. math::` directive, on one line."""
    block = re.search(
        r"\.\. math::(.*?)(?:\n\s*\n|\Z)", documentation.long_description or "", re.DOTALL
    )
    return " ".join(block.group(1).split()) if block else ""


def section(documentation: Docstring, name: str) -> str:
    """The body of a section, on one line; empty where there is none."""
    bodies = [one.description or "" for one in documentation.meta if one.args == [name]]
    return " ".join(" ".join(bodies).split())


def losses_markdown() -> str:
    """The page of losses: one Markdown table for each kind."""
    parts = [PREAMBLE]
    for heading, introduction, reads in SECTIONS:
        parts.append(f"## {heading}\n")
        parts += [f"{introduction}\n"] if introduction else []
        parts.append(markdown_table(losses_table(*reads)))
    return "\n".join(parts)


def markdown_table(rows: list[LossRow]) -> str:
    """A Markdown table of losses."""
    lines = [
        "| name | loss of a pair | defaults | $d_w / d_l$ | what it is, and source |",
        "|---|---|---|---|---|",
        *map(markdown_line, rows),
    ]
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
