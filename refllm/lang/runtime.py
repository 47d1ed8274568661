"""The engine behind programs: many states at once, their prompts in one prefix cache.

Source: Zheng et al. 2024 (SGLang), §3: programs share prefixes in a radix tree, the front end
asks for a shared prefix before it branches ("frontend hint").

| counted in ``Savings`` | meaning                                                     |
|------------------------|-------------------------------------------------------------|
| ``requests``           | requests that the programs made                             |
| ``prompt_tokens``      | tokens of their prompts                                     |
| ``cached_tokens``      | of these, found in the prefix cache                         |
| ``computed_tokens``    | tokens that went through the network, recomputed ones too   |
| ``forward_passes``     | steps of the engine: what a device is busy with             |

``Runtime(model, prefix_cache=None, concurrent=False)`` is the naive way, one request after the
other without a cache, to compare with.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from refllm.array_types import Json
from refllm.checkpoints.chat_template_tokens import ChatTokenizer
from refllm.decode.completion import CompletionOutput
from refllm.decode.grammar import Grammar
from refllm.decode.grammar import compile as compile_grammar
from refllm.decode.speculative.interface import ModelLike
from refllm.errors import InputError
from refllm.lang.choices import NEEDS_ALONE, Decision, decide
from refllm.lang.primitives import Gen, Select
from refllm.lang.state import Prompt, State
from refllm.serve.async_engine import AsyncEngine
from refllm.serve.engine import Engine
from refllm.serve.outputs import RequestOutput
from refllm.serve.prefix_caching import HashKVManager, RadixKVManager
from refllm.serve.request import Request

CONTEXTS = 8  # the memory of a runtime that makes its own engine, in whole contexts
BLOCK_SIZE = 16


@dataclass
class Savings:
    """What programs asked for, and what of it was computed."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    forward_passes: int = 0

    @property
    def hit_rate(self) -> float:
        """The share of prompt tokens that the prefix cache held."""
        return self.cached_tokens / max(1, self.prompt_tokens)


