"""`jaxalign filter --model M --data D --output F`: leave out pairs by similarity or by a trait."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxalign.backends import Decoding
from jaxalign.backends.local import LocalModel
from jaxalign.commands.pairs import PairOptions
from jaxalign.config import AtLeastOne, Fraction
from jaxalign.data import PromptRecord, PromptResponseRecord, TokenizedRows, tokenize_responses
from jaxalign.data.reading import ReadReport, accepted, nothing_usable
from jaxalign.data.record_text import text_of
from jaxalign.data.records import transcript
from jaxalign.data.written import input_files, prompt_fields
from jaxalign.entanglement.pairs import load_pairs
from jaxalign.entanglement.similarity import least_similar, similarities, write_scored_pairs
from jaxalign.errors import UserError
from jaxalign.evaluation.responses import respond
from jaxalign.files import check_output, locked, write_json_lines
from jaxalign.flags import parse
from jaxalign.models.devices import enable_compilation_cache
from jaxalign.models.steering import read_steering
from jaxalign.progress import busy
from jaxalign.reporting import print_table
from jaxalign.reporting.charts import Chart, Series, draw
from jaxalign.representation import (
    PersonaScores,
    Reader,
    TrainingRecord,
    persona_scores,
    training_records,
)

PERSONA = ("persona", "persona_pair")
BESIDE = (".own.jsonl", ".scores.jsonl", ".png")
"""Endings of the files beside OUTPUT with --persona."""
SHOWN = 5
"""Number of the strongest records that are printed."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Keep the pairs with the lowest similarity of chosen and rejected (arXiv:2410.08847); or, with
    --persona, the records that would move the model least along a trait (arXiv:2507.21509).

    With --persona the data may also be {prompt, response} rows. Beside OUTPUT are written: the
    model's own responses (OUTPUT.own.jsonl; they are generated first, and kept), every record's
    score, the strongest first (OUTPUT.scores.jsonl), and a histogram (OUTPUT.png).
    """  # noqa: D205

    source: PairOptions
    output: Path
    """JSON Lines file to write."""
    by: Literal["ches", "ln_ches", "last_hidden", "edit", "persona", "persona_pair"] | None = None
    """Score to filter by: CHES, its length-normalised form, the inner product of the last hidden
    states, or the negated edit distance; with --persona, the projection of a response minus that of
    the model's own (persona), or chosen minus rejected (persona_pair). None: ln_ches, or with
    --persona persona."""
    keep: Fraction = 0.95
    """Fraction of the pairs to keep."""
    persona: Path | None = None
    """Persona vector of `jaxalign steer`, from responses with a trait and without it."""
    own_tokens: AtLeastOne = 64
    """--persona: largest number of tokens in the model's own responses, which are greedy."""
    limit: AtLeastOne | None = None
    """Largest number of records, counted from the first; None: all."""


def main(arguments: Sequence[str]) -> int:
    """Score every record, keep the lowest, write them with their scores."""
    options = parse(Options, "filter", arguments)
    by = options.by or ("ln_ches" if options.persona is None else "persona")
    if (options.persona is None) == (by in PERSONA):
        needs = "needs" if by in PERSONA else "does not go with"
        raise UserError(f"--by: {by} {needs} --persona")
    beside = () if options.persona is None else BESIDE
    check_output(
        options.output,
        "--output",
        files=[f"{options.output.name}{ending}" for ending in beside],
        inputs=[*input_files(options.source.data), options.source.model, options.persona],
    )
    enable_compilation_cache()
    if options.persona is not None:
        with locked(options.output, "--output"):
            return _by_trait(options, options.persona, by)
    return _by_similarity(options, by)


def _by_similarity(options: Options, by: str) -> int:
    loaded = load_pairs(**vars(options.source), limit=options.limit)
    scores = similarities(loaded)
    own = scores[by]
    kept = least_similar(own, options.keep)
    write_scored_pairs(options.output, loaded, kept.tolist(), scores)
    for line in loaded.left_out:
        print(line)
    rest = np.delete(own, kept)
    lowest = f"{rest.min():.4g} on" if len(rest) else "none"
    print(
        f"{options.output}: {len(kept):,} of {len(own):,} pairs, {by} up to "
        f"{own[kept].max():.4g}; left out: {len(rest):,} from {lowest}"
    )
    return 0


