"""Tables and figures of the study on a real chat model, from its rows alone.

Command:  python -m experiments.ipo_md.small_tables
Time:     seconds
Expect:   the sections "small ..." of this folder's README, small.png, small_reliability.png
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from experiments.ipo_md.small_options import REWARDED, read
from experiments.page import half_width, put, table
from jaxalign.evaluation.bradley_terry import cycles, ratings
from jaxalign.evaluation.win_rates import length_controlled
from jaxalign.training.calibration import reliability

LABELS = {
    "ipo_md": "IPO-MD",
    "online_ipo": "IPO",
    "online_dpo": "DPO",
    "nash_md_pg": "Nash-MD-PG",
    "online_slic": "SLiC",
    "regularised_policy_gradient": "RL",
    "grpo": "GRPO",
    "egpo": "EGPO",
    "reference": "reference",
}
"""Algorithm -> the name in the tables, the paper's where it has one."""
SOURCES = {"ultrafeedback": "UltraFeedback", "polite": "polite", "people": "people"}
"""Source of held-out pairs -> its name in the tables."""
READ = "read.jsonl"
"""File of a larger judge's verdicts."""
ANNOTATORS = {"reward": "reward model", "preference": "preference model", "judge": "judge"}

Row = dict[str, Any]


def write(rows: Path, here: Path) -> str:
    """Write the README's sections and the figures of a folder, of those rows that are there."""
    sections = {}
    if read(rows / "judge.jsonl"):
        sections |= standings(rows)
        draw(rows, here / "small.png")
    if all(read(rows / f"annotator_{name}.jsonl") for name in ANNOTATORS):
        sections["small annotators"] = annotators(rows)
        draw_reliability(rows, here / "small_reliability.png")
    if of_methods(rows, "sweep"):
        sections["small sweep"] = sweep(rows)
    for name, text in sections.items():
        put(here, name, text)
    return "\n".join(sections.values())


# ------------------------------------------------------------------------------ rows


def of_methods(rows: Path, kind: str) -> dict[str, list[Row]]:
    """The rows of all methods that have some, in the order of the table."""
    every = {name: read(rows / f"{kind}_{name}.jsonl") for name in LABELS}
    return {name: own for name, own in every.items() if own}


def by_seed(rows: Sequence[Row], field: str) -> dict[int, list[Any]]:
    """Seed -> a field of a policy's responses, in the order of the prompts."""
    found: dict[int, list[Any]] = {}
    for row in sorted(rows, key=lambda row: (row["seed"], row["prompt"])):
        found.setdefault(row["seed"], []).append(row[field])
    return found


def won(preference: Sequence[float] | np.ndarray) -> np.ndarray:
    """1 where the first is preferred, 0 where the second is, 1/2 at a tie.

    Annotators differ in how certain they are, so that their mean preferences cannot be compared.
    """
    return (1 + np.sign(np.asarray(preference) - 0.5)) / 2


def games_of(verdicts: Sequence[Row]) -> tuple[list[str], np.ndarray]:
    """Names of the judged policies, and who won before the judge.

    Returns:
      The names, and [prompts, policies, policies, seeds]: 1, 1/2 or 0; NaN where two were not
      compared, 1/2 for a policy against itself.
    """
    own = [row for row in verdicts if row["annotator"] == "judge"]
    names = [name for name in LABELS if any(name in (row["one"], row["other"]) for row in own)]
    seeds = sorted({row["seed"] for row in own})
    games = np.full((len(own[0]["preference"]), len(names), len(names), len(seeds)), np.nan)
    games[:, range(len(names)), range(len(names))] = 0.5
    for row in own:
        i, j, seed = names.index(row["one"]), names.index(row["other"]), seeds.index(row["seed"])
        games[:, i, j, seed] = won(row["preference"])
        games[:, j, i, seed] = 1 - won(row["preference"])
    return names, games


