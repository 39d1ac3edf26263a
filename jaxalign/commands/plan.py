"""`jaxalign plan EXPERIMENT --topology SLICE`: a step compiled for a slice without owning one."""

import dataclasses
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxalign.commands.arguments import parser
from jaxalign.commands.experiment import parse
from jaxalign.config import TrainConfig
from jaxalign.errors import UserError

DESCRIPTION = """Compile the preference step of an experiment for a TPU slice with the real TPU
compiler, on any machine (pip install 'jaxalign[tpu]'), and print what each chip holds, does and
exchanges. Every field of the config can be set as in train: --model FOLDER (a config.json is
enough), --mesh.fsdp 64, --preference.batch-size 256, --remat full."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A step on a slice: what the compiler reserves, and the time that no schedule can beat."""

    mesh: dict[str, int]
    remat: str
    memory: dict[str, int] | None
    """Bytes per chip; None where the compiler found no room."""
    needed: list[float]
    """Where it does not fit: bytes needed and bytes there are, as the compiler says."""
    capacity: int | None
    work: dict[str, float | int]
    seconds: dict[str, float]
    """At least, by what limits it: compute, memory, links."""
    compile_seconds: float

    @property
    def fits(self) -> bool:
        """Whether a chip holds it."""
        if self.memory is None:
            return False
        return self.capacity is None or sum(self.memory.values()) <= self.capacity

    @property
    def bound(self) -> float:
        """Seconds of a step, at least."""
        return max(self.seconds.values(), default=float("nan"))


def main(arguments: Sequence[str]) -> int:
    """Parse, compile, print; 1 where nothing fits."""
    flags = parser("plan", DESCRIPTION)
    flags.allow_abbrev = False
    flags.add_argument("experiment", help="a Python file or module with config()")
    flags.add_argument(
        "--topology",
        required=True,
        help="generation (v5e, v5p, v6e) and chips along each axis: v5p:4x4x4; cpu:8 for a trial",
    )
    flags.add_argument("--scale", default="paper", help="of the experiment: tiny or paper")
    flags.add_argument(
        "--response", type=int, help="tokens of the longest response; all of max_length if not set"
    )
    flags.add_argument("--sweep", action="store_true", help="meshes and remat, ranked")
    flags.add_argument("--json", type=Path, help="file for the figures")
    given, fields = flags.parse_known_args(arguments)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the slice is only compiled for
    config = parse([given.experiment, "--scale", given.scale, *fields])
    if not (config.preference.steps or config.online.steps):
        raise UserError(f"{config.name}: has neither a preference nor an online stage to plan")
    plans = []
    for candidate in candidates(config, given.topology) if given.sweep else [config]:
        plan = make_plan(candidate, given.topology, given.response)
        plans.append(plan)
        print(line(plan) if given.sweep else page(candidate, given.topology, plan), flush=True)
    if given.sweep:
        ranked = sorted((plan for plan in plans if plan.fits), key=lambda plan: plan.bound)
        print("\nfastest bound of those that fit:" if ranked else "\nnone fits: " + MEND)
        for plan in ranked[:5]:
            print(line(plan))
    if given.json is not None:
        text = json.dumps([dataclasses.asdict(plan) for plan in plans], indent=2)
        given.json.write_text(text + "\n", encoding="utf-8")
    return 0 if any(plan.fits for plan in plans) else 1


MEND = (
    "more chips, a larger mesh.fsdp, --remat full, more micro-batches, a smaller batch size or "
    "length, or adapters (--lora.rank) make it smaller"
)


def planned(config: TrainConfig) -> str:
    """The stage that a plan is of: its preference stage, or else its online stage."""
    return "preference" if config.preference.steps else "online"


def model_of(config: TrainConfig) -> Any:
    """The architecture, without any weights."""
    from jaxalign.commands.stages import embedded_config
    from jaxalign.models.weights import find_folder, read_config

    if config.model == "embedded":
        return embedded_config(config.architecture, config.architecture.vocabulary)
    return read_config(find_folder(config.model))


