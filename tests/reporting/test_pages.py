"""Every page: whole HTML that fetches nothing, in which what models write stays text.

Where Chromium is installed it also opens the pages, and their script runs to its end.
"""

import json
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from jaxalign.entanglement.measurements import HeatMap, LossRow, PairRow
from jaxalign.prompting.page import write_tree
from jaxalign.prompting.search import Node
from jaxalign.reporting import entanglement_page, read_run, write_report
from jaxalign.reporting.judging_page import Example, Examples, Intervals, Table, write_page

ATTACK = "</pre></script><script>alert('x')</script><b title=\"'\">&amp;"
PAGES = ("report", "entanglement", "judging", "search")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
VOID = {"meta", "input", "br", "hr", "img", "link"}


def report(folder):
    run = folder / "run"
    run.mkdir()
    config = {"name": ATTACK.replace("/", ""), "loss": "dpo", "model": ATTACK}
    (run / "config.json").write_text(json.dumps(config))
    lines = [
        {"stage": stage, "split": split, "step": step, "loss": 1 / (step + 1), **more}
        for stage in ("preference", "online")
        for step in range(3)
        for split, more in (
            ("train", {"time/sampling": 0.5, "time/update": 0.5, "entanglement/cosine": 0.5}),
            ("eval", {"rewards/margins": step, "rewards/chosen": 1.0, "win_rate": float("nan")}),
        )
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sample = {"step": 2, "prompt": ATTACK, "responses": [ATTACK, "two\nlines"], "reward": [1, 0]}
    (run / "rollouts.jsonl").write_text(json.dumps(sample) + "\n")
    write_report([read_run(run)], folder)


def entanglement(folder):
    names = ("norm_ratio", "norm_chosen", "norm_rejected", "ches", "ln_ches", "edit", "loss")
    names += ("length_chosen", "length_rejected")
    pairs = [
        PairRow(
            place=f"{ATTACK}:{at}",
            case=case,
            prompt=ATTACK,
            chosen=ATTACK,
            rejected=ATTACK,
            numbers=dict.fromkeys(names, 0.5) | {"cosine": cosine},
        )
        for at, (case, cosine) in enumerate(
            (("ideal", 0.1), ("both down", 0.9), ("undefined", float("nan")))
        )
    ]
    cosines = np.array([[0.25, -0.5], [np.nan, 1.0]])
    shown = HeatMap(
        pair=1, cosines=cosines, chosen=["</b><i>", "$_$"], rejected=["c", "d"], cut=True
    )
    shares = dict.fromkeys(entanglement_page.COLOURS, 0.2)
    loss = LossRow(name="dpo", fractions=shares, in_band=0.1, ratio=1.0, negative=0)
    page = entanglement_page.Page(
        model=ATTACK,
        data=ATTACK,
        loss="dpo",
        left_out=[ATTACK],
        pairs=pairs,
        losses=[loss],
        heat_maps=[shown],
    )
    entanglement_page.write_page(page, folder)


def judging(folder):
    example = Example(
        facts=ATTACK, prompt=ATTACK, names=(ATTACK, "b"), responses=(ATTACK, ""), better=0
    )
    table = Table(
        title=ATTACK,
        header=["policy", ATTACK, "b"],
        rows=[[ATTACK, "0.500", "0.250"]],
        shades=[[float("nan"), 0.25]],
    )
    intervals = Intervals(title="Elo", labels=[ATTACK], values=[2.0], low=[1.0], high=[3.0])
    parts = [table, intervals, Examples(title="Wins", note="1 in all.", examples=[example])]
    write_page(ATTACK, [ATTACK], parts, folder / "index.html")


def search(folder):
    judged = {"scores": {ATTACK: 2.0}, "reasons": {ATTACK: ATTACK}, "failure": ATTACK}
    state = {"prompt": ATTACK, "query": ATTACK, "output": ATTACK, "evaluation": judged}
    depth = 1500  # more than Python's limit of recursion
    nodes = [
        Node(
            number=at,
            parent=at - 1 if at else None,
            depth=at,
            action=None,
            state=state,
            reward=float("nan"),
            value=1.0,
        )
        for at in range(depth)
    ]
    write_tree(ATTACK, [ATTACK], nodes, [0, 1], folder / "index.html")


@pytest.fixture(scope="module", params=PAGES)
def page(request, tmp_path_factory):
    """The file of a page."""
    folder = tmp_path_factory.mktemp(request.param)
    globals()[request.param](folder)
    return folder / "index.html"


class Checked(HTMLParser):
    """Tags that close in the order in which they open, with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.tags, self.text = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag, self.getpos()

    def handle_data(self, data):
        self.text += data


def test_tags_are_balanced_and_what_is_referred_to_exists(page):
    checked = Checked(page.read_text(encoding="utf-8"))
    assert checked.stack == []
    ids = [values["id"] for _, values in checked.tags if "id" in values]
    assert len(ids) == len(set(ids))
    referred = [values["href"][1:] for _, values in checked.tags if "href" in values]
    referred += [v for _, values in checked.tags for k, v in values.items() if k == "data-filters"]
    referred += [v for _, values in checked.tags for k, v in values.items() if k == "data-selects"]
    assert set(referred) <= set(ids)


def test_what_models_write_is_text(page):
    checked = Checked(page.read_text(encoding="utf-8"))
    assert [tag for tag, _ in checked.tags].count("script") == 1
    assert "<script>alert('x')</script>" in checked.text
    assert not any(name.startswith("on") for _, values in checked.tags for name in values)


def test_nothing_is_fetched(page):
    text = page.read_text(encoding="utf-8")
    tags = Checked(text).tags
    assert "http" not in text
    assert "url(" not in text
    assert not any("src" in values or tag in ("link", "iframe") for tag, values in tags)
    assert all(values["href"].startswith("#") for _, values in tags if "href" in values)


def test_a_report_has_its_responses_as_markdown_too(tmp_path):
    report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "<script>" not in text
    assert "2. two lines" in text


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_chromium_runs_the_script_to_its_end(page, tmp_path):
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    address = f"{page.as_uri()}#pair-1"
    done = subprocess.run(
        [str(CHROMIUM), *flags, "--virtual-time-budget=2000", "--dump-dom", address],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    shown = done.stdout
    assert "Uncaught" not in done.stderr
    assert "data-ready" in shown  # what the script does last
    assert shown.count('class="cursor"') == shown.count('class="chart"')
    if 'id="pairs"' in shown:
        assert "<output>3 of 3</output>" in shown
        assert '<dialog id="pair-1" open' in shown
    assert "alert('x')" in shown
