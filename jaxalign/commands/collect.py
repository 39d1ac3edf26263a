"""`jaxalign collect`: preference data by reward models and by language models."""

import argparse
import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.backends import BackendOptions, Cached, Decoding, make_backend
from jaxalign.backends.cached import AnswerFile
from jaxalign.collection import (
    WORLDS,
    Memory,
    PairWriter,
    Society,
    best_and_worst,
    comparison_data,
    raft_selection,
    ranked_pairs,
    read_principles,
    read_rules,
    rejection_sampling,
    revised,
    sampled_candidates,
    self_aligned,
    society_data,
)
from jaxalign.collection.constitutional import read_examples, sft_rows
from jaxalign.collection.self_alignment import aligned_row
from jaxalign.collection.validity import fault
from jaxalign.collection.writing import write_row
from jaxalign.data import preference_records, prompt_records
from jaxalign.data.records import transcript
from jaxalign.errors import UserError
from jaxalign.evaluation.annotators import AnnotatorOptions, make_annotator

WAYS = ("best-of-n", "constitutional", "self-align", "society")


def main(arguments: Sequence[str]) -> int:
    """Collect, or go on: what was asked before is found in the folder."""
    given = _flags().parse_args(arguments)
    sizes = "samples", "max_tokens", "batch_size", "workers", "rounds", "revisions", "each"
    for name in sizes:
        if getattr(given, name, 1) < 1:
            raise UserError(f"{name}: {getattr(given, name)} is not positive")
    records = list(itertools.islice(prompt_records(given.prompts), given.most))
    given.output.mkdir(parents=True, exist_ok=True)
    answers = AnswerFile(given.output / "answers.jsonl")

    def backend(name: str) -> Cached:
        options = BackendOptions(
            batch_size=given.batch_size,
            workers=given.workers,
            requests_per_minute=given.requests_per_minute,
            completions=given.completions,
            prompt_format=given.prompt_format,
        )
        return Cached(make_backend(name, options), answers)

    model = backend(given.model)
    decoding = Decoding(
        max_tokens=given.max_tokens,
        temperature=given.temperature,
        top_p=given.top_p,
        stop=tuple(given.stop),
        seed=given.seed,
    )
    collect: Any = {
        "best-of-n": _best_of_n,
        "constitutional": _constitutional,
        "self-align": _self_align,
        "society": _society,
    }[given.way]
    with PairWriter(given.output / "pairs.jsonl", most_similar=given.most_similar) as writer:
        more = collect(given, model, backend, answers, records, decoding, writer)
    found = writer.statistics.summary() | more
    found |= {"model": model.identity, "decoding": vars(decoding)}
    text = json.dumps(found, indent=1, ensure_ascii=False)
    (given.output / "statistics.json").write_text(text + "\n", encoding="utf-8")
    print(f"{writer.path}: {found['pairs']:,} pairs; asked anew: {model.asked:,}")
    for name in (name for name in found if name not in ("model", "decoding")):
        print(f"  {name}: {found[name]}")
    return 0


def _best_of_n(given, model, backend, answers, records, decoding, writer) -> dict[str, Any]:
    del backend
    if given.samples < 2:
        raise UserError("samples: a best and a worst need two or more")
    if given.temperature == 0:
        raise UserError("temperature: at 0 all samples are the same; set it above")
    annotator = make_annotator(
        given.annotator, AnnotatorOptions(answers_file=given.output / "verdicts.jsonl")
    )
    rng = np.random.default_rng(given.seed)
    prompts = [record.prompt for record in records]
    kept: list[Any] = []
    equal = 0
    for one in sampled_candidates(
        model,
        prompts,
        annotator,
        decoding,
        samples=given.samples,
        batch_size=given.batch_size,
        kept=(answers, given.annotator),
    ):
        record = records[one.number]
        if given.select == "raft":
            kept.append(one)
            continue
        if given.select == "rrhf":
            pairs = ranked_pairs(one.rewards)
        elif given.select == "rso":
            chosen = rejection_sampling(one.rewards, beta=given.beta, number=given.accept, rng=rng)
            two = [chosen[at : at + 2] for at in range(0, len(chosen) - 1, 2)]
            sides = [sorted(some, key=lambda at: -one.rewards[at]) for some in two]
            pairs = [(i, j) for i, j in sides if one.rewards[i] != one.rewards[j]]
        else:
            pairs = [pair] if (pair := best_and_worst(one.rewards)) else []
        equal += not pairs
        for better, worse in pairs:
            writer.write(
                one.prompt,
                one.responses[better],
                one.responses[worse],
                {
                    "way": given.select,
                    "model": model.identity,
                    "annotator": given.annotator,
                    "rewards": [float(one.rewards[better]), float(one.rewards[worse])],
                    "candidates": len(one.responses),
                    "from": f"{record.source}:{record.line}",
                },
            )
    more: dict[str, Any] = {"prompts": len(records), "prompts_without_a_pair": equal}
    if kept:
        written, faults = _raft(given, kept)
        more |= {"sft": written, "faults": faults, "prompts_without_a_pair": len(records)}
    return more


