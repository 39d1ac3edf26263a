"""Every experiment's `paper` config has steps that its slice holds, by the TPU's compiler."""

import dataclasses
import functools
import importlib
import inspect
import pkgutil
from pathlib import Path

import jax
import pytest

import experiments
from experiments.gradient_entanglement import cures, pairs, preference, sentiment
from experiments.ipo_md.online import online
from jaxalign.config import from_json, to_json, with_fields
from jaxalign.models.folders import read_config
from jaxalign.planning.pages import line
from jaxalign.planning.plans import make_plan
from jaxalign.runs.experiment import load_config
from jaxalign.stages import kinds_of
from jaxalign.stages.models import parameter_structs

SHAPES = Path(__file__).resolve().parents[2] / "tpu" / "shapes"
PARAMETERS = {
    "gpt2": 124_439_808,
    "llama-2-7b": 6_738_415_616,
    "llama-3-70b": 70_553_706_496,
    "llama-3-8b": 8_030_261_248,
    "mistral-7b-v0.2": 7_241_732_096,
    "pythia-2.8b": 2_775_208_960,
    "qwen3-30b-a3b": 30_532_122_624,
    "t5-v1_1-large": 783_150_080,
    "t5-v1_1-xl": 2_849_757_184,
}
"""As their model cards and papers have them."""
SLICES = {
    "base_lm.pretrain": ("", "v5e:2x4"),
    "data_collection.dpo": ("mistral-7b-v0.2", "v5p:2x2x2"),
    "ipo_md.ipo_md": ("t5-v1_1-large", "v5e:2x4"),
    "finetune": ("mistral-7b-v0.2", "v5p:2x2x2"),
    "judging.reward_model": ("mistral-7b-v0.2", "v5p:2x2x2"),
    "reward.true_answers:reward_model": ("t5-v1_1-xl", "v5e:2x4"),
    "reward.true_answers:preference_model": ("t5-v1_1-xl", "v5e:2x4"),
} | {
    f"{module}:{name}": (shape, slice_name)
    for module, shape, slice_name, names in (
        ("offline.hh", "pythia-2.8b", "v5p:2x2x2", "sft dpo ipo kto simpo"),
        (
            "rahf.methods",
            "llama-2-7b",
            "v5e:8x8",
            "instruction_sft preferred_sft rejected_sft hir dpo reward judge policy_gradient scit "
            "dual",
        ),
    )
    for name in names.split()
}
"""Experiments by module and function: the shape of their model (none: their own), their slice."""


def cured(name, **changes):
    """A run of the table of cures."""
    loss, options, watch = cures.CURES[name]
    watch = dataclasses.replace(watch, **changes)
    return pairs.settings("cure", "", "paper", loss, options, entanglement=watch)


OTHERS = {
    "gradient_entanglement.pairs": {
        "sft": lambda: pairs.sft_settings("", "paper"),
        "realised": lambda: cured("dpo", realised=True),
        "normalised": lambda: cured("dpo, normalised"),
        "learned mask": lambda: cured("dpo, learned mask"),
    },
    "gradient_entanglement.preference": {
        "adamw": lambda: preference.config_of("dpo", "adamw", "", "paper")
    },
    "gradient_entanglement.sentiment": {
        "sft": lambda: sentiment.sft_settings("long suffix", Path("data.jsonl"), "", "paper"),
        "dpo": lambda: sentiment.settings("long suffix", Path("data.jsonl"), "", "paper"),
    },
    "ipo_md.online": {
        name: functools.partial(online, "paper", name)
        for name in ("online_ipo", "nash_md_pg", "nash_ema_pg", "rloo", "ppo", "xpo")
    },
}
"""Modules whose configs are made in other ways, and a config of each shape."""
OF_OTHERS = {
    "gradient_entanglement.pairs": ("pythia-2.8b", "v5p:2x2x2"),
    "gradient_entanglement.preference": ("pythia-2.8b", "v5p:2x2x2"),
    "gradient_entanglement.sentiment": ("gpt2", "v5e:2x2"),
    "ipo_md.online": ("t5-v1_1-large", "v5e:2x4"),
}
"""Modules that the others of their folder get their configs from."""

CASES = [
    pytest.param(functools.partial(load_config, f"experiments.{name}", "paper"), *where, id=name)
    for name, where in SLICES.items()
] + [
    pytest.param(make, *OF_OTHERS[name], id=f"{name}: {what}")
    for name, configs in OTHERS.items()
    for what, make in configs.items()
]


def scaled_modules():
    """The modules of experiments that make configs at a scale."""
    for found in pkgutil.walk_packages(experiments.__path__, "experiments."):
        own = [
            value
            for value in vars(importlib.import_module(found.name)).values()
            if inspect.isfunction(value) and value.__module__ == found.name
        ]
        if any("scale" in inspect.signature(function).parameters for function in own):
            yield found.name.removeprefix("experiments.")


def test_no_experiment_is_forgotten():
    assert set(scaled_modules()) == {name.partition(":")[0] for name in SLICES} | OTHERS.keys()


def test_shapes_have_the_published_numbers_of_parameters():
    found = {}
    for folder in SHAPES.iterdir():
        structs = parameter_structs(read_config(folder))
        found[folder.name] = sum(x.size for x in jax.tree.leaves(structs))
    assert found == PARAMETERS


@functools.cache
def plan_of(text, name, slice_name):
    return make_plan(from_json(text), slice_name, name)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "shape", "slice_name"), CASES)
def test_the_paper_config_fits(make, shape, slice_name, optimised):
    pytest.importorskip("libtpu", reason="the TPU's compiler comes with the extra tpu")
    config = make()
    # what changes no program is left out, so that one program is compiled once
    same = {"name": "", "data": (), "eval_data": (), "sft_data": (), "sft_responses": "chosen"}
    model = str(SHAPES / shape) if shape else config.model
    text = to_json(with_fields(config, model=model, **same))
    for name in [kind.name for kind in kinds_of(config)]:
        plan = plan_of(text, name, slice_name)
        assert plan.fits, line(plan)
