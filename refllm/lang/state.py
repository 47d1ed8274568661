"""What a program has written so far, and the branches that it has taken.

Source: Zheng et al. 2024 (SGLang), §2.2: a prompt state is a stream to which primitives are
submitted without waiting; reading a result waits for it.

A state works through what was appended in order, in a thread that lives while there is work.
So ``s += gen("a")`` returns at once, other states go on, and ``s["a"]`` waits. ``fork`` makes
branches that begin with the text so far; the engine computes that text once, since its prefix
cache shares it (``serve.prefix_caching``).

A state is either text, or a chat: a list of messages, which the chat template turns into the
prompt of each request. Text and answers are encoded together for each request, as a user's text
is; a generated text may then be other tokens than those that were sampled (``decode.forced``
has the same question for forced text).

What fails in a state ends it: later parts are not computed, and reading from it raises the
error.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from refllm.decode.completion import CompletionOutput
from refllm.errors import InputError, alternatives
from refllm.lang.choices import Decision
from refllm.lang.primitives import Gen, Joined, Part, Role, Select, parts_of

if TYPE_CHECKING:
    from refllm.lang.runtime import Runtime


@dataclass
class Prompt:
    """The content of a state: plain text, or messages of a chat, of which the last may be open.

    >>> prompt = Prompt("Q: 1 + 1 =")
    >>> prompt.append(" 2")
    >>> prompt.text
    'Q: 1 + 1 = 2'
    """

    text: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    open: str | None = None  # the role of the message that is being written; ``text`` is its text

    def append(self, text: str) -> None:
        """Add to the text, or to the open message."""
        if self.messages and self.open is None and text:
            raise InputError(
                f"text stands outside of the messages of a chat: {text[:40]!r}; put it into "
                "system(…), user(…) or assistant(…)"
            )
        self.text += text

    def begin(self, role: str) -> None:
        """Open a message."""
        if self.open is not None:
            raise InputError(f"a message of {role} begins within one of {self.open}")
        if self.text:
            raise InputError(
                f"a chat begins with messages, but this state begins with text: {self.text[:40]!r}"
            )
        self.open = role

    def end(self) -> None:
        """Close the open message."""
        assert self.open is not None
        self.messages.append({"role": self.open, "content": self.text})
        self.open = None
        self.text = ""

    def copy(self) -> Prompt:
        """The same content, to be continued on its own."""
        return Prompt(self.text, [*self.messages], self.open)


Meta = CompletionOutput | Decision


class State:
    """The state of one program or branch. ``s += part`` appends; ``s[name]`` is the text of a
    ``gen`` or ``select``, and waits for it.
    """

    def __init__(self, runtime: Runtime, origin: Future[object] | None = None):
        self.runtime = runtime
        self.returned: object = None  # what the program's function returned
        self._prompt = Prompt()
        self._values: dict[str, Future[object]] = {}
        self._meta: dict[str, Meta] = {}
        self._work: deque[tuple[Callable[[], None], list[Future[object]]]] = deque()
        self._lock = threading.Lock()
        self._working = False
        self._error: BaseException | None = None
        if origin is not None:
            self._do(lambda: self._adopt(origin.result()))

    def __iadd__(self, part: str | Part) -> State:
        """Append text, ``gen``, ``select``, a message, or several of them joined by ``+``."""
        self._append(parts_of(part))
        return self

    def __getitem__(self, name: str) -> Any:
        """The text of ``gen(name)`` or ``select(name, …)``; after ``join`` the list of the
        branches' texts. Waits until it is there; raises what has failed.
        """
        if name not in self._values:
            raise KeyError(
                f"nothing was appended by the name {name!r}: "
                + alternatives(name, sorted(self._values))
            )
        return self._values[name].result()

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __setitem__(self, name: str, value: object) -> None:
        """Keep a value of the program's own beside the texts."""
        future: Future[object] = Future()
        future.set_result(value)
        self._values[name] = future

    @property
    def names(self) -> list[str]:
        """The names so far, in their order."""
        return list(self._values)

    @property
    def text(self) -> str:
        """All text so far: of a chat, as the chat template writes it. Waits."""
        self.wait()
        return self.runtime.render(self._prompt)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The finished messages of a chat. Waits."""
        self.wait()
        return [dict(message) for message in self._prompt.messages]

    def meta(self, name: str) -> Meta:
        """The ``CompletionOutput`` of a ``gen``, or the ``Decision`` of a ``select``. Waits."""
        self[name]
        return self._meta[name]

    def wait(self) -> State:
        """Wait until everything that was appended is there; raises what has failed."""
        done: Future[object] = Future()
        self._do(lambda: done.set_result(None), [done])
        done.result()
        return self

    def fork(self, count: int = 1) -> Branches:
        """``count`` states that begin with the text so far.

        Their prompts share this text, so the engine is first asked to compute it once: branches
        that begin at the same time would all compute it.
        """
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InputError(f"fork makes 1 or more branches, got {count!r}")
        here: Future[object] = Future()

        def share() -> None:
            if count > 1 and self._prompt.open in (None, "assistant"):
                self.runtime.cache_prefix(self._prompt)
            snapshot = State(self.runtime)
            snapshot._prompt = self._prompt.copy()
            snapshot._values = dict(known)
            snapshot._meta = dict(self._meta)
            here.set_result(snapshot)

        known = dict(self._values)
        branches = [State(self.runtime, here) for _ in range(count)]
        for state in branches:
            state._values = dict(known)
        self._do(share, [here])
        return Branches(self, branches)

    # --- work in order ----------------------------------------------------------------------

    def _append(self, parts: Sequence[str | Part]) -> None:
        for part in parts:
            if isinstance(part, str):
                self._do(partial(self._write, part))
            elif isinstance(part, Joined):
                self._append(part.parts)
            elif isinstance(part, Role):
                self._do(partial(self._begin, part.role))
                self._append(parts_of(part.content))
                self._do(self._end)
            elif isinstance(part, (Gen, Select)):
                value: Future[object] = Future()
                if part.name is not None:
                    self._values[part.name] = value
                self._do(partial(self._run, part, value), [value])
            else:
                raise TypeError(f"a state does not know {part!r}")

    # ``_prompt`` is another one after ``_adopt``: it is looked up when the work is done

    def _write(self, text: str) -> None:
        self._prompt.append(text)

    def _begin(self, role: str) -> None:
        self._prompt.begin(role)

    def _end(self) -> None:
        self._prompt.end()

    def _run(self, part: Gen | Select, value: Future[object]) -> None:
        """Ask the engine; append the text."""
        meta: Meta
        if isinstance(part, Gen):
            meta = self.runtime.generate(self._prompt, part)
            text = meta.text
        else:
            meta = self.runtime.decide(self._prompt, part)
            text = meta.choice
        self._prompt.append(text)
        if part.name is not None:
            self._meta[part.name] = meta
        value.set_result(text)

    def _adopt(self, origin: object) -> None:
        assert isinstance(origin, State)
        self._prompt = origin._prompt.copy()
        self._meta = dict(origin._meta)

    def _do(self, task: Callable[[], None], promised: Sequence[Future[object]] = ()) -> None:
        """Queue a task, which fulfils what it has ``promised``."""
        with self._lock:
            self._work.append((task, list(promised)))
            if self._working:
                return
            self._working = True
        threading.Thread(target=self._work_off, name="refllm-program", daemon=True).start()

    def _work_off(self) -> None:
        """Work through the queue; the first error fails everything after it."""
        while True:
            with self._lock:
                if not self._work:
                    self._working = False
                    return
                task, promised = self._work.popleft()
            try:
                if self._error is not None:
                    raise self._error
                task()
            except BaseException as error:
                self._error = error
                for future in promised:
                    if not future.done():
                        future.set_exception(error)


class Branches(Sequence[State]):
    """The branches of a state, in their order."""

    def __init__(self, parent: State, branches: Sequence[State]):
        self.parent = parent
        self.states = list(branches)
        self._known = set(parent.names)

    def __len__(self) -> int:
        return len(self.states)

    def __iter__(self) -> Iterator[State]:
        return iter(self.states)

    def __getitem__(self, key: Any) -> Any:
        """A branch by its place; or, by a name, the list of the branches' texts."""
        if isinstance(key, str):
            return [state[key] for state in self.states]
        return self.states[key]

    def join(self) -> Mapping[str, list[Any]]:
        """Wait for all branches. What all of them have named since the fork is the parent's
        from now on, as a list in the branches' order, and is returned.
        """
        for state in self.states:
            state.wait()
        names = [name for name in self.states[0].names if name not in self._known]
        shared = [name for name in names if all(name in state for state in self.states)]
        gathered = {name: self[name] for name in shared}
        for name, values in gathered.items():
            self.parent[name] = values
        return gathered
