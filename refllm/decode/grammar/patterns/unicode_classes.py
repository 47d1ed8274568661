"""Sets of characters as disjoint ascending intervals: set algebra, ``\\w``, ``\\p{…}``, ``(?i)``.

==========  ==========================  ==============================  =====================
dialect     ``\\d``, ``\\w``              ``\\s``                           ``.`` is not
==========  ==========================  ==============================  =====================
``ecma``    ASCII (ECMA 262, u flag)    white space and line ends       LF CR U+2028 U+2029
``python``  Unicode (``re`` on str)     ``str.isspace``                 LF
``re2``     ASCII                       tab, LF, FF, CR, space          LF
==========  ==========================  ==============================  =====================

Categories come from ``unicodedata``, of the Unicode version that Python was built with.

**Left out**: scripts and binary properties (``\\p{Script=Greek}``, ``\\p{Alphabetic}``), which
``unicodedata`` does not have.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np

from refllm.decode.grammar.automata.alphabet import CHARACTERS, SURROGATES, Interval

Set = tuple[Interval, ...]  # disjoint intervals in ascending order, none touching the next

# --- set algebra --------------------------------------------------------------------------


def joined(intervals: Iterable[Interval]) -> Set:
    """The union of intervals in any order."""
    result: list[Interval] = []
    for low, high in sorted(intervals):
        if result and low <= result[-1][1] + 1:
            if high > result[-1][1]:
                result[-1] = (result[-1][0], high)
        else:
            result.append((low, high))
    return tuple(result)


def gaps(intervals: Sequence[Interval], size: int = CHARACTERS) -> Set:
    """The symbols 0 … size-1 that are in none of the ascending intervals."""
    result = []
    next_ = 0
    for low, high in intervals:
        if low > next_:
            result.append((next_, low - 1))
        next_ = high + 1
    if next_ < size:
        result.append((next_, size - 1))
    return tuple(result)


def without(intervals: Sequence[Interval], others: Sequence[Interval]) -> Set:
    """The symbols of the first set that are not in the second."""
    return gaps(joined([*gaps(intervals), *others]))


def negated(intervals: Sequence[Interval]) -> Set:
    """All characters (surrogates are none) outside of the ascending intervals."""
    return gaps(joined([*intervals, SURROGATES]))


def chars(text: str) -> Set:
    """The characters of a text."""
    return joined((ord(character), ord(character)) for character in text)


ANY = negated(())

# --- escapes and the dot ------------------------------------------------------------------

_ASCII_DIGIT = joined([(0x30, 0x39)])
_ASCII_WORD = joined([(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)])
_COMMON_SPACE = "\t\n\v\f\r \u00a0\u1680\u2028\u2029\u202f\u205f\u3000"
_SPACES = {
    "ecma": joined([*chars(_COMMON_SPACE + "\ufeff"), (0x2000, 0x200A)]),
    "python": joined([*chars(_COMMON_SPACE + "\x85"), (0x1C, 0x1F), (0x2000, 0x200A)]),
    "re2": chars("\t\n\f\r "),
}


def escape_set(letter: str, dialect: str) -> Set:
    """The characters of ``\\d``, ``\\w`` or ``\\s`` in a dialect (the module's table)."""
    if letter == "d":
        return (category("Nd") or ()) if dialect == "python" else _ASCII_DIGIT
    if letter == "w":
        return _python_word() if dialect == "python" else _ASCII_WORD
    return _SPACES[dialect]


@cache
def dot_set(dialect: str) -> Set:
    """The characters of ``.`` without the s flag."""
    return negated(chars("\n\r\u2028\u2029" if dialect == "ecma" else "\n"))


@cache
def _python_word() -> Set:
    """What ``re`` takes for a word character: ``str.isalnum`` or the underscore."""
    flags = np.fromiter(
        (chr(code).isalnum() for code in range(CHARACTERS)), dtype=bool, count=CHARACTERS
    )
    return joined([*_runs(flags), (0x5F, 0x5F)])


# --- categories ---------------------------------------------------------------------------

_LONG_NAMES = {
    "Letter": "L", "Cased_Letter": "LC", "Uppercase_Letter": "Lu", "Lowercase_Letter": "Ll",
    "Titlecase_Letter": "Lt", "Modifier_Letter": "Lm", "Other_Letter": "Lo",
    "Mark": "M", "Combining_Mark": "M", "Nonspacing_Mark": "Mn", "Spacing_Mark": "Mc",
    "Enclosing_Mark": "Me", "Number": "N", "Decimal_Number": "Nd", "digit": "Nd",
    "Letter_Number": "Nl", "Other_Number": "No", "Punctuation": "P", "punct": "P",
    "Connector_Punctuation": "Pc", "Dash_Punctuation": "Pd", "Open_Punctuation": "Ps",
    "Close_Punctuation": "Pe", "Initial_Punctuation": "Pi", "Final_Punctuation": "Pf",
    "Other_Punctuation": "Po", "Symbol": "S", "Math_Symbol": "Sm", "Currency_Symbol": "Sc",
    "Modifier_Symbol": "Sk", "Other_Symbol": "So", "Separator": "Z", "Space_Separator": "Zs",
    "Line_Separator": "Zl", "Paragraph_Separator": "Zp", "Other": "C", "Control": "Cc",
    "cntrl": "Cc", "Format": "Cf", "Private_Use": "Co", "Unassigned": "Cn",
}  # fmt: skip
_CASED = ("Lu", "Ll", "Lt")


def _runs(flags: np.ndarray) -> list[Interval]:
    """The intervals in which a bool[size] array is true."""
    changes = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])))).tolist()
    return [(low, end - 1) for low, end in zip(changes[::2], changes[1::2], strict=True)]


