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

from experiments.gradient_entanglement.runs import DATA, finished
from experiments.judging.compare import SETS, SHORT, Comparisons, cell, read, right, share
from experiments.page import put, table
from experiments.served import served
from experiments.short_runs import Rows
from jaxalign.backends.client import Client, split_address
from jaxalign.backends.local import LocalModel
from jaxalign.config import LoraConfig, OptimizerConfig, PreferenceConfig, TrainConfig
from jaxalign.data import preference_records
from jaxalign.errors import UserError
from jaxalign.evaluation import AnnotatorOptions, Verdicts, agreement, make_annotator, win_rate
from jaxalign.evaluation.endpoints import Endpoint
from jaxalign.evaluation.templates import CHAT, read_template
from jaxalign.evaluation.verdicts import JudgeAnnotator
from jaxalign.files import write_json_lines
from jaxalign.models.devices import enable_compilation_cache

FOLDER = Path(__file__).parent
QUESTIONS: dict[str, Path | None] = {
    "default": None,
    "short": SHORT,
    "short, for chat": FOLDER / "short_chat.txt",
}
"""Name of a question -> its template; None: the one that is built in."""
LABELS = {
    "first": "always the first",
    "coin": "a coin",
    "longer": "the longer one",
    "overlap": "more of the request's words",
    "likelihood": "SmolLM2, log-prob a token",
    "lm": "SmolLM2, A or B",
    "reward": "reward model on SmolLM2",
    "server": "1.5B model, A or B",
}
"""Judges in the order of the tables."""
PLOTTED = ("longer", "likelihood", "reward", "server")


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


def from_row(entry: Mapping[str, Any], most: int | None = None) -> Verdicts:
    """The reverse of `in_table`, of the first `most` comparisons."""
    preference = np.array(entry["preference"], float)[:most]
    orders = entry["by_order"]
    return Verdicts(
        preference=preference,
        reasons=tuple("" if np.isfinite(one) else "no verdict" for one in preference),
        by_order=None if orders is None else np.array(orders, float)[:most],
    )


def judged(rows: Rows, name: str, sets: Mapping[str, Comparisons], ask: Ask, **more: Any) -> None:
    """Ask a judge about all sets and write its row."""
    began = time.perf_counter()
    entries = {label: in_table(ask(own)) for label, own in sets.items()}
    rows.write(name, {"sets": entries, "seconds": time.perf_counter() - began, **more})


def question_row(judge: str, name: str) -> str:
    """The name of the row of a question to a judge."""
    return f"question_{judge}_{'_'.join(name.replace(',', '').split())}"


def chosen_question(rows: Rows, judge: str) -> str:
    """The question that people's choice agrees with most; of equal ones the more consistent."""

    def quality(name: str) -> tuple[float, float]:
        entries = rows[question_row(judge, name)]["sets"].values()
        agreed = np.concatenate([right(from_row(one)) for one in entries])
        same = [from_row(one).order_consistency or 0.0 for one in entries]
        unread = np.isnan(agreed)
        return float(np.mean(np.where(unread, 0.5, agreed))), float(np.mean(same))

    return max(QUESTIONS, key=quality)


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


# ------------------------------------------------------------------------------ the page


def together(rows: Rows, name: str, most: int | None = None) -> tuple[Verdicts, dict[str, Any]]:
    """A judge's verdicts on all sets, and what is known of the comparisons."""
    entries = rows[name]["sets"]
    known = rows["comparisons"]["sets"]
    parts = [from_row(entries[label], most) for label in SETS]
    counts = [len(part.preference) for part in parts]
    columns = {
        field: [x for label, n in zip(SETS, counts, strict=True) for x in known[label][field][:n]]
        for field in ("request", "part", "better_words", "worse_words")
    }
    columns["set"] = [label for label, n in zip(SETS, counts, strict=True) for _ in range(n)]
    orders = [part.by_order for part in parts if part.by_order is not None]
    whole = Verdicts(
        preference=np.concatenate([part.preference for part in parts]),
        reasons=sum((part.reasons for part in parts), ()),
        by_order=np.concatenate(orders) if orders else None,
    )
    return whole, columns


def lead(columns: Mapping[str, Any]) -> np.ndarray:
    """Words of the better response less those of the other."""
    return np.array(columns["better_words"]) - np.array(columns["worse_words"])


def one_order(verdicts: Verdicts) -> float | None:
    """Agreement of a judge that is asked in one order alone: the mean over both."""
    if verdicts.by_order is None:
        return None
    said = np.sign(verdicts.by_order - 0.5)
    return float(np.nanmean(np.where(np.isfinite(said), 0.5 + 0.5 * said, np.nan)))


