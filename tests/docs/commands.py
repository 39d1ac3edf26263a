"""The shell commands of the pages, and what a test changes in each to run it at a tiny size.

A page's name for something of the user's (`FOLDER`, `pairs.jsonl`) becomes a tiny thing of
`room.py`; a number of devices or of a checkpoint becomes one that there is; sizes are appended as
flags. `NOT_RUN` has the commands that cannot run here, with the reason.
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jaxalign.config import TrainConfig

ROOT = Path(__file__).parents[2]
PAGES = {
    str(page.relative_to(ROOT)): page.read_text(encoding="utf-8")
    for page in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted(ROOT.glob("docs/**/*.md")),
        *sorted(ROOT.glob("experiments/**/README.md")),
        ROOT / "tpu" / "README.md",
        ROOT / "benchmarks" / "README.md",
    ]
}
NAMES = {
    "SmolLM2-135M-Instruct.Q4_1.gguf": "MINE/model.gguf",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "MINE/model",
    "SmolLM2-135M-Instruct": "MINE/model",
    "babyllama105": "MINE/plain",
    "FOLDER": "MINE/model",
    "[FOLDER ...]": "MINE/plain",
    "rasbt_instruction_preference.jsonl": "MINE/pairs.jsonl",
    "ultrafeedback_train.jsonl": "MINE/test.jsonl",
    "DATA": "../shared/data",
    "URL#MODEL": "SERVER",
    "http://localhost:8000/v1#my-judge": "SERVER",
    "EXPERIMENT": "experiments/finetune.py",
    "NAME": "dpo",
    "runs/NAME": "runs/a",
    "reward:FOLDER": "reward:runs/rm",
    **{
        name: f"MINE/{name}"
        for name in (
            *(
                "pairs.jsonl",
                "test.jsonl",
                "labelled.jsonl",
                "feedback.jsonl",
                "prompts.jsonl",
                "new.jsonl",
            ),
            *("queries.jsonl", "examples.jsonl", "principles.json", "my_rules.py", "my_losses.py"),
            *("sums.jsonl", "sums.py"),
            *("dpo.jsonl", "sft.jsonl", "dpo_0.jsonl", "dpo_1.jsonl", "ipo_0.jsonl"),
        )
    },
    "tpu/shapes/llama-3-8b": "MINE/model",
    "tpu/shapes/t5-v1_1-large": "MINE/t5",
    "v5p:4x4x4": "cpu:4",
    "v5e:2x4": "cpu:8",
    "--mesh.fsdp 64": "--mesh.fsdp 4",
    "--mesh.fsdp 8 --mesh.tensor 2": "--mesh.fsdp 4 --mesh.tensor 2",
    "--step 100": "--step 2",
    "--step 700": "--step 2",
}
"""A page's name -> what stands for it; MINE is the user's folder, SERVER the endpoint's address."""
SIZES = {
    "generate": "--max-tokens 4",
    "entangle": "--pairs 2",
    "judge": "--resamples 20",
    "steer": "--steps 2",
    "collect": "--max-tokens 8",
    "optimize-prompt": "--width 1 --actions 1 --depth 1 --more-depth 0 --iterations 1 "
    "--examples 1 --examples-at-inference 1 --validate 2 --max-tokens 4",
    "plan": "--max-length 32 --response 16 --limit 1",
}
"""Flags appended to a command; those of `train` follow from its config (`small_flags`)."""
ADDED = {
    r"^jaxalign train .*--scale paper": "--model MINE/model --data MINE/pairs.jsonl",
    r"^jaxalign filter --persona": "--own-tokens 4",
    r"^jaxalign optimize-prompt --search gepa": "--pareto-queries 2 --minibatch 1 --budget 6",
    r"^jaxalign plan .*/hh.py": "--preference.batch-size 8",
    r"benchmarks\.decode_step": "--size 1M --batches 2 --prompt 8 --new 8 --repeats 1",
    r"benchmarks\.shared_prompts": "--size 1M --prompt 16 --response 8 --rounds 1",
    r"benchmarks\.entanglement": "--size 1M --length 16 --pairs 2 --rounds 1 --vocabulary 500",
    r"benchmarks\.group_entanglement": "--size 1M --length 16 --rounds 1 --vocabulary 500",
    r"benchmarks\.padding": "--max-length 64 --batch-sizes 8",
    r"benchmarks\.qlora": "--size 1M --length 64 --pairs 1 --skip 1 --steps 1",
    r"benchmarks\.packed_sft": "--max-length 64 --batch-size 4 --steps 2",
    r"benchmarks\.allocator": "--max-length 64 --batch-size 4 --steps 1 --rounds 1",
    r"benchmarks\.packed_probes": "--max-length 64 --batch-size 4 --steps 1",
    r"benchmarks\.streaming": "--megabytes 1 --max-length 64",
    "base_lm/pretrain.py": "--architecture.width 32 --architecture.layers 2 --architecture.heads 2 "
    "--architecture.kv-heads 1 --architecture.mlp-width 48 --architecture.vocabulary 512 "
    "--architecture.context 4096 --max-length 64",
}
"""A pattern of commands -> more flags for them: of configs whose data or size are no tiny ones."""
NEEDS = {
    "docs/guides/entanglement.md": ("runs/rm",),
    "docs/guides/generating.md": ("runs/a",),
    "docs/guides/models.md": ("runs/a",),
    "docs/guides/online.md": ("runs/rm",),
    "docs/guides/preference_data.md": ("runs/rm",),
    "docs/guides/python.md": ("runs/a",),
    "docs/guides/training.md": ("runs/a", "runs/b"),
    "docs/systems/best_of_n.md": ("runs/rm",),
    "docs/systems/gradient_entanglement.md": ("runs/base_lm/export",),
    "docs/systems/ipo_md.md": ("runs/rm",),
    "docs/systems/judging.md": ("runs/base_lm/export",),
    "docs/systems/rahf.md": ("runs/base_lm/export",),
    "docs/systems/drpo.md": ("runs/base_lm/export", "runs/judging_reward"),
    "experiments/data_collection/README.md": ("runs/base_lm/export",),
    "experiments/drpo/README.md": ("runs/base_lm/export",),
    "experiments/ipo_md/README.md": ("runs/rm",),
    "experiments/judging/README.md": ("runs/base_lm/export",),
    "experiments/rahf/README.md": ("runs/base_lm/export",),
}
"""Page -> what it takes for granted: runs, and models that another page made."""
STAGES = "pretrain", "sft", "preference", "feedback", "online", "representation"
NOT_RUN = {
    r"pip (install|download) .*|for (i|part) in .*|cat \$\(ls part.*": "needs the network",
    r"make (test|test-slow|lint|docs)": "makes an environment; .ci/run runs it",
    r"(gcloud|tpu/slice|tpu/gke|export|sbatch) .*": "a cloud; tests/tpu runs it with --dry-run",
    r"JAXALIGN_COORDINATOR=.*": "two hosts; tests/commands/test_processes.py runs two processes",
    r"python -m experiments\.data_collection\.compare": "a mention; its tasks are beside it",
    r"python -m experiments\.(offline\.|gradient_entanglement\.)?small .*": "an hour or a GPU; "
    "tests/experiments/test_cells.py has a tiny run",
    r"python -m experiments\.(judging|data_collection)\.small .*": "hours and real weights; "
    "tests/experiments/test_judging_small.py has the tables",
    r"python -m experiments\.offline\.judged .*": "needs a judge behind a server",
    r"python -m experiments\.costs .*": "needs a real model and the TPU's compiler",
    r"python -m experiments\.ipo_md\.small_read .*": "needs a judge behind a server",
    r"python -m experiments\.offline\.exported .*": "needs PyTorch and llama.cpp",
    r"python -m experiments\.ipo_md\.small .*": "an hour; tests/experiments/test_together.py",
    r"python -m experiments\.drpo\.small .*": "an hour and two real models; "
    "tests/experiments/test_drpo_small.py has scripted ones",
    r"python -m experiments\.rahf\.small .*": "minutes of a real chat model; its numbers and its "
    "tables are in tests/experiments/test_rahf.py",
    r"python -m build": "needs the network",
    r"jaxalign (collect METHOD|train EXPERIMENT)": "a placeholder, with commands beside it",
    r"python -m benchmarks\.(real_pairs|step_parts|dpo_step|sampling|loading|start_up) .*"
    r"|python -m benchmarks\.(step_parts)": "fetches PyTorch and TRL to compare with",
    r"python -m benchmarks\.int8_weights .*": "needs the weights of a real model",
    r"python -m benchmarks\.gpu .*": "needs a GPU; tests/benchmarks/test_gpu.py rehearses it",
    r"python -m venv .*": "needs the network",
    r"jaxalign evaluate .*--tasks.*": "needs the extra lm-eval; tests/evaluation/test_harness.py",
    r"python tests/fixtures/make_\w+\.py .*": "needs PyTorch",
    r"python -m pytest .* -k seed_oss": "of a family that test_add_a_family.py adds",
    r"jaxalign plan .*qwen3-30b-a3b.*": "an expert axis of 16; the TPU's compiler needs minutes",
    r"jaxalign plan .*2xv5p.*": "slices joined by a network need the TPU's compiler",
    r"python -m benchmarks\.head": "needs the TPU's compiler",
    r"python -m benchmarks\.scaling .*": "needs the TPU's compiler; `plan` is run for CPUs instead",
}
"""Commands that cannot run here, as patterns of the whole command -> why."""


