"""Plans as text: one page, or one line of a list."""

from collections.abc import Iterator

from jaxalign.planning.plans import Plan, UncompiledPlan, draft
from jaxalign.planning.search import least_chips, remedies

GIB = 2**30


def page(planned: UncompiledPlan, topology: str, plan: Plan) -> str:
    """A plan in full.

    Args:
      planned: the plan before compilation.
      topology: name of the slice.
      plan: the compiled plan.
    """
    sizes = {name: size for name, size in plan.mesh.items() if name != "expert" or size > 1}
    mesh = ", ".join(f"{name} {size}" for name, size in sizes.items())
    config, chips = planned.config, planned.mesh.size
    lines = [
        f"{config.name}, {plan.stage}: {_what(planned)}",
        f"{topology}, {chips} chips: {mesh}; remat {plan.remat}, {config.dtype}",
        f"{_batch(planned)}; compiled in {plan.compile_seconds:.0f} s",
        "",
        *_memory(plan),
        "",
        *_work(plan),
    ]
    if plan.seconds:
        slowest = max(plan.seconds, key=lambda name: plan.seconds[name])
        each = ", ".join(f"{name} {value:.3f}" for name, value in plan.seconds.items())
        rate = plan.work["tokens"] / plan.bound
        lines += [
            "",
            f"no step is faster than {plan.bound:.3f} s ({each}; {slowest} bounds it):",
            f"  at most {rate:,.0f} tokens/s, utilisation {plan.utilisation:.0%}",
        ]
    if planned.stage.sampling is not None:
        lines.append("  without the time of sampling and of the annotator")
    return "\n".join([*lines, *_attention(planned)])


def _attention(planned: UncompiledPlan) -> list[str]:
    """Memory and traffic of one layer's attention."""
    costs = planned.attention_costs()
    if not costs:
        return []
    unit, name = _unit(max(cost.traffic for cost in costs))
    lines = [
        f"  {cost.implementation:<10} {cost.temporaries / unit:9.3f} of temporaries, "
        f"{cost.traffic / unit:9.3f} read and written"
        for cost in costs
    ]
    rows = f"rows of {planned.passes[0].length:,} tokens"
    return [
        "",
        f"attention of one layer on each chip, forward and backward, {rows}, {name}",
        *lines,
    ]


def smaller(
    planned: UncompiledPlan, topology: str, response: int | None, example_tokens: int | None = None
) -> Iterator[str]:
    """Lines with flags that make a stage smaller, compiled one by one until it fits.

    Args:
      planned: a plan that does not fit.
      topology: name of the slice.
      response: as in `draft`.
      example_tokens: as in `draft`.
    """
    yield "smaller, one change after the other:"
    for flags, config in remedies(planned):
        changed = draft(
            config,
            topology,
            planned.stage.name,
            response=response,
            example_tokens=example_tokens,
        )
        if changed.too_large:
            lasting = sum(changed.lasting.values()) / GIB
            yield f"  {flags}: {lasting:.2f} GiB stay between steps: does not fit"
            continue
        plan = changed.plan()
        yield f"  {flags}: {size(plan)}"
        if plan.fits:
            return
    yield (
        f"  or a smaller batch or length, or more chips: {least_chips(planned)} or more of these "
        "hold what stays between steps\n"
    )


def _what(planned: UncompiledPlan) -> str:
    """Method and model of a stage."""
    config, lora = planned.config, planned.kind.adapters(planned.config)
    model = "a model with random weights" if config.model == "embedded" else config.model
    adapters = "" if lora is None else f", adapters of rank {lora.rank}"
    if lora is not None and lora.weights != "float32":
        adapters += f" over {lora.weights} weights"
    return f"{planned.stage.method} on {model}{adapters}"


def _batch(planned: UncompiledPlan) -> str:
    """The batch and its micro-batches."""
    stage = planned.stage
    parts = f" in {stage.micro_batches} parts" if stage.micro_batches > 1 else ""
    first, packed = planned.passes[0], ""
    if first.reach is not None:
        packed = f", packed in {first.rows} x {first.length:,}"
    return f"a batch of {stage.batch_size} {stage.rows}{parts}{packed}"


NAMES = {
    "parameters": "parameters trained",
    "optimizer": "optimiser",
    "reference": "reference, which moves",
    "frozen": "parameters frozen",
    "temporaries": "temporaries (gradients, activations)",
}


def _memory(plan: Plan) -> list[str]:
    """Memory of a chip by content."""
    parts = {NAMES.get(name, name): size for name, size in plan.lasting.items()}
    parts |= {NAMES.get(name, name): size for name, size in (plan.step or {}).items()}
    if plan.sampling is not None:
        parts["or while sampling (caches)"] = sum(plan.sampling.values())
    if plan.total is not None:
        parts["total"] = plan.total
    unit, name = _unit(max(parts.values()))
    lines = [f"  {part:<36} {size / unit:9.3f}" for part, size in parts.items()]
    if plan.total is None:
        lines.append("  does not fit" + _needed(plan))
    elif plan.capacity is not None:
        says = "fits" if plan.fits else "does not fit"
        lines[-1] += f" of {plan.capacity / unit:,.2f}: {says}"
    return [f"memory per chip, {name}", *lines]


def _work(plan: Plan) -> list[str]:
    """FLOPs and traffic of a chip."""
    doing, links = plan.work, plan.work["links"]
    network = doing.get("network", 0.0)
    flops, letter = (1e12, "T") if doing["flops"] >= 1e11 else (1e9, "G")
    unit, name = _unit(max(doing["memory_bytes"], sum(links.values())))
    return [
        "a step on each chip, by formula",
        f"  {doing['flops'] / flops:,.2f} {letter}FLOP, of them "
        f"{doing['model_flops'] / flops:,.2f} the model's own",
        f"  {doing['memory_bytes'] / unit:,.3f} {name} of weights and moments read and written, at "
        "least",
        f"  {sum(links.values()) / unit:,.3f} {name} in over links, at least",
        *(f"    {size / unit:12,.3f} {kind}" for kind, size in links.items()),
        *([f"  {network / unit:,.3f} {name} in over the network between slices"] * bool(network)),
    ]


def _unit(largest: int | float) -> tuple[int, str]:
    """GiB, or MiB if everything is below 1 GiB."""
    return (GIB, "GiB") if largest >= GIB else (2**20, "MiB")


def _needed(plan: Plan) -> str:
    """The memory that is missing according to the compiler."""
    if len(plan.needed) < 2:
        return ""
    need, there = (size / GIB for size in plan.needed)
    return f": {need:.2f} GiB are needed for temporaries, and there are {there:.2f}"


def size(plan: Plan) -> str:
    """Memory of a plan, and whether it fits."""
    if plan.total is None:
        return "does not fit" + _needed(plan)
    unit, name = _unit(plan.total)
    return f"{plan.total / unit:.2f} {name}" + (": fits" if plan.fits else ", does not fit")


def line(plan: Plan) -> str:
    """One line of a sweep."""
    hidden = ("sequence", *(["expert"] if plan.mesh.get("expert", 1) == 1 else []))
    shown = [(name, size) for name, size in plan.mesh.items() if name not in hidden]
    mesh = " ".join(f"{name} {size:>3}" for name, size in shown)
    batch = f"batch {plan.batch_size:>4} in {plan.micro_batches:>2}"
    rate = f"{plan.work['tokens'] / plan.bound:>11,.0f} tokens/s" if plan.seconds else ""
    return f"{mesh}  {batch}  remat {plan.remat:<5} {rate}  {size(plan)}"
