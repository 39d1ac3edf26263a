"""`jaxalign judge`: what policies wrote, side by side, by any judge; and judges beside people."""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from jaxalign.commands.arguments import add_bad_records, add_chat, parser, within
from jaxalign.commands.judged_people import beside_people
from jaxalign.commands.judged_policies import read_lines, side_by_side
from jaxalign.commands.judged_words import plain
from jaxalign.commands.outputs import match, read_labelled
from jaxalign.commands.report import print_table
from jaxalign.config import AtLeastOne, Count, Positive, Range, Seed
from jaxalign.errors import UserError
from jaxalign.evaluation import Annotator, AnnotatorOptions, JudgeAnnotator, make_annotator
from jaxalign.evaluation.annotators import KINDS
from jaxalign.files import check_output, locked, write_text
from jaxalign.reporting.judging_page import Examples, Intervals, Table, write_page


def main(arguments: Sequence[str]) -> int:
    """Judge, write the folder, print the tables."""
    given = _flags().parse_args(arguments)
    files = _files(given)
    if not files and given.human is None:
        raise UserError("nothing to judge: give --a and --b, --outputs NAME=FILE ..., or --human")
    check_output(given.output, "--output", folder=True)
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
            progress=_progress,
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
            f"asked anew: {usage.requests:,} requests, {usage.prompt_tokens:,} + "
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
    flags.add_argument("--judge", required=True, metavar="KIND:NAME", help=kinds)
    flags.add_argument("--a", help="outputs of one policy")
    flags.add_argument("--b", help="outputs of the other")
    flags.add_argument(
        "--outputs",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=FILE",
        help="two or more policies; a name given again is another seed of it",
    )
    flags.add_argument("--baseline", help="policy to control lengths against (default: the last)")
    flags.add_argument(
        "--common", action="store_true", help="leave out prompts that some file lacks"
    )
    flags.add_argument(
        "--human",
        metavar="DATA",
        help="measure the judge: pairs {prompt, chosen, rejected} that people labelled, or "
        "{prompt, first, second, preference} with 1, 0 or 0.5",
    )
    flags.add_argument("--by", metavar="FIELD", help="part the labelled comparisons by this field")
    flags.add_argument("--most", type=within(AtLeastOne), help="prompts to take, from the first on")
    add_bad_records(flags)
    flags.add_argument("--output", type=Path, default=Path("judged"), help="folder to write")
    flags.add_argument("--examples", type=within(Count), default=5, help="of each kind on the page")
    flags.add_argument(
        "--confidence",
        type=within(Annotated[float, Range("(0, 1)")]),
        default=0.95,
        help="of the intervals",
    )
    flags.add_argument(
        "--resamples", type=within(AtLeastOne), default=1000, help="of the bootstrap"
    )
    flags.add_argument("--seed", type=within(Seed), default=0, help="of the bootstrap")
    of_models = flags.add_argument_group("language models as judges")
    of_models.add_argument(
        "--template", type=Path, help="file with {prompt}, {first} and {second}; the answer A or B"
    )
    of_models.add_argument("--tokenizer", help="lm: folder or hub name (default: the model's)")
    of_models.add_argument(
        "--max-length", type=within(AtLeastOne), help="lm: tokens (default: the context)"
    )
    of_models.add_argument(
        "--batch-size", type=within(AtLeastOne), default=8, help="lm: comparisons at a time"
    )
    of_models.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="lm: of the computation"
    )
    of_models.add_argument(
        "--reward-rows",
        choices=("template", "end_token"),
        help="reward: a model from elsewhere scores the conversation as its chat template writes "
        "it (default), or the response with the end-of-sequence token",
    )
    add_chat(
        of_models,
        "lm, and reward models from elsewhere: whether they read the tokenizer's chat template; "
        "auto: where it has one",
    )
    of_models.add_argument(
        "--workers", type=within(AtLeastOne), default=8, help="openai: requests at a time"
    )
    of_models.add_argument(
        "--timeout", type=within(Positive), default=60.0, help="openai: seconds a request"
    )
    of_models.add_argument(
        "--attempts", type=within(AtLeastOne), default=4, help="openai: for each comparison"
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


def _progress(answers: Iterable[Any], total: int) -> Iterable[Any]:
    from rich.console import Console
    from rich.progress import track

    return track(answers, total=total, description="answers", console=Console(stderr=True))
