"""Pairs are packed where that saves positions; a run keeps what it began with."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxalign.config import (
    EntanglementConfig,
    FeedbackConfig,
    PreferenceConfig,
    SupervisedConfig,
    TrainConfig,
)
from jaxalign.data import TokenizedPairs
from jaxalign.data.labelled import LabelledRows
from jaxalign.errors import UserError
from jaxalign.models.config import EncoderDecoderConfig
from jaxalign.sharding import make_mesh
from jaxalign.stages.feedback import KIND as FEEDBACK
from jaxalign.stages.feedback import LabelledData
from jaxalign.stages.inputs import TokenizedData, count_computed, count_tokens
from jaxalign.stages.kind import RunContext
from jaxalign.stages.models import stage_folder
from jaxalign.stages.packing import PACKING, check_batches_known, with_packing
from jaxalign.stages.preference import KIND
from jaxalign.stages.supervised import KIND as SFT
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
        ({"entanglement": EntanglementConfig(every=1)}, 1),
        ({"entanglement": EntanglementConfig(ledger=10), "pairs": EQUAL}, None),
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
    with pytest.raises(UserError, match="an encoder-decoder, whose rows cannot be packed"):
        packing_of(dataclasses.replace(context, model_config=encoder_decoder))
    with pytest.raises(UserError, match="cannot be shared equally by 16 packed rows"):
        packing_of(run_context(tmp_path, packing="always", devices=8, micro_batches=2))


def test_rows_that_cannot_be_packed_are_padded_and_a_line_says_why(tmp_path, capsys):
    context = run_context(tmp_path, devices=8, micro_batches=2)
    assert packing_of(context) is None
    assert "preference: padded rows: a batch of 8 cannot be shared" in capsys.readouterr().out


def test_only_training_batches_of_probed_stages_have_rows_without_shared_prompts(tmp_path):
    context = run_context(tmp_path, entanglement=EntanglementConfig(every=3))
    data = with_packing(context, KIND.build(context.config, SHAPE)).data["preference"]
    batch = next(data.batches(8, seed=0))
    sides = batch.prompt_length + batch.response_length
    assert (batch.packed_apart.segment_ids > 0).sum() == sides.sum()
    size = data.positions(data.packing, apart=True, batch_size=8, seed=0)
    assert size == batch.packed_apart.tokens.size < batch.tokens.size
    assert all(x.packed_apart is None for x in data.once(data.train, 8))
    (tmp_path / PACKING).unlink()
    assert not packing_of(run_context(tmp_path)).apart


def supervised(folder, rows=VARIED.rows, **changes):
    context = run_context(folder)
    config = TrainConfig(sft=SupervisedConfig(steps=10, batch_size=8, **changes))
    data = TokenizedData(train=rows, held_out=None, sources=[], length=80)
    return dataclasses.replace(context, config=config, data={"sft": data})


@pytest.mark.parametrize(
    ("rows", "changes", "packed"),
    [
        (VARIED.rows, {}, True),
        (EQUAL.rows, {}, False),
        (VARIED.rows, {"packing": "never"}, False),
        (EQUAL.rows, {"packing": "always"}, True),
    ],
)
def test_responses_of_sft_are_packed_likewise(rows, changes, packed, tmp_path, capsys):
    context = supervised(tmp_path, rows, **changes)
    data = with_packing(context, SFT.build(context.config, SHAPE)).data["sft"]
    assert ("sft: responses packed in 1 x" in capsys.readouterr().out) == packed
    batch = next(data.batches(8, seed=0))
    assert batch.tokens.shape[:2] == (8, 1)
    assert (batch.packed is not None) == packed
    assert data.examples(0) == 400
    epoch = list(data.once(rows, 8))
    assert sorted(i for x in epoch for i in x.record_index[x.weight > 0]) == sorted(
        rows.record_index
    )


def test_sft_that_was_begun_with_batches_of_long_rows_is_not_resumed(tmp_path):
    context = supervised(tmp_path)
    stage = SFT.build(context.config, SHAPE)
    with Checkpoints(stage_folder(tmp_path, "sft")) as checkpoints:
        checkpoints.save(3, {"x": jax.numpy.ones(1)}, {})
        checkpoints.wait()
    with pytest.raises(UserError, match="batches were of long rows, not of responses"):
        check_batches_known(context, stage)
    check_batches_known(context, dataclasses.replace(stage, steps=3))  # it has no steps left
    (tmp_path / PACKING).write_text('{"sft": "packed"}')
    check_batches_known(context, stage)


@pytest.mark.parametrize("mismatched", [True, False])
def test_labelled_responses_are_packed_likewise(mismatched, tmp_path, capsys):
    rows = LabelledRows(rows=VARIED.rows, desirable=np.arange(400) % 3 > 0)
    data = LabelledData(
        train=rows,
        held_out=rows,
        sources=[],
        max_length=64,
        mismatched=mismatched,
        shard=(0, 1),
    )
    config = TrainConfig(feedback=FeedbackConfig(steps=10, batch_size=8, micro_batches=2))
    context = dataclasses.replace(run_context(tmp_path), config=config, data={"feedback": data})
    packed = with_packing(context, FEEDBACK.build(config, SHAPE)).data["feedback"]
    assert "feedback: labelled responses packed in 2 x" in capsys.readouterr().out
    batch = next(packed.batches(8, seed=0))
    assert batch.responses.packed.tokens.shape[0] == 2
    sizes = [batch.responses.packed.tokens.size]
    assert (batch.mismatched is not None) == mismatched
    if mismatched:
        sizes.append(batch.mismatched.packed.tokens.size)
    assert packed.positions(packed.packing, batch_size=8, seed=0) == sum(sizes)
    for x in packed.evaluation(8):
        assert x.responses.packed.tokens.shape[0] == 1


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
