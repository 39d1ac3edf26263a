"""Options, methods and rows of the study on a real chat model."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from experiments.ipo_md.together import Method
from jaxalign.files import read_json, write_json_lines

BETA = 0.125  # of IPO-MD and Nash-MD-PG: the paper's choice
CONTRASTIVE, GRADIENT = 5e-4, 2.5e-4
"""Learning rates of adapters: of losses on pairs, and of policy gradients, which are noisier."""


def _method(name: str, parameter: str, rate: float, **options: float) -> Method:
    return Method(name=name, parameter=parameter, options=options, rate=rate)


METHODS: dict[str, Method] = {
    "ipo_md": _method("ipo_md", "tau", CONTRASTIVE, beta=BETA),
    "online_ipo": _method("online_ipo", "tau", CONTRASTIVE),
    "online_dpo": _method("online_dpo", "beta", CONTRASTIVE),
    "nash_md_pg": _method("nash_md_pg", "tau", GRADIENT, beta=BETA),
    "online_slic": _method("online_slic", "beta", CONTRASTIVE),
    "regularised_policy_gradient": _method(
        "regularised_policy_gradient", "tau", GRADIENT, samples=2
    ),
    "grpo": _method("grpo", "beta", GRADIENT, samples=4),
    "egpo": _method("egpo", "tau", CONTRASTIVE),
}
"""Algorithm -> what its runs share."""
STRENGTHS: dict[str, tuple[float, float, float]] = {
    "ipo_md": (0.01, 0.1, 1.0),
    "online_ipo": (0.01, 0.1, 1.0),
    "online_dpo": (0.01, 0.1, 1.0),
    "nash_md_pg": (0.001, 0.01, 0.1),
    "online_slic": (0.03, 0.3, 3.0),
    "regularised_policy_gradient": (0.002, 0.02, 0.2),
    "grpo": (0.004, 0.04, 0.4),
    "egpo": (0.01, 0.1, 1.0),
}
"""The strengths tried first, ten times apart; the sweep continues while the best is an end."""
MOST_STRENGTHS = 5
REWARDED = ("regularised_policy_gradient", "grpo")
ANNOTATORS = {
    "reward": ("reward", "bradley_terry", "annotators", 0),
    "preference": ("preference", "preference_model", "annotators", 0),
    "judge": ("preference", "preference_model", "judge", 1),
}
"""Name -> kind of model, loss, file of pairs, seed."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is trained, and how much of it."""

    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """Folder, Hub name or GGUF file of the chat model."""
    folder: str = "runs/ipo_md_small"
    """Folder of data, annotators and compiled programs."""
    rows: str = "experiments/ipo_md/rows"
    """Folder of the numbers and of the responses to the test prompts."""
    processes: int = 1
    """Number of cells at a time, each in a process of its own; 1: all in this process."""
    minutes: float = 0.0
    """Time for everything: the final runs are shortened to fit, and no cell begins later; 0: no
    limit."""
    memory: float = 0.8
    """Fraction of an accelerator's memory for all processes together."""
    step: str = "all"
    """Last step to do: annotators, sweep, final, judge, or all, which also writes the README."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Algorithms."""
    pairs: int = 1200
    """Most pairs that an annotator learns from."""
    held_out: int = 200
    """Most held-out pairs of each source."""
    epochs: float = 3.0
    """Passes of each annotator over its pairs."""
    annotator_batch: int = 16
    """Pairs in an update of an annotator."""
    annotator_rate: float = 5e-5
    """Learning rate of the annotators."""
    prompts: int = 16
    """Prompts of an update, of methods with two responses to each; others learn from as many
    responses."""
    sweep_updates: int = 20
    """Updates of the runs that choose the strength."""
    updates: int = 48
    """Updates of the final runs, at most."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the final runs."""
    evaluations: int = 4
    """Number of evaluations in a final run, at equal distances; an even part of its updates."""
    longest: int = 96
    """Most tokens of a prompt, chat template included; longer prompts are left out."""
    tokens: int = 64
    """Most tokens of a response."""
    validation: int = 64
    """Number of prompts that choose the strength; half of them measure the final runs."""
    test: int = 96
    """Number of test prompts."""
    rate: float = 1.0
    """Factor on all learning rates of policies."""
    cell: str = ""
    """The one cell of this process, e.g. sweep:ipo_md; set by the command itself."""

    @property
    def sizes(self) -> dict[str, Any]:
        """The options that change the numbers of a run, apart from the number of its updates."""
        names = (
            *("pairs", "epochs", "annotator_batch", "annotator_rate", "prompts"),
            *("longest", "tokens", "validation", "test", "rate"),
        )
        return {"model": Path(self.model).name} | {name: getattr(self, name) for name in names}

    def prompts_of(self, name: str) -> int:
        """Prompts of an update of an algorithm."""
        return max(1, int(2 * self.prompts // METHODS[name].options.get("samples", 2)))


def on_accelerator() -> bool:
    """Whether there is one; then computation is in bfloat16, and runs advance together."""
    return jax.default_backend() != "cpu"


def path_of(options: Options, cell: str) -> Path:
    """The file of a cell's rows."""
    return Path(options.rows) / f"{cell.strip(':').replace(':', '_')}.jsonl"


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; none if there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(options: Options, cell: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write a cell's rows, with the options that made them."""
    write_json_lines(path_of(options, cell), [row | {"sizes": options.sizes} for row in rows])


def rows_of(options: Options, kind: str) -> list[dict[str, Any]]:
    """The rows of all methods' cells of a kind."""
    return [row for name in options.methods for row in read(path_of(options, f"{kind}:{name}"))]


def is_done(options: Options, cell: str) -> bool:
    """Whether a cell's rows are there, made with these options."""
    rows = read(path_of(options, cell))
    return bool(rows) and all(row["sizes"] == options.sizes for row in rows)


def responses_of(options: Options, name: str) -> Path:
    """The file of a policy's responses to the test prompts."""
    return Path(options.rows) / f"responses_{name}.jsonl"


def prompts_of(options: Options) -> dict[str, list[dict[str, str]]]:
    """The prompts of all parts: train, validation, test."""
    own: Any = read_json(Path(options.folder) / "data" / "prompts.json", "prompts of the study")
    return {part: own[part] for part in ("train", "validation", "test")}
