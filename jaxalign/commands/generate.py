"""`jaxalign generate --model M --prompts F --output F`: responses to a file of prompts."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from jaxalign.backends import Decoding
from jaxalign.backends.interface import Draft, WeightFormat
from jaxalign.backends.local import LocalModel
from jaxalign.commands.model_flags import ModelFlags, SamplingFlags
from jaxalign.config import AtLeastOne, Count, Positive, Share
from jaxalign.data import PromptRecord, ReadReport, prompt_records
from jaxalign.data.reading import accepted, nothing_usable
from jaxalign.errors import UserError
from jaxalign.evaluation.responses import make_responder, respond
from jaxalign.files import check_output, locked
from jaxalign.flags import BadRecords, parse
from jaxalign.models.devices import enable_compilation_cache
from jaxalign.prompting import read_artefact
from jaxalign.prompting.composing import compose, without_marks

GREEDY = SamplingFlags(temperature=0.0)


@dataclass(frozen=True, kw_only=True)
class Options:
    """A model's responses to prompts, as {prompt, response} rows that `jaxalign judge` reads.

    Run the same command again to resume.
    """

    model: str
    """Model: Hugging Face folder, Hub name, run folder, GGUF file or openai:URL#MODEL."""
    prompts: str
    """File of {prompt} rows; other fields are ignored; FILE#[:100] takes the first 100."""
    output: Path
    """JSON Lines file to write."""
    bad_records: BadRecords = "error"
    """Response to a record that cannot be used: stop and name its line, or skip it."""
    limit: AtLeastOne | None = None
    """Largest number of prompts, counted from the first; None: all."""
    samples: AtLeastOne = 1
    """Number of responses to each prompt."""
    sampling: SamplingFlags = GREEDY
    top_k: Count = 0
    """Keep the k most likely tokens; 0: all."""
    min_p: Share = 0.0
    """Keep tokens at least this fraction as likely as the most likely one; 0: all."""
    repetition_penalty: Positive = 1.0
    """Divisor of the logits of tokens that already occur; 1: none, RAHF's evaluation uses 1.2."""
    prompt_artefact: Path | None = None
    """File prompt.json of `jaxalign optimize-prompt`: its system prompt and examples."""
    prompt_format: str = "{prompt}"
    """Text around a plain prompt."""
    tokenizer: str | None = None
    """Tokenizer: folder or Hub name; None: the model's own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the computation."""
    steer: str | None = None
    """Steering vector of `jaxalign steer`, added at every position: FILE, FILE:FACTOR, or FILE:null
    to remove its direction."""
    draft: Draft = "none"
    """Source of drafts with --batch-size 1: prompt_lookup verifies what followed the same words
    before; the responses stay the same."""
    weights: WeightFormat = "float"
    """Format of a decoder's matrices; int8 reads a quarter of the bytes for a token, which pays on
    a CPU with a small --batch-size. Its responses are those of a slightly different model."""
    running: ModelFlags


def main(arguments: Sequence[str]) -> int:
    """Generate what is missing; responses are on disk as they end, in the order of the prompts."""
    options = parse(Options, "generate", arguments)
    sampled = {name: getattr(options, name) for name in ("top_k", "min_p", "repetition_penalty")}
    decoding = options.sampling.decoding(**sampled)
    if decoding.temperature == 0:
        if options.samples > 1:
            raise UserError("samples: at temperature 0 all of them are the same; set --temperature")
        for name in ("top_p", "top_k", "min_p", "seed"):
            if getattr(decoding, name) != getattr(Decoding(), name):
                flag = name.replace("_", "-")
                raise UserError(f"--{flag}: has no effect at temperature 0; set --temperature, too")
    check_output(options.output, "--output")
    enable_compilation_cache()
    with locked(options.output, "--output"):
        _generate(options, decoding)
    return 0


def _generate(options: Options, decoding: Decoding) -> None:
    report = ReadReport()
    usable = prompt_records(options.prompts, bad_records=options.bad_records, report=report)
    records = list(itertools.islice(usable, options.limit))
    names = ("tokenizer", "prompt_format", "dtype", "draft", "weights", "steer")
    loading = {name: getattr(options, name) for name in names}
    running = options.running.backend_options(**loading)
    model = make_responder(options.model, running, options.output)
    if isinstance(model, LocalModel):  # an endpoint has the template of its own

        def text(record: PromptRecord) -> str:
            return model.text(record.prompt, f"{record.source}:{record.line}")

        records = accepted(records, text, options.bad_records, report)
    if report.skipped:
        print(f"{options.prompts}: {report.summary()}")
    if not records:
        raise nothing_usable(options.prompts, report)
    prompts, artefact = None, None
    if options.prompt_artefact is not None:
        artefact = read_artefact(options.prompt_artefact)
        prompts, decoding = compose(artefact, model, records, decoding)
    respond(
        options.output,
        model,
        records,
        decoding,
        prompts=prompts,
        samples=options.samples,
        batch_size=options.running.batch_size,
        settings={"prompt_artefact": None if artefact is None else asdict(artefact)},
        text_of=str if artefact is None else without_marks,
        say=print,
    )
