"""The tokenizer: byte-level BPE by the ``tokenizers`` library, loaded from a
``tokenizer.json`` or trained.

Byte-level means that every byte is a symbol of the base alphabet: any text round-trips, and
there are no unknown tokens. A token may therefore end in the middle of a UTF-8 character; see
``Utf8Stream`` in ``decode.detokenizer``.

The literal text of a special token, such as ``<|endoftext|>`` inside a document, is
ordinary text here and never becomes the special token: a user's text must not end a
document or start a system turn. The ``tokenizers`` library and ``transformers`` do the
opposite by default; ``parse_special=True`` does so too, for prompts that are written with
control tokens (for chats see ``chat_template_tokens``). Either way the ids decode to the same text.

Some checkpoints have a tokenizer with more ids than the embedding has rows (a padding token
that was never trained). Such an id is rejected where a text contains it (``limit``).
A checkpoint without a tokenizer has a ``MissingTokenizer``: the network still computes with
token ids, and whatever needs text says what is missing.

| checkpoint                           | tokenizer                                        |
|--------------------------------------|--------------------------------------------------|
| a directory with tokenizer.json      | that                                             |
| a GGUF file with a vocabulary        | that, see ``gguf_tokenizer``                     |
| either, and ``tokenizer=DIR``        | DIR's tokenizer.json; its own is not looked at   |
| without any                          | a ``MissingTokenizer``: ids in, ids out          |

Left out: training other kinds of tokenizers (``tokenizers`` loads them); SentencePiece's
tokenizer.model, and vocab.json with merges.txt (``transformers`` converts both to
tokenizer.json); truncation and padding.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from operator import index
from pathlib import Path

from tokenizers import Tokenizer as _Tokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from refllm.atomic import write_atomic
from refllm.checkpoints.tensor_files import CheckpointError
from refllm.errors import InputError
from refllm.model.config import ModelConfig

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"


class Tokenizer:
    """Text ↔ token ids: a thin wrapper around ``tokenizers.Tokenizer`` (in ``.inner``).

    >>> tokenizer = Tokenizer.train(["ab ab ab"], vocab_size=259)
    >>> tokenizer.encode("abab")  # two merges on top of 256 bytes and the end token
    [257, 257]
    >>> tokenizer.decode([257, 257])
    'abab'

    ``limit`` is the number of rows of the model's embedding, None without a model: ``encode``
    returns ids below it. ``end_tokens`` are the model's end-of-text ids, None without a model.
    ``available`` is False for a ``MissingTokenizer`` alone.
    """

    available = True
    end_tokens: frozenset[int] | None = None

    def __init__(self, inner: _Tokenizer, limit: int | None = None) -> None:
        self.inner = inner
        self.limit = limit
        # the literal text of a special token is ordinary text
        self.inner.encode_special_tokens = True
        # some published files enable it, and would cut a text silently
        self.inner.no_truncation()
        self.inner.no_padding()

    @cached_property
    def _parsing(self) -> _Tokenizer:
        """A second tokenizer that parses special tokens; toggling the flag of one tokenizer
        would be a race between threads.
        """
        # the flag is not stored in the file, so it is off here
        return _Tokenizer.from_str(self.inner.to_str())

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Load a ``tokenizer.json``; ValueError if it is missing or broken."""
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path} is missing: refllm needs the fast tokenizer's tokenizer.json")
        try:
            return cls(_Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{path} is not a valid tokenizer.json: {error}") from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train byte-level BPE with GPT-2's word split; id 0 is ``<|endoftext|>``.

        The vocabulary is smaller than ``vocab_size`` if the texts have too few distinct
        pairs to merge. The same texts give the same tokenizer. ValueError if ``vocab_size``
        cannot hold the 256 bytes and the end token, or is beyond 2²⁰: the library reserves
        memory for all of it, and a failure there ends the process.
        """
        if not 257 <= vocab_size <= 2**20:
            raise InputError(
                "a byte-level vocabulary needs at least 257 tokens, got "
                f"{vocab_size}; at most 2**20"
            )
        inner = _Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        # documents start with the end token in training, so an encoded prompt does too
        inner.post_processor = processors.TemplateProcessing(
            single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
        )
        return cls(inner)

    @property
    def vocab_size(self) -> int:
        """The largest id in use plus one."""
        return max(self.inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, *, special: bool = False, parse_special: bool = False) -> list[int]:
        """Token ids of ``text``; ValueError for anything but Unicode text, and for a text
        that contains a token beyond ``limit``.

        With ``special``, also the tokens that the tokenizer's file adds before and after
        it. With ``parse_special``, the literal text of a special token becomes that token
        (see the module's docstring).
        """
        inner = self._parsing if parse_special else self.inner
        try:
            ids: list[int] = inner.encode(text, add_special_tokens=special).ids
        except TypeError as error:  # from the library: the text has no UTF-8
            raise InputError(_no_text(text)) from error
        self.check_limit(ids)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of many texts, in parallel."""
        texts = list(texts)
        try:
            encodings = self.inner.encode_batch(texts, add_special_tokens=False)
        except TypeError:
            return [self.encode(text) for text in texts]  # names the first bad text
        batch: list[list[int]] = [encoding.ids for encoding in encodings]
        for ids in batch:
            self.check_limit(ids)
        return batch

    def check_limit(self, ids: Sequence[int]) -> None:
        """ValueError if an id has no row in the model's embedding."""
        if self.limit is None or max(ids, default=-1) < self.limit:
            return
        beyond = next(i for i in ids if i >= self.limit)
        raise InputError(
            f"the text contains the token {self.inner.id_to_token(beyond)!r}: its id {beyond} has "
            f"no row in the model's embedding of {self.limit}, so the model cannot read it"
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; bytes that form no UTF-8 character become U+FFFD, special tokens
        are kept.

        An id that the tokenizer does not know gives no text, since some models pad their
        vocabulary. ValueError for an id that no vocabulary can hold.
        """
        try:
            text: str = self.inner.decode([index(i) for i in ids], skip_special_tokens=False)
        except OverflowError as error:
            raise InputError("a token id lies within 0..2**32 - 1") from error
        return text

    def save(self, path: str | Path) -> None:
        """Write ``tokenizer.json``; OSError leaves the old one unchanged."""
        write_atomic(Path(path), self.inner.to_str(pretty=True))


class MissingTokenizer(Tokenizer):
    """Stands in for the tokenizer of a checkpoint that has none: every use of it raises an
    ``InputError`` that says so.
    """

    available = False

    def __init__(self, where: str | Path) -> None:
        self.where = where
        self.limit = None

    @property
    def inner(self) -> _Tokenizer:  # type: ignore[override]
        """Raises ``InputError``."""
        raise InputError(
            f"{self.where} has no tokenizer that refllm reads, so the model takes and gives token "
            "ids alone: for text, pass a folder with its tokenizer.json (--tokenizer DIR)"
        )


# --- the tokenizer of a checkpoint ----------------------------------------------------------


def read_tokenizer(
    directory: Path, config: ModelConfig, named: str | os.PathLike[str] | None = None
) -> Tokenizer:
    """The tokenizer of a directory, or the ``named`` one; CheckpointError if it is broken."""
    if named is not None:
        return read_named_tokenizer(named, config)
    file = directory / TOKENIZER_FILE
    if not file.is_file():
        return MissingTokenizer(directory)
    return _read(file, config)


def read_named_tokenizer(path: str | os.PathLike[str], config: ModelConfig) -> Tokenizer:
    """The tokenizer of a folder with a tokenizer.json, or of such a file.

    Raises
    ------
    CheckpointError
        if there is none, or if it is broken.
    """
    file = Path(os.path.expanduser(path))
    if file.is_dir():
        file = file / TOKENIZER_FILE
    if not file.is_file():
        raise CheckpointError(
            f"tokenizer: {os.fspath(path)} is no folder with a {TOKENIZER_FILE}, nor such a file"
        )
    return _read(file, config)


def _read(file: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer in a file."""
    try:
        tokenizer = Tokenizer.from_file(file)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return fitted(tokenizer, config, file)


def fitted(tokenizer: Tokenizer, config: ModelConfig, where: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer itself, limited to ids that have a row in the embedding, with the model's
    end tokens.

    A tokenizer with fewer ids is common, since models pad their vocabulary. One with more
    exists too: a padding token that was added and never trained. CheckpointError for one
    without any token.
    """
    if tokenizer.available:
        if tokenizer.vocab_size == 0:
            raise CheckpointError(f"{os.fspath(where)}: the tokenizer has no tokens")
        tokenizer.limit = config.vocab_size
        tokenizer.end_tokens = frozenset(config.eos_token_ids)
    return tokenizer


def _no_text(text: object) -> str:
    """Why ``text`` cannot be encoded."""
    if not isinstance(text, str):
        return f"only a str can be encoded, got {type(text).__name__}"
    at = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), 0)
    return (
        f"character {at} of the text is no Unicode ({text[at : at + 1]!r}, half a character): is "
        "its source UTF-8?"
    )
