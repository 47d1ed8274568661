r"""How text is split into words before byte-level BPE, by llama.cpp's names.

A GGUF file carries no regular expression, only the *name* of one (tokenizer.ggml.pre). A rule
is a sequence of expressions: the first isolates its matches in the whole text, the second in
each piece that the first left, and so on. So ``smollm`` is "every digit alone, then GPT-2's
words", which is not GPT-2's expression with ``\p{N}|`` in front of it.

A name says more than the rule: whether a word that is a token is taken before any merge
(``ignore_merges``), and whether a text begins with the BOS token where the file does not say
(``add_bos``).

The rules are llama.cpp's, not those of the models' own tokenizer.json where the two differ:
``tekken`` knows the case of ASCII letters only and no marks, ``deepseek-llm`` the cased
letters of one version of Unicode. A GGUF file means what llama.cpp reads in it.

Source: llama.cpp, src/llama-vocab.cpp (names, expressions, flags) and src/unicode.cpp (how
they are applied).

Left out: names of rules that are no sequence of expressions over byte-level BPE (kimi-k2,
afmoe, tiny_aya, superbpe, gemma4), and those of encoders.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from tokenizers import Regex, pre_tokenizers

__all__ = ["NAMES", "PUBLISHED", "RULES", "PreTokenizer", "split"]

# --- expressions ----------------------------------------------------------------------------

# White space: up to its last line break; all but the space before the next word; the rest
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# ASCII letters of either case: with (?i:…) the expression would take "ſ" for an "s"
_CONTRACTION = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}{{1,3}}|{_PUNCTUATION}|{_SPACE}"
_QWEN2 = rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}|{_PUNCTUATION}|{_SPACE}"
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACE}"
)
# Words in which no ASCII capital follows an ASCII small letter
_UPPER = r"[\p{L}&&[^a-z]]"
_LOWER = r"[\p{L}&&[^A-Z]]"
_CAMEL_1 = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
_CAMEL_2 = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_CAMEL_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_CAMEL_1}|{_CAMEL_2}|\p{{N}}|{_CAMEL_PUNCTUATION}|{_SPACE}"
_GPT4O = (
    rf"{_CAMEL_1}(?:{_CONTRACTION})?|{_CAMEL_2}(?:{_CONTRACTION})?|\p{{N}}{{1,3}}"
    rf"|{_CAMEL_PUNCTUATION}|{_SPACE}"
)
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACE}"
)
_SEED = rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACE}"
_VIKING = r" ?[^(\s|.,!?…。，、।۔،)]+"
# The letters of "deepseek-llm": those with a case, as an early version of Unicode had them
_CASED = """
    41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386
    388-38A 38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA
    1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57
    1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB
    1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D
    212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3
    A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A
    FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF
    1E900-1E943
"""
_CJK = r"[\x{0800}-\x{9FA5}\x{AC00}-\x{D7FF}&&\S]+"
_SIGNS = r"[!-/:-~！-／：-～‘-‟、。]"  # no U+3000: it is white space


def _character_class(ranges: str) -> str:
    """A class of characters from hexadecimal ranges: "41-5A" is the capitals."""
    ends = [one.split("-") for one in ranges.split()]
    return "[" + "".join("-".join(rf"\x{{{code}}}" for code in pair) for pair in ends) + "]"


_EXPRESSIONS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "qwen35": (_QWEN35,),
    "smollm": (r"\p{N}", _GPT2),
    "tekken": (_TEKKEN,),
    "gpt-4o": (_GPT4O,),
    "deepseek-llm": (
        r"[\r\n]",
        rf"\s?{_character_class(_CASED)}+",
        rf"\s?{_SIGNS}+",
        r"\s+\z",
        _CJK,
        r"\p{N}+",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"),
    "deepseek-v3": (r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3),
    "default": (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "falcon": (r"[\p{P}$+<=>^~|`]+", _GPT2, r"[0-9][0-9][0-9]"),
    "seed-coder": (_SEED,),
    "viking": (_VIKING, r"\p{N}"),
    "poro-chat": (_VIKING,),
    "minicpm5": (r"\p{N}{1,3}", _LLAMA3.replace("{1,3}", "+")),
}

# Characters of Unicode 16, which ``tokenizers`` knows and llama.cpp's tables do not
_UNICODE_16 = """
    897 1B4E-1B4F 1B7F 1C89-1C8A 2427-2429 31E4-31E5 A7CB-A7CD A7DA-A7DC 105C0-105FF 10D40-10D8F
    10EC2-10EC4 10EFC 11380-113FF 116D0-116FF 11BC0-11BFF 11F5A 13460-143FF 16100-1613F
    16D40-16D7F 18CFF 1CC00-1CEBF 1E5D0-1E5FF 1F8B2-1F8BB 1F8C0-1F8C1 1FA89 1FA8F 1FABE 1FAC6
    1FADC 1FADF 1FAE9 1FBCB-1FBEF
