"""docs/structured_output.md names every keyword, argument and shipped grammar, and real tests."""

from __future__ import annotations

import inspect
import re

from conftest import ROOT
from refllm.decode.grammar import compile
from refllm.decode.grammar.json_schema import schema_dialects
from refllm.decode.grammar.rule_grammars.shipped import names

PAGE = (ROOT / "docs" / "structured_output.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)))
TESTS = {
    name
    for path in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
}


def test_every_keyword_of_a_dialect_has_a_row():
    keywords = set().union(*(each.keywords for each in schema_dialects.DIALECTS.values()))
    assert keywords <= NAMED


def test_every_argument_of_compile_is_described():
    arguments = set(inspect.signature(compile).parameters) - {"tokenizer", "end_tokens"}
    assert all(re.search(rf"`{name}=", PAGE) for name in arguments)


def test_every_shipped_grammar_is_named():
    assert set(names()) <= NAMED


def test_every_row_names_a_test_that_exists():
    rows = re.findall(r"^\|.*\|$", PAGE, re.MULTILINE)
    rules = [n for n, row in enumerate(rows) if set(row) <= set("|- ")]
    heads = {n - 1 for n in rules}
    bodies = [row for n, row in enumerate(rows) if n not in heads and n not in rules]
    assert all(re.search(r"`test_\w+`", row) for row in bodies)
    assert set(re.findall(r"`(test_\w+)`", PAGE)) <= TESTS


def test_every_link_leads_to_a_file():
    links = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert links
    assert all((ROOT / "docs" / link).exists() for link in links)
