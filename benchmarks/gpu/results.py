"""Results as they come: one JSON line for each part, and a Markdown table of them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.checks import failures
from benchmarks.machine import figure, table
from jaxalign.errors import UserError
from jaxalign.files import write_json_lines

FILE = "results.jsonl"
FIRST = "facts"
CHECKS = "checks"
AIMS = (
    ("dpo", "jaxalign", "mfu", 0.5, "MFU of the DPO step"),
    ("watched", "watched", "ratio", 1.1, "seconds of the watched step to the plain one"),
)
TIMES_TRL = 1.3


class Results:
    """The lines of an output folder."""

    def __init__(self, folder: Path, facts: Mapping[str, Any]):
        """Begin a folder, or go on with one of the same size and card.

        Args:
          folder: of the output.
          facts: about the machine and what is measured there.

        Raises:
          UserError: the folder has results of another size or card.
        """
        self.file = folder / FILE
        self.lines = read(folder) if self.file.exists() else []
        if not self.lines:
            folder.mkdir(parents=True, exist_ok=True)
            self._write([{"part": FIRST, "result": dict(facts)}])
        before = self.lines[0]["result"]
        for name in ("size", "gpu"):
            if before[name] != facts[name]:
                raise UserError(
                    f"{folder}: has results of {name} {before[name]}, and this is {facts[name]}; "
                    "set another --output"
                )

    def add(self, part: str, seconds: float, **result: Any) -> None:
        """Write a part's result or error, in place of an earlier one."""
        others = [line for line in self.lines if line["part"] != part]
        self._write([*others, {"part": part, "part_seconds": round(seconds, 1), **result}])

    def result(self, part: str) -> dict[str, Any] | None:
        """The result of a part; None: there is none, or it failed."""
        return next((x["result"] for x in self.lines if x["part"] == part and "result" in x), None)

    def failed(self, part: str) -> bool:
        """Whether a part was tried in vain."""
        return any(x["part"] == part and "error" in x for x in self.lines)

    def _write(self, lines: list[dict[str, Any]]) -> None:
        write_json_lines(self.file, lines)
        self.lines = lines


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of an output folder.

    Raises:
      UserError: it has none.
    """
    file = folder / FILE
    if not file.exists():
        raise UserError(f"{file}: no such file; set --output to the folder of an earlier call")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def report(lines: Sequence[Mapping[str, Any]], notes: Mapping[str, str]) -> str:
    """The results as Markdown: the machine, failed checks, the table, the aims.

    Args:
      lines: of the results.
      notes: name of each part, in order -> what to say if it has no line.
    """
    by_name = {line["part"]: line for line in lines}
    facts = by_name[FIRST]["result"]
    checks = by_name.get(CHECKS, {}).get("result") or {}
    device = checks.get("device", {})
    text = (
        f"{facts['gpu'] or facts['cpu']}, driver {facts['driver'] or 'none'}, "
        f"jax {device.get('jax', 'unknown')} on {device.get('platform', 'unknown')}, "
        f"size {facts['size']}, {facts['time']}"
    )
    rows = [row for name in notes for row in _rows(name, by_name.get(name), notes[name])]
    header = ["part", "way", "ms a step", "tokens/s", "MFU", "peak GB", "to the first", "note"]
    return "\n".join(
        [text, "", *validity(by_name.get(CHECKS)), "", table(header, rows), "", *aims(by_name)]
    )


def validity(line: Mapping[str, Any] | None) -> list[str]:
    """What the checks say of the results; the failed ones by name."""
    if line is None or not line.get("result", {"checks": True})["checks"]:
        return ["NOT VALID: nothing has been checked on this device."]
    if "error" in line:
        return [f"NOT VALID: the checks could not run: {line['error']}"]
    checks = line["result"]["checks"]
    failed = failures(checks)
    if failed:
        count = f"{len(failed)} of {len(checks)} checks failed on this device:"
        return [f"NOT VALID: {count}", *(f"- {one}" for one in failed)]
    return [f"{len(checks)} checks of this device against float32 values of a CPU passed."]


def _rows(name: str, line: Mapping[str, Any] | None, without: str) -> list[list[Any]]:
    if line is None or "error" in line:
        note = without if line is None else f"failed: {line['error']}"
        return [[name, *[None] * 6, note]]
    rows = []
    for way, row in line["result"].items():
        seconds, peak = row.get("seconds"), row.get("peak_bytes")
        rows.append(
            [
                name,
                way,
                figure(None if seconds is None else 1000 * seconds, 1),
                figure(row.get("tokens_per_second"), 0),
                figure(row.get("mfu")),
                figure(None if peak is None else peak / 1e9, 1),
                figure(row.get("ratio")),
                row.get("note"),
            ]
        )
    return rows


def aims(by_name: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Each aim with what was measured of it."""
    lines = []
    for part, way, field, bound, what in AIMS:
        value = _value(by_name, part, way, field)
        met = value is not None and (value >= bound if field == "mfu" else value <= bound)
        lines.append(_aim(what, value, "at least" if field == "mfu" else "at most", bound, met))
    own = _value(by_name, "dpo", "jaxalign", "tokens_per_second")
    trl = _value(by_name, "dpo, TRL", "TRL", "tokens_per_second")
    times = own / trl if own and trl else None
    met = times is not None and times >= TIMES_TRL
    return [*lines, _aim("tokens/s of DPO to TRL's", times, "at least", TIMES_TRL, met)]


def _value(
    by_name: Mapping[str, Mapping[str, Any]], part: str, way: str, field: str
) -> float | None:
    return by_name.get(part, {}).get("result", {}).get(way, {}).get(field)


def _aim(what: str, value: float | None, side: str, bound: float, met: bool) -> str:
    verdict = "not measured" if value is None else f"{value:.3f}, {'met' if met else 'NOT met'}"
    return f"- {what}, {side} {bound}: {verdict}"
