"""Tokens on disk: tokenised once, in parts, and read through memory maps."""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.data.batches import common_lengths
from jaxalign.data.building import ALONE, Processes, built, key_of, name_of
from jaxalign.data.plain_prompts import FORMAT, KEPT, NO_END
from jaxalign.data.record_index import IndexedRecords
from jaxalign.data.tokenize import tokenize_texts
from jaxalign.data.tokenized import TokenizedPairs, TokenizedRows, TokenizedTexts, TokenizeReport
from jaxalign.data.tokenizers import Tokenizer, tokenizer_identity
from jaxalign.errors import UserError, notice_once
from jaxalign.files import read_json, replacing, write_array, write_arrays, write_json

RECORDS = 8192
"""Records of a part, which are tokenised at once."""
FLAT, SCORED, FACTS = "flat.int32", "scored.bool", "tokens.json"
Tokens = TokenizedPairs | TokenizedRows | TokenizedTexts
Tokenize = Callable[..., tuple[Tokens, TokenizeReport]]


def stored_tokens(
    tokenize: Tokenize,
    records: IndexedRecords[Any],
    tokenizer: Tokenizer,
    *,
    cache: Path,
    label: str,
    processes: Processes = ALONE,
    workers: int | None = None,
    **options: Any,
) -> tuple[Any, TokenizeReport]:
    """What a function of `jaxalign.data.tokenize` returns for records, its arrays as memory maps.

    They are tokenised if no earlier run did: with the same records, function, tokenizer, options
    and versions of the libraries.

    Args:
      tokenize: `tokenize_pairs`, `tokenize_responses` or `texts_as_tokens`.
      records: at least one.
      tokenizer: from `load_tokenizer`.
      cache: folder of the folders of tokens.
      label: beginning of the folder's name, and name of the progress.
      processes: of the run; each tokenises its own parts.
      workers: processes of this one that tokenise; None: one for each core.
      **options: of `tokenize`; JSON values.

    Raises:
      UserError: no example is left.
    """
    folder = built(
        cache,
        label,
        key_of("tokens", records.facts, name_of(tokenize), tokenizer_facts(tokenizer), options),
        parts=functools.partial(_parts, records=records),
        work=functools.partial(
            _tokenize_part, tokenize=tokenize, tokenizer=tokenizer, options=options
        ),
        merge=_merge,
        what=f"tokenising {label}",
        processes=processes,
        workers=workers,
    )
    tokens, report = _loaded(folder)
    for line in report.chat:
        notice_once(line)
    return tokens, report


def texts_as_tokens(
    records: Sequence[Any], tokenizer: Tokenizer, *, may_be_empty: bool = False
) -> tuple[TokenizedTexts, TokenizeReport]:
    """`tokenize_texts` with a report, for `stored_tokens`."""
    del may_be_empty  # a document is never left out
    tokens = tokenize_texts(records, tokenizer)
    return tokens, TokenizeReport(records=len(tokens), tokens=len(tokens.flat))


def tokenizer_facts(tokenizer: Tokenizer) -> Any:
    """What tokens and rendered prompts depend on, as a JSON value."""
    kept = [tokenizer.init_kwargs.get(name) for name in (KEPT, FORMAT, NO_END)]
    return [tokenizer_identity(tokenizer), *kept]


@dataclass(frozen=True, kw_only=True)
class _Records:
    """Consecutive records."""

    path: Path
    """Of their tokens."""
    records: IndexedRecords[Any]
    first: int
    """Number of the first of them."""


def _parts(folder: Path, records: IndexedRecords[Any]) -> list[_Records]:
    parts = []
    for first in range(0, len(records), RECORDS):
        some = records[first : first + RECORDS]
        path = folder / f"tokens-{first}-{first + len(some)}.npz"
        parts.append(_Records(path=path, records=some, first=first))
    return parts


