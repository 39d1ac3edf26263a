"""Scores by aspects: GPT-4-turbo's, by both conventions, and how near a local model's come.

Command:  python -m experiments.judging.just_eval [--model FOLDER] [--limit 300]
Needs:    the base model of experiments/base_lm
Time:     about twenty minutes on two CPU cores; answers are kept
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.page import put, table
from experiments.runs import DATA, TINY
from jaxalign.backends import Cached
from jaxalign.backends.cached import AnswerFile
from jaxalign.backends.local import LocalModel
from jaxalign.evaluation.just_eval import (
    QUALITY,
    SAFETY,
    AspectTable,
    Rated,
    aspect_table,
    read_judgements,
    score_agreement,
)
from jaxalign.evaluation.single_scores import ScoredReward

FOLDER = Path(__file__).parent
ASPECTS = (*QUALITY, *SAFETY)
RESAMPLES = 1000


def published() -> list[Rated]:
    """GPT-4-turbo's scores of gpt-3.5-turbo-0301 on the 1,000 prompts."""
    files = sorted((DATA / "just_eval" / "judgments_gpt4turbo").glob("*.json"))
    return [row for file in files for row in read_judgements(file)]


def line(name: str, found: AspectTable) -> list[str]:
    """Means, the two averages, words."""
    means = [f"{found.means[aspect]:.3f}" for aspect in ASPECTS]
    return [name, *means, f"{found.average:.3f}", f"{found.leaderboard:.3f}", f"{found.words:.1f}"]


def correlation(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Spearman's, with its bootstrap interval; bold where that leaves out 0."""
    x, y = np.array(ours), np.array(theirs)
    if len(set(theirs)) < 2:
        return "–"
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(x), (RESAMPLES, len(x)))
    found = np.array([score_agreement(x[at], y[at]).spearman for at in draws])
    low, high = np.nanquantile(found, [0.025, 0.975])
    text = f"{score_agreement(x, y).spearman:+.2f} ({low:+.2f} to {high:+.2f})"
    return f"**{text}**" if low > 0 or high < 0 else text


def main() -> None:
    """Compute, and write the section of the README."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--model", default=TINY, help="folder of the base model")
    flags.add_argument("--limit", type=int, default=300, help="responses for the local model")
    given = flags.parse_args()
    rows = published()
    averages = ["mean of five", "mean of six", "words"]
    text = table(
        ['"N/A"', *map(str.lower, ASPECTS), *averages],
        [
            line("left out", aspect_table(rows)),
            line("counts 5 (just-eval)", aspect_table(rows, inapplicable=5.0)),
        ],
    )
    places = np.random.default_rng(0).permutation(len(rows))[: given.limit]
    some = [rows[at] for at in np.sort(places)]
    model = LocalModel.load(given.model, batch_size=16)
    backend = Cached(model, AnswerFile(Path("runs/judging/just_eval.jsonl")))
    lines = []
    for name in ASPECTS:
        own = [row for row in some if name in row.scores]
        reward = ScoredReward(backend, criteria=(name,))
        said = reward([row.prompt for row in own], [row.response for row in own])
        fits = [at for at, one in enumerate(said) if not one.failure]
        theirs = [own[at].scores[name] for at in fits]
        ours = [said[at].mean for at in fits]
        words = [float(len(own[at].response.split())) for at in fits]
        spread = f"{np.mean(ours):.2f} ± {np.std(ours):.2f}"
        both = correlation(ours, theirs), correlation(words, theirs)
        lines.append([name.lower(), str(len(fits)), spread, *both])
    header = ["aspect", "responses", "local scores", "local with GPT-4's", "length with GPT-4's"]
    text += "\n" + table(header, lines)
    command = f"python -m experiments.judging.just_eval --limit {given.limit}"
    print(text)
    put(FOLDER, "just_eval", f"`{command}` printed:\n\n{text}")


if __name__ == "__main__":
    main()
