"""What the studies of a chat model cost: measured on two cores, and bounds for accelerators.

Command:  python -m experiments.costs --model FOLDER
Needs:    the rows of the studies; pip install 'jaxalign[tpu]' for the bounds of a v5e-8
Time:     a minute
Expect:   the section of costs of docs/results.md
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.page import put, table
from jaxalign.config import (
    EntanglementConfig,
    LoraConfig,
    PreferenceConfig,
    SupervisedConfig,
    TrainConfig,
)
from jaxalign.planning.cost_model import bound
from jaxalign.planning.plans import draft

ROOT = Path(__file__).parents[1]
STUDIES = {
    "offline": "preferences without RL",
    "gradient_entanglement": "gradient entanglement",
    "ipo_md": "online preferences",
    "rahf": "RAHF",
    "drpo": "DRPO",
    "judging": "judges beside people",
    "data_collection": "data collection",
}
"""Folder -> its name in the table."""
H100 = {"compute": 989e12, "memory": 3.35e12}
"""Dense bfloat16 FLOP/s and bytes per second of the SXM card (NVIDIA's data sheet)."""
LENGTH = 256
"""Tokens of the padded rows that are planned for."""


MEASURED = ("cpu_seconds", "training_cpu_seconds", "server_cpu_seconds")
"""CPU seconds of a row's parts; a row without them has the seconds or minutes that it took."""
INCLUDED = "question_server"
"""Beginning of the names of rows whose time is in that of the whole server."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """The sums over the rows of a study."""

    runs: int
    tokens: int
    """Trained on; 0: not counted."""
    minutes: float
    """Of one core."""
    gigabytes: float
    """The most that one process held; 0: not measured."""


def costs(folder: Path) -> Cost | None:
    """The cost of the rows of a folder; None: there are none that say it."""
    files = [
        list(_rows(path))
        for path in sorted(folder.glob("rows/**/*.json*"))
        if not path.name.startswith(INCLUDED)
    ]
    # runs of a file that advance together have the same time, which is that of all
    times = [sum({seconds(row) for row in rows}) for rows in files]
    rows = [row for file in files for row in file]
    if not any(times):
        return None
    return Cost(
        runs=sum(1 for row in rows if seconds(row)),
        tokens=sum(int(row.get("trained_tokens", 0)) for row in rows),
        minutes=sum(times) / 60,
        gigabytes=max(row.get("peak_memory", 0) for row in rows) / 1e9,
    )


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    text = path.read_text(encoding="utf-8")
    for row in map(json.loads, text.splitlines() if path.suffix == ".jsonl" else [text]):
        if isinstance(row, dict):
            yield row


def seconds(row: Mapping[str, Any]) -> float:
    """Seconds of a core that a row took; 0: it does not say."""
    if any(name in row for name in MEASURED):
        return float(sum(row.get(name, 0) for name in MEASURED))
    if "seconds_per_update" in row:
        return float(row["seconds_per_update"] * row["updates"])
    return float(row.get("seconds", 60 * row.get("minutes", 0)))


def measured() -> str:
    """The table of what was run."""
    lines = []
    for name, label in STUDIES.items():
        if (cost := costs(ROOT / "experiments" / name)) is None:
            continue
        lines.append(
            [
                f"[{label}](../experiments/{name}/README.md)",
                f"{cost.runs}",
                f"{cost.tokens:,}" if cost.tokens else "",
                f"{cost.minutes:.0f}",
                f"{cost.gigabytes:.1f}" if cost.gigabytes else "",
            ]
        )
    return table(
        ("study", "runs", "trained tokens", "minutes of a core", "peak memory (GB)"), lines
    )


def planned(model: str) -> dict[str, tuple[TrainConfig, str]]:
    """Step -> its config and stage."""
    base = TrainConfig(model=model, max_length=LENGTH, remat="none", dtype="bfloat16")
    pairs = PreferenceConfig(batch_size=8, steps=1, reference="live")
    watched = dataclasses.replace(pairs, entanglement=EntanglementConfig(every=1, ledger=1))
    return {
        "SFT, 16 responses": (
            dataclasses.replace(base, sft=SupervisedConfig(batch_size=16, steps=1)),
            "sft",
        ),
        "DPO, 8 pairs": (dataclasses.replace(base, preference=pairs), "preference"),
        "DPO of adapters, 8 pairs": (
            dataclasses.replace(base, preference=pairs, lora=LoraConfig(rank=16)),
            "preference",
        ),
        "DPO with geometry and ledger, 8 pairs": (
            dataclasses.replace(base, preference=watched),
            "preference",
        ),
    }


def plans(model: str) -> str:
    """The table of lower bounds of a step, by the formulas of `jaxalign plan`."""
    lines = []
    for label, (config, stage) in planned(model).items():
        one = draft(config, "cpu:1", stage)
        eight = draft(config, "v5e:2x4", stage)
        lines.append(
            [
                label,
                f"{one.work.flops / 1e12:.2f}",
                f"{sum(one.lasting.values()) / 1e9:.1f}",
                f"{1e3 * max(bound(one.work, H100).values()):.1f}",
                f"{1e3 * max(eight.seconds.values()):.1f}",
            ]
        )
    header = ("a step", "TFLOP", "weights and optimiser (GB)", "H100 (ms)", "v5e-8 (ms)")
    return table(header, lines)


def main() -> None:
    """Write the section of costs."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--model", required=True, help="chat model: folder, Hub name or GGUF file")
    given = flags.parse_args()
    text = f"{measured()}\n{plans(given.model)}"
    print(text)
    put(ROOT / "docs" / "results.md", "costs", text)


if __name__ == "__main__":
    main()
