"""Runs of the study on a real chat model: sweeps, final runs, responses, and their judging."""

import functools
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.ipo_md import small_data, small_tables
from experiments.ipo_md.small_annotators import load_annotator
from experiments.ipo_md.small_options import (
    ANNOTATORS,
    METHODS,
    MOST_STRENGTHS,
    REWARDED,
    STRENGTHS,
    Options,
    is_done,
    on_accelerator,
    path_of,
    prompts_of,
    read,
    responses_of,
    write_rows,
)
from experiments.ipo_md.together import Runs, annotations, order
from jaxalign.backends.local import end_tokens
from jaxalign.data import load_tokenizer
from jaxalign.evaluation.reward_models import PreferenceModel, RewardModel
from jaxalign.files import write_json_lines
from jaxalign.models import load_pretrained
from jaxalign.models.differentiation import forward_mode
from jaxalign.online import PromptBatch
from jaxalign.online.sampler import Sampled


class Bench:
    """Model, prompts and annotators of a cell."""

    def __init__(self, options: Options, name: str):
        method = replace(METHODS[name], rate=METHODS[name].rate * options.rate)
        dtype = jnp.bfloat16 if on_accelerator() else jnp.float32
        model = load_pretrained(options.model, dtype=dtype)
        tokenizer = load_tokenizer(options.model)
        self.prompts = prompts_of(options)
        self.rows = {
            part: small_data.tokenized(own, tokenizer, longest=options.longest)
            for part, own in self.prompts.items()
        }
        self.runs = Runs(
            method,
            model.params,
            model.config,
            tokenizer,
            ends=end_tokens(options.model, model.config.vocab_size),
            prompts=options.prompts_of(name),
            longest=max(int(rows.length.max()) for rows in self.rows.values()),
            tokens=options.tokens,
            dtype=dtype,
            at_once=on_accelerator(),
        )
        self.own = "reward" if name in REWARDED else "preference"
        self._options = options
        self.annotator = functools.cache(self._annotator)
        """Name -> the annotator; waits for one that another process still trains."""

    def _annotator(self, name: str) -> Any:
        while not is_done(self._options, f"annotator:{name}"):
            if self._options.processes == 1:
                sys.exit(f"annotator:{name}: not trained; run --step annotators first")
            time.sleep(0.5)
        return load_annotator(self._options, name)

    def texts(self, part: str, batch: PromptBatch) -> list[str]:
        """The prompts of a batch."""
        return [self.prompts[part][int(at)]["prompt"] for at in batch.record_index]

    def batches(self, part: str, number: int) -> Iterator[PromptBatch]:
        """The first prompts of a part, batch by batch; the last ones fill the last batch again."""
        number, size = min(number, len(self.rows[part])), self.runs.prompts
        for first in range(0, number, size):
            yield self.runs.batch(self.rows[part], np.arange(first, first + size) % number)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What the policies of all runs answer to some prompts.

    Attributes:
      texts: one answer to each prompt, [runs][prompts].
      kl: log-ratios of all samples, [runs, prompts, samples].
      length: tokens of all samples, likewise.
      finished: whether they ended by themselves, likewise.
    """

    texts: list[list[str]]
    kl: np.ndarray
    length: np.ndarray
    finished: np.ndarray


def answers(
    bench: Bench, state: Any, part: str, number: int, seeds: Sequence[int], draw: int
) -> Answers:
    """Responses of all runs' policies to the first prompts of a part, and their divergences."""
    samples: list[list[Sampled]] = []
    ratios: list[np.ndarray] = []
    for at, batch in enumerate(bench.batches(part, number)):
        batches = [batch] * len(seeds)
        samples.append(bench.runs.of_policy(state, batches, seeds, draw + at))
        ratios.append(bench.runs.divergences(batches, samples[-1]))
    every = range(len(seeds))
    number = min(number, len(bench.rows[part]))

    def joined(name: str) -> np.ndarray:
        own = [np.concatenate([getattr(x[run], name) for x in samples]) for run in every]
        return np.stack(own)[:, :number]

    return Answers(
        texts=[[row[0] for one in samples for row in one[run].texts][:number] for run in every],
        kl=np.concatenate(ratios, axis=1)[:, :number],
        length=joined("length"),
        finished=joined("finished"),
    )


