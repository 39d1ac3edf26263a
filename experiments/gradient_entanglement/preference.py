"""Every loss of the paper's table, and its cures, on the same real pairs from the same start.

Command:  python -m experiments.gradient_entanglement.preference [--model FOLDER] [--scale paper]
Time:     half an hour on two CPU cores
Expect:   the sections "Losses" and "Cures" of this folder's README, and losses.png

Polite against impolite answers (1,094 pairs): one SFT model for all, then one epoch of each loss
with AdamW, every step watched and its realised changes beside. `paper` is Pythia 2.8B on
HH-RLHF, with the settings of the DPO paper's repository.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from experiments.gradient_entanglement.page import FOLDER, put, table
from experiments.gradient_entanglement.runs import DATA, TINY, change, finished, mean
from jaxalign.config import EntanglementConfig, OptimizerConfig, StageConfig, TrainConfig
from jaxalign.reporting import read_run
from jaxalign.reporting.entanglement import plot

LOSSES: dict[str, dict[str, float]] = {
    "dpo": {"beta": 0.1},
    "rdpo": {"beta": 0.1, "alpha": 0.2},
    "ipo": {"tau": 0.1},
    "simpo": {"beta": 2.0, "gamma": 1.0},
    "rrhf": {},
    "slic": {},
    "cpo": {},
    "dpop": {"beta": 0.1},
    "kto": {"beta": 0.1},
    "sppo": {},
    "orpo": {},
    "rpo": {"beta": 0.1},
}
"""The paper's table, with ORPO and RPO beside; hyperparameters not named are the table's own."""

CURES = ("normalised", "centred")


def settings(loss: str, model: str, scale: str, *, cure: str = "none") -> TrainConfig:
    """One epoch of a loss from the SFT model."""
    paper = scale == "paper"
    rate = 5e-7 if paper else 1e-4
    name = f"pairs_{loss}" + ("" if cure == "none" else f"_{cure}") + ("_paper" if paper else "")
    return TrainConfig(
        name=name,
        model=model,
        data="Anthropic/hh-rlhf"
        if paper
        else str(DATA / "preferences" / "rasbt_instruction_preference.jsonl"),
        bad_records="skip",
        holdout=0.2,
        max_length=512 if paper else 128,
        preference=StageConfig(
            steps=2_500 if paper else 54,
            batch_size=64 if paper else 16,
            optimizer=OptimizerConfig(learning_rate=rate, warmup_steps=150 if paper else 5),
            eval_every=250 if paper else 18,
        ),
        loss=loss,
        loss_options=LOSSES[loss],
        entanglement=EntanglementConfig(every=1, realised=True, cure=cure),
        export=paper,
    )


def supervised(model: str, scale: str) -> TrainConfig:
    """The SFT model that all of them start from."""
    start = settings("dpo", model, scale)
    stage = StageConfig(
        steps=2_500 if scale == "paper" else 60,
        batch_size=16,
        optimizer=OptimizerConfig(learning_rate=5e-7 if scale == "paper" else 3e-4),
    )
    name = start.name.replace("pairs_dpo", "pairs_sft")
    return replace(start, name=name, sft=stage, preference=StageConfig(), export=True)


def main() -> None:
    """Run what is missing, then write the sections and the figure."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--model", help="Hugging Face folder or hub name")
    flags.add_argument("--scale", choices=("tiny", "paper"), default="tiny")
    given = flags.parse_args()
    base = given.model or ("EleutherAI/pythia-2.8b" if given.scale == "paper" else TINY)
    sft = supervised(base, given.scale)
    if not (Path(sft.output) / sft.name / "export").is_dir():
        finished(sft)
    start = str(Path(sft.output) / sft.name / "export")
    runs = {loss: finished(settings(loss, start, given.scale)) for loss in LOSSES}
    text = table(HEADER, [row(loss, folder) for loss, folder in runs.items()])
    print(text)
    shown = [read_run(runs[loss]) for loss in ("dpo", "ipo", "simpo", "cpo", "rrhf", "sppo")]
    plot(shown, FOLDER / "losses.png")
    put("losses", f"{text}\n![losses](losses.png)\n")

    cured = {"dpo": runs["dpo"]} | {
        f"dpo, {cure}": finished(settings("dpo", start, given.scale, cure=cure)) for cure in CURES
    }
    cured |= {loss: runs[loss] for loss in ("dpop", "rpo")}
    text = table(HEADER, [row(name, folder) for name, folder in cured.items()])
    print(text)
    put("cures", text)


HEADER = (
    "loss",
    "accuracy",
    "Δ chosen (nats)",
    "Δ rejected",
    "cosine",
    "d_w / d_l",
    "ideal",
    "both down",
    "both up",
    "realised Δ chosen a step",
    "Δ rejected",
    "case realised",
)


def row(name: str, folder: Path) -> list[str]:
    """A run as a row of the table."""
    accuracy = read_run(folder).first_and_last("preference", "rewards/accuracies")
    rejected = mean(folder, "d_l")
    return [
        name,
        f"{accuracy[1]:.3f}" if accuracy else "",
        f"{change(folder, 'logps/chosen'):+.2f}",
        f"{change(folder, 'logps/rejected'):+.2f}",
        f"{mean(folder, 'cosine'):.3f}",
        f"{mean(folder, 'd_w') / rejected:.3g}" if rejected else "∞",
        f"{mean(folder, 'ideal'):.0%}",
        f"{mean(folder, 'both_down'):.0%}",
        f"{mean(folder, 'both_up'):.0%}",
        f"{mean(folder, 'realised_chosen'):+.3f}",
        f"{mean(folder, 'realised_rejected'):+.3f}",
        f"{mean(folder, 'case_agreement'):.0%}",
    ]


if __name__ == "__main__":
    main()
