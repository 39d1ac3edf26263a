"""Where the changes of log-probs come from: DPO of a real chat model, with AdamW and with SGD.

Command:  python -m experiments.gradient_entanglement.ledger --model FOLDER --data pairs.jsonl
Time:     of a model of 135 million parameters, half an hour on two CPU cores
Expect:   the tables of the section "Where the change comes from" of this folder's README, and
          ledger_batch.png and ledger_held_out.png, of AdamW

Every step keeps a ledger of its own 8 pairs and of the first 8 held-out ones. The rates are those
at which log-probs move by nats in a few steps: 2e-5 for AdamW, and for SGD, whose gradient is
clipped to norm 1, 0.02.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from experiments import finetune
from experiments.page import put, table
from experiments.runs import finished
from jaxalign.config import EntanglementConfig, OptimizerConfig, TrainConfig
from jaxalign.reporting import ledger, read_run
from jaxalign.reporting.charts import draw
from jaxalign.reporting.runs import Run

FOLDER = Path(__file__).parent
RATES = {"adamw": 2e-5, "sgd": 2e-2}
STEPS, PAIRS = 24, 8


def settings(rule: str, model: str, data: str, steps: int = STEPS) -> TrainConfig:
    """DPO with a ledger in every step."""
    start = finetune.config("tiny")
    stage = replace(
        start.preference,
        steps=steps,
        epochs=0.0,
        batch_size=PAIRS,
        optimizer=OptimizerConfig(
            name=rule, learning_rate=RATES[rule], schedule="constant", warmup_fraction=0.1
        ),
        entanglement=EntanglementConfig(ledger=1),
    )
    return replace(
        start,
        name=f"ledger_{rule}",
        model=model,
        data=data,
        max_eval_records=64,
        export=False,
        preference=stage,
    )


def section(runs: list[Run]) -> str:
    """The tables of all runs, and the figures of the first."""
    names = {"ledger_adamw": "AdamW", "ledger_sgd": "SGD"}
    parts = []
    for run in runs:
        (first, *columns), rows = ledger.table(run)
        parts.append(table([f"{names.get(run.name, run.name)}, {first}", *columns], rows))
    figures = [f"![{name}](ledger_{pairs_of}.png)" for pairs_of, name in ledger.PAIRS.items()]
    return "\n".join([*parts, "\n\n".join(figures)])


def main() -> None:
    """Run what is missing, then write the section and the figures."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--model", required=True, help="Hugging Face folder or hub name")
    flags.add_argument("--data", required=True, help="preference pairs")
    flags.add_argument("--steps", type=int, default=STEPS, help="updates of each run")
    given = flags.parse_args()
    runs = [
        read_run(finished(settings(rule, given.model, given.data, given.steps))) for rule in RATES
    ]
    text = section(runs)
    print(text)
    for pairs_of in ledger.PAIRS:
        draw(ledger.charts(runs[0], pairs_of), FOLDER / f"ledger_{pairs_of}.png", size=(3.6, 3.4))
    put(FOLDER, "ledger", text)


if __name__ == "__main__":
    main()
