"""No request hurts another: at every point of a step where something of a request is used, a
failure ends that request, and its neighbours get the tokens that they get alone.
"""

from __future__ import annotations

import re
from asyncio import CancelledError
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refllm.serve
from refllm.decode.speculative.interface import Proposal
from refllm.kv.hash_prefix import sha256_key
from refllm.serve import isolation
from refllm.serve.engine import Engine
from refllm.serve.isolation import POINTS, Failures, compute_isolated, sentence
from refllm.serve.outputs import RequestOutput
from refllm.serve.plan import SequenceUpdate
from refllm.serve.prefix_caching import HashKVManager
from refllm.serve.request import Request
from refllm.serve.scheduler import Scheduler
from serving import TOLERANCE, alone, served_model, without_end

VICTIM = "victim"
PROMPT = [1, 2, 3, 4, 5, 9]

NEIGHBOURS = [
    Request([1, 2, 3, 4, 7], 7, "greedy"),
    Request([1, 2, 3, 4, 7, 7], 8, "sampled", temperature=1.0, seed=1, ignore_eos=True),
    Request([1, 2, 3, 4], 6, "several", n=3, temperature=0.8, top_p=0.9, seed=2),
    Request([40, 41] * 4, 8, "penalised", repetition_penalty=1.3, stop="\0\0", ignore_eos=True),
    Request([1, 2, 3, 4, 50], 5, "salted", salt="other", priority=1),
]
SEARCH = Request([1, 2, 8], 4, "search", n=2, beam=True)


@cache
def expected(request_id: str) -> list[list[int]]:
    """The tokens of each sequence of a neighbour that is served alone."""
    request = next(r for r in NEIGHBOURS if r.request_id == request_id)
    outputs = []
    for index in range(request.n):
        tokens, nearest = alone(request, index)
        assert nearest > TOLERANCE
        outputs.append(without_end(tokens, request))
    return outputs


@cache
def found_alone() -> list[list[int]]:
    """The hypotheses of ``SEARCH`` when it is served alone."""
    engine = Engine(served_model(), num_blocks=40, block_size=4)
    engine.submit(SEARCH)
    return [output.tokens for output in engine.run()["search"].outputs]


# --- failures at every point --------------------------------------------------------------


class EvilError(Exception):
    """Even its message cannot be read."""

    def __str__(self) -> str:
        raise RuntimeError("no message")


ERRORS = [ValueError, ZeroDivisionError, KeyError, EvilError, StopIteration]


@dataclass
class Fuse:
    """Raises an ``error`` at the ``at``-th use and, if it stays blown, at all later ones."""

    at: int
    error: type[Exception]
    stays: bool = True
    uses: int = 0

    @property
    def blown(self) -> bool:
        return self.uses > self.at

    def use(self) -> None:
        self.uses += 1
        if self.uses == self.at + 1 or (self.blown and self.stays):
            raise self.error("planted")

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def used(*arguments: Any) -> Any:
            self.use()
            return function(*arguments)

        return used


class RepeatDrafter:
    """Proposes the last token again; the victim's uses its fuse."""

    gamma = 2

    def __init__(self, point: str, fuse: Fuse):
        self.point = point
        self.fuse = fuse
        self.of_victim = False

    def propose(self, tokens: list[int], count: int, sampling: Any, rng: Any) -> Proposal:
        self.of_victim = tokens[: len(PROMPT)] == PROMPT
        drafts = [tokens[-1]] * min(count, 2)
        if not self.of_victim:
            return Proposal(drafts, None)
        if self.point == "draft":
            self.fuse.use()
        if self.point == "verification" and drafts:
            self.fuse.uses += 1
            q = np.zeros((len(drafts), 257))
            q[:, drafts[0]] = 1.0
            return Proposal(drafts, q[:, :3] if self.fuse.uses > self.fuse.at else q)
        return Proposal(drafts, None)

    def observe(self, best: Any, accepted: int) -> None:
        if self.of_victim and self.point == "observe":
            self.fuse.use()


