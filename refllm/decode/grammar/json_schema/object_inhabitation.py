"""Whether some object fits a shape, or completes one that is partly written.

``completable`` is asked about the empty object by ``inhabitation.py``, and may be asked about the
keys written so far: which required keys are left, who can be the witnesses that are left, and
whether enough keys are left for ``minimum``.

Left out: more than ``MOST_WITNESSES`` witnesses, which raise a ``GrammarError``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

from refllm.decode.grammar.automata.dfa import DFA
from refllm.decode.grammar.automata.dfa_operations import intersect
from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.json_schema.shapes import KeyClass, Node, ObjectShape, Witness

MOST_WITNESSES = 6  # of one shape; the search tries every way to give them keys
Ask = Callable[[Node], bool]
Join = Callable[..., Node]


def inhabited(shape: ObjectShape, join: Join, ask: Ask) -> bool:
    """Whether any object fits a shape. ``ask(node)``: whether any value fits a node;
    ``join(a, b)``: the node of the values that fit both.
    """
    return completable(shape, frozenset(), shape.witnesses, join, ask)


def completable(
    shape: ObjectShape,
    used: frozenset[str],
    witnesses: Sequence[Witness],
    join: Join,
    ask: Ask,
) -> bool:
    """Whether an object with the keys ``used`` can be completed with other keys, so that
    ``witnesses`` (those not yet seen) and everything else of the shape hold.
    """
    missing = shape.required - used
    room = None if shape.maximum is None else shape.maximum - len(used)
    needed = max(shape.minimum - len(used), len(missing))
    if room is not None and needed > room:
        return False
    answers = [ask(shape.named[key]) for key in missing]  # ask about all of them at once
    if not all(answers):
        return False
    if needed > len(missing) and not _enough_keys(shape, used, needed, ask):
        return False
    if not witnesses:
        return True
    if len(witnesses) > MOST_WITNESSES:
        raise GrammarError(
            f"an object must have more than {MOST_WITNESSES} keys that are not named, each for "
            "another reason: write fewer negated schemas",
            keyword="not",
        )
    return _Placement(shape, used, witnesses, join, ask).possible(room)


def _enough_keys(shape: ObjectShape, used: frozenset[str], needed: int, ask: Ask) -> bool:
    """Whether ``needed`` other keys can occur."""
    count = 0
    for key, node in shape.named.items():
        count += key not in used and ask(node)
        if count >= needed:
            return True
    for each in shape.classes:
        if ask(each.value):
            if not each.keys.finite:
                return True
            taken = used | shape.named.keys()
            count += (each.keys.cardinality or 0) - sum(map(each.keys.matches, taken))
            if count >= needed:
                return True
    return False


class _Placement:
    """The search for keys that can be the witnesses: one key may be several of them."""

    def __init__(
        self,
        shape: ObjectShape,
        used: frozenset[str],
        witnesses: Sequence[Witness],
        join: Join,
        ask: Ask,
    ) -> None:
        self.shape = shape
        self.used = used
        self.witnesses = witnesses
        self.join = join
        self.ask = ask
        self._words: dict[tuple[int, frozenset[int]], list[str]] = {}

    def possible(self, room: int | None) -> bool:
        """Whether all witnesses find keys, with at most ``room`` new keys in all."""
        missing = self.shape.required - self.used
        optional = None if room is None else room - len(missing)
        return self._place(0, {}, optional)

    def _place(self, index: int, chosen: dict[str, Node], optional: int | None) -> bool:
        """Give keys to the witnesses from ``index`` on; ``chosen`` has those given so far."""
        if index == len(self.witnesses):
            return True
        witness = self.witnesses[index]
        for key, node in self._candidates(index):
            before = chosen.get(key, node)
            free = key in chosen or key in self.shape.required
            if not free and optional == 0:
                continue
            both = self.join(before, witness.value)
            if not self.ask(both):
                continue
            left = optional if free or optional is None else optional - 1
            if self._place(index + 1, {**chosen, key: both}, left):
                return True
        return False

    def _candidates(self, index: int) -> Iterator[tuple[str, Node]]:
        """Keys that may be a witness, with their nodes: named ones, then some of each class."""
        keys = self.witnesses[index].keys
        for key, node in self.shape.named.items():
            if key not in self.used and (keys is None or keys.matches(key)):
                yield key, node
        others = [i for i in range(len(self.witnesses)) if i != index]
        for number, each in enumerate(self.shape.classes):
            seen: set[str] = set()
            for size in range(len(others), -1, -1):
                for group in combinations(others, size):
                    for key in self._unnamed(number, each, frozenset({index, *group})):
                        if key not in seen:
                            seen.add(key)
                            yield key, each.value

    def _unnamed(self, number: int, each: KeyClass, group: frozenset[int]) -> list[str]:
        """As many keys of a class as there are witnesses, each fit to be any of ``group``."""
        if (number, group) not in self._words:
            languages: list[DFA] = [each.keys]
            for i in group:
                keys = self.witnesses[i].keys
                if keys is not None:
                    languages.append(keys)
            language = languages[0] if len(languages) == 1 else intersect(*languages)
            taken = self.used | self.shape.named.keys()
            words = language.words(len(self.witnesses) + len(taken))
            texts = ("".join(map(chr, word)) for word in words)
            free = [text for text in texts if text not in taken]
            self._words[number, group] = free[: len(self.witnesses)]
        return self._words[number, group]
