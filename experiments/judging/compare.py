"""Judges beside people: on LLMBar by subset, and on PandaLM.

Command:  python -m experiments.judging.compare [--model FOLDER] [--limit 100] [--aspects 300]
Needs:    the base model of experiments/base_lm
Time:     about an hour on two CPU cores; answers and the reward model are kept
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.judging import reward_model
from experiments.judging.likelihood import Likelihood
from experiments.page import put, table
from experiments.runs import DATA, TINY, finished
from jaxalign.backends import Cached
from jaxalign.backends.cached import AnswerFile
from jaxalign.backends.local import LocalModel
from jaxalign.evaluation import AnnotatorOptions, Verdicts, agreement, make_annotator, win_rate

FOLDER = Path(__file__).parent
RUNS = Path("runs/judging")
SETS = {"LLMBar": "llmbar_all", "PandaLM": "pandalm_human"}
SHORT = FOLDER / "short.txt"
STORIES = DATA / "models" / "stories260K"


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """A set of comparisons; people prefer the first response of each."""

    prompts: Sequence[str]
    better: Sequence[str]
    worse: Sequence[str]
    part: Sequence[str]

    def __len__(self) -> int:
        return len(self.prompts)

    def some(self, most: int | None) -> "Comparisons":
        """So many of them, drawn once and for all."""
        if most is None or most >= len(self):
            return self
        places = np.sort(np.random.default_rng(0).permutation(len(self))[:most])
        columns = (self.prompts, self.better, self.worse, self.part)
        prompts, better, worse, part = ([column[at] for at in places] for column in columns)
        return Comparisons(prompts=prompts, better=better, worse=worse, part=part)


def read(name: str) -> tuple[Comparisons, int]:
    """A file's comparisons, each once, and the number of rows that came again."""
    with (DATA / "judging" / f"{name}.jsonl").open(encoding="utf-8") as file:
        rows = list(map(json.loads, file))
    once = {(row["prompt"], row["chosen"], row["rejected"]): row for row in reversed(rows)}
    kept = list(reversed(once.values()))
    found = Comparisons(
        prompts=[row["prompt"] for row in kept],
        better=[row["chosen"] for row in kept],
        worse=[row["rejected"] for row in kept],
        part=[row["source"].split("/")[-1].replace("_", " ") for row in kept],
    )
    return found, len(rows) - len(kept)


def judges(model: str, aspects: int) -> dict[str, tuple[Callable[[], Any], int | None]]:
    """Name -> what makes the judge, and the most comparisons that it is asked."""

    def of(spec: str, template: Path | None = None) -> Callable[[], Any]:
        kept = RUNS / spec.replace("/", "_") / "answers.jsonl"
        options = AnnotatorOptions(answers_file=kept, batch_size=16, template=template)
        return lambda: make_annotator(spec, options)

    def likely(**options: bool) -> Callable[[], Any]:
        answers = AnswerFile(RUNS / "scores.jsonl")
        return lambda: Likelihood(
            backend=Cached(LocalModel.load(model, batch_size=16), answers), **options
        )

    def rule(name: str) -> Callable[[], Any]:
        return of(f"rule:{FOLDER / 'rules.py'}:{name}")

    return {
        "always the first": (rule("first"), None),
        "a coin": (rule("coin"), None),
        "the longer one": (rule("longer"), None),
        "more of the request's words": (rule("overlap"), None),
        "stories260K, A or B": (of(f"lm:{STORIES}", SHORT), None),
        "base model, A or B": (of(f"lm:{model}", SHORT), None),
        "base model, A or B, long question": (of(f"lm:{model}"), None),
        "base model, log-prob a token": (likely(), None),
        "base model, log-prob gained": (likely(gained=True), None),
        "base model, six aspects": (of(f"aspects:scored:{model}"), aspects),
        "reward model": (of("reward:runs/judging_reward"), None),
    }


def right(verdicts: Verdicts) -> np.ndarray:
    """1 where the judge agrees with people, 0.5 where it has a tie, NaN without a verdict."""
    sign = np.sign(verdicts.preference - 0.5)
    return np.where(np.isfinite(sign), 0.5 + 0.5 * sign, np.nan)


def cell(values: np.ndarray, prompts: Sequence[str]) -> str:
    """Accuracy with the half-width of its interval over prompts; bold above chance."""
    if not np.isfinite(values).any():
        return "–"
    found = win_rate(values, groups=prompts)
    low, high = found.bootstrap
    text = f"{found.rate:.3f} ({low:.3f} to {high:.3f})"
    return f"**{text}**" if low > 0.5 else text