def make_plan(config: TrainConfig, topology: str, response: int | None) -> Plan:
    """Compile the preference step of a config for a slice, or the update of its online step."""
    import jax
    import jax.numpy as jnp

    from jaxalign.commands.scores import trains_scores
    from jaxalign.commands.stages import parameter_structs
    from jaxalign.commands.training_data import joint_share
    from jaxalign.commands.updates import (
        make_objective,
        make_policy,
        make_update_rule,
        make_watch,
        remat_on,
    )
    from jaxalign.models.lora import init_adapters
    from jaxalign.models.score import SCORE
    from jaxalign.sharding import make_mesh
    from jaxalign.sharding.topologies import slice_devices
    from jaxalign.training.planning import TooLargeError, compiled_memory, pair_structs, work

    devices, chip = slice_devices(topology)
    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    name = planned(config)
    stage, model_config = getattr(config, name), model_of(config)
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    if (stage.batch_size // stage.micro_batches) % rows:
        raise UserError(
            f"{name}.batch_size: {stage.batch_size} in {stage.micro_batches} micro-batches is "
            f"not a multiple of data x fsdp = {rows}"
        )
    scored = trains_scores(config, name)
    params = parameter_structs(model_config, scored=scored)
    adapted = config.lora.rank > 0
    live = name == "online" or (config.reference == "live" and not scored)
    trained = params
    if adapted:
        trained = jax.eval_shape(
            lambda params: init_adapters(
                params, jax.random.key(0), rank=config.lora.rank, targets=config.lora.targets
            ),
            params,
        )
        if scored:
            trained = {**trained, SCORE: params[SCORE]}
    platform = devices[0].platform
    remat = remat_on(config, platform)
    policy = make_policy(config, name, model_config, platform=platform)
    if name == "online":
        objective, rollouts, batch = online_structs(config, policy)
    else:
        length, rollouts = config.max_length, None
        share = joint_share(config.share_prompts, model_config, platform)
        batch = pair_structs(
            stage.batch_size, length, response or length, reference=not live, joint_share=share
        )
        objective = make_objective(config, name, policy)
    optimizer = make_update_rule(stage)[0]
    moments = jax.eval_shape(optimizer.init, trained)
    watched = name == "preference" and config.entanglement.every
    start, memory, needed = time.perf_counter(), None, []
    try:
        used = compiled_memory(
            objective,
            optimizer,
            trained,
            {"policy": params if adapted else None, "reference": None if scored else params},
            rollouts or (batch.pairs if scored else batch),
            mesh,
            micro_batches=stage.micro_batches,
            watch=make_watch(config, objective) if watched else None,
        )
        memory = dataclasses.asdict(used)
    except TooLargeError as error:
        needed = error.sizes
    seconds = time.perf_counter() - start
    doing = work(
        model_config,
        params,
        trained,
        batch,
        mesh,
        moments=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(moments)),
        live_reference=live,
        adapters=adapted,
        remat=remat,
        dtype=jnp.dtype(config.dtype),
    )
    limits = {
        "compute": (doing.flops, chip.flops),
        "memory": (doing.memory_bytes, chip.bandwidth),
        "links": (doing.link_bytes, chip.link),
    }
    return Plan(
        mesh=dict(mesh.shape),
        remat=remat,
        memory=memory,
        needed=needed,
        capacity=chip.memory,
        work=dataclasses.asdict(doing),
        seconds={name: amount / rate for name, (amount, rate) in limits.items() if rate},
        compile_seconds=seconds,
    )