def subset(verdicts: Verdicts, columns: Mapping[str, Any], where: np.ndarray) -> str:
    """Agreement on some of the comparisons."""
    requests = [x for x, own in zip(columns["request"], where, strict=True) if own]
    return cell(right(verdicts)[where], requests)


def main_table(rows: Rows, names: Sequence[str], most: int | None) -> str:
    """Agreement by set and by which response is longer, and what depends on the order."""
    lines, counts = [], []
    for name in names:
        verdicts, columns = together(rows, name, most)
        sets, gap = np.array(columns["set"]), lead(columns)
        everything = np.ones(len(gap), bool)
        masks = [everything, *(sets == label for label in SETS), gap > 0, gap < 0]
        counts = [int(mask.sum()) for mask in masks]
        kappa = agreement(verdicts.preference, np.ones(len(gap))).kappa
        cells = [subset(verdicts, columns, mask) for mask in masks]
        orders = (
            one_order(verdicts),
            verdicts.order_consistency,
            verdicts.first_position_rate,
        )
        shown = ["", "", ""] if name in ("longer", "overlap", "coin") else map(share, orders)
        missing = str(sum(verdicts.failures.values()))
        lines.append([LABELS[name], cells[0], f"{kappa:.2f}", *cells[1:], *shown, missing])
    titles = ["all", *SETS, "better one is longer", "better one is shorter"]
    titles = [f"{title} ({n})" for title, n in zip(titles, counts, strict=True)]
    header = ["judge", titles[0], "kappa", *titles[1:]]
    header += ["one order", "same in both orders", "P(shown first)", "no verdict"]
    return table(header, lines)


def parts_table(rows: Rows, names: Sequence[str], most: int | None) -> str:
    """Agreement on the parts of LLMBar, by family."""
    _, columns = together(rows, names[0], most)
    families = [
        part.split()[0] if label == "LLMBar" else ""
        for part, label in zip(columns["part"], columns["set"], strict=True)
    ]
    lines = []
    for family in sorted(set(families) - {""}):
        where = np.array([one == family for one in families])
        found = [subset(together(rows, name, most)[0], columns, where) for name in names]
        lines.append([family, str(int(where.sum())), *found])
    return table(["LLMBar", "number", *(LABELS[name] for name in names)], lines)


def questions_table(rows: Rows) -> str:
    """What was seen when the question was chosen."""
    lines = []
    for judge in ("lm", "server"):
        for name in QUESTIONS:
            if question_row(judge, name) not in rows:
                continue
            entries = rows[question_row(judge, name)]["sets"].values()
            found = [from_row(one) for one in entries]
            agreed = np.concatenate([right(one) for one in found])
            orders = np.concatenate([x.by_order for x in found if x.by_order is not None])
            whole = Verdicts(preference=agreed, reasons=(), by_order=orders)
            known = agreed[np.isfinite(agreed)]
            mean = float(known.mean()) if len(known) else None
            numbers = mean, whole.order_consistency, whole.first_position_rate
            taken = "yes" if judge in rows and rows[judge]["question"] == name else ""
            missing = int(np.isnan(agreed).sum())
            lines.append([LABELS[judge], name, *map(share, numbers), str(missing), taken])
    header = ["judge", "question", "agreement", "same in both orders", "P(shown first)"]
    return table([*header, "no verdict", "chosen"], lines)


def cost_line(rows: Rows) -> str:
    """Requests, tokens and time of the server, and the reward model's data."""
    text = []
    if "server" in rows:
        row = rows["server"]
        text.append(
            f"The server answered {row['requests']:,} requests of {row['prompt_tokens']:,} tokens "
            f"(those of a reused prefix among them) with {row['completion_tokens']:,} tokens in "
            f"{row['server_cpu_seconds'] / 60:.1f} minutes of one core."
        )
    if "reward" in rows:
        row = rows["reward"]
        own, known = from_row(row["held_out"]["verdicts"]), row["held_out"]["comparisons"]
        gap = lead(known)
        shown = [subset(own, known, mask) for mask in (np.ones(len(gap), bool), gap > 0, gap < 0)]
        text.append(
            f"The reward model learnt from {row['pairs']['train']} pairs "
            f"({row['pairs']['left_out']} with a judged request left out) in "
            f"{row['training_cpu_seconds'] / 60:.1f} minutes; on {len(gap)} held-out pairs of "
            f"UltraFeedback it agrees in {shown[0]}: {shown[1]} where the chosen response is "
            f"longer ({int((gap > 0).sum())}), {shown[2]} where it is shorter "
            f"({int((gap < 0).sum())})."
        )
    return " ".join(text) + "\n"