class FailingTokenizer:
    def __init__(self, tokenizer: Any, fuse: Fuse):
        self._tokenizer = tokenizer
        self.decode = fuse.wrap(tokenizer.decode)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


class FailingGrammar:
    """Allows every token; one of its methods uses the fuse."""

    start = 0

    def __init__(self, fuse: Fuse, part: int):
        name = ("mask", "advance", "accepting")[part]
        setattr(self, name, fuse.wrap(getattr(self, name)))

    def mask(self, state: int) -> np.ndarray:
        return np.ones(257, bool)

    def advance(self, state: int, token: int) -> int:
        return state

    def accepting(self, state: int) -> bool:
        return True


class FailingProcessors:
    def __init__(self, fuse: Fuse):
        self.fuse = fuse

    @property
    def active(self) -> bool:
        self.fuse.use()
        return False


@dataclass
class Planted:
    """A victim's options, an engine's, and what is done to its state once it is queued."""

    victim: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    install: Callable[[Engine], object] = lambda engine: None


def hasher(fuse: Fuse) -> Callable[..., bytes]:
    """Fails for blocks of the victim: it follows its chain of hashes."""
    chain = set()

    def key(parent: bytes, tokens: Any, salt: Any) -> bytes:
        if salt == VICTIM or parent in chain:
            fuse.use()
            chain.add(sha256_key(parent, tokens, salt))
        return sha256_key(parent, tokens, salt)

    return key


def mutate_temperature(engine: Engine, fuse: Fuse) -> None:
    """No check sees what is done to a frozen record by force."""

    def on_plan(plan: object) -> None:
        fuse.uses += 1
        if fuse.blown and VICTIM in engine._requests:
            sampling = engine._requests[VICTIM].request.sampling
            object.__setattr__(sampling, "temperature", "hot")

    engine.on_plan = on_plan


def plant(point: str, fuse: Fuse, part: int) -> Planted:
    """A failure at ``point`` when the fuse blows."""
    if point == "state":
        fuse.at %= 2  # it has at most two sequences to prepare
        return Planted(
            install=lambda engine: setattr(
                engine._requests[VICTIM],
                "_make_drafter",
                fuse.wrap(lambda: RepeatDrafter("", fuse)),
            )
        )
    if point in ("draft", "observe", "verification"):
        sampled = {"temperature": 1.0, "seed": 3} if point == "verification" else {}
        return Planted(sampled, {"drafter": lambda: RepeatDrafter(point, fuse)})
    if point == "prefix":
        memory = lambda pool: Scheduler(  # noqa: E731
            HashKVManager(pool, hasher=hasher(fuse)), order=("fcfs", "lpm", "priority")[part]
        )
        return Planted({"salt": VICTIM}, {"scheduler": memory})
    if point == "grammar":
        return Planted({"grammar": FailingGrammar(fuse, part), "ignore_eos": False})
    if point == "processor":
        return Planted({"logits_processors": [fuse.wrap(lambda prompt, output, z: z)]})
    if point == "logits":
        return Planted(
            install=lambda engine: setattr(
                engine._requests[VICTIM], "processors", FailingProcessors(fuse)
            )
        )
    if point == "sampling":
        return Planted(
            {"temperature": 1.0, "seed": 3}, install=lambda engine: mutate_temperature(engine, fuse)
        )
    if point == "text":
        victim: dict[str, Any] = {"stop": "\0\0"} if part else {}
        return Planted(
            victim,
            install=lambda engine: setattr(
                engine._requests[VICTIM],
                "tokenizer",
                FailingTokenizer(engine.model.tokenizer, fuse),
            ),
        )
    if point == "beam search":
        name = ("advance", "follow", "_add_hypothesis")[part]
        return Planted(
            {"beam": True, "n": 2, "temperature": 0.0},
            install=lambda engine: _wrap(engine, name, fuse, engine._requests[VICTIM].search),
        )
    assert point == "callback", f"a point without a test: {point}"
    return Planted({"callback": fuse.wrap(lambda update: None)})


