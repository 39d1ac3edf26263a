"""Annotators by name: who says which of two responses is better."""

from collections.abc import Callable
from typing import Any

from jaxalign.errors import UserError
from jaxalign.evaluation.verdicts import Annotator, AnnotatorOptions, JudgeAnnotator, Verdicts

__all__ = ["KINDS", "Annotator", "AnnotatorOptions", "Verdicts", "make_annotator"]


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
