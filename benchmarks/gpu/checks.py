"""Whether a device computes what a CPU does: a tiny fixed model beside stored float32 values.

Parameters and tokens come from NumPy's generators, so that they are the same everywhere. The stored
values (`reference.json`) were computed in float32 on a CPU by
`python -m benchmarks.gpu --write-reference`.
"""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.config import TrainConfig, with_fields
from jaxalign.data import PairBatch, TextBatch
from jaxalign.entanglement import pair_geometry
from jaxalign.files import write_text
from jaxalign.generation import Sampling, generate
from jaxalign.models import DecoderConfig
from jaxalign.models.decoder import parameter_shapes
from jaxalign.models.devices import compiling_for
from jaxalign.stages import preference, supervised
from jaxalign.training.metrics import to_floats
from jaxalign.training.objectives import ReferencedBatch
from jaxalign.training.step import TrainState, initial_state

REFERENCE = Path(__file__).parent / "reference.json"
MODEL = DecoderConfig(
    vocab_size=512,
    width=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_width=16,
    mlp_width=176,
    context_length=64,
    tied=True,
)
PAIRS, LENGTH, RESPONSE, NEW = 4, 48, 24, 16
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.02}
"""Largest difference from the stored values, relative to the largest number of its array."""
SINGLE = {"log-probs": 0.1, "entropy": 0.1, "dpo/direction": 0.1, "sft/direction": 0.1}
"""The same for single tokens and directions in bfloat16, where no sum evens out the rounding."""
EXACT = ("tokens/greedy", "tokens/sampled")
"""Values that must be equal: in float32 alone, as bfloat16 may choose another near token."""
METRICS = (
    *("loss", "grad_norm", "logps/chosen", "logps/rejected", "rewards/margins", "entropy"),
    *("entanglement/norm_chosen", "entanglement/norm_rejected", "entanglement/d_w"),
)
"""Metrics of a watched step that are compared."""

Values = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Check:
    """A value beside the stored one."""

    name: str
    dtype: str
    error: float
    """Largest difference, relative to the largest number of the stored array."""
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance; that of a NaN is not."""
        return self.error <= self.tolerance


def check_device() -> list[Check]:
    """All values on this process's first device, in both dtypes, beside the stored ones."""
    stored = read_reference()
    return [check for dtype in TOLERANCE for check in compare(compute(dtype), stored, dtype)]


def compare(own: Values, stored: Mapping[str, Any], dtype: str) -> Iterator[Check]:
    """Each stored value beside the device's own.

    Args:
      own: computed by `compute`.
      stored: name -> numbers in float32.
      dtype: of the computation of `own`.
    """
    for name, numbers in stored.items():
        if dtype != "float32" and name not in own:
            continue
        reference, value = np.asarray(numbers, np.float64), own.get(name)
        if value is None or value.shape != reference.shape:
            error = float("nan")
        else:
            error = float(np.max(np.abs(value - reference)) / np.max(np.abs(reference)))
        tolerance = TOLERANCE[dtype]
        if name in EXACT:
            tolerance = 0.0
        elif dtype == "bfloat16":
            tolerance = SINGLE.get(name, tolerance)
        yield Check(name=name, dtype=dtype, error=error, tolerance=tolerance)


def failures(checks: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each check that failed.

    Args:
      checks: the fields of `Check`, as stored.
    """
    return [
        f"{x['dtype']} {x['name']}: differs by {x['error']:.1e}, at most {x['tolerance']:.0e}"
        for x in checks
        if not x["error"] <= x["tolerance"]
    ]


def read_reference() -> dict[str, Any]:
    """Name -> numbers, nested as the array's axes."""
    return json.loads(REFERENCE.read_text())["values"]


def write_reference() -> None:
    """Compute the values in float32 and store them."""
    values = {name: _rounded(value) for name, value in compute("float32").items()}
    made = {"jax": jax.__version__, "platform": jax.default_backend()}
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(x)}" for name, x in values.items())
    text = f'{{"made_with": {json.dumps(made)},\n"values": {{\n{rows}\n}}}}\n'
    write_text(REFERENCE, text)


def _rounded(value: np.ndarray) -> Any:
    if value.dtype.kind in "iu":
        return value.tolist()
    return np.vectorize(lambda x: float(f"{x:.9g}"), otypes=[float])(value).tolist()


def compute(dtype: str) -> Values:
    """Log-probs, losses, gradients, per-pair statistics and tokens of the fixed model.

    Args:
      dtype: of the computation; parameters are float32.
    """
    with compiling_for(jax.default_backend(), 1):
        values = _preferences(dtype) | _supervised(dtype)
        if dtype == "float32":
            values |= _tokens()
    return {name: np.asarray(value) for name, value in values.items()}


def _preferences(dtype: str) -> dict[str, Any]:
    """DPO: log-probs, Gram matrices, and the gradient and metrics of two watched steps."""
    stage = preference.KIND.build(_config(dtype), MODEL)
    assert stage.probed_step is not None
    params, frozen = parameters(0), {"policy": None, "reference": parameters(1)}
    batch = ReferencedBatch(pairs=pair_batch(), reference=None)
    policy = stage.objective.policy

    @jax.jit
    def read(params: Any, pairs: PairBatch) -> dict[str, jax.Array]:
        log_probs = policy.log_probs(pairs, params)
        geometry = pair_geometry(params, MODEL, pairs, compute=policy.compute)
        gram = jnp.stack([geometry.chosen, geometry.rejected, geometry.inner])
        return {"log-probs": log_probs.log_prob, "entropy": log_probs.entropy, "gram": gram}

    values: dict[str, Any] = dict(read(params, batch.pairs))
    state = initial_state(params, stage.optimizer, seed=0)
    step = jax.jit(stage.probed_step)
    for number in (1, 2):
        state, metrics = step(state, frozen, batch)
        floats = to_floats(metrics)
        values |= {f"dpo step {number}/{name}": floats[name] for name in METRICS}
        if number == 1:
            values |= _gradient("dpo", state)
    return values


