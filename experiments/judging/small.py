"""Judges that can read, beside people: a 1.5B model behind a server, a chat model, a reward model.

Command:  python -m experiments.judging.small --model FOLDER --judge MODEL.gguf [--number 80]
Needs:    a chat model of 135M parameters (FOLDER), a larger one as a GGUF file, xllamacpp
Time:     about half an hour on one CPU core
Expect:   a file under rows/ for every judge; the section "Judges that can read" and small.png

All judges of the main table see the same comparisons, at most one of a request. The question to
each model is chosen on others. Answers of the server are kept, and a judge whose row is there is
not asked again. Without --model and --judge only tables and figure are made.
"""

import dataclasses
import hashlib
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments.judging.compare import SETS, Comparisons, read
from experiments.judging.small_tables import (
    LABELS,
    QUESTIONS,
    chosen_question,
    plot,
    question_row,
    sections,
)
from experiments.page import put
from experiments.rows import Rows, models_of, same_options
from experiments.runs import DATA, finished
from experiments.served import served
from jaxalign.backends.client import Client, split_address
from jaxalign.backends.local import LocalModel
from jaxalign.config import LoraConfig, OptimizerConfig, PreferenceConfig, TrainConfig
from jaxalign.data import preference_records
from jaxalign.errors import UserError
from jaxalign.evaluation import AnnotatorOptions, Verdicts, make_annotator
from jaxalign.evaluation.endpoints import Endpoint
from jaxalign.evaluation.templates import CHAT, read_template
from jaxalign.evaluation.verdicts import JudgeAnnotator
from jaxalign.files import write_json_lines
from jaxalign.models.devices import enable_compilation_cache

FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Options:
    """Models, data and sizes."""

    model: str | None = None
    """Small chat model, also of the reward model: Hugging Face folder; None: no judge of it."""
    judge: str | None = None
    """Larger chat model as a GGUF file, served while it judges; None: it is not asked."""
    judges: tuple[str, ...] = tuple(LABELS)
    """Judges to ask."""
    number: int = 80
    """Number of comparisons of each set in the main table."""
    more: int = 150
    """Largest number of further ones, for judges that cost little."""
    choice: int = 12
    """Number of comparisons of each set on which the question is chosen, in no table."""
    longest: int = 600
    """Most characters of a request and both responses; longer comparisons are left out."""
    epochs: float = 1.0
    """Passes of the reward model over its pairs."""
    pairs_longest: int = 1200
    """Most characters of a prompt and its longer response, of the reward model's pairs."""
    output: Path = Path("runs/judging_small")
    """Folder of answers and of the reward model."""
    rows: Path = FOLDER / "rows"
    """Folder of the rows."""


# ------------------------------------------------------------------------------ comparisons


def drawn(name: str, options: Options) -> tuple[Comparisons, Comparisons]:
    """Comparisons to choose the question on, and those of the tables, one of each request."""
    every, _ = read(SETS[name])
    order = np.random.default_rng(0).permutation(len(every))
    once: dict[str, int] = {}
    for at in order:
        if _characters(every, at) <= options.longest:
            once.setdefault(str(every.prompts[at]), int(at))
    places = list(once.values())
    needed = options.choice + options.number
    if len(places) < needed:
        raise UserError(f"number: {name} has {len(places)} short comparisons, fewer than {needed}")
    end = needed + options.more
    return picked(every, places[: options.choice]), picked(every, places[options.choice : end])


def _characters(every: Comparisons, at: int) -> int:
    return len(every.prompts[at]) + len(every.better[at]) + len(every.worse[at])


def picked(every: Comparisons, places: Sequence[int]) -> Comparisons:
    """The comparisons at some places."""
    columns = (every.prompts, every.better, every.worse, every.part)
    prompts, better, worse, part = ([column[at] for at in places] for column in columns)
    return Comparisons(prompts=prompts, better=better, worse=worse, part=part)


def described(own: Comparisons) -> dict[str, Any]:
    """What the tables need of comparisons, without their texts."""
    return {
        "request": [hashlib.sha256(x.encode()).hexdigest()[:12] for x in own.prompts],
        "part": list(own.part),
        "better_words": [len(text.split()) for text in own.better],
        "worse_words": [len(text.split()) for text in own.worse],
    }


# ------------------------------------------------------------------------------ judges


Ask = Callable[[Comparisons], Verdicts]


@dataclass(frozen=True, kw_only=True)
class ServedJudge(Endpoint):
    """A judge behind this command's own server: its answers are found again at any port."""

    @property
    def identity(self) -> str:
        """Model and template."""
        return f"served {self.model} {self.template.fingerprint}"