def _wrap(engine: Engine, name: str, fuse: Fuse, owner: object = None) -> None:
    owner = owner or engine._requests[VICTIM]
    setattr(owner, name, fuse.wrap(getattr(owner, name)))


def serve(engine: Engine) -> dict[Any, RequestOutput]:
    """Step to the end; the invariants hold after every step."""
    while engine.unfinished:
        engine.step()
        engine.check()
    return engine.run()


def assert_neighbours_are_served_as_alone(results: dict[Any, RequestOutput]) -> None:
    for request in NEIGHBOURS:
        result = results[request.request_id]
        assert result.error is None
        assert [o.tokens for o in result.outputs] == expected(request.request_id)
    assert [o.tokens for o in results["search"].outputs] == found_alone()


def submit_all(engine: Engine, request: Request, callback: Any, position: int) -> None:
    for place, neighbour in enumerate([*NEIGHBOURS, SEARCH]):
        if place == position:
            engine.submit(request, callback)
        engine.submit(neighbour)


@pytest.mark.theorem(
    "Whatever one request's own things raise, at whichever point of a step: it ends with the "
    'reason "error" and a sentence, and its neighbours get the tokens that they get alone',
    source="serve/isolation.py",
)
@pytest.mark.parametrize("point", POINTS)
@given(
    at=st.integers(0, 6),
    error=st.sampled_from(ERRORS),
    part=st.integers(0, 2),
    n=st.integers(1, 2),
    blocks=st.integers(9, 40),
    budget=st.sampled_from([6, 200]),
    drafts=st.booleans(),
    position=st.integers(0, 5),
    stays=st.booleans(),
)
def test_a_failure_at_any_point_ends_its_own_request(
    point, at, error, part, n, blocks, budget, drafts, position, stays
):
    # what is computed for all is computed again for each: it must fail again
    fuse = Fuse(at, error, stays or point == "logits")
    planted = plant(point, fuse, part)
    settings = {"n": n, "temperature": 1.0, "seed": 3, "ignore_eos": True} | planted.victim
    callback = settings.pop("callback", None)
    request = Request(PROMPT, 8, VICTIM, **settings)
    options = {"prefix_cache": ("hash", "radix", None)[part], "max_batch_tokens": budget}
    if "scheduler" in planted.engine:
        options = {}
    if drafts:
        options["drafter"] = lambda: RepeatDrafter("", fuse)
    engine = Engine(
        served_model(),
        num_blocks=blocks,
        block_size=4,
        poison=True,
        **options | planted.engine,
    )
    submit_all(engine, request, callback, position)
    planted.install(engine)
    results = serve(engine)
    assert_neighbours_are_served_as_alone(results)
    assert engine.used_blocks == 0
    result = results[VICTIM]
    assert len({output.index for output in result.outputs}) == len(result.outputs)
    if not fuse.blown:
        assert result.error is None
        return
    natural = point in ("sampling", "verification")  # what the mathematics itself raises
    if natural and result.error is None:
        return  # it had ended before its settings were changed, or no draft was left to verify
    if point in ("grammar", "processor") and drafts and not stays and result.error is None:
        return  # it failed once, after a draft, and succeeded when that draft had been accepted
    name = r"\w+" if natural else error.__name__
    assert re.match(rf"{POINTS[point]} raised {name}: ", result.error), result.error
    assert any(output.finish_reason == "error" for output in result.outputs)
    if not request.beam:
        request = Request(PROMPT, 8, VICTIM, n=n, **{"temperature": 1.0, "seed": 3})
        for output in result.outputs:
            whole = alone(
                Request(PROMPT, 8, temperature=1.0, seed=3, ignore_eos=True), output.index
            )
            if point != "verification":  # its drafts are sampled
                assert output.tokens == whole[0][: len(output.tokens)]


