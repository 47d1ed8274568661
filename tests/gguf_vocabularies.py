"""Made-up vocabularies as GGUF metadata, and what llama.cpp answers for them.

The byte-level one is trained on text that was *not* split into words, so its merges cross
every boundary: where two rules split a text differently, the ids differ.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from nasty_texts import CONTROL_TOKENS, FRAGMENTS, nasty_texts
from refllm.formats.gguf.writer import write

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's llama_token_type
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
# words that are tokens, and that no merge makes
UNREACHABLE = ["Ġzebra", "quux", "Quux", "QUUX"]
USER_TOKENS = ["<tool>", "[USER]"]
SMOLLM2_CONTROL = [
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", "<reponame>", "<file_sep>",
    "<filename>", "<empty_output>", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n",
]  # fmt: skip
END_SPELLINGS = [
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
    "<｜end▁of▁sentence｜>", "[e~[",
]  # fmt: skip
FILL_SPELLINGS = [
    ["<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>"],
    ["<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>"],
    ["<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>"],
    ["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"],
    ["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"],
    ["<|file_sep|>"],
]  # fmt: skip
OTHER_SPELLINGS = ["<|im_start|>", "<s>", "<bos>", "<|channel|>", "<|message|>", "<|start|>",
                   "<|constrain|>", "<|pad|>", "<unused7>", "<repo_name>", "<|END|>"]  # fmt: skip


@cache
def byte_level(size: int = 900) -> dict[str, Any]:
    """Tokens, types and merges of a byte-level vocabulary; ids 0 to 2 are control tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=ALPHABET, show_progress=False, max_token_length=12
    )
    texts = nasty_texts(3000, seed=1, more=())  # no merge makes a control token
    inner.train_from_iterator([*texts, *(2 * fragment for fragment in FRAGMENTS)], trainer)
    vocab = inner.get_vocab()
    learned = sorted(vocab, key=vocab.get)
    merges = _merges(inner)
    tokens = [*CONTROL_TOKENS, *learned]
    tokens += [token for token in UNREACHABLE if token not in vocab]
    tokens += USER_TOKENS
    types = [CONTROL] * len(CONTROL_TOKENS) + [NORMAL] * (len(tokens) - len(CONTROL_TOKENS))
    types[-len(USER_TOKENS) :] = [USER_DEFINED] * len(USER_TOKENS)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, dtype=np.int32),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": np.uint32(0),
        "tokenizer.ggml.eos_token_id": np.uint32(1),
    }


def _merges(inner: Tokenizer) -> list[str]:
    """The merges of a tokenizer, the first ones first."""
    merges = json.loads(inner.to_str())["model"]["merges"]
    return [" ".join(pair) for pair in merges]


@cache
def sentencepiece(size: int = 900, *, ties: bool = False) -> dict[str, Any]:
    """Tokens, types and scores of a SentencePiece vocabulary: control tokens, 256 bytes, the
    commonest pieces of text; with ``ties`` several pieces have one score.
    """
    inner = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size, limit_alphabet=150, show_progress=False, max_token_length=10
    )
    texts = [
        text.replace(" ", "▁").replace("\0", "") for text in nasty_texts(3000, seed=2, more=())
    ]
    inner.train_from_iterator([*texts, *("▁" + fragment for fragment in FRAGMENTS)], trainer)
    vocab = inner.get_vocab()
    # characters alone come last, as SentencePiece writes them
    pieces = sorted(vocab, key=lambda piece: (len(piece) == 1, vocab[piece]))
    special = ["<unk>", "<s>", "</s>"]
    tokens = [*special, *(f"<0x{i:02X}>" for i in range(256)), *pieces, *USER_TOKENS, "<|pad|>"]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(pieces)]
    types += [USER_DEFINED] * len(USER_TOKENS) + [CONTROL]
    ranks = np.arange(len(pieces))
    scores = np.zeros(len(tokens), dtype=np.float32)
    scores[259 : 259 + len(pieces)] = -(ranks // 40 if ties else ranks)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, dtype=np.int32),
        "tokenizer.ggml.scores": scores,
    }


def cases(texts: Sequence[str], tokens: Sequence[str]) -> list[tuple[str, bool]]:
    """Text, and whether control tokens in it are parsed: both ways where there is one."""
    return [
        (text, parse)
        for text in texts
        for parse in (False, True)
        if not parse or any(token in text for token in tokens)
    ]


@contextlib.contextmanager
def llama_cpp_tokenizer(
    llama_cpp: ModuleType, metadata: Mapping[str, Any], path: Path
) -> Iterator[Any]:
    """llama.cpp's own tokenizer of a file with these entries and no tensor."""
    write(path, {"general.architecture": "llama"} | dict(metadata), {}, {}.__getitem__)
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    try:
        yield model
    finally:
        model.close()
        path.unlink()


def special_token_cases(count: int, seed: int) -> list[dict[str, Any]]:
    """Vocabularies of few tokens: spellings that llama.cpp recognises among others, of any
    type, and keys for some. Of spellings for one purpose there is at most one, since llama.cpp
    takes whichever its hash table holds first.
    """
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        spellings = rng.sample(END_SPELLINGS, rng.randint(0, 5))
        spellings += [rng.choice(group) for group in FILL_SPELLINGS if rng.random() < 0.25]
        spellings += rng.sample(OTHER_SPELLINGS, rng.randint(0, 4))
        rng.shuffle(spellings)
        plain = ALPHABET[: rng.randint(13, 18)]
        tokens = [*plain[:13], *spellings, *plain[13:]]
        types = [NORMAL] * len(tokens)
        for i in range(13, 13 + len(spellings)):
            types[i] = rng.choice([NORMAL, CONTROL, CONTROL, USER_DEFINED, UNKNOWN])
        model = rng.choice(["gpt2", "llama"])
        case: dict[str, Any] = {"model": model, "tokens": tokens, "token_type": types}
        if model == "gpt2":
            case["merges"] = []
            case["pre"] = rng.choice(["", "gpt-2", "llama-bpe", "tekken", "qwen2", "smollm"])
        else:
            case["scores"] = [0.0] * len(tokens)
        for key in ("bos", "eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep", "fim_pre"):
            if rng.random() < 0.3:
                case[f"{key}_token_id"] = rng.randrange(10, len(tokens))
        for key in ("add_bos_token", "add_eos_token"):
            if rng.random() < 0.3:
                case[key] = rng.random() < 0.5
        found.append(case)
    return found


def case_metadata(case: Mapping[str, Any]) -> dict[str, Any]:
    """A case of ``special_token_cases`` in the types of a file."""
    kinds = {"token_type": np.int32, "scores": np.float32}
    metadata: dict[str, Any] = {}
    for key, value in case.items():
        if key in kinds:
            value = np.array(value, dtype=kinds[key])
        elif isinstance(value, int) and not isinstance(value, bool):
            value = np.uint32(value)
        metadata[f"tokenizer.ggml.{key}"] = value
    return metadata
