"""`jaxalign plan EXPERIMENT --topology SLICE`: a run's steps compiled for a slice not owned."""

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxalign.commands.arguments import parser, within
from jaxalign.commands.experiment import parse
from jaxalign.config import AtLeastOne, TrainConfig
from jaxalign.errors import UserError
from jaxalign.files import check_output, write_text

if TYPE_CHECKING:
    from jaxalign.commands.planning.steps import Draft, Plan

DESCRIPTION = """Compile the steps of an experiment for a TPU slice with the real TPU compiler, on
any machine (pip install 'jaxalign[tpu]'), and print what each chip holds, does and exchanges; the
exit status is 1 where a stage does not fit. Every field of the config can be set as in train:
--model FOLDER (a config.json is enough), --mesh.fsdp 64, --preference.batch-size 256, --remat full.
"""


def main(arguments: Sequence[str]) -> int:
    """Parse, compile, print; 1 where a stage does not fit."""
    flags = parser("plan", DESCRIPTION)
    flags.allow_abbrev = False
    flags.add_argument("experiment", help="Python file or module with config()")
    flags.add_argument(
        "--topology",
        required=True,
        help="TPU generation (v5e, v5p, v6e) and number of chips along each axis, v5p:4x4x4; "
        "cpu:8 for a "
        "trial",
    )
    flags.add_argument("--scale", default="paper", help="scale of the experiment: tiny or paper")
    flags.add_argument("--stage", help="stage to plan (default: all that the config runs)")
    flags.add_argument(
        "--response",
        type=within(AtLeastOne),
        help="number of tokens in the longest response (default: max_length)",
    )
    flags.add_argument(
        "--sweep",
        action="store_true",
        help="try meshes, batch sizes, micro-batches and remat, the best bound first, until "
        "--most fit",
    )
    flags.add_argument(
        "--most",
        type=within(AtLeastOne),
        default=5,
        help="number of fitting plans that a sweep looks for",
    )
    flags.add_argument(
        "--json", type=Path, help="JSON file to write the numbers to (default: none)"
    )
    given, fields = flags.parse_known_args(arguments)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the slice is only compiled for
    config = parse([given.experiment, "--scale", given.scale, *fields])
    if given.json is not None:
        check_output(given.json, "--json")
    stages = stages_of(config, given.stage)
    if given.sweep and len(stages) > 1:
        raise UserError(f"--sweep: is of one stage; add --stage {' or --stage '.join(stages)}")
    each = swept if given.sweep else planned
    plans = [plan for name in stages for plan in each(config, name, given)]
    if given.json is not None:
        text = json.dumps([dataclasses.asdict(plan) for plan in plans], indent=2)
        write_text(given.json, text + "\n")
    fits = [plan.fits for plan in plans]
    return 0 if (any(fits) if given.sweep else all(fits)) else 1


def stages_of(config: TrainConfig, name: str | None) -> list[str]:
    """The stages to plan.

    Raises:
      UserError: the config runs none, or not that one.
    """
    from jaxalign.commands.stages import trained_stages

    stages = trained_stages(config)
    if not stages:
        raise UserError(f"{config.name}: has no stage to plan; set --preference.steps")
    if name is None:
        return stages
    if name not in stages:
        raise UserError(f"--stage: {config.name} runs no {name!r}; it runs {', '.join(stages)}")
    return [name]


def planned(config: TrainConfig, name: str, given: argparse.Namespace) -> "list[Plan]":
    """A stage as it is configured, and where it does not fit what would."""
    from jaxalign.commands.planning.pages import page
    from jaxalign.commands.planning.steps import draft

    drafted = draft(config, given.topology, name, response=given.response)
    plan = drafted.plan()
    print(page(drafted, given.topology, plan) + "\n", flush=True)
    if not plan.fits:
        mend(drafted, given)
    return [plan]


def mend(drafted: "Draft", given: argparse.Namespace) -> None:
    """Print which flags make a stage fit, compiling one remedy after the other until one does."""
    from jaxalign.commands.planning.pages import GIB, size
    from jaxalign.commands.planning.search import least_chips, remedies
    from jaxalign.commands.planning.steps import draft

    print("smaller, one change after the other:", flush=True)
    for flags, config in remedies(drafted):
        changed = draft(config, given.topology, drafted.stage, response=given.response)
        if changed.too_large:
            lasting = sum(changed.lasting.values()) / GIB
            print(f"  {flags}: {lasting:.2f} GiB stay between steps, does not fit", flush=True)
            continue
        plan = changed.plan()
        print(f"  {flags}: {size(plan)}", flush=True)
        if plan.fits:
            return
    print(
        f"  or a smaller batch or length, or more chips: {least_chips(drafted)} or more of these "
        "hold what stays between steps\n"
    )


def swept(config: TrainConfig, name: str, given: argparse.Namespace) -> "list[Plan]":
    """Ways to run a stage, each printed when it is compiled, and those that fit ranked."""
    from jaxalign.commands.planning.pages import line
    from jaxalign.commands.planning.search import sweep

    plans = []
    for plan in sweep(config, given.topology, name, response=given.response, most=given.most):
        plans.append(plan)
        print(line(plan), flush=True)
    fitting = [plan for plan in plans if plan.fits]
    print("\nhighest bound of those that fit:" if fitting else "\nnone fits")
    for plan in fitting:
        print(line(plan))
    return plans
