"""The tokenizer: byte-level BPE by the ``tokenizers`` library, loaded from or trained into ``tokenizer.json``.

Byte-level means that every byte is a symbol of the base alphabet: any text round-trips, and nothing is ever
unknown. A token may therefore end in the middle of a UTF-8 character; see ``Utf8Stream`` in ``decode.text``.

Left out: other tokenizer kinds are loaded as they are (``tokenizers`` knows them) but never trained here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer as _Tokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """Text ↔ token ids, a thin face over ``tokenizers.Tokenizer`` (kept in ``.inner``)."""

    def __init__(self, inner: _Tokenizer):
        self.inner = inner

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Load a ``tokenizer.json``; ValueError if it is missing or broken."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path} is missing: refllm needs the fast tokenizer's tokenizer.json")
        try:
            return cls(_Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a valid tokenizer.json: {error}") from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train byte-level BPE with GPT-2's word split; id 0 is ``<|endoftext|>``."""
        inner = _Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
        inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        return cls(inner)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id in use."""
        return max(self.inner.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; no special token is added."""
        ids: list[int] = self.inner.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of many texts, in parallel."""
        return [e.ids for e in self.inner.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; bytes that form no UTF-8 character become U+FFFD, special tokens are kept."""
        text: str = self.inner.decode([int(i) for i in ids], skip_special_tokens=False)
        return text

    def save(self, path: str | Path) -> None:
        self.inner.save(str(path))
