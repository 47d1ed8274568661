"""What a vocabulary can say: the bytes of each token, and which tokens end a text.

| decoder in tokenizer.json       | token            | bytes                                       |
|---------------------------------|------------------|---------------------------------------------|
| ByteLevel (GPT-2)               | ``Ġthe``         | each character stands for one byte          |
| Replace ▁ + ByteFallback        | ``▁the``         | UTF-8, ▁ is a space                         |
| (SentencePiece)                 | ``<0x0A>``       | that one byte                               |
| Metaspace                       | ``▁the``         | UTF-8, ▁ is a space                         |
| Fuse, none                      | ``the``          | UTF-8                                       |

A special token (control tokens, padding) has no bytes: it is never part of a text that a grammar
describes. An added token that is not special is text. Several tokens may have equal bytes.

Sources: ``tokenizers`` (decoders/byte_level.rs, byte_fallback.rs, metaspace.rs); the table of
bytes, GPT-2's ``bytes_to_unicode``.

Left out: decoders that join tokens by rules of their own (WordPiece, BPEDecoder, CTC): a token's
text there depends on its neighbours. They raise an ``InputError``. SentencePiece drops one space
at the beginning of a text: see ``drops_first_space``.
"""

from __future__ import annotations

import json
import re
from functools import cache

from refllm.array_types import Json
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.errors import InputError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Control tokens that end a text or a turn, where the checkpoint's config is not at hand.
_END_NAMES = frozenset(
    [
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|end|>",
        "<end_of_turn>",
        "</s>",
        "<eos>",
        "<｜end▁of▁sentence｜>",
    ]
)


def token_bytes(tokenizer: Tokenizer) -> list[bytes | None]:
    """The bytes of each token id, V of them; None for special tokens and for ids without a token.

    V is the number of rows of the model's embedding (``tokenizer.limit``), without a model the
    size of the vocabulary.

    Raises
    ------
    InputError
        if the tokenizer's decoder joins tokens by rules of its own, or if there is no tokenizer.

    >>> tokenizer = Tokenizer.train(["ab ab"], vocab_size=258)
    >>> token_bytes(tokenizer)[0], token_bytes(tokenizer)[257]
    (None, b'ab')
    """
    inner = tokenizer.inner
    read = _reader(_decoders(tokenizer))
    size = tokenizer.vocab_size if tokenizer.limit is None else tokenizer.limit
    special = {i for i, token in inner.get_added_tokens_decoder().items() if token.special}
    found: list[bytes | None] = []
    for i in range(size):
        token = None if i in special else inner.id_to_token(i)
        found.append(None if token is None else read(token))
    return found


def end_tokens_of(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end a text: those of the model's config where the tokenizer came with a
    model, else the special tokens with one of the usual names.
    """
    if tokenizer.end_tokens is not None:
        return tokenizer.end_tokens
    added = tokenizer.inner.get_added_tokens_decoder()
    return frozenset(i for i, t in added.items() if t.special and t.content in _END_NAMES)


def drops_first_space(tokenizer: Tokenizer) -> bool:
    """Whether decoding drops a space at the beginning of a text (SentencePiece)."""
    return any(
        (part["type"] == "Strip" and part["content"] == " " and part["start"] > 0)
        or (part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never")
        for part in _decoders(tokenizer)
    )


def _decoders(tokenizer: Tokenizer) -> list[Json]:
    """The parts of the tokenizer's decoder, in their order, as tokenizer.json has them."""
    if tokenizer.inner.decoder is None:
        return []
    decoder: Json = json.loads(tokenizer.inner.decoder.__getstate__())
    if decoder["type"] == "Sequence":
        parts: list[Json] = decoder["decoders"]
        return parts
    return [decoder]


class _Reader:
    """From a token as the vocabulary spells it to its bytes."""

    def __init__(self, byte_level: bool, fallback: bool, space: str | None) -> None:
        self.byte_level = byte_level
        self.fallback = fallback
        self.space = space

    def __call__(self, token: str) -> bytes:
        """The bytes of ``token``."""
        if self.byte_level:
            table = byte_alphabet()
            if all(character in table for character in token):
                return bytes(table[character] for character in token)
            return token.encode()  # an added token is spelled as it is
        byte = _BYTE_TOKEN.fullmatch(token) if self.fallback else None
        if byte is not None:
            return bytes([int(byte[1], 16)])
        if self.space is not None:
            token = token.replace(self.space, " ")
        return token.encode()


def _reader(parts: list[Json]) -> _Reader:
    """The reader of a decoder with these parts; InputError for those that join tokens."""
    kinds = [part["type"] for part in parts]
    known = {"ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
    unknown = [kind for kind in kinds if kind not in known]
    if unknown:
        raise InputError(
            f"a grammar needs the bytes of each token, which the decoder {unknown[0]} of this "
            "tokenizer does not define: use a byte-level or SentencePiece tokenizer"
        )
    space = None
    for part in parts:
        if part["type"] == "Metaspace":
            space = part["replacement"]
        elif part["type"] == "Replace":
            pattern = part["pattern"].get("String")
            if pattern is None or part["content"] != " ":
                raise InputError(
                    "a grammar needs the bytes of each token, which this tokenizer's Replace "
                    "decoder does not define"
                )
            space = pattern
    return _Reader("ByteLevel" in kinds, "ByteFallback" in kinds, space)


@cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: printable Latin-1 stands for itself, the others for
    the characters from U+0100 on.

    >>> byte_alphabet()["Ġ"], byte_alphabet()["a"]
    (32, 97)
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}