def _tokenize_part(
    part: _Records, *, tokenize: Tokenize, tokenizer: Tokenizer, options: dict[str, Any]
) -> None:
    """Write the tokens of a part."""
    tokens, report = tokenize(part.records, tokenizer, may_be_empty=True, **options)
    arrays, facts = {}, asdict(report)
    if isinstance(tokens, TokenizedTexts):
        rows, facts["characters"] = tokens, tokens.characters
    else:
        rows = tokens.rows if isinstance(tokens, TokenizedPairs) else tokens
        arrays["prompt_length"] = rows.prompt_length
        arrays["record_index"] = rows.record_index + part.first
        if isinstance(tokens, TokenizedPairs):
            arrays["common"] = common_lengths(tokens)
        if rows.scored is not None:
            arrays["scored"] = rows.scored
    arrays |= {"flat": rows.flat, "length": np.diff(rows.offsets)}
    facts["kind"] = type(tokens).__name__
    write_arrays(part.path, **arrays, facts=np.asarray(json.dumps(facts)))


def _merge(folder: Path, parts: Sequence[_Records]) -> None:
    """Write the tokens of all parts one after the other."""
    columns: dict[str, list[np.ndarray]] = {}
    report, facts = TokenizeReport(), {"characters": 0, "largest": 0, "masked": False}
    with replacing(folder / FLAT) as scratch, scratch.open("wb") as file:
        for part in parts:
            with np.load(part.path) as found:
                own = json.loads(str(found["facts"]))
                facts["kind"] = own.pop("kind")
                facts["characters"] += own.pop("characters", 0)
                report.add(TokenizeReport(**own))
                flat = found["flat"]
                facts["largest"] = max(facts["largest"], int(flat.max(initial=0)))
                file.write(flat.tobytes())
                facts["masked"] |= "scored" in found
                for name in set(found.files) - {"flat", "facts", "scored"}:
                    columns.setdefault(name, []).append(found[name])
    if facts["masked"]:
        with replacing(folder / SCORED) as scratch, scratch.open("wb") as file:
            for part in parts:
                file.write(_scored(part.path).tobytes())
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(columns.pop("length")))])
    write_array(folder / "offsets.npy", offsets)
    for name, values in columns.items():
        write_array(folder / f"{name}.npy", np.concatenate(values))
    write_json(folder / FACTS, {**facts, "rows": len(offsets) - 1, "report": asdict(report)})


def _scored(part: Path) -> np.ndarray:
    """Which tokens of a part are scored: where it has no mask, all after the prompts."""
    with np.load(part) as found:
        if "scored" in found:
            return found["scored"]
        length = found["length"]
        place = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
        return place >= np.repeat(found["prompt_length"], length)


def _loaded(folder: Path) -> tuple[Tokens, TokenizeReport]:
    facts = read_json(folder / FACTS, "description of tokens")
    report = TokenizeReport(**facts["report"])
    if not facts["rows"] and facts["kind"] == TokenizedRows.__name__:
        raise UserError(f"no records to tokenise: {report.summary()}")
    if not facts["rows"]:
        raise UserError(f"no pair is left of {report.records}: {report.summary()}")
    flat = np.memmap(folder / FLAT, np.int32, "r").view(np.ndarray)
    offsets = _mapped(folder / "offsets.npy")
    if facts["kind"] == TokenizedTexts.__name__:
        return TokenizedTexts(flat=flat, offsets=offsets, characters=facts["characters"]), report
    rows = TokenizedRows(
        flat=flat,
        offsets=offsets,
        prompt_length=_mapped(folder / "prompt_length.npy"),
        record_index=_mapped(folder / "record_index.npy"),
        largest=facts["largest"],
        scored=np.memmap(folder / SCORED, bool, "r").view(np.ndarray) if facts["masked"] else None,
    )
    if facts["kind"] == TokenizedRows.__name__:
        return rows, report
    return TokenizedPairs(rows=rows, common=_mapped(folder / "common.npy")), report


def _mapped(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r").view(np.ndarray)