def of_reference(bench: Bench, number: int, seeds: Sequence[int]) -> Answers:
    """The reference's responses to validation prompts, for each run; those of a seed are equal."""
    own = list(dict.fromkeys(seeds))
    found = answers(bench, bench.runs.begin(own), "validation", number, own, 1_000)
    places = [own.index(seed) for seed in seeds]
    return Answers(
        texts=[found.texts[at] for at in places],
        kl=found.kl[places],
        length=found.length[places],
        finished=found.finished[places],
    )


def measured(
    bench: Bench, ours: Answers, theirs: Answers, *, rewards: bool
) -> list[dict[str, float]]:
    """Numbers of each run's policy on validation prompts, beside the reference's own responses."""
    runs = len(ours.texts)
    prompts = [row["prompt"] for row in bench.prompts["validation"][: len(ours.texts[0])]] * runs
    flat, other = ([text for own in x.texts for text in own] for x in (ours, theirs))

    def by_run(x: Any) -> np.ndarray:
        return np.nanmean(np.asarray(x).reshape(runs, -1), axis=1)

    numbers = {name: by_run(getattr(ours, name)) for name in ("kl", "length", "finished")}
    with forward_mode():
        if ours is theirs:
            wins = np.full(len(flat), 0.5)
        else:
            wins = bench.annotator(bench.own).preferences(prompts, flat, other).preference
        numbers[f"wins/{bench.own}"] = by_run(wins)
        if rewards:
            numbers["reward"] = by_run(bench.annotator("reward").rewards(prompts, flat))
    return [{name: float(x[run]) for name, x in numbers.items()} for run in range(runs)]


def trained(
    bench: Bench,
    strengths: Sequence[float],
    seeds: Sequence[int],
    updates: int,
    validation: int,
    *,
    evaluations: int,
    rewards: bool = False,
) -> tuple[Any, list[dict[str, Any]]]:
    """Train runs together.

    Args:
      bench: of the method.
      strengths: of each run.
      seeds: of each run.
      updates: of all.
      validation: number of prompts of an evaluation.
      evaluations: number of them after the first one, at equal distances.
      rewards: whether an evaluation has rewards, too.

    Returns:
      The last state, and a row of numbers for each run.
    """
    runs, method = bench.runs, bench.runs.method
    state = runs.begin(seeds)
    if on_accelerator():  # another process may still train the annotator
        first = [next(bench.batches("validation", runs.prompts))] * len(seeds)
        runs.compile_update(state, first, strengths)
    theirs = of_reference(bench, validation, seeds)
    curves = [[{"update": 0, **one}] for one in measured(bench, theirs, theirs, rewards=rewards)]
    history: list[list[dict[str, float]]] = [[] for _ in seeds]
    seconds = []
    orders = [order(seed, len(bench.rows["train"]), runs.prompts, updates) for seed in seeds]
    at = {round(updates * (x + 1) / evaluations / 2) * 2 for x in range(evaluations)} | {updates}
    annotator = bench.annotator(bench.own)
    for update in range(updates):
        begun = time.perf_counter()
        batches = [runs.batch(bench.rows["train"], own[update]) for own in orders]
        sampled = runs.draw(state, batches, seeds, update)
        texts = [bench.texts("train", batch) for batch in batches]
        with forward_mode():
            verdicts = annotations(annotator, runs.plain, texts, sampled)
        rollouts = runs.rollouts(batches, sampled, verdicts)
        # an extragradient's two steps share a rate
        past = update // 2 * 2 if runs.plain.extragradient else update
        rate = method.rate * (1 - past / updates)
        state, metrics = runs.update(state, rollouts, strengths, rate)
        for own, one, drawn in zip(history, metrics, sampled, strict=True):
            own.append(one | {"length": float(drawn.length.mean())})
        seconds.append(time.perf_counter() - begun)
        if update + 1 in at:
            ours = answers(bench, state, "validation", validation, seeds, 2_000 + 50 * update)
            numbers = measured(bench, ours, theirs, rewards=rewards)
            for own, one in zip(curves, numbers, strict=True):
                own.append({"update": update + 1, **one})
            last = [own[-1] for own in curves]
            wins, kl = ([f"{one[x]:.2f}" for one in last] for x in (f"wins/{bench.own}", "kl"))
            print(f"update {update + 1}: wins {wins}, KL {kl}, {seconds[-1]:.2f} s", flush=True)
    kept = ("loss", "log_ratio", "entropy", "length", "grad_norm", "finite")
    rows = [
        {
            "algorithm": method.name,
            "parameter": method.parameter,
            "strength": strength,
            "seed": seed,
            "updates": updates,
            "rate": method.rate,
            "seconds_per_update": float(np.median(seconds[1:] or seconds)),
            "first_update_seconds": seconds[0],
            "device": jax.devices()[0].device_kind,
            "curve": curve,
            "train": {x: [round(one[x], 5) for one in own] for x in kept if x in own[0]},
        }
        for strength, seed, curve, own in zip(strengths, seeds, curves, history, strict=True)
    ]
    return state, rows


