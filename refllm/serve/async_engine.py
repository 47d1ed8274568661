"""The engine for programs with threads or an event loop: one thread steps it, any number of
consumers submit requests and read their chunks.

Source: vLLM's ``AsyncLLM`` (vllm/v1/engine/async_llm.py): one loop, an output collector per
request that merges what a slow consumer has not read.

::

    async with AsyncEngine(engine) as server:
        async for chunk in server.generate("def f(", max_tokens=32, temperature=0.8):
            print(chunk.text, end="")

| what                          | what becomes of it                                         |
|-------------------------------|------------------------------------------------------------|
| a request that makes no sense | ``InputError`` to its consumer, at the first chunk         |
| an error of one request       | ``RequestError`` to its consumer, after its last chunk     |
| an error of the engine        | ``EngineClosed`` to all consumers, and to later requests   |
| a consumer that is cancelled, | its request is aborted, and its blocks are free            |
| or stops reading early        |                                                            |
| a consumer that is slow       | what it has not read is merged: one chunk per continuation |
| more than ``max_requests``    | a consumer waits until one of the others has ended         |
| ``close``                     | the thread ends after its step; open requests are aborted, |
|                               | their consumers get ``EngineClosed``                       |

Only the thread steps the engine. Submitting and aborting hold the engine's lock, which is free
while the network computes.

Left out: several engines behind one interface, draining on ``close`` (read all streams first).
"""

from __future__ import annotations

import asyncio
from collections import abc, deque
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from threading import Condition, Thread
from types import TracebackType
from typing import Any

from refllm.decode.completion import StreamChunk
from refllm.errors import InputError, message
from refllm.serve.engine import Engine
from refllm.serve.outputs import RequestOutput
from refllm.serve.plan import SequenceUpdate
from refllm.serve.request import Prompt, Request


class EngineClosed(RuntimeError):
    """The engine was closed, or has failed: no request is served any more."""


class RequestError(RuntimeError):
    """A request has ended with ``finish_reason`` ``"error"``."""


class RequestStream:
    """The chunks of one request, as ``for`` or ``async for`` reads them; one consumer.

    ``result`` is the request's output once all chunks have been read.
    """

    def __init__(self, server: AsyncEngine, request: Request):
        self.request = request
        self.result: RequestOutput | None = None
        self.request_id: abc.Hashable = None
        self._server = server
        self._ready = Condition()
        self._pending: dict[int, StreamChunk] = {}  # continuation → what was not read yet
        self._ended: set[int] = set()  # continuations whose last chunk has come
        self._over = False  # no more chunks will come
        self._error: Exception | None = None
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    # --- the loop's side ------------------------------------------------------------------

    def put(self, update: SequenceUpdate) -> None:
        """Add what is new of a continuation to what was not read yet."""
        self._add(
            StreamChunk(
                update.text,
                list(update.tokens),
                update.logprobs,
                update.finish_reason,
                update.stop_reason,
                update.index,
            )
        )

    def _add(self, chunk: StreamChunk) -> None:
        with self._ready:
            earlier = self._pending.get(chunk.index)
            self._pending[chunk.index] = chunk if earlier is None else merge(earlier, chunk)
            if chunk.finish_reason is not None:
                self._ended.add(chunk.index)
            self._notify()

    def finish(self, result: RequestOutput) -> None:
        """The request has ended: continuations that were cut off say so."""
        for output in result.outputs:
            if output.index not in self._ended:
                streamed = self.request.num_sequences == self.request.n
                self._add(
                    StreamChunk(
                        "" if streamed else output.text,
                        [] if streamed else output.tokens,
                        None if streamed else output.logprobs,
                        output.finish_reason,
                        output.stop_reason,
                        output.index,
                    )
                )
        error = None
        if result.error is not None:
            error = RequestError(f"request {self.request_id!r}: {result.error}")
        self.end(error, result)

    def end(self, error: Exception | None, result: RequestOutput | None = None) -> None:
        """No more chunks will come; the consumer gets ``error`` after those that it has not
        read.
        """
        with self._ready:
            if not self._over:
                self.result = result
                self._error = error
                self._over = True
            self._notify()

    def _notify(self) -> None:
        self._ready.notify_all()
        if self._waiter is not None:
            loop, event = self._waiter
            with suppress(RuntimeError):  # the loop is closed: its consumer is gone
                loop.call_soon_threadsafe(event.set)

    # --- the consumer's side --------------------------------------------------------------

    def _take(self) -> list[StreamChunk] | None:
        """What is new; None if nothing is, and more may come; an empty list at the end, where
        an error is raised.
        """
        if self._pending:
            chunks = list(self._pending.values())
            self._pending = {}
            return chunks
        if not self._over:
            return None
        if self._error is not None:
            raise self._error
        return []

    def __iter__(self) -> abc.Iterator[StreamChunk]:
        """Read the chunks in this thread; to stop early aborts the request."""
        try:
            while True:
                with self._ready:
                    while (chunks := self._take()) is None:
                        self._ready.wait()
                if not chunks:
                    return
                yield from chunks
        finally:
            self.abort()

    async def __aiter__(self) -> abc.AsyncGenerator[StreamChunk, None]:
        """Read the chunks in this event loop; to stop early aborts the request."""
        event = asyncio.Event()
        try:
            while True:
                event.clear()
                with self._ready:
                    self._waiter = asyncio.get_running_loop(), event
                    chunks = self._take()
                if chunks is None:
                    await event.wait()
                    continue
                if not chunks:
                    return
                for chunk in chunks:
                    yield chunk
        finally:
            self._waiter = None
            self.abort()

    def wait(self) -> RequestOutput:
        """Read all chunks in this thread; returns the request's output."""
        for _ in self:
            pass
        assert self.result is not None
        return self.result

    def abort(self) -> None:
        """End the request, if it has not ended."""
        self._server._close_stream(self)


