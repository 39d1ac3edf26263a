"""Online preference learning: sample, annotate, update (IPO-MD and its peers, PPO)."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxalign.backends.local import end_tokens
from jaxalign.config import RolloutConfig, TrainConfig
from jaxalign.data import (
    PromptRecord,
    ReadReport,
    TokenizedRows,
    prompt_records,
    response_records,
    split_holdout,
    tokenize_prompts,
    tokenize_responses,
)
from jaxalign.data.order import WINDOW
from jaxalign.data.packing import Packing
from jaxalign.data.reading import accepted
from jaxalign.data.record_text import text_of
from jaxalign.data.tokenized import check_whole_responses
from jaxalign.data.tokenizers import Tokenizer, end_id
from jaxalign.errors import UserError
from jaxalign.evaluation.annotators import AnnotatorOptions, make_annotator
from jaxalign.generation import Sampling, compile_generate
from jaxalign.models import tempered
from jaxalign.models.config import DecoderConfig, ModelConfig
from jaxalign.models.score import SCORE, init_head
from jaxalign.online import Algorithm, OnlineObjective, PromptBatch, RolloutBatch
from jaxalign.online.evaluation import HeldOut, evaluator
from jaxalign.online.group_probe import GroupProbe
from jaxalign.online.lookup import find_algorithm
from jaxalign.online.prompts import prompt_batches
from jaxalign.online.rewards import reward_functions
from jaxalign.online.sampler import Sampler, draws_of
from jaxalign.online.step import OnlineStep, TextRecorder, policies_of, update_step, with_history
from jaxalign.sharding import make_mesh, parameter_shardings, row_parts
from jaxalign.sharding.processes import data_shard
from jaxalign.sharding.structs import Structs, placed_batch, placed_parameters
from jaxalign.stages import parts
from jaxalign.stages.inputs import Inputs
from jaxalign.stages.kind import Kind, RunContext
from jaxalign.stages.models import stage_folder
from jaxalign.stages.prompts import chat_of
from jaxalign.stages.records import say, say_nothing_held_out, source_of, tell_overlap
from jaxalign.stages.structs import pair_batch, record_of, struct
from jaxalign.training.checkpoints import newest_step
from jaxalign.training.objectives import Policy
from jaxalign.training.stage import Feed, Params, Rows, Stage, Step
from jaxalign.training.step import TrainState

NAME, NUMBER = "online", 4
ROLLOUTS, ANSWERS = "rollouts.jsonl", "answers.jsonl"


@dataclass(frozen=True, kw_only=True)
class PromptData:
    """The prompts of a run: tokens for the sampler, texts for the annotator."""

    train: TokenizedRows
    train_texts: Sequence[str]
    held_out: TokenizedRows | None
    held_out_texts: Sequence[str]
    sources: Sequence[str]
    """File and line of each training prompt."""
    responses: Sequence[np.ndarray] = ()
    """Tokens of the responses in the prompt data, if the algorithm reads them."""
    train_fields: Sequence[Mapping[str, Any]] = ()
    """Fields of the training prompts' records, if reward functions read them."""
    held_out_fields: Sequence[Mapping[str, Any]] = ()

    def examples(self, seed: int) -> int:
        """Number of prompts in an epoch."""
        del seed
        return len(self.train)

    def describe(self, batch: PromptBatch) -> list[str]:
        """File and line of a batch's prompts."""
        numbers = np.asarray(batch.record_index)[np.asarray(batch.weight) > 0]
        return [self.sources[int(number)] for number in numbers]