def one_by_one(annotator: JudgeAnnotator, own: Comparisons) -> Verdicts:
    """Verdicts with both orders of a comparison in turn, so that a server reuses their prefix."""
    found = [
        annotator.preferences([prompt], [better], [worse])
        for prompt, better, worse in zip(own.prompts, own.better, own.worse, strict=True)
    ]
    orders = [one.by_order for one in found if one.by_order is not None]
    return Verdicts(
        preference=np.concatenate([one.preference for one in found]),
        reasons=tuple(reason for one in found for reason in one.reasons),
        by_order=np.concatenate(orders),
    )


def in_table(verdicts: Verdicts) -> dict[str, Any]:
    """A row's entry of verdicts on (better, worse)."""
    orders = verdicts.by_order

    def number(value: float) -> float | None:
        return float(value) if np.isfinite(value) else None

    return {
        "preference": list(map(number, verdicts.preference)),
        "by_order": None if orders is None else [list(map(number, pair)) for pair in orders],
        "reasons": dict(verdicts.failures),
    }


def judged(rows: Rows, name: str, sets: Mapping[str, Comparisons], ask: Ask, **more: Any) -> None:
    """Ask a judge about all sets and write its row."""
    began = time.perf_counter()
    entries = {label: in_table(ask(own)) for label, own in sets.items()}
    rows.write(name, {"sets": entries, "seconds": time.perf_counter() - began, **more})


def by_question(
    rows: Rows,
    judge: str,
    splits: tuple[Mapping[str, Comparisons], Mapping[str, Comparisons]],
    ask: Callable[[Path | None], Ask],
    cost: Callable[[], dict[str, Any]],
) -> None:
    """Choose the question on the first split, then judge the second with it."""
    for name, template in QUESTIONS.items():
        if question_row(judge, name) not in rows:
            judged(rows, question_row(judge, name), splits[0], ask(template))
    name = chosen_question(rows, judge)
    began, judge_by = time.perf_counter(), ask(QUESTIONS[name])
    entries = {label: in_table(judge_by(own)) for label, own in splits[1].items()}
    seconds = time.perf_counter() - began
    rows.write(judge, {"question": name, "sets": entries, "seconds": seconds, **cost()})


def ask_server(
    options: Options,
    rows: Rows,
    splits: tuple[Mapping[str, Comparisons], Mapping[str, Comparisons]],
) -> None:
    """The larger model, by log-probs of its first token."""
    assert options.judge is not None
    with served(options.judge) as name:
        url, model = split_address(name.removeprefix("openai:"), "judge")
        client = Client(url, workers=1, attempts=1, timeout=600.0)

        def ask(template: Path | None) -> Ask:
            endpoint = ServedJudge(
                client=client, model=model, template=read_template(template, CHAT)
            )
            kept = options.output / "answers.jsonl"
            annotator = JudgeAnnotator(judge=endpoint, answers_file=kept)
            return lambda own: one_by_one(annotator, own)

        by_question(rows, "server", splits, ask, lambda: dataclasses.asdict(client.usage))
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    row = rows["server"] | {"server_cpu_seconds": spent.ru_utime + spent.ru_stime}
    rows.write("server", row)


def ask_chat_model(
    options: Options,
    rows: Rows,
    splits: tuple[Mapping[str, Comparisons], Mapping[str, Comparisons]],
) -> None:
    """The small chat model, by log-probs of the labels."""

    def ask(template: Path | None) -> Ask:
        how = AnnotatorOptions(template=template, batch_size=8)
        annotator = make_annotator(f"lm:{options.model}", how)
        return lambda own: annotator.preferences(own.prompts, own.better, own.worse)

    by_question(rows, "lm", splits, ask, dict)


def likelihood(model: str) -> Ask:
    """The response with the larger log-prob per token after the request, in the chat template."""
    backend = LocalModel.load(model, batch_size=8)

    def ask(own: Comparisons) -> Verdicts:
        both = [side.strip() for side in (*own.better, *own.worse)]
        found = backend.score([*own.prompts, *own.prompts], both)
        means = np.array([one.log_prob / max(one.tokens, 1) for one in found])
        gap = means[: len(own)] - means[len(own) :]
        reasons = tuple("" if np.isfinite(one) else "too long" for one in gap)
        return Verdicts(preference=0.5 + 0.5 * np.sign(gap), reasons=reasons)

    return ask


# ------------------------------------------------------------------------------ reward model


def reward_settings(options: Options) -> TrainConfig:
    """Bradley-Terry by adapters on the chat model, on short pairs of UltraFeedback."""
    rule = OptimizerConfig(learning_rate=5e-4, schedule="cosine", warmup_fraction=0.1)
    return TrainConfig(
        name="reward_model",
        output=str(options.output),
        model=str(options.model),
        data=(str(options.output / "train.jsonl"),),
        eval_data=(str(options.output / "held_out.jsonl"),),
        max_length=448,
        lora=LoraConfig(rank=16, alpha=32.0),
        preference=PreferenceConfig(
            loss="bradley_terry", epochs=options.epochs, batch_size=8, optimizer=rule
        ),
    )


