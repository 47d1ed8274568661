"""Special tokens of a GGUF file, as llama.cpp finds them: which begin and end a text, and
which end a generation.

An id comes from its key (tokenizer.ggml.eos_token_id), or from llama.cpp's default. Many
files name one end token where the model has several, so llama.cpp also recognises tokens by
their *spelling*: SmolLM2's file names ``<|im_end|>`` alone, and generation also ends at
``<|endoftext|>`` and ``<reponame>``. A token that was recognised is a control token, whatever
type the file gives it.

| model   | BOS without a key | EOS without a key | begins with BOS          | ends with EOS |
|---------|-------------------|-------------------|--------------------------|---------------|
| "llama" | 1                 | 2                 | yes                      | no            |
| "gpt2"  | 11                | 11                | as the pre-tokenizer has | no            |

``add_bos_token`` and ``add_eos_token`` win over the last two columns. Token 11 is Falcon's;
where no key names an EOS token it may end an encoded text, as in llama.cpp, but it never ends
a generation here: in other vocabularies it is a comma.

Source: llama.cpp, src/llama-vocab.cpp (``llama_vocab::impl::load``).

Left out: separator, mask and padding tokens, which no decoder of these families uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from refllm.array_types import JsonView
from refllm.checkpoints.gguf_pre_tokenizers import NAMES
from refllm.checkpoints.tensor_files import CheckpointError

__all__ = ["SpecialTokens", "begin_and_ends", "special_tokens", "token_list"]

# token types
NORMAL = 1
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5
BYTE = 6

_END_KEYS = ("eos", "eot", "eom")
_DEFAULT_IDS = {"llama": {"bos": 1, "eos": 2}, "gpt2": {"bos": 11, "eos": 11}}
# Every token of the vocabulary with one of these spellings ends a generation
_END_SPELLINGS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
    "<｜end▁of▁sentence｜>", "[e~[",
})  # fmt: skip
# Fill-in-the-middle (FIM) tokens, by key; of several spellings that occur the lowest id is taken
_FIM_SPELLINGS = {
    "fim_pre": ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>",
                "▁<PRE>", "<|code_prefix|>", "<|prefix|>"),
    "fim_suf": ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>",
                "▁<SUF>", "<|code_suffix|>", "<|suffix|>"),
    "fim_mid": ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>",
                "▁<MID>", "<|code_middle|>", "<|middle|>"),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}  # fmt: skip
_ENDING_FIM = ("fim_pad", "fim_rep", "fim_sep")
# gpt-oss: words of its message format, which a text may contain
_ALWAYS_PARSED = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
# "<|end|>" ends no generation beside one of these pairs, nor "</s>" beside _MAKES_S_NORMAL
_FINER_ENDS = [{first, second} for first in ("<|return|>", "<|flush|>")
               for second in ("<|call|>", "<|calls|>")]  # fmt: skip
_MAKES_S_NORMAL = "<|tool_response>"


@dataclass(frozen=True)
class SpecialTokens:
    """``bos`` and ``eos`` are added to an encoded text if ``add_bos``, ``add_eos``; ``ends``
    end a generation, the one that a key names first; ``types[V]`` are the token types.
    """

    bos: int | None
    eos: int | None
    add_bos: bool
    add_eos: bool
    ends: tuple[int, ...]
    types: list[int]


def special_tokens(metadata: JsonView, where: str) -> SpecialTokens:
    """The special tokens of a file with a vocabulary.

    Raises
    ------
    CheckpointError
        for an entry that is no token id, or lies beyond the vocabulary; for types that are
        not one per token.
    """
    tokens = token_list(metadata, where)
    ids = {token: i for i, token in enumerate(tokens)}
    types = _types(metadata, len(tokens), where)
    model = metadata.get("tokenizer.ggml.model")
    named = _named_ids(metadata, len(tokens), where)
    pre_tokenizer = NAMES.get(str(metadata.get("tokenizer.ggml.pre") or "default"))
    begins = model == "llama" or (
        model == "gpt2" and pre_tokenizer is not None and pre_tokenizer.add_bos
    )
    add_bos = _flag(metadata, "add_bos_token", begins, where)
    add_eos = _flag(metadata, "add_eos_token", False, where)

    found = dict(named)
    for key, i in _DEFAULT_IDS.get(str(model), {}).items():
        needed = model == "llama" or (add_bos if key == "bos" else add_eos)
        if needed and i < len(tokens):
            found.setdefault(key, i)
    for key, adds in (("bos", add_bos), ("eos", add_eos)):
        if adds and key not in found:
            raise CheckpointError(f"{where}: texts get the {key.upper()} token, but there is none")

    if model == "llama" and "eos" in found:
        named.setdefault("eos", found["eos"])
    ends = _ends(ids, named, types)
    return SpecialTokens(found.get("bos"), found.get("eos"), add_bos, add_eos, ends, types)


def begin_and_ends(metadata: JsonView, where: str) -> tuple[int | None, tuple[int, ...]]:
    """The ids that begin a text and that end a generation; of a file without a vocabulary,
    those that its keys name.
    """
    if "tokenizer.ggml.tokens" in metadata:
        special = special_tokens(metadata, where)
        return special.bos, special.ends
    named = _named_ids(metadata, None, where)
    ends = [named[key] for key in _END_KEYS if key in named]
    return named.get("bos"), tuple(dict.fromkeys(ends))


def _ends(ids: Mapping[str, int], named: Mapping[str, int], types: list[int]) -> tuple[int, ...]:
    """Ids that end a generation, by key and by spelling; ``types`` of recognised tokens are
    changed in place.
    """
    keyed = [named[key] for key in _END_KEYS if key in named]
    ends = set(keyed)
    for key, spellings in _FIM_SPELLINGS.items():
        fim = named.get(key)
        if fim is None:
            fim = min((ids[token] for token in spellings if token in ids), default=None)
            if fim is not None:
                types[fim] = CONTROL
        if fim is not None and key in _ENDING_FIM:
            ends.add(fim)
    for token in _END_SPELLINGS & ids.keys():
        types[ids[token]] = CONTROL
        ends.add(ids[token])
    for token in _ALWAYS_PARSED:
        if token in ids:
            types[ids[token]] = USER_DEFINED

    spelled = {token for token in _END_SPELLINGS if ids.get(token) in ends}
    dropped = set()
    if "<|end|>" in spelled and any(pair <= spelled for pair in _FINER_ENDS):
        dropped.add(ids["<|end|>"])
        types[ids["<|end|>"]] = USER_DEFINED
    if "</s>" in spelled and _MAKES_S_NORMAL in spelled:
        dropped.add(ids["</s>"])
        types[ids["</s>"]] = NORMAL
    ends -= dropped
    first = [i for i in keyed[:1] if i in ends]
    return tuple(dict.fromkeys([*first, *sorted(ends)]))


def token_list(metadata: JsonView, where: str) -> list[str]:
    """The spelling of every id. A token without one gets a name, as in llama.cpp.

    >>> token_list({"tokenizer.ggml.tokens": ["a", "", ""]}, "x.gguf")
    ['a', '[EMPTY_1]', '[EMPTY_2]']
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise CheckpointError(f"{where}: tokenizer.ggml.tokens is missing, or no list of strings")
    spelled = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    first: dict[str, int] = {}
    for i, token in enumerate(spelled):
        if first.setdefault(token, i) != i:
            raise CheckpointError(
                f"{where}: tokenizer.ggml.tokens holds the token {token!r:.60} twice, as ids "
                f"{first[token]} and {i}"
            )
    return spelled


