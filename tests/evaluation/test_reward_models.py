"""Reward and preference models as annotators: anti-symmetry, batches, truncation, triples."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.data.embedded import embedded_tokenizer
from jaxalign.errors import UserError
from jaxalign.evaluation import AnnotatorOptions, Verdicts, make_annotator
from jaxalign.evaluation.reward_models import NOT_FINITE, PreferenceModel, RewardModel, Scorer
from jaxalign.evaluation.sampled_cycles import sampled_cycles
from jaxalign.models import (
    Decoder,
    DecoderConfig,
    EncoderDecoderConfig,
    decoder,
    encoder_decoder,
    save_pretrained,
)
from jaxalign.models.score import ScoreModel, init_head, rewards, with_head
from jaxalign.sharding import make_mesh

CONFIG = DecoderConfig(
    vocab_size=512,
    width=16,
    layers=2,
    heads=2,
    kv_heads=1,
    head_width=8,
    mlp_width=24,
    context_length=128,
    initializer_range=0.3,
)
T5 = EncoderDecoderConfig(
    vocab_size=512, width=16, layers=1, decoder_layers=1, heads=2, head_width=8, mlp_width=24
)
LAYOUT = " A: {first} B: {second} better:"
FORMS = {
    "reward": {"kind": "reward", "max_length": 96, "reward_bias": 0.25},
    "preference": {"kind": "preference", "max_length": 96, "comparison_format": LAYOUT},
}
WORDS = ["the", "red", "fox", "{first}", "sees", "a", "small", "lamp", "and", "{second}", "goes"]


def save(folder, kind, config=CONFIG, **changed):
    room = decoder if config is CONFIG else encoder_decoder
    key = jax.random.key(0)
    head = {"kernel": 8 * init_head(config.width, key)["kernel"]}
    params = with_head(room.init_params(config, key), head)
    fields = {"jaxalign": FORMS[kind] | changed}
    save_pretrained(
        ScoreModel(config, params), folder, tokenizer=embedded_tokenizer(), fields=fields
    )
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("scored")
    return {kind: save(root / kind, kind) for kind in FORMS}


def texts(seed, number, longest=30):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, longest))) for _ in range(number)]


def annotator(folders, kind):
    return make_annotator(f"{kind}:{folders[kind]}")


@pytest.mark.parametrize("kind", FORMS)
def test_exchanging_the_responses_gives_exactly_the_complement(folders, kind):
    prompts, first, second = (texts(seed, 21) for seed in range(3))
    second[4] = first[4]
    model = annotator(folders, kind)
    there = model.preferences(prompts, first, second)
    back = model.preferences(prompts, second, first)
    np.testing.assert_array_equal(there.preference, 1 - back.preference)
    np.testing.assert_array_equal(1 - there.preference, back.preference)
    assert there.preference[4] == 0.5
    assert np.ptp(there.preference) > 0.05
    assert not there.failures
    if kind == "preference":
        np.testing.assert_allclose(there.by_order, 1 - back.by_order[:, ::-1], atol=1e-12)


def test_a_preference_is_the_mean_of_both_orders(folders):
    """From the network itself, one row at a time."""
    prompts, first, second = (texts(seed, 3, longest=6) for seed in range(3))
    model = PreferenceModel.load(folders["preference"])
    tokenizer = embedded_tokenizer()
    params = model.scorer._params

    def odds(prompt, x, y):
        text = prompt + LAYOUT.replace("{first}", "@").replace("{second}", y).replace("@", x)
        ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        if tokenizer("a").input_ids[0] == tokenizer.bos_token_id:
            ids = [tokenizer.bos_token_id, *ids]
        return float(rewards(params, CONFIG, jnp.array([ids]), jnp.array([len(ids)]))[0])

    found = model.preferences(prompts, first, second)
    for at, (prompt, x, y) in enumerate(zip(prompts, first, second, strict=True)):
        forward, backward = (1 / (1 + np.exp(-z)) for z in (odds(prompt, x, y), odds(prompt, y, x)))
        np.testing.assert_allclose(found.by_order[at], [forward, 1 - backward], atol=1e-5)
        np.testing.assert_allclose(found.preference[at], (forward + 1 - backward) / 2, atol=1e-5)


def test_preferences_of_a_reward_model_follow_its_rewards(folders):
    prompts, first, second = (texts(seed, 9) for seed in range(3))
    model = RewardModel.load(folders["reward"])
    gap = model.rewards(prompts, first) - model.rewards(prompts, second)
    found = model.preferences(prompts, first, second).preference
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-gap)), atol=1e-6)


def test_a_reward_does_not_depend_on_the_batch_and_is_less_the_bias(folders, tmp_path):
    prompts, responses = texts(0, 20), texts(1, 20)
    model = RewardModel.load(folders["reward"], batch_size=8)
    together = model.rewards(prompts, responses)
    alone = [model.rewards([x], [y])[0] for x, y in zip(prompts, responses, strict=True)]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    unbiased = RewardModel.load(save(tmp_path, "reward", reward_bias=0.0))
    np.testing.assert_allclose(unbiased.rewards(prompts, responses), together + 0.25, atol=1e-5)
    assert model.rewards([], []).shape == (0,)


def test_on_a_mesh_and_in_bfloat16(folders):
    prompts, responses = texts(0, 20), texts(1, 20)
    expected = RewardModel.load(folders["reward"]).rewards(prompts, responses)
    mesh = make_mesh(fsdp=4, tensor=2)
    found = RewardModel.load(folders["reward"], mesh=mesh).rewards(prompts, responses)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    rough = RewardModel.load(folders["reward"], dtype="bfloat16").rewards(prompts, responses)
    assert 0 < np.abs(rough - expected).max() < 0.1 * np.ptp(expected)


def test_over_long_prompts_lose_their_beginning_and_are_counted(folders):
    model = RewardModel.load(folders["reward"])
    long = " ".join(texts(3, 20, longest=30))
    found = model.rewards([long, "elsewhere: " + long], ["a lamp", "a lamp"])
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    assert model.scorer.report.truncated_prompts == 2
    assert model.scorer.report.records == 2
    model.rewards(["short"], ["a lamp"])
    assert model.scorer.report.truncated_prompts == 2
    assert model.scorer.report.records == 3


def test_a_score_that_is_no_number_is_reported(tmp_path, monkeypatch):
    key = jax.random.key(0)
    head = {"kernel": jnp.full((16, 1), 3e38)}  # finite, and its products are not
    model = ScoreModel(CONFIG, with_head(decoder.init_params(CONFIG, key), head))
    fields = {"jaxalign": FORMS["reward"]}
    save_pretrained(model, tmp_path, tokenizer=embedded_tokenizer(), fields=fields)
    broken = RewardModel.load(tmp_path)
    with pytest.raises(UserError, match="all 2 responses the score is not a finite number"):
        broken.rewards(["a", "c"], ["b", "d"])
    verdicts = broken.preferences(["a"], ["b"], ["c"])
    assert np.isnan(verdicts.preference[0])
    assert verdicts.reasons == (NOT_FINITE,)
    monkeypatch.setattr(Scorer, "__call__", lambda *_: np.array([np.inf, 2.0]))
    bias = FORMS["reward"]["reward_bias"]
    np.testing.assert_array_equal(broken.rewards(["a", "c"], ["b", "d"]), [np.nan, 2.0 - bias])
    verdicts = broken.preferences(["a"], ["b"], ["c"])  # rewards of infinity and 2
    assert np.isnan(verdicts.preference[0])
    assert verdicts.reasons == (NOT_FINITE,)


def test_an_encoder_decoder_is_a_preference_model_too(tmp_path):
    model = PreferenceModel.load(save(tmp_path, "preference", T5))
    prompts, first, second = (texts(seed, 5) for seed in range(3))
    found = model.preferences(prompts, first, second).preference
    np.testing.assert_array_equal(found, 1 - model.preferences(prompts, second, first).preference)
    assert np.ptp(found) > 0


def test_folders_that_are_something_else_are_refused(folders, tmp_path):
    with pytest.raises(UserError, match="holds a preference model; name it preference:"):
        RewardModel.load(folders["preference"])
    params = decoder.init_params(CONFIG, jax.random.key(0))
    save_pretrained(Decoder(CONFIG, params), tmp_path / "lm", tokenizer=embedded_tokenizer())
    with pytest.raises(UserError, match="no scalar head"):
        RewardModel.load(tmp_path / "lm")
    with pytest.raises(UserError, match=r"config\.json: jaxalign: .*colour"):
        RewardModel.load(save(tmp_path / "odd", "reward", colour=1))


def test_a_folder_from_elsewhere_is_a_reward_model_of_its_context(tmp_path):
    key = jax.random.key(0)
    params = with_head(decoder.init_params(CONFIG, key), init_head(16, key))
    save_pretrained(ScoreModel(CONFIG, params), tmp_path, tokenizer=embedded_tokenizer())
    form = RewardModel.load(tmp_path).scorer.form
    assert (form.kind, form.max_length, form.reward_bias) == ("reward", 128, 0.0)


TURNS = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}END{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.mark.parametrize("end", ["<|end|>", "<|end|>\n", "###\n", ""])
def test_a_folder_from_elsewhere_is_scored_as_its_card_does(tmp_path, end):
    """The conversation as the chat template writes it, at its last token: transformers' ids."""
    key = jax.random.key(0)
    params = with_head(decoder.init_params(CONFIG, key), init_head(16, key))
    model, tokenizer = ScoreModel(CONFIG, params), embedded_tokenizer()
    tokenizer.chat_template = TURNS.replace("END", end)
    save_pretrained(model, tmp_path, tokenizer=tokenizer)
    prompts, responses = ["the fox?", [{"role": "user", "content": "a lamp"}]], ["red", "goes "]
    card = []
    for prompt, response in zip(prompts, responses, strict=True):
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        turns = [*turns, {"role": "assistant", "content": response}]
        ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        card.append(float(model(np.array([ids], np.int32), np.array([len(ids)], np.int32))[0]))
    judge = make_annotator(f"reward:{tmp_path}")
    assert "as the chat template writes them" in judge.identity
    np.testing.assert_allclose(judge.rewards(prompts, responses), card, atol=1e-5)
    ended = make_annotator(f"reward:{tmp_path}", AnnotatorOptions(reward_rows="end_token"))
    assert "end-of-sequence token" in ended.identity
    turn = "" if end == "<|end|>\n" else end.removesuffix("<|end|>")
    ids = tokenizer(f"user:the fox?{end}assistant:red{turn}<|end|>").input_ids
    reward = float(model(np.array([ids], np.int32), np.array([len(ids)], np.int32))[0])
    np.testing.assert_allclose(ended.rewards(prompts[:1], responses[:1]), [reward], atol=1e-5)
    plain = make_annotator(f"reward:{tmp_path}", AnnotatorOptions(chat="never"))
    ids = tokenizer("the fox?red<|end|>").input_ids
    reward = float(model(np.array([ids], np.int32), np.array([len(ids)], np.int32))[0])
    np.testing.assert_allclose(plain.rewards(prompts[:1], responses[:1]), [reward], atol=1e-5)


