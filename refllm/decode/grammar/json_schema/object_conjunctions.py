"""Conjunctions of the atoms of objects: made simple, compared, written as shapes.

The atoms are those of ``object_rules.py``. What is seen at once: a required key whose value cannot
exist, more required keys than are allowed, a witness that no key can be. A witness that only one
key can be makes that key required. Each name that any atom mentions gets a node of
its own; all other keys fall into classes by the patterns that they match. Without patterns there
is one class, and no automaton of keys is built.

Left out: contradictions that take a search to see (``object_inhabitation.py``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from refllm.decode.grammar.automata import dfa_operations
from refllm.decode.grammar.automata.alphabet import CHARACTERS
from refllm.decode.grammar.automata.dfa import DFA
from refllm.decode.grammar.automata.dfa_builders import anything
from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.json_schema.array_rules import (
    ALWAYS,
    NEVER,
    Nodes,
    SignedLocation,
    opposite,
)
from refllm.decode.grammar.json_schema.formulas import Atom, Conjunction, Count, count_of
from refllm.decode.grammar.json_schema.key_sets import Base, KeySet, named
from refllm.decode.grammar.json_schema.object_rules import Member, Members, Required
from refllm.decode.grammar.json_schema.shapes import KeyClass, Node, ObjectShape, Witness
from refllm.decode.grammar.json_schema.string_rules import word_language

MAX_CLASSES = 64  # of keys that no schema names
MAX_KEY_STATES = 5_000  # of the automata of all classes of one object


class KeyNodes(Nodes, Protocol):
    """What the rules of objects ask of the algebra, beside what those of arrays ask."""

    def key_matches(self, base: Base, key: str) -> bool:
        """Whether a key is in the language of a pattern or of a schema."""
        ...


class KeyLanguages(KeyNodes, Protocol):
    """What shapes ask of the algebra beside that."""

    def key_language(self, base: Base) -> DFA:
        """The DFA over characters of the keys of a pattern or of a schema."""
        ...


class ObjectFacts:
    """The atoms of a conjunction, sorted by kind."""

    def __init__(self, conjunction: Conjunction, nodes: KeyNodes) -> None:
        self.nodes = nodes
        self.members = [a for a in conjunction if isinstance(a, Members)]
        self.witnesses = [a for a in conjunction if isinstance(a, Member)]
        self.required = {a.key for a in conjunction if isinstance(a, Required)}
        self.count = count_of(conjunction)
        self.single: dict[str, list[SignedLocation]] = {}
        self.several: list[Members] = []  # those of more than one key
        for atom in self.members:
            key = atom.keys.only()
            if key is None:
                self.several.append(atom)
            else:
                self.single.setdefault(key, []).append(atom.schema)

    def schemas_of(self, key: str) -> list[SignedLocation]:
        """The schemas that the value of a key fits."""
        matches = self.nodes.key_matches
        shared = [a.schema for a in self.several if a.keys.contains(key, matches)]
        return self.single.get(key, []) + shared

    def forbidden(self, keys: KeySet) -> bool:
        """Whether no key of a set can occur, as far as is seen."""
        if any(a.schema == NEVER and keys.within(a.keys) for a in self.several):
            return True
        if keys.negated or keys.bases:
            return False
        return all(NEVER in self.schemas_of(key) for key in keys.names)

    def candidates(self, witness: Member) -> list[str] | None:
        """The keys that may be a witness, if all other keys are forbidden by name; else None."""
        allowed = [
            atom.keys.names
            for atom in self.several
            if atom.schema == NEVER and atom.keys.negated and not atom.keys.bases
        ]
        if not allowed:
            if witness.keys.negated or witness.keys.bases:
                return None
            allowed = [witness.keys.names]
        found = []
        for key in sorted(frozenset.intersection(*allowed)):
            if witness.keys.contains(key, self.nodes.key_matches):
                node = self.nodes.node([*self.schemas_of(key), witness.schema])
                if not self.nodes.quickly_empty(node):
                    found.append(key)
        return found


def disjoint(one: ObjectFacts, other: ObjectFacts) -> bool:
    """Whether a required key alone shows that no object fits both conjunctions.

    A cheap look at discriminators, such as a required ``type`` with different constants.
    """
    nodes = one.nodes
    return any(
        nodes.quickly_empty(nodes.node(one.single[key] + other.single[key]))
        for key in one.required | other.required
        if key in one.single and key in other.single
    )


def simplify(conjunction: Conjunction, nodes: KeyNodes) -> Conjunction | None:
    """An equal conjunction with fewer atoms; None if no object fits it, as far as is seen."""
    facts = ObjectFacts(conjunction, nodes)
    low = max(facts.count.minimum, len(facts.required), 1 if facts.witnesses else 0)
    high = facts.count.maximum
    if high is not None and low > high:
        return None
    for key in facts.required:
        if nodes.quickly_empty(nodes.node(facts.schemas_of(key))):
            return None
    dropped: set[Atom] = set()
    for witness in facts.witnesses:
        if witness.keys.nothing or facts.forbidden(witness.keys):
            return None
        if any(
            atom.schema == opposite(witness.schema) and witness.keys.within(atom.keys)
            for atom in facts.several
        ):
            return None
        if _witnessed(witness, facts):
            dropped.add(witness)
            continue
        candidates = facts.candidates(witness)
        if candidates == []:
            return None
        if candidates is not None and len(candidates) == 1:
            only = Members(named(candidates[0]), witness.schema)
            return simplify(conjunction - {witness} | {Required(candidates[0]), only}, nodes)
    found = frozenset(
        atom
        for atom in conjunction
        if not isinstance(atom, Count) and atom not in dropped and not _idle(atom)
    )
    if low > len(facts.required) or high is not None:
        found |= {Count(low, high)}
    return found


def _idle(atom: Atom) -> bool:
    """Whether an atom asks nothing of any object."""
    return isinstance(atom, Members) and (atom.schema == ALWAYS or atom.keys.nothing)


def _witnessed(witness: Member, facts: ObjectFacts) -> bool:
    """Whether a required key is sure to be the one that a witness asks for."""
    matches = facts.nodes.key_matches
    for key in facts.required:
        if witness.keys.contains(key, matches):
            unlike = [*facts.schemas_of(key), opposite(witness.schema)]
            if facts.nodes.quickly_empty(facts.nodes.node(unlike)):
                return True
    return False


def implied(conjunction: Conjunction, atom: Atom, nodes: KeyNodes) -> bool:
    """Whether every object of a conjunction fits ``atom``, as far as is seen."""
    if atom in conjunction:
        return True
    facts = ObjectFacts(conjunction, nodes)
    match atom:
        case Count():
            count = facts.count.narrowed(Count(len(facts.required), None))
            return count.narrowed(atom) == count
        case Member():
            return _witnessed(atom, facts)
        case Members(keys, schema):
            if any(
                each.schema in (schema, NEVER) and keys.within(each.keys) for each in facts.several
            ):
                return True
            if keys.negated or keys.bases:
                return False
            return all(
                nodes.quickly_empty(nodes.node([*facts.schemas_of(key), opposite(schema)]))
                for key in keys.names
            )
    return False


def shape(conjunction: Conjunction, nodes: KeyLanguages) -> ObjectShape:
    """The shape of a simplified conjunction."""
    facts = ObjectFacts(conjunction, nodes)
    position: dict[str, int] = {}
    for atom in facts.members:
        key = atom.keys.only()
        if key is not None and atom.position >= 0:
            position[key] = min(atom.position, position.get(key, atom.position))
    names = {name for atom in facts.members for name in atom.keys.names} | facts.required
    names.update(name for atom in facts.witnesses for name in atom.keys.names)
    last = len(names) + max(position.values(), default=0)
    order = tuple(sorted(names, key=lambda key: (position.get(key, last), key)))
    witnesses = [
        Witness(_language(atom.keys, nodes), nodes.node([atom.schema]))
        for atom in sorted(facts.witnesses, key=repr)
    ]
    return ObjectShape(
        named={key: nodes.node(facts.schemas_of(key)) for key in order},
        classes=tuple(_classes(facts.several, nodes)),
        required=frozenset(facts.required),
        minimum=max(facts.count.minimum, len(facts.required)),
        maximum=facts.count.maximum,
        witnesses=tuple(witnesses),
        order=order,
    )


def _classes(atoms: Iterable[Members], nodes: KeyLanguages) -> Iterable[KeyClass]:
    """A partition of the keys that no atom names, with the node of each part."""
    atoms = [a for a in atoms if a.keys.negated or a.keys.bases]
    bases = sorted({base for atom in atoms for base in atom.keys.bases}, key=repr)
    cells: list[tuple[frozenset[Base], DFA]] = [(frozenset(), anything(CHARACTERS))]
    for base in bases:
        language = nodes.key_language(base)
        split: list[tuple[frozenset[Base], DFA]] = []
        for inside, cell in cells:
            split.append((inside | {base}, dfa_operations.intersect(cell, language)))
            split.append((inside, dfa_operations.difference(cell, language)))
        cells = [(inside, cell) for inside, cell in split if not cell.empty]
        states = sum(cell.states for _, cell in cells)
        if len(cells) > MAX_CLASSES or states > MAX_KEY_STATES:
            raise GrammarError(
                "the patterns of keys overlap in too many ways: use fewer or simpler ones",
                keyword="patternProperties",
            )
    by_node: dict[Node, list[DFA]] = {}
    for inside, cell in cells:
        schemas = [a.schema for a in atoms if bool(a.keys.bases & inside) != a.keys.negated]
        by_node.setdefault(nodes.node(schemas), []).append(cell)
    for node, parts in by_node.items():
        yield KeyClass(parts[0] if len(parts) == 1 else dfa_operations.union(*parts), node)


def _language(keys: KeySet, nodes: KeyLanguages) -> DFA | None:
    """The DFA of a set of keys; None for all of them."""
    if keys.everything:
        return None
    parts = [nodes.key_language(base) for base in sorted(keys.bases, key=repr)]
    if keys.names:
        parts.append(word_language(keys.names))
    found = parts[0] if len(parts) == 1 else dfa_operations.union(*parts)
    return dfa_operations.complement(found) if keys.negated else found