def sweep(options: Options, name: str) -> list[dict[str, Any]]:
    """Short runs of a method, one for each strength; further ones while the best is an end."""
    bench, rows = Bench(options, name), swept(options, name)
    while strengths := untried(rows, name):
        seeds, updates = [0] * len(strengths), options.sweep_updates
        rows += trained(bench, strengths, seeds, updates, options.validation, evaluations=1)[1]
        write_rows(options, f"sweep:{name}", rows)
    return sorted(rows, key=lambda row: row["strength"])


def swept(options: Options, name: str) -> list[dict[str, Any]]:
    """The rows of a method's sweep that were made with these options."""
    cell = f"sweep:{name}"
    return read(path_of(options, cell)) if is_done(options, cell) else []


def untried(rows: Sequence[dict[str, Any]], name: str) -> list[float]:
    """The strengths that a method's sweep still has to try."""
    if not rows:
        return list(STRENGTHS[name])
    tried = sorted(row["strength"] for row in rows)
    best = strongest(rows, name)
    if len(tried) >= MOST_STRENGTHS or best not in (tried[0], tried[-1]):
        return []
    return [float(f"{best / 10 if best == tried[0] else best * 10:.6g}")]


def strongest(rows: Sequence[dict[str, Any]], name: str) -> float:
    """The strength whose run wins most over the reference, in its own annotator's eyes."""
    own = "reward" if name in REWARDED else "preference"
    return max(rows, key=lambda row: row["curve"][-1][f"wins/{own}"])["strength"]


def chosen(options: Options, name: str) -> float:
    """The strength of a method's final runs."""
    rows = read(path_of(options, f"sweep:{name}"))
    if not rows:
        sys.exit(f"{name}: no sweep; run --step sweep first")
    return strongest(rows, name)


def final(options: Options, name: str) -> list[dict[str, Any]]:
    """Runs of a method with its chosen strength, for the seeds that have none, and what they say.

    Further seeds of runs that are kept have as many updates as those.
    """
    strength, kept = chosen(options, name), finished(options, name)
    seeds = [seed for seed in options.seeds if seed not in {row["seed"] for row in kept}]
    if not seeds:
        return kept
    bench = Bench(options, name)
    state, rows = trained(
        bench,
        [strength] * len(seeds),
        seeds,
        kept[0]["updates"] if kept else options.updates,
        options.validation // 2,
        evaluations=options.evaluations,
        rewards=True,
    )
    if not kept:
        forget(options, name)
    write_responses(options, bench, state, name, seeds, kept)
    return kept + rows


def finished(options: Options, name: str) -> list[dict[str, Any]]:
    """The rows of a method's final runs that were made with these options, all at its strength.

    Args:
      options: of the study.
      name: of the method, or "reference".
    """
    cell = "reference:" if name == "reference" else f"final:{name}"
    rows = read(path_of(options, cell)) if is_done(options, cell) else []
    tried = [] if name == "reference" else swept(options, name)
    if tried and any(row["strength"] != strongest(tried, name) for row in rows):
        return []
    return rows


