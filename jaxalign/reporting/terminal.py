"""Tables in the terminal."""

from collections.abc import Sequence


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The table in the terminal; in several tables below one another where it is too wide."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for columns in fitting(header, rows, console.width):
        table = Table()
        for at, width in widths(header, rows, columns, console.width).items():
            # folded: a name cut off at "llmbar/Adve…" says little
            justify = "right" if at else "left"
            table.add_column(header[at], justify=justify, overflow="fold", width=width)
        for row in rows:
            table.add_row(*(row[at] for at in columns))
        console.print(table)


def fitting(
    header: Sequence[str], rows: Sequence[Sequence[str]], width: int
) -> list[tuple[int, ...]]:
    """Columns of tables that break no number at this width; each begins with the first column.

    Args:
      header: names of the columns; long words in them and in the first column may be broken.
      rows: cells.
      width: characters of a line.
    """

    def needed(at: int) -> int:
        return 3 + _width(header, rows, at)  # its border and the spaces beside its text

    parts: list[tuple[int, ...]] = []
    used = width
    for at in range(1, len(header)):
        if used + needed(at) > width:
            parts.append((0,))
            used = 1 + needed(0)
        parts[-1] += (at,)
        used += needed(at)
    return parts or [(0,)]


def widths(
    header: Sequence[str], rows: Sequence[Sequence[str]], columns: Sequence[int], width: int
) -> dict[int, int]:
    """Column -> its characters: what it needs, and the rest of the line for the tallest cells.

    Args:
      header: names of the columns.
      rows: cells.
      columns: those of one table, as `fitting` gives them.
      width: characters of a line.
    """
    found = {at: _width(header, rows, at) for at in columns}
    whole = {at: max(len(row[at]) for row in (header, *rows)) for at in columns}
    for _ in range(width - 1 - sum(3 + one for one in found.values())):
        lines = {at: whole[at] / found[at] for at in columns}
        tallest = max(lines, key=lines.__getitem__)
        if lines[tallest] <= 1:
            break
        found[tallest] += 1
    return found


def _width(header: Sequence[str], rows: Sequence[Sequence[str]], at: int) -> int:
    """Characters that a column needs so that no word of its cells is broken."""
    longest = max((len(word) for row in rows for word in row[at].split()), default=0)
    own = max(map(len, header[at].split()), default=0)
    return min(max(longest, own), 16) if at == 0 else max(longest, min(own, 12))
