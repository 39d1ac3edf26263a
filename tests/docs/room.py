"""A user's folders: tiny models and files outside the checkout, and stand-ins of real data.

`checkout` is a copy of the checkout's experiments, in which commands run; `mine` has the user's
models and files; `shared/data` has what the experiments read, laid out as the real files, with a
few rows each.
"""

import itertools
import json
import lzma
import re
import shutil
from pathlib import Path

from tests.docs.commands import PAGES, ROOT
from tests.gguf_files import bpe_metadata, write_gguf
from tests.tiny_model import save_tiny_model

WORDS = ["sun", "moon", "star", "lake", "tree", "fish", "sand", "wind"]
WORDS += ["rain", "hill", "boat", "farm", "box", "sky", "sea", "key"]
"""Each is three tokens, so that all pairs have one length, and a run one program."""
MY_LOSSES = re.findall(
    r"```python\n(# my_losses\.py\n.*?)```", PAGES["docs/guides/losses.md"], re.S
)[0]
ASPECTS = "helpfulness", "clarity", "factuality", "depth", "engagement", "safety"


def pairs(number: int, form: str = "Is the {} good?") -> list[dict[str, str]]:
    """Pairs of a polite and an impolite answer, each of another prompt and nearly of a length."""
    names = itertools.islice(itertools.product(WORDS, WORDS), number)
    return [
        {
            "prompt": form.format(f"{one} {other}"),
            "chosen": f"Yes, thanks, the {other} is kind.",
            "rejected": f"No, go now, the {other} is bad.",
        }
        for one, other in names
    ]


def responses(rows: list[dict[str, str]], side: str = "chosen") -> list[dict[str, str]]:
    """The rows' prompts with one of their responses."""
    return [{"prompt": row["prompt"], "response": row[side]} for row in rows]


def write(path: Path, content: object) -> None:
    """A text as it is, a list as JSON Lines (.xz: packed), anything else and `.json` as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        text = content
    elif path.suffix == ".json":
        text = json.dumps(content)
    else:
        assert isinstance(content, list)
        text = "".join(json.dumps(row) + "\n" for row in content)
    opened = lzma.open if path.suffix == ".xz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.write(text)


def make_room(folder: Path) -> Path:
    """Make everything; returns the working folder."""
    checkout = folder / "checkout"
    shutil.copytree(
        ROOT / "experiments", checkout / "experiments", ignore=shutil.ignore_patterns("__pycache__")
    )
    (checkout / "tpu").mkdir()
    (checkout / "tpu" / "shapes").symlink_to(ROOT / "tpu" / "shapes")
    (checkout / "benchmarks").symlink_to(ROOT / "benchmarks")
    make_mine(folder / "mine")
    make_data(folder / "shared" / "data", folder / "mine" / "plain")
    return checkout


def make_mine(mine: Path) -> None:
    """The user's models: with a chat template, without one (and deeper), and a GGUF file."""
    tokenizer, _ = save_tiny_model(mine / "model", context_length=4096)
    write_gguf(mine / "model", mine / "model.gguf", metadata=bpe_metadata(tokenizer))
    save_tiny_model(mine / "plain", layers=6, context_length=4096)
    (mine / "plain" / "chat_template.jinja").unlink()
    shutil.copytree(ROOT / "tests" / "fixtures" / "encoder_decoders" / "t5_v1_1", mine / "t5")


def write_files(mine: Path) -> None:
    """The user's files, as they are before the commands of a page."""
    rows = pairs(24)
    files = {
        "pairs.jsonl": rows,
        "test.jsonl": pairs(8),
        "labelled.jsonl": [row | {"source": row["prompt"].split()[2]} for row in rows[:6]],
        "feedback.jsonl": [
            one | {"label": label}
            for side, label in (("chosen", True), ("rejected", False))
            for one in responses(rows, side)
        ],
        "dpo.jsonl": responses(rows[:6]),
        "sft.jsonl": responses(rows[:6], "rejected"),
        "dpo_0.jsonl": responses(rows[:6]),
        "dpo_1.jsonl": responses(rows[:6]),
        "ipo_0.jsonl": responses(rows[:6], "rejected"),
        "examples.jsonl": responses(rows[:3]),
        "principles.json": [
            {"name": "short", "critique": "Is it long?", "revision": "Say it shorter."}
        ],
        "my_rules.py": "def longer(prompt, response):\n    return float(len(response))\n",
        "my_losses.py": MY_LOSSES,
    }
    files |= {
        "sums.jsonl": [{"prompt": f"{n} + {n} =", "answer": str(2 * n)} for n in range(16)],
        "sums.py": "def right(prompts, responses, answer):\n"
        "    return [float(x in y) for x, y in zip(answer, responses)]\n",
    }
    prompts = [{"prompt": row["prompt"]} for row in rows[:16]]
    files |= dict.fromkeys(("prompts.jsonl", "new.jsonl", "queries.jsonl"), prompts)
    for name, content in files.items():
        write(mine / name, content)