def share(value: float | None) -> str:
    """A share, where there is one."""
    return "" if value is None else f"{value:.2f}"


def section(
    sets: Mapping[str, Comparisons],
    verdicts: Mapping[str, Mapping[str, Verdicts]],
    asked: Mapping[str, Mapping[str, Comparisons]],
) -> str:
    """The two tables."""
    rows, parts = [], []
    for name, own in verdicts.items():
        cells = [name]
        for label in sets:
            found, of = own[label], asked[name][label]
            known = int(np.isfinite(found.preference).sum())
            kappa = agreement(found.preference, np.ones(len(of))).kappa
            cells += [cell(right(found), of.prompts), f"{kappa:.2f}", f"{known:,}"]
        orders = [own[label].order_consistency for label in sets]
        first = [own[label].first_position_rate for label in sets]
        known = [one for one in orders if one is not None]
        cells.append(" / ".join(map(share, orders)) if known else "")
        cells.append(" / ".join(map(share, first)) if known else "")
        rows.append(cells)
    header = ["judge"]
    for label, own in sets.items():
        header += [f"{label} ({len(own):,})", "kappa", "judged"]
    text = table([*header, "same in both orders", "P(shown first)"], rows)
    names = sorted(set(sets["LLMBar"].part))
    for part in names:
        cells = [part, str(sets["LLMBar"].part.count(part))]
        for name, own in verdicts.items():
            of = asked[name]["LLMBar"]
            mine = [at for at, one in enumerate(of.part) if one == part]
            values = right(own["LLMBar"])[mine]
            found = win_rate(values, groups=[of.prompts[at] for at in mine])
            shown = "–" if not np.isfinite(values).any() else f"{found.rate:.2f}"
            cells.append(f"**{shown}**" if found.bootstrap[0] > 0.5 else shown)
        parts.append(cells)
    return text + "\n" + table(["LLMBar", "number", *verdicts], parts)


def main() -> None:
    """Train the reward model, ask all judges, and write the section of the README."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--model", default=TINY, help="folder of the base model")
    flags.add_argument("--limit", type=int, help="comparisons of each set (default: all)")
    flags.add_argument("--aspects", type=int, default=300, help="for the judge of six aspects")
    given = flags.parse_args()
    read_sets = {label: read(name) for label, name in SETS.items()}
    sets = {label: own.some(given.limit) for label, (own, _) in read_sets.items()}
    judged = [prompt for own, _ in read_sets.values() for prompt in own.prompts]
    written, left_out = reward_model.write_pairs(judged)
    finished(reward_model.config(model=given.model))
    verdicts: dict[str, dict[str, Verdicts]] = {}
    asked: dict[str, dict[str, Comparisons]] = {}
    for name, (make, most) in judges(given.model, given.aspects).items():
        annotator = make()
        asked[name] = {label: own.some(most) for label, own in sets.items()}
        verdicts[name] = {}
        for label, own in asked[name].items():
            # the better one is shown second in every other comparison, as no judge is to know
            flip = [at % 2 == 1 for at in range(len(own))]
            sides = list(zip(own.better, own.worse, flip, strict=True))
            found = annotator.preferences(
                own.prompts,
                [worse if other else better for better, worse, other in sides],
                [better if other else worse for better, worse, other in sides],
            )
            verdicts[name][label] = turned(found, flip)
            print(name, label, cell(right(verdicts[name][label]), own.prompts), flush=True)
    again = ", ".join(f"{number} of {label}" for label, (_, number) in read_sets.items())
    command = f"--aspects {given.aspects}" + (f" --limit {given.limit}" if given.limit else "")
    text = (
        f"`python -m experiments.judging.compare {command}` printed, from comparisons each taken "
        f"once (rows that came again: {again}); the reward model learnt from {written:,} pairs "
        f"({left_out} with a judged prompt left out):\n\n{section(sets, verdicts, asked)}"
    )
    print(text)
    put(FOLDER, "judges", text)


def turned(verdicts: Verdicts, flip: Sequence[bool]) -> Verdicts:
    """Verdicts on (better, worse) from those on the sides as they were given."""
    other = np.array(flip)
    by_order = verdicts.by_order
    if by_order is not None:
        by_order = np.where(other[:, None], 1 - by_order[:, ::-1], by_order)
    return Verdicts(
        preference=np.where(other, 1 - verdicts.preference, verdicts.preference),
        reasons=verdicts.reasons,
        by_order=by_order,
    )


if __name__ == "__main__":
    main()
