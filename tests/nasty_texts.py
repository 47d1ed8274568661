"""Texts on which tokenizers disagree: what splits words, what looks like a control token, and
characters of every kind.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

CONTROL_TOKENS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<unk>"]
FRAGMENTS = [
    # digits, ASCII and not
    "7", "42", "123", "2024", "1234567", "3.14", "1,000", "٣٤٥", "५", "½", "²³", "Ⅷ", "①",
    # apostrophes and contractions of either case
    "'s", "'T", "'re", "'VE", "'ll", "'lL", "'d", "'x", "it's", "WE'RE", "'", "’s", "''",
    # line breaks and runs of white space
    " ", "  ", "    ", "\t", "\n", "\n\n", "\r\n", "\r", " \n ", "\n  ", "\u00a0", "\u3000",
    "\u2028", "\u2003", "\x0b", "\x85", "\u200b",
    # letters: ASCII of either case, other scripts, modifier letters, marks
    "a", "the", "Hello", "WORLD", "camelCase", "HTTPServer", "iPhone", "über", "ÉCOLE", "Straße",
    "e\u0301", "a\u0308\u0323", "Ελλάς", "Привет", "мир", "שלום", "مرحبا", "नमस्ते", "สวัสดี", "ʰ", "ǅ",
    "中文", "漢字かな", "カタカナ", "한국어", "ﬁ", "𝒳", "𐐀", "İ", "ı",
    # punctuation, symbols, code
    ".", ",", "!", "?!", "...", "-", "--", "_", "(x)", "[1]", "{}", "//", "/* */", "==", "!=", "<=",
    "->", "#", "$", "€", "100%", "a/b", "@", "~", "`", "^", "|", "\\n", "«»", "。", "，", "…",
    ";\n", ".\n\n", "!\r\n", "*/\n/", "‘x’", "def f(x):", "return", "https://example.org/a?b=1",
    # emoji, joined and with modifiers; private use, unassigned and control characters
    "😀", "👩‍💻", "👍🏽", "🇩🇪", "\ufe0f", "\ue000", "\U000f0000", "\u0378", "\x00", "\x06",
    "\x1c", "\x7f",
]  # fmt: skip


def nasty_texts(count: int, seed: int, more: Sequence[str] = CONTROL_TOKENS) -> list[str]:
    """``count`` texts: fragments, joined at random with and without spaces, then random
    characters; ``more`` are further fragments.
    """
    rng = random.Random(seed)
    fragments = [*FRAGMENTS, *more]
    texts = []
    for i in range(count):
        if i % 5 == 4:
            texts.append("".join(_character(rng) for _ in range(rng.randint(1, 24))))
            continue
        between = "" if i % 2 else " "
        texts.append(between.join(rng.choices(fragments, k=rng.randint(1, 10))))
    return texts


def _character(rng: random.Random) -> str:
    """A character of one of the blocks that differ in kind."""
    start, end = rng.choice(
        [(0x20, 0x7F), (0, 0x250), (0x250, 0x3000), (0x3000, 0xD800), (0xE000, 0x20000)]
    )
    return chr(rng.randrange(start, end))
