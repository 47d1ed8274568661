"""From token ids to text while they are generated: whole characters only, and nothing past a
stop string.

Two filters of a stream, used one after the other. ``Utf8Stream`` turns ids into text. A
token of byte-level BPE is a string of bytes, and may end in the middle of a character;
``decode`` shows such a tail as U+FFFD, as it does bytes that are invalid for good. Only the
next token tells which. ``StopStrings`` ends the text before the first stop string, which
may begin in one token and end in a later one.

Decoding all ids again for each token costs n²/2 ids for n tokens. The method of TGI and
vLLM decodes a short window that begins with tokens already shown, for decoders that treat
the first token differently (SentencePiece drops its leading space), and shows what is new
once it does not end in U+FFFD. So does ``tokenizers.DecodeStream``. Two things differ here:
invalid bytes are shown at once, where those hold them back, and decode them again, until a
valid character ends them; and text that byte fallback may still change is held back, where
DecodeStream raises an error.

Left out: decoders that rewrite text of earlier tokens (a Replace after Fuse); they raise a
ValueError when it happens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from refllm.checkpoints.tokenizer import Tokenizer
from refllm.errors import InputError

_REPLACEMENT = "\ufffd"  # what decode() writes for bytes that form no character
# SentencePiece's byte fallback: one token, one byte
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Utf8Stream:
    """Text of a growing list of token ids, in whole characters.

    The strings that ``push`` and ``flush`` return, joined, are exactly
    ``tokenizer.decode(all ids)``. Held back is at most the last character of that text, and
    only while it is U+FFFD. With SentencePiece's byte fallback consecutive byte tokens are
    held back to their end: one bad byte there turns all of them into U+FFFD.

    ``decoded`` counts the ids passed to the tokenizer: a few for each push, however long
    the text is.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.decoded = 0
        self._window: list[int] = []  # one id for context, then those whose text is not certain
        self._shown = ""  # the part of the window's text that was returned

    def copy(self) -> Utf8Stream:
        """A second stream in the same state."""
        other = Utf8Stream(self.tokenizer)
        other._window = self._window[:]
        other._shown = self._shown
        return other

    def push(self, token_id: int) -> str:
        """Take the next id; return the text that is certain now, which may be empty.

        ValueError if the decoder rewrites text that was returned.
        """
        token = self.tokenizer.inner.id_to_token(token_id)
        if token is None:
            return ""  # decode() skips an id that names no token
        self._window.append(token_id)
        if _BYTE_TOKEN.fullmatch(token):
            return ""
        new = self._unseen()
        unfinished = new.endswith(_REPLACEMENT)
        new = new[: len(new) - unfinished]
        if new:
            # Something was settled, so what is unfinished begins in this very token: bytes
            # that were unfinished before it either still are, and then nothing is settled,
            # or end where they stood. And UTF-8 restarts at every leading byte: this token
            # alone is context enough.
            self._window = [token_id]
            alone = self._decode()
            self._shown = alone[: len(alone) - unfinished]
        return new

    def flush(self) -> str:
        """Return the text that is held back, and start a new stream."""
        rest = self._unseen()
        self._window = []
        self._shown = ""
        return rest

    def _unseen(self) -> str:
        """The window's text that was not returned yet."""
        text = self._decode()
        if not text.startswith(self._shown):
            raise InputError(
                f"the tokenizer's decoder turned {self._shown!r} into {text!r} after it was "
                "streamed"
            )
        return text[len(self._shown) :]

    def _decode(self) -> str:
        """The window's text."""
        self.decoded += len(self._window)
        return self.tokenizer.decode(self._window)


class StopStrings:
    """Ends a stream of text before the first stop string, wherever the chunks are cut.

    The text ends as soon as any stop string is complete, so no token is sampled after it. Of
    several that end at the same character the longest is ``matched``. This depends on the
    text alone, not on how it is cut. Text is held back only from the first position where a
    stop string may have begun. (llama.cpp and vLLM look for stop strings after each token,
    so which of two they find depends on the tokens.)

    With ``include`` the text ends after the stop string. A stop string counts only if it ends
    in text of a push with ``stopping`` (``min_tokens``: earlier text may begin it).

    Attributes: ``stopped``, and ``matched``, the stop string or None.

    >>> stops = StopStrings("def ")
    >>> stops.push("x = 1  # de"), stops.push("faults"), stops.push(" def f")
    ('x = 1  # ', 'defaults', ' ')
    >>> stops.stopped, stops.push("more")
    (True, '')
    >>> StopStrings(["z", "xyzQQ"]).push("wxyzQQ")
    'wxy'
    """

    def __init__(self, stops: str | Iterable[str] = (), *, include: bool = False):
        """``stops``: one string or several; ValueError for an empty one, which would match
        everywhere.
        """
        self.include = include
        self.stops = (stops,) if isinstance(stops, str) else tuple(stops)
        if not all(isinstance(s, str) and s for s in self.stops):
            raise InputError(f"a stop string must be text, and must not be empty: {self.stops}")
        self.stopped = False
        self.matched: str | None = None
        # (stop string, where the last other one ends within it: 0, or that one is complete first)
        self._inner_ends = [(s, _last_inner_end(s, self.stops)) for s in self.stops]
        self._held = ""
        self._stopping = True  # whether stop strings may end in the text of the last push
        self._ignored = 0  # characters of what is held in which no stop string may end

    def copy(self) -> StopStrings:
        """A second filter in the same state."""
        other = StopStrings(self.stops, include=self.include)
        other.stopped = self.stopped
        other.matched = self.matched
        other._held = self._held
        other._stopping = self._stopping
        other._ignored = self._ignored
        return other

    def push(self, text: str, *, stopping: bool = True) -> str:
        """Take the next chunk of text; return the text that is safe to show, which is empty
        after the stop.
        """
        self._stopping = stopping
        if not stopping and not self.stopped:
            self._ignored = len(self._held) + len(text)
        return self._advance(text, ended=False)

    def flush(self) -> str:
        """End the text: return what is held back, up to a stop string."""
        return self._advance("", ended=True)

    def _advance(self, text: str, ended: bool) -> str:
        """Append ``text`` to what is held back; return what can be shown."""
        if self.stopped:
            return ""
        held = self._held + text
        found = []
        for s in self.stops:
            at = held.find(s, max(0, self._ignored - len(s) + 1))
            if at >= 0:
                found.append((at + len(s), at))  # the first that ends; of those the longest
        if found:
            end, start = min(found)
            self.stopped = True
            self.matched = held[start:end]
            self._held = ""
            return held[:end] if self.include else held[:start]
        shown = len(held) if ended else self._may_begin(held)
        self._held = held[shown:]
        self._ignored = max(0, self._ignored - shown)
        return held[:shown]

    def _may_begin(self, held: str) -> int:
        """The first position from which ``held`` may continue into a stop string; its
        length if there is none.
        """
        longest = max(map(len, self.stops), default=1)
        for i in range(max(0, len(held) - longest + 1), len(held)):
            for s, inner_end in self._inner_ends:
                if not s.startswith(held[i:]):
                    continue
                if not inner_end or i + inner_end <= self._ignored or not self._stopping:
                    return i
        return len(held)


def _last_inner_end(stop: str, stops: tuple[str, ...]) -> int:
    """The last position before the end of ``stop`` at which another stop string within it
    ends; 0 if there is none.

    >>> _last_inner_end("aabb", ("ab", "aabb"))
    3
    """
    for end in range(len(stop) - 1, 0, -1):
        if stop[:end].endswith(stops):
            return end
    return 0
