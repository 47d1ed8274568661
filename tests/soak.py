"""Serve thousands of mixed requests for a long time, and check everything after every step.

    python tests/soak.py                      # 20,000 requests: minutes on one core
    python tests/soak.py --requests 400       # a short run

Engines of several kinds (``ENGINES``) serve one request after the other from hardly enough
blocks. The requests have shared prefixes, salts, temperatures, stop strings, penalties,
priorities, grammars (some of them jump), several sequences or beams. Meanwhile requests are
aborted at any moment of a step, callbacks, grammars, logits processors and drafters raise,
steps fail and are rolled back, and prefix caches are reset. What is checked:

| when             | what                                                                   |
|------------------|------------------------------------------------------------------------|
| every plan       | ``Plan.check``: budgets, slots, copies                                 |
| every step       | ``Engine.check``: every block, sequence and cached prefix is accounted |
| every request    | it ends once, with a reason that fits what was done to it              |
| every output     | of a grammar is a text of it, or the beginning of one                  |
| a sample of them | their tokens, texts and reasons are those of an engine of their own    |
| now and then     | the memory of the process (tracemalloc) does not grow                  |
| the end          | every block is free, and nothing is kept of any request                |

Left out: heads that draft, several threads (``tests/serve/test_isolation.py``
aborts from another thread).
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from grammars import TableGrammar, WordGrammar, random_grammar
from refllm.api import Model
from refllm.decode.fast.captured_step import MAX_ROWS
from refllm.decode.speculative.interface import Proposal
from refllm.decode.speculative.ngram_drafter import NGramDrafter
from refllm.serve.adaptive_drafts import AdaptiveDrafting
from refllm.serve.engine import Engine
from refllm.serve.outputs import RequestOutput
from refllm.serve.plan import Plan, SequenceUpdate
from refllm.serve.request import Request
from tiny_models import tiny_model

MARKER = 250  # prompts that begin with it make a drafter raise
PREFIXES = [[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 9, 9, 9], [40, 41] * 4, [70]]
STOPS = [("a",), ("z", "xyzQQ"), ("e", "th"), ("\0\0",), ("\ufffd\ufffd", "r")]
OUTSTANDING = 24  # requests that are queued or run at the same time
MEMORY_KIB = 64.0  # what the process may grow by while 70 % of the requests are served


@dataclass
class Counts:
    """What has happened so far."""

    submitted: int = 0
    steps: int = 0
    failed_steps: int = 0
    resets: int = 0
    compared: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    work: Counter[str] = field(default_factory=Counter)
    memory: list[float] = field(default_factory=list)  # KiB, after every tenth of the requests


class Planted(Exception):
    """What the functions of a request raise here."""


@cache
def soaked_model() -> Model:
    """A random network in float64 whose end token comes now and then."""
    record = tiny_model(3, max_position_embeddings=96, eos_token_ids=(5,))
    return Model(record.config, record.weights, record.tokenizer)


class FailingDrafter(NGramDrafter):
    """N-gram drafts; raises for the prompts with a marker, once they have some output."""

    def propose(self, tokens: Any, count: int, sampling: Any, rng: Any) -> Proposal:
        if tokens[0] == MARKER and len(tokens) % 5 == 0:
            raise Planted("drafts")
        proposal: Proposal = super().propose(tokens, count, sampling, rng)
        return proposal


def drafting() -> AdaptiveDrafting:
    """A drafter for each sequence."""
    return AdaptiveDrafting(lambda: FailingDrafter(3, longest=2, shortest=1))


# Hardly enough of everything: blocks, tokens per step, sequence slots.
ENGINES: list[dict[str, Any]] = [
    {"prefix_cache": "hash", "num_blocks": 24, "block_size": 4, "max_batch_tokens": 64},
    {
        "prefix_cache": "radix",
        "policy": "lpm",
        "num_blocks": 40,
        "block_size": 2,
        "max_batch_tokens": 24,
        "long_prefill": 4,
    },
    {
        "prefix_cache": None,
        "policy": "priority",
        "num_blocks": 24,
        "block_size": 4,
        "max_batch_tokens": 128,
        "drafter": drafting,
    },
    {
        "prefix_cache": "radix",
        "policy": "priority",
        "num_blocks": 90,
        "block_size": 1,
        "max_batch_tokens": 32,
        "eviction": "slru",
        "drafter": drafting,
    },
    {
        "prefix_cache": "hash",
        "policy": "lpm",
        "num_blocks": 30,
        "block_size": 4,
        "max_sequences": 7,
        "watermark": 0.1,
        "drafter": drafting,
    },
]


def make_request(rng: random.Random, name: int, drafts: bool) -> tuple[Request, Callable | None]:
    """A request, and its callback if it has one; some of them raise."""
    prompt = rng.choice(PREFIXES) + [rng.randint(60, 62) for _ in range(rng.randint(0, 4))]
    if drafts and rng.random() < 0.03:
        prompt = [MARKER, *prompt]
    settings: dict[str, Any] = {"seed": name, "ignore_eos": rng.random() < 0.4}
    if rng.random() < 0.06:
        settings |= {"n": rng.choice([2, 3]), "beam": True}
        settings["length_penalty"] = rng.choice([0.0, 1.0, 300.0])
    else:
        settings["n"] = rng.choice([1, 1, 1, 1, 2, 3])
        if rng.random() < 0.5:
            settings |= {"temperature": rng.choice([0.5, 1.0]), "top_p": rng.choice([1.0, 0.9])}
        if rng.random() < 0.2:
            settings["stop"] = rng.choice(STOPS)
        if rng.random() < 0.15:
            settings |= {"repetition_penalty": 1.3, "presence_penalty": 0.2}
        if rng.random() < 0.03:
            settings["logits_processors"] = [failing_processor(rng.randint(0, 9))]
    if rng.random() < 0.25:
        settings |= constrained(rng, jumps="beam" not in settings)
    if rng.random() < 0.3:
        settings["salt"] = rng.choice(["tenant", "\ud800", f"alone {name}"])
    request = Request(
        prompt, rng.randint(0, 9), name, priority=rng.randint(0, 2), arrival=name, **settings
    )
    callback = None
    if rng.random() < 0.3:
        callback = failing_callback(rng.randint(0, 60))
    return request, callback


def constrained(rng: random.Random, jumps: bool) -> dict[str, Any]:
    """The grammar of a request; one in twelve raises somewhere."""
    if rng.random() < 0.08:
        return {"grammar": FailingGrammar(rng.randint(0, 6)), "ignore_eos": False}
    if rng.random() < 0.3:
        return {
            "grammar": word_grammar(),
            "jump_forward": jumps and rng.random() < 0.7,
            "ignore_eos": False,
        }
    return {"grammar": table_grammar(rng.randint(0, 40)), "ignore_eos": False}


@cache
def table_grammar(seed: int) -> TableGrammar:
    """A random automaton over tokens."""
    vocabulary = soaked_model().config.vocab_size
    return random_grammar(seed, vocabulary, states=4, end_tokens=(5,), edges=12)


@cache
def word_grammar() -> WordGrammar:
    """Words with forced parts."""
    return WordGrammar.of(["xy", "xz", "ab cd", "ab ce", "return"], soaked_model())


class FailingGrammar(TableGrammar):
    """Allows every token, and raises where the output has ``at`` tokens."""

    def __init__(self, at: int):
        super().__init__([], [], soaked_model().config.vocab_size)
        self.at = at

    def mask(self, state: int | None) -> Any:
        """All tokens, or the planted error."""
        if state == self.at:
            raise Planted("grammar")
        return np.ones(self.vocabulary, bool)

    def advance(self, state: int | None, token: int) -> int:
        """The number of tokens."""
        return (state or 0) + 1

    def accepting(self, state: int | None) -> bool:
        """Everywhere."""
        return True


def failing_processor(at: int) -> Callable[..., Any]:
    """Changes nothing, and raises at output token ``at``."""

    def process(output: list[int], z: Any) -> Any:
        if len(output) == at:
            raise Planted("logits")
        return z

    return process


def failing_callback(at: int) -> Callable[[SequenceUpdate], None]:
    """Raises at its call ``at``, which most requests never reach."""
    calls = [0]

    def receive(update: SequenceUpdate) -> None:
        calls[0] += 1
        if calls[0] > at:
            raise Planted("callback")

    return receive


class Soak:
    """One engine under load."""

    def __init__(self, options: dict[str, Any], requests: int, seed: int, sample: float):
        self.rng = random.Random(seed)
        self.requests = requests
        self.sample = sample
        self.counts = Counts()
        self.drafts = "drafter" in options
        made = dict(options)
        if self.drafts:
            made["drafter"] = options["drafter"]()
        self.engine = Engine(soaked_model(), poison=True, on_plan=self.on_plan, **made)
        self._prepare_steps()
        self.aborted: set[int] = set()
        self.waiting: dict[int, Request] = {}  # submitted, and its output not taken yet

    def _prepare_steps(self) -> None:
        """The captured step keeps arrays for each size of a batch, by design: prepare all, so
        that memory which grows is a leak.
        """
        step = self.engine._runner._decode_step
        for rows in range(MAX_ROWS, 0, -1):
            step([0] * rows, [0] * rows, lambda layer, q, k, v: q)

    def on_plan(self, plan: Plan) -> None:
        """Between plan and execution: check it, abort something, or fail."""
        plan.check()
        chance = self.rng.random()
        if chance < 0.01:
            self.abort()
        elif chance < 0.013:
            raise MemoryError("planted: the step is rolled back")

    def abort(self) -> None:
        """Abort a request that is queued, runs, or has just ended."""
        if self.waiting:
            name = self.rng.choice(list(self.waiting))
            if self.engine.abort(name):
                self.aborted.add(name)

    def run(self) -> None:
        """Serve all requests; AssertionError where anything is wrong."""
        engine = self.engine
        while self.counts.submitted < self.requests or engine.unfinished:
            self.submit_some()
            try:
                engine.step()
            except MemoryError:
                self.counts.failed_steps += 1
            self.counts.steps += 1
            engine.check()
            if self.rng.random() < 0.02:
                self.abort()
            if self.rng.random() < 0.002:
                engine.reset_prefix_cache()
                self.counts.resets += 1
            for name in list(engine.results):
                self.take(engine.results.pop(name))
        self.finish()

    def submit_some(self) -> None:
        """Submit requests until enough are outstanding."""
        tenth = max(1, self.requests // 10)
        while self.counts.submitted < self.requests and len(self.waiting) < OUTSTANDING:
            request, callback = make_request(self.rng, self.counts.submitted, self.drafts)
            self.engine.submit(request, callback)
            self.waiting[request.request_id] = request
            self.counts.submitted += 1
            if self.counts.submitted % tenth == 0 and tracemalloc.is_tracing():
                gc.collect()
                self.counts.memory.append(tracemalloc.get_traced_memory()[0] / 1024)
            if self.rng.random() < 0.5:
                break

    def take(self, result: RequestOutput) -> None:
        """Check a finished request, and of a sample the tokens."""
        name = result.request.request_id
        request = self.waiting.pop(name)
        reasons = {output.finish_reason for output in result.outputs}
        assert reasons <= {"stop", "length", "abort", "error"}, reasons
        assert ("abort" in reasons) == (name in self.aborted), (name, reasons)
        assert ("error" in reasons) == (result.error is not None), (name, result.error)
        self.aborted.discard(name)
        for output in result.outputs:
            self.counts.ended[output.finish_reason] += 1
        if result.error is not None:
            assert "Planted" in result.error, result.error
            self.counts.errors[result.error.rsplit(": ", 1)[-1]] += 1
        elif "abort" not in reasons:
            assert len(result.outputs) == request.n or request.beam
        if request.grammar is not None:
            self.check_grammar(request, result)
        if self.rng.random() < self.sample:
            self.compare(result)

    def check_grammar(self, request: Request, result: RequestOutput) -> None:
        """Every output follows the grammar; one that has ended by itself is a text of it."""
        grammar = request.grammar
        assert grammar is not None
        for output in result.outputs:
            state = grammar.start
            for token in output.tokens:
                state = grammar.advance(state, token)
            if output.finish_reason == "stop" and output.stop_reason is None:
                assert grammar.accepting(state), (request, output)
            self.counts.work["constrained"] += 1
            self.counts.work["jumped"] += output.jumped_tokens

    def compare(self, result: RequestOutput) -> None:
        """The outputs are those of an engine that serves nothing else; of what was cut off,
        the beginning is.
        """
        request = result.request
        engine = Engine(soaked_model(), num_blocks=80, block_size=4, prefix_cache=None)
        engine.submit(request)
        whole = engine.run()[request.request_id]
        if request.beam and whole.outputs and result.error is None:
            if all(output.score is not None for output in result.outputs):
                assert [o.tokens for o in result.outputs] == [o.tokens for o in whole.outputs]
                self.counts.compared += 1
            return
        alone = {output.index: output for output in whole.outputs}
        for output in result.outputs:
            expected = alone.get(output.index)
            if expected is None or (whole.error and not result.error):
                continue
            cut_off = output.finish_reason in ("abort", "error")
            tokens = expected.tokens[: len(output.tokens)] if cut_off else expected.tokens
            assert output.tokens == tokens, (request, output, expected)
            if not cut_off:
                assert output.text == expected.text, (request, output, expected)
                assert output.finish_reason == expected.finish_reason
                assert output.stop_reason == expected.stop_reason
            self.counts.compared += 1

    def finish(self) -> None:
        """Nothing is left of any request."""
        engine = self.engine
        memory = engine.scheduler.memory
        assert not self.waiting, "a request has no output"
        assert engine.used_blocks == 0
        engine.reset_prefix_cache()
        assert engine.pool.num_free == engine.pool.num_blocks, "a block has leaked"
        assert not getattr(memory, "_keys", None), "hashes of a request are kept"
        assert not getattr(memory, "_nodes", None), "a lock of a request is kept"
        assert not getattr(getattr(memory, "cache", None), "_roots", None), "a salt is kept"
        stats = engine.drafter.stats if self.drafts else None
        self.counts.work.update(
            tokens=engine.sampled_tokens,
            preemptions=engine.preemptions,
            cached=engine.cached_tokens + engine.scheduler.resumed_cached,
            copies=engine.copied_blocks,
            accepted=0 if stats is None else stats.accepted,
        )
        memory_now = self.counts.memory
        if len(memory_now) >= 10 and self.requests >= 2000:
            grown = memory_now[-1] - min(memory_now[2:5])
            assert grown <= MEMORY_KIB, f"memory has grown by {grown:.0f} KiB: {memory_now}"


def soak(requests: int, seed: int = 0, sample: float = 0.02, traced: bool = True) -> list[Counts]:
    """Serve ``requests`` in equal shares by all ``ENGINES``; prints what was done."""
    found = []
    for number, options in enumerate(ENGINES):
        share = requests // len(ENGINES)
        began = time.perf_counter()
        if traced:
            tracemalloc.start(1)
        try:
            one = Soak(options, share, seed + number, sample)
            one.run()
        finally:
            tracemalloc.stop()
        report(options, one.counts, time.perf_counter() - began)
        found.append(one.counts)
    return found


def report(options: dict[str, Any], counts: Counts, seconds: float) -> None:
    """Print what an engine has gone through."""
    kind = f"{options.get('policy', 'fcfs')}, {options['prefix_cache']} prefixes"
    if "drafter" in options:
        kind += ", drafts"
    work = counts.work
    print(f"{kind}: {counts.submitted:,} requests in {counts.steps:,} steps, {seconds:.0f} s")
    print(f"  ended        {dict(sorted(counts.ended.items()))}")
    print(f"  errors       {dict(sorted(counts.errors.items()))}")
    print(
        f"  work         {work['tokens']:,} tokens sampled, {work['cached']:,} found in caches, "
        f"{work['accepted']:,} drafts accepted"
    )
    print(
        f"  grammars     {work['constrained']:,} outputs followed theirs, "
        f"{work['jumped']:,} tokens jumped"
    )
    print(
        f"  memory       {work['preemptions']:,} preemptions, {work['copies']:,} blocks copied, "
        f"{counts.resets} resets, {counts.failed_steps} steps rolled back"
    )
    print(f"  compared     {counts.compared:,} outputs with those of an engine of their own")
    if counts.memory:
        print(f"  process      {' '.join(f'{kib:.0f}' for kib in counts.memory)} KiB")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=float, default=0.02, help="share that is compared")
    parser.add_argument("--untraced", action="store_true", help="do not watch memory: faster")
    options = parser.parse_args()
    began = time.perf_counter()
    counts = soak(options.requests, options.seed, options.sample, not options.untraced)
    total = sum(one.submitted for one in counts)
    print(f"{total:,} requests in {time.perf_counter() - began:.0f} s: every check has passed")


if __name__ == "__main__":
    main()
