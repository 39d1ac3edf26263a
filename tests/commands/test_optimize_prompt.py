"""`jaxalign optimize-prompt`, from seeds to a prompt that `generate` uses."""

import json
from pathlib import Path

import pytest

from jaxalign.backends.local import LocalModel
from jaxalign.cli import main
from jaxalign.prompting import read_artefact
from jaxalign.prompting.optimizers import bullets
from tests.backends.server import Server

pytestmark = pytest.mark.weights
RULE = '''
def short(query, response):
    """Best where a story's answer has few characters."""
    return max(1.0, 5.0 - len(response) / 20)
'''
SEEDS = [("Who is Tom?", "Tom is a boy."), ("What is red?", "A ball."), ("Who ran?", "The dog.")]


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture
def command(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"prompt": q, "response": r}) for q, r in SEEDS]
    (tmp_path / "seeds.jsonl").write_text("\n".join(rows))
    names = "Lily", "Ben", "Max", "Sue", "Mum", "Dad"
    queries = [json.dumps({"prompt": f"Who is {name}?"}) for name in names]
    (tmp_path / "queries.jsonl").write_text("\n".join(queries))
    (tmp_path / "rules.py").write_text(RULE)
    (tmp_path / "bank.txt").write_text("Be kind.\nBe brief.\nTell a story.\n")
    folder = str(shared / "models" / "stories260K")

    def run(*more, model=folder):
        files = ["--seeds", "seeds.jsonl", "--queries", "queries.jsonl", "--output", "out"]
        sizes = "--width 2 --actions 2 --depth 2 --more-depth 1 --validate 2 --max-tokens 8"
        flags = ["--model", model, *files, *sizes.split(), "--examples", "1"]
        return main(["optimize-prompt", *flags, "--judge-tokens", "16", *more])

    return run, folder


def test_a_bank_and_a_rule_on_a_local_model(command, capsys):
    run, folder = command
    chosen = "--evaluator", "rule:rules.py:short", "--optimizer", "bank:bank.txt"
    assert run(*chosen) == 0
    artefact = read_artefact(Path("out/prompt.json"))
    assert artefact.system_prompt.startswith("You are a helpful assistant.")
    assert [(one.query, one.response) for one in artefact.examples] == SEEDS
    nodes = rows_of("out/tree.jsonl")
    assert {node["depth"] for node in nodes} >= {0, 1, 2}
    assert all(len(bullets(node["state"]["prompt"])) <= 2 + node["depth"] for node in nodes)
    page = Path("out/index.html").read_text()
    assert "<details" in page
    assert "http" not in page.replace("http-equiv", "")
    capsys.readouterr()
    assert run(*chosen) == 0  # everything is known by now
    assert "new requests: 0 of" in capsys.readouterr().out
    flags = ["--model", folder, "--prompts", "queries.jsonl", "--output", "answers.jsonl"]
    more = ["--prompt-artefact", "out/prompt.json", "--max-tokens", "8"]
    assert main(["generate", *flags, *more]) == 0
    rows = rows_of("answers.jsonl")
    assert rows[0]["prompt"] == "Who is Lily?"


def test_the_files_of_a_search_are_not_its_seeds(command, capsys):
    run, _ = command
    Path("out").mkdir()
    seeds = Path("out/examples.jsonl")
    seeds.write_text(Path("seeds.jsonl").read_text())
    assert run("--seeds", str(seeds)) == 2
    line = capsys.readouterr().err
    assert "out/examples.jsonl: is an input, and would be overwritten; set another --out" in line
    assert seeds.read_text() == Path("seeds.jsonl").read_text()


def test_a_model_too_small_to_judge_is_told_plainly(command, capsys):
    run, _ = command
    assert run() == 2
    said = capsys.readouterr().err
    assert said.startswith("jaxalign optimize-prompt: selector: prompt 1")
    assert "more than the model's context of 512" in said
    assert run("--evaluator", "rule:rules.py:short") == 2  # and nobody is named who proposes
    assert "optimizer: rule: proposes no prompt" in capsys.readouterr().err


def test_the_same_against_a_server(command, capsys):
    run, folder = command
    server = Server(LocalModel.load(folder, batch_size=1))
    chosen = "--evaluator", "rule:rules.py:short", "--optimizer", "bank:bank.txt"
    model = f"openai:{server.address}"
    try:
        assert run(*chosen, "--completions", "--prices", "1", "2", model=model) == 0
        asked = len(server.asked)
        assert "requests" in capsys.readouterr().out
        assert run(*chosen, "--completions", model=model) == 0
        assert len(server.asked) == asked
    finally:
        server.close()
    served = [row["state"] for row in rows_of("out/tree.jsonl")]
    assert run(*chosen) == 0
    assert [row["state"] for row in rows_of("out/tree.jsonl")] == served


def test_scores_by_log_probs(command, capsys):
    run, folder = command
    more = "--evaluator", f"scored:{folder}", "--optimizer", "bank:bank.txt", "--reward", "fixed"
    assert run(*more, "--search", "greedy") == 0
    assert "greedy:" in capsys.readouterr().out
    assert run(*more, "--search", "none", "--first-prompt", "Be.") == 0
    assert read_artefact(Path("out/prompt.json")).system_prompt == "Be."


def test_the_papers_setting_is_told_and_nothing_is_asked(command, capsys):
    """180 generations and evaluations, 30 criteria, 16 examples five times: the paper's bounds."""
    run, _ = command
    judge = "openai:http://127.0.0.1:9#m"  # nobody listens
    sizes = "--width 2 --actions 3 --depth 20 --more-depth 10 --validate 0 --iterations 5"
    flags = ["--evaluator", judge, "--optimizer", judge, *sizes.split(), "--prices", "10", "30"]
    assert run(*flags, "--estimate") == 0
    said = capsys.readouterr().out
    assert "at most 181 model" in said
    assert "180 optimizer" in said
    assert "15 rewriter" in said  # three seeds here
    assert not Path("out").exists()


def test_too_few_queries_are_told_before_anything_is_asked(command, capsys):
    run, folder = command
    more = "--evaluator", f"scored:{folder}", "--optimizer", "bank:bank.txt"
    assert run(*more, "--validate", "100") != 0
    assert "smaller --validate" in capsys.readouterr().err
    assert not Path("out").exists()
