"""How many more characters a DFA can read before it accepts: what a length limit leaves alive.

A length limit (``minLength``, ``maxLength``) is a counter beside the DFA, since a DFA that counts
to 10,000 has 10,000 copies of every state. A state q after c characters is alive if some accepted
continuation has n characters with minimum ≤ c + n ≤ maximum. The sets L_n of the states from
which exactly n characters can follow are computed backwards,

    L_0 = states that accept, or reach one that does without completing a character
    L_n = states from which one more character leads into L_{n−1}

until a set repeats, after which all do. Mostly the numbers n of a state are an interval: then its
two ends are enough. Where they are not (an even length and a limit), the sets are kept.

| symbol | name          | shape                                                       |
|--------|---------------|-------------------------------------------------------------|
| n      | characters    | int                                                         |
| least  | smallest n    | int64[S], ``NEVER`` for a state that cannot accept           |
| most   | largest n     | int64[S], ``UNBOUNDED`` if there is none                     |
| levels | L_n           | bool[N, S]                                                  |

Left out: languages whose sets L_n need more than ``MAX_LEVELS_BYTES`` before they repeat.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from refllm.decode.grammar.errors import GrammarError

UNBOUNDED = 1 << 60
NEVER = 1 << 61
MAX_LEVELS_BYTES = 1 << 28


@dataclass(frozen=True, eq=False)
class RemainingCounts:
    """The numbers of characters that may follow in each state, as intervals or as the sets L_n.

    ``levels`` is None where every state's numbers are an interval; else the rows from
    ``repeats`` on repeat for ever.
    """

    least: np.ndarray
    most: np.ndarray
    levels: np.ndarray | None
    repeats: int

    def within(self, states: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Whether some number n of characters with low ≤ n ≤ high may follow, bool[K], for
        states int[K] and limits int64[K].
        """
        low = np.maximum(low, 0)
        possible: np.ndarray = (
            (self.least[states] <= high) & (self.most[states] >= low) & (low <= high)
        )
        if self.levels is None:
            return possible
        for i in np.flatnonzero(possible):
            possible[i] = self._any(int(states[i]), int(low[i]), int(high[i]))
        return possible

    def possible(self, state: int, low: int, high: int) -> bool:
        """``within`` for one state."""
        low = max(low, 0)
        if low > high or self.least[state] > high or self.most[state] < low:
            return False
        return self.levels is None or self._any(state, low, high)

    def _any(self, state: int, low: int, high: int) -> bool:
        """Whether the state is in one of L_low … L_high."""
        assert self.levels is not None
        stored = len(self.levels)
        period = stored - self.repeats
        if low >= stored:  # the same place in the first repetition
            shift = (low - self.repeats) // period * period
            low -= shift
            high -= shift
        column = self.levels[:, state]
        if column[low : high + 1].any():
            return True
        if high < stored:
            return False
        return bool(column[self.repeats : self.repeats + high - stored + 1].any())


def remaining_counts(
    table: np.ndarray, increments: np.ndarray, accepting: np.ndarray
) -> RemainingCounts:
    """The numbers of characters that can follow each state of a DFA: ``table`` int32[S, 256],
    ``increments`` int8[S, 256] with 1 where a byte completes a character, ``accepting`` bool[S].

    >>> table = np.array([[0] * 256, [2] * 256, [1] * 256])  # an even number of bytes
    >>> counts = remaining_counts(table, np.ones((3, 256), "int8"), np.array([0, 1, 0], bool))
    >>> one = np.array([1])
    >>> counts.within(one, one * 3, one * 3), counts.within(one, one * 3, one * 4)
    (array([False]), array([ True]))
    """
    edges = _distinct_edges(table, increments)
    source, target, adds = edges[:, 0], edges[:, 1], edges[:, 2] > 0
    still = source[~adds], target[~adds]
    counting = source[adds], target[adds]
    level = _closed(accepting.copy(), still)
    least = np.full(len(table), NEVER, dtype=np.int64)
    most = np.full(len(table), -1, dtype=np.int64)
    levels: list[np.ndarray] = []
    seen: dict[bytes, int] = {}
    intervals = True
    while (key := np.packbits(level).tobytes()) not in seen:
        n = len(levels)
        seen[key] = n
        intervals &= not (level & (least < n) & (most < n - 1)).any()
        least[level & (least == NEVER)] = n
        most[level] = n
        levels.append(level)
        if n * len(table) > MAX_LEVELS_BYTES:
            raise GrammarError("a length limit on this pattern needs too many states")
        before = np.zeros(len(table), dtype=bool)
        before[counting[0][level[counting[1]]]] = True
        level = _closed(before, still)
    repeats = seen[key]
    period = np.stack(levels[repeats:])
    some = period.any(axis=0)
    intervals &= bool((period.all(axis=0) == some).all())
    most[some] = UNBOUNDED
    # only what the intervals cannot say is kept
    return RemainingCounts(least, most, None if intervals else np.stack(levels), repeats)


def _distinct_edges(table: np.ndarray, increments: np.ndarray) -> np.ndarray:
    """The edges between live states, each once: int64[E, 3] of source, target, increment."""
    states = np.arange(len(table), dtype=np.int64)[:, None]
    codes = (states * len(table) + table) * 2 + increments
    codes = np.unique(codes[table > 0])
    pairs = codes >> 1
    return np.stack([pairs // len(table), pairs % len(table), codes & 1], axis=1)


def _closed(level: np.ndarray, edges: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """``level`` bool[S] and every state from which these edges lead into it; in place."""
    source, target = edges
    while True:
        added = source[level[target] & ~level[source]]
        if not len(added):
            return level
        level[added] = True
