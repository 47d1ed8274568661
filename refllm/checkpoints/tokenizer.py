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

Left out: training other kinds of tokenizers (``tokenizers`` loads them);
truncation and padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from operator import index
from pathlib import Path

from tokenizers import Tokenizer as _Tokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from refllm.atomic import write_atomic
from refllm.errors import InputError

END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """Text ↔ token ids: a thin wrapper around ``tokenizers.Tokenizer`` (in ``.inner``).

    >>> tokenizer = Tokenizer.train(["ab ab ab"], vocab_size=259)
    >>> tokenizer.encode("abab")  # two merges on top of 256 bytes and the end token
    [257, 257]
    >>> tokenizer.decode([257, 257])
    'abab'
    """

    def __init__(self, inner: _Tokenizer) -> None:
        self.inner = inner
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
        """Token ids of ``text``; ValueError for anything but Unicode text.

        With ``special``, also the tokens that the tokenizer's file adds before and after
        it. With ``parse_special``, the literal text of a special token becomes that token
        (see the module's docstring).
        """
        inner = self._parsing if parse_special else self.inner
        try:
            ids: list[int] = inner.encode(text, add_special_tokens=special).ids
        except TypeError as error:  # from the library: the text has no UTF-8
            raise InputError(_no_text(text)) from error
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of many texts, in parallel."""
        texts = list(texts)
        try:
            return [e.ids for e in self.inner.encode_batch(texts, add_special_tokens=False)]
        except TypeError:
            return [self.encode(text) for text in texts]  # names the first bad text

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


def _no_text(text: object) -> str:
    """Why ``text`` cannot be encoded."""
    if not isinstance(text, str):
        return f"only a str can be encoded, got {type(text).__name__}"
    at = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), 0)
    return (
        f"character {at} of the text is no Unicode ({text[at : at + 1]!r}, half a character): is "
        "its source UTF-8?"
    )
