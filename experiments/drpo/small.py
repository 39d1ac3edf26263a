"""A search for the system prompt of a small chat model, with a larger one as optimiser and judge.

Command:  python -m experiments.drpo.small --model SmolLM2-135M-Instruct.Q4_1.gguf
          --judge Qwen2.5-Coder-1.5B-Instruct.gguf [--cells search/beam answers ...]
          python -m experiments.drpo.small --page
Needs:    two GGUF files, and llama.cpp's server for both (pip install xllamacpp)
Time:     half an hour to an hour on one CPU core; finished cells are rows, which are not run again
Expect:   the section "A real chat model" of this folder's README, small.png, found/

Four searches use the same number of the larger model's answers, proposals and rewards together,
on DRPO's released queries; none sees the held-out prompts of just-eval. The judge's scores are the
means over its log-probs of 1 to 5 under each criterion; its written scores have their own cell.
"""

import argparse
import contextlib
import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from experiments.drpo.paper import PROMPTS, QUALITY_PROMPTS, read_urial
from experiments.drpo.small_tables import (
    FIRST,
    LABELS,
    MODELS,
    SEARCHES,
    mean_score,
    plot,
    write_page,
)
from experiments.rows import Rows, models_of, same_options
from experiments.runs import DATA
from experiments.served import served
from jaxalign.backends import Backend, BackendOptions, Cached, Decoding, make_backend
from jaxalign.backends.cached import AnswerFile
from jaxalign.backends.local import LocalModel
from jaxalign.backends.structured import StructuredClient
from jaxalign.data import PromptRecord
from jaxalign.errors import UserError
from jaxalign.evaluation.just_eval import QUALITY
from jaxalign.prompting import (
    AskedReward,
    PromptArtefact,
    PromptSearch,
    ScoredReward,
    optimize_prompt,
    read_artefact,
)
from jaxalign.prompting.composing import compose, without_marks

FOLDER = Path(__file__).parent
SHORT = 60
"""Characters of a query or held-out prompt."""
ANSWER = 64
"""Most tokens of an answer."""
WRITTEN = 320
"""Most tokens of a proposal, and of a written judgement."""
VALIDATE = 4
"""Fresh queries on which a search's last prompts and its first one are compared."""
BUDGET = 21
"""Answers of the larger model that a search may use: proposals, and rewards before `VALIDATE`."""
WRITTEN_JUDGEMENTS = 6


@dataclass(frozen=True, kw_only=True)
class Study:
    """Models and folders of the command."""

    model: Path
    judge: Path
    rows: Rows
    name: str = "smollm2"
    """Beginning of the rows' names."""
    layout: Literal["chat", "continue"] = "chat"
    output: Path = Path("runs/drpo_small")
    """Folder of the searches and of all models' answers."""
    found: Path = FOLDER / "found"
    """Folder of the prompts and their pages."""
    held_out: int = 16
    """Number of held-out prompts."""
    port: int = 18470
    """Of the model's server; the judge's is the next."""

    @property
    def options(self) -> BackendOptions:
        """One request after the other, so that a server keeps the prefix of the last one."""
        return BackendOptions(workers=1, timeout=1800.0, completions=self.layout == "continue")


# ------------------------------------------------------------------------------ texts


def queries() -> list[str]:
    """The short ones among DRPO's released queries, of its two sources in turn."""
    folder = DATA / "drpo"
    alpaca = json.loads((folder / "alpaca_train.json").read_text(encoding="utf-8"))
    lima = json.loads((folder / "lima_subsample_train.json").read_text(encoding="utf-8"))
    parts = [[row["instruction"] for row in alpaca], [row["query"] for row in lima]]
    own = [[text.strip() for text in part if is_short(text)] for part in parts]
    places = [((at + 0.5) / len(part), text) for part in own for at, text in enumerate(part)]
    return list(dict.fromkeys(text for _, text in sorted(places)))


