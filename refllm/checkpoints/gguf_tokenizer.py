"""A tokenizer as GGUF's metadata, and back.

GGUF stores what llama.cpp needs: the tokens with their kinds, the merges, and the *name* of
the split into words, whose regular expression llama.cpp knows. It has a place for a whole
``tokenizer.json`` too (tokenizer.huggingface.json), and that is written beside: what comes
back from our own files is the tokenizer that went in, to the letter.

| kind                     | model   | words                           | read without tokenizer.json          |
|--------------------------|---------|----------------------------------|--------------------------------------|
| byte-level BPE           | "gpt2"  | gpt-2, llama-bpe, qwen2         | tokens, merges, words by name        |
| BPE with fallback bytes  | "llama" | spaces become "▁"               | tokens; merges from the scores       |

SentencePiece's scores order the merges: the pair whose union has the highest score goes
first. For BPE that is minus the rank of the merge, so either can be made of the other.

Source: the GGUF specification's keys and llama.cpp's tokenizers.

Left out: unigram and word-piece tokenizers; words that llama.cpp has no name for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Regex as _Regex
from tokenizers import Tokenizer as _Tokenizer

from refllm.checkpoints.tensor_files import CheckpointError
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.model.config import ModelConfig

__all__ = ["metadata_of", "tokenizer_of"]

NORMAL = 1
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5
BYTE = 6
WHOLE = "tokenizer.huggingface.json"
# Splits into words by the names that llama.cpp has for them; None is GPT-2's own, which the
# library has built in
_END = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = {
    "gpt-2": None,
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _END,
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _END,
}


# --- writing ------------------------------------------------------------------------------


def metadata_of(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Any]:
    """The entries of a tokenizer; as many tokens as the model has rows.

    Raises
    ------
    CheckpointError
        for a tokenizer of another kind, or words that llama.cpp has no name for.
    """
    text = tokenizer.inner.to_str()
    whole = json.loads(text)
    model = whole["model"]
    if model.get("type") != "BPE":
        raise CheckpointError(
            f"convert: a {model.get('type')} tokenizer has no place in GGUF here; BPE has"
        )
    pieces = bool(model.get("byte_fallback"))
    tokens, kinds = _tokens(whole, config.vocab_size, pieces)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    made: dict[str, Any] = {
        "tokenizer.ggml.model": "llama" if pieces else "gpt2",
        "tokenizer.ggml.pre": "default" if pieces else _words_name(whole.get("pre_tokenizer")),
        "tokenizer.ggml.tokens": tokens,
    }
    if pieces:
        made["tokenizer.ggml.scores"] = _scores(tokens, merges)
        made["tokenizer.ggml.add_space_prefix"] = "prepend" in json.dumps(
            whole.get("normalizer")
        ).lower() or (
            '"first"' in json.dumps(whole.get("pre_tokenizer"))
            or '"always"' in json.dumps(whole.get("pre_tokenizer"))
        )
    made["tokenizer.ggml.token_type"] = np.array(kinds, dtype=np.int32)
    if not pieces:
        made["tokenizer.ggml.merges"] = merges
    for key, token in (
        ("bos", config.bos_token_id),
        ("eos", next(iter(config.eos_token_ids), None)),
    ):
        if token is not None and token < config.vocab_size:
            made[f"tokenizer.ggml.{key}_token_id"] = np.uint32(token)
    begins = tokenizer.encode("", special=True)[:1] == [config.bos_token_id]
    return made | {"tokenizer.ggml.add_bos_token": begins, WHOLE: text}


def _tokens(whole: Mapping[str, Any], size: int, pieces: bool) -> tuple[list[str], list[int]]:
    """The spelling and the kind of every id; ids without a token are padding."""
    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds = [UNUSED] * size
    for token, i in whole["model"]["vocab"].items():
        tokens[i] = token
        kinds[i] = BYTE if pieces and len(token) == 6 and token.startswith("<0x") else NORMAL
    if pieces and whole["model"].get("unk_token") in whole["model"]["vocab"]:
        kinds[whole["model"]["vocab"][whole["model"]["unk_token"]]] = UNKNOWN
    for added in whole.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        if kinds[added["id"]] != UNKNOWN:
            kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    return tokens, kinds


def _scores(tokens: Sequence[str], merges: Sequence[str]) -> np.ndarray:
    """Minus the rank of the first merge that makes a token; what no merge makes comes last."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault(pair.replace(" ", ""), rank)
    return np.array([-float(ranks.get(token, len(merges))) for token in tokens], dtype=np.float32)


