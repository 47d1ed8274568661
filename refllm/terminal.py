"""How results look in a terminal and in a pipe: plain tables, colour on terminals only, no
stray control codes.

Text of models and users is never read as markup. In a pipe a table is as wide as its
contents, so that a line of output stays a line.

Left out: command-line options (``cli.options``).
"""

from __future__ import annotations

import sys
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDE = 10_000  # columns of a pipe
NARROW = 72  # columns that the numbers of a table need: a narrower terminal breaks the lines itself


def console(*, stderr: bool = False) -> Console:
    """A console that adds nothing to what it is given except, on a terminal, colour and
    line breaks.
    """
    from rich.console import Console

    made = Console(
        file=sys.stderr if stderr else sys.stdout, highlight=False, markup=False, emoji=False
    )
    if not made.is_terminal:
        made.width = WIDE
    elif not stderr:
        made.width = max(made.width, NARROW)
    return made


def table(*columns: str) -> Table:
    """A table without a frame: names to the left, numbers to the right. A long name is
    folded, a number never cut.
    """
    from rich import box
    from rich.table import Table

    made = Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim", border_style="dim"
    )
    for i, name in enumerate(columns):
        made.add_column(name, justify="left" if i == 0 else "right", no_wrap=i > 0, overflow="fold")
    return made


def pairs(out: Console, lines: dict[str, str]) -> None:
    """Names on the left, what they are on the right; long text is wrapped under itself on a
    terminal.
    """
    from rich.table import Table

    if not out.is_terminal:
        width = max(map(len, lines), default=0)
        for name, text in lines.items():
            out.print(f"{name:{width}}  {text}")
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in lines.items():
        grid.add_row(name, text)
    out.print(grid)


def printable(text: str) -> str:
    """``text`` with control characters written out as escapes, so that none of them steers
    the terminal.

    Line breaks and tabs stay; marks that reverse the direction of writing count as control
    characters.
    """
    kept = (
        c if c in "\n\t" or c.isprintable() or unicodedata.category(c) == "Zs" else repr(c)[1:-1]
        for c in text
    )
    return "".join(kept)


def bytes_text(count: float) -> str:
    """Decimal units, three digits: 8390000 → ``"8.39 MB"``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    if unit == "B":
        return f"{count:.0f} {unit}"
    return f"{count:.3g} {unit}"