def write_pairs(options: Options) -> dict[str, int]:
    """Write the reward model's pairs, without those whose prompt judges are measured on.

    Returns:
      Numbers of pairs to train on and held out, and of those left out.
    """
    known = {_plain(prompt) for name in SETS.values() for prompt in read(name)[0].prompts}
    numbers, left_out = {}, 0
    for split, name in (("train", "ultrafeedback_train"), ("held_out", "ultrafeedback_eval")):
        kept = []
        for record in preference_records(
            str(DATA / "preferences" / f"{name}.jsonl"), bad_records="skip"
        ):
            pair = {x: str(getattr(record, x)) for x in ("prompt", "chosen", "rejected")}
            longer = max(len(pair["chosen"]), len(pair["rejected"]))
            if len(pair["prompt"]) + longer > options.pairs_longest:
                continue
            if _plain(pair["prompt"]) in known:
                left_out += 1
                continue
            kept.append(pair)
        options.output.mkdir(parents=True, exist_ok=True)
        write_json_lines(options.output / f"{split}.jsonl", kept)
        numbers[split] = len(kept)
    return numbers | {"left_out": left_out}


def _plain(prompt: str) -> str:
    return " ".join(prompt.lower().split())


def ask_reward_model(options: Options, rows: Rows, sets: Mapping[str, Comparisons]) -> None:
    """Train the reward model, measure it on held-out pairs of its own kind, and ask it."""
    numbers = write_pairs(options)
    settings = reward_settings(options)
    cpu = time.process_time()
    run = finished(settings)
    cpu = time.process_time() - cpu
    annotator = make_annotator(f"reward:{run}", AnnotatorOptions(batch_size=8))
    records = list(preference_records(str(options.output / "held_out.jsonl")))
    own = Comparisons(
        prompts=[str(x.prompt) for x in records],
        better=[str(x.chosen) for x in records],
        worse=[str(x.rejected) for x in records],
        part=["held out"] * len(records),
    )

    def ask(own: Comparisons) -> Verdicts:
        return annotator.preferences(own.prompts, own.better, own.worse)

    held_out = {"comparisons": described(own), "verdicts": in_table(ask(own))}
    judged(rows, "reward", sets, ask, pairs=numbers, held_out=held_out, training_cpu_seconds=cpu)


# ------------------------------------------------------------------------------ the command


def main(options: Options) -> None:
    """Ask the judges whose rows are missing, and write the sections of the README."""
    rows = Rows(folder=options.rows)
    if unknown := set(options.judges) - set(LABELS):
        raise UserError(f"judges: {', '.join(sorted(unknown))}: not one of {', '.join(LABELS)}")
    if options.model is not None or options.judge is not None:
        ask_missing(options, rows)
    for name, text in sections(rows).items():
        print(text)
        put(FOLDER, name, text)
    if names := [name for name in LABELS if name in rows]:
        plot(rows, names, rows["comparisons"]["number"], FOLDER / "small.png")


def ask_missing(options: Options, rows: Rows) -> None:
    """Ask the judges whose rows are missing, cheap ones first."""
    enable_compilation_cache()
    known_by = models_of(model=options.model, judge=options.judge)
    same_options(options.rows.with_name(f"{options.rows.name}_options.json"), known_by)
    splits = {label: drawn(label, options) for label in SETS}
    choice = {label: own[0] for label, own in splits.items()}
    every = {label: own[1] for label, own in splits.items()}
    main_ones = {label: picked(own, range(options.number)) for label, own in every.items()}
    known = {
        "number": options.number,
        "choice": {label: described(own) for label, own in choice.items()},
        "sets": {label: described(own) for label, own in every.items()},
    }
    if "comparisons" not in rows:
        rows.write("comparisons", known)
    elif rows["comparisons"] != known:
        raise UserError(f"{options.rows}: was made with other comparisons; set another --rows")
    wanted = [name for name in options.judges if name not in rows]
    for name in wanted:
        if name in ("first", "coin", "longer", "overlap"):
            annotator = make_annotator(f"rule:{FOLDER / 'rules.py'}:{name}")
            judged(
                rows,
                name,
                every,
                lambda own, by=annotator: by.preferences(own.prompts, own.better, own.worse),
            )
        elif name == "server" and options.judge is not None:
            ask_server(options, rows, (choice, main_ones))
        elif name == "lm" and options.model is not None:
            ask_chat_model(options, rows, (choice, main_ones))
        elif name == "likelihood" and options.model is not None:
            judged(rows, name, every, likelihood(options.model))
        elif name == "reward" and options.model is not None:
            ask_reward_model(options, rows, every)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except UserError as error:
        raise SystemExit(f"small: {error}") from None
