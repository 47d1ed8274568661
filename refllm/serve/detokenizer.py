"""The text of one sequence while its tokens arrive: whole characters, up to a stop string.

The engine makes one for requests with a callback or with stop strings; all other requests
are decoded at their end. ``decode.detokenizer`` has the two filters.

Left out: text before the output (a prompt is never repeated).
"""

from __future__ import annotations

from collections.abc import Sequence

from refllm.checkpoints.tokenizer import Tokenizer
from refllm.decode.detokenizer import StopStrings, Utf8Stream


class Detokenizer:
    """Collects the text of pushed tokens until ``take`` publishes it.

    A step of the engine may fail between the two. ``restart`` then discards what was not
    published.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self._tokenizer = tokenizer
        self._stop = stop
        self.text = ""  # published
        self._new = ""  # not published yet
        self._characters = Utf8Stream(tokenizer)
        self._stop_strings = StopStrings(stop)

    @property
    def stopped(self) -> bool:
        """Whether the text has reached a stop string."""
        return self._stop_strings.stopped

    @property
    def matched(self) -> str | None:
        """The stop string that the text has reached."""
        return self._stop_strings.matched

    def push(self, token: int) -> None:
        """Take the next token."""
        self._new += self._stop_strings.push(self._characters.push(token))

    def flush(self) -> None:
        """No more tokens will come: release the text that is held back."""
        self._new += self._stop_strings.push(self._characters.flush())
        self._new += self._stop_strings.flush()  # nothing follows a stop string

    def take(self) -> str:
        """The text since the last call; it counts as published from now on."""
        new = self._new
        self._new = ""
        self.text += new
        return new

    def restart(self, published: Sequence[int]) -> None:
        """Go back to the state in which the text of these tokens had just been published."""
        self._characters = Utf8Stream(self._tokenizer)
        self._stop_strings = StopStrings(self._stop)
        self.text = ""
        self._new = ""
        for token in published:
            self.push(token)
        self.take()