def _by_trait(options: Options, persona: Path, by: str) -> int:
    source, output = options.source, options.output
    vector = read_steering(persona)
    counted = ReadReport()
    records = training_records(source.data, bad_records=source.bad_records, report=counted)
    records = records[: options.limit]
    if by == "persona_pair" and any(record.rejected is None for record in records):
        raise UserError("--by: persona_pair is of pairs, and some records have one response")
    names = ("tokenizer", "batch_size", "prompt_format", "chat")
    model = LocalModel.load(source.model, **{name: getattr(source, name) for name in names})
    vector.by_layer(model.model.config)  # checks layer and width
    in_text = text_of(model.tokenizer, source.prompt_format, None, source.chat)

    def texts(record: TrainingRecord) -> None:
        responses = [text for text in (record.response, record.rejected) if text is not None]
        in_text(record.prompt, responses, f"{record.source}:{record.line}")

    records = accepted(records, texts, source.bad_records, counted)
    if counted.skipped:
        print(f"{source.data}: {counted.summary()}")
    if not records:
        raise nothing_usable(source.data, counted)
    own = _own_responses(output.with_name(f"{output.name}.own.jsonl"), model, records, options)

    def tokenize(responses: Sequence[PromptResponseRecord]) -> TokenizedRows:
        return tokenize_responses(
            responses,
            model.tokenizer,
            max_length=source.max_length,
            prompt_format=source.prompt_format,
            chat=source.chat,
        )[0]

    reader = Reader(config=model.model.config, layers=(vector.layer,))
    with busy(f"projecting {len(records):,} records on {persona.name}"):
        size, params = source.batch_size, model.model.params
        scores = persona_scores(reader, params, tokenize, records, own, vector, batch_size=size)
    rows = [
        _row(record, text, scores, at)
        for at, (record, text) in enumerate(zip(records, own, strict=True))
    ]
    values = scores.persona if by == "persona" else scores.persona_pair
    kept = least_similar(values, options.keep)
    write_json_lines(output, [rows[at] for at in kept])
    strongest = np.argsort(-values, kind="stable")
    write_json_lines(
        output.with_name(f"{output.name}.scores.jsonl"), [rows[at] for at in strongest]
    )
    _draw(values, by, persona.stem, output.with_name(f"{output.name}.png"))
    table = [
        [
            f"{records[at].source}:{records[at].line}",
            f"{values[at]:.3g}",
            " ".join(transcript(records[at].response).split())[:60],
        ]
        for at in strongest[:SHOWN]
    ]
    print_table([f"most along {persona.stem}", by, "response"], table)
    print(
        f"{output}: {len(kept):,} of {len(records):,} records, {by} up to "
        f"{values[kept].max():.4g}; mean of all {values.mean():.4g}, of those kept "
        f"{values[kept].mean():.4g}"
    )
    return 0


def _own_responses(
    path: Path, model: LocalModel, records: Sequence[TrainingRecord], options: Options
) -> list[str]:
    """The model's own response to each prompt; those that are in the file are not generated."""
    prompts = [
        PromptRecord(prompt=record.prompt, source=record.source, line=record.line)
        for record in records
    ]
    decoding = Decoding(max_tokens=options.own_tokens)
    size = options.source.batch_size
    respond(path, model, prompts, decoding, batch_size=size, say=print)
    with path.open("rb") as file:
        return [json.loads(line)["response"] for line in file]


def _row(record: TrainingRecord, own: str, scores: PersonaScores, at: int) -> dict[str, Any]:
    """A record as it was, with its scores; a pair has both."""
    row = prompt_fields(record.prompt)
    if record.rejected is None:
        row["response"] = record.response
    else:
        row |= {"chosen": record.response, "rejected": record.rejected}
        row["persona_pair"] = float(scores.persona_pair[at])
    place = f"{record.source}:{record.line}"
    return row | {"persona": float(scores.persona[at]), "own": own, "place": place}


def _draw(values: np.ndarray, by: str, trait: str, path: Path) -> None:
    """Histogram of the scores."""
    counts, edges = np.histogram(values, bins=min(40, max(5, round(len(values) ** 0.5))))
    width = float(edges[1] - edges[0])
    middle = ((edges[:-1] + edges[1:]) / 2).tolist()
    bars = Series(x=middle, y=counts.tolist(), kind="bars", width=0.9 * width)
    title = f"{by}: projection on {trait}"
    draw([Chart(title=title, series=[bars], x_label=by, y_label="records")], path)
