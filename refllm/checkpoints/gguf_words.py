"""Which of llama.cpp's pre-tokenizers splits text into words as a byte-level tokenizer does, found
by splitting sample texts with each.

A tokenizer.json describes a way of splitting, and equal ways have many descriptions: ``Digits``
before ``ByteLevel``, one ``Split``, several. A part that looks like a known rule says little,
since what stands before or after it changes the words. So each rule is tried on sample texts,
and a name is given only where every text becomes the same words.

Source: the names are llama.cpp's, see ``gguf_pre_tokenizers``.

Left out: a proof; two rules may differ on texts outside the sample.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer as _Tokenizer
from tokenizers import decoders, models, pre_tokenizers

from refllm.array_types import JsonView
from refllm.checkpoints.gguf_pre_tokenizers import NAMES, PUBLISHED, RULES, split
from refllm.checkpoints.sample_texts import sample_texts
from refllm.checkpoints.tensor_files import CheckpointError

__all__ = ["name_of_words"]

SAMPLE = 600  # texts that are compared
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def name_of_words(inner: _Tokenizer, model: JsonView) -> str:
    """llama.cpp's name for the words of a tokenizer; ``model`` is that of its tokenizer.json.

    Raises
    ------
    CheckpointError
        if no rule gives these words, or if the rule's name takes words that are tokens before
        any merge and the tokenizer does not, or the other way round.
    """
    texts = sample_texts(SAMPLE, seed=0)
    own = [_words(inner.pre_tokenizer, text) for text in texts]
    for rule, patterns in RULES.items():
        for variant in (patterns, *PUBLISHED.get(rule, ())):
            steps = pre_tokenizers.Sequence([*split(variant), _BYTES])
            if all(_words(steps, text) == words for text, words in zip(texts, own, strict=True)):
                return _name_of_rule(rule, inner, model)
    raise CheckpointError(_no_name(texts, own))


def _no_name(texts: Sequence[str], own: Sequence[list[str]]) -> str:
    """A sentence that shows a text, its words, and those of the nearest rule."""
    most = -1
    shown = ""
    for rule, patterns in RULES.items():
        steps = pre_tokenizers.Sequence([*split(patterns), _BYTES])
        theirs = [_words(steps, text) for text in texts]
        equal = sum(a == b for a, b in zip(theirs, own, strict=True))
        if equal > most:
            most = equal
            at = next(i for i, words in enumerate(theirs) if words != own[i])
            shown = (
                f"{texts[at]!r} becomes {_shown(own[at])}, and {_shown(theirs[at])} under the "
                f"nearest name, {_first_name(rule)!r}"
            )
    return (
        "convert: llama.cpp has no name for the way in which the tokenizer splits text into words: "
        f"{shown}"
    )


def _words(pre_tokenizer: pre_tokenizers.PreTokenizer | None, text: str) -> list[str]:
    """The words of a text, in the characters that stand for bytes."""
    if pre_tokenizer is None:
        return [text]
    return [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]


def _shown(words: Sequence[str]) -> str:
    """Words as text, for a message."""
    return " ".join(repr(decoders.ByteLevel().decode([word])) for word in words)


def _first_name(rule: str) -> str:
    """The usual name of a rule."""
    return next(name for name, meaning in NAMES.items() if meaning.rule == rule)


def _name_of_rule(rule: str, inner: _Tokenizer, model: JsonView) -> str:
    """The name of a rule that also says whether words that are tokens are taken whole."""
    whole = bool(model.get("ignore_merges"))
    for name, meaning in NAMES.items():
        if meaning.rule == rule and meaning.ignore_merges == whole:
            return name
    name = _first_name(rule)
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ", 1))
              for pair in model["merges"]]  # fmt: skip
    merging = models.BPE(vocab=model["vocab"], merges=merges)
    for token in model["vocab"]:
        if [part.value for part in merging.tokenize(token)] == [token]:
            continue
        text = decoders.ByteLevel().decode([token])
        if _words(inner.pre_tokenizer, text) == [token]:  # bytes that are no text are no word
            raise CheckpointError(
                f"convert: the word {text!r} is a token that no merges make; the tokenizer "
                f"{'takes' if whole else 'does not take'} it (ignore_merges), llama.cpp's "
                f"{name!r} does the opposite"
            )
    return name
