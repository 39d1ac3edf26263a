"""DPO in a plain PyTorch loop, with the logits of all tokens or of the response's alone.

Both are one forward pass over chosen and rejected together, a reference without gradients, AdamW
(fused), clipping. "full" takes logits at every position and a log-softmax over them, as loops are
usually written; "response" applies the unembedding to the positions before response tokens alone
and lets cross-entropy do the softmax. "text" is no DPO but SFT: cross-entropy of all tokens of all
rows. A job with `compile` has both decoders compiled by `torch.compile`.
"""

import json
import sys
from pathlib import Path

import torch
from recorder import Recorder, fingerprint
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(job: dict) -> None:
    """Train for the job's steps."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recorder = Recorder(torch.cuda.max_memory_allocated if device == "cuda" else None)
    log_probs = {"full": full, "response": response, "text": None}[job["way"]]
    tokens, prompt = read(job)
    tokens = tokens.to(device)
    policy = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).to(device)
    reference = None
    if log_probs is not None:
        reference = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
        reference.to(device).requires_grad_(requires_grad=False)
    if job.get("compile"):
        for model in filter(None, (policy, reference)):
            model.model.compile()
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=job["learning_rate"], weight_decay=0.0, fused=True
    )
    mixed = torch.autocast(device, torch.bfloat16, enabled=job["dtype"] == "bfloat16")
    first = None
    for _ in range(job["steps"]):
        with mixed:
            if log_probs is None:
                loss, logged = -response(policy, tokens, 1).mean() / (tokens.shape[1] - 1), []
            else:
                with torch.no_grad():
                    before_chosen, before_rejected = log_probs(reference, tokens, prompt).chunk(2)
                chosen, rejected = log_probs(policy, tokens, prompt).chunk(2)
                margin = (chosen - before_chosen) - (rejected - before_rejected)
                loss = -torch.nn.functional.logsigmoid(job["beta"] * margin).mean()
                logged = [chosen, rejected]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        first = first or [x.mean().item() for x in logged]
        recorder.step(loss.item())
    recorder.finish(log_probs=first, tokens=fingerprint(tokens.tolist()))


def read(job: dict) -> tuple[torch.Tensor, int]:
    """All chosen rows, then all rejected; and the length of the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    pairs = [json.loads(line) for line in Path(job["pairs_file"]).read_text().splitlines()]
    rows = [
        tokenizer.encode(pair["prompt"] + pair[side] + tokenizer.eos_token)
        for side in ("chosen", "rejected")
        for pair in pairs
    ]
    prompt = len(tokenizer.encode(pairs[0]["prompt"]))
    return torch.tensor(rows), prompt


def full(model: torch.nn.Module, tokens: torch.Tensor, prompt: int) -> torch.Tensor:
    """Sums of the response's log-probs, from the logits of all tokens."""
    logits = model(input_ids=tokens).logits[:, :-1].float()
    own = logits.log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    return own[:, prompt - 1 :].sum(-1)


def response(model: torch.nn.Module, tokens: torch.Tensor, prompt: int) -> torch.Tensor:
    """Sums of the response's log-probs, from the logits that they need."""
    hidden = model.model(input_ids=tokens).last_hidden_state[:, prompt - 1 : -1]
    logits = model.lm_head(hidden).float()
    targets = tokens[:, prompt:]
    own = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none"
    )
    return -own.view(targets.shape).sum(-1)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
