"""The online stage of a run, from its config."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign.backends.local import end_tokens
from jaxalign.commands.drive import World, drive, of_step
from jaxalign.commands.scores import chat_of
from jaxalign.commands.stages import stage_folder
from jaxalign.commands.updates import (
    algorithm_of,
    frozen_parameters,
    kept_parameters,
    make_objective,
    make_policy,
    make_update_rule,
    stage_step,
    trained_parameters,
)
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
from jaxalign.data.record_text import text_of
from jaxalign.errors import UserError
from jaxalign.evaluation.annotators import AnnotatorOptions, make_annotator
from jaxalign.files import read_json, write_json
from jaxalign.generation import Sampling
from jaxalign.models import DecoderConfig
from jaxalign.online import PromptBatch
from jaxalign.online.evaluation import HeldOut, evaluator
from jaxalign.online.prompts import prompt_batches
from jaxalign.online.sampler import Sampler
from jaxalign.online.step import OnlineStep, TextRecorder
from jaxalign.progress import saying
from jaxalign.sharding import make_mesh, parameter_shardings, place
from jaxalign.sharding.processes import share_of_rows
from jaxalign.training.checkpoints import newest_step
from jaxalign.training.loop import Throughput
from jaxalign.training.step import TrainState, compile_step
from jaxalign.training.throughput import flops_per_token, peak_flops

ROLLOUTS, ANSWERS = "rollouts.jsonl", "answers.jsonl"


@dataclass(frozen=True, kw_only=True)
class PromptData:
    """The prompts of a run: tokens for the sampler, texts for the annotator."""

    train: TokenizedRows
    train_texts: Sequence[str]
    held_out: TokenizedRows | None
    held_out_texts: Sequence[str]
    places: Sequence[str]
    """Where each training prompt came from."""
    responses: Sequence[np.ndarray] = ()
    """Tokens of the responses beside the training prompts, where the algorithm reads them."""

    def examples(self, seed: int) -> int:
        """Prompts of an epoch."""
        del seed
        return len(self.train)

    def describe(self, batch: PromptBatch) -> list[str]:
        """File and line of a batch's prompts."""
        numbers = np.asarray(batch.record_index)[np.asarray(batch.weight) > 0]
        return [self.places[int(number)] for number in numbers]


def load_prompts(
    config: TrainConfig, tokenizer: Any, folder: Path, model_config: Any
) -> PromptData:
    """Read, split and tokenise the prompts of the online stage; add their counts to `data.json`.

    Raises:
      UserError: a prompt that cannot be used, none at all, or no room for prompt and response.
    """
    wanted, context = config.rollout, getattr(model_config, "context_length", None)
    is_decoder = isinstance(model_config, DecoderConfig)
    longest = wanted.max_prompt_length + wanted.max_tokens
    if context is not None and longest > context:
        raise UserError(
            f"rollout.max_prompt_length: {wanted.max_prompt_length} tokens and max_tokens "
            f"{wanted.max_tokens} are more than the model's context of {context}"
        )
    report: dict[str, Any] = {}
    algorithm = algorithm_of(config)

    def read(source: str, name: str) -> list[Any]:
        counted = ReadReport()
        learnt = algorithm.reads_data and source == wanted.prompts
        records_of: Any = response_records if learnt else prompt_records
        records = list(records_of(source, bad_records=config.bad_records, report=counted))
        report[name] = {"source": source} | dataclasses.asdict(counted)
        if not records:
            raise UserError(f"{source}: no usable prompt")
        return records

    train = read(wanted.prompts, "prompts")
    if wanted.eval_prompts is not None:
        held_out = read(wanted.eval_prompts, "eval_prompts")
    else:
        train, held_out = split_holdout(train, config.holdout, seed=config.seed)
    if not train:
        raise UserError(f"rollout.prompts: {wanted.prompts}: none is left; lower --holdout")
    held_out = held_out[: wanted.max_eval_prompts]

    options: dict[str, Any] = {
        "prompt_format": config.prompt_format,
        "chat": chat_of(config),
        "encoder_decoder": not is_decoder,
    }

    def tokenized(records: list[Any], name: str) -> TokenizedRows:
        plain = (PromptRecord(prompt=x.prompt, source=x.source, line=x.line) for x in records)
        rows, counted = tokenize_prompts(
            plain, tokenizer, max_length=wanted.max_prompt_length, **options
        )
        report[name] = dataclasses.asdict(counted)
        if jax.process_index() == 0:
            for note in counted.notes:
                print(f"{name.replace('_', ' ')}: {note}")
        return rows

    responses: list[np.ndarray] = []
    if algorithm.reads_data:
        shortest = {"max_length": longest, "min_prompt_length": wanted.max_prompt_length}
        joint, counted = tokenize_responses(train, tokenizer, **shortest, **options)
        report["train_responses"] = dataclasses.asdict(counted)
        responses = [joint[at][joint.prompt_length[at] :] for at in range(len(joint))]

    data = PromptData(
        train=tokenized(train, "train_prompts"),
        train_texts=_plain_texts(train, tokenizer),
        held_out=tokenized(held_out, "held_out_prompts") if held_out else None,
        held_out_texts=_plain_texts(held_out, tokenizer),
        places=[f"{record.source}:{record.line}" for record in train],
        responses=responses,
    )
    if jax.process_index() == 0:
        path = folder / "data.json"
        write_json(path, read_json(path, "counts of a run's data") | report)
    return data


