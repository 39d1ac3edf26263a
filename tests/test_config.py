"""Every field of a config has its type and range, and a message names the field."""

import copy
import dataclasses
import json
import math
import types
import typing

import pytest

from jaxalign.config import (
    AlignmentConfig,
    ArchitectureConfig,
    EntanglementConfig,
    LoraConfig,
    MeshConfig,
    OnlineConfig,
    OptimizerConfig,
    PreferenceConfig,
    Range,
    RolloutConfig,
    SupervisedConfig,
    TrainConfig,
    fields_of,
    from_json,
    to_json,
    with_fields,
)
from jaxalign.errors import UserError


def fields_with(kinds, config=None, path=()):
    """(path, annotation) of every field of these types, those in nested configs too."""
    config = TrainConfig() if config is None else config
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            yield from fields_with(kinds, value, (*path, name))
        else:
            inner = hint
            if typing.get_origin(hint) in (types.UnionType, typing.Union):
                inner = typing.get_args(hint)[0]
            if inner in kinds:
                yield (*path, name), inner


def with_field(path, value):
    """Build a config with one value of any type, past the type checks of these tests."""
    config = owner = copy.copy(TrainConfig())
    for name in path[:-1]:  # defaults are shared: copy what is changed
        inner = copy.copy(getattr(owner, name))
        object.__setattr__(owner, name, inner)
        owner = inner
    object.__setattr__(owner, path[-1], value)
    config.__post_init__()


NUMBERS = list(fields_with((int, float)))
NAMES = {field.path: field.name for field in fields_of(TrainConfig)}
PATHS = {name: path for path, name in NAMES.items()}


def test_there_are_as_many_numbers_as_the_configs_have():
    assert len(NUMBERS) > 100
    assert ("sft", "optimizer", "b1") in [path for path, _ in NUMBERS]


@pytest.mark.parametrize(("path", "kind"), NUMBERS, ids=[".".join(path) for path, _ in NUMBERS])
def test_every_number_refuses_what_is_none_and_what_is_out_of_range(path, kind):
    name = NAMES[path]
    anything = name in ("alignment.alpha", "feedback.threshold", "rollout.unfinished_penalty")
    below = [] if anything else [-2 if kind is int else -1e-9]
    for value in (math.nan, math.inf, -math.inf, *below, True, "3", []):
        with pytest.raises(UserError) as error:
            with_field(path, value)
        assert str(error.value).startswith(f"{name}: ")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "bad", "good"),
    [
        ("preference.optimizer.b1", 1.0, 0.0),
        ("preference.optimizer.b2", 1.2, 0.9999),
        ("sft.optimizer.eps", 0.0, 1e-30),
        ("sft.optimizer.clip_norm", 0.0, None),
        ("sft.optimizer.momentum", 1.0, None),
        ("sft.optimizer.final_fraction", 1.1, 1.0),
        ("sft.optimizer.learning_rate", -1e-5, 0.0),
        ("lora.dropout", 1.0, 0.99),
        ("lora.alpha", 0.0, 0.5),
        ("alignment.lora.dropout", 1.0, 0.0),
        ("rollout.top_p", 0.0, 1.0),
        ("rollout.top_p", 1.01, 0.1),
        ("rollout.min_p", 1.1, 1.0),
        ("rollout.temperature", 0.0, 0.1),
        ("rollout.judge.timeout", 0.0, 0.5),
        ("holdout", 1.0, 0.0),
        ("max_length", 1, 2),
        ("seed", 2**32, 2**32 - 1),
        ("mesh.fsdp", 0, 2),
        ("architecture.kv_heads", 0, 2),
        ("architecture.vocabulary", 258, 259),
        ("max_records", 0, None),
        ("dtype", "int8", "bfloat16"),
        ("text", "a.txt", ("a.txt",)),
        ("text", (3,), ()),
        ("name", None, "x"),
        ("export", 1, False),
        ("sft", 3, SupervisedConfig()),
        ("rollout.stop", "x", ("x",)),
    ],
)
def test_ends_of_ranges_and_types(path, bad, good):
    with pytest.raises(UserError, match=rf"^{path}(\[0\])?: "):
        with_field(PATHS[path], bad)
    with_field(PATHS[path], good)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"sft": SupervisedConfig(steps=10, optimizer=OptimizerConfig(warmup_steps=11))},
            "sft.optimizer.warmup_steps: 11 is more than sft.steps: 10",
        ),
        (
            {"online": OnlineConfig(batch_size=7, micro_batches=2)},
            "online.batch_size: 7 is not a multiple of online.micro_batches: 2",
        ),
        (
            {"architecture": ArchitectureConfig(width=10, heads=4)},
            "architecture.width: 10 is not an even multiple of architecture.heads: 4",
        ),
        (
            {"architecture": ArchitectureConfig(heads=4, kv_heads=3)},
            "architecture.heads: 4 is not a multiple of architecture.kv_heads: 3",
        ),
        ({"mesh": MeshConfig(fsdp=-1)}, "mesh: only one axis may be -1"),
        ({"rollout": RolloutConfig(mesh={"model": 2})}, "rollout.mesh: no axis model"),
        ({"rollout": RolloutConfig(mesh={"data": 0})}, "rollout.mesh.data: 0 is not in"),
        ({"rollout": RolloutConfig(options={"beta": math.nan})}, "rollout.options.beta: nan"),
        ({"loss_options": {"beta": math.inf}}, "loss_options.beta: inf is not in (-inf, inf)"),
        ({"alignment": AlignmentConfig(layers=(1, -2))}, "alignment.layers[1]: -2 is not in"),
        ({"alignment": AlignmentConfig(lora=LoraConfig(rank=0))}, "alignment.lora.rank: 0"),
    ],
)
def test_numbers_that_bound_each_other(fields, said):
    with pytest.raises(UserError) as error:
        with_fields(TrainConfig(), **fields)
    assert str(error.value).startswith(said)