def test_every_point_in_the_code_is_listed_and_every_listed_one_is_used():
    """A new ``fail``, ``add`` or ``sentence`` needs an entry in ``POINTS``, and so a case of
    ``plant``.
    """
    used = set()
    for path in Path(refllm.serve.__path__[0]).glob("*.py"):
        if path.name != "isolation.py":
            text = path.read_text(encoding="utf-8")
            call = r"(?:\.fail|\.add|sentence|RequestFailure)\((?:[\w.]+, )?\"([\w ]+)\", error"
            used |= set(re.findall(call, text))
            used |= set(re.findall(r"compute_isolated\([^\"]+\"([\w ]+)\"\)", text))
    assert used == set(POINTS)


def test_a_point_without_a_case_is_noticed(monkeypatch):
    monkeypatch.setitem(isolation.POINTS, "new", "something new")
    with pytest.raises(AssertionError, match="a point without a test: new"):
        plant("new", Fuse(0, ValueError), 0)


# --- what isolation is made of ------------------------------------------------------------


@dataclass
class Item:
    value: int
    error: str = ""

    def fail(self, point: str, error: Exception) -> None:
        self.error = sentence(point, error)


@given(values=st.lists(st.integers(0, 5), max_size=6), bad=st.sets(st.integers(0, 5)))
def test_oracle_isolated_computation_is_that_of_those_that_can_be_computed(values, bad):
    items = [Item(value) for value in values]

    def double(some: list[Item]) -> list[int]:
        if any(item.value in bad for item in some):
            raise ValueError("bad")
        return [2 * item.value for item in some]

    healthy, result = compute_isolated(items, double, "sampling")
    good = [value for value in values if value not in bad]
    assert [item.value for item in healthy] == good
    assert result == ([2 * value for value in good] if good else None)
    for item in items:
        assert bool(item.error) == (item.value in bad)


def test_what_fails_for_all_together_and_for_none_alone_is_raised():
    items = [Item(1), Item(2)]

    def small(some: list[Item]) -> int:
        if len(some) > 1:
            raise OSError("the device is lost")
        return 1

    with pytest.raises(OSError, match="the device is lost"):
        compute_isolated(items, small, "sampling")
    assert not any(item.error for item in items)


@pytest.mark.parametrize("hook", ["processor", "grammar", "callback"])
@pytest.mark.parametrize("error", [CancelledError, GeneratorExit])
def test_an_exception_that_is_no_exception_ends_its_own_request(hook, error):
    """asyncio.CancelledError is none, and a hook that waits for a task may raise it."""

    def processor(output: list[int], z: Any) -> Any:
        if len(output) == 2:
            raise error("planted")
        return z

    def callback(update: SequenceUpdate) -> None:
        if update.index == 1:
            raise error("planted")

    engine = Engine(served_model(), num_blocks=40, block_size=4)
    chosen: dict[str, Any] = {}
    if hook == "processor":
        chosen = {"logits_processors": [processor]}
    if hook == "grammar":
        chosen = {"grammar": FailingGrammar(Fuse(4, error), 0)}
    request = Request(PROMPT, 6, VICTIM, n=2, temperature=1.0, seed=3, **chosen)
    submit_all(engine, request, callback if hook == "callback" else None, 2)
    results = serve(engine)
    assert_neighbours_are_served_as_alone(results)
    kind = POINTS[hook]
    assert results[VICTIM].error == f"{kind} raised {error.__name__}: planted"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_program_is_raised_and_the_step_can_be_repeated(error):
    uses = []

    def processor(output: list[int], z: Any) -> Any:
        uses.append(output)
        if len(uses) == 2:
            raise error
        return z

    engine = Engine(served_model(), num_blocks=40, block_size=4)
    submit_all(engine, Request(PROMPT, 6, VICTIM, logits_processors=[processor]), None, 2)
    engine.step()
    with pytest.raises(error):
        engine.step()
    results = serve(engine)
    assert_neighbours_are_served_as_alone(results)
    assert results[VICTIM].error is None