def load(config: TrainConfig, inputs: Inputs) -> PromptData:
    """Read, split and tokenise the prompts.

    Raises:
      UserError: a prompt cannot be used, there is none, or the context is too short.
    """
    settings, tokenizer, report = config.online.rollout, inputs.tokenizer, inputs.report
    context = getattr(inputs.model_config, "context_length", None)
    longest = settings.max_prompt_length + settings.max_tokens
    if context is not None and longest > context:
        raise UserError(
            f"rollout.max_prompt_length: {settings.max_prompt_length} tokens and max_tokens "
            f"{settings.max_tokens} are more than the model's context of {context}"
        )
    algorithm = algorithm_of(config)
    rewards = reward_functions(settings.reward) if settings.reward else None
    in_text = text_of(tokenizer, config.prompt_format, None, chat_of(config))

    def read(source: str, name: str) -> list[Any]:
        counted = ReadReport()
        has_responses = algorithm.reads_data and source == settings.prompts
        of_prompts = functools.partial(prompt_records, keep_fields=rewards is not None)
        records_of: Any = response_records if has_responses else of_prompts
        records = list(records_of(source, bad_records=config.bad_records, report=counted))

        def texts(record: Any) -> None:
            if has_responses:
                in_text(record.prompt, [record.response], source_of(record))
            else:
                in_text.prompt(record.prompt, source_of(record))

        records = accepted(records, texts, config.bad_records, counted)
        report[name] = {"source": source} | dataclasses.asdict(counted)
        if counted.skipped:
            say(f"{source}: {counted.summary()}")
        if not records:
            raise UserError(f"{source}: no usable prompt")
        if rewards is not None:
            for record in records:
                rewards.check_record(record.fields, source_of(record))
        return records

    train = read(settings.prompts, "prompts")
    if settings.eval_prompts is not None:
        held_out = read(settings.eval_prompts, "eval_prompts")
    else:
        train, held_out = split_holdout(train, config.holdout, seed=config.seed)
        if config.holdout and not held_out:
            say_nothing_held_out("rollout.prompts", config, len(train))
    if not train:
        raise UserError(
            f"rollout.prompts: {settings.prompts}: no prompts left to train on; lower --holdout"
        )
    held_out = held_out[: settings.max_eval_prompts]
    if settings.eval_prompts is not None:
        tell_overlap([train], [held_out], "rollout.eval_prompts", config)

    options: dict[str, Any] = {
        "prompt_format": config.prompt_format,
        "chat": chat_of(config),
        "encoder_decoder": inputs.is_encoder_decoder,
    }

    def tokenized(records: list[Any], name: str) -> TokenizedRows:
        plain = (PromptRecord(prompt=x.prompt, source=x.source, line=x.line) for x in records)
        rows, counted = tokenize_prompts(
            plain, tokenizer, max_length=settings.max_prompt_length, **options
        )
        report[name] = dataclasses.asdict(counted)
        say(f"{name.replace('_', ' ')}: {counted.summary()}")
        return rows

    responses: list[np.ndarray] = []
    if algorithm.reads_data:
        shortest = {"max_length": longest, "min_prompt_length": settings.max_prompt_length}
        joint, counted = tokenize_responses(
            train, tokenizer, end_token=config.end_token, **shortest, **options
        )
        report["train_responses"] = dataclasses.asdict(counted)
        check_whole_responses(joint, f"rollout.prompts: {settings.prompts}: the algorithm")
        responses = [joint[at][joint.prompt_length[at] :] for at in range(len(joint))]

    return PromptData(
        train=tokenized(train, "train_prompts"),
        train_texts=_plain_texts(train, tokenizer),
        held_out=tokenized(held_out, "held_out_prompts") if held_out else None,
        held_out_texts=_plain_texts(held_out, tokenizer),
        sources=[source_of(record) for record in train],
        responses=responses,
        train_fields=[] if rewards is None else [record.fields for record in train],
        held_out_fields=[] if rewards is None else [record.fields for record in held_out],
    )


def _plain_texts(records: Sequence[Any], tokenizer: Tokenizer) -> list[str]:
    """Prompts as texts for annotators: conversations go through the chat template."""
    in_text = text_of(tokenizer, "{prompt}", None, "never")
    return [in_text.prompt(record.prompt, source_of(record)) for record in records]


