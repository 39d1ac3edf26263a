"""DPO with `jaxalign train`, as on the command line, its clocks read when metrics are written."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from recorder import Recorder, fingerprint

from jaxalign.cli import main as jaxalign
from jaxalign.config import TrainConfig
from jaxalign.runs import train
from jaxalign.stages import preference


def config() -> TrainConfig:
    """All defaults: the flags say what differs."""
    return TrainConfig()


def main(job: dict) -> None:
    """Run the command and print what was recorded."""
    recorder = Recorder(device_peak)
    seen = {}

    class Recorded(train.JsonLines):
        """`metrics.jsonl` as always; a step's line is its end."""

        def write(self, stage, split, step, values):
            super().write(stage, split, step, values)
            if split == "train":
                recorder.step(float(values["loss"]))

    def load_pairs(*arguments):
        data = own_load_pairs(*arguments)
        seen["rows"] = data.train.rows
        return data

    own_load_pairs = preference.load_pairs
    train.JsonLines, preference.load_pairs = Recorded, load_pairs
    failed = jaxalign(
        [
            *("train", __file__, "--name", "run", "--output", job["output"]),
            *("--model", job["model"], "--data", job["pairs_file"], "--holdout", "0"),
            *("--max-length", str(job["length"]), "--dtype", job["dtype"], "--no-export"),
            *("--loss", "dpo", "--loss-options", "beta", str(job["beta"])),
            *("--preference.steps", str(job["steps"])),
            *("--preference.batch-size", str(job["pairs"])),
            *("--preference.optimizer.learning-rate", str(job["learning_rate"])),
            *("--preference.optimizer.schedule", "constant"),
            *job["flags"],
        ]
    )
    if failed:
        sys.exit(failed)
    lines = (Path(job["output"]) / "run" / "metrics.jsonl").read_text().splitlines()
    logged = [line for line in map(json.loads, lines) if line["split"] == "train"]
    recorder.result["seconds"] = [x["tokens"] / x["tokens_per_second"] for x in logged]
    rows = seen["rows"]
    recorder.finish(
        log_probs=[logged[0]["logps/chosen"], logged[0]["logps/rejected"]],
        tokens=fingerprint(np.asarray(rows[i]).tolist() for i in range(len(rows))),
    )


def device_peak() -> int:
    """Bytes of the accelerator's largest use; 0 on a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", 0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