@pytest.mark.parametrize("point", POINTS)
def test_memory_that_is_short_is_the_engines_own_error_except_in_functions_of_the_user(point):
    failures = Failures()
    if point in isolation.OWN_MEMORY:
        failures.add("name", point, MemoryError("none left"))
        assert failures == {"name": f"{POINTS[point]} raised MemoryError: none left"}
        return
    with pytest.raises(MemoryError, match="none left"):
        failures.add("name", point, MemoryError("none left"))


def test_the_first_error_of_a_request_is_the_one_that_is_told():
    failures = Failures()
    failures.add("name", "callback", ValueError("first"))
    failures.add("name", "draft", ValueError("second"))
    assert failures == {"name": "the callback raised ValueError: first"}


@pytest.mark.parametrize(("last", "n"), [(False, 1), (True, 1), (True, 2)])
def test_an_output_that_could_not_be_delivered_has_failed(last, n):
    """The callback raises at the first update, or at the one that ends a sequence."""

    def callback(update: SequenceUpdate) -> None:
        if update.finish_reason is not None or not last:
            raise ValueError("lost")

    engine = Engine(served_model(), num_blocks=40, block_size=4)
    engine.submit(Request(PROMPT, 1 if last else 4, VICTIM, n=n, ignore_eos=True), callback)
    updates = []
    while engine.unfinished:
        updates += engine.step()
    result = engine.run()[VICTIM]
    assert result.error == "the callback raised ValueError: lost"
    assert "error" in {output.finish_reason for output in result.outputs}
    assert {u.error for u in updates if u.finish_reason == "error"} == {result.error}


# --- aborts -------------------------------------------------------------------------------


def abort_from(moment: str, at: int, abort: Callable[[], object]) -> Iterator[Planted]:
    """Something of a step that calls ``abort`` at its ``at``-th use."""
    uses = [0]

    def use(*arguments: Any) -> None:
        uses[0] += 1
        if uses[0] == at + 1:
            abort()

    def patch_runner(engine: Engine) -> None:
        execute = engine._runner.execute

        def after(*arguments: Any) -> Any:
            z = execute(*arguments)
            use()
            return z

        engine._runner.execute = after

    if moment == "plan":
        yield Planted(install=lambda engine: setattr(engine, "on_plan", use))
    elif moment == "execution":
        yield Planted(install=patch_runner)
    elif moment == "own callback":
        yield Planted({"callback": use})
    elif moment == "another's callback":
        yield Planted(install=lambda engine: setattr(engine._requests["greedy"], "callback", use))
    else:
        assert moment == "processor"

        def processor(output: list[int], z: Any) -> Any:
            use()
            return z

        yield Planted({"logits_processors": [processor]})


@pytest.mark.theorem(
    "A request may be aborted at any moment of a step, by any thread: its output is a prefix of "
    "what it gets alone, text and tokens agree, and its neighbours get what they get alone",
    source="serve/engine.py",
)
@pytest.mark.parametrize(
    "moment", ["plan", "execution", "processor", "own callback", "another's callback"]
)
@given(
    at=st.integers(0, 7),
    threaded=st.booleans(),
    n=st.integers(1, 3),
    beam=st.booleans(),
    stop=st.booleans(),
    blocks=st.integers(12, 40),
    cache_kind=st.sampled_from(["hash", "radix", None]),
)
def test_an_abort_at_any_moment(moment, at, threaded, n, beam, stop, blocks, cache_kind):
    engine = Engine(
        served_model(), num_blocks=blocks, block_size=4, poison=True, prefix_cache=cache_kind
    )
    aborted = []

    def abort() -> None:
        aborted.append(engine.abort(VICTIM))

    def abort_in_thread() -> None:
        thread = Thread(target=abort)
        thread.start()
        thread.join(10)
        assert not thread.is_alive(), "it waits for the step that waits for it"

    (planted,) = abort_from(moment, at, abort_in_thread if threaded else abort)
    settings = dict(planted.victim)
    callback = settings.pop("callback", None)
    if beam and moment != "own callback" and not stop:
        settings |= {"beam": True}
    else:
        settings |= {"temperature": 1.0, "seed": 3, "stop": "\0\0" if stop else ()}
    request = Request(PROMPT, 8, VICTIM, n=n, ignore_eos=True, **settings)
    submit_all(engine, request, callback, 2)
    planted.install(engine)
    results = serve(engine)
    assert_neighbours_are_served_as_alone(results)
    assert engine.used_blocks == 0
    result = results[VICTIM]
    reasons = {output.finish_reason for output in result.outputs}
    assert ("abort" in reasons) == (aborted == [True])
    assert result.error is None
    for output in result.outputs:
        if not request.beam:
            whole, _ = alone(request, output.index)
            assert output.tokens == whole[: len(output.tokens)]
            assert output.text == engine.model.tokenizer.decode(output.tokens)


