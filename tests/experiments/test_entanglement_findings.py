"""The paper's findings as rows of runs say them: every test says yes and no where it should."""

import pytest

from experiments.gradient_entanglement import findings
from experiments.rows import Rows


def row(chosen, rejected, *, ideal=0.9, ratio=1.2, own=(1.0, -1.0), accuracy=(0.5, 0.7, 0.9)):
    """The row of a run with these held-out log-probs."""
    steps = list(range(len(chosen)))

    def curve(values):
        return {"step": steps[: len(values)], "value": list(values)}

    return {
        "held_out": {
            "logps/chosen": curve(chosen),
            "logps/rejected": curve(rejected),
            "rewards/accuracies": curve(accuracy),
        },
        "training": {
            "entanglement/ideal": curve([ideal]),
            "entanglement/norm_ratio": curve([ratio]),
            "entanglement/ledger/realised_chosen": curve([own[0]] * 2),
            "entanglement/ledger/realised_rejected": curve([own[1]] * 2),
        },
    }


FALLING = row([-20, -21, -23], [-30, -33, -36])
PARTED = row([-20, -19, -18], [-30, -33, -36], own=(1.0, 1.0), ratio=0.8)


@pytest.mark.parametrize(
    ("test", "of_falling", "of_parted"),
    [
        (findings.both_fall, "yes: -3.00 and -6.00 nats", "no: +2.00 and -6.00 nats"),
        (findings.in_step, "yes: 2 of 2 times", "no: 0 of 2 times"),
        (findings.longer_rejected, "yes: 1.20 times", "no: 0.80 times"),
        (findings.own_case, "no: 90% of the pairs are ideal", "yes: 90% of the pairs are ideal"),
        (findings.own_part, "yes: 2 of 2 batches", "no: 0 of 2 batches"),
    ],
)
def test_a_finding_on_dpo(tmp_path, test, of_falling, of_parted):
    rows = Rows(folder=tmp_path)
    rows.write("falling", FALLING)
    rows.write("parted", PARTED)
    assert str(test(rows, "falling")) == of_falling
    assert str(test(rows, "parted")) == of_parted


def test_the_page_has_the_runs_that_are_there_and_puts_each_loss_on_its_side(tmp_path):
    rows = Rows(folder=tmp_path)
    rows.write("dpo_adamw_polite", FALLING)
    rows.write("rpo_adamw_polite", PARTED)
    rows.write("slic_adamw_polite", FALLING)
    rows.write("cpo_sgd_polite", PARTED)
    rows.write("cure_centred", PARTED)
    rows.write("cure_differing", row([-20, -22, -24], [-30, -33, -36]))
    text = findings.page(rows, 0.8)
    header = next(line for line in text.splitlines() if line.startswith("| finding"))
    assert header == "| finding | 135M, AdamW |"
    lines = {cells[1].strip(): cells[2:4] for x in text.splitlines() if (cells := x.split("|"))[1:]}
    assert [x.strip() for x in lines["losses with equal or similar weights lower chosen"]] == [
        *("dpo -3.0", ""),
    ]
    assert [x.strip() for x in lines["losses with an SFT term raise it"]] == [
        *("rpo +2.0", "slic -3.0"),
    ]
    assert [x.strip() for x in lines["SGD: losses with an SFT term raise it"]] == ["cpo +2.0", ""]
    assert "SGD: losses with equal or similar weights lower chosen" not in lines
    # accuracy 0.8 lies halfway between the last two evaluations: DPO at -2, the others at +1.5, -3
    mitigations = next(v for k, v in lines.items() if "mitigations keep" in k)
    assert [x.strip() for x in mitigations] == ["centred +3.5", "differing -1.0"]
