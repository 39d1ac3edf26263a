"""Tasks of EleutherAI's lm-evaluation-harness, run with a model of this package.

The harness (extra `lm-eval`) is imported when it is used. It needs neither PyTorch nor the network
for tasks on local files.
"""

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxalign.backends.local import LocalModel
from jaxalign.errors import UserError

BOOTSTRAP = 1000
"""Number of resamples for standard errors without a closed form."""


def harness_model(model: LocalModel) -> Any:
    """The model as an `lm_eval.api.model.LM`, for the harness's own functions.

    Args:
      model: loaded with `chat="never"`: the harness makes the texts.

    Raises:
      UserError: the harness is not installed.
    """
    with _installed():
        from jaxalign.evaluation.harness_classes import HarnessModel
    return HarnessModel(model)


def run_tasks(
    model: LocalModel,
    tasks: Sequence[str],
    *,
    folder: str | Path | None = None,
    limit: int | None = None,
    few_shot: int | None = None,
    chat: bool = False,
    few_shot_turns: bool = True,
) -> Mapping[str, Any]:
    """Run tasks of the harness.

    Args:
      model: loaded with `chat="never"`: the harness makes the texts.
      tasks: names of tasks, groups or tags, with * and ?, or paths of task files.
      folder: of task files besides the harness's own, looked up first.
      limit: largest number of documents of each task, counted from the first; None: all.
      few_shot: number of examples before a question; None: the task's own. A task that fixes 0
        keeps it.
      chat: whether texts go through the tokenizer's chat template.
      few_shot_turns: whether the examples are turns of the conversation; if not, they are in the
        user's turn.

    Returns:
      What `lm_eval.simple_evaluate` returns, with the values of every document.

    Raises:
      UserError: the harness is not installed, or a task cannot be loaded.
    """
    with _installed():
        from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports] (an extra)

        from jaxalign.evaluation.harness_classes import HarnessModel, task_loader
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"tasks_folder: {folder} is not a folder")
    loader = task_loader(tasks, None if folder is None else str(folder))
    with _subdued():
        return simple_evaluate(
            model=HarnessModel(model),
            tasks=loader.names(tasks),
            task_manager=loader,
            limit=limit,
            num_fewshot=few_shot,
            apply_chat_template=chat,
            fewshot_as_multiturn=few_shot_turns and chat,
            bootstrap_iters=BOOTSTRAP,
        )


def check_installed() -> None:
    """Raise `UserError` if the harness is not installed; it is not imported."""
    with _installed():
        if importlib.util.find_spec("lm_eval") is None:
            raise ModuleNotFoundError("No module named 'lm_eval'")


@contextlib.contextmanager
def _installed() -> Iterator[None]:
    """Context of an import of the harness."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f'tasks: need the lm-evaluation-harness; pip install "jaxalign[lm-eval]" ({error})'
        ) from None


@contextlib.contextmanager
def _subdued() -> Iterator[None]:
    """Context in which the harness does not fork and does not list the defaults of tasks.

    The threads of JAX do not survive a fork.
    """
    switch, log = "DISABLE_MULTIPROC", logging.getLogger("lm_eval.api.task")
    before, level = os.environ.get(switch), log.level
    os.environ[switch] = "1"
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
        if before is None:
            del os.environ[switch]
        else:
            os.environ[switch] = before
