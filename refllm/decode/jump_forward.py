"""Jump-forward decoding: what a grammar forces is appended without sampling.

Source: Zheng et al. 2024 (SGLang), section 4 and appendix B.3 (compressed finite-state machines,
jump-forward decoding).

Where a grammar leaves no choice of the next bytes (``Grammar.forced``), as in the name of the only
property of an object, these bytes follow whatever is sampled. Their tokens are appended at once,
and computed in the next forward pass beside each other: every appended token saves a pass.

The token that was sampled last is not computed yet, so it is encoded again together with the
forced text: with ``{"`` sampled before ``name": `` the tokens are those that the tokenizer writes
for ``{"name": ``. Tokens before it stay. At the other end the last token of the forced text is left
to be sampled where a longer one is legal: after ``"colours":`` follows ``[`` in every text, and a
model that wants to write strings takes ``["``. If ``[`` were appended, the token that comes next
would be drawn as after an unusual encoding, and the list would often be empty.

**This changes the distribution of the output.** Forced bytes may have several encodings, of which
sampling would choose one by its probability; here it is always the tokenizer's, and what follows
is sampled after that one. The forced bytes themselves are the same: every output is one of the
grammar. So jumping is off by default; ``tests/decode/test_jump_forward.py`` enumerates the
difference. With a drafter, accepted drafts of forced text stay as they are.

| symbol | name                                                          |
|--------|---------------------------------------------------------------|
| t      | the token that was sampled last                               |
| f      | the text that is forced after it, in whole characters         |
| u      | the tokens that stand in the place of t: the encoding of t f  |

Left out: jumps in beams and in static batches; encoding tokens again that were computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from refllm.checkpoints.tokenizer import Tokenizer
from refllm.decode.constraint import ILLEGAL, ConstraintStates, legal_tokens
from refllm.decode.sampling_params import SamplingParams
from refllm.decode.speculative.interface import NO_DRAFTS, Proposal

_REPLACEMENT = "\ufffd"  # what a tokenizer writes for bytes that form no character


class JumpForward(NamedTuple):
    """Jumps along the grammar of one request, with the model's tokenizer."""

    states: ConstraintStates
    tokenizer: Tokenizer

    def replace_last(self, output: Sequence[int], most: int) -> list[int]:
        """The tokens that stand in the place of the last one of ``output``, at most ``most``: the
        token itself where nothing is forced.
        """
        last = [output[-1]]
        forced = whole_characters(self.states.forced(output))
        if not forced or most < 2:
            return last
        before = list(output[:-1])
        text = self.tokenizer.decode(output)
        if text.endswith(_REPLACEMENT):
            return last  # in the middle of a character
        for tokens in self._encodings(before, last, text, forced):
            whole = [*before, *tokens]
            exact = self.tokenizer.decode(whole) == text + forced
            if exact and self.states.state(whole) is not ILLEGAL:
                if len(tokens) > 1 and self._reaches_beyond(whole[:-1], tokens[-1]):
                    tokens = tokens[:-1]
                return tokens[:most]
        return last

    def _reaches_beyond(self, before: list[int], token: int) -> bool:
        """Whether a token that is longer than ``token`` may follow ``before``, where the text of
        ``token`` is forced: the others that may are its beginnings, so few are looked at.
        """
        mask = self.states.mask(before)
        assert mask is not None, "the tokens before are legal"
        length = len(self.tokenizer.decode([token]))
        legal = legal_tokens(mask)
        return any(len(self.tokenizer.decode([other])) > length for other in legal)

    def _encodings(
        self, before: list[int], last: list[int], text: str, forced: str
    ) -> Sequence[list[int]]:
        """Encodings of the last token's text and the forced one, the most natural first: as part
        of the whole output (if the tokens before it are the tokenizer's own, else it is rejected);
        by itself; after the last token.
        """
        encode = self.tokenizer.encode
        found = [
            encode(text + forced)[len(before) :],
            encode(self.tokenizer.decode(last) + forced),
            [*last, *encode(forced)],
        ]
        return [tokens for tokens in found if tokens]


def whole_characters(data: bytes) -> str:
    """The text of UTF-8 bytes up to a character that is cut off at the end; empty where they begin
    in the middle of one.

    >>> whole_characters("né".encode()), whole_characters("né".encode()[:-1])
    ('né', 'n')
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        return data[: error.start].decode("utf-8")


class NoDrafter:
    """Proposes nothing: speculative generation with it is plain generation, which can jump."""

    gamma = 0

    def propose(
        self, tokens: Sequence[int], count: int, sampling: SamplingParams, rng: np.random.Generator
    ) -> Proposal:
        """No drafts."""
        return NO_DRAFTS

    def observe(self, best: Sequence[int], accepted: int) -> None:
        """Nothing to learn."""
