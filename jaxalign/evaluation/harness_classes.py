"""Classes of the lm-evaluation-harness for this package; only importable where it is installed."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports] (an extra)
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

from jaxalign.backends.local import LocalModel
from jaxalign.errors import UserError
from jaxalign.evaluation.harness_requests import (
    chat_text,
    log_likelihoods,
    longest,
    responses,
    rolling_log_likelihoods,
)


class HarnessModel(LM):
    """An `lm_eval.api.model.LM`; the harness's requests have their arguments in `args`.

    Args:
      model: loaded with `chat="never"`: the harness makes the texts.
    """

    def __init__(self, model: LocalModel):
        super().__init__()
        self.model, self.tokenizer = model, model.tokenizer

    @property
    def max_length(self) -> int:
        """Number of tokens that the model reads at most."""
        return longest(self.model)

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-prob of each continuation, and whether greedy decoding writes it."""
        return log_likelihoods(self.model, [request.args for request in requests])

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-prob of each text."""
        return rolling_log_likelihoods(self.model, [request.args[0] for request in requests])

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """A response to each context."""
        return responses(self.model, [request.args for request in requests])

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The chat template, which the harness records; a name is of one of several."""
        template: Any = self.tokenizer.chat_template
        if isinstance(template, dict):
            name = chat_template if isinstance(chat_template, str) else "default"
            return template.get(name)
        return template if chat_template else None

    def apply_chat_template(
        self, chat_history: Sequence[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text."""
        return chat_text(self.model, chat_history, add_generation_prompt=add_generation_prompt)


class TaskLoader(TaskManager):
    """A `TaskManager` that says in one line what is wrong with a task file or its data."""

    def load(self, task_list: Any) -> Any:
        """The tasks of these names.

        Args:
          task_list: names or paths.

        Raises:
          UserError: a task cannot be loaded.
        """
        try:
            return super().load(task_list)
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"tasks: {', '.join(task_list)}: cannot be loaded: {lines[0]}"
            ) from error

    def matching(self, task: str) -> list[str]:
        """The names of tasks, groups and tags that a pattern stands for; a file stands for itself.

        Args:
          task: a name, with * and ?, or the path of a task file.
        """
        return [task] if Path(task).is_file() else self.match_tasks([task])

    def names(self, tasks: Sequence[str]) -> list[str]:
        """Names of tasks, with those that patterns stand for.

        Args:
          tasks: names, with * and ?, or paths of task files.

        Raises:
          UserError: there is no such task.
        """
        names: list[str] = []
        for task in tasks:
            found = self.matching(task)
            if not found:
                raise UserError(
                    f"tasks: there is no task {task!r}; see lm-eval ls tasks, or set --tasks-folder"
                )
            names += found
        return list(dict.fromkeys(names))


def task_loader(tasks: Sequence[str], folder: str | None) -> TaskLoader:
    """A loader that knows these tasks.

    The harness's own thousands of task files are read only if a task is not in the folder.

    Args:
      tasks: names, with * and ?, or paths of task files.
      folder: of task files besides the harness's own; None: there is none.
    """
    own = TaskLoader(include_path=folder, include_defaults=False)
    found = [own.matching(task) for task in tasks]
    known = {*own.all_subtasks, *(task for task in tasks if Path(task).is_file())}
    if all(found) and known.issuperset(itertools.chain.from_iterable(found)):
        return own
    return TaskLoader(include_path=folder)
