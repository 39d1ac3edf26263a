"""The data card: a table, a figure, and examples with their scored tokens marked."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Shaped

from jaxalign.data.card import DataCard, Lengths, ShownRow
from jaxalign.files import json_value, write_json
from jaxalign.reporting.charts import GREY, Chart, Figure, Series, colour, draw
from jaxalign.reporting.page import Table, Text, write_page

BARS = 40
"""Steps of a histogram."""
WIDE = 8
"""Ratio of the longest to the median from which an axis is logarithmic."""
WRITTEN = CARD, IMAGE, PAGE = "card.json", "card.png", "index.html"
SHORT = 700
"""Characters of a part of an example in the terminal."""
PALE = "#c8ccd2"
"""The colour of padding."""
OPEN, CLOSE = "⟦", "⟧"
"""Around scored tokens in the terminal."""
Numbers = Shaped[np.ndarray, "..."]


@dataclass(frozen=True, kw_only=True)
class MarkedText:
    """Examples as a run reads them, scored tokens in colour."""

    template: ClassVar[str] = "marked_text.html"
    title: str
    note: str
    examples: Sequence[tuple[str, Sequence[ShownRow]]]


def card_rows(cards: Sequence[DataCard], max_length: int, batch_size: int) -> list[list[str]]:
    """A row for each number, with a cell for each source; rows that no source has are left out."""
    rows: list[list[str]] = []

    def add(name: str, *cells: str | None) -> None:
        if any(cells):
            rows.append([name, *(cell or "" for cell in cells)])

    def count(number: int | None, of: int) -> str | None:
        if number is None:
            return None
        return f"{number:,} ({number / of:.1%})" if number else "0"

    def fraction(value: float | None) -> str | None:
        return None if value is None else f"{value:.1%}"

    def each(names: Sequence[Sequence[str]]) -> list[str]:
        return list(dict.fromkeys(name for own in names for name in own))

    add("kind", *(card.kind for card in cards))
    add("rows read", *(f"{card.read:,}" for card in cards))
    for reason in each([list(card.skipped) for card in cards]):
        found = [card.skipped.get(reason, 0) for card in cards]
        cells = (count(x, card.read) for x, card in zip(found, cards, strict=True))
        add(f"skipped: {reason}", *cells)
    add("records", *(f"{card.records:,}" for card in cards))
    for form in each([list(card.forms) for card in cards]):
        add(form, *(count(card.forms.get(form, 0), card.records) for card in cards))
    add("the same as an earlier record", *(count(x.repeated_records, x.records) for x in cards))
    add("distinct prompts", *(count(card.distinct_prompts, card.records) for card in cards))
    near = (count(card.near_duplicate_prompts, card.distinct_prompts) for card in cards)
    add("nearly the same as an earlier prompt", *near)
    add(
        "prompts of another source, too",
        *(count(card.prompts_elsewhere, card.distinct_prompts) for card in cards),
    )
    add("true labels", *(fraction(card.desirable) for card in cards))
    for name in each([list(card.lengths) for card in cards]):
        add(f"tokens: {name}", *(_of_lengths(card.lengths.get(name)) for card in cards))
    longer = (count(card.longer_than_max_length, card.records) for card in cards)
    add(f"longer than {max_length} tokens", *longer)
    for name in ("truncated_prompts", "truncated_responses"):
        found = [getattr(card, name) for card in cards]
        if any(found):
            add(f"{name.replace('_', ' ')} (rows)", *(f"{number:,}" for number in found))
    if any(card.refused for card in cards):
        add("refused by the chat template", *(count(x.refused, x.records) for x in cards))
    if any(card.left_out for card in cards):
        add("left out after truncation", *(count(x.left_out, x.records) for x in cards))
    add("chosen longer than rejected", *(fraction(card.longer_chosen) for card in cards))
    add("equally long", *(fraction(card.equal_lengths) for card in cards))
    add("common beginning of the two rows", *(fraction(x.common_beginning) for x in cards))
    add("chosen nearly the same as rejected", *(count(x.alike, x.records) for x in cards))
    for form in each([list(card.positions) for card in cards]):
        found = [card.positions.get(form) for card in cards]
        cells = (x and f"{x.padding:.1%} of {x.positions:,.0f} positions" for x in found)
        add(f"padding at {batch_size}: {form}", *cells)
    add("letters", *(_of_scripts(card.scripts) for card in cards))
    add("examples of an epoch", *(f"{card.examples:,}" for card in cards))
    add(
        "of an epoch of the mixture",
        *(None if (n := card.used_an_epoch) is None else f"{n:,}" for card in cards),
    )
    return rows


def _of_lengths(lengths: Lengths | None) -> str | None:
    if lengths is None:
        return None
    low, _, median, _, high = lengths.quantiles
    return f"{median:,} ({low:,} to {high:,}, at most {lengths.largest:,})"


def _of_scripts(scripts: dict[str, float]) -> str:
    shown = [f"{name} {value:.1%}" for name, value in list(scripts.items())[:3] if value >= 5e-4]
    return ", ".join(shown)


def card_charts(
    cards: Sequence[DataCard], max_length: int, batch_size: int, sources: Sequence[str]
) -> list[Chart]:
    """Lengths, what fits, differences of lengths, overlap and padding, of all sources.

    A source has a colour; of a single one, each side has a colour.
    """
    alone = len(cards) == 1
    charts = [_prompt_lengths(cards, sources), _response_lengths(cards, sources, alone)]
    charts.append(_fitting(cards, sources, max_length))
    pairs = [at for at, card in enumerate(cards) if card.kind == "pairs"]
    if pairs:
        differences, overlaps = [], []
        for at in pairs:
            chosen, rejected = cards[at].arrays.responses.values()
            differences.append(chosen - rejected)
            overlaps.append(cards[at].arrays.overlap)
        labels = [(sources[at], colour(at)) for at in pairs]
        charts.append(_differences(differences, labels, alone))
        charts.append(_overlaps(overlaps, labels, alone))
    charts.append(_positions(cards, batch_size, alone))
    return charts


def _prompt_lengths(cards: Sequence[DataCard], sources: Sequence[str]) -> Chart:
    every = [card.arrays.prompt for card in cards]
    edges = _edges(every)
    series = [
        _histogram(own, edges, label=label if len(cards) > 1 else "", colour=colour(at))
        for at, (own, label) in enumerate(zip(every, sources, strict=True))
    ]
    return _of_records("Prompts", series, log_x=bool(edges[0] > 0))


def _response_lengths(cards: Sequence[DataCard], sources: Sequence[str], alone: bool) -> Chart:
    edges = _edges([own for card in cards for own in card.arrays.responses.values()])
    series = []
    for at, (card, source) in enumerate(zip(cards, sources, strict=True)):
        for side, (name, own) in enumerate(card.arrays.responses.items()):
            names = "" if len(card.arrays.responses) == 1 else name
            label = names if alone else source if not side else ""
            shade = colour(side if alone else at)
            series.append(_histogram(own, edges, label=label, colour=shade, dashed=side > 0))
    dashed = any(len(card.arrays.responses) > 1 for card in cards)
    title = "Responses" if alone or not dashed else "Responses (rejected dashed)"
    return _of_records(title, series, log_x=bool(edges[0] > 0))


def _of_records(title: str, series: Sequence[Series], *, log_x: bool) -> Chart:
    name = "fraction of records"
    return Chart(title=title, series=series, x_label="tokens", y_label=name, log_x=log_x)


def _edges(every: Sequence[Numbers]) -> Numbers:
    """Steps of whole numbers, beyond which lies at most a hundredth of the records of any source.

    They are of equal width, or from 1 on each longer than the one before, for a logarithmic axis.
    """
    top = max(1.0, *(float(np.quantile(own, 0.99)) for own in every))
    if top > WIDE * min(float(np.median(own)) for own in every):
        return np.unique(np.round(np.geomspace(1, top + 1, BARS + 1)))
    width = max(1.0, np.ceil(top / BARS))
    return width * np.arange(np.ceil(top / width) + 2)


def _histogram(
    values: Numbers, edges: Numbers, *, label: str, colour: str, dashed: bool = False
) -> Series:
    """The fractions of values in steps, as a line with corners."""
    counts, _ = np.histogram(values, bins=edges)
    heights = counts / max(len(values), 1)
    x = np.repeat(edges, 2)
    y = np.concatenate([[0.0], np.repeat(heights, 2), [0.0]])
    return Series(x=x.tolist(), y=y.tolist(), label=label, colour=colour, dashed=dashed)


def _fitting(cards: Sequence[DataCard], sources: Sequence[str], max_length: int) -> Chart:
    """The fraction of records whose rows have at most so many tokens."""
    series = []
    for at, (card, source) in enumerate(zip(cards, sources, strict=True)):
        sides = card.arrays.responses.values()
        longest = np.sort(card.arrays.prompt + np.max(list(sides), axis=0))
        kept = np.unique(np.linspace(0, len(longest) - 1, 200).astype(int))
        series.append(
            Series(
                x=[0, *longest[kept].tolist()],
                y=[0.0, *((kept + 1) / len(longest)).tolist()],
                label=source if len(cards) > 1 else "",
                colour=colour(at),
            )
        )
    limit = Series(x=[max_length] * 2, y=[0, 1], colour=GREY, dashed=True, label="max_length")
    return Chart(
        title="Records that fit",
        series=[*series, limit],
        x_label="tokens of the longest row",
        y_label="fraction of records",
        y_range=(0, 1.03),
    )


def _differences(every: Sequence[Numbers], labels: Sequence[tuple[str, str]], alone: bool) -> Chart:
    top = max(1.0, *(float(np.quantile(np.abs(own), 0.98)) for own in every))
    width = np.ceil(2 * top / BARS)
    number = np.ceil(top / width)
    edges = width * (np.arange(-number, number + 2) - 0.5)  # 0 is the middle of a step
    series = [
        _histogram(own, edges, label="" if alone else label, colour=shade)
        for own, (label, shade) in zip(every, labels, strict=True)
    ]
    highest = max(max(one.y) for one in series)
    zero = Series(x=[0, 0], y=[0, highest], colour=GREY, dashed=True)
    return Chart(
        title="Chosen longer than rejected by",
        series=[*series, zero],
        x_label="tokens",
        y_label="fraction of pairs",
    )


def _overlaps(every: Sequence[Numbers], labels: Sequence[tuple[str, str]], alone: bool) -> Chart:
    series = [
        _histogram(own, np.linspace(0, 1, 21), label="" if alone else label, colour=shade)
        for own, (label, shade) in zip(every, labels, strict=True)
    ]
    return Chart(
        title="Tokens that chosen and rejected share",
        series=series,
        x_label="share of common tokens",
        y_label="fraction of pairs",
    )


def _positions(cards: Sequence[DataCard], batch_size: int, alone: bool) -> Chart:
    """Tokens and padding of an example, in batches of each form."""
    names = list(dict.fromkeys(name for card in cards for name in card.positions))
    width, series = 0.8 / len(cards), []
    for at, card in enumerate(cards):
        x = [names.index(name) + width * (at - (len(cards) - 1) / 2) for name in card.positions]
        tokens = [one.tokens for one in card.positions.values()]
        padding = [one.positions - one.tokens for one in card.positions.values()]
        bars: dict[str, Any] = {"x": x, "kind": "bars", "width": 0.9 * width}
        label = "tokens" if alone else ""
        series.append(Series(y=tokens, label=label, colour=colour(at), **bars))
        label = "" if at else "padding"
        series.append(Series(y=padding, base=tokens, label=label, colour=PALE, **bars))
    return Chart(
        title=f"Positions computed in batches of {batch_size}",
        series=series,
        x_label="",
        y_label="mean of an example",
        x_names=[name.replace(", ", ",\n") for name in names],
    )


def write_card(
    cards: Sequence[DataCard], folder: Path, *, max_length: int, batch_size: int
) -> tuple[Path, Path, Path]:
    """Write the numbers, the figure and the page.

    Args:
      cards: of the sources.
      folder: where the three files go; made where it is missing.
      max_length: of the rows.
      batch_size: of the numbers on padding.

    Returns:
      The paths of the JSON file, the PNG and the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / CARD, folder / IMAGE, folder / PAGE
    labels = [card.label for card in cards]
    sources = [card.numbers() for card in cards]
    numbers = {"max_length": max_length, "batch_size": batch_size, "sources": sources}
    write_json(paths[0], json_value(numbers))
    charts = card_charts(cards, max_length, batch_size, labels)
    draw(charts, paths[1], columns=3)
    skipped = [
        [card.label, reason, f"{number:,}", card.first_skipped.get(reason, "")]
        for card in cards
        for reason, number in card.skipped.items()
    ]
    parts = [
        Table(
            title="Numbers",
            header=["", *labels],
            rows=card_rows(cards, max_length, batch_size),
            note="Lengths: the median, in brackets from the 5th to the 95th percentile.",
        ),
        Figure(title="Distributions", charts=charts, image=IMAGE),
        *(
            [
                Table(
                    title="Skipped rows",
                    header=["source", "reason", "rows", "first"],
                    rows=skipped,
                    words=(0, 1, 3),
                )
            ]
            if skipped
            else []
        ),
        *(
            MarkedText(
                title=f"Examples of {card.label}",
                note="As the chat template renders them; scored tokens are coloured.",
                examples=card.shown,
            )
            for card in cards
            if card.shown
        ),
    ]
    notes = list(dict.fromkeys(note for card in cards for note in (*card.chat, *card.notes)))
    if notes:
        parts.append(Text(title="Notes", lines=notes, bullets=True))
    facts = [f"{card.source}: {card.records:,} records, {card.tokens:,} tokens" for card in cards]
    write_page("Data card: " + ", ".join(labels), facts, parts, paths[2])
    return paths


def print_examples(card: DataCard) -> None:
    """Examples in the terminal: scored tokens in brackets, and underlined where it can."""
    from rich.console import Console
    from rich.text import Text as Styled

    console = Console(highlight=False)
    for place, rows in card.shown:
        for row in rows:
            console.print(Styled(f"{place}, {row.name}", style="bold"), soft_wrap=True)
            text = Styled()
            for part, scored in row.parts:
                short = shortened(part)
                text.append(f"{OPEN}{short}{CLOSE}" if scored else short)
                if scored:
                    text.stylize("underline", len(text) - len(short) - 1, len(text) - 1)
            console.print(text, end="\n\n", soft_wrap=True)


def shortened(text: str) -> str:
    """The text, or its beginning and its end."""
    half = SHORT // 2
    return text if len(text) <= SHORT else f"{text[:half]} [...] {text[-half:]}"