def commands_of(text: str) -> list[str]:
    """The commands of a page in its order: of its shell blocks, and those with arguments in text.

    Continued lines are joined, comments dropped, `for` loops written out.
    """
    parts = re.split(r"^[ \t]*```(.*)$", text, flags=re.M)  # text, info, block, "", text, ...
    found: list[str] = []
    for number in range(0, len(parts), 2):
        inside = number % 4 == 2
        if inside and parts[number - 1].split()[:1] in (["sh"], ["bash"], ["console"]):
            found += _lines(parts[number])
        elif not inside:
            prose = re.findall(r"`((?:jaxalign|python -m|make) [^`]+)`", parts[number])
            found += [one for one in map(_joined, prose) if _runs(one)]
    return found


def _runs(command: str) -> bool:
    """Whether a command in the text is more than the name of a command."""
    words = command.split()
    alone = ["jaxalign losses", "jaxalign runs", "jaxalign --help", "jaxalign --version"]
    return words[0] != "jaxalign" or len(words) > 2 or command in alone


def _joined(text: str) -> str:
    return " ".join(text.split())


def _lines(block: str) -> list[str]:
    block = re.sub(r"(^|\s)#.*$", "", block.replace("\\\n", " "), flags=re.M)
    loop = r"^for (\w+) in (.*); do$\n(.*?)^done$"

    def unrolled(match: re.Match[str]) -> str:
        name, values, body = match.groups()
        variable = re.compile(rf"\$(?:{name}\b|{{{name}}})")
        return "".join(variable.sub(value, body) for value in values.split())

    block = re.sub(loop, unrolled, block, flags=re.M | re.S)
    return [line for line in map(_joined, block.splitlines()) if line]