def _supervised(dtype: str) -> dict[str, Any]:
    """SFT on two documents in a row: loss and gradient."""
    stage = supervised.KIND.build(_config(dtype), MODEL)
    state = initial_state(parameters(0), stage.optimizer, seed=0)
    state, metrics = jax.jit(stage.step)(state, {"policy": None, "reference": None}, text_batch())
    return {"sft/loss": to_floats(metrics)["loss"]} | _gradient("sft", state)


def _gradient(name: str, state: TrainState) -> dict[str, np.ndarray]:
    """The first step's gradient, from AdamW's first moment: norm and direction of each leaf.

    The direction is the cosine with a fixed random vector times the root of the leaf's size: a
    number of the order of 1.
    """
    moments = jax.tree.leaves(jax.device_get(optax.tree.get(state.opt_state, "mu")))
    fixed = jax.tree.leaves(jax.device_get(parameters(2)))
    norms = [np.linalg.norm(x) for x in moments]
    along = [
        np.vdot(x, y) / (norm * np.linalg.norm(y)) * x.size**0.5
        for x, y, norm in zip(moments, fixed, norms, strict=True)
    ]
    return {f"{name}/gradient norms": 10 * np.stack(norms), f"{name}/direction": np.stack(along)}


def _tokens() -> dict[str, Any]:
    """Tokens of greedy decoding, and of sampling with a fixed key; prompts of unlike lengths."""
    rng = np.random.default_rng(5)
    prompts = rng.integers(3, MODEL.vocab_size, (3, 6), np.int32)
    lengths = np.asarray([6, 4, 1], np.int32)
    values = {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        sampling = Sampling(max_tokens=NEW, temperature=temperature)
        run = jax.jit(functools.partial(generate, config=MODEL, sampling=sampling))
        out = run([parameters(0)], prompts=prompts, prompt_length=lengths, key=jax.random.key(0))
        values[f"tokens/{name}"] = out.tokens
        values[f"log-probs/{name}"] = out.policy_log_probs
    return values


def _config(dtype: str) -> TrainConfig:
    rule = {"optimizer.learning_rate": 1e-3, "optimizer.schedule": "constant"}
    rule |= {"optimizer.clip_norm": None}
    return with_fields(
        TrainConfig(),
        dtype=dtype,
        remat="none",
        max_length=LENGTH,
        **{f"{stage}.{name}": x for stage in ("preference", "sft") for name, x in rule.items()},
        **{"preference.batch_size": PAIRS, "entanglement.every": 1},
    )


def parameters(number: int) -> Any:
    """Parameters of the model: 0 the policy's, 1 a reference near it, 2 others."""
    rng = np.random.default_rng(number if number != 1 else 0)
    near = np.random.default_rng(1)

    def leaf(path: Any, shape: tuple[int, ...]) -> jax.Array:
        mean, spread = (1.0, 0.1) if path[-1].key == "scale" else (0.0, 0.2)
        value = mean + spread * rng.standard_normal(shape)
        if number == 1:
            value += 0.1 * spread * near.standard_normal(shape)
        return jnp.asarray(value, jnp.float32)

    shapes = parameter_shapes(MODEL)
    return jax.tree_util.tree_map_with_path(leaf, shapes, is_leaf=lambda x: isinstance(x, tuple))


def pair_batch() -> PairBatch:
    """Pairs of unlike lengths, padded."""
    rng = np.random.default_rng(3)
    prompt = np.repeat(rng.integers(4, LENGTH - RESPONSE + 1, (PAIRS, 1), np.int32), 2, axis=1)
    response = rng.integers(RESPONSE // 2, RESPONSE + 1, (PAIRS, 2), np.int32)
    tokens = np.zeros((PAIRS, 2, LENGTH), np.int32)
    responses = np.zeros((PAIRS, 2, RESPONSE), np.int32)
    for i in range(PAIRS):
        start = rng.integers(3, MODEL.vocab_size, prompt[i, 0])
        for side in range(2):
            own = rng.integers(3, MODEL.vocab_size, response[i, side])
            responses[i, side, : len(own)] = own
            tokens[i, side, : len(start) + len(own)] = np.concatenate([start, own])
    return PairBatch(
        tokens=jnp.asarray(tokens),
        prompt_length=jnp.asarray(prompt),
        response_tokens=jnp.asarray(responses),
        response_length=jnp.asarray(response),
        record_index=jnp.arange(PAIRS),
        weight=jnp.ones(PAIRS),
    )


def text_batch() -> TextBatch:
    """Two rows, each with two documents and padding."""
    rng, rows, first, end = np.random.default_rng(4), 2, 20, 44
    place = np.broadcast_to(np.arange(LENGTH), (rows, LENGTH))
    segments = np.where(place < first, 1, np.where(place < end, 2, 0))
    positions = np.where(place < first, place, np.where(place < end, place - first, 0))
    tokens = np.where(segments > 0, rng.integers(3, MODEL.vocab_size, (rows, LENGTH)), 0)
    arrays = (tokens, segments, positions, (segments > 0) * (positions >= 4))
    tokens, segments, positions, mask = (jnp.asarray(x, jnp.int32) for x in arrays)
    return TextBatch(
        tokens=tokens,
        segment_ids=segments,
        positions=positions,
        target_mask=mask,
        record_index=jnp.arange(rows),
        weight=jnp.ones(rows),
    )
