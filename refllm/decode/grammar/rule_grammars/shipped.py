"""The grammars that come with the package, by name.

| name                | its texts                                             | syntax |
|---------------------|-------------------------------------------------------|--------|
| `json`              | one JSON value                                        | GBNF   |
| `arithmetic`        | lines of arithmetic and their results                 | GBNF   |
| `list`              | lines that begin with a dash                          | GBNF   |
| `chess`             | a game of chess in algebraic notation                 | GBNF   |
| `sql_select`        | one SELECT statement, a subset of SQLite's            | Lark   |
| `python_expression` | one expression of Python, a subset                    | Lark   |

Their texts are made to be read by ``json.loads``, SQLite and ``ast.parse``. A text is deep where a
model nests deeply: parsers have limits that a context-free grammar cannot count.
"""

from __future__ import annotations

from pathlib import Path

from refllm.decode.grammar.errors import GrammarError
from refllm.errors import alternatives

FOLDER = Path(__file__).parent / "grammars"


def names() -> list[str]:
    """The names of the grammars that come with the package."""
    return sorted(path.stem for path in FOLDER.iterdir() if path.suffix in (".gbnf", ".lark"))


def shipped(name: str) -> str:
    """The text of a grammar that comes with the package, for ``compile(ebnf=...)``.

    >>> print(shipped("list").splitlines()[0])
    # A list of one line per item, each after a dash.
    """
    for suffix in (".gbnf", ".lark"):
        path = FOLDER / f"{name}{suffix}"
        if path.name == f"{name}{suffix}" and path.is_file():
            return path.read_text(encoding="utf-8")
    raise GrammarError(f"grammar {name!r}: {alternatives(name, names())}")
