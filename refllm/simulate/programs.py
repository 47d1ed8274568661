"""Programs whose requests share prefixes: what a prefix cache is for, and one control that
shares nothing.

Source: the kinds of Zheng et al. 2024 (SGLang), section 6, and of Kwon et al. 2023, section
6.4, as token ids alone.

| program          | a request's prompt is                   | shared                    | O     |
|------------------|-----------------------------------------|---------------------------|-------|
| few-shot         | E examples and a question               | the examples, by all      | short |
| self-consistency | a question, asked n times               | the prompt, by its n      | some  |
| chat             | system prompt, turns so far, message    | all but the message       | some  |
| tree of thought  | the path of thoughts so far, and a word | each path, by its subtree | some  |
| RAG              | a document and a question               | the document              | short |
| unique           | a text of its own                       | nothing                   | some  |

A conversation continues when its answer has arrived, a tree when the node above has: a
``Program`` is asked for the requests that follow every answer, and sees its tokens. All other
tokens are drawn in advance and lengths are fixed, so every policy serves the same requests.

| symbol | name                                      |
|--------|-------------------------------------------|
| a      | Zipf's exponent: P(document i) ∝ 1 / i**a |
| P, O   | tokens of a prompt and of its answer      |

Documents are drawn by Zipf's law.

Left out: pruned branches, programs that fork within an answer (``Request.n`` does that).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from refllm.decode.sampling_params import SamplingParams
from refllm.errors import InputError
from refllm.serve.request import Request

TokenSource = Callable[[int], Sequence[int]]  # number of tokens → tokens
Follow = Callable[[Request, Sequence[int]], list[Request]]


def _no_requests(request: Request, answer: Sequence[int]) -> list[Request]:
    return []


@dataclass
class Program:
    """Requests that arrive at once, and ``follow(request, answer)``: those that follow an
    answer.
    """

    name: str
    requests: list[Request]
    follow: Follow = field(default=_no_requests)


class RandomIds:
    """Random token ids: for measurements of speed and of sharing, where the text does not
    matter.
    """

    def __init__(self, rng: np.random.Generator, vocabulary: int):
        self.rng = rng
        self.vocabulary = vocabulary

    def __call__(self, count: int) -> list[int]:
        """``count`` random ids."""
        ids: list[int] = self.rng.integers(1, self.vocabulary, count).tolist()
        return ids


class Passages:
    """Consecutive pieces of a text, from its beginning, over and over.

    >>> tokens = Passages([1, 2, 3, 4, 5])
    >>> tokens(3), tokens(4)
    ([1, 2, 3], [4, 5, 1, 2])
    """

    def __init__(self, ids: Sequence[int]):
        if not len(ids):
            raise InputError("passages need a text")
        self.ids = list(ids)
        self.position = 0

    def __call__(self, count: int) -> list[int]:
        """The next ``count`` ids."""
        passage: list[int] = []
        while len(passage) < count:
            part = self.ids[self.position : self.position + count - len(passage)]
            passage += part
            self.position = (self.position + len(part)) % len(self.ids)
        return passage


def few_shot(
    tokens: TokenSource,
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
    tokens: TokenSource, questions: int, *, samples: int = 8, question: int = 320, answer: int = 16
) -> Program:
    """Every question ``samples`` times, each with its own seed, to vote on the answers."""
    sampling = SamplingParams(temperature=0.7)
    asked = []
    for i in range(questions):
        prompt = [*tokens(question)]
        asked += [
            replace(_request((i, j), prompt, answer), sampling=sampling, seed=i * samples + j)
            for j in range(samples)
        ]
    return Program("self-consistency", asked)


def chat(
    tokens: TokenSource,
    conversations: int,
    *,
    turns: int = 4,
    system: int = 160,
    message: int = 40,
    answer: int = 24,
) -> Program:
    """Conversations under one system prompt; each turn repeats all turns before it."""
    shared = [*tokens(system)]
    messages = [[[*tokens(message)] for _ in range(turns)] for _ in range(conversations)]

    def follow(request: Request, reply: Sequence[int]) -> list[Request]:
        """The next turn of the same conversation."""
        conversation, turn = _id_parts(request)
        if turn + 1 == turns:
            return []
        prompt = [*request.prompt, *reply, *messages[conversation][turn + 1]]
        return [_request((conversation, turn + 1), prompt, answer)]

    first = [_request((i, 0), [*shared, *messages[i][0]], answer) for i in range(conversations)]
    return Program("chat", first, follow)


def tree_of_thought(
    tokens: TokenSource,
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

    def expand(path: tuple[int, ...], context: Sequence[int]) -> list[Request]:
        """The children of a node."""
        return [_request((*path, i), [*context, *words[i]], thought) for i in range(branches)]

    def follow(request: Request, reply: Sequence[int]) -> list[Request]:
        """The children of a node that has its thought."""
        path = _id_parts(request)
        if len(path) <= depth:
            return expand(path, [*request.prompt, *reply])
        return []

    roots = [expand((i,), tokens(problem)) for i in range(problems)]
    return Program("tree of thought", [request for root in roots for request in root], follow)


def rag(
    tokens: TokenSource,
    questions: int,
    rng: np.random.Generator,
    *,
    documents: int = 20,
    a: float = 1.0,
    document: int = 400,
    question: int = 32,
    answer: int = 12,
) -> Program:
    """Questions about documents, a few of which are far more popular than the others."""
    texts = [[*tokens(document)] for _ in range(documents)]
    which = rng.choice(documents, questions, p=zipf(documents, a)).tolist()
    asked = []
    for i, chosen in enumerate(which):
        asked.append(_request((i,), [*texts[chosen], *tokens(question)], answer))
    return Program("RAG", asked)


def unique(
    tokens: TokenSource, questions: int, *, question: int = 400, answer: int = 12
) -> Program:
    """The control: nothing is shared, so a cache can only cost."""
    asked = [_request((i,), [*tokens(question)], answer) for i in range(questions)]
    return Program("unique", asked)


def zipf(count: int, a: float) -> NDArray[np.float64]:
    """Probability of each of ``count`` documents, the most popular first: 1 / i**a over the
    sum of these.

    >>> [round(float(p), 3) for p in zipf(3, 1.0)]
    [0.545, 0.273, 0.182]
    """
    p = np.arange(1, count + 1, dtype=np.float64) ** -a
    share: NDArray[np.float64] = p / p.sum()
    return share


def shuffled(program: Program, rng: np.random.Generator) -> Program:
    """The same requests in random order: as unrelated users would send them."""
    order = rng.permutation(len(program.requests))
    return replace(program, requests=[program.requests[i] for i in order])


def best_hit_rate(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]] = ()) -> float:
    """An upper bound on the hit rate of ``prompts``, for any order and any cache with pages
    of one token.

    1 − (distinct prefixes that no answer has computed) / (prompt tokens): each of these must
    be computed once. ``answers[i]`` follows prompts[i]; when a later prompt repeats it, all
    but its last token have been computed. (The last token of a prompt is always computed, for
    its logits: where a prompt is the prefix of another, even this rate is out of reach.)

    >>> round(best_hit_rate([[1, 2, 3], [1, 2, 4]]), 3)  # four distinct prefixes, six tokens
    0.333
    """
    nodes: dict[tuple[int, int], int] = {}  # trie of all texts: (node above, token) → node
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
    return Request(prompt, answer, request_id=name, ignore_eos=True)


def _id_parts(request: Request) -> tuple[int, ...]:
    """The id of a request that a program made: its conversation and turn, or its problem and
    path.
    """
    if not isinstance(request.request_id, tuple):
        raise InputError(f"{request.request_id!r} is not a request of this program")
    return request.request_id