class AsyncEngine:
    """Serves an ``Engine`` from a thread of its own.

    ``max_requests`` may be open at a time; others wait before they are submitted.

    >>> import refllm
    >>> with AsyncEngine(Engine(refllm.load("stdlib-draft"), num_blocks=8)) as server:
    ...     stream = server.submit(Request([5, 9, 2], max_tokens=4, ignore_eos=True))
    ...     sum(len(chunk.tokens) for chunk in stream)
    4
    """

    def __init__(self, engine: Engine, *, max_requests: int = 256):
        if max_requests < 1:
            raise InputError(f"max_requests must be 1 or more, got {max_requests}")
        self.engine = engine
        self._wake = Condition()
        self._streams: dict[abc.Hashable, RequestStream] = {}
        self._free = max_requests
        self._queue: deque[Future[None]] = deque()  # consumers that wait for a free place
        self._closed: Exception | None = None
        self._thread = Thread(target=self._loop, name="refllm-engine", daemon=True)
        self._thread.start()

    # --- consumers ------------------------------------------------------------------------

    def submit(self, request: Request, timeout: float | None = None) -> RequestStream:
        """Queue a request from any thread; read its chunks with ``for`` or ``async for``.

        Waits for a free place, at most ``timeout`` seconds.

        Raises
        ------
        InputError
            for a request that can never be served.
        TimeoutError
            if no place became free in time.
        EngineClosed
            after ``close``, or an error of the engine.
        """
        place = self._ask_for_place()
        try:
            place.result(timeout)
        except BaseException:
            self._give_up_place(place)
            raise
        return self._open_stream(request)

    async def generate(
        self, prompt: Prompt | Request, max_tokens: int = 16, **fields: Any
    ) -> abc.AsyncGenerator[StreamChunk, None]:
        """The chunks of a request as they are generated; ``fields`` are those of ``Request``.

        Cancelling the task that reads, or leaving the loop early (use
        ``contextlib.aclosing``), aborts the request. Raises as ``submit`` does, and
        ``RequestError`` where the request fails.
        """
        if not isinstance(prompt, Request):
            prompt = Request(prompt, max_tokens, **fields)
        stream = await self._submit_async(prompt)
        reader = stream.__aiter__()
        try:
            async for chunk in reader:
                yield chunk
        finally:
            await reader.aclose()
            stream.abort()

    async def complete(self, request: Request) -> RequestOutput:
        """The whole output of a request."""
        stream = await self._submit_async(request)
        async for _ in stream:
            pass
        assert stream.result is not None
        return stream.result

    def abort(self, request_id: abc.Hashable) -> bool:
        """End a request from any thread: its consumer gets a last chunk with ``"abort"``.
        False if it is unknown or has ended.
        """
        stream = self._streams.get(request_id)
        if stream is None or not self.engine.abort(request_id):
            return False
        self._deliver({request_id})
        return True

    async def _submit_async(self, request: Request) -> RequestStream:
        place = self._ask_for_place()
        try:
            await asyncio.wrap_future(place)
        except BaseException:
            self._give_up_place(place)
            raise
        return self._open_stream(request)

    # --- places ---------------------------------------------------------------------------

    def _ask_for_place(self) -> Future[None]:
        """A future that is done when one of ``max_requests`` places is the caller's."""
        place: Future[None] = Future()
        with self._wake:
            self._check_open()
            if self._free:
                self._free -= 1
                place.set_result(None)
            else:
                self._queue.append(place)
        return place

    def _give_up_place(self, place: Future[None]) -> None:
        """The caller does not want it any more: it may be its own already."""
        if not place.cancel() and not place.cancelled() and place.exception() is None:
            self._return_place()

    def _return_place(self) -> None:
        """Give a place to the first consumer that still waits for one."""
        with self._wake:
            while self._queue:
                place = self._queue.popleft()
                if place.set_running_or_notify_cancel():
                    place.set_result(None)
                    return
            self._free += 1

    # --- streams --------------------------------------------------------------------------

    def _open_stream(self, request: Request) -> RequestStream:
        """Submit a request; its place is the stream's from now on."""
        stream = RequestStream(self, request)
        streams = request.beam or request.num_sequences == request.n
        try:
            self._check_open()
            stream.request_id = self.engine.submit(request, stream.put if streams else None)
        except BaseException:
            self._return_place()
            raise
        with self._wake:
            self._streams[stream.request_id] = stream
            self._wake.notify()
            closed = self._closed
        if closed is not None:  # meanwhile
            self._close_stream(stream)
            self._check_open()
        self._deliver([stream.request_id])  # it may have ended before it was listed
        return stream

    def _close_stream(self, stream: RequestStream) -> None:
        """The consumer has gone, or has read everything."""
        with self._wake:
            if self._streams.get(stream.request_id) is not stream:
                return
            del self._streams[stream.request_id]
        self.engine.abort(stream.request_id)
        result = self.engine.results.pop(stream.request_id, None)
        if result is not None:
            stream.finish(result)
        self._return_place()

    def _deliver(self, request_ids: abc.Iterable[abc.Hashable]) -> None:
        """Give the results of requests that have ended to their consumers."""
        for request_id in request_ids:
            stream = self._streams.get(request_id)
            if stream is not None and request_id in self.engine.results:
                with self._wake:
                    if self._streams.pop(request_id, None) is None:
                        continue  # its consumer has gone meanwhile
                stream.finish(self.engine.results.pop(request_id))
                self._return_place()

    # --- the thread -----------------------------------------------------------------------

    def _loop(self) -> None:
        """Step while there is anything to do; wait otherwise."""
        while True:
            with self._wake:
                while self._closed is None and not self.engine.unfinished:
                    self._wake.wait()
                if self._closed is not None:
                    break
            try:
                updates = self.engine.step()
                self._deliver({u.request_id for u in updates if u.finish_reason is not None})
            except BaseException as error:
                words = f"{type(error).__name__}: {message(error)}"
                self._closed = EngineClosed(f"the engine has failed: {words}")
                self._closed.__cause__ = error
                break
        self._end_all()

    def _end_all(self) -> None:
        """Abort what is open; its consumers, and those that wait, get the reason."""
        assert self._closed is not None
        with self._wake:
            streams = list(self._streams.values())
            self._streams = {}
            waiting = list(self._queue)
            self._queue.clear()
        for place in waiting:
            if place.set_running_or_notify_cancel():
                place.set_exception(self._closed)
        for stream in streams:
            self.engine.abort(stream.request_id)
            stream.end(self._closed, self.engine.results.pop(stream.request_id, None))

    def _check_open(self) -> None:
        if self._closed is not None:
            raise EngineClosed(str(self._closed)) from self._closed.__cause__

    def close(self) -> None:
        """End the thread after its current step; open requests are aborted. Idempotent."""
        with self._wake:
            if self._closed is None:
                self._closed = EngineClosed("the engine was closed")
            self._wake.notify_all()
        self._thread.join()

    def __enter__(self) -> AsyncEngine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.close)


def merge(earlier: StreamChunk, later: StreamChunk) -> StreamChunk:
    """Two consecutive chunks of one continuation as one."""
    logprobs = earlier.logprobs
    if later.logprobs is not None:
        logprobs = [*(earlier.logprobs or []), *later.logprobs]
    return replace(
        later,
        text=earlier.text + later.text,
        tokens=[*earlier.tokens, *later.tokens],
        logprobs=logprobs,
    )
