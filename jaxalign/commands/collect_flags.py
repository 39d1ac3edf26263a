"""The flags of `jaxalign collect`: a subcommand for each way of collecting."""

import argparse
from pathlib import Path
from typing import Annotated

from jaxalign.collection import WORLDS
from jaxalign.commands.arguments import Flags, add_bad_records, add_chat, parser, within
from jaxalign.config import AtLeastOne, Fraction, NonNegative, Positive, Range, Seed, Share

WAYS = ("best-of-n", "constitutional", "self-align", "society")


def collect_flags() -> Flags:
    """All of them."""
    flags = parser(
        "collect",
        "Preference pairs {prompt, chosen, rejected, provenance} in "
        "FOLDER/pairs.jsonl, and the method's other results beside it. Every answer "
        "is kept: run the same command again to resume, and nothing is requested twice.",
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
    flags.add_argument(
        "--model",
        required=True,
        help="model that writes: Hugging Face folder, run folder, GGUF file or openai:URL#MODEL",
    )
    flags.add_argument(
        "--prompts", required=True, help="file of {prompt} rows; other fields are ignored"
    )
    flags.add_argument("--output", type=Path, required=True, help="folder to write")
    if way == "best-of-n":
        flags.add_argument(
            "--annotator",
            required=True,
            help="annotator that compares samples, as --judge of `jaxalign judge`: reward:FOLDER, "
            "...",
        )
        flags.add_argument(
            "--samples",
            type=within(AtLeastOne),
            default=8,
            help="number of samples drawn for each prompt",
        )
        flags.add_argument(
            "--select",
            choices=("best-worst", "rrhf", "rso", "raft"),
            default="best-worst",
            help="selection rule: the best and worst sample of each prompt (best-worst), all "
            "ranked pairs "
            "(rrhf), pairs of samples accepted by rejection sampling (rso), or the best samples to "
            "imitate, in sft.jsonl (raft)",
        )
        flags.add_argument(
            "--keep",
            type=within(Fraction),
            default=0.2,
            help="raft: fraction of the samples to imitate",
        )
        flags.add_argument(
            "--ranking",
            choices=("local", "top"),
            default="local",
            help="raft: whether samples are ranked within each prompt (local) or over all of them "
            "(top)",
        )
        flags.add_argument(
            "--beta", type=within(Positive), default=0.5, help="rso: coefficient of the KL term"
        )
        flags.add_argument(
            "--accept",
            type=within(AtLeastOne),
            default=4,
            help="rso: number of samples accepted for each prompt",
        )
    elif way == "constitutional":
        flags.add_argument(
            "--principles",
            type=Path,
            required=True,
            help="JSON file of principles, [{name, critique, revision}]",
        )
        flags.add_argument(
            "--examples",
            type=Path,
            help="JSON file with a list of worked transcripts (default: none)",
        )
        flags.add_argument(
            "--revisions",
            type=within(AtLeastOne),
            default=4,
            help="number of revisions of each response",
        )
        flags.add_argument(
            "--keep-cut",
            action="store_true",
            help="keep responses and revisions that --max-tokens cut off, as those of a model that "
            "never ends; otherwise they are left out and counted",
        )
    elif way == "self-align":
        flags.add_argument(
            "--rules",
            type=Path,
            help='JSON file {"rules": [{name, text}], "examples": [{request, thoughts, response}]} '
            "(default: twelve of this project's, about 400 words)",
        )
    else:
        flags.add_argument("--observer", help="model that rates answers (default: --model)")
        flags.add_argument(
            "--side",
            type=within(Annotated[int, Range("[2, inf)")]),
            default=3,
            help="side length of the grid of agents",
        )
        flags.add_argument(
            "--rounds",
            type=within(AtLeastOne),
            default=2,
            help="number of rounds; each agent answers one question in each",
        )
        flags.add_argument(
            "--neighbours",
            type=within(AtLeastOne),
            default=4,
            help="number of neighbours that give feedback on an answer",
        )
        flags.add_argument(
            "--dropout",
            type=within(Share),
            default=0.0,
            help="fraction of the neighbours that are replaced by agents from anywhere on the grid",
        )
        flags.add_argument(
            "--ratings",
            choices=("written", "scored"),
            default="written",
            help="source of ratings: the text that agents write, or their log-probs of each rating",
        )
        flags.add_argument(
            "--memories", help="file of preference pairs that agents remember (default: none)"
        )
        flags.add_argument(
            "--world",
            choices=WORLDS,
            default="all_good",
            help="responses that agents begin with: the good or the bad ones of --memories, or "
            "half of each",
        )
        flags.add_argument(
            "--each", type=within(AtLeastOne), default=50, help="number of memories of each agent"
        )
    add_bad_records(flags)
    flags.add_argument(
        "--most",
        type=within(AtLeastOne),
        help="largest number of prompts, counted from the first (default: all)",
    )
    flags.add_argument(
        "--most-similar",
        type=within(Share),
        default=0.95,
        help="largest similarity of chosen and rejected; pairs that are more alike are left out",
    )
    flags.add_argument(
        "--max-tokens",
        type=within(AtLeastOne),
        default=128,
        help="largest number of tokens in each generated text",
    )
    flags.add_argument(
        "--temperature", type=within(NonNegative), default=1.0, help="sampling temperature"
    )
    flags.add_argument(
        "--top-p",
        type=within(Fraction),
        default=1.0,
        help="keep the most likely tokens that hold this fraction of the probability",
    )
    flags.add_argument(
        "--stop", nargs="*", default=[], help="strings that end a response (default: none)"
    )
    flags.add_argument("--seed", type=within(Seed), default=0, help="seed of the sampling")
    flags.add_argument("--prompt-format", default="{prompt}", help="local: around plain prompts")
    add_chat(flags)
    flags.add_argument(
        "--batch-size",
        type=within(AtLeastOne),
        default=8,
        help="local model: number of prompts in a batch",
    )
    flags.add_argument(
        "--workers",
        type=within(AtLeastOne),
        default=8,
        help="endpoint (openai:): number of simultaneous requests",
    )
    flags.add_argument(
        "--requests-per-minute",
        type=within(Positive),
        help="endpoint (openai:): largest number of requests per minute (default: no limit)",
    )
    flags.add_argument(
        "--completions",
        action="store_true",
        help="endpoint (openai:): use the completions API, for base models",
    )
