"""Tasks of the lm-evaluation-harness on files, and what is asked of models beside them.

`tests/fixtures/make_lm_eval.py` gives the same to the harness's own Hugging Face model.
"""

import json
import shutil
from pathlib import Path

FIXTURE = Path(__file__).parents[1] / "fixtures" / "lm_eval"
VARIANTS = ("begun", "plain")
"""Whether the tokenizer begins texts with a token, or has none."""
COLOURS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black", "sun": "yellow"}
SUMS = [(2, 3), (4, 1), (5, 5), (7, 2), (3, 3), (6, 1)]
LONG = " ".join(f"The {thing} is {colour}." for thing, colour in COLOURS.items()) * 4
PAIRS = [
    ("The sky is", " blue"),
    ("The sky is ", "blue"),
    *(("The snow is", f" {colour}") for colour in COLOURS.values()),
    *((LONG, f" The {thing}") for thing in COLOURS),
    ("", "The sky"),
    ("", "<|begin|>The sky"),
    ("<|begin|>The sky is", " grey"),
    ("The s", "ky is"),
    ("Ça coûte", " 5 €"),
    ("The coal is black. ", LONG[:60]),
]
TEXTS = ["The sky is blue.", LONG, "<|begin|>The snow is white.", "x"]
TURNS = [
    {"role": "system", "content": "Answer."},
    {"role": "user", "content": "The sky?"},
    {"role": "assistant", "content": "It is"},
]
TASKS = {
    "colours": """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/colours.jsonl, train: FOLDER/colours.jsonl}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "The {{thing}} is"
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 1.0}
""",
    "sums": """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/sums.jsonl, train: FOLDER/sums.jsonl}}
test_split: test
fewshot_split: train
output_type: generate_until
doc_to_text: "{{a}} + {{b}} ="
doc_to_target: "{{sum}}"
generation_kwargs: {until: ["e"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
filter_list:
  - name: first
    filter: [{function: regex, regex_pattern: "(.)"}, {function: take_first}]
metadata: {version: 1.0}
""",
    "stories": """
task: stories
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/stories.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
metadata: {version: 1.0}
""",
}
RUNS = {
    "zero": {},
    "examples": {"num_fewshot": 2},
    "chat": {"num_fewshot": 1, "apply_chat_template": True, "fewshot_as_multiturn": True},
}
"""How the tasks are run, in the harness's words."""


def write_tasks(folder: Path) -> Path:
    """Write the tasks and their data."""
    folder.mkdir(parents=True, exist_ok=True)
    colours = list(COLOURS.values())
    choices = [
        {"thing": thing, "choices": colours, "label": colours.index(colour)}
        for thing, colour in COLOURS.items()
    ]
    sums = [{"a": a, "b": b, "sum": str(a + b)} for a, b in SUMS]
    stories = [{"text": f"The {thing} was {colour}. "} for thing, colour in COLOURS.items()]
    for name, rows in (("colours", choices), ("sums", sums), ("stories", stories)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        task = TASKS[name].replace("FOLDER", str(folder))
        (folder / f"{name}.yaml").write_text(task, encoding="utf-8")
    return folder


def write_model(folder: Path, variant: str) -> Path:
    """Copy the model of the fixture; "plain": its tokenizer adds no token and has no beginning."""
    shutil.copytree(FIXTURE / "model", folder)
    if variant == "plain":
        path = folder / "tokenizer.json"
        backend = json.loads(path.read_text(encoding="utf-8"))
        backend["post_processor"] = None
        path.write_text(json.dumps(backend), encoding="utf-8")
        path = folder / "tokenizer_config.json"
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields["bos_token"] = None
        path.write_text(json.dumps(fields), encoding="utf-8")
    return folder