def over_reference(verdicts: Sequence[Row]) -> dict[tuple[str, str], dict[int, np.ndarray]]:
    """Annotator and policy -> seed -> its wins over the reference, [prompts]."""
    over: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    for row in verdicts:
        if row["other"] == "reference":
            own = over.setdefault((row["annotator"], row["one"]), {})
            own[row["seed"]] = won(row["preference"])
    return over


def with_interval(values: Sequence[float] | np.ndarray, form: str = ".2f") -> str:
    """A mean over prompts with the half-width of its 95 % interval."""
    return f"{np.mean(values):{form}} ± {half_width(list(values)):{form}}"


# ------------------------------------------------------------------------------ tables


def standings(rows: Path) -> dict[str, str]:
    """All methods by the judge's rating and what each cost; the matrix of all pairs, and judges."""
    verdicts, runs = read(rows / "judge.jsonl"), of_methods(rows, "final")
    names, games = games_of(verdicts)
    scale = ratings(np.nanmean(games, axis=3))
    ranked = [names[at] for at in np.argsort(-scale.elo)]
    written = {name: read(rows / f"responses_{name}.jsonl") for name in names}
    said = {name: by_seed(own, "response") for name, own in written.items()}
    over = over_reference(verdicts)

    def wins_of(annotator: str, name: str) -> np.ndarray:
        """Over the reference, a mean over seeds for each prompt."""
        return np.mean(list(over[annotator, name].values()), axis=0)

    def at_equal_length(name: str) -> str:
        controlled = [
            length_controlled(
                wins,
                np.array([len(x) for x in said[name][seed]]),
                np.array([len(x) for x in said["reference"][seed]]),
                resamples=0,
            ).rate
            for seed, wins in over["judge", name].items()
        ]
        return f"{np.mean(controlled):.2f}"

    def mean(name: str, field: str) -> float:
        return float(np.mean([row[field] for row in written[name]]))

    cells = []
    for name in ranked:
        at = names.index(name)
        tokens, ended = f"{mean(name, 'tokens'):.1f}", f"{mean(name, 'finished'):.2f}"
        elo = f"{scale.elo[at]:.0f} ({scale.low[at]:.0f} to {scale.high[at]:.0f})"
        if name == "reference":
            cells.append([LABELS[name], "–", *["0.50"] * 4, "–", "0", tokens, ended, elo])
            continue
        run, judge = runs[name][0], wins_of("judge", name)
        views = [with_interval(wins_of(annotator, name)) for annotator in ("preference", "reward")]
        own = "reward" if name in REWARDED else "preference"
        views[own == "reward"] += " \\*"
        gap = with_interval(wins_of(own, name) - judge, "+.2f").replace("± +", "± ")
        strength = f"{run['parameter']} = {run['strength']:g}"
        before = with_interval(judge), at_equal_length(name)
        kl = f"{mean(name, 'log_ratio'):.1f}"
        cells.append([LABELS[name], strength, *before, *views, gap, kl, tokens, ended, elo])
    header = [
        *("method", "strength", "wins over the reference: judge", "judge, at equal length"),
        *("preference model", "reward model", "own annotator minus judge"),
        *("KL, nats", "tokens", "ended before the limit", "Elo of all against all"),
    ]
    by_prompt = np.nanmean(games, axis=3)
    matrix = [
        [
            LABELS[one],
            *(
                "0.50"
                if one == other
                else with_interval(by_prompt[:, names.index(one), names.index(other)])
                for other in ranked
            ),
        ]
        for one in ranked
    ]
    found = cycles(by_prompt)
    updates = sorted({run["updates"] for own in runs.values() for run in own})
    note = (
        "Wins are the fraction of comparisons in which the policy's response is preferred. "
        f"Test prompts: {games.shape[0]}, one response of each of {games.shape[3]} seeds; ± is the "
        "95 % interval over prompts, seeds averaged; in the second table over seeds (Student's t), "
        "on the same prompts, with the variation between trainings. KL is in nats a "
        f"response. Final runs of {' or '.join(map(str, updates))} updates. \\* the annotator "
        "that the method learned from."
    )
    cyclic = (
        "The row's wins over the column before the judge. Its majority is a cycle on "
        f"{100 * found.rate:.1f} % of {found.triples:,} triples of policies on a prompt."
    )
    figure = "![preferences over divergence; reward, divergence, length over updates](small.png)"
    judges = agreement(verdicts, said), reader(read(rows / READ), verdicts, said)
    against = table(["", *(LABELS[name] for name in ranked)], matrix)
    return {
        "small methods": f"{table(header, cells)}\n{seeds_apart(over)}\n{note}\n\n{figure}",
        "small all against all": "\n".join([f"{against}\n{cyclic}\n", *judges]),
    }


