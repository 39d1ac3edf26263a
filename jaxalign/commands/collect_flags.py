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
        flags.add_argument("--samples", type=within(AtLeastOne), default=8, help="n")
        flags.add_argument(
            "--select",
            choices=("best-worst", "rrhf", "rso", "raft"),
            default="best-worst",
            help="a pair of each prompt; all ranked pairs; pairs of accepted samples; sft.jsonl",
        )
        flags.add_argument(
            "--keep", type=within(Fraction), default=0.2, help="raft: share to imitate"
        )
        flags.add_argument("--ranking", choices=("local", "top"), default="local", help="raft")
        flags.add_argument("--beta", type=within(Positive), default=0.5, help="rso: of the KL term")
        flags.add_argument(
            "--accept", type=within(AtLeastOne), default=4, help="rso: samples of each prompt"
        )
    elif way == "constitutional":
        flags.add_argument(
            "--principles", type=Path, required=True, help="JSON [{name, critique, revision}]"
        )
        flags.add_argument("--examples", type=Path, help="JSON list of worked transcripts")
        flags.add_argument(
            "--revisions", type=within(AtLeastOne), default=4, help="of each response"
        )
    elif way == "self-align":
        flags.add_argument(
            "--rules",
            type=Path,
            help='JSON {"rules": [{name, text}], "examples": [{request, thoughts, response}]} '
            "(default: twelve of this project's, about 400 words)",
        )
    else:
        flags.add_argument("--observer", help="who rates (default: the model)")
        flags.add_argument(
            "--side",
            type=within(Annotated[int, Range("[2, inf)")]),
            default=3,
            help="of the grid of agents",
        )
        flags.add_argument(
            "--rounds", type=within(AtLeastOne), default=2, help="questions of each agent"
        )
        flags.add_argument(
            "--neighbours", type=within(AtLeastOne), default=4, help="feedback for an answer"
        )
        flags.add_argument(
            "--dropout",
            type=within(Share),
            default=0.0,
            help="share of feedback from the whole grid",
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
        flags.add_argument(
            "--each", type=within(AtLeastOne), default=50, help="memories of an agent"
        )
    add_bad_records(flags)
    flags.add_argument("--most", type=within(AtLeastOne), help="prompts to take, from the first on")
    flags.add_argument("--most-similar", type=within(Share), default=0.95, help="sides of a pair")
    flags.add_argument(
        "--max-tokens", type=within(AtLeastOne), default=128, help="of whatever is written"
    )
    flags.add_argument(
        "--temperature", type=within(NonNegative), default=1.0, help="of the sampling"
    )
    flags.add_argument(
        "--top-p", type=within(Fraction), default=1.0, help="fraction of the probability"
    )
    flags.add_argument("--stop", nargs="*", default=[], help="texts that end a response")
    flags.add_argument("--seed", type=within(Seed), default=0, help="of the sampling")
    flags.add_argument("--prompt-format", default="{prompt}", help="local: around plain prompts")
    add_chat(flags)
    flags.add_argument("--batch-size", type=within(AtLeastOne), default=8, help="prompts at a time")
    flags.add_argument(
        "--workers", type=within(AtLeastOne), default=8, help="openai: requests at a time"
    )
    flags.add_argument("--requests-per-minute", type=within(Positive), help="openai: at most")
    flags.add_argument("--completions", action="store_true", help="openai: a base model")