def build(config: TrainConfig, model_config: ModelConfig) -> Stage:
    """The stage that trains a policy on its own responses."""
    settings, adapters, algorithm = config.online, parts.run_adapters(config), algorithm_of(config)
    rollout = config.online.rollout
    sampled = tempered(model_config, config.online.rollout.temperature)
    policy = parts.make_policy(config, sampled, adapters)
    objective = OnlineObjective(
        policy=policy, algorithm=algorithm, max_tokens=config.online.rollout.max_tokens
    )
    updates = algorithm.updates * algorithm.minibatches
    optimizer, by_update = parts.make_update_rule(settings, updates)
    rate: Callable[[int], Any] = by_update
    if algorithm.extragradient:
        if settings.steps % 2:
            raise UserError(
                f"online.steps: {rollout.algorithm} takes two steps from the same policy; "
                f"{settings.steps} is odd"
            )
        pairs = dataclasses.replace(settings, steps=settings.steps // 2)
        optimizer, of_pair = parts.make_update_rule(pairs)
        rate = lambda step: of_pair(step // 2)  # noqa: E731
    elif updates > 1:
        rate = lambda step: by_update(step * updates)  # noqa: E731
    optimizer = with_history(algorithm, optimizer)
    has_critic = algorithm.has_critic
    trained = parts.trained_parameters(adapters, parts.key_of(config, NUMBER))

    def with_critic(params: Params) -> Params:
        head = init_head(model_config.width, parts.key_of(config, NUMBER))
        return {**trained(params), SCORE: head}

    statistics = config.online.entanglement
    step = functools.partial(
        update_step,
        objective=objective,
        optimizer=optimizer,
        micro_batches=settings.micro_batches,
    )
    probe = GroupProbe(objective=objective, parts=statistics.parts, realised=statistics.realised)
    return Stage(
        name=NAME,
        method=rollout.algorithm,
        rows=f"prompts of {rollout.max_prompt_length:,} tokens with {len(algorithm.draws)} "
        f"responses of {rollout.max_tokens:,}",
        **parts.cadence(settings),
        parts=settings.micro_batches * algorithm.minibatches,
        objective=objective,
        optimizer=optimizer,
        schedule=rate,
        step=step,
        probed_step=functools.partial(step, backward=probe) if statistics.every else None,
        probe_every=statistics.every,
        adapter_scale=policy.adapter_scale,
        trained=with_critic if has_critic else trained,
        stored=functools.partial(parts.stored_weights, policy),
        frozen=parts.with_reference(adapters),
        kept=parts.without([SCORE] if has_critic else []),
        largest_batch=lambda platform, response: largest_rollout(config, objective),
        sampling=RolloutSampling(config=config, policy=policy),
    )


def algorithm_of(config: TrainConfig) -> Algorithm:
    """The online algorithm of a config."""
    return find_algorithm(config.online.rollout.algorithm, config.online.rollout.options)


def largest_rollout(config: TrainConfig, objective: OnlineObjective) -> tuple[Any, list[Rows]]:
    """Shapes of the largest rollout, and the passes of a step on it."""
    settings, algorithm = config.online.rollout, objective.algorithm
    prompts, response = config.online.batch_size, settings.max_tokens
    length, samples = settings.max_prompt_length + response, len(algorithm.draws)
    of_policy = all("policy" in draw.weights for draw in algorithm.draws)
    of_tokens = struct(prompts, samples, response, dtype=jnp.float32)
    of_samples = struct(prompts, samples, dtype=jnp.float32)
    batch = record_of(
        RolloutBatch,
        responses=pair_batch(prompts, samples, length, response),
        preference=struct(prompts, samples, samples, dtype=jnp.float32),
        reward=of_samples,
        baseline=of_samples,
        sampled_log_prob=of_tokens if of_policy else None,
        importance=of_tokens if of_policy and _is_corrected(config, algorithm) else None,
    )
    # policy and reference, or the past policies and the reference
    networks = 1 + algorithm.past + (algorithm.anchor > 0)
    forward = networks * (algorithm.updates + algorithm.scores_first)
    rows = prompts * algorithm.trained
    shape = {"rows": rows, "length": length, "scored": response}
    passes = [Rows(**shape, forward=forward, backward=algorithm.updates)]
    statistics = config.online.entanglement
    if statistics.every:  # two rows a response
        once = algorithm.updates
        passes += 2 * [Rows(**shape, forward=once, backward=once)]
        passes += [Rows(**shape, forward=once)] if statistics.realised else []
    return batch, passes


def _is_corrected(config: TrainConfig, algorithm: Algorithm) -> bool:
    """Whether tokens are weighed for the truncation of the sampled distribution."""
    return algorithm.importance and sampling_rules(config, ends=()).truncates


def truncation_notice(config: TrainConfig) -> str | None:
    """One line on samples of a truncated distribution; None: it is not truncated."""
    settings, algorithm = config.online.rollout, algorithm_of(config)
    rules = {"top_k": settings.top_k, "top_p": settings.top_p, "min_p": settings.min_p}
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    cut = ", ".join(f"{name} {value:g}" for name, value in rules.items() if value != off[name])
    if not cut:
        return None
    corrected = "weighs each token by the probability that the rules keep"
    plain = "does not correct for it"
    return (
        f"{cut}: samples are from a truncated distribution, not from the policy; "
        f"{settings.algorithm} {corrected if algorithm.importance else plain}"
    )


def sampling_rules(config: TrainConfig, *, ends: Sequence[int]) -> Sampling:
    """Sampling settings of a rollout; `ends` are the end-of-response tokens."""
    settings = config.online.rollout
    return Sampling(
        max_tokens=settings.max_tokens,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        end_tokens=tuple(sorted(set(ends))),
    )


def feed(context: RunContext, stage: Stage, params: Params, frozen: dict[str, Params]) -> Feed:
    """Prompts, with sampling and annotation around the compiled update."""
    config, mesh, settings = context.config, context.mesh, context.config.online.rollout
    policy, algorithm = stage.objective.policy, stage.objective.algorithm
    data: PromptData = context.data[NAME]
    number, count = data_shard(mesh)
    answers = context.folder / (f"answers.{number}.jsonl" if number else ANSWERS)
    annotator = _annotator(settings, answers)
    if (identity := getattr(annotator, "identity", None)) is not None and number == 0:
        print(f"online: annotator {settings.annotator} ({identity})")
    if number == 0 and (line := truncation_notice(config)) is not None:
        print(f"online: {line}")
    sampling_mesh = make_mesh(**settings.mesh) if settings.mesh else mesh
    ends = [end_id(context.tokenizer)]
    if config.model != "embedded":
        ends += end_tokens(config.model, context.model_config.vocab_size)
    sampler = Sampler(
        config=policy.config,
        tokenizer=context.tokenizer,
        sampling=sampling_rules(config, ends=ends),
        mesh=sampling_mesh,
        stop=settings.stop,
        dtype=policy.dtype,
    )

    @functools.lru_cache(maxsize=1)
    def reference() -> dict[int, jax.Array]:
        """Resharded once, for it never changes; with adapters it is every policy's base, too."""
        tree = frozen["reference"]
        moved = jax.device_put(tree, parameter_shardings(tree, sampling_mesh))
        return dict(zip(map(id, jax.tree.leaves(tree)), jax.tree.leaves(moved), strict=True))

    def reshard(policies: Mapping[str, Any]) -> Mapping[str, Any]:
        if not settings.mesh:
            return policies
        known = reference()

        def moved(leaf: Any, sharding: Any) -> jax.Array:
            return known[id(leaf)] if id(leaf) in known else jax.device_put(leaf, sharding)

        return jax.tree.map(moved, policies, parameter_shardings(policies, sampling_mesh))

    packing = packing_of(context, stage)
    recorder = TextRecorder(context.folder / ROLLOUTS, prompts=settings.record)
    if jax.process_index() == 0:
        recorder.rewind(newest_step(stage_folder(context.folder, NAME)) or 0)
    draws = jax.random.fold_in(jax.random.key(config.seed), 0x0911E)
    batches_of = functools.partial(
        prompt_batches, batch_size=stage.batch_size, process_index=number, process_count=count
    )

    def around(update: Step) -> Step:
        return OnlineStep(
            algorithm=algorithm,
            policy=policy,
            sampler=sampler,
            annotator=annotator,
            update=update,
            reshard=reshard,
            prompt_texts=data.train_texts,
            mesh=mesh,
            key=draws,
            record=recorder if number == 0 else lambda *_: None,
            responses=data.responses,
            unfinished_penalty=settings.unfinished_penalty,
            prompt_fields=data.train_fields,
            packing=packing,
        )

    evaluation = None
    if data.held_out is not None:
        held_out = HeldOut(
            sampler,
            annotator,
            list(batches_of(data.held_out, epochs=1, shuffle=False, window=WINDOW)),
            data.held_out_texts,
            jax.random.fold_in(draws, 1),
            data.held_out_fields,
        )

        def policies(params: Any, frozen: Any) -> Mapping[str, Any]:
            now = policy.policy_params(params, frozen["policy"])
            return reshard({"policy": now, "reference": frozen["reference"]})

        evaluation = evaluator(held_out, policies)
    return Feed(
        batches=batches_of(data.train, seed=config.seed),
        place=lambda batch: batch,
        describe=data.describe,
        evaluation=evaluation,
        throughput=parts.throughput(
            context.model_config,
            params,
            live_reference=True,
            adapters=stage.adapter_scale is not None,
            updates=algorithm.updates,
            tokens=lambda batch: 0,  # counted by the step
        ),
        around=around,
    )


def packing_of(context: RunContext, stage: Stage) -> Packing | None:
    """Rows in which the responses of an update are packed; None: each is padded.

    Raises:
      UserError: they cannot be packed, but it is configured.
    """
    if context.config.online.packing == "never":
        return None
    packing = Packing(shards=row_parts(context.mesh), micro_batches=stage.micro_batches)
    reason = ""
    if not isinstance(context.model_config, DecoderConfig):
        reason = f"{context.config.model} is an encoder-decoder, whose rows cannot be packed"
    elif jax.process_count() > 1:
        reason = "the lengths of rows are known to one process alone"
    elif stage.objective.algorithm.minibatches > 1:
        reason = f"{context.config.online.rollout.algorithm} splits a rollout into minibatches"
    elif stage.batch_size % packing.rows:
        reason = (
            f"a batch of {stage.batch_size} cannot be shared equally by {packing.rows} packed rows"
        )
    if reason:
        raise UserError(f"online.packing: {reason}; set it to never")
    return packing


def check(config: TrainConfig) -> None:
    """Check that the config has what its algorithm needs, before anything is loaded.

    Raises:
      UserError: a field is missing or does not fit.
    """
    settings, size = config.online.rollout, config.online.batch_size
    algorithm = algorithm_of(config)
    if settings.reward:
        reward_functions(settings.reward)
        if settings.annotator is not None:
            raise UserError("rollout.reward: an annotator is set, too; set rollout.annotator None")
        if algorithm.reads_data:
            raise UserError(
                f"rollout.reward: {settings.algorithm} learns from responses in the data, not from "
                "rewards"
            )
    elif settings.annotator is None and algorithm.annotation != "none":
        raise UserError(
            "rollout.annotator: missing; set what compares the responses: rule:FILE.py:FUNCTION, "
            "reward:FOLDER, preference:FOLDER, lm:FOLDER or openai:URL#MODEL; or set "
            "rollout.reward FILE.py:FUNCTION"
        )
    parts = algorithm.minibatches * config.online.micro_batches
    if size % parts:
        raise UserError(
            f"online.batch_size: {size} prompts cannot be split into {algorithm.minibatches} "
            f"minibatches of {config.online.micro_batches} micro-batches each"
        )
    if settings.unfinished_penalty and algorithm.annotation != "rewards":
        raise UserError(
            f"rollout.unfinished_penalty: {settings.algorithm} reads preferences, not rewards; "
            "set 0"
        )


def _annotator(settings: RolloutConfig, answers: Path) -> Any:
    """The annotator of a run; a judge's answers are stored and reused when the run is resumed."""
    if settings.reward:
        return reward_functions(settings.reward)
    if settings.annotator is None:
        return None
    options: dict[str, Any] = dict(vars(settings.judge))
    if settings.judge.template is not None:
        options["template"] = Path(settings.judge.template)
    return make_annotator(settings.annotator, AnnotatorOptions(**options, answers_file=answers))


@dataclass(frozen=True, kw_only=True)
class RolloutSampling:
    """The sampling programs of a rollout, for the planner."""

    config: TrainConfig
    policy: Policy

    @property
    def resharded(self) -> bool:
        """Whether sampling has its own mesh, and so its own copies of the policies."""
        return bool(self.config.online.rollout.mesh)

    def policies(
        self, state: TrainState, frozen: Mapping[str, Structs], mesh: Mesh
    ) -> tuple[dict[str, Any], Mesh]:
        """Shapes of the policies that sample, placed on the mesh of sampling, and that mesh.

        Args:
          state: placed shapes.
          frozen: placed shapes.
          mesh: of the updates; sampling uses the same devices.
        """
        policies = policies_of(self.policy, state, frozen)
        if not self.resharded:
            return policies, mesh
        own = make_mesh(**self.config.online.rollout.mesh, devices=mesh.devices.flatten())
        return {name: placed_parameters(one, own) for name, one in policies.items()}, own

    def programs(
        self, policies: dict[str, Any], mesh: Mesh
    ) -> Iterator[tuple[jax.stages.Wrapped, tuple[Any, ...]]]:
        """Each program with the shapes of its arguments."""
        settings, algorithm = self.config.online.rollout, algorithm_of(self.config)
        prompts, length = self.config.online.batch_size, settings.max_prompt_length
        batch = placed_batch((struct(prompts, length), struct(prompts)), mesh)
        key = jax.eval_shape(lambda: jax.random.key(0))
        rules = sampling_rules(self.config, ends=[0])
        for draw, samples in draws_of(algorithm):
            if not draw.weights:  # responses from the data
                continue
            program = compile_generate(
                self.policy.config, mesh, samples=samples, sampling=rules, dtype=self.policy.dtype
            )
            mixed = [policies[name] for name in draw.weights]
            weights = jax.ShapeDtypeStruct((len(mixed),), jnp.float32)
            yield program, (mixed, *batch, key, weights, 0)


KIND = Kind(
    name=NAME,
    adapters=parts.run_adapters,
    build=build,
    load=load,
    feed=feed,
    finish=parts.finish,
    check=check,
)
