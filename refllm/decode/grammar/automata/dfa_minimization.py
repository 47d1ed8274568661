"""The smallest automaton of a language: trim, merge equivalent states, number them in order.

Two states are equivalent if the same words are accepted from them, with the same labels. The
partition refinement is that of Valmari and Lehtinen, "Efficient minimization of DFAs with partial
transition functions" (STACS 2008): a form of Hopcroft's algorithm in which transitions into the
dead state cost nothing. Of a block that splits, the smaller half gets the new number, so each
transition is looked at O(log states) times.

The result is canonical: states are numbered breadth first and classes by their first symbol, so
that two automata of one language are equal tables (``same_language``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from refllm.decode.grammar.automata.alphabet import Alphabet, merged
from refllm.decode.grammar.automata.dfa import DEAD, DFA


class _Partition:
    """Elements in blocks. ``split`` separates what is marked from what is not."""

    def __init__(self, keys: Sequence[int]) -> None:
        numbers: dict[int, int] = {}
        self.block = [numbers.setdefault(key, len(numbers)) for key in keys]
        self.members: list[set[int]] = [set() for _ in numbers]
        for element, block in enumerate(self.block):
            self.members[block].add(element)

    def split(self, marked: Iterable[int]) -> None:
        """Divide each block into its marked and its other elements, where it has both."""
        touched: dict[int, set[int]] = {}
        block = self.block
        for element in marked:
            touched.setdefault(block[element], set()).add(element)
        for number, inside in touched.items():
            whole = self.members[number]
            if len(inside) == len(whole):
                continue
            if 2 * len(inside) <= len(whole):
                smaller = inside
                whole -= inside
            else:
                smaller = whole - inside
                self.members[number] = inside
            for element in smaller:
                block[element] = len(self.members)
            self.members.append(smaller)


def equivalent_states(table: Sequence[Sequence[int]], labels: Sequence[int]) -> list[int]:
    """The block of each state: equal for two states iff they are equivalent.

    The automaton must be trimmed: state 0 is dead, from every other state some word is accepted.
    """
    # The dead state keeps a block of its own, which no transition enters.
    states = _Partition([-1, *labels[1:]])
    tails: list[int] = []
    classes: list[int] = []
    incoming: list[list[int]] = [[] for _ in labels]
    for state, row in enumerate(table):
        for cls, target in enumerate(row):
            if target != DEAD:
                incoming[target].append(len(tails))
                tails.append(state)
                classes.append(cls)
    # Transitions in one block read the same class and lead into states not yet told apart.
    transitions = _Partition(classes)
    done_transitions = 0
    done_states = 1
    while done_transitions < len(transitions.members):
        states.split([tails[index] for index in transitions.members[done_transitions]])
        done_transitions += 1
        while done_states < len(states.members):
            members = states.members[done_states]
            transitions.split([index for state in members for index in incoming[state]])
            done_states += 1
    return states.block


def trim(
    alphabet: Alphabet, table: Sequence[Sequence[int]], start: int, labels: Sequence[int]
) -> DFA:
    """The same language with only the states that are reached and from which words are accepted.

    State 0 must be dead already. States keep their order, the start becomes state 1.
    """
    reached = {start}
    order = [start]
    before: list[list[int]] = [[] for _ in labels]
    for state in order:
        for target in set(table[state]):
            before[target].append(state)
            if target not in reached:
                reached.add(target)
                order.append(target)
    pending = [state for state in order if labels[state]]
    live = set(pending)
    while pending:
        for state in before[pending.pop()]:
            if state not in live:
                live.add(state)
                pending.append(state)
    live.discard(DEAD)
    kept = [DEAD, *(state for state in order if state in live)]
    if len(kept) == len(labels) and kept == list(range(len(kept))):
        return DFA(alphabet, table, start, tuple(labels))
    number = [DEAD] * len(labels)
    for index, state in enumerate(kept):
        number[state] = index
    rows = [[number[target] for target in table[state]] for state in kept]
    return DFA(alphabet, rows, number[start], tuple(labels[state] for state in kept))


def minimize(dfa: DFA) -> DFA:
    """The automaton of the same language (and labels) with the fewest states and classes."""
    if dfa.empty:
        alphabet = Alphabet(dfa.size, (0,), (0,))
        return DFA(alphabet, [[DEAD]], DEAD, (0,))
    alphabet, table = _merge_classes(dfa.alphabet, dfa.table)
    block = equivalent_states(table, dfa.labels)
    representative = {number: state for state, number in enumerate(block)}
    # Number the blocks breadth first from the start.
    order = [block[DEAD], block[dfa.start]]
    number = {block[DEAD]: DEAD, block[dfa.start]: 1}
    rows = []
    for current in order:
        row = []
        for target in table[representative[current]]:
            index = number.setdefault(block[target], len(order))
            if index == len(order):
                order.append(block[target])
            row.append(index)
        rows.append(row)
    alphabet, rows = _merge_classes(alphabet, rows)
    labels = tuple(dfa.labels[representative[current]] for current in order)
    return DFA(alphabet, rows, 1, labels)


def _merge_classes(
    alphabet: Alphabet, table: Sequence[Sequence[int]]
) -> tuple[Alphabet, list[list[int]]]:
    """Join the classes whose columns are equal; classes are numbered by their first symbol."""
    columns = list(zip(*table, strict=True))
    numbers: dict[tuple[int, ...], int] = {}
    group = [-1] * len(columns)
    for cls in alphabet.classes:
        if group[cls] < 0:
            group[cls] = numbers.setdefault(columns[cls], len(numbers))
    if len(numbers) == len(columns) and group == list(range(len(columns))):
        return alphabet, [list(row) for row in table]
    rows = [list(row) for row in zip(*numbers, strict=True)]
    return merged(alphabet, group), rows


def same_language(a: DFA, b: DFA) -> bool:
    """Whether two automata over the same symbols accept the same words with the same labels."""
    first = minimize(a)
    second = minimize(b)
    return (
        first.alphabet == second.alphabet
        and first.labels == second.labels
        and first.start == second.start
        and list(map(list, first.table)) == list(map(list, second.table))
    )
