"""Text, tables and sizes as the terminal shows them."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from refllm.terminal import TABLE_WIDTH, format_bytes, printable, table


@given(st.text())
def test_printable_text_steers_no_terminal(text):
    shown = printable(text)
    assert all(c in "\n\t" or (ord(c) >= 32 and not 127 <= ord(c) < 160) for c in shown)
    if all(c in "\n\t" or c.isprintable() for c in text):
        assert shown == text


@pytest.mark.parametrize("width", [TABLE_WIDTH, 100, 200])
def test_a_table_folds_names_and_never_cuts_a_number(width):
    shown = io.StringIO()
    name = "folder/" * 20 + "name.py"
    made = table("document", "tokens", "bytes", "bits/byte", "perplexity")
    made.add_row(name, "1,234,567", "12,345,678", "1.234", "123456.78")
    Console(file=shown, width=width).print(made)
    head, _, *rows = shown.getvalue().splitlines()
    assert head.split() == ["document", "tokens", "bytes", "bits/byte", "perplexity"]
    assert rows[0].split()[1:] == ["1,234,567", "12,345,678", "1.234", "123456.78"]
    assert "".join(row.split()[0] for row in rows) == name


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (8_397_272, "8.4 MB"),
        (999_600, "1 MB"),
        (5e15, "5e+03 TB"),
    ],
)
def test_sizes_have_three_digits(count, text):
    assert format_bytes(count) == text
