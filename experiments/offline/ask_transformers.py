"""What transformers says; run by the interpreter of an environment with PyTorch.

Command:  python ask_transformers.py FOLDER QUESTIONS ROWS TOKENS

QUESTIONS and ROWS are JSON: texts, and the tokens of a prompt with its answer. The last line of
the output is JSON: greedy `answers` of at most TOKENS tokens, the tokens of the `prompts`, and the
`log_probs` of every token of the rows after the first.
"""

import json
import sys


def main(folder: str, questions: str, rows: str, tokens: str) -> None:
    """Ask all of it in float32, one after another."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    result: dict[str, list] = {"answers": [], "prompts": [], "log_probs": []}
    with torch.inference_mode():
        for question in json.loads(questions):
            turns = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_dict=False
            )
            inputs = torch.tensor([prompt])
            outputs = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=False,
                max_new_tokens=int(tokens),
            )
            answer = tokenizer.decode(outputs[0, len(prompt) :], skip_special_tokens=True)
            result["answers"].append(answer)
            result["prompts"].append(prompt)
        for row in json.loads(rows):
            logits = model(torch.tensor([row])).logits[0, :-1]
            after = torch.tensor(row[1:])[:, None]
            result["log_probs"].append(logits.log_softmax(-1).gather(1, after)[:, 0].tolist())
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
