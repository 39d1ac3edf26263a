"""What a stage's step is made of."""

import pytest

from jaxalign.config import EntanglementConfig, PreferenceConfig, TrainConfig, with_fields
from jaxalign.models import DecoderConfig
from jaxalign.stages.preference import KIND, keeps_reference_live

SHAPE = DecoderConfig(
    vocab_size=8, width=8, layers=1, heads=1, kv_heads=1, head_width=8, mlp_width=8,
    context_length=8,
)  # fmt: skip


@pytest.mark.parametrize(
    ("pairs", "changes", "live"),
    [
        (80, {}, True),  # 10 steps of 8: every pair once
        (79, {}, False),
        (79, {"loss": "tdpo2"}, True),
        (79, {"entanglement": EntanglementConfig(mask="differing")}, True),
        (79, {"reference": "live"}, True),
        (80, {"reference": "precomputed"}, False),
    ],
)
def test_the_reference_is_precomputed_where_pairs_come_again(pairs, changes, live):
    config = with_fields(
        TrainConfig(preference=PreferenceConfig(steps=10, batch_size=8)), **changes
    )
    objective = KIND.build(config, SHAPE).objective
    assert keeps_reference_live(config, objective, pairs) is live