def _plain_texts(records: Sequence[Any], tokenizer: Any) -> list[str]:
    """Prompts as annotators read them: as they are; conversations through the chat template."""
    in_text = text_of(tokenizer, "{prompt}", None, "never")
    return [in_text.prompt(record.prompt, f"{record.source}:{record.line}") for record in records]


def sampling_rules(config: TrainConfig, *, ends: Sequence[int]) -> Sampling:
    """How a rollout's tokens are drawn, until one of these ends a response."""
    wanted = config.rollout
    return Sampling(
        max_tokens=wanted.max_tokens,
        top_k=wanted.top_k,
        top_p=wanted.top_p,
        min_p=wanted.min_p,
        end_tokens=tuple(sorted(set(ends))),
    )


def run_online(world: World, name: str, params: Any) -> tuple[Any, Any]:
    """The online stage, from its newest checkpoint or from the start.

    Returns:
      As `train.run`: the trained parameters and None, or the frozen ones and the adapters.
    """
    config, mesh = world.config, world.mesh
    stage, wanted = config.online, config.rollout
    algorithm, adapted = algorithm_of(config), config.lora.rank > 0
    policy = make_policy(config, name, world.model_config)
    optimizer, schedule = make_update_rule(config, name)
    objective = make_objective(config, name, policy)
    one_update = stage_step(config, name, objective, optimizer)
    trained = trained_parameters(config, name, world.model_config, params)
    frozen = frozen_parameters(config, name, objective, params, functools.partial(place, mesh=mesh))
    data: PromptData = world.data[name]
    number, count = share_of_rows(mesh)
    annotator = _annotator(
        wanted, world.folder / (f"answers.{number}.jsonl" if number else ANSWERS)
    )
    if (identity := getattr(annotator, "identity", None)) is not None and number == 0:
        print(f"online: annotator {wanted.annotator} ({identity})")
    sampling_mesh = make_mesh(**wanted.mesh) if wanted.mesh else mesh
    ends = [int(world.tokenizer.eos_token_id)]
    if config.model != "embedded":
        ends += end_tokens(config.model, world.model_config.vocab_size)
    sampler = Sampler(
        config=policy.config,
        tokenizer=world.tokenizer,
        sampling=sampling_rules(config, ends=ends),
        mesh=sampling_mesh,
        stop=wanted.stop,
        dtype=policy.dtype,
    )

    def handed(tree: Any) -> Any:
        if isinstance(tree, float):  # the adapters' scale
            return tree
        return jax.device_put(tree, parameter_shardings(tree, sampling_mesh))

    @functools.lru_cache(maxsize=1)
    def reference() -> Any:
        """What never changes is handed over once; with adapters it is every policy's base, too."""
        return handed(frozen["reference"])

    def hand_over(policies: Mapping[str, Any]) -> Mapping[str, Any]:
        if not wanted.mesh:
            return policies
        return {
            name: {
                part: reference() if tree is frozen["reference"] else handed(tree)
                for part, tree in one.items()
            }
            for name, one in policies.items()
        }

    recorder = TextRecorder(world.folder / ROLLOUTS, prompts=wanted.record)
    if jax.process_index() == 0:
        recorder.rewind(newest_step(stage_folder(world.folder, name)) or 0)
    draws = jax.random.fold_in(jax.random.key(config.seed), 0x0911E)
    batches_of = functools.partial(
        prompt_batches, batch_size=stage.batch_size, process_index=number, process_count=count
    )

    def make_step(state: TrainState) -> Any:
        one = OnlineStep(
            algorithm=algorithm,
            policy=policy,
            sampler=sampler,
            annotator=annotator,
            update=saying(compile_step(one_update, state, mesh), of_step("the update")),
            hand_over=hand_over,
            prompt_texts=data.train_texts,
            mesh=mesh,
            key=draws,
            record=recorder if number == 0 else lambda *_: None,
            responses=data.responses,
            unfinished_penalty=wanted.unfinished_penalty,
        )
        return lambda done: one

    evaluation = None
    if data.held_out is not None:
        held_out = HeldOut(
            sampler,
            annotator,
            list(batches_of(data.held_out, epochs=1, shuffle=False)),
            data.held_out_texts,
            jax.random.fold_in(draws, 1),
        )

        def policies(params: Any, frozen: Any) -> Mapping[str, Any]:
            reference = {"params": frozen["reference"]}
            now = {"policy": policy.policy(params, frozen["policy"]), "reference": reference}
            return hand_over(now)

        evaluation = evaluator(held_out, policies)
    state = drive(
        world,
        name,
        trained=trained,
        frozen=frozen,
        optimizer=optimizer,
        schedule=schedule,
        batches=batches_of(data.train, seed=config.seed),
        make_step=make_step,
        place_batch=lambda batch: batch,
        describe=data.describe,
        evaluation=evaluation,
        throughput=Throughput(
            tokens=lambda batch: 0,  # the step counts its own
            computed=lambda batch: 0,
            flops_per_token=algorithm.updates
            * flops_per_token(params, live_reference=True, adapters=adapted),
            peak_flops=peak_flops(),
        ),
    )
    learned = kept_parameters(config, name, state.params)
    return (params, learned) if adapted else (learned, None)