def _raft(given: argparse.Namespace, kept: Sequence[Any]) -> tuple[int, dict[str, int]]:
    """Write the responses to imitate; the number of them, and of those that cannot be used."""
    faults: Counter[str] = Counter()
    most = max(len(one.responses) for one in kept)
    rewards = np.full((len(kept), most), -np.inf)
    for at, one in enumerate(kept):
        rewards[at, : len(one.responses)] = one.rewards
    chosen = raft_selection(rewards, keep=given.keep, ranking=given.ranking)
    chosen = [(at, sample) for at, sample in chosen if np.isfinite(rewards[at, sample])]
    with (given.output / "sft.jsonl").open("w", encoding="utf-8") as file:
        for at, sample in chosen:
            row = {"prompt": kept[at].prompt, "response": kept[at].responses[sample]}
            if wrong := fault(row["response"], transcript(row["prompt"])):
                faults[wrong] += 1
                continue
            write_row(file, row | {"reward": float(rewards[at, sample])})
    return len(chosen) - faults.total(), dict(faults)


def _constitutional(given, model, backend, answers, records, decoding, writer) -> dict[str, Any]:
    del backend, answers
    principles = read_principles(given.principles)
    traces = responses = steps = 0
    faults: Counter[str] = Counter()
    with ExitStack() as stack:
        files = {
            name: stack.enter_context((given.output / f"{name}.jsonl").open("w", encoding="utf-8"))
            for name in ("traces", "sft")
        }
        for trace, record in zip(
            revised(
                model,
                [transcript(record.prompt) for record in records],
                principles,
                decoding,
                revisions=given.revisions,
                examples=read_examples(given.examples),
                seed=given.seed,
                batch_size=given.batch_size,
            ),
            records,
            strict=True,
        ):
            traces += 1
            write_row(files["traces"], {**vars(trace), "final": trace.last})
            for row in sft_rows(trace):
                responses += 1
                write_row(files["sft"], row)
            steps += len(trace.steps)
            faults.update(step["fault"] for step in trace.steps if step["fault"])
            if not trace.usable:
                writer.statistics.left_out["no usable revision"] += 1
                continue
            writer.write(
                record.prompt,
                trace.last,
                trace.first,
                {
                    "way": "constitutional",
                    "model": model.identity,
                    "principles": [step["principle"] for step in trace.usable],
                    "from": f"{record.source}:{record.line}",
                },
            )
    return {"traces": traces, "steps": steps, "sft": responses, "faults": dict(faults)}


def _self_align(given, model, backend, answers, records, decoding, writer) -> dict[str, Any]:
    del backend, answers
    rules, shown = read_rules(given.rules)
    prompts = [transcript(record.prompt) for record in records]
    faults: Counter[str] = Counter()
    named: Counter[str] = Counter()
    with ExitStack() as stack:
        files = {
            name: stack.enter_context((given.output / f"{name}.jsonl").open("w", encoding="utf-8"))
            for name in ("traces", "sft")
        }
        found = self_aligned(
            model, prompts, decoding, rules=rules, shown=shown, batch_size=given.batch_size
        )
        for one, record in zip(found, records, strict=True):
            write_row(files["traces"], vars(one))
            if one.fault:
                faults[one.fault] += 1
                continue
            named.update(one.rules)
            write_row(files["sft"], aligned_row(one))
            provenance = {
                "way": "self-align",
                "model": model.identity,
                "rules": list(one.rules),
                "from": f"{record.source}:{record.line}",
            }
            writer.write(record.prompt, one.response, one.plain, provenance)
    counts = {"prompts": len(records), "sft": len(records) - faults.total()}
    return counts | {"faults": dict(faults), "rules": dict(named)}


