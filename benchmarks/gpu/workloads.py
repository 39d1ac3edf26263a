"""What is measured in JAX: steps of training and sampling; each function is one part.

A part runs in a process of its own, so that the allocator's peak is its own. It returns rows of
numbers by name; those of one part were measured in turn, step by step.
"""

import dataclasses
import functools
import importlib
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import inputs
from benchmarks.entanglement import peak
from benchmarks.gpu.sizes import Size
from benchmarks.peers.recorder import fingerprint
from jaxalign.config import PreferenceConfig, TrainConfig, with_fields
from jaxalign.data import PairBatch, TokenizedPairs, TokenizedRows, pair_batches
from jaxalign.generation import Sampling, compile_generate
from jaxalign.models import DecoderConfig
from jaxalign.models.decoder import init_params
from jaxalign.models.devices import compiling_for
from jaxalign.planning.cost_model import work
from jaxalign.sharding import make_mesh, parameter_shardings, shard_batch
from jaxalign.stages import preference, supervised
from jaxalign.stages.kind import Kind
from jaxalign.stages.rematerialisation import choose_remat
from jaxalign.stages.shapes import shapes_of
from jaxalign.training.memory import free_memory
from jaxalign.training.metrics import to_floats
from jaxalign.training.objectives import ReferencedBatch
from jaxalign.training.stage import Stage
from jaxalign.training.step import TrainState, compile_step, initial_state
from jaxalign.training.throughput import PEAK_BFLOAT16

Row = dict[str, Any]
LOG_PROBS = ("logps/chosen", "logps/rejected")
Fields = Mapping[str, Any]
"""Fields of the config, by the names of the command line."""


def dpo(size: Size) -> dict[str, Row]:
    """The step of DPO with a live reference, all parameters, whole rows."""
    return steps(size, preference.KIND, {"jaxalign": {}})


def dpo_with_remat(remat: str, size: Size) -> dict[str, Row]:
    """The same with one way to rematerialise, whatever the memory."""
    return steps(size, preference.KIND, {f"jaxalign, remat {remat}": {}}, {"remat": remat})


def watched(size: Size) -> dict[str, Row]:
    """The same step, plain and with per-pair gradient statistics."""
    variants = {"plain": {}, "watched": {"entanglement.every": 1}}
    return steps(size, preference.KIND, variants)