def plot(rows: Rows, names: Sequence[str], most: int | None, path: Path) -> None:
    """Agreement by which response is longer, against length, and the 1.5B judge's two orders."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for at, name in enumerate(names):
        verdicts, columns = together(rows, name, most)
        gap = lead(columns)
        for shift, mask, colour in ((0.15, gap > 0, "C0"), (-0.15, gap < 0, "C1")):
            values = right(verdicts)[mask]
            values = values[np.isfinite(values)]
            low, middle, high = interval(values)
            error = [[middle - low], [high - middle]]
            axes[0].errorbar(middle, at + shift, xerr=error, fmt="o", color=colour)
    axes[0].set_yticks(range(len(names)), [LABELS[name] for name in names])
    axes[0].plot([], [], "oC0", label="better one is longer")
    axes[0].plot([], [], "oC1", label="better one is shorter")
    axes[0].axvline(0.5, color="grey", linewidth=0.8)
    axes[0].set(xlabel="agreement with people", xlim=(-0.02, 1.02))
    axes[0].legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=2)
    for name in (x for x in PLOTTED if x in names):
        verdicts, columns = together(rows, name, most)
        gap, values = lead(columns), right(verdicts)
        edges = np.quantile(gap, [0, 0.25, 0.5, 0.75, 1])
        groups = np.clip(np.searchsorted(edges, gap, side="right") - 1, 0, 3)
        means = [interval(values[(groups == x) & np.isfinite(values)]) for x in range(4)]
        places = [float(np.mean(gap[groups == x])) for x in range(4)]
        low, middle, high = np.array(means).T
        error = np.array([middle - low, high - middle])
        axes[1].errorbar(places, middle, yerr=error, fmt="o-", elinewidth=0.8, label=LABELS[name])
    axes[1].axhline(0.5, color="grey", linewidth=0.8)
    axes[1].axvline(0, color="grey", linewidth=0.8)
    axes[1].set(xlabel="words of the better less the other (means of quarters)")
    axes[1].set(ylabel="agreement with people", ylim=(-0.02, 1.02))
    for name, colour in (("lm", "C2"), ("server", "C3")):
        if name not in names:
            continue
        orders = together(rows, name, most)[0].by_order
        assert orders is not None
        axes[2].scatter(orders[:, 0], orders[:, 1], s=12, color=colour, label=LABELS[name])
    axes[2].plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    axes[2].set(xlabel="P(better) when it is shown first", ylabel="when it is shown second")
    axes[2].set(xlim=(0, 1), ylim=(0, 1))
    for axis in axes[1:]:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Low end, mean and high end of agreement; each comparison is of a request of its own."""
    found = win_rate(values)
    low, high = found.bootstrap
    return min(low, found.rate), found.rate, max(high, found.rate)


def section(rows: Rows) -> str:
    """The tables of the rows that are there."""
    names = [name for name in LABELS if name in rows]
    if not names:
        return ""
    number = rows["comparisons"]["number"]
    parts = [main_table(rows, names, number), parts_table(rows, names, number)]
    larger = [name for name in names if len(together(rows, name)[1]["request"]) > 2 * number]
    if larger:
        parts.append(
            "The same with further comparisons, for the judges that cost little:\n\n"
            + main_table(rows, larger, None)
        )
    parts += ["![agreement and length](small.png)\n", questions_table(rows), cost_line(rows)]
    return "\n".join(parts)


# ------------------------------------------------------------------------------ the command


def main(options: Options) -> None:
    """Ask the judges whose rows are missing, and write the section of the README."""
    rows = Rows(folder=options.rows)
    if unknown := set(options.judges) - set(LABELS):
        raise UserError(f"judges: {', '.join(sorted(unknown))}: not one of {', '.join(LABELS)}")
    if options.model is not None or options.judge is not None:
        ask_missing(options, rows)
    text = section(rows)
    print(text)
    if text:
        number = rows["comparisons"]["number"]
        plot(rows, [name for name in LABELS if name in rows], number, FOLDER / "small.png")
        put(FOLDER, "small", text)


def ask_missing(options: Options, rows: Rows) -> None:
    """Ask the judges whose rows are missing, cheap ones first."""
    enable_compilation_cache()
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
