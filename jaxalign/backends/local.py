"""A local model as a backend."""

import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32

from jaxalign.backends.interface import (
    Decoding,
    Draft,
    Generation,
    Keep,
    Prompt,
    Score,
    WeightFormat,
    draw_number,
)
from jaxalign.backends.scoring import ContinuationScore, Tokens, row_length, score_continuations
from jaxalign.data.plain_prompts import Chat
from jaxalign.data.record_text import text_of
from jaxalign.data.records import Text
from jaxalign.data.tokenizers import (
    Encoder,
    Tokenizer,
    check_ids,
    check_vocabulary,
    load_tokenizer,
    tokenizer_identity,
)
from jaxalign.errors import UserError
from jaxalign.generation import (
    ResponseText,
    Sampling,
    compile_generate,
    stop_table,
    token_bytes,
)
from jaxalign.generation.continuous import (
    Programs,
    Response,
    compile_programs,
    sample_continuously,
)
from jaxalign.generation.rows import Method, Source
from jaxalign.generation.weights import DecodingWeights, prepare
from jaxalign.gguf import is_gguf
from jaxalign.models import DecoderConfig, decoder, load_pretrained
from jaxalign.models.folders import exported, find_folder
from jaxalign.models.gguf import generation_fields
from jaxalign.models.score import ScoreModel
from jaxalign.models.steering import parse_steering, steered
from jaxalign.progress import saying
from jaxalign.sharding import make_mesh

DRAFT = 4
"""Number of tokens in a draft."""