"""


def _without_unicode_16(pattern: str) -> str:
    """An expression whose categories, such as ``L``, hold no character of ``_UNICODE_16``."""
    later = _character_class(_UNICODE_16).replace("[", "[^", 1)
    # a function, for the class holds backslashes
    return re.sub(r"\\p\{[LNPMS]\}", lambda found: f"[{found[0]}&&{later}]", pattern)


RULES = {name: tuple(map(_without_unicode_16, patterns)) for name, patterns in _EXPRESSIONS.items()}

# Rules of published tokenizers that llama.cpp's converter gives these names, and that differ
# from its rules: in "ſ" after an apostrophe alone, or (tekken, gpt-4o, deepseek) in more
_ANY_CASE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TITLE = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SMALL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_WIDE_CJK = r"[\x{0800}-\x{9FA5}\x{AC00}-\x{D7FF}]+"
_WIDE_SIGNS = r"\s?[!-/:-~！-／：-～‘-‟　-。]+"

PUBLISHED: dict[str, tuple[tuple[str, ...], ...]] = {
    "llama-bpe": ((_LLAMA3.replace(_CONTRACTION, _ANY_CASE),),),
    "qwen2": ((_QWEN2.replace(_CONTRACTION, _ANY_CASE),),),
    "qwen35": ((_QWEN35.replace(_CONTRACTION, _ANY_CASE),),),
    "seed-coder": ((_SEED.replace(_CONTRACTION, _ANY_CASE),),),
    "tekken": (
        (
            rf"{_BEFORE}{_TITLE}*{_SMALL}+|{_BEFORE}{_TITLE}+{_SMALL}*|\p{{N}}"
            rf"|{_CAMEL_PUNCTUATION}|{_SPACE}",
        ),
    ),
    "gpt-4o": (
        (
            rf"{_BEFORE}{_TITLE}*{_SMALL}+{_ANY_CASE}?|{_BEFORE}{_TITLE}+{_SMALL}*{_ANY_CASE}?"
            rf"|\p{{N}}{{1,3}}|{_CAMEL_PUNCTUATION}|{_SPACE}",
        ),
    ),
    "deepseek-llm": (
        (
            r"[\r\n]",
            rf"\s?{_character_class(_CASED)}+",
            _WIDE_SIGNS,
            r"\s+$",
            _WIDE_CJK,
            r"\p{N}",
        ),
    ),
    "deepseek-coder": ((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _WIDE_CJK, r"\p{N}"),),
}


@dataclass(frozen=True)
class PreTokenizer:
    """What a name means: a key of ``RULES``, and two defaults of the tokenizer."""

    rule: str
    ignore_merges: bool = False
    add_bos: bool = False


def _named(names: str, rule: str, **flags: bool) -> dict[str, PreTokenizer]:
    """Several names of one rule."""
    return dict.fromkeys(names.split(), PreTokenizer(rule, **flags))


NAMES: dict[str, PreTokenizer] = {
    **_named("default", "default"),
    **_named("gpt-2 phi-2 mellum exaone4 a.x-4.0 gigachat modern-bert jina-es jina-de", "gpt-2"),
    **_named("jina-v2-es jina-v2-de mpt olmo jais trillion granite-docling", "gpt-2"),
    **_named("llama-bpe llama3 llama-v3", "llama-bpe", ignore_merges=True, add_bos=True),
    **_named("falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano", "llama-bpe",
             ignore_merges=True, add_bos=True),
    **_named("smaug-bpe dbrx chatglm-bpe", "llama-bpe"),
    **_named("glm4 glm5", "llama-bpe", ignore_merges=True),
    **_named("qwen2 deepseek-r1-qwen megrez kormo f2llmv2", "qwen2"),
    **_named("stablelm2 hunyuan solar-open grok-2 bailingmoe bailingmoe2 llada-moe", "qwen2"),
    **_named("qwen35", "qwen35"),
    **_named("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", "smollm"),
    **_named("tekken", "tekken", ignore_merges=True, add_bos=True),
    **_named("gpt-4o llama4 kanana2 talkie minimax-m2", "gpt-4o"),
    **_named("deepseek-llm", "deepseek-llm"),
    **_named("deepseek-coder", "deepseek-coder"),
    **_named("deepseek-v3 hunyuan-dense joyai-llm hy_v4", "deepseek-v3"),
    **_named("falcon", "falcon"),
    **_named("seed-coder", "seed-coder"),
    **_named("viking", "viking"),
    **_named("poro-chat bloom gpt3-finnish", "poro-chat"),
    **_named("minicpm5", "minicpm5", ignore_merges=True),
}  # fmt: skip


def split(patterns: Iterable[str]) -> list[pre_tokenizers.PreTokenizer]:
    """The steps of a rule, each isolating the matches of one expression.

    >>> first, second = split(RULES["smollm"])
    >>> words = pre_tokenizers.Sequence([first, second])
    >>> [word for word, _ in words.pre_tokenize_str("in 12 days")]
    ['in', ' ', '1', '2', ' days']
    """
    return [_isolating(pattern) for pattern in patterns]


@cache
def _isolating(pattern: str) -> pre_tokenizers.PreTokenizer:
    """One step; the expression is compiled once."""
    return pre_tokenizers.Split(Regex(pattern), "isolated")
