"""DPO with google-tunix's DPOTrainer and its Llama, from safetensors.

Tunix computes in the parameters' dtype: with bfloat16 its parameters and optimiser state are
bfloat16, too, where all others keep float32. Its Llama rotates with base 1e6 whatever the config
says, so the shared weights say 1e6. Token ids are given to it as arrays, as its own tokenisation
would put a beginning token before each response.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from recorder import Recorder, fingerprint
from transformers import AutoTokenizer
from tunix.models.llama3.model import ModelConfig
from tunix.models.llama3.params import create_model_from_safe_tensors
from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig, TrainingInput
from tunix.sft.hooks import TrainingHooks
from tunix.sft.metrics_logger import MetricsLoggerOptions


class Record(TrainingHooks):
    """Notes each step when its loss is on the host."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder

    def on_train_start(self, train_ctx):
        """Nothing."""

    def on_train_end(self, train_ctx):
        """Nothing."""

    def on_train_step_start(self, train_ctx):
        """Nothing."""

    def on_train_step_end(self, train_ctx, train_step, train_loss):
        """A step's loss is known."""
        self.recorder.step(float(train_loss))

    def on_eval_step_start(self, train_ctx):
        """Nothing."""

    def on_eval_step_end(self, train_ctx, eval_loss):
        """Nothing."""


def main(job: dict) -> None:
    """Train for the job's steps."""
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    recorder = Recorder(None if on_cpu else lambda: device.memory_stats()["peak_bytes_in_use"])
    batch = read(job)
    policy, reference = load(job), load(job)
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        optimizer=optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(job["learning_rate"], weight_decay=0.0)
        ),
        training_config=DPOTrainingConfig(
            beta=job["beta"],
            max_steps=job["steps"],
            eval_every_n_steps=10**9,
            metrics_logging_options=MetricsLoggerOptions(log_dir=job["output"]),
        ),
    )
    trainer.with_training_hooks(Record(recorder))
    trainer.train([batch] * job["steps"])
    logger = trainer.metrics_logger
    first = [
        float(logger.get_metric_history("", f"log_probs/{side}", "train")[0])
        for side in ("chosen", "rejected")
    ]
    rows = [
        [*prompt, *response]
        for responses in (batch.chosen_ids, batch.rejected_ids)
        for prompt, response in zip(batch.prompt_ids, responses, strict=True)
    ]
    recorder.finish(log_probs=first, tokens=fingerprint(rows))


def load(job: dict):
    """The folder's weights in tunix's Llama."""
    hf = json.loads((Path(job["model"]) / "config.json").read_text())
    config = ModelConfig(
        num_layers=hf["num_hidden_layers"],
        vocab_size=hf["vocab_size"],
        embed_dim=hf["hidden_size"],
        hidden_dim=hf["intermediate_size"],
        num_heads=hf["num_attention_heads"],
        head_dim=hf["head_dim"],
        num_kv_heads=hf["num_key_value_heads"],
        rope_theta=int(hf["rope_theta"]),
        norm_eps=hf["rms_norm_eps"],
        weight_tying=hf["tie_word_embeddings"],
    )
    return create_model_from_safe_tensors(job["model"], config, dtype=jnp.dtype(job["dtype"]))


def read(job: dict) -> TrainingInput:
    """The pairs as arrays of token ids; nothing is padded."""
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    pairs = [json.loads(line) for line in Path(job["pairs_file"]).read_text().splitlines()]

    def ids(field: str, end: list[int]) -> np.ndarray:
        rows = [tokenizer.encode(pair[field], add_special_tokens=False) + end for pair in pairs]
        return np.asarray(rows, np.int32)

    end = [tokenizer.eos_token_id]
    fields = {"prompt": ids("prompt", []), "chosen": ids("chosen", end)}
    fields["rejected"] = ids("rejected", end)
    arrays = {f"{name}_ids": value for name, value in fields.items()}
    masks = {f"{name}_mask": np.ones_like(value) for name, value in fields.items()}
    return TrainingInput(**arrays, **masks)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
