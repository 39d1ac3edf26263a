"""Pairs are packed where that saves positions; a run keeps what it began with."""

import dataclasses
import json

import jax
import pytest

from jaxalign.config import EntanglementConfig, PreferenceConfig, TrainConfig
from jaxalign.data import TokenizedPairs
from jaxalign.errors import UserError
from jaxalign.models.config import EncoderDecoderConfig
from jaxalign.sharding import make_mesh
from jaxalign.stages.inputs import TokenizedData, count_computed, count_tokens
from jaxalign.stages.kind import RunContext
from jaxalign.stages.models import stage_folder
from jaxalign.stages.packing import PACKING, with_packing
from jaxalign.stages.preference import KIND
from jaxalign.training.checkpoints import Checkpoints
from tests.data.test_batches import make_rows
from tests.data.test_packing import make_alike
from tests.stages.test_preference import SHAPE

VARIED = make_alike(200, longest=40)
EQUAL = TokenizedPairs(rows=make_rows([16] * 400, [8] * 400))


def run_context(folder, *, pairs=VARIED, shape=SHAPE, devices=1, micro_batches=1, **changes):
    config = TrainConfig(
        preference=PreferenceConfig(steps=10, batch_size=8, micro_batches=micro_batches, **changes)
    )
    data = TokenizedData(train=pairs, held_out=None, sources=[], length=80, joint_share=0.75)
    return RunContext(
        config=config,
        folder=folder,
        mesh=make_mesh(devices=jax.devices()[:devices]),
        model_config=shape,
        tokenizer=None,
        data={"preference": data},
        writers=(),
    )


def packing_of(context):
    stage = KIND.build(context.config, SHAPE)
    return with_packing(context, stage).data["preference"].packing


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({}, 1),
        ({"micro_batches": 2}, 2),
        ({"devices": 2, "micro_batches": 2}, 4),
        ({"devices": 8}, None),  # a row for every pair: nothing is saved
        ({"pairs": EQUAL}, None),
        ({"packing": "never"}, None),
        ({"packing": "always", "devices": 8}, 8),
        ({"entanglement": EntanglementConfig(every=1)}, None),
        ({"entanglement": EntanglementConfig(every=10)}, 1),
    ],
)
def test_pairs_are_packed_where_that_saves_positions(changes, rows, tmp_path, capsys):
    context = run_context(tmp_path, **changes)
    packing = packing_of(context)
    assert (None if packing is None else packing.rows) == rows
    stored = json.loads((tmp_path / PACKING).read_text())
    assert stored == {"preference": "padded" if rows is None else "packed"}
    assert ("pairs packed in" in capsys.readouterr().out) == (rows is not None)


def test_a_run_keeps_its_choice(tmp_path):
    assert packing_of(run_context(tmp_path)) is not None
    assert packing_of(run_context(tmp_path, pairs=EQUAL)) is not None
    (tmp_path / PACKING).write_text('{"preference": "padded"}')
    assert packing_of(run_context(tmp_path)) is None


def test_a_run_that_was_begun_without_packing_keeps_its_order(tmp_path):
    with Checkpoints(stage_folder(tmp_path, "preference")) as checkpoints:
        checkpoints.save(1, {"x": jax.numpy.ones(1)}, {})
        checkpoints.wait()
    assert packing_of(run_context(tmp_path)) is None


def test_what_cannot_be_packed_is_refused(tmp_path):
    encoder_decoder = object.__new__(EncoderDecoderConfig)
    context = run_context(tmp_path, packing="always")
    with pytest.raises(UserError, match="an encoder-decoder, cannot be packed"):
        packing_of(dataclasses.replace(context, model_config=encoder_decoder))
    with pytest.raises(UserError, match="cannot be shared equally by 16 rows"):
        packing_of(run_context(tmp_path, packing="always", devices=8, micro_batches=2))


def test_training_and_held_out_batches_are_packed_and_their_tokens_counted(tmp_path):
    context = run_context(tmp_path, micro_batches=2)
    data = with_packing(context, KIND.build(context.config, SHAPE)).data["preference"]
    batch = next(data.batches(8, seed=0))
    assert batch.packed.tokens.shape[0] == 2
    [*once] = data.once(data.train, 8)
    assert {x.packed.tokens.shape[0] for x in once} == {1}
    assert sorted(i for x in once for i in x.record_index[x.weight > 0]) == list(range(200))
    lengths = (batch.prompt_length + batch.response_length).sum()
    assert count_tokens(batch) == lengths
    assert count_computed(batch) == (batch.packed.segment_ids > 0).sum() < lengths
