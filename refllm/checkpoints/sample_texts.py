"""Texts on which ways of splitting words disagree, to compare two tokenizers.

No finite sample proves two rules equal; this one holds each kind of character that the rules of
published tokenizers tell apart, beside each other kind, in runs of different lengths. Left out
is "ſ" after an apostrophe, which published expressions take for an "s" and llama.cpp's do not.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

__all__ = ["sample_texts"]

_FRAGMENTS = [
    # digits and other numbers, in runs
    "7", "42", "123", "2024", "12345", "1234567", "3.14", "٣٤٥", "५", "½", "²", "Ⅷ",
    # apostrophes
    "'s", "'T", "'re", "'VE", "'ll", "'d", "it's", "WE'RE", "'x", "'", "’s",
    # white space and line breaks, in runs
    " ", "  ", "    ", "\t", "\n", "\n\n", "\r\n", " \n ", "\u00a0", "\u3000", ";\n", ".\n\n",
    "/\n",
    # letters of either case, of scripts without case, with marks
    "a", "the", "Hello", "WORLD", "camelCase", "HTTPServer", "über", "ÉCOLE", "ÉTÉé", "Straße",
    "e\u0301", "Ελλάς", "Привет", "МИРмир", "שלום", "مرحبا", "नमस्ते", "สวัสดี", "ʰ",
    "ǅ", "中文", "漢字かな", "カタカナ", "한국어", "ﬁ", "𝒳",
    # punctuation and symbols
    ".", ",", "!", "?!", "...", "-", "_", "(x)", "{}", "//", "==", "<=", "->", "#", "$", "€", "+",
    "~", "`", "^", "|", "«»", "。", "，", "…", "‘x’", "@", "&", "*", "def f(x):",
    "https://a.org/b?c=1",
    # emoji, private use, control characters
    "😀", "👩‍💻", "👍🏽", "\ue000", "\x00", "\x06", "\x1c", "\u200b",
]  # fmt: skip


def sample_texts(count: int, seed: int, more: Sequence[str] = ()) -> list[str]:
    """``count`` texts, the simplest first: every fragment alone, then fragments joined at
    random, half of them with spaces. ``more`` are further fragments. The same arguments give
    the same texts.

    >>> sample_texts(3, seed=0)
    ['7', '42', '123']
    """
    rng = random.Random(seed)
    fragments = [*_FRAGMENTS, *more]
    texts = fragments[:count]
    while len(texts) < count:
        between = rng.choice(["", " "])
        texts.append(between.join(rng.choices(fragments, k=rng.randint(2, 8))))
    return texts