def forget(options: Options, name: str) -> None:
    """Remove the verdicts of an annotator, or on a policy, that was retrained."""
    for path in (path_of(options, "judge:"), Path(options.rows) / small_tables.READ):
        rows = read(path)
        of = "annotator", "one", "other", "policy"
        kept = [row for row in rows if name not in map(row.get, of)]
        if len(kept) < len(rows):
            write_json_lines(path, kept)


def respond(options: Options) -> list[dict[str, Any]]:
    """What the reference says to the test prompts, for the seeds that have no responses."""
    kept = finished(options, "reference")
    seeds = [seed for seed in options.seeds if seed not in {row["seed"] for row in kept}]
    if not seeds:
        return kept
    bench = Bench(options, "online_dpo")
    write_responses(options, bench, bench.runs.begin(seeds), "reference", seeds, kept)
    return kept + [{"algorithm": "reference", "seed": seed} for seed in seeds]


def write_responses(
    options: Options,
    bench: Bench,
    state: Any,
    name: str,
    seeds: Sequence[int],
    kept: Sequence[dict[str, Any]],
) -> None:
    """One response to each test prompt of each run, after those of the runs that are kept."""
    own = answers(bench, state, "test", options.test, seeds, 900_000)
    rows = [
        {
            "policy": name,
            "seed": seed,
            "prompt": at,
            "response": own.texts[run][at],
            "tokens": int(own.length[run, at, 0]),
            "finished": bool(own.finished[run, at, 0]),
            "log_ratio": round(float(own.kl[run, at, 0]), 4),
        }
        for run, seed in enumerate(seeds)
        for at in range(len(own.texts[run]))
    ]
    path, old = responses_of(options, name), {row["seed"] for row in kept}
    write_json_lines(path, [row for row in read(path) if row["seed"] in old] + rows)


# ------------------------------------------------------------------------------ judging


Comparison = tuple[str, str, str, int]
"""Annotator, one policy, the other, seed."""


def unjudged(options: Options) -> list[Comparison]:
    """Comparisons without a row: of all policies by the judge, with the reference by the others."""
    names = (*options.methods, "reference")
    said = {name: {row["seed"] for row in read(responses_of(options, name))} for name in names}
    rows = read(path_of(options, "judge:")) if is_done(options, "judge:") else []
    known = {(row["annotator"], row["one"], row["other"], row["seed"]) for row in rows}
    wanted = [
        (annotator, one, other, seed)
        for annotator in ANNOTATORS
        for at, one in enumerate(names)
        for other in names[at + 1 :]
        if annotator == "judge" or other == "reference"
        for seed in options.seeds
        if seed in said[one] & said[other]
    ]
    exchanged = {(annotator, other, one, seed) for annotator, one, other, seed in known}
    return [x for x in wanted if x not in known | exchanged]


def judged(options: Options) -> list[dict[str, Any]]:
    """All policies against all, seed by seed, before the judge; and the annotators' own view.

    Every comparison is written as soon as it is made.
    """
    prompts = [row["prompt"] for row in read(Path(options.rows) / "prompts.jsonl")]
    asked = unjudged(options)
    texts = {
        name: small_tables.by_seed(read(responses_of(options, name)), "response")
        for name in {x for _, *both, _ in asked for x in both}
    }
    rows = read(path_of(options, "judge:")) if is_done(options, "judge:") else []
    for annotator, own in itertools.groupby(asked, key=lambda one: one[0]):
        model: RewardModel | PreferenceModel = load_annotator(options, annotator)
        for _, one, other, seed in own:
            with forward_mode():
                verdicts = model.preferences(prompts, texts[one][seed], texts[other][seed])
            preference = np.round(np.asarray(verdicts.preference), 4).tolist()
            names = {"annotator": annotator, "one": one, "other": other, "seed": seed}
            rows.append(names | {"preference": preference})
            write_rows(options, "judge:", rows)
    return rows
