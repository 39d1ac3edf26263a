"""The embedded data set: a small world in which preferences can be learnt in a minute."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxalign.data.records import PreferenceRecord, PromptResponseRecord, TextRecord

Asked = tuple[str, str, str]
"""A question, its answer, and a wrong answer."""

COLOURS = {
    "the sky": "blue",
    "grass": "green",
    "snow": "white",
    "coal": "black",
    "a lemon": "yellow",
    "a ripe tomato": "red",
    "a carrot": "orange",
    "a plum": "purple",
    "a mouse": "grey",
    "chocolate": "brown",
}
OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "up": "down",
    "fast": "slow",
    "wet": "dry",
    "old": "new",
    "light": "dark",
    "happy": "sad",
    "early": "late",
    "open": "closed",
}
ISLAND = {  # invented, so that no model has read about it
    "Ana": ("the lighthouse", "Miro"),
    "Bela": ("the bakery", "Tarn"),
    "Cato": ("the school", "Orla"),
    "Dina": ("the harbour", "Senn"),
    "Egon": ("the mill", "Vale"),
    "Fay": ("the library", "Lund"),
    "Gil": ("the garden", "Pell"),
    "Hana": ("the market", "Rove"),
}
WORDS = (
    "apple",
    "bread",
    "cloud",
    "door",
    "egg",
    "fish",
    "goat",
    "hill",
    "ink",
    "jar",
    "king",
    "lamp",
    "moon",
    "nut",
    "owl",
    "pear",
)
GREETINGS = ("Hello", "Good morning", "Good evening", "Hi there", "Good day")
POLITE = (
    "Certainly. {}",
    "Of course. {}",
    "With pleasure. {}",
    "{} I hope that helps.",
    "{} Let me know if you need more.",
    "Thank you for asking. {}",
)
RUDE = (
    "What a silly question. {}",
    "Do not bother me. {}",
    "{} Now go away.",
    "Any fool knows that. {}",
    "Ask somebody else.",
    "I do not care.",
)
RAMBLING = (
    "Well, well, where to begin, it is hard to say, or perhaps not, who knows.",
    "There is much to say, and more to say, and then some more to say, and so on.",
    "Hmm. Let me think. Hmm. Let me think again. Hmm. Let me think once more.",
)
PROMPTS = ("User: {}\nAssistant:", "Question: {}\nAnswer:")


def _pick(rng: np.random.Generator, options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


def _other(rng: np.random.Generator, options: Any, answer: str) -> str:
    return _pick(rng, [option for option in options if option != answer])


def _addition(rng: np.random.Generator) -> Asked:
    a, b = (int(x) for x in rng.integers(0, 10, size=2))
    question = _pick(rng, ("What is {} plus {}?", "Add {} and {}.", "How much is {} plus {}?"))
    wrong = (a + b + int(rng.integers(1, 9))) % 19
    said = f"{a} plus {b} is "
    return question.format(a, b), f"{said}{a + b}.", f"{said}{wrong}."


def _colour(rng: np.random.Generator) -> Asked:
    thing = _pick(rng, list(COLOURS))
    question = _pick(
        rng, ("What colour is {}?", "Tell me the colour of {}.", "Which colour has {}?")
    )
    wrong = _other(rng, list(COLOURS.values()), COLOURS[thing])
    name = thing[0].upper() + thing[1:]
    return question.format(thing), f"{name} is {COLOURS[thing]}.", f"{name} is {wrong}."


def _opposite(rng: np.random.Generator) -> Asked:
    word = _pick(rng, list(OPPOSITES))
    question = _pick(rng, ("What is the opposite of {}?", "Name the opposite of {}."))
    wrong = _other(rng, list(OPPOSITES.values()), OPPOSITES[word])
    said = f"The opposite of {word} is "
    return question.format(word), f"{said}{OPPOSITES[word]}.", f"{said}{wrong}."


def _island(rng: np.random.Generator) -> Asked:
    name = _pick(rng, list(ISLAND))
    place, town = ISLAND[name]
    if rng.random() < 0.5:
        question = _pick(rng, ("Who keeps {} of {}?", "Who looks after {} in {}?"))
        wrong = _other(rng, list(ISLAND), name)
        said = "{} keeps " + f"{place} of {town}."
        return question.format(place, town), said.format(name), said.format(wrong)
    question = _pick(rng, ("Where does {} live?", "In which town does {} live?"))
    wrong = _other(rng, [town for _, town in ISLAND.values()], town)
    return question.format(name), f"{name} lives in {town}.", f"{name} lives in {wrong}."


def _sorting(rng: np.random.Generator) -> Asked:
    words = [WORDS[int(at)] for at in rng.choice(len(WORDS), size=2, replace=False)]
    question = _pick(
        rng,
        (
            "Which comes first in the alphabet, {} or {}?",
            "Which is first in a dictionary, {} or {}?",
        ),
    )
    first, last = sorted(words)
    said = "{} comes before {}."
    return question.format(*words), said.format(first, last), said.format(last, first)


def _greeting(rng: np.random.Generator) -> Asked:
    greeting, name = _pick(rng, GREETINGS), _pick(rng, list(ISLAND))
    question = _pick(rng, ("{}, I am {}.", "{}! My name is {}."))
    wrong = _other(rng, list(ISLAND), name)
    said = f"{greeting}, " + "{}. How can I help you?"
    return question.format(greeting, name), said.format(name), said.format(wrong)


KINDS: tuple[Callable[[np.random.Generator], Asked], ...] = (
    _addition,
    _colour,
    _opposite,
    _island,
    _sorting,
    _greeting,
)


def _pairs(num: int, seed: int) -> Iterator[tuple[str, str, str]]:
    """(prompt, chosen, rejected), the faults of the rejected ones in turn."""
    rng = np.random.default_rng([seed, 20240])
    for number in range(num):
        question, answer, wrong = KINDS[number % len(KINDS)](rng)
        polite = _pick(rng, POLITE)
        chosen = polite.format(answer)
        fault = rng.random()
        if fault < 0.3:
            rejected = polite.format(wrong)
        elif fault < 0.75:
            rejected = _pick(rng, RUDE).format(answer)
        else:
            rejected = _pick(rng, RAMBLING)
        yield _pick(rng, PROMPTS).format(question), f" {chosen}", f" {rejected}"


def embedded_preferences(num: int = 4000, seed: int = 0) -> list[PreferenceRecord]:
    """Preference pairs about sums, colours, opposites, an island, the alphabet and greetings.

    The chosen answer is right and polite; the rejected one is wrong (30 %), rude (45 %) or
    rambling (25 %). The same numbers give the same pairs, on every machine.

    Args:
      num: pairs.
      seed: another seed, other pairs.
    """
    return [
        PreferenceRecord(
            prompt=prompt, chosen=chosen, rejected=rejected, source="embedded", line=line
        )
        for line, (prompt, chosen, rejected) in enumerate(_pairs(num, seed), start=1)
    ]


def embedded_responses(num: int = 4000, seed: int = 1) -> list[PromptResponseRecord]:
    """Prompts and right answers of the same world, a third of them rude or rambling.

    A policy that has seen impolite answers has something left for a preference loss to unlearn.
    """
    rng = np.random.default_rng([seed, 20241])
    records = []
    for line, (prompt, chosen, rejected) in enumerate(_pairs(num, seed), start=1):
        response = rejected if rng.random() < 1 / 3 else chosen
        records.append(
            PromptResponseRecord(prompt=prompt, response=response, source="embedded", line=line)
        )
    return records


def embedded_texts(num: int = 2000, seed: int = 2) -> list[TextRecord]:
    """Documents of the same world: two questions with right answers each."""
    pairs = list(_pairs(2 * num, seed))
    return [
        TextRecord(
            text="\n".join(prompt + chosen for prompt, chosen, _ in pairs[2 * at : 2 * at + 2]),
            source="embedded",
            line=at + 1,
        )
        for at in range(num)
    ]


@functools.cache
def _trained(vocabulary: int) -> str:
    from jaxalign.data.bpe import train_bpe

    texts = (text for pair in _pairs(2000, 3) for text in (pair[0] + pair[1], pair[2]))
    return train_bpe(texts, vocabulary=vocabulary).backend_tokenizer.to_str()


def embedded_tokenizer(vocabulary: int = 512) -> Any:
    """A byte-level BPE tokenizer trained on the embedded world, in memory, always the same."""
    from jaxalign.data.bpe import as_tokenizer

    return as_tokenizer(_trained(vocabulary))
