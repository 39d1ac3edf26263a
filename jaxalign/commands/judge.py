"""`jaxalign judge`: what policies wrote, side by side, by any judge; and judges beside people."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from jaxalign.commands.arguments import add_bad_records, add_chat, parser, within
from jaxalign.commands.judged_people import beside_people
from jaxalign.commands.judged_policies import read_lines, side_by_side
from jaxalign.commands.judged_words import plain
from jaxalign.commands.report import print_table
from jaxalign.config import AtLeastOne, Count, Positive, Range, Seed
from jaxalign.errors import UserError
from jaxalign.evaluation import Annotator, AnnotatorOptions, JudgeAnnotator, make_annotator
from jaxalign.evaluation.annotators import KINDS
from jaxalign.evaluation.outputs import match, read_labelled
from jaxalign.files import check_output, locked, write_text
from jaxalign.models.devices import enable_compilation_cache
from jaxalign.progress import track
from jaxalign.reporting.judging_page import Examples, Intervals, Table, write_page


def main(arguments: Sequence[str]) -> int:
    """Judge, write the folder, print the tables."""
    given = _flags().parse_args(arguments)
    files = _files(given)
    if not files and given.human is None:
        raise UserError("nothing to judge: give --a and --b, --outputs NAME=FILE ..., or --human")
    check_output(given.output, "--output", folder=True)
    enable_compilation_cache()
    with locked(given.output, "--output", folder=True):
        return _judge(given, files)


def _judge(given: argparse.Namespace, files: Mapping[str, Sequence[str]]) -> int:
    how = {"most": given.most, "bad_records": given.bad_records}
    matched = match(files, common=given.common, **how) if files else None
    labelled = read_labelled(given.human, given.by, **how) if given.human else []
    annotator = make_annotator(
        given.judge,
        AnnotatorOptions(
            template=given.template,
            tokenizer=given.tokenizer,
            max_length=given.max_length,
            batch_size=given.batch_size,
            dtype=given.dtype,
            reward_rows=given.reward_rows,
            chat=given.chat,
            workers=given.workers,
            timeout=given.timeout,
            attempts=given.attempts,
            answers_file=given.output / "answers.jsonl",
            progress=lambda answers, total: track(answers, "answers", total),
        ),
    )
    facts = [f"judge {_identity(annotator, given.judge)}"]
    results: dict[str, Any] = {"judge": _identity(annotator, given.judge)}
    parts: list[Table | Intervals | Examples] = []
    if labelled:
        more = beside_people(annotator, labelled, given, results)
        facts.append(f"labels: {given.human}, {len(labelled):,} comparisons")
        parts += more
    if matched is not None:
        facts += read_lines(matched, files)
        parts += side_by_side(annotator, matched, given, results)
    if (usage := getattr(getattr(annotator, "judge", None), "usage", None)) is not None:
        results["usage"] = vars(usage)
        facts.append(
            f"new requests: {usage.requests:,}, {usage.prompt_tokens:,} + "
            f"{usage.completion_tokens:,} tokens"
        )
    for line in [*facts, *results.get("notes", [])]:
        print(line)
    for part in parts:
        if isinstance(part, Table):
            print_table([part.title, *part.header[1:]], part.rows)
    title = " and ".join(files) if 0 < len(files) < 3 else f"{len(files)} policies"
    page = given.output / "index.html"
    heading = f"Side by side: {title}" if files else "A judge beside people"
    write_page(heading, [*facts, *results.get("notes", [])], parts, page)
    text = json.dumps(plain(results), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(given.output / "results.json", text + "\n")
    print(f"page: {page}")
    return 0


def _flags() -> argparse.ArgumentParser:
    kinds = ", ".join(f"{name}:{form}" for name, (_, form) in KINDS.items())
    flags = parser(
        "judge",
        "Which of two or more policies answers the same prompts better: win rates with intervals "
        "and at equal length, a matrix and Elo ratings of many, examples to read. Files hold "
        "{prompt, response} rows (or {instruction, output}).",
    )
    flags.add_argument("--judge", required=True, metavar="KIND:NAME", help=f"judge: {kinds}")
    flags.add_argument("--a", help="file of the first policy's outputs")
    flags.add_argument("--b", help="file of the second policy's outputs")
    flags.add_argument(
        "--outputs",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=FILE",
        help="outputs of two or more policies; a repeated name is another seed of that policy",
    )
    flags.add_argument(
        "--baseline",
        help="policy against which length-controlled win rates are computed (default: the last)",
    )
    flags.add_argument(
        "--common", action="store_true", help="use only the prompts that every file has"
    )
    flags.add_argument(
        "--human",
        metavar="DATA",
        help="comparisons labelled by people, to measure the judge: pairs {prompt, chosen, "
        "rejected}, or "
        "{prompt, first, second, preference} with 1, 0 or 0.5",
    )
    flags.add_argument(
        "--by",
        metavar="FIELD",
        help="field by which agreement on --human is broken down (default: none)",
    )
    flags.add_argument(
        "--most",
        type=within(AtLeastOne),
        help="largest number of prompts, counted from the first (default: all)",
    )
    add_bad_records(flags)
    flags.add_argument("--output", type=Path, default=Path("judged"), help="folder to write")
    flags.add_argument(
        "--examples",
        type=within(Count),
        default=5,
        help="number of examples of each kind on the page",
    )
    flags.add_argument(
        "--confidence",
        type=within(Annotated[float, Range("(0, 1)")]),
        default=0.95,
        help="confidence level of the intervals",
    )
    flags.add_argument(
        "--resamples", type=within(AtLeastOne), default=1000, help="number of bootstrap resamples"
    )
    flags.add_argument("--seed", type=within(Seed), default=0, help="seed of the bootstrap")
    of_models = flags.add_argument_group("language models as judges")
    of_models.add_argument(
        "--template",
        type=Path,
        help="file with the question; must contain {prompt}, {first} and {second}, and ask for A "
        "or B "
        "(default: built in)",
    )
    of_models.add_argument(
        "--tokenizer", help="lm: tokenizer, as a folder or Hub name (default: the model's own)"
    )
    of_models.add_argument(
        "--max-length",
        type=within(AtLeastOne),
        help="lm: largest number of tokens in a question (default: the model's context)",
    )
    of_models.add_argument(
        "--batch-size",
        type=within(AtLeastOne),
        default=8,
        help="lm: number of comparisons in a batch",
    )
    of_models.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="lm: data type of the computation",
    )
    of_models.add_argument(
        "--reward-rows",
        choices=("template", "end_token"),
        help="reward: text that a model not trained here scores: the conversation in its chat "
        "template "
        "(the default where it has one), or prompt and response with the end-of-sequence token",
    )
    add_chat(
        of_models,
        "lm, and reward models from elsewhere: whether they read the tokenizer's chat template; "
        "auto: where it has one",
    )
    of_models.add_argument(
        "--workers",
        type=within(AtLeastOne),
        default=8,
        help="endpoint (openai:): number of simultaneous requests",
    )
    of_models.add_argument(
        "--timeout",
        type=within(Positive),
        default=60.0,
        help="endpoint (openai:): time limit of a request in seconds",
    )
    of_models.add_argument(
        "--attempts",
        type=within(AtLeastOne),
        default=4,
        help="endpoint (openai:): largest number of attempts for each comparison",
    )
    return flags


def _files(given: argparse.Namespace) -> dict[str, list[str]]:
    """Policy -> its files."""
    if (given.a is None) != (given.b is None):
        raise UserError(f"--{'b' if given.b is None else 'a'} is missing: a comparison has two")
    files: dict[str, list[str]] = {}
    if given.a is not None:
        names = Path(given.a).stem, Path(given.b).stem
        names = names if names[0] != names[1] else ("a", "b")
        files = {names[0]: [given.a], names[1]: [given.b]}
    for entry in given.outputs:
        name, equals, file = entry.partition("=")
        if not (name and equals and file):
            raise UserError(f"outputs: {entry!r} is not NAME=FILE")
        files.setdefault(name, []).append(file)
    if len(files) == 1:
        raise UserError(f"outputs: {next(iter(files))} alone; name a policy to compare it with")
    if given.baseline is not None and given.baseline not in files:
        raise UserError(f"baseline: {given.baseline} is none of {', '.join(files)}")
    return files


def _identity(annotator: Annotator, spec: str) -> str:
    """The judge's name with what its answers depend on."""
    judge = annotator.judge if isinstance(annotator, JudgeAnnotator) else annotator
    known = getattr(judge, "identity", None)
    return spec if known is None else f"{spec} ({known})"