def _words_name(pre: Any) -> str:
    """llama.cpp's name of a split into words."""
    text = json.dumps(pre)
    for name, pattern in WORDS.items():
        if pattern is None:
            same = (
                isinstance(pre, dict)
                and pre.get("type") == "ByteLevel"
                and pre.get("use_regex", True)
            )
            if same and not pre.get("add_prefix_space"):
                return name
        elif json.dumps(pattern) in text:
            return name
    raise CheckpointError(
        f"convert: llama.cpp has no name for the tokenizer's words; it knows {', '.join(WORDS)} "
        f"of those tried, and this one is {text[:200]}"
    )


# --- reading ------------------------------------------------------------------------------


def tokenizer_of(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """The tokenizer of a file.

    Raises
    ------
    CheckpointError
        for one of another kind, or entries that contradict each other.
    """
    try:
        if isinstance(whole := metadata.get(WHOLE), str):
            return Tokenizer(_Tokenizer.from_str(whole))
        return _rebuilt(metadata, where)
    except CheckpointError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{where}: the tokenizer cannot be made: {error}") from error


def _rebuilt(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    model = metadata.get("tokenizer.ggml.model")
    words = metadata.get("tokenizer.ggml.pre", "default")
    tokens = metadata.get("tokenizer.ggml.tokens")
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(tokens, list) or len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{where}: tokenizer.ggml.tokens is missing, or holds a token twice")
    vocab = {token: i for i, token in enumerate(tokens)}
    if model == "gpt2" and words in WORDS and isinstance(merges, list):
        pairs = [tuple(pair.split(" ", 1)) for pair in merges]
        inner = _Tokenizer(models.BPE(vocab=vocab, merges=pairs))
        pattern = WORDS[words]
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
        if pattern is None:
            inner.pre_tokenizer = level
        else:
            split = pre_tokenizers.Split(_Regex(pattern), "isolated")
            inner.pre_tokenizer = pre_tokenizers.Sequence([split, level])
        inner.decoder = decoders.ByteLevel()
    elif model == "llama":
        inner = _pieces(metadata, tokens, vocab, where)
    else:
        raise CheckpointError(
            f"{where}: the tokenizer {model!r:.40} with words {words!r:.40} is not read; read are "
            f"'gpt2' with {', '.join(WORDS)}, and 'llama'"
        )
    kinds = metadata.get("tokenizer.ggml.token_type", np.ones(len(tokens), dtype=np.int32))
    special = [
        i
        for i, kind in enumerate(kinds)
        if kind in (CONTROL, USER_DEFINED, UNKNOWN) and i < len(tokens)
    ]
    inner.add_tokens(
        [
            AddedToken(tokens[i], special=bool(kinds[i] != USER_DEFINED), normalized=False)
            for i in special
        ]
    )
    begin = metadata.get("tokenizer.ggml.bos_token_id")
    if begin is not None and metadata.get("tokenizer.ggml.add_bos_token", model == "llama"):
        first = tokens[int(begin)]
        inner.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, int(begin))]
        )
    return Tokenizer(inner)


def _pieces(
    metadata: Mapping[str, Any], tokens: Sequence[str], vocab: Mapping[str, int], where: str
) -> Any:
    """A SentencePiece model of merges: each token can be made of any two tokens, the best
    score first.
    """
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or scores.shape != (len(tokens),):
        raise CheckpointError(f"{where}: tokenizer.ggml.scores has not one score for each token")
    ranked: list[tuple[float, int, tuple[str, str]]] = []
    for i, token in enumerate(tokens):
        for cut in range(1, len(token)):
            if token[:cut] in vocab and token[cut:] in vocab:
                ranked.append((-float(scores[i]), i, (token[:cut], token[cut:])))
    ranked.sort(key=lambda entry: entry[:2])
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    inner = _Tokenizer(
        models.BPE(
            vocab=dict(vocab),
            merges=[pair for *_, pair in ranked],
            unk_token=tokens[int(unknown)],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        prefix = [normalizers.Prepend("▁")]
    else:
        prefix = []
    inner.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return inner
