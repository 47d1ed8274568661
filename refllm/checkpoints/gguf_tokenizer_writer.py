"""A tokenizer as GGUF metadata, so that llama.cpp reads texts as the tokenizer does.

| kind                    | model   | words                                   | merges         |
|-------------------------|---------|-----------------------------------------|----------------|
| byte-level BPE          | "gpt2"  | the *name* of a rule (``gguf_words``)   | as they are    |
| BPE with byte fallback  | "llama" | none; spaces become "▁"                 | as scores      |

A complete ``tokenizer.json`` is written too (tokenizer.huggingface.json), so from refllm's own
files the tokenizer comes back exactly as it was. llama.cpp does not read it. So before anything
is written, what the other entries mean is compared with the tokenizer on sample texts:

- a name is written only where its rule gives the tokenizer's words, or where the tokenizer is
  the published one that llama.cpp means by the name;
- scores are written only where they give the tokenizer's ids;
- what else GGUF cannot express is noted, one sentence each: end tokens beyond three, texts that
  llama.cpp reads in another way, tokens that strip the spaces around them.

Scores: for BPE the score is minus the rank of the merge.

Source: llama.cpp, src/llama-vocab.cpp; the GGUF specification's keys.

Left out: unigram and word-piece tokenizers, normalizers other than NFC.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np
from tokenizers import Tokenizer as _Tokenizer

from refllm.array_types import Json, JsonView
from refllm.checkpoints.gguf_special_tokens import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    special_tokens,
)
from refllm.checkpoints.gguf_tokenizer import TOKENIZER_JSON, tokenizer_from_metadata
from refllm.checkpoints.gguf_words import SAMPLE, name_of_words
from refllm.checkpoints.sample_texts import sample_texts
from refllm.checkpoints.tensor_files import CheckpointError
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.model.config import ModelConfig

__all__ = ["tokenizer_metadata"]

Note = Callable[[str], object]


def tokenizer_metadata(
    tokenizer: Tokenizer, config: ModelConfig, note: Note = lambda sentence: None
) -> Json:
    """The entries of a tokenizer, padded to the vocabulary of the model.

    ``note`` is called with a sentence for each thing that GGUF cannot express.

    Raises
    ------
    CheckpointError
        for a tokenizer that is not BPE, words that llama.cpp has no name for, merges that no
        scores express.
    """
    if not tokenizer.available:
        return {"tokenizer.ggml.model": "no_vocab"}
    text = tokenizer.inner.to_str()
    described = json.loads(text)
    _check_supported(described)
    model = described["model"]
    fallback = bool(model.get("byte_fallback"))
    tokens, types = _tokens(described, config.vocab_size, fallback)
    beyond = sorted(
        i for i in tokenizer.inner.get_vocab(with_added_tokens=True).values() if i >= len(tokens)
    )
    if beyond:
        note(f"tokens without a row in the embedding are left out: {_listed(beyond, tokenizer)}")
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    # the order of the entries is that of the files
    entries: Json = {}
    if fallback:
        entries["tokenizer.ggml.model"] = "llama"
        entries["tokenizer.ggml.pre"] = "default"
        entries["tokenizer.ggml.tokens"] = tokens
        entries["tokenizer.ggml.scores"] = _scores(tokens, merges)
        entries["tokenizer.ggml.add_space_prefix"] = _adds_space_prefix(described)
        entries["tokenizer.ggml.token_type"] = np.array(types, dtype=np.int32)
        if (unknown := model.get("unk_token")) in tokens:
            entries["tokenizer.ggml.unknown_token_id"] = np.uint32(tokens.index(unknown))
    else:
        entries["tokenizer.ggml.model"] = "gpt2"
        entries["tokenizer.ggml.pre"] = name_of_words(tokenizer.inner, model)
        entries["tokenizer.ggml.tokens"] = tokens
        entries["tokenizer.ggml.token_type"] = np.array(types, dtype=np.int32)
        entries["tokenizer.ggml.merges"] = merges
    entries |= _begin_and_end(tokenizer, config, entries, note)
    _compare(tokenizer, described, entries, note)
    return entries | {TOKENIZER_JSON: text}


def _check_supported(described: JsonView) -> None:
    """CheckpointError for a kind of tokenizer that GGUF has no place for."""
    model = described["model"]
    if model.get("type") != "BPE":
        raise CheckpointError(
            f"convert: a {model.get('type')} tokenizer cannot be written to GGUF; only BPE can"
        )
    for part in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(part):
            raise CheckpointError(f"convert: GGUF has no place for the tokenizer's {part}")
    normalizer = described.get("normalizer")
    kind = None if normalizer is None else normalizer.get("type")
    if not model.get("byte_fallback") and kind not in (None, "NFC"):
        raise CheckpointError(
            f"convert: the tokenizer changes a text before it splits it ({kind}), and llama.cpp "
            "does not"
        )


# --- vocabulary ---------------------------------------------------------------------------


def _tokens(described: JsonView, size: int, fallback: bool) -> tuple[list[str], list[int]]:
    """The spelling and the type of every id below ``size``; ids without a token are padding."""
    found: dict[int, tuple[str, int]] = {}
    unknown = described["model"].get("unk_token") if fallback else None
    for token, i in described["model"]["vocab"].items():
        kind = NORMAL
        if token == unknown:
            kind = UNKNOWN
        elif fallback and len(token) == 6 and token.startswith("<0x"):
            kind = BYTE
        found[i] = (token, kind)
    for added in described.get("added_tokens", []):
        kind = CONTROL if added["special"] else USER_DEFINED
        if found.get(added["id"], ("", NORMAL))[1] == UNKNOWN:
            kind = UNKNOWN
        found[added["id"]] = (added["content"], kind)
    taken = {token for token, _ in found.values()}
    tokens = []
    types = []
    for i in range(size):
        padding = f"[PAD{i}]"
        while padding in taken:
            padding = f"[{padding}]"
        token, kind = found.get(i, (padding, UNUSED))
        tokens.append(token)
        types.append(kind)
    return tokens, types


def _scores(tokens: Sequence[str], merges: Sequence[str]) -> np.ndarray:
    """Minus the rank of the first merge that results in a token; tokens without one come last.

    >>> _scores(["a", "b", "c", "ab", "abc"], ["a b", "ab c"]).tolist()
    [-2.0, -2.0, -2.0, -0.0, -1.0]
    """
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault(pair.replace(" ", ""), rank)
    return np.array([-float(ranks.get(token, len(merges))) for token in tokens], dtype=np.float32)


def _adds_space_prefix(described: JsonView) -> bool:
    """Whether a tokenizer.json puts a space before the first word."""
    normalizer = json.dumps(described.get("normalizer")).lower()
    pre_tokenizer = json.dumps(described.get("pre_tokenizer"))
    return "prepend" in normalizer or '"first"' in pre_tokenizer or '"always"' in pre_tokenizer


# --- the ends of a text -------------------------------------------------------------------


def _begin_and_end(
    tokenizer: Tokenizer, config: ModelConfig, entries: JsonView, note: Note
) -> Json:
    """The entries of the tokens that begin and end a text, and that end a generation."""
    size = config.vocab_size
    before, after = _around(tokenizer.inner)
    found: Json = {}
    bos = config.bos_token_id
    if len(before) == 1 and before[0] < size:
        if bos not in (None, before[0]):
            note(
                f"the tokenizer begins a text with {_listed(before, tokenizer)}, config.json names "
                f"{_listed([bos], tokenizer)}: the file has the first alone"
            )
        bos = before[0]
    elif before:
        note(f"llama.cpp will not begin a text with {_listed(before, tokenizer)}")
    if bos is not None and bos < size:
        found["tokenizer.ggml.bos_token_id"] = np.uint32(bos)

    ends = [i for i in config.eos_token_ids if i < size]
    adds_eos = len(after) == 1 and after[0] in ends
    if adds_eos:
        ends = list(dict.fromkeys([*after, *ends]))
    elif after:
        note(f"llama.cpp will not end a text with {_listed(after, tokenizer)}")
    if ends:
        found["tokenizer.ggml.eos_token_id"] = np.uint32(ends[0])
    flags = {
        "tokenizer.ggml.add_bos_token": len(before) == 1 and before[0] == bos,
        "tokenizer.ggml.add_eos_token": adds_eos,
    }
    recognised = special_tokens({**entries, **found, **flags}, "convert").ends
    unnamed = [i for i in ends if i not in recognised]
    for key, token in zip(("eot", "eom"), unnamed, strict=False):
        found[f"tokenizer.ggml.{key}_token_id"] = np.uint32(token)
    if lost := unnamed[2:]:
        note(f"GGUF has no place for the end tokens {_listed(lost, tokenizer)}")
    if gained := sorted({*recognised} - {*ends}):
        note(f"llama.cpp will also end a generation at {_listed(gained, tokenizer)}")
    if not ends and entries["tokenizer.ggml.model"] == "gpt2" and size > 11:
        note(f"the model has no end token; llama.cpp takes {_listed([11], tokenizer)} for one")
    return found | flags


def _around(inner: _Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and after a text."""
    plain = inner.encode("a", add_special_tokens=False).ids
    full = inner.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []


