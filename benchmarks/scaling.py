"""Memory and traffic of a DPO step on slices of 16 to 4,096 chips, compiled and on paper.

Command:  python -m benchmarks.scaling [--models llama-3-8b llama-3-70b] [--json FILE] [--plot FILE]
Time:     one to two minutes a row on two CPU cores; needs pip install 'jaxalign[tpu]', not a TPU
Expect:   one table (tpu/README.md shows it) and one figure

One pair a chip (prompt 1,024, responses 1,024), bfloat16, everything rematerialised, AdamW, a live
reference in float32; parameters are split over up to 256 chips, whole copies of them over the rest.
512 chips are two slices that a network joins, with one copy each.
Memory is what the TPU's compiler reserves on each chip; FLOPs and bytes over links are by formula
(`jaxalign.planning.cost_model`), seconds are these over the chip's data sheet, whichever is
longest: no step is faster.
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxalign.config import MeshConfig, PreferenceConfig, TrainConfig
from jaxalign.planning.plans import Plan, make_plan

ROOT = Path(__file__).resolve().parents[1]
TOPOLOGIES = {
    16: "v5p:2x2x4",
    64: "v5p:4x4x4",
    256: "v5p:4x8x8",
    512: "2xv5p:4x8x8",
    1024: "v5p:8x8x16",
    4096: "v5p:16x16x16",
}
WHOLE = 256
"""Chips over which one copy of the parameters is split, at most."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is compiled."""

    models: tuple[str, ...] = ("llama-3-8b", "llama-3-70b")
    """Folders of tpu/shapes."""
    chips: tuple[int, ...] = tuple(TOPOLOGIES)
    """Sizes of slices."""
    length: int = 2048
    """Tokens of prompt and response together; half of them are response."""
    attention: Literal["auto", "blocked", "flash"] = "auto"
    """Implementation of attention; auto: the kernels, flash."""
    json: Path | None = None
    """Where to write all plans; rows that it holds already are not compiled again."""
    plot: Path | None = None
    """Where to write the figure."""


def main(options: Options) -> None:
    """Compile, print, draw."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    known = {}
    if options.json is not None and options.json.exists():
        known = json.loads(options.json.read_text())
    plans: dict[str, dict[str, Any]] = {}
    print(
        "| model | chips | mesh | GiB a chip | of it lasting | GiB over links | over the network "
        "| bound, s | MFU |"
    )
    print("|---|---:|---|---:|---:|---:|---:|---:|---:|")
    for model in options.models:
        for chips in options.chips:
            key = named(options, model, chips)
            plan = known.get(key) or dataclasses.asdict(compiled(options, model, chips))
            plans[key] = plan
            print(row(model, chips, Plan(**plan)), flush=True)
            if options.json is not None:
                options.json.write_text(json.dumps(known | plans, indent=1) + "\n")
    if options.plot is not None:
        draw(options, {key: Plan(**plan) for key, plan in plans.items()})


def named(options: Options, model: str, chips: int) -> str:
    """A row's key in the JSON file."""
    return f"{model} {chips} {options.length} {options.attention}"


def compiled(options: Options, model: str, chips: int) -> Plan:
    """The plan of a row."""
    length = options.length
    fsdp = min(chips, WHOLE)
    config = TrainConfig(
        model=str(ROOT / "tpu" / "shapes" / model),
        max_length=length,
        preference=PreferenceConfig(steps=1, batch_size=chips),
        mesh=MeshConfig(data=chips // fsdp, fsdp=fsdp),
        dtype="bfloat16",
        remat="full",
        attention=options.attention,
    )
    return make_plan(config, TOPOLOGIES[chips], "preference", response=length // 2)


def row(model: str, chips: int, plan: Plan) -> str:
    """One line of the table."""
    mesh = " × ".join(f"{name} {size}" for name, size in plan.mesh.items() if size > 1)
    gib, links = 2**30, sum(plan.work["links"].values())
    if plan.total is None:
        need = f"{plan.needed[0] / gib:.0f}" if plan.needed else "more than there are"
        space = f"does not fit ({need} of temporaries)"
    else:
        space = f"{plan.total / gib:.1f}" + ("" if plan.fits else " (does not fit)")
    lasting = f"{sum(plan.lasting.values()) / gib:.1f}"
    network = plan.work["network"]
    joined = f"{network / gib:.2f}" if network else "–"
    limit = max(plan.seconds, key=lambda name: plan.seconds[name])
    return (
        f"| {model} | {chips:,} | {mesh} | {space} | {lasting} | {links / gib:.1f} "
        f"| {joined} | {plan.bound:.2f} ({limit}) | {plan.utilisation:.0%} |"
    )


def draw(options: Options, plans: dict[str, Plan]) -> None:
    """Memory and seconds by number of chips."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    for number, model in enumerate(options.models):
        own = [plans[named(options, model, chips)] for chips in options.chips]
        color = f"C{number}"
        totals = {
            chips: plan.total / 2**30
            for chips, plan in zip(options.chips, own, strict=True)
            if plan.total is not None
        }
        left.plot(totals.keys(), totals.values(), "o-", color=color, label=model)
        for name, style in (("compute", "-"), ("links", "--")):
            seconds = [plan.seconds[name] for plan in own]
            right.plot(options.chips, seconds, "o" + style, color=color, label=f"{model}: {name}")
    capacity = (next(iter(plans.values())).capacity or 0) / 2**30
    left.axhline(capacity, color="0.5", linestyle=":", label="a v5p chip")
    left.set(title="Memory per chip", ylabel="GiB", yscale="log")
    right.set(title="A step takes at least", ylabel="s", yscale="log")
    for axes in (left, right):
        axes.set(xlabel="chips (one pair each)", xscale="log", xticks=options.chips)
        axes.set_xticklabels([f"{chips:,}" for chips in options.chips])
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        axes.spines[["top", "right"]].set_visible(False)
    assert options.plot is not None
    figure.savefig(options.plot, dpi=130)


if __name__ == "__main__":
    main(tyro.cli(Annotated[Options, tyro.conf.arg(name="")]))