def test_an_option_for_rows_needs_a_folder_that_does_not_say(folders, tmp_path):
    with pytest.raises(UserError, match="remembers how its rows end"):
        RewardModel.load(folders["reward"], rows="template")
    with pytest.raises(UserError, match=r"chat: .* was trained with never, not always; leave it"):
        RewardModel.load(folders["reward"], chat="always")
    assert not RewardModel.load(folders["reward"], chat="never").scorer.form.strings_as_chat
    key = jax.random.key(0)
    params = with_head(decoder.init_params(CONFIG, key), init_head(16, key))
    tokenizer = embedded_tokenizer()
    tokenizer.chat_template = None
    save_pretrained(ScoreModel(CONFIG, params), tmp_path, tokenizer=tokenizer)
    with pytest.raises(UserError, match="has no chat template"):
        RewardModel.load(tmp_path, rows="template")
    with pytest.raises(UserError, match="chat: always, but the tokenizer has no chat template"):
        RewardModel.load(tmp_path, chat="always")
    assert "end-of-sequence" in RewardModel.load(tmp_path).identity
    embedded_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="reward_rows: not with chat never"):
        RewardModel.load(tmp_path, rows="template", chat="never")


@dataclasses.dataclass
class Wheel:
    """Prefers x to y by their first letters: with `around`, each beats the next of a wheel."""

    around: bool

    def preferences(self, prompts, first, second):
        places = [
            ("abc".index(x[0]), "abc".index(y[0])) for x, y in zip(first, second, strict=True)
        ]
        beats = [(y - x) % 3 == 1 if self.around else x < y for x, y in places]
        p = np.where(beats, 0.9, 0.1)
        return Verdicts(preference=p, reasons=("",) * len(p))


class Coin:
    def preferences(self, prompts, first, second):
        p = np.random.default_rng(0).choice([0.2, 0.8], len(prompts))
        return Verdicts(preference=p, reasons=("",) * len(p))


def test_circles_are_counted():
    answers = [["apple", "bread", "cheese", "bread"], ["axe", "bow"]]
    around = sampled_cycles(Wheel(around=True), ["eat", "hunt"], answers, triples=50)
    assert (around.cyclic, around.triples) == (50, 50)
    straight = sampled_cycles(Wheel(around=False), ["eat", "hunt"], answers, triples=50)
    assert straight.rate == 0
    coin = sampled_cycles(Coin(), ["eat"], answers[:1], triples=4000)
    assert abs(coin.rate - 0.25) < 0.03
    nothing = sampled_cycles(Coin(), ["hunt"], answers[1:])
    assert nothing.triples == 0
    assert np.isnan(nothing.rate)


def test_a_reward_model_makes_no_circles(folders):
    model = RewardModel.load(folders["reward"])
    answers = [texts(seed, 6) for seed in range(4)]
    found = sampled_cycles(model, texts(9, 4), answers, triples=100)
    assert (found.cyclic, found.triples) == (0, 100)
