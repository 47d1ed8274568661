"""A tokenizer as GGUF metadata: written, and read back.

GGUF stores what llama.cpp needs: the tokens with their types, the merges, and the *name* of
the pre-tokenizer (how text is split into words), whose regular expression llama.cpp knows.
It also has a place for a complete ``tokenizer.json`` (tokenizer.huggingface.json), which is
written too: from our own files the tokenizer comes back exactly as it was.

| kind                    | model   | pre-tokenizer             | read without tokenizer.json     |
|-------------------------|---------|---------------------------|---------------------------------|
| byte-level BPE          | "gpt2"  | gpt-2, llama-bpe, qwen2   | tokens, merges, pre-tokenizer   |
| BPE with byte fallback  | "llama" | spaces become "▁"         | tokens; merges from the scores  |

SentencePiece's scores order the merges: the pair whose union has the highest score is
merged first. For BPE the score is minus the rank of the merge, so each can be computed from
the other.

Source: the GGUF specification's keys and llama.cpp's tokenizers.

Left out: unigram and word-piece tokenizers; pre-tokenizers that llama.cpp has no name for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Regex as _Regex
from tokenizers import Tokenizer as _Tokenizer

from refllm.array_types import Json, JsonView
from refllm.checkpoints.gguf_pre_tokenizers import NAMES, PreTokenizer, split
from refllm.checkpoints.gguf_special_tokens import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    special_tokens,
    token_list,
)
from refllm.checkpoints.tensor_files import CheckpointError
from refllm.checkpoints.tokenizer import MissingTokenizer, Tokenizer
from refllm.model.config import ModelConfig

__all__ = ["tokenizer_from_metadata", "tokenizer_metadata"]

TOKENIZER_JSON = "tokenizer.huggingface.json"

_END = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_START = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
WORDS = {"gpt-2": None, "llama-bpe": _START + r"{1,3}|" + _END, "qwen2": _START + "|" + _END}
# What to do where a file's own tokenizer is not read
_OTHER_TOKENIZER = "pass a folder with the model's tokenizer.json (--tokenizer DIR)"


# --- writing ------------------------------------------------------------------------------


def tokenizer_metadata(tokenizer: Tokenizer, config: ModelConfig) -> Json:
    """The entries of a tokenizer, padded to the vocabulary of the model.

    Raises
    ------
    CheckpointError
        for a tokenizer that is not BPE, or a pre-tokenizer that llama.cpp has no name for.
    """
    text = tokenizer.inner.to_str()
    tokenizer_json = json.loads(text)
    model = tokenizer_json["model"]
    if model.get("type") != "BPE":
        raise CheckpointError(
            f"convert: a {model.get('type')} tokenizer cannot be written to GGUF; only BPE can"
        )
    fallback = bool(model.get("byte_fallback"))
    tokens, types = _tokens(tokenizer_json, config.vocab_size, fallback)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    # the order of the entries is that of the files
    entries: Json = {}
    if fallback:
        entries["tokenizer.ggml.model"] = "llama"
        entries["tokenizer.ggml.pre"] = "default"
        entries["tokenizer.ggml.tokens"] = tokens
        entries["tokenizer.ggml.scores"] = _scores(tokens, merges)
        entries["tokenizer.ggml.add_space_prefix"] = _adds_space_prefix(tokenizer_json)
        entries["tokenizer.ggml.token_type"] = np.array(types, dtype=np.int32)
    else:
        entries["tokenizer.ggml.model"] = "gpt2"
        entries["tokenizer.ggml.pre"] = _pre_tokenizer_name(tokenizer_json.get("pre_tokenizer"))
        entries["tokenizer.ggml.tokens"] = tokens
        entries["tokenizer.ggml.token_type"] = np.array(types, dtype=np.int32)
        entries["tokenizer.ggml.merges"] = merges
    ends = {"bos": config.bos_token_id, "eos": next(iter(config.eos_token_ids), None)}
    for key, token in ends.items():
        if token is not None and token < config.vocab_size:
            entries[f"tokenizer.ggml.{key}_token_id"] = np.uint32(token)
    adds_bos = tokenizer.encode("", special=True)[:1] == [config.bos_token_id]
    return entries | {"tokenizer.ggml.add_bos_token": adds_bos, TOKENIZER_JSON: text}


def _adds_space_prefix(tokenizer_json: JsonView) -> bool:
    """Whether a tokenizer.json puts a space before the first word."""
    normalizer = json.dumps(tokenizer_json.get("normalizer")).lower()
    pre_tokenizer = json.dumps(tokenizer_json.get("pre_tokenizer"))
    return "prepend" in normalizer or '"first"' in pre_tokenizer or '"always"' in pre_tokenizer


def _tokens(tokenizer_json: JsonView, size: int, fallback: bool) -> tuple[list[str], list[int]]:
    """The spelling and the type of every id; ids without a token are padding."""
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [UNUSED] * size
    vocab = tokenizer_json["model"]["vocab"]
    for token, i in vocab.items():
        tokens[i] = token
        types[i] = NORMAL
        if fallback and len(token) == 6 and token.startswith("<0x"):
            types[i] = BYTE
    unknown = tokenizer_json["model"].get("unk_token")
    if fallback and unknown in vocab:
        types[vocab[unknown]] = UNKNOWN
    for added in tokenizer_json.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        if types[added["id"]] != UNKNOWN:
            types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
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


def _pre_tokenizer_name(pre_tokenizer: object) -> str:
    """llama.cpp's name of a tokenizer.json's pre-tokenizer."""
    text = json.dumps(pre_tokenizer)
    for name, pattern in WORDS.items():
        if pattern is None:
            if _is_gpt2(pre_tokenizer):
                return name
        elif json.dumps(pattern) in text:
            return name
    raise CheckpointError(
        f"convert: llama.cpp has no name for the tokenizer's words; it knows {', '.join(WORDS)} "
        f"of those tried, and this one is {text[:200]}"
    )


def _is_gpt2(pre_tokenizer: object) -> bool:
    """Whether a pre-tokenizer is the byte-level one with GPT-2's regular expression."""
    if not isinstance(pre_tokenizer, dict) or pre_tokenizer.get("type") != "ByteLevel":
        return False
    return bool(pre_tokenizer.get("use_regex", True) and not pre_tokenizer.get("add_prefix_space"))


