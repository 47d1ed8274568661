"""What a program appends to its state: text, generated text, a decision, a message of a chat.

Source: Zheng et al. 2024 (SGLang), §2, table 1: ``gen``, ``select``, ``extend``, roles.

::

    @program
    def answer(s, question):
        s += user(question)
        s += assistant(gen("answer", max_tokens=32, stop="\n"))

| primitive                  | what it appends                                                  |
|----------------------------|------------------------------------------------------------------|
| text                       | the text                                                         |
| ``gen(name, …)``           | what the model generates; ``s[name]`` is its text                |
| ``select(name, choices)``  | the choice that the model finds likeliest, by one of three rules |
| ``system user assistant``  | a message of a chat, of any of the above                         |

``+`` joins them: ``"The answer is " + gen("n", regex="[0-9]+")``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from refllm.array_types import Json
from refllm.errors import InputError, alternatives
from refllm.lang.choices import RULES


class Part:
    """Something that ``+`` joins with text and other parts."""

    def __add__(self, other: str | Part) -> Joined:
        return Joined([*parts_of(self), *parts_of(other)])

    def __radd__(self, other: str) -> Joined:
        return Joined([*parts_of(other), *parts_of(self)])


@dataclass(frozen=True)
class Joined(Part):
    """Parts in their order."""

    parts: Sequence[str | Part]


@dataclass(frozen=True)
class Gen(Part):
    """Text that the model generates; ``options`` are those of ``serve.Request``."""

    name: str | None = None
    max_tokens: int = 128
    options: Json = field(default_factory=dict)
    grammar: Json = field(default_factory=dict)  # of ``decode.grammar.compile``


@dataclass(frozen=True)
class Select(Part):
    """One of ``choices``, by ``rule`` (``lang.choices``)."""

    name: str | None
    choices: tuple[str, ...]
    rule: str = "token_length_normalized"


@dataclass(frozen=True)
class Role(Part):
    """A message of a chat: ``role`` says who speaks."""

    role: str
    content: str | Part


GRAMMARS = ("regex", "json_schema", "ebnf")


def gen(
    name: str | None = None,
    max_tokens: int = 128,
    *,
    choices: Sequence[str] | None = None,
    **options: Any,
) -> Gen | Select:
    """Text that the model generates, at most ``max_tokens`` tokens.

    ``regex=``, ``json_schema=`` or ``ebnf=`` constrain it (``decode.grammar.compile``). Other
    ``options`` are fields of ``serve.Request``: ``stop=``, ``temperature=``, ``seed=`` … With
    ``choices`` it is ``select``.

    >>> gen("n", 4, regex="[0-9]+", temperature=0.5)
    Gen(name='n', max_tokens=4, options={'temperature': 0.5}, grammar={'regex': '[0-9]+'})
    """
    if choices is not None:
        if options:
            raise InputError(
                f"gen with choices decides between them, and takes no {', '.join(options)}"
            )
        return select(name, choices)
    grammar = {key: options.pop(key) for key in GRAMMARS if key in options}
    if len(grammar) > 1:
        raise InputError(f"gen takes one grammar, got {' and '.join(grammar)}")
    for key in ("n", "best_of", "beam", "prompt", "request_id"):
        if key in options:
            raise InputError(f"gen appends one continuation to a state: it takes no {key}=")
    return Gen(name, max_tokens, options, grammar)


def select(
    name: str | None, choices: Sequence[str], rule: str = "token_length_normalized"
) -> Select:
    """The choice that the model finds likeliest after the text so far.

    ``rule`` is ``"token_length_normalized"``, ``"greedy_token_selection"`` or
    ``"unconditional_likelihood_normalized"`` (``lang.choices``).

    >>> select("answer", ["yes", "no"]).choices
    ('yes', 'no')
    """
    if isinstance(choices, str) or not all(isinstance(choice, str) for choice in choices):
        raise InputError(f"select takes a list of texts, got {choices!r}")
    if not choices or not all(choices):
        raise InputError("select takes at least one choice, and none that is empty")
    if len(set(choices)) < len(choices):
        raise InputError("select takes choices that differ")
    if rule not in RULES:
        raise InputError(f"select does not know the rule {rule!r}: {alternatives(rule, RULES)}")
    return Select(name, tuple(choices), rule)


def system(content: str | Part) -> Role:
    """A message of the system."""
    return Role("system", content)


def user(content: str | Part) -> Role:
    """A message of the user."""
    return Role("user", content)


def assistant(content: str | Part) -> Role:
    """A message of the model."""
    return Role("assistant", content)


def parts_of(part: object) -> list[str | Part]:
    """The parts in their order; TypeError for what a program cannot append."""
    if isinstance(part, Joined):
        return list(part.parts)
    if isinstance(part, (str, Part)):
        return [part]
    raise TypeError(
        f"a program appends text, gen, select and messages, not {type(part).__name__}: {part!r}"
    )
