"""`jaxalign plan EXPERIMENT --topology SLICE`: steps compiled for TPUs you need not own."""

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from jaxalign.commands.experiment import parse as parse_config
from jaxalign.config import AtLeastOne, TrainConfig
from jaxalign.errors import UserError
from jaxalign.files import check_output, write_text
from jaxalign.flags import parse_known
from jaxalign.planning.pages import line, page, smaller
from jaxalign.planning.plans import Plan, draft
from jaxalign.planning.search import sweep
from jaxalign.stages import kinds_of


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compile an experiment's steps for a TPU slice with the real TPU compiler, on any machine.

    Prints what each chip holds, does and exchanges; the exit status is 1 where a stage does not fit
    (pip install 'jaxalign[tpu]'). Every field of the config can be set as in train: --model FOLDER
    (a config.json is enough), --mesh.fsdp 64, --preference.batch-size 256, --remat full.
    """

    experiment: Positional[str]
    """Python file or module with config()."""
    topology: str
    """TPU generation (v5e, v5p, v6e) and number of chips along each axis, v5p:4x4x4; 2xv5p:4x4x4 is
    two such slices; cpu:8 for a trial."""
    scale: str = "paper"
    """Scale of the experiment: tiny, small or paper."""
    stage: str | None = None
    """Stage to plan; by default all that the config runs."""
    response: AtLeastOne | None = None
    """Number of tokens in the longest response; by default max_length."""
    example_tokens: AtLeastOne | None = None
    """Mean number of tokens of an example (a pair with its prompt once), to plan packed rows
    (--packing); by default rows are padded."""
    sweep: bool = False
    """Whether to try meshes, batch sizes, micro-batches and remat, the best bound first, until
    --limit fit."""
    limit: AtLeastOne = 5
    """Number of fitting plans that a sweep looks for."""
    json: Path | None = None
    """JSON file to write the numbers to."""


def main(arguments: Sequence[str]) -> int:
    """Parse, compile, print; 1 where a stage does not fit."""
    options, fields = parse_known(Options, "plan", arguments)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the slice is only compiled for
    config = parse_config([options.experiment, "--scale", options.scale, *fields])
    if options.json is not None:
        check_output(options.json, "--json")
    stages = stages_of(config, options.stage)
    if options.sweep and len(stages) > 1:
        raise UserError(f"--sweep: is of one stage; add --stage {' or --stage '.join(stages)}")
    each = swept if options.sweep else planned
    plans = [plan for name in stages for plan in each(config, name, options)]
    if options.json is not None:
        text = json.dumps([dataclasses.asdict(plan) for plan in plans], indent=2)
        write_text(options.json, text + "\n")
    fits = [plan.fits for plan in plans]
    return 0 if (any(fits) if options.sweep else all(fits)) else 1


def stages_of(config: TrainConfig, name: str | None) -> list[str]:
    """The stages to plan.

    Raises:
      UserError: the config runs none, or not that one.
    """
    stages = [kind.name for kind in kinds_of(config)]
    if not stages:
        raise UserError(f"{config.name}: has no stage to plan; set --preference.steps")
    if name is None:
        return stages
    if name not in stages:
        raise UserError(f"--stage: {config.name} runs no {name!r}; it runs {', '.join(stages)}")
    return [name]


def planned(config: TrainConfig, name: str, options: Options) -> list[Plan]:
    """A stage as it is configured, and where it does not fit what would."""
    response, mean = options.response, options.example_tokens
    drafted = draft(config, options.topology, name, response=response, example_tokens=mean)
    plan = drafted.plan()
    print(page(drafted, options.topology, plan) + "\n", flush=True)
    if not plan.fits:
        for text in smaller(drafted, options.topology, response, mean):
            print(text, flush=True)
    return [plan]


def swept(config: TrainConfig, name: str, options: Options) -> list[Plan]:
    """Ways to run a stage, each printed when it is compiled, and those that fit ranked."""
    plans = []
    for plan in sweep(
        config,
        options.topology,
        name,
        response=options.response,
        example_tokens=options.example_tokens,
        limit=options.limit,
    ):
        plans.append(plan)
        print(line(plan), flush=True)
    fitting = [plan for plan in plans if plan.fits]
    print("\nhighest bound of those that fit:" if fitting else "\nnone fits")
    for plan in fitting:
        print(line(plan))
    return plans