def seeds_apart(over: Mapping[tuple[str, str], Mapping[int, np.ndarray]]) -> str:
    """The table of wins over the reference in every seed, before the own annotator and the judge.

    Args:
      over: as from `over_reference`.
    """

    def each(annotator: str, name: str) -> str:
        wins = [float(np.mean(one)) for _, one in sorted(over[annotator, name].items())]
        interval = f" ({np.mean(wins):.2f} ± {half_width(wins):.2f})" if len(wins) > 1 else ""
        return ", ".join(f"{one:.2f}" for one in wins) + interval

    judged = [name for name in LABELS if ("judge", name) in over]
    own = {name: "reward" if name in REWARDED else "preference" for name in judged}
    cells = [[LABELS[name], each(own[name], name), each("judge", name)] for name in judged]
    return table(["wins over the reference, seed by seed", "its own annotator", "judge"], cells)


def reader(
    verdicts: Sequence[Row], others: Sequence[Row], said: Mapping[str, Mapping[int, Sequence[str]]]
) -> str:
    """The table of a judge that can read; empty: it was not asked.

    Args:
      verdicts: on policies beside the reference.
      others: of the study's own annotators.
      said: policy -> seed -> its responses.
    """
    if not verdicts:
        return ""
    cells = []
    for name in [x for x in said if any(row["policy"] == x for row in verdicts)]:
        own = [row for row in verdicts if row["policy"] == name]
        preference = np.array([row["preference"] for row in own], float)  # [seeds, prompts]
        wins = np.where(np.isfinite(preference), won(preference), np.nan)
        lengths = [
            np.array([[len(x) for x in said[policy][row["seed"]]] for row in own])
            for policy in (name, "reference")
        ]
        heard = np.isfinite(wins)
        equal = length_controlled(wins[heard], *(x[heard] for x in lengths), resamples=0).rate
        agreed = []
        for annotator in ANNOTATORS:
            theirs = {
                row["seed"]: won(row["preference"])
                for row in others
                if (row["annotator"], row["one"], row["other"]) == (annotator, name, "reference")
            }
            same = np.stack([theirs[row["seed"]] for row in own]) == wins
            agreed.append(f"{np.mean(same[heard]):.2f}")
        order = np.mean([row["same_in_both_orders"] for row in own])
        interval = with_interval([one[~np.isnan(one)].mean() for one in wins.T[heard.any(0)]])
        cells.append([LABELS[name], interval, f"{equal:.2f}", f"{order:.2f}", *agreed])
    header = [
        f"{verdicts[0]['judge']}, seeds: {len({row['seed'] for row in verdicts})}",
        *("wins over the reference", "at equal length", "same in both orders"),
        *(f"agrees with the {label}" for label in ANNOTATORS.values()),
    ]
    return "\n" + table(header, cells)


