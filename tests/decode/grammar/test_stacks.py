"""Joined stacks go on as each of them does, and equal forks are one object."""

from __future__ import annotations

from dataclasses import dataclass

from refllm.decode.grammar.stacks import Fork, Joinable, Stack, join, parts


@dataclass(frozen=True)
class Named(Joinable):
    """A frame that is nothing but its name."""

    name: str

    def resume(self, label_bits, text, below):
        yield None, below


def stack(names):
    """The stack with these frames, the first on top."""
    result = None
    for name in reversed(names):
        result = Stack(Named(name), result)
    return result


def paths(joined):
    """The stacks that a stack stands for, as texts."""
    found = set()
    for part in parts(joined):
        if part is None:
            found.add("")
        else:
            found |= {part.frame.name + rest for rest in paths(part.below)}
    return found


def test_a_joined_stack_stands_for_exactly_its_stacks():
    names = {"axy", "ay", "bz", "b", "a", "ax", ""}
    joined = join([stack(name) for name in sorted(names)])
    assert paths(joined) == names
    assert len(joined.frame.stacks) == 3  # one with a on top, one with b, and the end
    assert join([joined, stack("c")]) is not joined
    assert paths(join([joined, stack("c")])) == names | {"c"}


def test_one_stack_is_itself_and_equal_forks_are_one_object():
    assert join([stack("ab"), stack("ab")]) == stack("ab")
    assert join([None]) is None
    first = join([stack("a"), stack("b")])
    assert first is join([stack("b"), stack("a"), first])
    assert isinstance(first.frame, Fork)
