"""`jaxalign judge --a A --b B --judge J`: responses side by side: win rates, Elo, examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import UseAppendAction, arg

from jaxalign.config import AtLeastOne
from jaxalign.data.written import input_files
from jaxalign.errors import UserError
from jaxalign.evaluation import AnnotatorOptions, make_annotator
from jaxalign.evaluation.annotators import KINDS
from jaxalign.evaluation.beside_people import beside_people
from jaxalign.evaluation.judging import (
    Findings,
    JudgingOptions,
    joined,
    judge_name,
    usage_of,
    write_findings,
)
from jaxalign.evaluation.outputs import match, policy_files, read_labelled
from jaxalign.evaluation.side_by_side import facts_of, side_by_side
from jaxalign.evaluation.verdicts import JudgeOptions
from jaxalign.files import check_output, locked
from jaxalign.flags import BadRecords, parse
from jaxalign.models.devices import enable_compilation_cache
from jaxalign.progress import track
from jaxalign.reporting import print_table
from jaxalign.reporting.judging_page import Table

WRITTEN = ("answers.jsonl", "verdicts.jsonl", "human.jsonl", "results.json")
JUDGES = "Judge: " + ", ".join(f"{name}:{form}" for name, (_, form) in KINDS.items()) + "."


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which of two or more policies answers the same prompts better.

    Win rates with intervals and at equal length, a matrix and Elo ratings of many, examples to
    read. Files hold {prompt, response} rows (or {instruction, output}).
    """

    judge: Annotated[str, arg(metavar="KIND:NAME", help=JUDGES)]
    a: str | None = None
    """File of the first policy's outputs."""
    b: str | None = None
    """File of the second policy's outputs."""
    outputs: UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """NAME=FILE ..., outputs of policies; a repeated name is another seed of that policy."""
    common: bool = False
    """Use only the prompts that every file has."""
    human: str | None = None
    """Comparisons labelled by people, to measure the judge: pairs {prompt, chosen, rejected}, or
    {prompt, first, second, preference} with 1, 0 or 0.5."""
    by: str | None = None
    """Field by which agreement on --human is broken down."""
    limit: AtLeastOne | None = None
    """Largest number of prompts, counted from the first; None: all."""
    bad_records: BadRecords = "error"
    """Response to a record that cannot be used: stop and name its line, or skip it."""
    output: Path = Path("judged")
    """Folder to write."""
    summary: JudgingOptions
    models: JudgeOptions


def main(arguments: Sequence[str]) -> int:
    """Judge, write the folder, print the tables."""
    options = parse(Options, "judge", arguments)
    outputs = [entry for entries in options.outputs for entry in entries]
    files = policy_files(options.a, options.b, outputs, options.summary.baseline)
    if not files and options.human is None:
        raise UserError("nothing to judge: give --a and --b, --outputs NAME=FILE ..., or --human")
    if options.by is not None and options.human is None:
        raise UserError("--by: breaks down agreement with --human, which is not given")
    read = input_files(*(file for seeds in files.values() for file in seeds), options.human)
    check_output(options.output, "--output", folder=True, files=WRITTEN, inputs=read)
    enable_compilation_cache()
    with locked(options.output, "--output", folder=True):
        facts, findings = _judge(options, files)
        heading = "A judge beside people"
        if files:
            title = " and ".join(files) if len(files) < 3 else f"{len(files)} policies"
            heading = f"Side by side: {title}"
        lines = [*facts, *findings.notes]
        for line in lines:
            print(line)
        for part in findings.parts:
            if isinstance(part, Table):
                print_table([part.title, *part.header[1:]], part.rows)
        page = write_findings(options.output, heading, lines, findings)
        print(f"page: {page}")
    return 0


def _judge(options: Options, files: Mapping[str, Sequence[str]]) -> tuple[list[str], Findings]:
    """Lines on what was read, and the findings."""
    reading = {"limit": options.limit, "bad_records": options.bad_records}
    matched = match(files, common=options.common, **reading) if files else None
    labelled = read_labelled(options.human, options.by, **reading) if options.human else []
    annotator = make_annotator(
        options.judge,
        AnnotatorOptions(
            **vars(options.models),
            answers_file=options.output / "answers.jsonl",
            progress=lambda answers, total: track(answers, "answers", total),
        ),
    )
    name = judge_name(annotator, options.judge)
    facts, findings = [f"judge {name}"], [Findings(results={"judge": name})]
    if labelled:
        facts.append(f"labels: {options.human}, {len(labelled):,} comparisons")
        findings.append(beside_people(annotator, labelled, options.summary, options.output))
    if matched is not None:
        facts += facts_of(matched, files)
        findings.append(side_by_side(annotator, matched, options.summary, options.output))
    usage, lines = usage_of(annotator)
    return facts + lines, joined([*findings, Findings(results=usage)])