def agreement(verdicts: Sequence[Row], said: Mapping[str, Mapping[int, Sequence[str]]]) -> str:
    """How the annotators' verdicts on the policies and the reference are related.

    Args:
      verdicts: of all annotators.
      said: policy -> seed -> its responses.
    """
    of: dict[str, list[float]] = {}
    longer: dict[str, list[int]] = {}
    for row in verdicts:
        if row["other"] == "reference":
            both = (said[name][row["seed"]] for name in (row["one"], "reference"))
            of.setdefault(row["annotator"], []).extend(row["preference"])
            longer.setdefault(row["annotator"], []).extend(
                len(x) - len(y) for x, y in zip(*both, strict=True)
            )

    def related(one: Sequence[float], other: Sequence[float]) -> str:
        if np.ptp(one) == 0 or np.ptp(other) == 0:
            return "–"
        return f"{spearmanr(one, other)[0]:+.2f}"

    cells = [
        [
            label,
            f"{np.mean(np.abs(np.asarray(of[name]) - 0.5)):.3f}",
            related(of[name], longer[name]),
            related(of[name], of["judge"]),
            f"{np.mean(won(of[name]) == won(of['judge'])):.2f}",
        ]
        for name, label in ANNOTATORS.items()
    ]
    header = [
        f"of {len(of['judge'])} comparisons with the reference",
        *("mean distance from 1/2", "correlation with the difference of lengths"),
        *("correlation with the judge", "agreement with the judge"),
    ]
    return table(header, cells) + "\nCorrelations of ranks (Spearman); lengths in characters."


def temperature(preference: np.ndarray) -> float:
    """The factor on log-odds under which the verdicts of pairs are likeliest (a grid of factors).

    Args:
      preference: probability of the preferred response of each pair.
    """
    clipped = np.clip(preference, 1e-4, 1 - 1e-4)
    odds = np.log(clipped) - np.log1p(-clipped)
    factors = np.geomspace(0.02, 5, 200)
    return float(factors[np.argmin([np.logaddexp(0, -f * odds).mean() for f in factors])])


def calibrated_error(preference: np.ndarray) -> float:
    """Calibration error of pairs whose log-odds have a factor that the other half of them chose."""
    clipped = np.clip(preference, 1e-4, 1 - 1e-4)
    odds = np.log(clipped) - np.log1p(-clipped)
    halves = np.arange(len(odds)) % 2
    factors = np.where(halves, *(temperature(preference[halves == x]) for x in (0, 1)))
    return reliability(1 / (1 + np.exp(-factors * odds))).error


def annotators(rows: Path) -> str:
    """Accuracy and calibration of the annotators and the judge on held-out pairs."""
    cells = []
    found = {name: read(rows / f"annotator_{name}.jsonl") for name in ANNOTATORS}
    for name, label in ANNOTATORS.items():
        own = {row["source"]: row for row in found[name]}
        if own:
            interval = [
                1.96 * (row["accuracy"] * (1 - row["accuracy"]) / row["pairs"]) ** 0.5
                for row in (own[x] for x in SOURCES)
            ]
            accuracies = [
                f"{own[x]['accuracy']:.2f} ± {half:.2f}"
                for x, half in zip(SOURCES, interval, strict=True)
            ]
            errors = [f"{own[x]['error']:.2f}" for x in SOURCES]
            people = np.asarray(own["people"]["preference"])
            scaled = f"{calibrated_error(people):.2f} ({temperature(people):.2f})"
            cells.append([label, *accuracies, *errors, scaled])
    own = {row["source"]: row for row in next(x for x in found.values() if x)}
    longer = [f"{own[x]['longer']:.2f}" for x in SOURCES]
    cells.append(["the longer response", *longer, *["–"] * 4])
    header = [
        "",
        *(f"{SOURCES[x]} ({own[x]['pairs']} pairs): accuracy" for x in SOURCES),
        *(f"{label}: ECE" for label in SOURCES.values()),
        "people: ECE with a factor on the log-odds (factor)",
    ]
    return table(header, cells) + "\n![reliability of the annotators](small_reliability.png)"