def _types(metadata: JsonView, size: int, where: str) -> list[int]:
    """The type of every token; all are normal where the file has none."""
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        return [NORMAL] * size
    if not isinstance(types, np.ndarray) or types.ndim != 1 or types.dtype.kind not in "iu":
        raise CheckpointError(f"{where}: tokenizer.ggml.token_type is no list of integers")
    if types.size != size:
        raise CheckpointError(
            f"{where}: tokenizer.ggml.token_type has {types.size} entries for {size} tokens"
        )
    listed: list[int] = types.tolist()
    return listed


def _named_ids(metadata: JsonView, size: int | None, where: str) -> dict[str, int]:
    """The ids that keys name, each checked; ``size`` None where there is no vocabulary."""
    named = {}
    for key in ("bos", *_END_KEYS, "unknown", *_FIM_SPELLINGS):
        entry = f"tokenizer.ggml.{key}_token_id"
        if entry not in metadata:
            continue
        value = metadata[entry]
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not whole or value < 0:
            raise CheckpointError(f"{where}: the entry {entry} is {value!r:.40}, not a token id")
        if size is not None and value >= size:
            raise CheckpointError(
                f"{where}: {entry} is {value}, beyond the vocabulary of {size} tokens"
            )
        named[key] = int(value)
    return named


def _flag(metadata: JsonView, key: str, default: bool, where: str) -> bool:
    """The entry ``tokenizer.ggml.key``, true or false."""
    value = metadata.get(f"tokenizer.ggml.{key}", default)
    if not isinstance(value, bool | np.bool_):
        raise CheckpointError(
            f"{where}: the entry tokenizer.ggml.{key} is {value!r:.40}, neither true nor false"
        )
    return bool(value)
