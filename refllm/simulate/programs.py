"""Programs whose requests share prefixes: what a prefix cache is for, and one control that
shares nothing.

Source: the kinds of Zheng et al. 2024 (SGLang), section 6, and of Kwon et al. 2023, section
6.4, as token ids alone.

| program            | a request's prompt is                                  | shared                      | O     |
|--------------------|--------------------------------------------------------|-----------------------------|-------|
| few-shot           | E examples and a question                              | the examples, by all        | short |
| self-consistency   | a question with its instructions, asked n times        | the prompt, by its n        | some  |
| chat               | system prompt, all turns so far, the next message      | everything but the message  | some  |
| tree of thought    | the path of thoughts so far, and a word for the sequence | each path, by its subtree   | some  |
| RAG                | a document, drawn by Zipf's law, and a question        | the document, by its askers | short |
| unique             | something that nobody else asks                        | nothing                     | some  |

A conversation goes on when its answer is there, a tree when the node above has been
thought: a ``Program`` is asked what follows after every answer, and sees the tokens.
Everything else is drawn beforehand and lengths are fixed, so that every policy serves the
same.

| symbol | name                                        |
|--------|---------------------------------------------|
| a      | Zipf's exponent: P(document i) ∝ 1 / i**a   |
| P, O   | tokens of a prompt and of its answer        |

Left out: branches that are cut for being bad, programs that fork within an answer
(``Request.n`` does that).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from refllm.serve.request import Request

Tokens = Callable[[int], Sequence[int]]
Follow = Callable[[Request, Sequence[int]], list[Request]]


def _nothing(request: Request, answer: Sequence[int]) -> list[Request]:
    return []


@dataclass
class Program:
    """Requests that are there at once, and ``follow(request, answer)``: those that an
    answer calls forth.
    """

    name: str
    requests: list[Request]
    follow: Follow = field(default=_nothing)


class RandomIds:
    """Ids that mean nothing: for speed and for sharing, where the model's words do not
    matter.
    """

    def __init__(self, rng: np.random.Generator, vocabulary: int):
        self.rng = rng
        self.vocabulary = vocabulary

    def __call__(self, count: int) -> list[int]:
        ids: list[int] = self.rng.integers(1, self.vocabulary, count).tolist()
        return ids


class Passages:
    """Consecutive pieces of a text, from the beginning; none is handed out twice before all
    were.
    """

    def __init__(self, ids: Sequence[int]):
        if not len(ids):
            raise ValueError("passages need a text")
        self.ids = list(ids)
        self.at = 0

    def __call__(self, count: int) -> list[int]:
        begin = self.at
        piece = list[int]()
        while len(piece) < count:
            piece += self.ids[self.at : self.at + count - len(piece)]
            self.at = (begin + len(piece)) % len(self.ids)
        return piece


def few_shot(
    tokens: Tokens,
    questions: int,
    *,
    examples: int = 5,
    example: int = 80,
    question: int = 40,
    answer: int = 4,
) -> Program:
    """One task: every question after the same ``examples``."""
    shared = [*tokens(examples * example)]
    asked = [_request((i,), [*shared, *tokens(question)], answer) for i in range(questions)]
    return Program("few-shot", asked)


def self_consistency(
    tokens: Tokens, questions: int, *, samples: int = 8, question: int = 320, answer: int = 16
) -> Program:
    """Every question ``samples`` times, each sampled with a seed of its own: the answers
    are then voted on.
    """
    asked = []
    for i in range(questions):
        prompt = [*tokens(question)]
        asked += [
            replace(_request((i, j), prompt, answer), temperature=0.7, seed=i * samples + j)
            for j in range(samples)
        ]
    return Program("self-consistency", asked)


def chat(
    tokens: Tokens,
    conversations: int,
    *,
    turns: int = 4,
    system: int = 160,
    message: int = 40,
    answer: int = 24,
) -> Program:
    """Conversations under one system prompt; each turn repeats all that was said before it."""
    shared = [*tokens(system)]
    messages = [[[*tokens(message)] for _ in range(turns)] for _ in range(conversations)]

    def follow(request: Request, said: Sequence[int]) -> list[Request]:
        one, turn = _parts(request)
        if turn + 1 == turns:
            return []
        return [
            _request((one, turn + 1), [*request.prompt, *said, *messages[one][turn + 1]], answer)
        ]

    first = [_request((i, 0), [*shared, *messages[i][0]], answer) for i in range(conversations)]
    return Program("chat", first, follow)


def tree_of_thought(
    tokens: Tokens,
    problems: int,
    *,
    branches: int = 3,
    depth: int = 3,
    problem: int = 200,
    thought: int = 24,
    word: int = 4,
) -> Program:
    """Every thought is continued in ``branches`` ways, ``depth`` levels deep."""

    words = [[*tokens(word)] for _ in range(branches)]  # "first approach:", "second approach:", …

    def grow(path: tuple[int, ...], text: Sequence[int]) -> list[Request]:
        return [_request((*path, i), [*text, *words[i]], thought) for i in range(branches)]

    def follow(request: Request, said: Sequence[int]) -> list[Request]:
        path = _parts(request)
        if len(path) <= depth:
            return grow(path, [*request.prompt, *said])
        return []

    roots = [grow((i,), tokens(problem)) for i in range(problems)]
    return Program("tree of thought", [request for root in roots for request in root], follow)


def rag(
    tokens: Tokens,
    questions: int,
    rng: np.random.Generator,
    *,
    documents: int = 20,
    a: float = 1.0,
    document: int = 400,
    question: int = 32,
    answer: int = 12,
) -> Program:
    """Questions about documents, a few of which are asked about most."""
    texts = [[*tokens(document)] for _ in range(documents)]
    which = rng.choice(documents, questions, p=zipf(documents, a))
    return Program(
        "RAG",
        [
            _request((i,), [*texts[d], *tokens(question)], answer)
            for i, d in enumerate(which.tolist())
        ],
    )


def unique(tokens: Tokens, questions: int, *, question: int = 400, answer: int = 12) -> Program:
    """The control: nothing is shared, so a cache can only cost."""
    return Program(
        "unique", [_request((i,), [*tokens(question)], answer) for i in range(questions)]
    )


def zipf(count: int, a: float) -> np.ndarray[Any, Any]:
    """Probability of each of ``count`` documents, the most popular first: 1 / i**a over the
    sum of these.
    """
    p = np.arange(1, count + 1, dtype=np.float64) ** -a
    share: np.ndarray[Any, Any] = p / p.sum()
    return share


def shuffled(program: Program, rng: np.random.Generator) -> Program:
    """The same requests in another order: as strangers would send them."""
    return replace(
        program, requests=[program.requests[i] for i in rng.permutation(len(program.requests))]
    )


def best_hit_rate(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]] = ()) -> float:
    """The most that any order and any cache can save of the ``prompts``, page 1.

    1 − (distinct prefixes that no answer has computed) / (tokens asked): each of these must
    be read once. ``answers[i]`` follows prompts[i]; all of it but its last token has been
    computed when somebody repeats it. (The last token of a prompt is computed always, for
    its logits: where a prompt is the prefix of another, even this rate is out of reach.)
    """
    nodes: dict[tuple[int, int], int] = {}  # (node above, token) → node, of the trie of all texts
    read: set[int] = set()
    written: set[int] = set()
    for i, prompt in enumerate(prompts):
        at = 0
        for token in prompt:
            at = nodes.setdefault((at, token), len(nodes) + 1)
            read.add(at)
        for token in answers[i][:-1] if answers else ():
            at = nodes.setdefault((at, token), len(nodes) + 1)
            written.add(at)
    return 1 - len(read - written) / sum(map(len, prompts))


def _request(name: tuple[int, ...], prompt: Sequence[int], answer: int) -> Request:
    return Request(prompt, answer, id=name, ignore_eos=True)


def _parts(request: Request) -> tuple[int, ...]:
    """The id of one of these programs' requests: which conversation and turn, which problem
    and path.
    """
    if not isinstance(request.id, tuple):
        raise ValueError(f"{request.id!r} is no request of this program")
    return request.id