def sweep(rows: Path) -> str:
    """Each method's strengths: wins in the eyes of its own annotator, divergence, length."""
    cells = []
    for name, own in of_methods(rows, "sweep").items():
        annotator = "reward" if name in REWARDED else "preference"
        ends = [row["curve"][-1] for row in own]
        best = int(np.argmax([end[f"wins/{annotator}"] for end in ends]))
        for at, (row, end) in enumerate(zip(own, ends, strict=True)):
            mark = " (chosen)" if at == best else ""
            wins = f"{end[f'wins/{annotator}']:.3f}"
            numbers = [wins, f"{end['kl']:.2f}", f"{end['length']:.1f}"]
            strength = f"{row['parameter']} = {row['strength']:g}"
            cells.append([f"{LABELS[name]}{mark}", strength, *numbers])
    header = ["method", "strength", "own annotator: mean preference over the reference"]
    header += ["KL, nats", "tokens"]
    return table(header, cells)


# ------------------------------------------------------------------------------ figures


def draw(rows: Path, path: Path) -> None:
    """Wins over divergence before both kinds of judges; reward, divergence, length over updates."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    wins = over_reference(read(rows / "judge.jsonl"))
    figure, axes = plt.subplots(1, 5, figsize=(18, 3.9), layout="constrained")
    for name, runs in of_methods(rows, "final").items():
        if ("judge", name) not in wins:  # not yet judged
            continue
        responses = read(rows / f"responses_{name}.jsonl")
        divergence = np.mean([row["log_ratio"] for row in responses])
        own = "reward" if name in REWARDED else "preference"
        color = f"C{list(LABELS).index(name)}"
        for axis, annotator in zip(axes, (own, "judge"), strict=False):
            values = np.mean(list(wins[annotator, name].values()), axis=0)
            interval = half_width(list(values))
            style = {"fmt": "o", "color": color, "capsize": 3, "label": LABELS[name]}
            axis.errorbar(divergence, values.mean(), yerr=interval, **style)
        for axis, field in zip(axes[2:], ("reward", "kl", "length"), strict=True):
            points = [[point[field] for point in run["curve"]] for run in runs]
            steps = [point["update"] for point in runs[0]["curve"]]
            axis.plot(steps, np.mean(points, axis=0), marker=".", color=color)
    wins_label = "wins over the reference, test prompts"
    axes[0].set(xlabel="KL, nats", ylabel=wins_label, title="Its own annotator")
    axes[1].set(xlabel="KL, nats", ylabel=wins_label, title="The held-out judge")
    axes[2].set(xlabel="update", ylabel="reward", title="Reward model, validation")
    axes[3].set(xlabel="update", ylabel="KL, nats", title="Divergence from the reference")
    axes[4].set(xlabel="update", ylabel="tokens", title="Length")
    for axis in axes:
        axis.grid(alpha=0.3)
    low, high = zip(*(axis.get_ylim() for axis in axes[:2]), strict=True)
    for axis in axes[:2]:
        axis.set_ylim(min(low), max(high))
        axis.axhline(0.5, color="grey", linewidth=0.8)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_reliability(rows: Path, path: Path) -> None:
    """Accuracy over confidence of the annotators and the judge on held-out pairs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10, 3.5), layout="constrained", sharey=True)
    for axis, (name, label) in zip(axes, ANNOTATORS.items(), strict=True):
        axis.plot([0.5, 1], [0.5, 1], color="grey", linewidth=0.8)
        for row in read(rows / f"annotator_{name}.jsonl"):
            bins = reliability(np.asarray(row["preference"]), bins=5)
            axis.scatter(
                bins.confidence,
                bins.accuracy,
                s=2 * bins.count,
                alpha=0.6,
                label=f"{SOURCES[row['source']]}, ECE {row['error']:.2f}",
            )
        axis.set(xlabel="confidence", title=label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower left")
    axes[0].set(ylabel="accuracy")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    HERE = Path(__file__).parent
    print(write(HERE / "rows", HERE))