def test_a_range_is_read_as_mathematicians_write_it():
    half_open = Range("[0, 1)")
    assert [x in half_open for x in (-0.1, 0, 0.5, 1, math.nan)] == [
        False,
        True,
        True,
        False,
        False,
    ]
    assert -1 in Range("[1, inf)", also=-1)
    assert 0 not in Range("[1, inf)", also=-1)
    assert str(Range("[1, inf)", also=-1)) == "[1, inf) or -1"


def test_fields_have_the_names_of_the_command_line():
    names = {field.name: field.path for field in fields_of(TrainConfig)}
    assert names["loss"] == ("preference", "loss")
    assert names["entanglement.every"] == ("preference", "entanglement", "every")
    assert names["sft_data"] == ("sft", "data")
    assert names["rollout.judge.timeout"] == ("online", "rollout", "judge", "timeout")
    assert names["preference.optimizer.b1"] == ("preference", "optimizer", "b1")
    assert len(names) == len(fields_of(TrainConfig))


def test_fields_are_replaced_by_their_names():
    start = TrainConfig(preference=PreferenceConfig(steps=3, loss="ipo"))
    config = with_fields(start, loss="kto", seed=1, **{"entanglement.every": 2})
    assert config.preference.loss == "kto"
    assert (config.seed, config.preference.entanglement.every, config.preference.steps) == (1, 2, 3)
    assert start == TrainConfig(preference=PreferenceConfig(steps=3, loss="ipo"))
    both = with_fields(start, loss="kto", preference=PreferenceConfig(batch_size=4))
    assert both.preference == PreferenceConfig(batch_size=4, loss="kto")
    with pytest.raises(UserError, match="lose: no field of TrainConfig"):
        with_fields(start, lose="kto")
    with pytest.raises(UserError, match="loss_options: ipo has no beta"):
        with_fields(start, loss_options={"beta": 1.0})
    with pytest.raises(UserError, match="sft: is of type PreferenceConfig, not SupervisedConfig"):
        with_field(("sft",), PreferenceConfig())


def test_a_config_of_an_earlier_version_is_read():
    now = TrainConfig(
        preference=PreferenceConfig(
            steps=3, loss="ipo", entanglement=EntanglementConfig(every=1, reweighting="centred")
        ),
        sft=SupervisedConfig(data="a.jsonl"),
        online=OnlineConfig(batch_size=4, rollout=RolloutConfig(max_tokens=7)),
        chat="always",
    )
    before = json.loads(to_json(now))
    moved = {field.name: field.path for field in fields_of(TrainConfig) if len(field.path) == 2}
    for name in ("loss", "loss_options", "reference", "share_prompts", "entanglement", "rollout",
                 "alignment", "sft_data", "sft_responses", "text", "eval_text"):  # fmt: skip
        stage, field = moved[name]
        before[name] = before[stage].pop(field)
    before["entanglement"]["cure"] = before["entanglement"].pop("reweighting")
    before["strings_as_chat"] = bool(before.pop("chat"))
    assert from_json(json.dumps(before)) == now


def test_a_stored_config_is_checked_when_it_is_read():
    text = to_json(TrainConfig())
    assert from_json(text) == TrainConfig()
    assert from_json(text.replace('"reweighting"', '"cure"')) == TrainConfig()  # its name in 0.2
    with pytest.raises(UserError, match=r"holdout: 2\.0 is not in \[0, 1\)"):
        from_json(text.replace('"holdout": 0.1', '"holdout": 2.0'))
    with pytest.raises(UserError, match=r"config.json: invalid JSON: "):
        from_json(text[:-9])
    with pytest.raises(UserError, match=r"config\.sft: 3 is not an object"):
        from_json('{"sft": 3}')
