"""Reward models and preference models as annotators: texts in, rewards and preferences out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float64

from jaxalign.data import (
    PromptResponseRecord,
    ScoreFormat,
    TokenizeReport,
    check_ids,
    check_vocabulary,
    comparison,
    load_tokenizer,
    read_format,
    tokenize_conversations,
    tokenize_responses,
)
from jaxalign.data.plain_prompts import Chat, reads_template
from jaxalign.data.records import Text
from jaxalign.data.tokenizers import Tokenizer
from jaxalign.errors import UserError
from jaxalign.evaluation.verdicts import Verdicts
from jaxalign.models import DecoderConfig, load_pretrained
from jaxalign.models.compute import Compute
from jaxalign.models.folders import exported
from jaxalign.models.score import ScoreModel, rewards
from jaxalign.sharding import batch_sharding, make_mesh
from jaxalign.training.step import on_mesh

SHORTEST = 32
"""Tokens of the shortest row that is compiled for; the others are its doublings."""
RewardRows = Literal["template", "end_token"]
NOT_FINITE = "the score is not a finite number"


class Scorer:
    """The scalars that a model with a head gives to texts, read as it was trained to read them.

    Rows are padded to `SHORTEST` times a power of two and come in batches of one size, so that the
    network is compiled once for each length.

    Args:
      model: its parameters and architecture.
      tokenizer: from `load_tokenizer`.
      form: how texts become rows.
      mesh: devices that hold the parameters and share each batch; None: the first one alone.
      batch_size: rows at a time; a multiple of the mesh's data x fsdp.
      dtype: of the computation.
    """

    def __init__(
        self,
        model: ScoreModel,
        tokenizer: Tokenizer,
        form: ScoreFormat,
        *,
        mesh: Mesh | None = None,
        batch_size: int = 16,
        dtype: str = "float32",
    ):
        self.form = form
        self.report = TokenizeReport()
        """Counts of all rows so far: prompts that lost their beginning among them."""
        mesh = make_mesh(devices=jax.local_devices()[:1]) if mesh is None else mesh
        self._params, self._tokenizer, self._batch_size = model.params, tokenizer, batch_size
        self._sharding, config, kind = batch_sharding(mesh), model.config, jnp.dtype(dtype)
        self._options, self._vocabulary = form.tokenize_options, config.vocab_size
        self._options["encoder_decoder"] = not isinstance(config, DecoderConfig)

        def scores(params: Any, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
            return rewards(params, config, tokens, lengths, compute=Compute(dtype=kind))

        self._scores = jax.jit(on_mesh(scores, mesh))

    def __call__(
        self, prompts: Sequence[Text], responses: Sequence[str]
    ) -> Float64[np.ndarray, " n"]:
        """The scalar of each response after its prompt.

        Args:
          prompts: n texts or conversations.
          responses: one to each.
        """
        scores = np.full(len(prompts), np.nan)
        records = [
            PromptResponseRecord(prompt=prompt, response=response, source="text", line=number)
            for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True), 1)
        ]
        if not records:
            return scores
        if self.form.whole_conversation:
            most = self.form.max_length
            rows, report = tokenize_conversations(records, self._tokenizer, max_length=most)
        else:
            rows, report = tokenize_responses(records, self._tokenizer, **self._options)
        check_ids(rows.flat, self._tokenizer, self._vocabulary)
        self.report.add(report)
        doublings = np.ceil(np.log2(np.maximum(rows.length / SHORTEST, 1))).astype(np.int64)
        for doubling in np.unique(doublings):
            members = np.flatnonzero(doublings == doubling)
            for at in range(0, len(members), self._batch_size):
                mine = members[at : at + self._batch_size]
                filled = np.resize(mine, self._batch_size)
                tokens = np.zeros((len(filled), SHORTEST * 2 ** int(doubling)), np.int32)
                for row, member in enumerate(filled):
                    tokens[row, : rows.length[member]] = rows[int(member)]
                batch = tokens, rows.length[filled].astype(np.int32)
                batch = jax.device_put(batch, self._sharding)
                scores[mine] = np.asarray(self._scores(self._params, *batch))[: len(mine)]
        return scores


def load_scorer(
    folder: str | Path,
    kind: str,
    *,
    rows: RewardRows | None = None,
    chat: Chat = "auto",
    **options: Any,
) -> Scorer:
    """A model with a scalar head, its tokenizer, and the format that its folder remembers.

    A folder from elsewhere remembers none. Where its tokenizer has a chat template, rows are what
    cards of such models score: the conversation as the template writes it, at its last token.
    Otherwise a row is the text with the end-of-sequence token. Its context is the longest row.

    Args:
      folder: a Hugging Face folder or hub name, or a run folder with an `export`.
      kind: "reward" or "preference"; a folder of the other kind is refused.
      rows: of a folder from elsewhere: "template" or "end_token" (the response, whatever its
        template puts after the turn's end, ends with the end-of-sequence token).
      chat: of a folder from elsewhere: whether it reads its chat template; "auto": where it has
        one.
      **options: of `Scorer`.

    Raises:
      UserError: the folder holds no such model, or says itself how its rows end.
    """
    place = exported(folder)
    model = load_pretrained(place, mesh=options.get("mesh"))
    if not isinstance(model, ScoreModel):
        raise UserError(f"{place}: has no scalar head (score.weight); train one with --loss")
    tokenizer, fields = load_tokenizer(place), model.config.source_fields
    check_vocabulary(tokenizer, model.config.vocab_size)
    if "jaxalign" in fields:
        form = read_format(fields["jaxalign"], f"{place}/config.json")
        if rows is not None:
            raise UserError(f"reward_rows: {place} remembers how its rows end; leave it out")
        trained = "always" if form.strings_as_chat else "never"
        if chat not in ("auto", trained):
            raise UserError(f"chat: {place} was trained with {trained}, not {chat}; leave it out")
    else:
        context = getattr(model.config, "context_length", None) or 512
        turns = reads_template(tokenizer, chat)
        if rows == "template" and not turns:
            reason = f"the tokenizer of {place} has no chat template"
            raise UserError(f"reward_rows: {'not with chat never' if chat == 'never' else reason}")
        form = ScoreFormat(
            kind="reward",
            max_length=context,
            strings_as_chat=turns,
            whole_conversation=turns and rows != "end_token",
        )
    if form.kind != kind:
        raise UserError(f"{place}: holds a {form.kind} model; name it {form.kind}:{folder}")
    return Scorer(model, tokenizer, form, **options)


class RewardModel:
    """A reward of each response by itself, and the preferences that follow from it."""

    def __init__(self, scorer: Scorer):
        self.scorer = scorer

    @classmethod
    def load(cls, folder: str | Path, **options: Any) -> "RewardModel":
        """From a folder; see `load_scorer`."""
        return cls(load_scorer(folder, "reward", **options))

    @property
    def identity(self) -> str:
        """How rows become scores."""
        return self.scorer.form.rule

    def rewards(
        self, prompts: Sequence[Text], responses: Sequence[str]
    ) -> Float64[np.ndarray, " n"]:
        """Rewards, less the model's bias; NaN where the model gives no finite number.

        Args:
          prompts: n texts or conversations.
          responses: one to each.

        Raises:
          UserError: no reward is a finite number.
        """
        found = self.scorer(prompts, responses) - self.scorer.form.reward_bias
        finite = np.isfinite(found)
        if len(found) and not finite.any():
            raise UserError(
                f"reward: of all {len(found)} responses {NOT_FINITE}; look at the model's weights, "
                "or compute in float32"
            )
        return np.where(finite, found, np.nan)

    def preferences(
        self, prompts: Sequence[Text], first: Sequence[str], second: Sequence[str]
    ) -> Verdicts:
        r"""Bradley and Terry's preferences.

        .. math:: p(y \succ y') = \sigma(r(y) - r(y'))

        Args:
          prompts: n texts or conversations.
          first: a response to each.
          second: another response to each.
        """
        one, other, exchanged = _in_fixed_order(first, second)
        found = self.scorer([*prompts, *prompts], [*one, *other])
        gap = _gap(found[: len(one)], found[len(one) :], one, other)
        return _verdicts(0.5 * np.tanh(gap / 2), exchanged)


class PreferenceModel:
    """Preferences of a model that reads both responses, in both orders."""

    def __init__(self, scorer: Scorer):
        self.scorer = scorer

    @classmethod
    def load(cls, folder: str | Path, **options: Any) -> "PreferenceModel":
        """From a folder; see `load_scorer`."""
        return cls(load_scorer(folder, "preference", **options))

    @property
    def identity(self) -> str:
        """How rows become scores."""
        return self.scorer.form.rule

    def preferences(
        self, prompts: Sequence[Text], first: Sequence[str], second: Sequence[str]
    ) -> Verdicts:
        r"""Preferences averaged over both orders, from the model's log-odds z.

        .. math:: p(y \succ y') = \tfrac12 \left(\sigma(z(y, y')) + 1 - \sigma(z(y', y))\right)

        Args:
          prompts: n texts or conversations.
          first: a response to each.
          second: another response to each.

        References:
          Guo et al., 2024, arXiv:2402.04792, section 3 (both orders averaged).
        """
        one, other, exchanged = _in_fixed_order(first, second)
        layout = self.scorer.form.comparison_format
        shown = [*zip(one, other, strict=True), *zip(other, one, strict=True)]
        texts = [comparison(layout, x, y) for x, y in shown]
        chances = 0.5 + 0.5 * np.tanh(self.scorer([*prompts, *prompts], texts) / 2)
        begun, ended = chances[: len(one)], chances[len(one) :]
        orders = np.stack([begun, 1 - ended], 1)
        orders = np.where(exchanged[:, None], 1 - orders[:, ::-1], orders)
        return _verdicts(_gap(begun, ended, one, other) / 2, exchanged, by_order=orders)


def _in_fixed_order(
    first: Sequence[str], second: Sequence[str]
) -> tuple[list[str], list[str], Bool[np.ndarray, " n"]]:
    """Each pair of texts with the lesser one first: what is computed knows no order."""
    exchanged = np.array([x > y for x, y in zip(first, second, strict=True)], bool)
    ordered = [sorted(pair) for pair in zip(first, second, strict=True)]
    return [x for x, _ in ordered], [y for _, y in ordered], exchanged


def _gap(
    x: Float64[np.ndarray, " n"],
    y: Float64[np.ndarray, " n"],
    one: Sequence[str],
    other: Sequence[str],
) -> Float64[np.ndarray, " n"]:
    """X - y; 0 for equal texts, which rows of one batch may leave a last bit apart.

    NaN where one of the two is not finite: infinity is a fault, not a certain victory.
    """
    same = np.array([a == b for a, b in zip(one, other, strict=True)], bool)
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = np.where(finite, x, np.nan), np.where(finite, y, np.nan)
    return np.where(same & finite, 0.0, x - y)


def _verdicts(
    lead: Float64[np.ndarray, " n"],
    exchanged: Bool[np.ndarray, " n"],
    *,
    by_order: Float64[np.ndarray, "n orders"] | None = None,
) -> Verdicts:
    """Preferences from how far the first of the ordered texts is above 1/2.

    The larger probability is rounded and the smaller one is exactly 1 less it, so that
    p(y, y') = 1 - p(y', y) in float64, whichever is asked.
    """
    larger = 0.5 + np.abs(lead)
    known = np.isfinite(lead)
    return Verdicts(
        preference=np.where((lead > 0) == exchanged, 1 - larger, larger),
        reasons=tuple("" if one else NOT_FINITE for one in known),
        by_order=by_order,
    )