def _listed(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Ids with their spelling: "5 ('</s>')"; the first four of many."""
    shown = [f"{i} ({tokenizer.inner.id_to_token(i)!r})" for i in ids[:4]]
    more = f" and {len(ids) - 4} more" if len(ids) > 4 else ""
    return ", ".join(shown) + more


# --- what the entries mean ----------------------------------------------------------------


def _compare(tokenizer: Tokenizer, described: JsonView, entries: JsonView, note: Note) -> None:
    """Read the entries as llama.cpp does, and say where the ids of texts differ.

    CheckpointError where SentencePiece's scores do not give the tokenizer's merges.
    """
    theirs = tokenizer_from_metadata(entries, "convert")
    texts = sample_texts(SAMPLE, seed=1)
    added = [token["content"] for token in described.get("added_tokens", []) if token["content"]]
    mixed = sample_texts(SAMPLE // 2, seed=2, more=[*added[:20], *added[-20:]] * 3)[-200:]
    if (described.get("normalizer") or {}).get("type") == "NFC":
        note("llama.cpp does not compose characters (NFC) as the tokenizer does")
        texts = [unicodedata.normalize("NFC", text) for text in texts]
        mixed = [unicodedata.normalize("NFC", text) for text in mixed]
    stripping = [
        token["content"]
        for token in described.get("added_tokens", [])
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word")
    ]
    if stripping:
        note(f"llama.cpp does not strip the spaces around {', '.join(map(repr, stripping[:4]))}")
    ours = Tokenizer(_Tokenizer.from_str(tokenizer.inner.to_str()))
    differing = [text for text in texts if ours.encode(text) != theirs.encode(text)]
    if differing and entries["tokenizer.ggml.model"] == "llama":
        raise CheckpointError(
            "convert: GGUF has no merges for a tokenizer with byte fallback, only scores, and "
            f"under them {differing[0]!r} becomes {_spelled(theirs, differing[0])} in place of "
            f"{_spelled(ours, differing[0])}"
        )
    if not differing and added and not stripping:
        differing = [
            text
            for text in mixed
            if ours.encode(text, parse_special=True) != theirs.encode(text, parse_special=True)
        ]
    if differing:
        note(
            f"llama.cpp reads {len(differing)} of {SAMPLE} sample texts in another way, such as "
            f"{differing[0]!r}"
        )


def _spelled(tokenizer: Tokenizer, text: str) -> str:
    """The tokens of a text, for a message."""
    return " ".join(repr(tokenizer.inner.id_to_token(i)) for i in tokenizer.encode(text))
