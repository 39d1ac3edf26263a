"""Tables in the terminal."""

from collections.abc import Sequence


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The table in the terminal; in several tables below one another where it is too wide."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for columns in fitting(header, rows, console.width):
        table = Table()
        for at in columns:  # folded: a name cut off at "llmbar/Adve…" says little
            table.add_column(
                header[at],
                justify="right" if at else "left",
                overflow="fold",
                min_width=_width(header, rows, at),
            )
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


def _width(header: Sequence[str], rows: Sequence[Sequence[str]], at: int) -> int:
    """Characters that a column needs so that no word of its cells is broken."""
    longest = max((len(word) for row in rows for word in row[at].split()), default=0)
    own = max(map(len, header[at].split()), default=0)
    return min(max(longest, own), 16) if at == 0 else max(longest, min(own, 12))