def check_online(config: TrainConfig) -> None:
    """See to it that a config's algorithm has what it needs, before anything is made.

    Raises:
      UserError: it has not.
    """
    wanted, size = config.rollout, config.online.batch_size
    algorithm = algorithm_of(config)
    if wanted.annotator is None and algorithm.annotation != "none":
        raise UserError(
            "rollout.annotator: who compares the responses? Set rule:FILE.py:FUNCTION, "
            "reward:FOLDER, preference:FOLDER, lm:FOLDER or openai:URL#MODEL"
        )
    parts = algorithm.minibatches * config.online.micro_batches
    if size % parts:
        raise UserError(
            f"online.batch_size: {size} prompts do not make {algorithm.minibatches} minibatches of "
            f"{config.online.micro_batches} micro-batches each"
        )
    if wanted.unfinished_penalty and algorithm.annotation != "rewards":
        raise UserError(
            f"rollout.unfinished_penalty: {wanted.algorithm} reads preferences, not rewards; leave "
            "it out"
        )


def _annotator(wanted: RolloutConfig, answers: Path) -> Any:
    """The annotator of a run; what a judge answered once is found again after a kill."""
    if wanted.annotator is None:
        return None
    options: dict[str, Any] = dict(vars(wanted.judge))
    if wanted.judge.template is not None:
        options["template"] = Path(wanted.judge.template)
    return make_annotator(wanted.annotator, AnnotatorOptions(**options, answers_file=answers))