SLOW = [
    page
    for page, text in PAGES.items()
    if commands_of(text)
    and page.startswith(
        (
            *("docs/systems/", "experiments/", "tpu/", "benchmarks/"),
            *("docs/guides/representation.md", "docs/guides/scaling.md"),
        )
    )
]
"""Pages whose commands take over ten seconds: of many models, or of many devices."""


def reason_not_to_run(command: str) -> str | None:
    """Why a command cannot run here; None where it can."""
    return next((why for form, why in NOT_RUN.items() if re.fullmatch(form, command)), None)


def translated(command: str, mine: Path, server: str) -> str:
    """A command with the tiny things in place of a page's names."""
    names = sorted(NAMES, key=len, reverse=True)
    pattern = "|".join(map(re.escape, names))
    text = re.sub(rf"(?<![\w./-])(?:{pattern})(?![\w/.-])", lambda match: NAMES[match[0]], command)
    return text.replace("MINE", str(mine)).replace("SERVER", server)


def small_flags(config: TrainConfig) -> list[str]:
    """Flags that make a run of two steps of eight rows of what it is."""
    sizes = {"max-records": 16, "max-eval-records": 8, "rollout.max-eval-prompts": 8}
    sizes |= {"rollout.max-tokens": 8, "rollout.max-prompt-length": 32}
    flags = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    for name in STAGES:
        stage = getattr(config, name)
        if stage.runs:
            flags += [f"--{name}.batch-size", "8"]
        if stage.steps:
            flags += [f"--{name}.steps", "2"]
    return flags


def smaller(config: TrainConfig) -> TrainConfig:
    """The same of a config that a study makes."""
    changes: dict[str, Any] = {"max_records": 16, "max_eval_records": 8}
    for name in STAGES:
        stage = getattr(config, name)
        if stage.runs:
            rule = replace(stage.optimizer, warmup_steps=0)
            every = {"eval_every": min(stage.eval_every, 2), "save_every": 0}
            changes[name] = replace(
                stage, steps=4, epochs=0.0, batch_size=8, optimizer=rule, **every
            )
    return replace(config, **changes)


@dataclass(frozen=True, kw_only=True)
class Study:
    """How `python -m MODULE` of an experiment runs at a tiny size.

    Attributes:
      flags: appended to its arguments.
      constants: "module:NAME" -> value, of modules below `experiments`; of a collection, the number
        of its first items.
      prints: what its standard output has.
      products: what it writes.
    """

    flags: str = ""
    constants: dict[str, object] = field(default_factory=dict)
    prints: str = "|---|"
    products: tuple[str, ...] = ()


