"""Verdicts in the words of judges: A, B or tie where a text plainly says one of them, else none."""

import re

NOUN = r"(?:responses?|answers?|options?|choices?|assistants?|candidates?|models?|outputs?|replies)"
LABEL = rf"(?:(?:the )?{NOUN}[\s_])?[(\[]?(?P<side>[AB])\b[)\]]?"
TIE = (
    r"(?P<tie>(?:it(?:['’]s| is) )?(?:an? )?(?:tie|draw)\b"
    rf"|(?:(?:both|the two)(?: {NOUN})?|they|(?:both )?(?:{NOUN} )?[AB] and (?:{NOUN} )?[AB])"
    r" are (?:about |roughly )?(?:equal(?:ly \w+)?|tied|the same)\b"
    rf"|neither(?: {NOUN}| one)? is better\b)"
)
CLAIM = rf"(?:{LABEL}|{TIE})"
SURELY = "(?:clearly|definitely|overall|slightly|somewhat|much|far|significantly|marginally)"
BETTER = (
    rf"(?:wins|(?:is|was) (?:{SURELY} )?(?:the )?"
    rf"(?:better|best|superior|preferable|preferred|stronger|winner)(?: one| {NOUN})?"
    rf"(?: (?:than|to) (?:the other(?: one)?|(?:{NOUN} )?[AB])\b)?(?: overall)?)"
)
REASON = r"\b(?:because|since|as|due to)\b"
ALONE = rf"(?!\s*(?:[,/|&+]|or\b|and\b)\s*(?:{NOUN} )?[AB]\b)(?=\s*(?:[.,;!)\n]|$|over\b|{REASON}))"
FIELDS = (
    "(?:final_)?(?:winner|verdict|answer|preference|preferred|choice|better|best|decision|judge?ment"
    "|label|result|better_response)"
)


def _spaced(pattern: str) -> re.Pattern[str]:
    """A pattern whose spaces stand for any blanks within a line."""
    return re.compile(pattern.replace(" ", r"[^\S\n]+"), re.I)


MARKED = _spaced(
    r"\[\[\s*(?:(?P<side>[AB])(?:>{1,2}[AB])?|(?P<tie>C|[AB]=[AB]|tie))\s*\]\]"
    rf"|\\boxed\s*\{{\s*(?:\\text\s*\{{\s*)?(?:{NOUN} )?"
    r"(?:(?P<side_boxed>[AB])|(?P<tie_boxed>tie))\s*\}"
    r"|<(?:answer|verdict)>\s*(?:(?P<side_tag>[AB])|(?P<tie_tag>tie))\s*</"
    rf'|"{FIELDS}"\s*:\s*"(?:{NOUN}[\s_])?(?:(?P<side_field>[AB])|(?P<tie_field>tie|draw|equal))"',
)
STATED = _spaced(
    r"\b(?:answer|verdict|choice|decision|judge?ment|preference|winner|conclusion"
    rf"|(?:better|best|preferred|stronger)(?: one| {NOUN})?)"
    rf"\s*(?:is(?:\s*:)?|:|=|goes to)\s*{CLAIM}(?:\s+{BETTER})?{ALONE}",
)
CHOSEN = _spaced(
    r"I(?:['’]d|['’]ll| would| will)? (?:choose|pick|prefer|select|vote for|go with|favou?r) "
    rf"{LABEL}(?: over (?:{NOUN} )?[AB])?\W*",
)
CALLED = _spaced(
    r"(?:(?:so|therefore|thus|hence|overall|finally|in conclusion),? |I (?:think|believe|conclude) "
    rf"(?:that )?)?{LABEL} {BETTER}\W*",
)
BARE = _spaced(rf"\W*?{CLAIM}[\s.!,;)]*")
WEIGHING = r"(?:better|best|superior|prefer\w*|stronger|win|wins|winner|worse|worst|choose|pick)"
WEIGHED = re.compile(rf"\b[AB]\b.*\b{WEIGHING}\b|\b{WEIGHING}\b.*\b[AB]\b", re.S)
THOUGHTS = re.compile(
    r"^.*</think>|<(think|thinking|reasoning)>.*?(?:</\1>|\Z)|\[THINK\].*?(?:\[/THINK\]|\Z)", re.S
)
DECORATION = re.compile(r"(?<!\w)['’]|['’](?!\w)|[*`\"#>“”«»]|(?<!\w)_|_(?!\w)")
WHY = _spaced(REASON)
HEDGE = re.compile(r"n['’]t\b|\b(?:not|never|no|cannot|if|whether|unless|although|though)\b", re.I)
SENTENCES = re.compile(r"[^.!?;\n]+[.!?;]*")


def read_verdict(text: str, *, cut: bool = False) -> tuple[str, int] | None:
    r"""The verdict of a judge's text, and where its label stands.

    Markdown, quotes and thoughts before the answer do not count. What the text states as its answer
    comes first: the label alone in a line, in marks ([[A]], \boxed{A}, <answer>, a field of JSON)
    or after words such as "Answer:". Without any, sentences count that call one of the two better,
    unless another sentence weighs them without deciding. All that count have to agree.

    Args:
      text: what the judge wrote.
      cut: it was cut off, so that its last words may not be all.

    Returns:
      "a", "b" or "tie", and the position of the first words that say so; None where the text says
      none of them, or not plainly.
    """
    text = THOUGHTS.sub(_blank, text)
    words = DECORATION.sub(" ", text)
    begin, end = len(words) - len(words.lstrip()), len(words.rstrip())
    if whole := BARE.fullmatch(words, begin, end):
        return _claim(whole)
    if cut:
        words += "x"  # the last word may be longer, and the last line goes on
    stated = [*MARKED.finditer(text)]
    for sentence in SENTENCES.finditer(words):
        found = STATED.search(words, *sentence.span())
        if found and not HEDGE.search(words, sentence.start(), found.start()):
            stated.append(found)
    for line in re.finditer(r"[^\n]+", words):
        found = BARE.fullmatch(words, *line.span())
        if found and len(re.findall(r"\w+", found[0])) == 1:  # with a noun it may be a heading
            stated.append(found)
    return _agreed(stated) if stated else _agreed(_judged(words))


def _judged(words: str) -> list[re.Match[str]]:
    """What the sentences of a text claim; nothing where one of them does not decide."""
    claims = []
    for sentence in SENTENCES.finditer(words):
        begin = sentence.end() - len(sentence[0].lstrip())
        reason = WHY.search(words, begin, sentence.end())
        span = begin, reason.start() if reason else sentence.end()
        forms = (form.fullmatch(words, *span) for form in (BARE, CHOSEN, CALLED))
        found = next(filter(None, forms), None)
        if found:
            claims.append(found)
        elif WEIGHED.search(words, *span):
            return []
    return claims


def _claim(found: re.Match[str]) -> tuple[str, int]:
    """Its label, and where that stands."""
    name = next(name for name, value in found.groupdict().items() if value is not None)
    label = found[name].lower() if name.startswith("side") else "tie"
    return label, found.start(name)


def _agreed(found: list[re.Match[str]]) -> tuple[str, int] | None:
    claims = sorted(map(_claim, found), key=lambda claim: claim[1])
    return claims[0] if len({label for label, _ in claims}) == 1 else None


def _blank(found: re.Match[str]) -> str:
    """Spaces in its place, so that what follows stays where it was."""
    return re.sub(r"[^\n]", " ", found[0])
