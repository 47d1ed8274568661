"""The tokenizer of a GGUF file, rebuilt from its metadata as llama.cpp reads it.

GGUF stores the tokens with their types, the merges, and the *name* of the pre-tokenizer (how
text is split into words, see ``gguf_pre_tokenizers``). It also has a place for a complete
``tokenizer.json`` (tokenizer.huggingface.json), which is read where it is present.

| kind                    | model   | read without tokenizer.json                   |
|-------------------------|---------|-----------------------------------------------|
| byte-level BPE          | "gpt2"  | tokens, merges, the name of the pre-tokenizer |
| BPE with byte fallback  | "llama" | tokens; merges from the scores                |

SentencePiece's scores order the merges: the pair whose union has the highest score is
merged first. Special tokens: ``gguf_special_tokens``. Writing: ``gguf_tokenizer_writer``.

Source: the GGUF specification's keys; llama.cpp, src/llama-vocab.cpp.

Left out: unigram and word-piece tokenizers. Differences from llama.cpp: of special tokens that
overlap in a text the leftmost is found first, there the longest; of overlapping pairs with
equal scores the one with the smaller id is merged first, there the leftmost; a text that
spells a control token never becomes it by merges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Regex as _Regex
from tokenizers import Tokenizer as _Tokenizer

from refllm.array_types import JsonView
from refllm.checkpoints.gguf_pre_tokenizers import NAMES, RULES, PreTokenizer, split
from refllm.checkpoints.gguf_special_tokens import (
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    special_tokens,
    token_list,
)
from refllm.checkpoints.tensor_files import CheckpointError
from refllm.checkpoints.tokenizer import MissingTokenizer, Tokenizer

__all__ = ["TOKENIZER_JSON", "tokenizer_from_metadata"]

TOKENIZER_JSON = "tokenizer.huggingface.json"

# What to do where a file's own tokenizer is not read
_OTHER_TOKENIZER = "pass a folder with the model's tokenizer.json (--tokenizer DIR)"


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
    special = special_tokens(metadata, where)
    if model == "gpt2":
        inner = _byte_level(metadata, vocab, where)
    elif model == "llama":
        inner = _sentencepiece(metadata, vocab, special.types, where)
    else:
        raise CheckpointError(
            f"{where}: the tokenizer {model!r:.40} is not supported, only 'gpt2' and 'llama' are: "
            f"{_OTHER_TOKENIZER}"
        )
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
    """Byte-level BPE, with the pre-tokenizer that the file names."""
    named = _named_pre_tokenizer(metadata, where)
    inner = _Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(metadata, vocab, where),
            ignore_merges=named.ignore_merges,
        )
    )
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    steps = [*split(RULES[named.rule]), level]
    missing = "".join(sorted(set(pre_tokenizers.ByteLevel.alphabet()) - vocab.keys()))
    if missing:
        # Bytes without a token are lost. Alone in their pieces they still separate their
        # neighbours, which the library would otherwise merge across the gap.
        gaps = _Regex("[" + "".join(f"\\x{{{ord(byte):04X}}}" for byte in missing) + "]")
        steps.append(pre_tokenizers.Split(gaps, "isolated"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(steps)
    inner.decoder = decoders.ByteLevel()
    return inner


def _named_pre_tokenizer(metadata: JsonView, where: str) -> PreTokenizer:
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
    metadata: JsonView, vocab: Mapping[str, int], types: Sequence[int], where: str
) -> _Tokenizer:
    """SentencePiece's BPE: any two tokens whose union is a token can be merged, the highest
    score first. No merge makes a control token: a user's text never becomes one.
    """
    tokens = list(vocab)
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or scores.shape != (len(tokens),):
        raise CheckpointError(f"{where}: tokenizer.ggml.scores has not one score for each token")
    ranked: list[tuple[float, int, tuple[str, str]]] = []
    for i, token in enumerate(tokens):
        if types[i] in (CONTROL, UNKNOWN):
            continue
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
