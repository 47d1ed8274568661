"""The text of one sequence while its tokens arrive: whole characters, up to a stop string.

The engine makes one for requests with a callback or with stop strings; all other requests
are decoded at their end. ``decode.detokenizer`` has the two filters.

Left out: text before the output (a prompt is never repeated).
"""

from __future__ import annotations

from collections.abc import Sequence

from refllm.checkpoints.tokenizer import Tokenizer
from refllm.decode.detokenizer import StopStrings, Utf8Stream
from refllm.decode.output_params import OutputParams


class Detokenizer:
    """Collects the text of pushed tokens until ``take`` publishes it.

    A step of the engine may fail between the two. ``restart`` then discards what was not
    published.
    """

    def __init__(self, tokenizer: Tokenizer, params: OutputParams):
        self._tokenizer = tokenizer
        self._params = params
        self.text = ""  # published
        self._begin()

    def _begin(self) -> None:
        self.count = 0  # tokens so far
        self._new = ""  # not published yet
        self._characters = Utf8Stream(self._tokenizer)
        self._stop_strings = StopStrings(
            self._params.stop or (), include=self._params.include_stop_str_in_output
        )

    def copy(self) -> Detokenizer:
        """A second one in the same state."""
        other = Detokenizer(self._tokenizer, self._params)
        other.text = self.text
        other.count = self.count
        other._new = self._new
        other._characters = self._characters.copy()
        other._stop_strings = self._stop_strings.copy()
        return other

    @property
    def stopped(self) -> bool:
        """Whether the text has reached a stop string."""
        return self._stop_strings.stopped

    @property
    def matched(self) -> str | None:
        """The stop string that the text has reached."""
        return self._stop_strings.matched

    def push(self, token: int) -> None:
        """Take the next token. A stop string counts only if it ends after ``min_tokens``."""
        self.count += 1
        stopping = self.count > self._params.min_tokens
        text = self._characters.push(token)
        self._new += self._stop_strings.push(text, stopping=stopping)

    def flush(self) -> None:
        """No more tokens will come: release the text that is held back."""
        stopping = self.count > self._params.min_tokens
        self._new += self._stop_strings.push(self._characters.flush(), stopping=stopping)
        self._new += self._stop_strings.flush()  # nothing follows a stop string

    def append_end(self, token: int) -> None:
        """Add the text of the token that ended the output; it completes no stop string."""
        self._new += self._tokenizer.decode([token])

    def take(self) -> str:
        """The text since the last call; it counts as published from now on."""
        new = self._new
        self._new = ""
        self.text += new
        return new

    def restart(self, published: Sequence[int]) -> None:
        """Go back to the state in which the text of these tokens had just been published."""
        self._begin()
        self.text = ""
        for token in published:
            self.push(token)
        self.take()