def _society(given, model, backend, answers, records, decoding, writer) -> dict[str, Any]:
    del answers
    observer = model if given.observer is None else backend(given.observer)
    society = Society(
        backend=model,
        observer=observer,
        side=given.side,
        decoding=decoding,
        neighbours=given.neighbours,
        dropout=given.dropout,
        ratings=given.ratings,
        seed=given.seed,
    )
    if given.memories is not None:
        pairs = [(transcript(one.prompt), one) for one in preference_records(given.memories)]
        known = [
            Memory(question=question, good=transcript(one.chosen), bad=transcript(one.rejected))
            for question, one in pairs
        ]
        society.settle(known, given.world, each=given.each)
    counts = {"encounters": 0, "feedback": 0, "feedback_rated": 0, "answers_rated": 0}
    counts |= dict.fromkeys(("imitation", "self_critic", "realignment", "comparisons"), 0)
    rated: list[Any] = []
    questions = [transcript(record.prompt) for record in records]
    with ExitStack() as stack:
        files = {
            name: stack.enter_context((given.output / f"{name}.jsonl").open("w", encoding="utf-8"))
            for name in ("encounters", "imitation", "self_critic", "realignment", "comparisons")
        }
        for one in society.rounds(questions, given.rounds):
            counts["encounters"] += 1
            counts["feedback"] += len(one.feedback)
            counts["feedback_rated"] += sum(math.isfinite(rating) for _, rating, _ in one.feedback)
            ratings = one.draft_rating, one.revision_rating
            counts["answers_rated"] += sum(map(math.isfinite, ratings))
            fields = {**vars(one), "feedback": [list(map(_plain, some)) for some in one.feedback]}
            write_row(files["encounters"], fields)
            data = society_data(one)
            rated += data["imitation"]
            for name in ("imitation", "self_critic", "realignment"):
                for row in data[name]:
                    counts[name] += 1
                    write_row(files[name], row)
            for row in data["pairs"]:
                provenance = {
                    "way": "society",
                    "model": model.identity,
                    "observer": observer.identity,
                    "round": one.round,
                    "agent": one.agent,
                    "ratings": row["ratings"],
                }
                writer.write(row["prompt"], row["chosen"], row["rejected"], provenance)
        for row in comparison_data(rated):
            counts["comparisons"] += 1
            write_row(files["comparisons"], row)
    return counts


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        prog="jaxalign collect",
        description="Preference pairs {prompt, chosen, rejected, provenance} in "
        "FOLDER/pairs.jsonl, with what else a way of collecting gives beside it. Every answer is "
        "kept; the same command goes on where a killed one ended and asks nothing twice.",
    )
    ways = flags.add_subparsers(dest="way", required=True, metavar=" | ".join(WAYS))
    for name, words in (
        ("best-of-n", "the best and the worst of several samples, by any annotator"),
        ("constitutional", "a response and its revision by principles"),
        ("self-align", "answers after thoughts on rules, to be taught without them"),
        ("society", "agents on a grid that answer, rate and revise"),
    ):
        _common(ways.add_parser(name, help=words, description=words), name)
    return flags


def _common(flags: argparse.ArgumentParser, way: str) -> None:
    flags.add_argument("--model", required=True, help="folder, run folder or openai:URL#MODEL")
    flags.add_argument("--prompts", required=True, help="{prompt} rows, or any records")
    flags.add_argument("--output", type=Path, required=True, help="folder to write")
    if way == "best-of-n":
        flags.add_argument(
            "--annotator", required=True, help="as --judge of `jaxalign judge`: reward:FOLDER, ..."
        )
        flags.add_argument("--samples", type=int, default=8, help="n")
        flags.add_argument(
            "--select",
            choices=("best-worst", "rrhf", "rso", "raft"),
            default="best-worst",
            help="a pair of each prompt; all ranked pairs; pairs of accepted samples; sft.jsonl",
        )
        flags.add_argument("--keep", type=float, default=0.2, help="raft: share to imitate")
        flags.add_argument("--ranking", choices=("local", "top"), default="local", help="raft")
        flags.add_argument("--beta", type=float, default=0.5, help="rso: of the KL term")
        flags.add_argument("--accept", type=int, default=4, help="rso: samples of each prompt")
    elif way == "constitutional":
        flags.add_argument(
            "--principles", type=Path, required=True, help="JSON [{name, critique, revision}]"
        )
        flags.add_argument("--examples", type=Path, help="JSON list of worked transcripts")
        flags.add_argument("--revisions", type=int, default=4, help="of each response")
    elif way == "self-align":
        flags.add_argument(
            "--rules",
            type=Path,
            help='JSON {"rules": [{name, text}], "examples": [{request, thoughts, response}]} '
            "(default: twelve of this project's)",
        )
    else:
        flags.add_argument("--observer", help="who rates (default: the model)")
        flags.add_argument("--side", type=int, default=3, help="of the grid of agents")
        flags.add_argument("--rounds", type=int, default=2, help="questions of each agent")
        flags.add_argument("--neighbours", type=int, default=4, help="feedback for an answer")
        flags.add_argument(
            "--dropout", type=float, default=0.0, help="share of feedback from the whole grid"
        )
        flags.add_argument(
            "--ratings",
            choices=("written", "scored"),
            default="written",
            help="as agents write them, or by their log-probs of the ratings",
        )
        flags.add_argument(
            "--memories", help="preference pairs that agents remember (default: nothing)"
        )
        flags.add_argument("--world", choices=WORLDS, default="all_good", help="which side of them")
        flags.add_argument("--each", type=int, default=50, help="memories of an agent")
    flags.add_argument("--most", type=int, help="prompts to take, from the first on")
    flags.add_argument("--most-similar", type=float, default=0.95, help="sides of a pair")
    flags.add_argument("--max-tokens", type=int, default=128, help="of whatever is written")
    flags.add_argument("--temperature", type=float, default=1.0)
    flags.add_argument("--top-p", type=float, default=1.0)
    flags.add_argument("--stop", nargs="*", default=[], help="texts that end a response")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--prompt-format", default="{prompt}", help="local: around plain prompts")
    flags.add_argument("--batch-size", type=int, default=8, help="prompts at a time")
    flags.add_argument("--workers", type=int, default=8, help="openai: requests at a time")
    flags.add_argument("--requests-per-minute", type=float, help="openai: at most")
    flags.add_argument("--completions", action="store_true", help="openai: a base model")