def shared_prompts(size: Size) -> dict[str, Row]:
    """Pairs whose prompt is three quarters of a row: computed twice, or once."""
    variants = {"prompts twice": {}, "prompts shared": {"share_prompts": "always"}}
    size = dataclasses.replace(size, response=size.length // 4)
    return steps(size, preference.KIND, variants)


def sft(size: Size) -> dict[str, Row]:
    """The step of SFT on as many tokens, each but a row's first a target."""
    return steps(size, supervised.KIND, {"jaxalign": {}})


def large_lora(size: Size) -> dict[str, Row]:
    """The step of DPO with adapters of rank 16 on a larger model."""
    size = dataclasses.replace(size, model=size.large, pairs=size.large_pairs)
    return steps(size, preference.KIND, {"jaxalign": {}}, {"lora.rank": 16})


# ------------------------------------------------------------------------------- training


@dataclass(frozen=True, kw_only=True)
class Program:
    """A compiled step with its batch."""

    run: Callable[..., tuple[TrainState, dict[str, Any]]]
    batch: Any
    tokens: int
    """Tokens of the batch, prompts counted for each response."""
    flops: float | None
    """Model FLOPs of the step; None: not by this formula."""
    memory: int
    """Bytes of arguments, results and temporaries, by the compiler."""
    compile_seconds: float


def steps(
    size: Size, kind: Kind, variants: Mapping[str, Fields], fields: Fields | None = None
) -> dict[str, Row]:
    """Steps of one stage in turn, one for each variant, on one state.

    Args:
      size: of model and batch.
      kind: of the stage.
      variants: name -> fields of the config.
      fields: of all variants.
    """
    setting = Setting(size, kind, dict(fields or {}))
    programs = {name: setting.program(changed) for name, changed in variants.items()}
    return setting.measure(programs)


class Setting:
    """Model, state and frozen parameters on the first device, for programs measured in turn."""

    def __init__(self, size: Size, kind: Kind, fields: Fields):
        self.size, self.kind, self.device = size, kind, jax.devices()[0]
        self.mesh = make_mesh(devices=[self.device])
        self.model = inputs.model_config(inputs.SHAPES[size.model], size.length)
        self.params = jax.jit(init_params, static_argnums=0)(self.model, jax.random.key(0))
        config = with_fields(
            TrainConfig(),
            **{"dtype": "bfloat16", "max_length": size.length, "share_prompts": "never"},
            **{"loss_options": {"beta": 0.1}, "reference": "live"},
            **_of_stages("batch_size", size.pairs, 2 * size.pairs),
            **_of_stages("optimizer.learning_rate", 1e-6, 1e-6),
            **_of_stages("optimizer.schedule", "constant", "constant"),
        )
        config = with_fields(config, **fields)
        with compiling_for(self.device.platform, 1):
            if config.remat == "auto":
                config = dataclasses.replace(config, remat=self._remat(config))
            stage = kind.build(config, self.model)
        self.config = config
        start = jax.jit(lambda params: self._start(stage, params))
        shardings = parameter_shardings(jax.eval_shape(start, self.params), self.mesh)
        self.state = jax.jit(start, out_shardings=shardings)(self.params)
        self.frozen = stage.frozen(self.params, lambda params: params, lambda *_: None)
        self.params = jax.eval_shape(lambda params: params, self.params)

    def _remat(self, config: TrainConfig) -> str:
        """What `jaxalign train` would choose."""
        shapes = shapes_of(self.kind.build(config, self.model), self.model)
        choice, _ = choose_remat(
            self.kind,
            config,
            self.model,
            shapes,
            self.mesh,
            platform=self.device.platform,
            free=free_memory(self.device),
        )
        return choice

    def _start(self, stage: Stage, params: Any) -> TrainState:
        trained = jax.tree.map(jnp.copy, stage.trained(params))  # the reference stays
        return initial_state(trained, stage.optimizer, seed=0, running=stage.running)

    def program(self, fields: Fields, batch: Any = None, tokens: int | None = None) -> Program:
        """The step of the setting with other fields of the config, compiled.

        Args:
          fields: that differ from the setting's.
          batch: None: random rows of equal length.
          tokens: of the batch; None: those of rows of equal length.
        """
        size = self.size
        with compiling_for(self.device.platform, 1):
            stage = self.kind.build(with_fields(self.config, **fields), self.model)
            flops = None
            if batch is None:
                whole = self.kind is supervised.KIND  # there every token is a target
                response = size.length if whole else size.response
                structs, passes = stage.largest_batch(self.device.platform, response)
                flops = model_flops(stage, self.model, self.params, self.state.params, passes)
                batch = random_batch(size, structs)
            step = stage.probed_step if stage.probe_every else stage.step
            assert step is not None
            placed, start = shard_batch(batch, self.mesh), time.perf_counter()
            lowered = compile_step(step, self.state, self.mesh).lower(
                self.state, self.frozen, placed
            )
            compiled = lowered.compile()
        return Program(
            run=compiled,
            batch=placed,
            tokens=2 * size.pairs * size.length if tokens is None else tokens,
            flops=flops,
            memory=peak(compiled.memory_analysis()),
            compile_seconds=time.perf_counter() - start,
        )

    def measure(self, programs: Mapping[str, Program]) -> dict[str, Row]:
        """All programs in turn, each step waited for; the first are not counted."""
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        metrics: dict[str, list[Any]] = {name: [] for name in programs}
        for _ in range(self.size.skip + self.size.steps):
            for name, program in programs.items():
                start = time.perf_counter()
                self.state, seen = program.run(self.state, self.frozen, program.batch)
                jax.block_until_ready((self.state, seen))
                seconds[name].append(time.perf_counter() - start)
                metrics[name].append(seen)
        rows, first = {}, next(iter(programs))
        for name, program in programs.items():
            counted = slice(self.size.skip, None)
            own, base = seconds[name][counted], seconds[first][counted]
            floats = [to_floats(x) for x in jax.device_get(metrics[name])]
            rows[name] = throughput_row(self.device, own, program.tokens, program.flops) | {
                "ratio": statistics.median(a / b for a, b in zip(own, base, strict=True)),
                "program_bytes": program.memory,
                "compile_seconds": program.compile_seconds,
                "remat": self.config.remat,
                "losses": [x["loss"] for x in floats],
                "log_probs": [x for name, x in floats[0].items() if name in LOG_PROBS],
                "tokens": batch_fingerprint(program.batch),
            }
        return rows


def _of_stages(field: str, of_preference: Any, of_sft: Any) -> dict[str, Any]:
    return {f"preference.{field}": of_preference, f"sft.{field}": of_sft}


def throughput_row(
    device: Any, seconds: list[float], tokens: int, flops: float | None = None
) -> Row:
    """Median, tokens/s, MFU, and the largest memory of the process so far.

    Args:
      device: that ran it; its peak is that of its data sheet.
      seconds: of each step.
      tokens: of a step.
      flops: model FLOPs of a step.
    """
    median = statistics.median(seconds)
    known = PEAK_BFLOAT16.get(device.device_kind)
    return {
        "seconds": median,
        "all_seconds": seconds,
        "tokens_per_second": tokens / median,
        "flops": flops,
        "mfu": flops / median / known if flops and known else None,
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
    }


def model_flops(
    stage: Stage, model: DecoderConfig, params: Any, trained: Any, passes: list[Any]
) -> float:
    """Model FLOPs of a step, without recomputation.

    Per token and matrix parameter 2 forward, 4 backward (2 if only adapters are trained) and 2 for
    the reference, the head at scored positions only; attention's own products, of which causality
    leaves half.

    Args:
      stage: of the step.
      model: the architecture.
      params: of the model.
      trained: parameters.
      passes: of the step, as the stage's `largest_batch` returns them.
    """
    done = work(
        model,
        params,
        trained,
        passes,
        make_mesh(devices=jax.devices()[:1]),
        moments=0,
        adapters=stage.adapter_scale is not None,
        remat="none",
        dtype=jnp.bfloat16,
    )
    return done.model_flops + (done.flops - done.model_flops) / 2


def random_batch(size: Size, structs: Any) -> Any:
    """The rows that the peers read, in the form of these shapes."""
    vocabulary, prompt = inputs.SHAPES[size.model].vocabulary, size.length - size.response
    rows = inputs.random_rows(vocabulary, size.length, size.pairs, prompt)
    if isinstance(structs, PairBatch):
        tokens = rows.reshape(-1, 1, size.length)
        one = np.ones((len(tokens), 1), np.int32)
        return PairBatch(
            tokens=tokens,
            prompt_length=one,  # nothing is before the first token
            response_tokens=tokens[..., 1:],
            response_length=(size.length - 1) * one,
            record_index=np.arange(len(tokens), dtype=np.int32),
            weight=np.ones(len(tokens), np.float32),
        )
    full = np.ones((size.pairs, 2), np.int32)
    joint, common = None, None
    if structs.pairs.joint_tokens is not None:
        joint = np.concatenate([rows[:, 0], rows[:, 1, prompt:]], axis=1)
        common = np.full(size.pairs, prompt, np.int32)
    pairs = PairBatch(
        tokens=rows,
        prompt_length=prompt * full,
        response_tokens=rows[..., prompt:],
        response_length=size.response * full,
        record_index=np.arange(size.pairs, dtype=np.int32),
        weight=np.ones(size.pairs, np.float32),
        joint_tokens=joint,
        common_length=common,
    )
    return ReferencedBatch(pairs=pairs, reference=None)


def batch_fingerprint(batch: Any) -> str:
    """A hash of the rows of a batch, whatever their order."""
    tokens = np.asarray(getattr(batch, "pairs", batch).tokens)
    return fingerprint(tokens.reshape(-1, tokens.shape[-1]).tolist())


def packed_pairs(size: Size) -> dict[str, Row]:
    """Pairs of unlike lengths, padded or packed in one row; tokens are those without padding."""
    if "packing" not in {field.name for field in dataclasses.fields(PreferenceConfig)}:
        return {"packed": {"note": "not measured: this version of jaxalign does not pack pairs"}}
    packing: Any = importlib.import_module("jaxalign.data.packing")  # not in every version
    options = {"batch_size": size.pairs, "shuffle": False}
    pairs = pairs_of_unlike_lengths(size)
    batches = {
        "padded": next(iter(pair_batches(pairs, buckets=1, **options))),
        "packed": next(iter(packing.packed_batches(pairs, packing.Packing(), **options))),
    }
    setting = Setting(size, preference.KIND, {})
    total = int(np.sum(pairs.length))
    return setting.measure(
        {
            name: setting.program({}, ReferencedBatch(pairs=batch, reference=None), total)
            for name, batch in batches.items()
        }
    )


def pairs_of_unlike_lengths(size: Size) -> TokenizedPairs:
    """Random pairs: prompts and responses of uniformly distributed lengths."""
    rng, vocabulary = np.random.default_rng(0), inputs.SHAPES[size.model].vocabulary
    prompts = np.repeat(rng.integers(4, size.length - size.response, size.pairs), 2)
    lengths = prompts + rng.integers(2, size.response + 1, 2 * size.pairs)
    tokens = [rng.integers(3, vocabulary, length, np.int32) for length in lengths]
    for chosen, rejected, prompt in zip(tokens[::2], tokens[1::2], prompts[::2], strict=True):
        rejected[:prompt] = chosen[:prompt]
    rows = TokenizedRows(
        flat=np.concatenate(tokens),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        prompt_length=prompts.astype(np.int32),
        record_index=np.repeat(np.arange(size.pairs), 2),
    )
    return TokenizedPairs(rows=rows)


# ----------------------------------------------------------------------------------- sampling


def sampling(size: Size) -> dict[str, Row]:
    """Greedy tokens with a cache, weights in bfloat16, for each number of rows."""
    model = inputs.model_config(inputs.SHAPES[size.model], size.length)
    device = jax.devices()[0]
    mesh, result = make_mesh(devices=[device]), {}
    init = jax.jit(functools.partial(init_params, dtype=jnp.bfloat16), static_argnums=0)
    params, settings = (
        init(model, jax.random.key(0)),
        Sampling(max_tokens=size.new, temperature=0.0),
    )
    for count in size.sampled_rows:
        run = compile_generate(model, mesh, sampling=settings, samples=1, dtype=jnp.bfloat16)
        prompts = sampling_prompts(size, count)
        lengths = np.full(count, prompts.shape[1], np.int32)
        given = ([params], jnp.asarray(prompts), jnp.asarray(lengths), jax.random.key(0))
        with compiling_for(device.platform, 1):
            compiled = run.lower(*given, jnp.ones(1), 0).compile()
        weights, first = jnp.ones(1), jnp.int32(0)
        seconds = [timed(compiled, *given, weights, first) for _ in range(2 + size.steps // 3)]
        name = f"jaxalign, {count} rows"
        result[name] = throughput_row(device, seconds[1:], count * size.new)
    return result


def sampling_prompts(size: Size, rows: int) -> np.ndarray:
    """The prompts of both contestants, [rows, prompt]."""
    rng, vocabulary = np.random.default_rng(0), inputs.SHAPES[size.model].vocabulary
    prompt = size.length - size.response
    return rng.integers(len(inputs.SPECIAL), vocabulary, (rows, prompt), np.int32)


def timed(run: Callable[..., Any], *arguments: Any) -> float:
    """Seconds until the results of a call are there."""
    start = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    return time.perf_counter() - start


def device_facts() -> dict[str, Any]:
    """The first device, by JAX."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "jax": jax.__version__,
        "peak_flops": PEAK_BFLOAT16.get(device.device_kind),
        "memory_limit": (device.memory_stats() or {}).get("bytes_limit"),
    }
