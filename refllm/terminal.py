"""How results look in a terminal and in a pipe: plain tables, colour on terminals only, no
stray control codes.

Text of models and users is never read as markup. A table fits into 80 columns: its first
column is wrapped between words, and the others are never cut. In a pipe a table is as wide
as its contents, so that every row is one line.

| function                      | prints                                                    |
|-------------------------------|-----------------------------------------------------------|
| ``table``, ``pairs``          | results, to the console that they are given                |
| ``note``                      | one line about the run, to stderr                          |
| ``progress``, ``counted_bar`` | bars on stderr; nothing where stderr is no terminal        |
| ``emit``                      | generated text, to stdout, at once                         |

Left out: command-line options (``cli.options``).
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn
    from rich.table import Table

PIPE_WIDTH = 10_000  # columns: tables and pairs stay on one line each
PROSE_WIDTH = 80  # columns of prose in a pipe
TABLE_WIDTH = 80  # columns that tables are laid out for; a narrower terminal wraps lines itself

Advance = Callable[[int, int], None]  # (done, total)


def console(*, stderr: bool = False, prose: bool = False) -> Console:
    """A console that prints text as it is, and on a terminal adds colour and line breaks.

    ``prose`` breaks lines at 80 columns in a pipe too.
    """
    from rich.console import Console

    made = Console(
        file=sys.stderr if stderr else sys.stdout, highlight=False, markup=False, emoji=False
    )
    if not made.is_terminal:
        made.width = PROSE_WIDTH if prose else PIPE_WIDTH
    elif not stderr:
        made.width = max(made.width, TABLE_WIDTH)
    return made


def table(*heads: str) -> Table:
    """A table without a frame: names on the left, numbers on the right.

    The first column is wrapped between words (a longer word is folded); no other is wrapped.
    """
    from rich import box
    from rich.table import Table

    made = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        pad_edge=False,
        header_style="dim",
        border_style="dim",
    )
    made.add_column(heads[0], overflow="fold")
    for head in heads[1:]:
        made.add_column(head, justify="right", no_wrap=True)
    return made


def pairs(out: Console, lines: dict[str, str]) -> None:
    """One line per item, its name on the left; on a terminal long text is wrapped in its
    own column.
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


def note(text: str) -> None:
    """Print one line about the run to stderr, dim on a terminal."""
    console(stderr=True).print(text, style="dim")


def emit(text: str) -> None:
    """Write text to stdout at once; on a terminal made printable, in a pipe unchanged."""
    if sys.stdout.isatty():
        text = printable(text)
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def progress(label: str) -> Iterator[Advance]:
    """Show a bar on stderr while the block runs; yields the function that moves it.

    Where stderr is no terminal there is no bar, and the function does nothing.
    """
    err = console(stderr=True)
    if not err.is_terminal:
        yield lambda done, total: None
        return
    from rich.progress import Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        _bar_column(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def counted_bar(*extra: ProgressColumn) -> Progress:
    """A bar on stderr with a count and the remaining time; rows can be printed above it.

    ``extra`` columns stand before the remaining time. Disabled where stderr is no terminal.
    """
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    err = console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        _bar_column(),
        MofNCompleteColumn(),
        *extra,
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)


def _bar_column() -> BarColumn:
    """The bar itself, in one quiet colour."""
    from rich.progress import BarColumn

    return BarColumn(30, complete_style="cyan", finished_style="cyan", pulse_style="cyan")


def printable(text: str) -> str:
    r"""``text`` with control characters written as escapes, so that none of them steers the
    terminal.

    Line breaks and tabs stay; marks that reverse the direction of writing count as control
    characters.

    >>> print(printable("a\x1b[31mb"))
    a\x1b[31mb
    """
    kept = (
        c if c in "\n\t" or c.isprintable() or unicodedata.category(c) == "Zs" else repr(c)[1:-1]
        for c in text
    )
    return "".join(kept)


def format_bytes(count: float) -> str:
    """A size in decimal units, with three digits.

    >>> format_bytes(999), format_bytes(8_397_272)
    ('999 B', '8.4 MB')
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    if unit == "B":
        return f"{count:.0f} {unit}"
    return f"{count:.3g} {unit}"
