"""Annotators by name: who says which of two responses is better."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxalign.data.plain_prompts import Chat
from jaxalign.errors import UserError
from jaxalign.evaluation.verdicts import Annotator, JudgeAnnotator, Verdicts, as_they_come

__all__ = ["KINDS", "Annotator", "AnnotatorOptions", "Verdicts", "make_annotator"]


@dataclass(frozen=True, kw_only=True)
class AnnotatorOptions:
    """What kinds of annotators may be told besides their name; each reads what it needs."""

    template: Path | None = None
    """File with {prompt}, {first} and {second}: the question to a language model."""
    tokenizer: str | None = None
    """Folder or hub name (default: the model's)."""
    max_length: int | None = None
    """Most tokens of a question (default: the model's context)."""
    batch_size: int = 8
    """Comparisons at a time, of models that run here."""
    dtype: str = "float32"
    """Of such a model's parameters."""
    reward_rows: Literal["template", "end_token"] | None = None
    """How rows of a reward model from elsewhere end (default: as its chat template writes them)."""
    chat: Chat = "auto"
    """Whether a model reads its tokenizer's chat template; auto: where it has one."""
    workers: int = 8
    """Requests at a time, to an endpoint."""
    timeout: float = 60.0
    """Seconds for a request."""
    attempts: int = 4
    """For each comparison, at an endpoint."""
    answers_file: Path | None = None
    """JSON Lines where answers are kept and found again; None keeps nothing."""
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = as_they_come
    """Put around the answers and their number, to show how far it is."""


def _of_judge(judge: Any, options: AnnotatorOptions) -> Annotator:
    return JudgeAnnotator(judge=judge, answers_file=options.answers_file, progress=options.progress)


def _rule(name: str, options: AnnotatorOptions) -> Annotator:
    from jaxalign.evaluation.rules import RuleAnnotator, rule

    judge = rule(name)
    annotator = _of_judge(judge, options)
    return RuleAnnotator(rule=judge, annotator=annotator) if judge.order_free else annotator


def _endpoint(address: str, options: AnnotatorOptions) -> Annotator:
    from jaxalign.evaluation.endpoints import endpoint

    judge = endpoint(
        address,
        template=options.template,
        workers=options.workers,
        timeout=options.timeout,
        attempts=options.attempts,
    )
    return _of_judge(judge, options)


def _language_model(folder: str, options: AnnotatorOptions) -> Annotator:
    from jaxalign.evaluation.language_models import language_model

    judge = language_model(
        folder,
        template=options.template,
        tokenizer=options.tokenizer,
        max_length=options.max_length,
        batch_size=options.batch_size,
        dtype=options.dtype,
        chat=options.chat,
    )
    return _of_judge(judge, options)


def _reward_model(folder: str, options: AnnotatorOptions) -> Annotator:
    from jaxalign.evaluation.reward_models import RewardModel

    given = {name: getattr(options, name) for name in ("chat", "batch_size", "dtype")}
    return RewardModel.load(folder, rows=options.reward_rows, **given)


def _preference_model(folder: str, options: AnnotatorOptions) -> Annotator:
    from jaxalign.evaluation.reward_models import PreferenceModel

    given = {name: getattr(options, name) for name in ("chat", "batch_size", "dtype")}
    return PreferenceModel.load(folder, **given)


def _aspects(name: str, options: AnnotatorOptions) -> Annotator:
    from jaxalign.evaluation.just_eval import AspectAnnotator, aspect_reward

    return AspectAnnotator(reward=aspect_reward(name, options))


KINDS: dict[str, tuple[Callable[[str, AnnotatorOptions], Annotator], str]] = {
    "rule": (_rule, "FILE.py:FUNCTION"),
    "openai": (_endpoint, "URL#MODEL"),
    "lm": (_language_model, "FOLDER"),
    "reward": (_reward_model, "FOLDER"),
    "preference": (_preference_model, "FOLDER"),
    "aspects": (_aspects, "FOLDER|scored:FOLDER|openai:URL#MODEL"),
}
"""Kind -> what makes an annotator of the rest of its name, and the form of that rest. Each imports
what it needs when it is called: a rule starts without JAX."""


def make_annotator(spec: str, options: AnnotatorOptions | None = None) -> Annotator:
    """The annotator that a name stands for.

    Args:
      spec: "rule:FILE.py:FUNCTION", "openai:URL#MODEL", "lm:FOLDER", "aspects:MODEL" (each response
        is scored by itself; see `just_eval`), or what `jaxalign train` made
        with --loss bradley_terry, "reward:FOLDER", or preference_model, "preference:FOLDER".
      options: what else it may need.

    Raises:
      UserError: there is no such kind, or the kind cannot make anything of the rest.
    """
    kind, _, rest = spec.partition(":")
    if kind not in KINDS or not rest:
        known = ", ".join(f"{name}:{form}" for name, (_, form) in KINDS.items())
        raise UserError(f"judge: {spec!r} is none of {known}")
    make, _ = KINDS[kind]
    return make(rest, options or AnnotatorOptions())
