"""Structured output: a constraint says which tokens may follow, and its states follow a sequence.

Sources: Willard and Louf 2023 (token masks from an automaton), section 4; Dong et al. 2024
(XGrammar), section 3. ``refllm.decode.grammar.compile`` makes such constraints; any other
object with the same methods serves as well.

| symbol | name                                                      | shape      |
|--------|-----------------------------------------------------------|------------|
| state  | what the constraint remembers of an output                | hashable   |
| mask   | which tokens may follow, on the host                      | bool[V]    |
| ends   | end tokens: they may follow exactly where the state is    |            |
|        | accepting, and nothing follows them                       |            |

A state is a function of the output alone. So nothing has to be told of preemption, rejected
drafts, beams or failed steps: ``ConstraintStates`` computes the state of any output, and is fast
where it shares a prefix with a recent one.

An output is *complete* where its state is accepting and nothing but end tokens may follow. It
ends there, without sampling an end token; so a model without end tokens ends there, too.

Left out: constraints that read the prompt; constraints that change their mind (masks of one state
that differ).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from refllm.errors import InputError, message

Mask = npt.NDArray[np.bool_]  # [V], on the host


class Constraint(Protocol):
    """What decoding asks of a grammar. States are compared and kept, and never changed."""

    @property
    def start(self) -> Any:
        """The state of the empty output."""

    def mask(self, state: Any) -> Mask:
        """Which tokens may follow, bool[V]; shorter masks forbid the other tokens."""

    def advance(self, state: Any, token: int) -> Any:
        """The state after one more token; InputError for a token that may not follow."""

    def accepting(self, state: Any) -> bool:
        """Whether the output may end here."""


class JumpingConstraint(Constraint, Protocol):
    """A constraint that knows which bytes must follow: what ``jump_forward`` needs."""

    def forced(self, state: Any) -> bytes:
        """The bytes that follow in every output; empty where there is a choice."""


class ConstraintFailure(Exception):
    """A constraint has raised ``error``, which no constraint should."""

    def __init__(self, error: BaseException):
        super().__init__(f"the grammar raised {type(error).__name__}: {message(error)}")
        self.error = error


class NoTokenLeft(InputError):
    """No token may follow: what the grammar allows, something else forbids."""


class _State:
    """A state of no constraint."""

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return self.name


ENDED = _State("ENDED")  # after an end token
ILLEGAL = _State("ILLEGAL")  # after a token that may not follow those before it


class _Trail(NamedTuple):
    """An output, and the states after 0, 1, … of its tokens."""

    tokens: list[int]
    states: list[Any]

    def shared_length(self, output: Sequence[int]) -> int:
        """How many first tokens ``output`` shares, by bisection: slices are compared fast."""
        low = 0
        high = min(len(self.tokens), len(output))
        middle = high  # all of them, as a rule
        while low < high:
            if self.tokens[low:middle] == list(output[low:middle]):
                low = middle
            else:
                high = middle - 1
            middle = (low + high + 1) // 2
        return low


def check_constraint(constraint: object, *, jumps: bool = False) -> None:
    """InputError unless ``constraint`` is None or has the methods of a ``Constraint``; with
    ``jumps`` also ``forced``.
    """
    if constraint is None:
        if jumps:
            raise InputError("jump_forward needs a grammar: it appends what the grammar forces")
        return
    wanted = ["mask", "advance", "accepting", *(["forced"] if jumps else [])]
    missing = [name for name in wanted if not callable(getattr(constraint, name, None))]
    if not hasattr(constraint, "start") or isinstance(constraint, type):
        missing.insert(0, "start")
    if missing:
        raise InputError(
            "grammar must be one of refllm.decode.grammar.compile(…), or an object with start, "
            f"mask, advance and accepting: {type(constraint).__name__} has no {missing[0]}"
        )


class ConstraintStates:
    """The states of a constraint after outputs of one request, each computed once.

    Up to ``width`` outputs are remembered with the states of all their prefixes: one for each
    sequence of the request.

    >>> class AB:  # a, then b
    ...     start = 0
    ...     def mask(self, state): return np.arange(2) == state
    ...     def advance(self, state, token): return state + 1
    ...     def accepting(self, state): return state == 2
    >>> states = ConstraintStates(AB(), vocabulary=4, end_tokens=[3])
    >>> states.mask([]).tolist(), states.mask([0, 1]).tolist(), states.is_complete([0, 1])
    ([True, False, False, False], [False, False, False, True], True)
    """

    def __init__(
        self,
        constraint: Constraint,
        vocabulary: int,
        end_tokens: Collection[int] = (),
        width: int = 1,
    ):
        """``end_tokens`` are those of the model: they replace what the constraint's masks say
        of end tokens, since a checkpoint may have more of them than its tokenizer names.
        """
        self.constraint = constraint
        self.vocabulary = vocabulary
        self.end_tokens = frozenset(end_tokens)
        self.width = width
        # end tokens that the constraint names and the model does not know as such: never legal
        self._foreign = frozenset(getattr(constraint, "end_tokens", ())) - self.end_tokens
        # the most recently used last
        self._trails: list[_Trail] = []

    def state(self, output: Sequence[int]) -> Any:
        """The state after ``output``; ILLEGAL if a token of it may not follow those before it."""
        shared, trail = self._nearest(output)
        if shared == len(output):  # perhaps a prefix: what follows it stays remembered
            return trail.states[shared]
        del trail.tokens[shared:]
        del trail.states[shared + 1 :]
        for token in output[shared:]:
            state = self._advance(trail.states[-1], token)
            if state is ILLEGAL:
                return ILLEGAL
            trail.tokens.append(token)
            trail.states.append(state)
        return trail.states[-1]

    def mask(self, output: Sequence[int]) -> Mask | None:
        """Which tokens may follow ``output``, bool[V], not to be changed; None if ``output``
        itself is illegal.
        """
        state = self.state(output)
        if state is ILLEGAL:
            return None
        if state is ENDED:
            return np.zeros(self.vocabulary, bool)
        return self._with_ends(self._call("mask", state), self.accepts(state))

    def is_complete(self, output: Sequence[int]) -> bool:
        """Whether ``output`` may end and nothing but end tokens may follow it."""
        state = self.state(output)
        if state is ENDED:
            return True
        if state is ILLEGAL or not self.accepts(state):
            return False
        mask = self._with_ends(self._call("mask", state), accepting=True)
        return count_legal(mask) == len(self.end_tokens)

    def accepts(self, state: Any) -> bool:
        """Whether an output with this state may end."""
        return state is ENDED or bool(self._call("accepting", state))

    def forced(self, output: Sequence[int]) -> bytes:
        """The bytes that must follow ``output``; empty where there is a choice."""
        state = self.state(output)
        if state is ILLEGAL or state is ENDED:
            return b""
        return bytes(self._call("forced", state))

    def legal_length(self, output: Sequence[int], tokens: Sequence[int]) -> int:
        """How many of ``tokens`` may follow ``output`` one after another."""
        whole = [*output, *tokens]
        for count in range(1, len(tokens) + 1):
            if self.state(whole[: len(output) + count]) is ILLEGAL:
                return count - 1
        return len(tokens)

    # --- the constraint ---------------------------------------------------------------------

    def _advance(self, state: Any, token: int) -> Any:
        """The state after ``token``, or ILLEGAL if it may not follow."""
        if state is ENDED:
            return ILLEGAL
        if token in self.end_tokens:
            return ENDED if self.accepts(state) else ILLEGAL
        if token in self._foreign:
            return ILLEGAL
        try:
            return self._call("advance", state, token)
        except ConstraintFailure as failure:
            if isinstance(failure.error, InputError):
                return ILLEGAL
            raise

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call the constraint; ConstraintFailure for what it raises, except what ends the
        program.
        """
        try:
            return getattr(self.constraint, name)(*arguments)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            raise ConstraintFailure(error) from error

    def _with_ends(self, mask: Mask, accepting: bool) -> Mask:
        """The mask for the whole vocabulary, with the model's end tokens; a copy only where
        something differs.
        """
        missing = self.vocabulary - len(mask)
        if missing < 0:
            raise ConstraintFailure(
                InputError(
                    f"a mask of {len(mask)} tokens for a vocabulary of {self.vocabulary}: the "
                    "grammar was compiled for another tokenizer"
                )
            )
        if missing:
            mask = np.concatenate([mask, np.zeros(missing, bool)])
        wrong = [t for t in self.end_tokens if bool(mask[t]) != accepting]
        foreign = [t for t in self._foreign if mask[t]]
        if wrong or foreign:
            mask = mask.copy()
            mask[foreign] = False
            mask[wrong] = accepting
        return mask

    # --- trails -----------------------------------------------------------------------------

    def _nearest(self, output: Sequence[int]) -> tuple[int, _Trail]:
        """The trail that shares most tokens with ``output``, and how many: now the most recently
        used one. Where they diverge and other sequences may still need it, a copy of it.
        """
        if not self._trails:
            self._trails.append(_Trail([], [self._start()]))
        lengths = [trail.shared_length(output) for trail in self._trails]
        shared = max(lengths)
        at = lengths.index(shared)
        trail = self._trails[at]
        if self.width > 1 and shared < min(len(trail.tokens), len(output)):
            trail = _Trail(trail.tokens[:shared], trail.states[: shared + 1])
            at = 0  # the least recently used one makes room  # mutate: equivalent (less work)
            if len(self._trails) < self.width:
                self._trails.append(trail)
                return shared, trail
        del self._trails[at]
        self._trails.append(trail)
        return shared, trail

    def _start(self) -> Any:
        """The state of the empty output."""
        try:
            return self.constraint.start
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            raise ConstraintFailure(error) from error


def count_legal(mask: Mask, tokens: Iterable[int] | None = None) -> int:
    """How many tokens a mask allows; of ``tokens`` only, if they are given.

    >>> count_legal(np.array([True, False, True])), count_legal(np.array([True, False]), [0, 1])
    (2, 1)
    """
    if tokens is None:
        return int(np.count_nonzero(mask))
    return sum(bool(mask[token]) for token in tokens)


def legal_tokens(mask: Mask) -> list[int]:
    """The tokens that a mask allows.

    >>> legal_tokens(np.array([True, False, True]))
    [0, 2]
    """
    found: list[int] = np.flatnonzero(mask).tolist()
    return found


def stacked(masks: Sequence[Mask]) -> npt.NDArray[np.bool_]:
    """bool[len(masks), V], on the host."""
    return np.stack(masks)