@cache
def _category_table() -> dict[str, Set]:
    """The code points of each two-letter category."""
    found = list(map(unicodedata.category, map(chr, range(CHARACTERS))))  # each looked up once
    numbers = {name: number for number, name in enumerate(sorted(set(found)))}
    codes = np.fromiter(map(numbers.__getitem__, found), dtype=np.uint8, count=CHARACTERS)
    return {name: joined(_runs(codes == number)) for name, number in numbers.items()}


@cache
def category(name: str) -> Set | None:
    """The characters of ``\\p{name}``: a general category, ``Any``, ``ASCII`` or ``Assigned``.

    A category is given as ``Lu``, ``L``, ``Uppercase_Letter``, ``gc=Lu`` or
    ``General_Category=Lu``. None for a name that is not known; surrogates are never included.
    """
    prefix, equals, value = name.partition("=")
    if equals:
        if prefix not in ("gc", "General_Category"):
            return None
        name = value
    elif name == "Any":
        return ANY
    elif name == "ASCII":
        return ((0, 0x7F),)
    elif name == "Assigned":
        return negated(_category_table()["Cn"])
    name = _LONG_NAMES.get(name, name)
    if name == "LC":
        return joined(pair for cased in _CASED for pair in _category_table()[cased])
    found = [
        pair
        for full, intervals in _category_table().items()
        if name in (full, full[0])
        for pair in intervals
    ]
    return without(joined(found), [SURROGATES]) if found else None


# --- case ---------------------------------------------------------------------------------


@cache
def _case_variants() -> dict[int, set[int]]:
    """For each character with case, all that differ from it by case alone, as ``re`` sees it."""
    groups: dict[int, set[int]] = {}
    by_upper: dict[str, int] = {}  # what becomes the same several letters, as ﬅ and ﬆ do
    cased = [
        code
        for name in ("LC", "Nl", "So")
        for low, high in category(name) or ()
        for code in range(low, high + 1)
    ]
    cased.append(0x0345)  # the combining iota, the one mark with an upper case
    for code in cased:
        character = chr(code)
        others = [character.lower()[0], character.upper(), character.title()]
        if len(character.upper()) > 1:
            others.append(chr(by_upper.setdefault(character.upper(), code)))
        for other in others:
            if len(other) == 1 and other != character:
                group = groups.get(code, {code}) | groups.get(ord(other), {ord(other)})
                for member in group:
                    groups[member] = group
    return groups


def any_case(intervals: Sequence[Interval]) -> Set:
    """A set with every character that differs from one of its members by case alone."""
    extra = [
        (variant, variant)
        for low, high in intervals
        for code in _cased_between(low, high)
        for variant in _case_variants()[code]
    ]
    return joined([*intervals, *extra])


def _cased_between(low: int, high: int) -> Iterable[int]:
    if high - low < 64:
        return (code for code in range(low, high + 1) if code in _case_variants())
    return (code for code in _case_variants() if low <= code <= high)