def online_structs(config: TrainConfig, policy: Any) -> tuple[Any, Any, Any]:
    """The online stage's objective, its rollouts' shapes, and those of as many tokens in pairs.

    Sampling between the updates takes memory of its own, for caches: it is not planned.
    """
    import jax
    import jax.numpy as jnp

    from jaxalign.commands.online import find_algorithm
    from jaxalign.data import PairBatch
    from jaxalign.online import OnlineObjective, RolloutBatch
    from jaxalign.training.planning import pair_structs

    algorithm = find_algorithm(config.rollout.algorithm, config.rollout.options)
    if algorithm.advantages is not None:
        raise UserError(f"rollout.algorithm: {config.rollout.algorithm} has a critic; not planned")
    prompts, response = config.online.batch_size, config.rollout.max_tokens
    length, samples = config.rollout.max_prompt_length + response, len(algorithm.draws)
    trained = prompts * algorithm.trained

    def rollouts() -> RolloutBatch:
        return RolloutBatch(
            responses=PairBatch(
                tokens=jnp.zeros((prompts, samples, length), jnp.int32),
                prompt_length=jnp.zeros((prompts, samples), jnp.int32),
                response_tokens=jnp.zeros((prompts, samples, response), jnp.int32),
                response_length=jnp.zeros((prompts, samples), jnp.int32),
                record_index=jnp.zeros(prompts, jnp.int32),
                weight=jnp.zeros(prompts),
            ),
            preference=jnp.zeros((prompts, samples, samples)),
            reward=jnp.zeros((prompts, samples)),
            baseline=jnp.zeros((prompts, samples)),
            sampled_log_prob=None,
        )

    tokens = pair_structs(-(-trained // 2), length, response, reference=False)
    objective = OnlineObjective(policy=policy, algorithm=algorithm)
    return objective, jax.eval_shape(rollouts), tokens


def candidates(config: TrainConfig, topology: str) -> Iterator[TrainConfig]:
    """Meshes of powers of two, and rematerialisation, for one batch size."""
    from jaxalign.sharding.topologies import slice_devices

    chips = len(slice_devices(topology)[0])
    heads = model_of(config).heads
    powers = [2**i for i in range(chips.bit_length()) if chips % 2**i == 0]
    for remat, tensor, fsdp in itertools.product(
        ("none", "dots", "full"), powers, reversed(powers)
    ):
        rows = chips // tensor
        stage = getattr(config, planned(config))
        split = stage.batch_size // stage.micro_batches
        if tensor > 8 or heads % tensor or rows % fsdp or split % rows:
            continue
        if fsdp < rows // 8:  # more than eight whole copies of the parameters: left out
            continue
        mesh = dataclasses.replace(config.mesh, data=rows // fsdp, fsdp=fsdp, tensor=tensor)
        yield dataclasses.replace(config, mesh=mesh, remat=remat)


def page(config: TrainConfig, topology: str, plan: Plan) -> str:
    """All of a plan, for people."""
    stage, gib = getattr(config, planned(config)), 2**30
    online = planned(config) == "online"
    what = config.rollout.algorithm if online else config.loss
    length = config.max_length
    if online:
        length = config.rollout.max_prompt_length + config.rollout.max_tokens
    chips = plan.mesh["data"] * plan.mesh["fsdp"] * plan.mesh["tensor"]
    mesh = ", ".join(f"{name} {size}" for name, size in plan.mesh.items())
    parts = f" in {stage.micro_batches} parts" if stage.micro_batches > 1 else ""
    lines = [
        f"{config.name}: {what} on {config.model}",
        f"{topology}, {chips} chips: {mesh}; remat {plan.remat}, {config.dtype}",
        f"a batch of {stage.batch_size} pairs of 2 x {length:,} tokens{parts}; "
        f"compiled in {plan.compile_seconds:.0f} s",
        "",
        "memory per chip, GiB (the compiler's)",
    ]
    if plan.memory is None:
        lines.append("  it does not fit" + _needed(plan))
        lines.append(f"  {MEND}")
    else:
        lines += [f"  {name:<12} {size / gib:9.3f}" for name, size in plan.memory.items()]
        total = f"  {'total':<12} {sum(plan.memory.values()) / gib:9.3f}"
        if plan.capacity is not None:
            total += f" of {plan.capacity / gib:.0f}: " + ("fits" if plan.fits else "does not fit")
        lines.append(total if plan.fits else f"{total}\n  {MEND}")
    doing = plan.work
    lines += [
        "",
        "a step on each chip, by formula",
        f"  {doing['flops'] / 1e12:,.1f} TFLOP, of them {doing['model_flops'] / 1e12:,.1f} the "
        "model's own",
        f"  {doing['memory_bytes'] / gib:,.1f} GiB of weights and moments read and written, at "
        "least",
        f"  {doing['link_bytes'] / gib:,.1f} GiB in over links, at least",
    ]
    if plan.seconds:
        slowest = max(plan.seconds, key=lambda name: plan.seconds[name])
        each = ", ".join(f"{name} {value:.3f}" for name, value in plan.seconds.items())
        used = doing["model_flops"] / plan.bound * plan.seconds["compute"] / doing["flops"]
        lines += [
            "",
            f"no step is faster than {plan.bound:.3f} s ({each}; {slowest} bounds it):",
            f"  at most {doing['tokens'] / plan.bound:,.0f} tokens/s, utilisation {used:.0%}",
        ]
    return "\n".join(lines)


def _needed(plan: Plan) -> str:
    if len(plan.needed) < 2:
        return ""
    need, there = (size / 2**30 for size in plan.needed)
    return f": {need:.1f} GiB are needed for temporaries, and there are {there:.1f}"


def line(plan: Plan) -> str:
    """One of a sweep."""
    mesh = " ".join(f"{name} {size:>4}" for name, size in plan.mesh.items())
    if plan.memory is None:
        size = "does not fit" + _needed(plan)
    else:
        size = f"{sum(plan.memory.values()) / 2**30:7.2f} GiB" + ("" if plan.fits else " > chip")
    bound = f"{plan.bound:8.3f} s" if plan.seconds else ""
    return f"{mesh}  remat {plan.remat:<5} {bound}  {size}"