def make_data(data: Path, model: Path) -> None:
    """Files laid out as those of the folder of real data (JAXALIGN_SHARED)."""
    shutil.copytree(model, data / "models" / "stories260K")
    rows = pairs(48)
    dialogue = "\n\nHuman: {}?\n\nAssistant:"
    story = "The little {0} had fun by the {0}. It was a good day for the {0}.\n<|endoftext|>\n"
    text = [
        {"text": f"The {a} {b} is good. " * 4, "path": f"{a} {b}"} for a in WORDS for b in "xyz"
    ]
    reviews = [
        {"text": f"A {'good' if at % 2 else 'bad'} film of the {one}.", "label": at % 2}
        for at, one in enumerate(WORDS * 3)
    ]
    scores = {name: {"reason": "r", "score": "4"} for name in ASPECTS}
    judgements = [
        {"id": at, "input": row["prompt"], "output_cand": row["chosen"], "parsed_result": scores}
        for at, row in enumerate(rows[:4])
    ]
    files: dict[str, object] = {
        "preferences/rasbt_instruction_preference.jsonl": rows,
        "preferences/ultrafeedback_train.jsonl": pairs(24, "Say {}"),
        "preferences/ultrafeedback_eval.jsonl": pairs(24, "Ask {}"),
        "preferences/hh_harmless_base_test.jsonl": pairs(48, dialogue),
        "preferences/truthfulqa_pairs.jsonl": rows,
        "preferences/kto_truthfulqa.jsonl": [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in rows
            for side in ("chosen", "rejected")
        ],
        "judging/llmbar_all.jsonl": [row | {"source": "llmbar/Natural"} for row in rows[:4]],
        "judging/pandalm_human.jsonl": [row | {"source": "pandalm/v1"} for row in rows[4:8]],
        "just_eval/judgments_gpt4turbo/gpt.json": judgements,
        "just_eval/outputs/gpt-4-0613.json": [{"instruction": row["prompt"]} for row in rows[:4]],
        "drpo/ICL_examples.json": {row["prompt"]: row["chosen"] for row in rows[:3]},
        "drpo/alpaca_train.json": [{"instruction": row["prompt"]} for row in rows[:40]],
        "drpo/lima_subsample_train.json": [{"query": f"Why {one}?"} for one in WORDS],
        "drpo/mal_train.txt": "How to steal?\n",
        "urial/urial_prompts/inst_1k.txt": "# Instruction\n\nHelp.\n\n# Query:\n```\nHi?\n```\n\n"
        "# Answer:\n```\nHello.\n```\n",
        "sentiment/sentiment_sentence_polarity.jsonl": reviews,
        "text/tinystories/tinystories_2MB.txt": "".join(story.format(w) for w in WORDS),
        "text/wikitext2/valid.txt": "The sun is a star.\n",
        "text/wikitext2/test.txt": "The moon is not a star.\n",
        "text/books_core.jsonl.xz": text,
        "imdb/unsup.jsonl.xz": text,
        "imdb/train.jsonl.xz": reviews,
        "imdb/test.jsonl.xz": reviews,
    }
    names = "flan_cot", "gpteacher_roleplay", "alpaca_en_demo", "gsm8k_train", "rasbt"
    for name in (*names, "self_instruct_seeds"):
        files[f"sft/sft_{name}.jsonl"] = responses(rows)
    for name, content in files.items():
        write(data / name, content)


def answer(text: str, sample: int) -> str:
    """What the endpoint says: a judge, an optimiser, or else a model."""
    del sample
    if "Choose the criteria" in text:
        return json.dumps({"reasoning": "r", "criteria": ["Depth", "Clarity"]})
    if "You judge a response" in text:
        names = [line[2:].split(":")[0] for line in text.splitlines() if line.startswith("- ")]
        return json.dumps({name: {"reason": "r", "score": 3} for name in names})
    if "Write a better system prompt." in text:
        fields = ("new_system_prompt", "analysis", "thought")
        return json.dumps(dict.fromkeys(fields, "Answer well."))
    if "new_response" in text:
        return json.dumps({"new_response": "Well said.", "analysis": "", "thought": ""})
    return "A"