def is_short(text: str) -> bool:
    """Whether a prompt is one short line."""
    return len(text.strip()) <= SHORT and "\n" not in text.strip()


def held_out(number: int) -> list[tuple[str, str]]:
    """Short prompts of just-eval for quality, evenly from all of them, and GPT-4's answers.

    Args:
      number: of prompts.
    """
    rows = json.loads((DATA / PROMPTS).read_text(encoding="utf-8"))[:QUALITY_PROMPTS]
    known = {text.lower() for text in queries()}
    every = [
        (row["instruction"].strip(), row["output"])
        for row in rows
        if is_short(row["instruction"]) and row["instruction"].strip().lower() not in known
    ]
    return [every[(2 * at + 1) * len(every) // (2 * number)] for at in range(number)]


def overlap(answer: str, reference: str) -> float:
    """F1 of an answer's words and those that a reference answer begins with, as many.

    Args:
      answer: of the model.
      reference: of another model; what is longer than the answer is not read.
    """
    own = re.findall(r"\w+", answer.lower())
    other = re.findall(r"\w+", reference.lower())[: len(own)]
    if not own or not other:
        return 0.0
    return 2 * (Counter(own) & Counter(other)).total() / (len(own) + len(other))


# ------------------------------------------------------------------------------ cells


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A study whose servers run."""

    study: Study
    model: str
    """Name of the model for jaxalign."""
    judge: str

    def backend(self, name: str) -> Cached:
        """A model whose answers are kept."""
        answers = AnswerFile(self.study.output / "answers.jsonl")
        return Cached(make_backend(name, self.study.options), answers)


@contextlib.contextmanager
def running(study: Study) -> Iterator[Bench]:
    """Context in which both models answer.

    Args:
      study: with their files; a model that is no GGUF file runs in this process.
    """
    with contextlib.ExitStack() as stack:
        model = str(study.model)
        if study.model.suffix == ".gguf":
            model = stack.enter_context(served(study.model, port=study.port))
        judge = stack.enter_context(served(study.judge, port=study.port + 1))
        yield Bench(study=study, model=model, judge=judge)


def search(bench: Bench, name: str) -> None:
    """A search, its prompt and its page.

    Args:
      bench: the models.
      name: of the search.
    """
    study = bench.study
    folder = study.output / f"{study.name}_{name}"
    folder.mkdir(parents=True, exist_ok=True)
    answers = folder / "answers.jsonl"
    if not answers.is_symlink():  # the searches share what they request alike
        answers.symlink_to(Path("..") / "answers.jsonl")
    resumed = (folder / "tree.jsonl").exists()
    settings = PromptSearch(
        model=bench.model,
        evaluator=f"scored:{bench.judge}",
        optimizer=bench.judge,
        search=name,  # pyright: ignore[reportArgumentType] (a name of SEARCHES)
        more_depth=0,
        examples=0,
        iterations=0,
        validate=VALIDATE,
        first_prompt=FIRST,
        layout=study.layout,
        max_tokens=ANSWER,
        judge_tokens=WRITTEN,
        **SEARCHES[name],
    )
    begin = time.monotonic()
    result = optimize_prompt(settings, [], queries(), folder, options=study.options)
    assert result.search is not None
    nodes, usage = result.search.nodes, result.usage[bench.judge]
    path = result.search.path(result.search.best)
    study.found.mkdir(parents=True, exist_ok=True)
    artefact = f"{study.name}_{name}"
    shutil.copy(folder / "prompt.json", study.found / f"{artefact}.json")
    shutil.copy(folder / "index.html", study.found / f"{artefact}.html")
    row = {
        "model": study.name,
        "search": name,
        "settings": SEARCHES[name] | {"validate": VALIDATE, "answer_tokens": ANSWER},
        "minutes": (time.monotonic() - begin) / 60,
        "resumed": resumed,
        "counts": dict(result.counts),
        "judge_requests": usage.requests,
        "judge_prompt_tokens": usage.prompt_tokens,
        "judge_written_tokens": usage.completion_tokens,
        "prompts": len({node.state["prompt"] for node in nodes}),
        "path": [{"reward": node.reward, "prompt": node.state["prompt"]} for node in path],
        "validation": [
            {"prompt": prompt, "mean": mean, "number": number}
            for prompt, mean, number in result.validation
        ],
        "prompt": result.artefact.system_prompt,
    }
    study.rows.write(f"{study.name}_search_{name}", row)


def artefact_of(study: Study, name: str) -> PromptArtefact:
    """The prompt of a row of the table.

    Raises:
      UserError: its search was not run.
    """
    if name == "none":
        return PromptArtefact(system_prompt="", shown=0, layout=study.layout)
    if name == "one_line":
        return PromptArtefact(system_prompt=FIRST, shown=0, layout=study.layout)
    if name == "urial":
        return replace(read_urial(), layout=study.layout)
    return read_artefact(study.found / f"{study.name}_{name}.json")


def answers(bench: Bench, name: str) -> None:
    """Answers to the held-out prompts with a prompt, and all that is measured of them.

    Args:
      bench: the models.
      name: of the row in the table.
    """
    study = bench.study
    prompts = held_out(study.held_out)
    texts = [text for text, _ in prompts]
    records = [PromptRecord(prompt=x, source="just-eval", line=n) for n, x in enumerate(texts)]
    begin = time.monotonic()
    model = bench.backend(bench.model)
    asked, decoding = compose(artefact_of(study, name), model, records, Decoding(max_tokens=ANSWER))
    given = [one for [one] in model.generate(asked, decoding)]
    if failed := [one.failure for one in given if one.failure]:
        raise UserError(f"{bench.model}: {len(failed)} answers failed, e.g. {failed[0]}")
    outputs = [without_marks(one.text) for one in given]
    judge = bench.backend(bench.judge)
    rated = ScoredReward(judge, criteria=QUALITY)(texts, outputs)
    if failed := [one.failure for one in rated if one.failure]:
        raise UserError(f"{bench.judge}: {len(failed)} answers have no scores, e.g. {failed[0]}")
    row = {
        "model": study.name,
        "prompt": name,
        "minutes": (time.monotonic() - begin) / 60,
        "answers": [
            {
                "prompt": prompt,
                "answer": output,
                "tokens": one.tokens,
                "finished": one.finished,
                "scores": dict(scores.scores),
                "overlap": overlap(output, reference),
            }
            for (prompt, reference), output, one, scores in zip(
                prompts, outputs, given, rated, strict=True
            )
        ],
    }
    study.rows.write(f"{study.name}_answers_{name}", row)


def written(bench: Bench) -> None:
    """Criteria that the judge chooses and scores that it writes, of the first answers.

    Args:
      bench: the models.
    """
    study = bench.study
    rows = study.rows[f"{study.name}_answers_none"]["answers"]
    rows = rows[:: max(1, len(rows) // WRITTEN_JUDGEMENTS)][:WRITTEN_JUDGEMENTS]
    begin = time.monotonic()
    client = StructuredClient(bench.backend(bench.judge), Decoding(max_tokens=WRITTEN), attempts=1)
    found = AskedReward(client)([r["prompt"] for r in rows], [r["answer"] for r in rows])
    row = {
        "model": study.name,
        "minutes": (time.monotonic() - begin) / 60,
        "asked": dict(client.asked),
        "unreadable": dict(client.malformed),
        "judgements": [
            {
                "prompt": row["prompt"],
                "scores": dict(one.scores),
                "failure": one.failure,
                "log_probs": mean_score(row),
            }
            for row, one in zip(rows, found, strict=True)
        ],
    }
    study.rows.write(f"{study.name}_written", row)


def likelihood(study: Study) -> None:
    """Log-probs of all answers under the model without a prompt.

    Args:
      study: whose rows have the answers.
    """
    model: Backend = LocalModel.load(study.model)
    for name in LABELS:
        label = f"{study.name}_likelihood_{name}"
        if (source := f"{study.name}_answers_{name}") not in study.rows or label in study.rows:
            continue
        rows = [row for row in study.rows[source]["answers"] if row["answer"]]
        bare = artefact_of(study, "none")
        records = [
            PromptRecord(prompt=row["prompt"], source="just-eval", line=at)
            for at, row in enumerate(rows)
        ]
        prompts, _ = compose(bare, model, records, Decoding(max_tokens=ANSWER))
        scores = model.score(prompts, [row["answer"] for row in rows])
        study.rows.write(
            label,
            {
                "log_prob": {
                    row["prompt"]: one.log_prob / one.tokens
                    for row, one in zip(rows, scores, strict=True)
                }
            },
        )


def cells() -> list[str]:
    """All cells, in the order of their importance."""
    plan = ["search/beam", "answers/none", "answers/one_line", "answers/beam", "answers/urial"]
    for name in ("gepa", "greedy", "monte-carlo"):
        plan += [f"search/{name}", f"answers/{name}"]
    return [*plan, "written", "likelihood"]


def is_done(study: Study, cell: str) -> bool:
    """Whether a cell's rows are there."""
    kind, _, name = cell.partition("/")
    if kind == "likelihood":
        return all(
            f"{study.name}_likelihood_{one}" in study.rows
            for one in LABELS
            if f"{study.name}_answers_{one}" in study.rows
        )
    return "_".join(filter(None, (study.name, kind, name))) in study.rows


def run(study: Study, chosen: Sequence[str]) -> None:
    """Run the cells that have no row yet.

    Args:
      study: models and folders.
      chosen: beginnings of the names of the cells; none: all.
    """
    plan = [one for one in cells() if not chosen or one.startswith(tuple(chosen))]
    if not plan:
        raise UserError(f"--cells: none begins so; there are {', '.join(cells())}")
    path = study.rows.folder.with_name(f"{study.rows.folder.name}_options.json")
    same_options(path, models_of(**{f"model {study.name}": study.model, "judge": study.judge}))
    asking = [one for one in plan if one != "likelihood" and not is_done(study, one)]
    if asking:
        with running(study) as bench:
            for cell in asking:
                kind, _, name = cell.partition("/")
                if kind == "written":
                    written(bench)
                else:
                    {"search": search, "answers": answers}[kind](bench, name)
    if "likelihood" in plan and not is_done(study, "likelihood"):
        likelihood(study)


def main() -> None:
    """Run the cells that are missing, and write the section and the figure."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--model", type=Path, help="whose prompt: GGUF file or folder")
    flags.add_argument("--judge", type=Path, help="optimiser and judge: GGUF file")
    flags.add_argument("--name", default="smollm2", choices=list(MODELS), help="of the rows")
    flags.add_argument("--layout", default="chat", choices=["chat", "continue"])
    flags.add_argument("--cells", nargs="+", default=(), help="beginnings of cells (default: all)")
    flags.add_argument("--held-out", type=int, default=16, help="held-out prompts")
    flags.add_argument("--output", type=Path, default=Path("runs/drpo_small"))
    flags.add_argument("--rows", type=Path, default=FOLDER / "rows", help="folder of the rows")
    flags.add_argument("--port", type=int, default=18470, help="of two servers: it and the next")
    flags.add_argument("--page", action="store_true", help="only the section and the figure")
    given = flags.parse_args()
    rows = Rows(folder=given.rows)
    if not given.page:
        if given.model is None or given.judge is None:
            flags.error("--model and --judge are needed, or --page")
        study = Study(
            model=given.model,
            judge=given.judge,
            name=given.name,
            layout=given.layout,
            output=given.output,
            rows=rows,
            held_out=given.held_out,
            port=given.port,
        )
        run(study, given.cells)
    models = [name for name in MODELS if f"{name}_answers_none" in rows]
    if models:
        print(write_page(rows))
        plot(rows, models)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"small: {error}") from None