class Runtime:
    """Serves programs from one engine; a context manager that ends its thread.

    >>> import refllm
    >>> with Runtime(refllm.load("stdlib-draft")) as runtime:
    ...     s = State(runtime)
    ...     s += "import "
    ...     s += Gen("module", max_tokens=3)
    ...     len(s["module"]) > 0
    True
    """

    def __init__(
        self,
        model: ModelLike | Engine,
        *,
        num_blocks: int | None = None,
        prefix_cache: str | None = "radix",
        policy: str = "lpm",
        concurrent: bool = True,
        **options: Any,
    ):
        """``model`` is a ``Model``, for which an engine is made (``num_blocks`` and ``options``
        are those of ``Engine``), or an engine. Without ``concurrent`` the requests are served
        one at a time, in the order in which they come.
        """
        if isinstance(model, Engine):
            engine = model
        else:
            if num_blocks is None:
                context = min(model.config.max_position_embeddings, 8192)
                num_blocks = CONTEXTS * -(-context // options.get("block_size", BLOCK_SIZE))
            if prefix_cache is None and policy == "lpm":
                policy = "fcfs"  # lpm orders by what is cached
            engine = Engine(
                model, num_blocks=num_blocks, prefix_cache=prefix_cache, policy=policy, **options
            )
        self.engine = engine
        self.model = engine.model
        self.server = AsyncEngine(engine, max_requests=1024 if concurrent else 1)
        managers = HashKVManager, RadixKVManager
        self.caches_prefixes = isinstance(engine.scheduler.memory, managers)
        self._lock = threading.Lock()
        self._grammars: dict[str, Grammar] = {}
        self._savings = Savings()

    @property
    def savings(self) -> Savings:
        """The counts so far."""
        with self._lock:
            self._savings.computed_tokens = self.engine.computed_tokens
            self._savings.forward_passes = self.engine.steps
            return Savings(**vars(self._savings))

    def close(self) -> None:
        """End the engine's thread; requests that are open fail."""
        self.server.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- what states ask for ----------------------------------------------------------------

    def render(self, prompt: Prompt) -> str:
        """The text of a state: of a chat, as the chat template writes its finished messages."""
        if not prompt.messages:
            return prompt.text
        return str(self._chat().templates.render(prompt.messages))

    def encode(self, prompt: Prompt, text: str = "") -> list[int]:
        """The token ids of a prompt, ``text`` appended. InputError if it has none."""
        if prompt.open is None and not prompt.messages:
            ids = self.model.tokenizer.encode(prompt.text + text, special=True)
        else:
            ids = self._chat().encode(**self._chat_arguments(prompt, text))
        if not ids:
            raise InputError("the state is empty: a model needs a token to continue")
        return list(ids)

    def generate(self, prompt: Prompt, part: Gen) -> CompletionOutput:
        """The continuation of a prompt that a ``gen`` asks for."""
        options = dict(part.options)
        if part.grammar:
            options["grammar"] = self._grammar(part.grammar)
        request = Request(self.encode(prompt), part.max_tokens, **options)
        return self._complete([request])[0].outputs[0]

    def decide(self, prompt: Prompt, part: Select) -> Decision:
        """The choice that a ``select`` asks for: the shared prompt once, then the choices in one
        batch, each from its first own token on.
        """
        base = self.encode(prompt)
        if len(part.choices) > 1:
            self.cache_prefix(prompt)
        prompts = [self.encode(prompt, choice) for choice in part.choices]
        starts = [_common(base, ids) for ids in prompts]
        for choice, ids, start in zip(part.choices, prompts, starts, strict=True):
            if start == len(ids):
                raise InputError(f"the choice {choice!r} adds no token to the text")
        logprobs = self._score(prompts, [max(1, start) for start in starts])
        alone = None
        if part.rule == NEEDS_ALONE:
            own = [ids[max(1, start) :] for ids, start in zip(prompts, starts, strict=True)]
            # nothing stands before the first token: as in SGLang, log p is taken as 0
            alone = [[0.0, *scores] for scores in self._score(own, [1] * len(own))]
        return decide(part.choices, part.rule, logprobs, alone)

    def cache_prefix(self, prompt: Prompt) -> None:
        """Compute a prompt that several requests will share, if there is a cache to keep it."""
        if self.caches_prefixes:
            self._complete([Request(self.encode(prompt), 1)])

    def _score(self, prompts: Sequence[list[int]], starts: Sequence[int]) -> list[list[float]]:
        """log p of the tokens of each prompt from its start on."""
        requests = [
            Request(ids, 1, prompt_logprobs=0, prompt_logprobs_start=start)
            for ids, start in zip(prompts, starts, strict=True)
        ]
        found = []
        for ids, start, output in zip(prompts, starts, self._complete(requests), strict=True):
            entries = output.prompt_logprobs
            assert entries is not None
            pairs = zip(ids[start:], entries[start:], strict=True)
            found.append([entry[token].logprob for token, entry in pairs if entry is not None])
        return found

    def _complete(self, requests: Sequence[Request]) -> list[RequestOutput]:
        """The outputs of requests that are served together."""
        streams = [self.server.submit(request) for request in requests]
        outputs = [stream.wait() for stream in streams]
        with self._lock:
            self._savings.requests += len(outputs)
            self._savings.prompt_tokens += sum(one.prompt_tokens for one in outputs)
            self._savings.cached_tokens += sum(one.cached_tokens for one in outputs)
        return outputs

    def _grammar(self, grammar: Json) -> Grammar:
        """The compiled grammar; the same one for the same source."""
        key = json.dumps(grammar, sort_keys=True, default=repr)
        with self._lock:
            if key not in self._grammars:
                self._grammars[key] = compile_grammar(tokenizer=self.model.tokenizer, **grammar)
            return self._grammars[key]

    def _chat(self) -> ChatTokenizer:
        chat: ChatTokenizer | None = getattr(self.model, "chat_tokenizer", None)
        if chat is None:
            raise InputError("messages need a model with a chat template: append text instead")
        return chat

    def _chat_arguments(self, prompt: Prompt, text: str) -> Json:
        """Messages and settings: an open message of the assistant is continued."""
        content = prompt.text + text
        if prompt.open not in (None, "assistant"):
            raise InputError(
                f"gen and select stand within a message of {prompt.open}: a model writes those "
                "of the assistant"
            )
        if not content:
            return {"messages": prompt.messages, "add_generation_prompt": True}
        final = {"role": "assistant", "content": content}
        return {"messages": [*prompt.messages, final], "continue_final_message": True}


class Program:
    """A function of a state, and of arguments of its own; see ``program``."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.__doc__ = function.__doc__
        self.__name__ = function.__name__

    def __call__(self, state: State, /, *arguments: Any, **named: Any) -> Any:
        """Run within another program, on its state."""
        return self.function(state, *arguments, **named)

    def run(self, runtime: Runtime, /, **arguments: Any) -> State:
        """Run once; returns the state when everything is there, and raises what has failed."""
        state = State(runtime)
        state.returned = self.function(state, **arguments)
        return state.wait()

    def run_batch(
        self, runtime: Runtime, cases: Sequence[Mapping[str, Any]], *, threads: int = 64
    ) -> list[State]:
        """Run once per case, at most ``threads`` at a time, all on the same engine; the states
        in the order of the cases. Raises the first error after all have ended.
        """
        if not cases:
            return []
        with ThreadPoolExecutor(min(threads, len(cases)), "refllm-programs") as pool:
            running = [pool.submit(self._run_case, runtime, case) for case in cases]
        return [one.result() for one in running]

    def _run_case(self, runtime: Runtime, case: Mapping[str, Any]) -> State:
        return self.run(runtime, **case)


def program(function: Callable[..., Any]) -> Program:
    """Make a program of a function whose first argument is its state.

    >>> import refllm
    >>> from refllm.lang import gen
    >>> @program
    ... def continue_it(s, text):
    ...     s += text + gen("more", max_tokens=4)
    >>> with Runtime(refllm.load("stdlib-draft")) as runtime:
    ...     states = continue_it.run_batch(runtime, [{"text": "def f("}, {"text": "import "}])
    ...     [state.text.startswith(t) for state, t in zip(states, ["def f(", "import "])]
    [True, True]
    """
    return Program(function)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the longest common prefix."""
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length
