"""JSON text between the values: brackets, separators with their whitespace, keys.

Texts are those that ``json.dumps(value, ensure_ascii=False)`` writes: with its default
separators (", " and ": "), compactly ("," and ":"), or with an indent: a newline and up to 64
spaces or 16 tabs before each key, item and closing bracket. Empty containers are ``{}`` and
``[]``. The bounds are there because a small model that may write whitespace tends to write
nothing else. Styles may be mixed within one text.

A separator and the key after it are one DFA, with one label per key: after a value a thread is
in the DFA for ``, "a":`` or ``, "b":`` or ``}``, and which of them are legal is the
terminal's set of allowed labels.

Labels: ``CLOSE`` is the closing bracket, ``ITEM`` the place before an item of an array; the
labels of keys are the caller's.

Left out: other escapes and other whitespace, which JSON allows and ``json.dumps`` never writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal, TypeAlias

from refllm.decode.grammar.automata.byte_table import ByteTable, byte_edges
from refllm.decode.grammar.automata.dfa import DFA

Whitespace: TypeAlias = Literal["default", "compact"]

CLOSE = 1
ITEM = 2
FREE_LABELS = 2  # labels of the caller are ``1 << FREE_LABELS`` and above

MOST_SPACES = 64
MOST_TABS = 16


def key_bytes(key: str) -> bytes | None:
    """The key as ``json.dumps`` writes it; None if it has no UTF-8 form (lone surrogates).

    >>> key_bytes('a"b')
    b'"a\\\\"b"'
    """
    try:
        return json.dumps(key, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return None


def key_dfa(
    opening: bool, named: Mapping[bytes, int], others: DFA | None, whitespace: Whitespace
) -> DFA:
    """What stands before a value of an object: ``{"key": `` if ``opening``, else ``, "key": ``.

    ``named`` has the quoted keys with their labels; a label 0 excludes the key. ``others`` is a
    DFA over bytes of further quoted keys with labels of its own; such a key ends at its closing
    quote (the caller compares it with the keys seen, then goes on with ``colon_dfa``), a named
    one after the colon. The closing bracket has the label ``CLOSE``.
    """
    table = ByteTable()
    closed = table.new_state(CLOSE)
    words = dict.fromkeys(named, 0)
    for word, label in named.items():
        if label:
            words[word + b":"] = label
            if whitespace == "default":
                words[word + b": "] = label
    after_quote = table.target(table.overlay(others, words), b'"')
    key = byte_edges(b'"', after_quote)
    close = byte_edges(b"}", closed)
    if opening:
        inside = table.new_state(edges=close | key)
        if whitespace == "default":
            table.connect(inside, byte_edges(b"\n", _indent(table, 0, key)))
        return table.dfa(table.new_state(edges=byte_edges(b"{", inside)))
    return table.dfa(_separator(table, 0, key, close, whitespace))


@lru_cache
def item_dfa(opening: bool, whitespace: Whitespace) -> DFA:
    """What stands before an item of an array: ``[`` if ``opening``, else ``, ``, with the label
    ``ITEM``; or the closing bracket, with the label ``CLOSE``.
    """
    table = ByteTable()
    closed = table.new_state(CLOSE)
    close = byte_edges(b"]", closed)
    if opening:
        inside = table.new_state(ITEM, close)
        if whitespace == "default":
            table.connect(inside, byte_edges(b"\n", _indent(table, ITEM, {})))
        return table.dfa(table.new_state(edges=byte_edges(b"[", inside)))
    return table.dfa(_separator(table, ITEM, {}, close, whitespace))


@lru_cache
def colon_dfa(whitespace: Whitespace) -> DFA:
    """A colon, and a space where whitespace is allowed, with the label 1."""
    table = ByteTable()
    colon = table.new_state(1)
    if whitespace == "default":
        table.connect(colon, byte_edges(b" ", table.new_state(1)))
    return table.dfa(table.new_state(edges=byte_edges(b":", colon)))


def _separator(
    table: ByteTable,
    label: int,
    following: Mapping[int, int],
    close: Mapping[int, int],
    whitespace: Whitespace,
) -> int:
    """The state after a value: a comma and whitespace, then ``label`` or the edges ``following``;
    or whitespace and the closing bracket.
    """
    start = table.new_state(edges=close)
    if whitespace == "default":
        table.connect(start, byte_edges(b"\n", _indent(table, 0, close)))
    if not label and not following:
        return start
    comma = table.new_state(label, following)
    if whitespace == "default":
        table.connect(comma, byte_edges(b" ", table.new_state(label, following)))
        table.connect(comma, byte_edges(b"\n", _indent(table, label, following)))
    table.connect(start, byte_edges(b",", comma))
    return start


def _indent(table: ByteTable, label: int, following: Mapping[int, int]) -> int:
    """The state after a newline: spaces or tabs up to their bounds; after each of them, and
    after none, ``label`` or the edges ``following``. 0 if there is neither.
    """
    if not label and not following:
        return 0
    first = table.new_state(label, following)
    for blank, most in ((b" ", MOST_SPACES), (b"\t", MOST_TABS)):
        state = first
        for _ in range(most):
            longer = table.new_state(label, following)
            table.connect(state, byte_edges(blank, longer))
            state = longer
    return first