# --- drafts that are never accepted -------------------------------------------------------


class ListDrafter:
    """Proposes the tokens of a known text, then the last one again: never accepted here."""

    gamma = 3

    def __init__(self, text: list[int], sampled: bool):
        self.text = text
        self.sampled = sampled

    def propose(self, tokens: list[int], count: int, sampling: Any, rng: Any) -> Proposal:
        known = self.text[len(tokens) : len(tokens) + min(count, 2)]
        drafts = [*known, tokens[-1], tokens[-1]][: min(count, 3)]
        if not self.sampled:
            return Proposal(drafts, None)
        q = np.zeros((len(drafts), 257))
        q[range(len(drafts)), drafts] = 1.0
        return Proposal(drafts, q)

    def observe(self, best: Any, accepted: int) -> None:
        assert all(token >= 0 for token in best)
        assert accepted < len(best)


def alternating(kind: str, last: int) -> Callable[..., Any]:
    """Even and odd tokens in turn; after another text, and after ``last`` tokens, it fails."""

    def processor(output: list[int], z: Any) -> Any:
        odd = [token % 2 for token in output]
        if len(output) >= last or any(map(int.__eq__, odd, odd[1:])):
            if kind == "raises":
                raise ValueError("no such text")
            z[:] = {"nan": np.nan, "masked": -np.inf}[kind]
        elif output:
            z[odd[-1] :: 2] = -np.inf
        return z

    return processor


@pytest.mark.theorem(
    "A logits processor that fails after a draft which is not accepted fails nothing: tokens and "
    "the error are those without drafts",
    source="serve/model_runner.py",
)
@pytest.mark.parametrize("kind", ["raises", "nan", "masked"])
@pytest.mark.parametrize("last", [1, 4, 5, 99])
@pytest.mark.parametrize("logprobs", [None, 1])
@pytest.mark.parametrize(("temperature", "sampled"), [(0.0, False), (1.0, False), (0.0, True)])
def test_rows_after_drafts_that_are_not_accepted_fail_nothing(
    kind, last, logprobs, temperature, sampled
):
    request = Request(
        PROMPT,
        9,
        "r",
        ignore_eos=True,
        temperature=temperature,
        seed=3,
        logprobs=logprobs,
        logprobs_mode="processed_logprobs",
        logits_processors=[alternating(kind, last)],
    )
    plain = Engine(served_model(), num_blocks=40, block_size=4, poison=True)
    plain.submit(request)
    expected_result = plain.run()["r"]
    assert (expected_result.error is None) == (last > 9)
    text = [*PROMPT, *expected_result.tokens]
    engine = Engine(
        served_model(),
        num_blocks=40,
        block_size=4,
        poison=True,
        drafter=lambda: ListDrafter(text, sampled),
    )
    engine.submit(request)
    results = serve(engine)
    assert results["r"].tokens == expected_result.tokens
    assert results["r"].error == expected_result.error
    if last > 4:
        assert results["r"].accepted_tokens
    if logprobs:
        for found, entry in zip(
            results["r"].outputs[0].logprobs, expected_result.outputs[0].logprobs, strict=True
        ):
            assert list(found) == list(entry)