# --- reading ------------------------------------------------------------------------------


def tokenizer_from_metadata(metadata: JsonView, where: str) -> Tokenizer:
    """The tokenizer of a file; a ``MissingTokenizer`` for a file without a vocabulary.

    Raises
    ------
    CheckpointError
        for a tokenizer that is not supported, or entries that contradict each other.
    """
    try:
        if isinstance(tokenizer_json := metadata.get(TOKENIZER_JSON), str):
            return Tokenizer(_Tokenizer.from_str(tokenizer_json))
        if metadata.get("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
            return MissingTokenizer(where)
        return _rebuilt(metadata, where)
    except CheckpointError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{where}: the tokenizer cannot be built: {error}") from error


def _rebuilt(metadata: JsonView, where: str) -> Tokenizer:
    """The tokenizer of a file without a tokenizer.json."""
    model = metadata.get("tokenizer.ggml.model")
    tokens = token_list(metadata, where)
    vocab = {token: i for i, token in enumerate(tokens)}
    if model == "gpt2":
        inner = _byte_level(metadata, vocab, where)
    elif model == "llama":
        inner = _sentencepiece(metadata, tokens, vocab, where)
    else:
        raise CheckpointError(
            f"{where}: the tokenizer {model!r:.40} is not supported, only 'gpt2' and 'llama' are: "
            f"{_OTHER_TOKENIZER}"
        )
    special = special_tokens(metadata, where)
    inner.add_tokens(
        [
            AddedToken(token, special=bool(kind != USER_DEFINED), normalized=False)
            for token, kind in zip(tokens, special.types, strict=True)
            if kind in (CONTROL, USER_DEFINED, UNKNOWN)
        ]
    )
    template = ["$A"]
    around = []
    if special.add_bos and special.bos is not None:
        template.insert(0, "bos")
        around.append({"id": "bos", "ids": [special.bos], "tokens": [tokens[special.bos]]})
    if special.add_eos and special.eos is not None:
        template.append("eos")
        around.append({"id": "eos", "ids": [special.eos], "tokens": [tokens[special.eos]]})
    if around:
        inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=around)
    return Tokenizer(inner)


def _byte_level(metadata: JsonView, vocab: dict[str, int], where: str) -> _Tokenizer:
    """Byte-level BPE, with the words that the file names."""
    words = _words(metadata, where)
    inner = _Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(metadata, vocab, where),
            ignore_merges=words.ignore_merges,
        )
    )
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    steps = [*split(words.rule), level]
    missing = "".join(sorted(set(pre_tokenizers.ByteLevel.alphabet()) - vocab.keys()))
    if missing:
        # Bytes without a token are lost. Alone in their pieces they still part their
        # neighbours, which the library would merge over the gap.
        gaps = _Regex("[" + "".join(f"\\x{{{ord(byte):04X}}}" for byte in missing) + "]")
        steps.append(pre_tokenizers.Split(gaps, "isolated"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(steps)
    inner.decoder = decoders.ByteLevel()
    return inner


def _words(metadata: JsonView, where: str) -> PreTokenizer:
    """What the file's name of a pre-tokenizer means."""
    name = metadata.get("tokenizer.ggml.pre") or "default"  # as llama.cpp reads no name
    if not isinstance(name, str) or name not in NAMES:
        raise CheckpointError(
            f"{where}: tokenizer.ggml.pre is {name!r:.40}, a way of splitting text into words "
            f"that refllm does not know: {_OTHER_TOKENIZER}"
        )
    return NAMES[name]


def _merges(metadata: JsonView, vocab: Mapping[str, int], where: str) -> list[tuple[str, str]]:
    """The pairs of tokens that are merged, the first ones first."""
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list) or not all(isinstance(pair, str) for pair in merges):
        raise CheckpointError(f"{where}: tokenizer.ggml.merges is missing, or no list of strings")
    pairs = []
    for merge in dict.fromkeys(merges):  # of equal merges the first has the rank
        left, _, right = merge[1:].partition(" ")  # a token may begin with a space
        left = merge[:1] + left
        for token in (left, right, left + right):
            if token not in vocab:
                raise CheckpointError(
                    f"{where}: tokenizer.ggml.merges has {merge!r:.60}, but the vocabulary has no "
                    f"token {token!r:.60}"
                )
        pairs.append((left, right))
    return pairs


def _sentencepiece(
    metadata: JsonView, tokens: Sequence[str], vocab: Mapping[str, int], where: str
) -> _Tokenizer:
    """SentencePiece's BPE: any two tokens whose union is a token can be merged, the highest
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
    normalize: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    decode: list[decoders.Decoder] = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        normalize.insert(0, normalizers.Prepend("▁"))
        decode.append(decoders.Strip(" ", 1, 0))
    inner.normalizer = normalizers.Sequence(normalize)
    inner.decoder = decoders.Sequence(decode)
    return inner
