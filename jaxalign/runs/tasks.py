"""Scores of a model on tasks of the lm-evaluation-harness, beside those of another model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxalign.backends.local import LocalModel
from jaxalign.data.plain_prompts import Chat
from jaxalign.errors import UserError
from jaxalign.evaluation.harness import check_installed, run_tasks
from jaxalign.evaluation.task_scores import TaskScore, compared, scores_of
from jaxalign.files import check_output, json_value, write_json
from jaxalign.reporting import read_run
from jaxalign.reporting.tasks import FILE, read_report
from jaxalign.runs.held_out import start_of_run


def evaluate_tasks(
    model: str,
    tasks: Sequence[str],
    *,
    tasks_folder: str | Path | None = None,
    reference: str | None = None,
    limit: int | None = None,
    few_shot: int | None = None,
    few_shot_turns: bool = True,
    chat: Chat = "auto",
    tokenizer: str | None = None,
    batch_size: int = 8,
    dtype: str = "float32",
    steer: str | None = None,
) -> dict[str, Any]:
    """Scores on tasks, with 95 % intervals; of a run also before it, and how they changed.

    The scores of a run are kept in its folder, for its report; those of a task replace its earlier
    ones.

    Args:
      model: Hugging Face folder, Hub name, run folder or GGUF file.
      tasks: names, patterns, or paths of task files, as in `run_tasks`.
      tasks_folder: of task files besides the harness's own.
      reference: the model from before; None: that from which a run was started, else none.
      limit: largest number of documents of each task.
      few_shot: number of examples before a question; None: the task's own.
      few_shot_turns: whether examples are turns of a conversation.
      chat: "always": texts go through the chat template.
      tokenizer: folder or Hub name; None: the models' own.
      batch_size: number of rows in a batch.
      dtype: of the computation.
      steer: steering vector and factor of the model, not of its reference.

    Returns:
      The report that `jaxalign.reporting.tasks` describes.

    Raises:
      UserError: the harness is not installed, or a model or task cannot be used.
    """
    for name in filter(None, (model, reference)):
        if name.startswith("openai:"):
            raise UserError(f"tasks: {name}: an endpoint has no log-probs of texts; give a folder")
    check_installed()
    run = Path(model) if (Path(model) / "metrics.jsonl").is_file() else None
    if run is not None:
        check_output(run / FILE, "--model")
        read_report(run)  # broken ones are found now
    reference = reference or start_of_run(Path(model))

    def scores(name: str, steer: str | None) -> list[TaskScore]:
        options = {"tokenizer": tokenizer, "batch_size": batch_size, "dtype": dtype}
        backend = LocalModel.load(name, steer=steer, chat="never", **options)
        results = run_tasks(
            backend,
            tasks,
            folder=tasks_folder,
            limit=limit,
            few_shot=few_shot,
            chat=chat == "always",
            few_shot_turns=few_shot_turns,
        )
        versions["lm_eval"] = results.get("lm_eval_version")
        return scores_of(results)

    versions: dict[str, Any] = {}
    after = scores(model, steer)
    before = None if reference is None else scores(reference, None)
    made = {"chat": chat == "always", "limit": limit, "model": model, "reference": reference}
    rows = [row | made | versions for row in compared(after, before)]
    report = json_value({"scores": rows})
    if run is not None:
        _keep(run, report)
    return report


def _keep(folder: Path, report: dict[str, Any]) -> None:
    """Write the scores to the run's folder, beside those of other tasks."""
    lines = read_run(folder).lines
    last = {"stage": lines[-1]["stage"], "step": lines[-1]["step"]} if lines else None
    rows = [row | {"at": last} for row in report["scores"]]
    tasks = {row["task"] for row in rows}
    earlier = (read_report(folder) or {"scores": []})["scores"]
    kept = [row for row in earlier if row["task"] not in tasks]
    write_json(folder / FILE, {"scores": [*kept, *rows]})
