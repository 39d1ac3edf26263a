"""`jaxalign collect METHOD --model M --prompts F --output D`: preference data from models."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxalign import collection
from jaxalign.collection.collecting import FILES
from jaxalign.commands.model_flags import ModelFlags, SamplingFlags
from jaxalign.config import AtLeastOne, Share
from jaxalign.data.written import input_files
from jaxalign.files import check_output, locked
from jaxalign.flags import BadRecords, parse
from jaxalign.models.devices import enable_compilation_cache


@dataclass(frozen=True, kw_only=True)
class Common:
    """Preference pairs {prompt, chosen, rejected, provenance} go to FOLDER/pairs.jsonl, and the
    method's other results beside it. Every answer is kept: run the same command again to resume,
    and nothing is requested twice.
    """  # noqa: D205

    model: str
    """Model that writes: Hugging Face folder, run folder, GGUF file or openai:URL#MODEL."""
    prompts: str
    """File of {prompt} rows; other fields are ignored."""
    output: Path
    """Folder to write."""
    bad_records: BadRecords = "error"
    """Response to a record that cannot be used: stop and name its line, or skip it."""
    limit: AtLeastOne | None = None
    """Largest number of prompts, counted from the first; None: all."""
    most_similar: Share = 0.95
    """Largest similarity of chosen and rejected; pairs that are more similar are left out."""
    prompt_format: str = "{prompt}"
    """Text around a plain prompt of a local model."""
    sampling: SamplingFlags
    running: ModelFlags


@dataclass(frozen=True, kw_only=True)
class BestOfN:
    """The best and the worst of several samples, by any annotator."""

    method: collection.BestOfN
    common: Common


@dataclass(frozen=True, kw_only=True)
class Constitutional:
    """A response and its revision by principles."""

    method: collection.Constitutional
    common: Common


@dataclass(frozen=True, kw_only=True)
class SelfAlign:
    """Answers after thoughts on rules, to be learned without them."""

    method: collection.SelfAlignment
    common: Common


@dataclass(frozen=True, kw_only=True)
class Society:
    """Agents on a grid that answer, rate and revise."""

    method: collection.SimulatedSociety
    common: Common


Options = BestOfN | Constitutional | SelfAlign | Society


def main(arguments: Sequence[str]) -> int:
    """Collect, or resume; print the pairs and their statistics."""
    options = parse(Options, "collect", arguments)
    common = options.common
    read = input_files(common.prompts, getattr(options.method, "memories", None))
    read += [value for value in vars(options.method).values() if isinstance(value, Path)]
    check_output(common.output, "--output", folder=True, files=FILES, inputs=read)
    enable_compilation_cache()
    with locked(common.output, "--output", folder=True):
        collected = collection.collect(
            options.method,
            model=common.model,
            prompts=common.prompts,
            folder=common.output,
            decoding=common.sampling.decoding(),
            options=common.running.backend_options(prompt_format=common.prompt_format),
            limit=common.limit,
            bad_records=common.bad_records,
            most_similar=common.most_similar,
        )
    statistics = collected.statistics
    print(f"{collected.path}: {statistics['pairs']:,} pairs; new requests: {collected.requests:,}")
    for name in (name for name in statistics if name not in ("model", "decoding")):
        print(f"  {name}: {_short(statistics[name])}")
    return 0


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(one)}" for name, one in value.items()) or "none"
    return f"{value:.3g}" if isinstance(value, float) else value
