"""SFT with TRL's SFTTrainer on the rows of a file of pairs, every token a target."""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from recorder import Recorder, fingerprint
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer
from trl_trainer import Record


def main(job: dict) -> None:
    """Train for the job's steps."""
    cpu = not torch.cuda.is_available()
    recorder = Recorder(None if cpu else torch.cuda.max_memory_allocated)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    pairs = [json.loads(line) for line in Path(job["pairs_file"]).read_text().splitlines()]
    rows = [
        tokenizer.encode(pair["prompt"] + pair[side] + tokenizer.eos_token)
        for side in ("chosen", "rejected")
        for pair in pairs
    ]
    trainer = SFTTrainer(
        model=job["model"],
        args=SFTConfig(
            output_dir=job["output"],
            per_device_train_batch_size=len(rows),
            max_steps=job["steps"],
            max_length=job["length"],
            learning_rate=job["learning_rate"],
            lr_scheduler_type="constant",
            bf16=job["dtype"] == "bfloat16",
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=cpu,
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=tokenizer,
        callbacks=[Record(recorder)],
    )
    trainer.train()
    recorder.finish(log_probs=[], tokens=fingerprint(rows))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
