"""Every experiment's `paper` config has a step that its slice holds, by the TPU's compiler."""

import dataclasses
from pathlib import Path

import pytest

from experiments.gradient_entanglement import pairs, sentiment
from experiments.ipo_md import ipo_md
from experiments.ipo_md.online import online
from experiments.offline import dpo, ipo, kto, simpo
from jaxalign.commands.plan import make_plan
from jaxalign.config import EntanglementConfig

SHAPES = Path(__file__).resolve().parents[2] / "tpu" / "shapes"
WATCHED = EntanglementConfig(every=1, realised=True)
PYTHIA, GPT2 = SHAPES / "pythia-2.8b", SHAPES / "gpt2"
CONFIGS = {
    "offline dpo": (lambda: dpo.config("paper"), PYTHIA, "v5p:2x2x2"),
    "offline ipo": (lambda: ipo.config("paper"), PYTHIA, "v5p:2x2x2"),
    "offline kto": (lambda: kto.config("paper"), PYTHIA, "v5p:2x2x2"),
    "offline simpo": (lambda: simpo.config("paper"), PYTHIA, "v5p:2x2x2"),
    "entanglement pairs": (
        lambda: pairs.settings("dpo", "", "paper", "dpo", {}, entanglement=WATCHED),
        PYTHIA,
        "v5p:2x2x2",
    ),
    "sentiment": (
        lambda: sentiment.settings("single token", Path("data.jsonl"), "", "paper"),
        GPT2,
        "v5e:2x2",
    ),
    "ipo_md": (lambda: ipo_md.config("paper"), SHAPES / "t5-v1_1-large", "v5e:2x4"),
    "nash_md_pg": (lambda: online("paper", "nash_md_pg"), SHAPES / "t5-v1_1-large", "v5e:2x4"),
}
"""How each is made, the shape of its model, the slice that it is for."""


@pytest.mark.slow
@pytest.mark.parametrize(("make", "shape", "slice_name"), CONFIGS.values(), ids=CONFIGS.keys())
def test_the_paper_config_fits(make, shape, slice_name):
    pytest.importorskip("libtpu", reason="the TPU's compiler comes with the extra tpu")
    config = dataclasses.replace(make(), model=str(shape))
    assert make_plan(config, slice_name, None).fits