STUDIES = {
    f"experiments.{name}": study
    for name, study in {
        "base_lm.prepare": Study(
            constants={"base_lm.prepare:HELD_OUT": 200},
            prints="sha256",
            products=("runs/base_lm_text/train.jsonl",),
        ),
        "base_lm.evaluate": Study(
            flags="--characters 200 --window 32",
            prints="wikipedia",
            products=("runs/base_lm/evaluation.json",),
        ),
        "data_collection.compare": Study(
            flags="--seeds 0",
            constants={
                "data_collection.compare:FEWEST": 1,
                "data_collection.tasks:PLACES": 1,
                "data_collection.tasks:THINGS": 2,
            },
        ),
        "drpo.known_optimum": Study(flags="3"),
        "drpo.stories": Study(
            flags="--seeds 1",
            constants={
                "drpo.stories:SIZES": {"depth": 1},
                "drpo.stories:NAMES": 2,
                "drpo.stories:SEARCHED": 4,
            },
        ),
        "drpo.ablations": Study(
            flags="--seeds 1",
            constants={
                "drpo.stories:SIZES": {"depth": 1},
                "drpo.ablations:SEARCHED": 3,
                "drpo.ablations:HELD_OUT": 2,
                "drpo.ablations:EXAMPLES": 4,
            },
        ),
        "drpo.paper": Study(prints="jaxalign optimize-prompt"),
        "gradient_entanglement.theory": Study(
            constants={
                "gradient_entanglement.theory:SEEDS": 1,
                "gradient_entanglement.theory:SUFFIXES": 2,
            },
            products=("experiments/gradient_entanglement/theory.png",),
        ),
        "gradient_entanglement.sentiment": Study(
            constants={"gradient_entanglement.sentiment:SEEDS": 2},
            products=(
                "experiments/gradient_entanglement/sentiment.png",
                "experiments/gradient_entanglement/heat_map.png",
            ),
        ),
        "gradient_entanglement.preference": Study(
            constants={
                "gradient_entanglement.preference:LOSSES": 2,
                "gradient_entanglement.preference:PAIRS": 2,
            },
            products=("experiments/gradient_entanglement/losses.png",),
        ),
        "gradient_entanglement.cures": Study(
            constants={"gradient_entanglement.cures:CURES": 2},
            products=("experiments/gradient_entanglement/cures.png",),
        ),
        "offline.single_responses": Study(
            flags="--methods dpo kto --rates 1e-3 --seeds 2 --steps 2 --rows runs/rows.jsonl "
            "--scratch runs/single"
        ),
        "switches.crossed": Study(
            flags="--losses dpo simpo --switches none WPO --steps 1", prints="## WPO"
        ),
        "ipo_md.tabular": Study(
            constants={
                "ipo_md.methods:STEPS": 40,
                "ipo_md.tabular:STEPS": 40,
                "ipo_md.methods:SAMPLED_STEPS": 100,
                "ipo_md.figures:SAMPLED_STEPS": 100,
                "ipo_md.methods:SEEDS": 2,
            },
            products=("experiments/ipo_md/simplex.png", "experiments/ipo_md/divergence.png"),
        ),
        "ipo_md.summarisation": Study(
            flags="--seeds 2 --steps 4 --sweep-steps 4 --pairs 24",
            constants={"ipo_md.summarisation:METHODS": 2},
            products=("experiments/ipo_md/summarisation.png",),
        ),
        "ipo_md.small_tables": Study(products=("experiments/ipo_md/small.png",)),
        "ipo_md.bandits": Study(
            constants={"ipo_md.bandits:SEEDS": 2, "ipo_md.bandits:STEPS": 400},
            products=("experiments/ipo_md/bandits.png",),
        ),
        "judging.compare": Study(flags="--aspects 2", products=("runs/judging/pairs.jsonl",)),
        "judging.just_eval": Study(constants={"judging.just_eval:RESAMPLES": 10}),
        "rahf.compare": Study(flags="--seeds 0 --prompts 8 --rows runs/rahf_rows"),
        "rahf.looking": Study(
            flags="--prompts 4",
            products=("experiments/rahf/separability.png", "experiments/rahf/steering.png"),
        ),
        "rahf.sweep": Study(constants={"rahf.sweep:ALPHAS": 1}),
        "reward.evaluate": Study(),
    }.items()
}


def limited(value: Any, limit: Any) -> Any:
    """A constant of a study: the first `limit` items of a collection, or `limit` itself."""
    if isinstance(value, dict) and isinstance(limit, int):
        return dict(list(value.items())[:limit])
    return value[:limit] if isinstance(value, tuple | range) else limit