class LocalModel:
    """A decoder or encoder-decoder with its tokenizer; a `Backend`.

    Prompts are batched in order, with a fixed batch size and left padding to one of a few lengths,
    so that few programs are compiled. Conversations go through the tokenizer's chat template;
    without one, the contents of their turns are joined with empty lines.

    Args:
      model: parameters and architecture.
      tokenizer: from `load_tokenizer`.
      identity: text that changes with the weights.
      batch_size: number of prompts in a batch; a multiple of the mesh's data x fsdp.
      mesh: of the devices; None: only the first device.
      prompt_format: text around a plain prompt; must contain {prompt}.
      chat: whether plain prompts go through the chat template; see `plain_prompts`.
      dtype: of the computation.
      end_tokens: tokens that end a response, in addition to the tokenizer's.
      draft: where drafts of the next tokens come from if one row is decoded at a time, as with
        one prompt or a batch size of 1; see `generation.prompt_lookup`.
      weights: format of a decoder's matrices while it generates, on one device; scores and
        embeddings are always computed with the weights as loaded.

    Raises:
      UserError: int8 weights of an encoder-decoder or on several devices.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        *,
        identity: str,
        batch_size: int = 8,
        mesh: Mesh | None = None,
        prompt_format: str = "{prompt}",
        chat: Chat = "auto",
        dtype: str = "float32",
        end_tokens: Sequence[int] = (),
        draft: Draft = "none",
        weights: WeightFormat = "float",
    ):
        if batch_size < 1:
            raise UserError(f"batch_size: {batch_size} is not positive")
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.mesh = make_mesh(devices=jax.local_devices()[:1]) if mesh is None else mesh
        self.dtype = jnp.dtype(dtype)
        self._draft = 0 if draft == "none" else DRAFT
        check_vocabulary(tokenizer, model.config.vocab_size)
        self._encoder = Encoder(tokenizer, end_token=False)
        self._in_text = text_of(tokenizer, prompt_format, None, chat)
        plain = self._in_text.plain
        self._ends = tuple(sorted({self._encoder.eos, *end_tokens}))
        read = f"tokenizer {tokenizer_identity(tokenizer)[:16]} ends {self._ends}"
        self.identity = f"{identity} {read} {plain.prompt_format!r} {plain.as_turns} {dtype}"
        self._apart = not isinstance(model.config, DecoderConfig)
        self._in_int8 = weights == "int8"
        if self._in_int8:
            if self._apart or self.mesh.size > 1:
                raise UserError("weights: int8 is for decoders on one device; use float")
            self.identity += f" {weights}"
        self._decode = ResponseText(tokenizer, frozenset(self._ends), continues=not self._apart)
        self._programs: dict[Any, Any] = {}
        self._row_counts: dict[Decoding, set[int]] = {}
        self._weights: tuple[Any, DecodingWeights] | None = None

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        tokenizer: str | None = None,
        steer: str | None = None,
        **options: Any,
    ):
        """Load a Hugging Face folder, Hub name, GGUF file or run folder with an `export`.

        Args:
          folder: of the model.
          tokenizer: folder or Hub name (default: the model's).
          steer: steering vector and factor, as for `parse_steering`; None: not steered.
          **options: of `LocalModel`.

        Raises:
          UserError: it is not a language model, or the vector does not fit it.
        """
        steering = None if steer is None else parse_steering(steer)
        name = str(exported(folder))
        model = load_pretrained(name, mesh=options.get("mesh"))
        if isinstance(model, ScoreModel):
            raise UserError(f"{folder}: a model with a scalar head does not generate text")
        identity = f"local {weights_identity(name)}"
        if steering is not None:
            vector, factor = steering
            model = type(model)(model.config, steered(model.params, model.config, vector, factor))
            identity += f" steered {vector.identity} {factor}"
        return cls(
            model,
            load_tokenizer(tokenizer or name),
            identity=identity,
            end_tokens=end_tokens(name, model.config.vocab_size),
            **options,
        )

    @property
    def context(self) -> int | None:
        """Largest number of tokens of prompt and response together; None: no limit on their sum."""
        return None if self._apart else getattr(self.model.config, "context_length", None)

    def text(self, prompt: Text, source: str = "a prompt") -> str:
        """The text that the model reads.

        Args:
          prompt: text or conversation.
          source: of the prompt, for messages.
        """
        if not isinstance(prompt, str) and not self.tokenizer.chat_template:
            return "\n\n".join(str(turn["content"]).strip() for turn in prompt) + "\n\n"
        return self._in_text.prompt(prompt, source)

    def notes(self) -> list[str]:
        """Lines on fields of prompts that the chat template ignored, and on variables not set."""
        return self._in_text.notes()

    def encode(
        self, prompts: Sequence[Prompt], max_tokens: int, sources: Sequence[str] | None = None
    ) -> list[list[int]]:
        """Tokens of prompts, checked.

        Args:
          prompts: texts or conversations.
          max_tokens: of the responses.
          sources: of the prompts, for messages.

        Raises:
          UserError: a prompt is empty, or it and the response may be longer than the context.
        """
        if sources is None:
            sources = [f"prompt {at + 1}" for at in range(len(prompts))]
        texts = [self.text(prompt, at) for prompt, at in zip(prompts, sources, strict=True)]
        rows = []
        encodings = self._encoder.encode(texts)
        for prompt, text, encoding, source in zip(prompts, texts, encodings, sources, strict=True):
            content = prompt if isinstance(prompt, str) and self._in_text.plain.as_turns else text
            if not content.strip():
                raise UserError(f"{source}: the prompt is empty; write something or remove it")
            row = self._encoder.begun(list(encoding.ids)) or self._encoder.start
            row = row + (self._encoder.suffix if self._apart else [])
            if self.context is not None and len(row) + max_tokens > self.context:
                raise UserError(
                    f"{source}: {len(row)} tokens of prompt and {max_tokens} of response are more "
                    f"than the model's context of {self.context}; shorten the prompt or lower "
                    "max_tokens"
                )
            check_ids(row, self.tokenizer, self.model.config.vocab_size)
            rows.append(row)
        return rows

    def generate(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding,
        *,
        samples: int = 1,
        keep: Keep | None = None,
    ) -> list[list[Generation]]:
        """As in `Backend`.

        Raises:
          UserError: a prompt is empty, or it and the response may be longer than the context.
        """
        rows = self.encode(prompts, decoding.max_tokens)
        numbers = [
            [draw_number(decoding, prompt, sample) for sample in range(samples)]
            for prompt in prompts
        ]
        if not rows:
            return []
        results: list[list[Any]] = [[None] * samples for _ in prompts]
        for one in self.sample(rows, numbers, decoding):
            results[one.prompt][one.sample] = Generation(
                text=self._decode(one.tokens.tolist(), decoding.stop),
                finished=one.finished,
                tokens=len(one.tokens),
            )
            if keep is not None and None not in results[one.prompt]:
                keep(one.prompt, results[one.prompt])
        return results

    def sample(
        self, rows: Sequence[Tokens], numbers: Sequence[Sequence[int]], decoding: Decoding
    ) -> Iterator[Response]:
        """Responses to rows of tokens as they end, each with its last token.

        Args:
          rows: at least one, each with at least one token; they and the responses fit the context.
          numbers: of each row, for each of its responses a number that identifies the draw.
          decoding: settings.
        """
        way = self._in_batches if self._apart or self.mesh.size > 1 else self._continuously
        return way(rows, numbers, decoding, len(numbers[0]))

    def _continuously(
        self,
        rows: Sequence[Sequence[int]],
        numbers: Sequence[Sequence[int]],
        decoding: Decoding,
        samples: int,
    ) -> Iterator[Response]:
        """Responses as they end; each makes room for the next prompt."""
        method = Method(
            config=self.model.config, sampling=self._sampling(decoding), dtype=self.dtype
        )
        program_key = replace(decoding, seed=0)  # the seed is an argument of the program
        if program_key not in self._programs:
            self._programs[program_key] = _reporting(compile_programs(method, draft=self._draft))
        counts = self._row_counts.setdefault(program_key, set())
        count = _row_count(len(rows) * samples, self.batch_size * samples, counts)
        counts.add(count)
        source = Source(
            policies=[self._decoding_weights()],
            mixture=jnp.ones(1),
            key=jax.random.key(decoding.seed),
            stops=self._stops(decoding),
        )
        limit = None if self.context is None else self.context - decoding.max_tokens
        return sample_continuously(
            self._programs[program_key],
            source,
            method,
            rows,
            numbers,
            rows=count,
            padded=functools.partial(row_length, limit=limit),
        )

    def _in_batches(
        self,
        rows: Sequence[Sequence[int]],
        numbers: Sequence[Sequence[int]],
        decoding: Decoding,
        samples: int,
    ) -> Iterator[Response]:
        """Responses to one batch of prompts after the other."""
        key, one = jax.random.key(decoding.seed), jnp.ones(1)
        program = self._program(decoding, samples)
        limit = None if self.context is None else self.context - decoding.max_tokens
        for begin in range(0, len(rows), self.batch_size):
            mine = rows[begin : begin + self.batch_size]
            tokens, length = self._padded(mine, left=True, limit=limit)
            draws = np.zeros((self.batch_size, samples), np.int32)
            draws[: len(mine)] = numbers[begin : begin + len(mine)]
            first = jnp.asarray(draws.reshape(-1) - np.arange(draws.size, dtype=np.int32))
            arguments = [self.model.params], tokens, length, key, one, first
            out = jax.device_get(program(*arguments))
            for at in range(len(mine)):
                for sample in range(samples):
                    row = at * samples + sample
                    yield Response(
                        prompt=begin + at,
                        sample=sample,
                        tokens=out.tokens[row, : out.length[row]],
                        finished=bool(out.finished[row]),
                    )

    def _decoding_weights(self) -> DecodingWeights:
        """The model's weights as the decoding loop reads them, kept between calls."""
        params = self.model.params
        if self._weights is None or self._weights[0] is not params:
            prepared = _prepared(params, self.model.config, self.dtype, in_int8=self._in_int8)
            self._weights = params, prepared
        return self._weights[1]

    def _sampling(self, decoding: Decoding) -> Sampling:
        return Sampling(
            max_tokens=decoding.max_tokens,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            top_k=decoding.top_k,
            min_p=decoding.min_p,
            repetition_penalty=decoding.repetition_penalty,
            end_tokens=self._ends,
        )

    def _stops(self, decoding: Decoding) -> jax.Array | None:
        if not decoding.stop:
            return None
        return jnp.asarray(stop_table(decoding.stop, self._token_bytes))

    def _program(self, decoding: Decoding, samples: int) -> Callable:
        # the seed is an argument of the program
        program_key = replace(decoding, seed=0), samples
        if program_key not in self._programs:
            program = compile_generate(
                self.model.config,
                self.mesh,
                samples=samples,
                sampling=self._sampling(decoding),
                stops=self._stops(decoding),
                dtype=self.dtype,
            )

            def shape(policies: Any, tokens: Any, *_: Any) -> str:
                del policies
                return (
                    f"sampling for {tokens.shape[0]} prompts of {tokens.shape[1]} tokens, "
                    f"responses of {decoding.max_tokens}"
                )

            self._programs[program_key] = saying(program, shape)
        return self._programs[program_key]

    @functools.cached_property
    def _token_bytes(self) -> list[bytes]:
        return token_bytes(self.tokenizer, self.model.config.vocab_size)

    def _padded(
        self, rows: Sequence[Sequence[int]], *, left: bool, limit: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a batch, filled up with the last row; lengths are 32 times powers of two."""
        filled = [*rows, *[rows[-1]] * (self.batch_size - len(rows))]
        for row in rows:
            check_ids(row, self.tokenizer, self.model.config.vocab_size)
        size = row_length(max(map(len, filled)), limit)
        tokens = np.zeros((len(filled), size), np.int32)
        for at, row in enumerate(filled):
            tokens[at, size - len(row) :] = row if left else 0
            if not left:
                tokens[at, : len(row)] = row
        return tokens, np.array([len(row) for row in filled], np.int32)

    def score(self, prompts: Sequence[Prompt], continuations: Sequence[str]) -> list[Score]:
        """As in `Backend`; tokens are those of the joint text, without an end token.

        What the continuations of the same prompt share is computed once.
        """
        texts = [
            (self.text(prompt), continuation)
            for prompt, continuation in zip(prompts, continuations, strict=True)
        ]
        pairs = [(prompt, continuation) for prompt, continuation, _ in self._joint(texts)]
        results = [Score(log_prob=math.nan, tokens=len(own)) for _, own in pairs]
        fit = [
            at
            for at, (prompt, own) in enumerate(pairs)
            if self.context is None or len(prompt) + len(own) <= self.context
        ]
        for at, score in self.score_tokens([pairs[at] for at in fit]):
            results[fit[at]] = replace(results[fit[at]], log_prob=score.log_prob)
        return results

    def score_tokens(
        self, pairs: Sequence[tuple[Tokens, Tokens]]
    ) -> Iterator[tuple[int, ContinuationScore]]:
        """As `score_continuations`, with this model and its batch size.

        Args:
          pairs: tokens of context and continuation.
        """
        for ids in itertools.chain.from_iterable(pairs):
            check_ids(ids, self.tokenizer, self.model.config.vocab_size)
        return score_continuations(
            self.model.params,
            self.model.config,
            pairs,
            batch_size=self.batch_size,
            dtype=self.dtype,
        )

    def tokens_of(self, texts: Sequence[str], *, begin: bool = True) -> list[list[int]]:
        """Tokens of texts as they are, without a chat template; not checked.

        Args:
          texts: to encode.
          begin: whether they begin with the beginning token, where the tokenizer adds one. For an
            encoder-decoder also whether they have the tokens that it adds at the end.
        """
        rows = [list(encoding.ids) for encoding in self._encoder.encode(texts)]
        if not begin:
            return rows
        suffix = self._encoder.suffix if self._apart else []
        return [self._encoder.begun(row) + suffix for row in rows]

    def _joint(self, texts: Sequence[tuple[str, str]]):
        if not self._apart:
            for prompt, continuation, straddled in self._encoder.joint(texts):
                begun = self._encoder.begun(prompt) or self._encoder.start
                yield begun, continuation.ids, straddled
            return
        for prompt, continuation in texts:
            sides = self._encoder.encode([prompt, continuation])
            begun = self._encoder.begun(list(sides[0].ids)) + self._encoder.suffix
            yield begun, list(sides[1].ids), False

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "n width"]:
        """As in `Backend`: mean last hidden states of a text, truncated to the context.

        Raises:
          UserError: the model is an encoder-decoder, or a text is empty.
        """
        if self._apart:
            raise UserError("embed: encoder-decoders are not supported; use a decoder")
        rows = [
            (self._encoder.begun(list(encoding.ids)) or self._encoder.start)[: self.context]
            for encoding in self._encoder.encode(texts)
        ]
        vectors = np.zeros((len(rows), self.model.config.width), np.float32)
        order = sorted(range(len(rows)), key=lambda at: len(rows[at]))
        for begin in range(0, len(rows), self.batch_size):
            indices = order[begin : begin + self.batch_size]
            mine = [rows[at] for at in indices]
            tokens, length = self._padded(mine, left=False, limit=self.context)
            pooled = _pooled(self.model.params, self.model.config, tokens, length)
            vectors[indices] = np.asarray(pooled)[: len(mine)]
        return vectors


_prepared = jax.jit(prepare, static_argnames=("config", "dtype", "in_int8"))


def _row_count(needed: int, most: int, compiled: set[int]) -> int:
    """Number of rows to decode together: a compiled one if it suffices, else a power of two."""
    if known := [count for count in compiled if count >= min(needed, most)]:
        return min(known)
    count = 1
    while count < needed:
        count *= 2
    return min(count, most)


def _reporting(programs: Programs) -> Programs:
    """The programs with a line on each compilation."""

    def reading(source: Any, prompt: Any, length: Any, *, slots: int) -> str:
        return f"reading a prompt of {prompt.shape[1]} tokens into {slots} slots"

    def reading_rest(source: Any, read: Any, kept: Any, piece: Any, *_: Any) -> str:
        slots = read.caches[0].keys[0].shape[2]
        return f"reading {piece.shape[1]} tokens more of a prompt into {slots} slots"

    def running(source: Any, rows: Any, *_: Any) -> str:
        tokens, slots = rows.samples.tokens, rows.caches[0].keys[0].shape[2]
        return f"sampling of {tokens.shape[0]} rows of {slots} slots"

    return replace(
        programs,
        read=saying(programs.read, reading),
        read_rest=saying(programs.read_rest, reading_rest),
        run=saying(programs.run, running),
        run_drafted=saying(programs.run_drafted, running),
    )


@functools.partial(jax.jit, static_argnames="config")
def _pooled(params, config, tokens, length):
    states = decoder.hidden_states(params, config, tokens).astype(jnp.float32)
    real = jnp.arange(tokens.shape[1])[None] < length[:, None]
    mean = jnp.where(real[..., None], states, 0.0).sum(1) / length[:, None]
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def weights_identity(folder: str) -> str:
    """A text that changes with the weights in a folder or file."""
    path = Path(folder)
    if not path.exists():
        return folder
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    stamps = [f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files]
    return " ".join([str(path.resolve()), *stamps])


def end_tokens(folder: str | Path, vocabulary: int) -> list[int]:
    """End-of-response tokens of a model; chat models often have one for the end of a turn.

    They are read from `generation_config.json`, or if it has none, from `config.json`.

    Args:
      folder: of the model, or its Hub name.
      vocabulary: number of tokens of the model.

    Raises:
      UserError: `generation_config.json` is not JSON, or a value is not a token of the model.
    """
    if is_gguf(folder) and not Path(folder).is_dir():  # read from its metadata
        return generation_fields(Path(folder)).get("eos_token_id", [])
    path = find_folder(folder) / "generation_config.json"
    if path.is_file():
        fields = _json_object(path)
        if (named := fields.get("eos_token_id")) is not None:
            ends = named if isinstance(named, list) else [named]
            for end in ends:
                if type(end) is not int or not 0 <= end < vocabulary:
                    raise UserError(
                        f"{path}: eos_token_id: {end!r} is not a token of the model, a number from "
                        f"0 to {vocabulary - 1}; correct or remove it"
                    )
            return ends
    path = path.with_name("config.json")
    named = _json_object(path).get("eos_token_id") if path.is_file() else None
    ends = named if isinstance(named, list) else [named]
    return [end for end in ends if type(end) is int and 0 <= end < vocabulary]


def _json_object(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON: {error}; correct or remove it") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: is not a JSON object; correct or remove it")
    return fields
