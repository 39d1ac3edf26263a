"""`jaxalign collect`: preference data by reward models and by language models."""

import argparse
import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from jaxalign.backends import BackendOptions, Cached, Decoding, make_backend
from jaxalign.backends.cached import AnswerFile
from jaxalign.collection import (
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
from jaxalign.commands.collect_flags import collect_flags
from jaxalign.data import preference_records, prompt_records
from jaxalign.data.records import transcript
from jaxalign.errors import UserError
from jaxalign.evaluation.annotators import AnnotatorOptions, make_annotator
from jaxalign.files import check_output, locked, open_text, write_text
from jaxalign.models.devices import enable_compilation_cache
from jaxalign.progress import track


def main(arguments: Sequence[str]) -> int:
    """Collect, or go on: what was asked before is found in the folder."""
    given = collect_flags().parse_args(arguments)
    check_output(given.output, "--output", folder=True)
    enable_compilation_cache()
    with locked(given.output, "--output", folder=True):
        return _collect(given)


def _collect(given: argparse.Namespace) -> int:
    prompts = prompt_records(given.prompts, bad_records=given.bad_records)
    records = list(itertools.islice(prompts, given.most))
    answers = AnswerFile(given.output / "answers.jsonl")

    def backend(name: str) -> Cached:
        options = BackendOptions(
            batch_size=given.batch_size,
            workers=given.workers,
            requests_per_minute=given.requests_per_minute,
            completions=given.completions,
            prompt_format=given.prompt_format,
            chat=given.chat,
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
    found |= {"responses_without_text": dict(model.failures)}
    found |= {"model": model.identity, "decoding": vars(decoding)}
    text = json.dumps(found, indent=1, ensure_ascii=False)
    write_text(given.output / "statistics.json", text + "\n")
    print(f"{writer.path}: {found['pairs']:,} pairs; new requests: {model.asked:,}")
    for name in (name for name in found if name not in ("model", "decoding")):
        print(f"  {name}: {_short(found[name])}")
    return 0


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(one)}" for name, one in value.items()) or "none"
    return f"{value:.3g}" if isinstance(value, float) else value


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
    equal = answered = without = rewarded = 0
    candidates = sampled_candidates(
        model,
        prompts,
        annotator,
        decoding,
        samples=given.samples,
        batch_size=given.batch_size,
        kept=(answers, given.annotator),
    )
    for one in track(candidates, "prompts", len(records)):
        record, answered = records[one.number], answered + 1
        without, rewarded = without + one.without_reward, rewarded + len(one.responses)
        if given.select == "raft":
            kept += [one] if one.responses else []
            continue
        if given.select == "rrhf":
            pairs = ranked_pairs(one.rewards)
        elif given.select == "rso":
            chosen = rejection_sampling(one.rewards, beta=given.beta, number=given.accept, rng=rng)
            two = [chosen[at : at + 2] for at in range(0, len(chosen) - 1, 2)]
            sides = [sorted(some, key=lambda at: -one.rewards[at]) for some in two]
            pairs = [(i, j) for i, j in sides if one.rewards[i] != one.rewards[j]]
        else:
            pair = best_and_worst(one.rewards) if len(one.rewards) else None
            pairs = [pair] if pair else []
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
    if without and not rewarded:
        raise UserError(
            f"annotator: {given.annotator} has no reward for any of {without:,} responses; look at "
            "what it returns"
        )
    equal += len(records) - answered
    more: dict[str, Any] = {"prompts": len(records), "prompts_without_a_pair": equal}
    more["prompts_without_a_response"] = len(records) - answered
    if without:
        more["responses_without_a_reward"] = without
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
    with open_text(given.output / "sft.jsonl", "w") as file:
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
            name: stack.enter_context(open_text(given.output / f"{name}.jsonl", "w"))
            for name in ("traces", "sft")
        }
        revisions = zip(
            revised(
                model,
                [transcript(record.prompt) for record in records],
                principles,
                decoding,
                revisions=given.revisions,
                examples=read_examples(given.examples),
                seed=given.seed,
                batch_size=given.batch_size,
                keep_cut=given.keep_cut,
            ),
            records,
            strict=True,
        )
        for trace, record in track(revisions, "prompts", len(records)):
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
            if trace.first_cut and not given.keep_cut:
                writer.statistics.left_out["rejected: cut at max_tokens"] += 1
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
            name: stack.enter_context(open_text(given.output / f"{name}.jsonl", "w"))
            for name in ("traces", "sft")
        }
        found = self_aligned(
            model, prompts, decoding, rules=rules, shown=shown, batch_size=given.batch_size
        )
        for one, record in track(zip(found, records, strict=True), "prompts", len(records)):
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
        pairs = [
            (transcript(one.prompt), one)
            for one in preference_records(given.memories, bad_records=given.bad_records)
        ]
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
            name: stack.enter_context(open_text(given.output / f"{name}.jsonl", "w"))
            for name in ("encounters", "imitation", "self_critic", "realignment", "comparisons")
        }
        encounters = society.rounds(questions, given.rounds)
        for one in track(encounters, "encounters", given.rounds * given.side**2):
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
