"""The table of what judges write, and what is read of it."""

import re

import pytest

from jaxalign.evaluation.verdict_text import read_verdict

TABLE = {
    # a label alone, however it is dressed
    "A": "a",
    "B": "b",
    " B.\n": "b",
    "A!": "a",
    "(B)": "b",
    "[A]": "a",
    "**A**": "a",
    "\n\nA": "a",
    '"B"': "b",
    "'A'": "a",
    "“B”": "b",
    "`A`": "a",
    "_B_": "b",
    "> A": "a",
    "# B": "b",
    "a": "a",
    "b.": "b",
    "Option A": "a",
    "Response B": "b",
    "**Response B.**": "b",
    "response_a": "a",
    "Assistant A": "a",
    "The answer B": "b",
    # ties
    "Tie": "tie",
    "tie.": "tie",
    "TIE": "tie",
    "**tie**": "tie",
    "It's a tie.": "tie",
    "It is a draw": "tie",
    "Both are equal": "tie",
    "Both responses are equally good.": "tie",
    "A and B are equal.": "tie",
    "Response A and response B are equally helpful.": "tie",
    "Neither response is better.": "tie",
    "The verdict is a tie.": "tie",
    "Verdict: tie": "tie",
    # marks
    "[[A]]": "a",
    "[[B]]": "b",
    "My final verdict is [[A>>B]].": "a",
    "[[B>A]]": "b",
    "[[A=B]]": "tie",
    "[[C]]": "tie",
    "Both try. My final verdict is [[B]]": "b",
    "\\boxed{A}": "a",
    "Therefore $\\boxed{\\text{B}}$.": "b",
    "<answer>B</answer>": "b",
    '{"winner": "B"}': "b",
    '```json\n{"reason": "B is wordy", "winner": "A"}\n```': "a",
    '{"verdict": "Response A", "confidence": 0.7}': "a",
    '{"preference": "tie"}': "tie",
    # stated as the answer
    "Answer: B": "b",
    "Answer: **A**": "a",
    "**Answer:** B": "b",
    "Final answer: (A)": "a",
    "The answer is: B.": "b",
    "The answer is B": "b",
    "My choice is Option A.": "a",
    "The better response is B.": "b",
    "The better one is Response A": "a",
    "A better answer is B.": "b",
    "The winner is: A": "a",
    "Verdict: A, because it is right.": "a",
    "Verdict: Response A is better": "a",
    "answer: b": "b",
    "## Verdict\n\nB": "b",
    "A\n\nIt is right, whereas B is worse in tone.": "a",
    "Response A is polite. Response B is right.\n\nVerdict: B": "b",
    "A is better in tone, B is better in facts.\nVerdict: A": "a",
    "It lists facts.\n\n**B**": "b",
    "<think>A is better? No, B.</think>\n\nB": "b",
    "Maybe B is better. </think>A": "a",
    "[THINK]Answer: A[/THINK]Answer: B": "b",
    # sentences
    "Response B is better": "b",
    "Response B is better.": "b",
    "A is better": "a",
    "**B** is better than **A**.": "b",
    "Response A is the better response overall.": "a",
    "Response A is clearly better because B is not right.": "a",
    "B wins.": "b",
    "I choose B": "b",
    "I'd go with Response A.": "a",
    "I prefer A over B.": "a",
    "A. It answers the question.": "a",
    "B, because A is wrong.": "b",
    "I think that Response B is better. It answers the question.": "b",
    "Overall, A is superior.": "a",
    # none, or not plain
    "": None,
    "A or B": None,
    "A/B": None,
    "A and B": None,
    "A, B": None,
    "AB": None,
    "C": None,
    "Neither": None,
    "Neither.": None,
    "Both": None,
    "I like both": None,
    "I cannot decide.": None,
    "Well,": None,
    "A clear answer": None,
    "Answer: A or B": None,
    "Answer: A, B": None,
    "Answer: neither": None,
    "Answer: not A": None,
    "The answer is not A.": None,
    "The better response is unclear.": None,
    "A is not better.": None,
    "I don't think Response B is better.": None,
    "Response A is better, but B is right.": None,
    "Response A is better in style. Response B is better in content.": None,
    "A is better. B is better.": None,
    "If the facts count, B is better.": None,
    "Is A better?": None,
    "A is hardly better.": None,
    "I wouldn't say that the better answer is A.": None,
    "It is not true that the winner is B.": None,
    "If style counts, the better one is A. If facts count, the better one is B.": None,
    "Either A is better or B is.": None,
    "Reply with A, B or tie.": None,
    "[[A]] or [[B]]": None,
    "Answer: A\n\nAnswer: B": None,
    "A\nB": None,
    "Response A: good\nResponse B: bad": None,
    "## Response A\nIt is fine.\n\n## Response B\nIt is fine.": None,
    '{"winner": "A or B"}': None,
    '{"winner": "A", "verdict": "B"}': None,
    '{"A": 7, "B": 9}': None,
    "\\boxed{42}": None,
    "<think>The better one is B": None,
    "<think>Answer: A": None,
    "As an AI, I pick neither A nor B.": None,
}


@pytest.mark.parametrize("text", TABLE, ids=repr)
def test_what_a_judge_writes(text):
    found = read_verdict(text)
    assert (None if found is None else found[0]) == TABLE[text]


@pytest.mark.parametrize("text", [text for text, verdict in TABLE.items() if verdict in ("a", "b")])
def test_the_label_stands_where_it_is_said_to_stand(text):
    found = read_verdict(text)
    assert found is not None
    assert text[found[1]].lower() == found[0]


@pytest.mark.parametrize("text", TABLE)
def test_exchanged_labels_exchange_the_verdict(text):
    """Where the two labels are all that is exchanged: capitals that are no article, no [[C]]."""
    if any(word in text for word in ("A clear", "A better answer", "[[A>>B]]", "[[B>A]]")):
        return
    other = {"A": "B", "B": "A", "a": "b", "b": "a"}
    turned = re.sub(r"(?<![A-Za-z])[AB](?![A-Za-z])", lambda found: other[found[0]], text)
    before, after = read_verdict(text), read_verdict(turned)
    if turned == text:
        return
    expected = {"a": "b", "b": "a"}.get(before[0], before[0]) if before else None
    assert (after[0] if after else None) == expected


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("A", "a"),
        ("**B", "b"),
        ("A\n\nResponse A is the one that", "a"),
        ("[[B]] as it", "b"),
        ("Answer: A", None),
        ("Answer: A because it", "a"),
        ("Response B is better", None),
        ("Response A is better in", None),
        ("The request asks", None),
    ],
)
def test_the_last_words_of_what_was_cut_off_are_not_taken_for_all(text, verdict):
    found = read_verdict(text, cut=True)
    assert (None if found is None else found[0]) == verdict
