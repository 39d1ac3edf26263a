"""DPO with TRL's DPOTrainer, every step logged."""

import json
import sys

import torch
from datasets import load_dataset
from recorder import Recorder, fingerprint
from torch.utils.data import SequentialSampler
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer


class Record(TrainerCallback):
    """Notes each step and what was logged of it."""

    def __init__(self, recorder: Recorder):
        self.recorder, self.logged = recorder, []

    def on_log(self, args, state, control, logs=None, **_):
        """A step's numbers are on the host."""
        if logs and "loss" in logs:
            self.logged.append(logs)
            self.recorder.step(float(logs["loss"]))


class InOrder(DPOTrainer):
    """Reads the pairs as the file has them."""

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


def main(job: dict) -> None:
    """Train for the job's steps."""
    cpu = not torch.cuda.is_available()
    recorder = Recorder(None if cpu else torch.cuda.max_memory_allocated)
    record = Record(recorder)
    trainer = (DPOTrainer if job.get("shuffle", True) else InOrder)(
        model=job["model"],
        args=DPOConfig(
            output_dir=job["output"],
            per_device_train_batch_size=job["pairs"],
            max_steps=job["steps"],
            max_length=job["length"],
            learning_rate=job["learning_rate"],
            lr_scheduler_type="constant",
            beta=job["beta"],
            bf16=job["dtype"] == "bfloat16",
            gradient_checkpointing=job["checkpointing"],
            precompute_ref_log_probs=job["precomputed"],
            logging_steps=1,
            save_strategy="steps" if job.get("save") else "no",
            save_steps=job["steps"],
            report_to="none",
            use_cpu=cpu,
        ),
        train_dataset=load_dataset(
            "json", data_files=job["pairs_file"], split="train", cache_dir=job["output"]
        ),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        callbacks=[record],
    )
    trainer.train()
    seen = trainer.data_collator(list(trainer.train_dataset))["input_ids"].tolist()
    first = record.logged[0]
    recorder.finish(
        log_probs=[float(first["logps/chosen"]), float(first["logps/rejected"])],
        tokens=fingerprint(seen),
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
