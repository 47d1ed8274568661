"""The engine behind a thread: chunks for many consumers, cancellation, errors, back-pressure,
shutdown. Every test leaves an engine with no used block and no open stream.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import pytest

from refllm.decode.completion import StreamChunk
from refllm.serve.async_engine import AsyncEngine, EngineClosed, RequestError, merge
from refllm.serve.engine import Engine
from refllm.serve.request import Request
from serving import alone, served_model, without_end

PROMPT = [1, 2, 3, 4, 5]
PATIENCE = 30.0  # seconds until a test that hangs fails


@contextmanager
def serving(max_requests: int = 256, **options: Any) -> Iterator[AsyncEngine]:
    engine = Engine(served_model(), **({"num_blocks": 40, "block_size": 4} | options))
    with AsyncEngine(engine, max_requests=max_requests) as server:
        yield server
    assert not server._thread.is_alive()
    assert engine.used_blocks == 0
    assert not engine.unfinished
    assert engine.results == {}
    assert server._streams == {}
    engine.check()


def some(i: int, **fields: Any) -> Request:
    return Request(
        [*PROMPT, i], 3 + i % 5, n=1 + i % 2, seed=i, temperature=0.8, ignore_eos=True, **fields
    )


def joined(chunks: list[StreamChunk], index: int) -> tuple[list[int], str]:
    mine = [chunk for chunk in chunks if chunk.index == index]
    assert [c.finish_reason for c in mine[:-1]] == [None] * (len(mine) - 1)
    assert mine[-1].finish_reason is not None
    return [t for c in mine for t in c.tokens], "".join(c.text for c in mine)


def test_many_tasks_read_what_each_request_alone_gives():
    async def consume(server: AsyncEngine, i: int) -> list[StreamChunk]:
        return [chunk async for chunk in server.generate(some(i))]

    async def run() -> list[list[StreamChunk]]:
        with serving(max_requests=5, num_blocks=12) as server:
            return await asyncio.gather(*(consume(server, i) for i in range(12)))

    for i, chunks in enumerate(asyncio.run(asyncio.wait_for(run(), PATIENCE))):
        for index in range(some(i).n):
            expected = without_end(alone(some(i), index)[0], some(i))
            tokens, text = joined(chunks, index)
            assert tokens == expected
            assert text == served_model().tokenizer.decode(expected)


def test_many_threads_submit_and_read():
    found: dict[int, Any] = {}

    def consume(server: AsyncEngine, i: int) -> None:
        found[i] = server.submit(some(i)).wait()

    with serving(max_requests=3) as server:
        threads = [threading.Thread(target=consume, args=(server, i)) for i in range(9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    for i in range(9):
        assert [o.tokens for o in found[i].outputs] == [
            without_end(alone(some(i), k)[0], some(i)) for k in range(some(i).n)
        ]


def test_the_keywords_of_generate_are_those_of_a_request():
    async def run() -> list[StreamChunk]:
        with serving() as server:
            return [c async for c in server.generate("abc", 4, ignore_eos=True, logprobs=1)]

    chunks = asyncio.run(run())
    assert "".join(c.text for c in chunks) == served_model().generate("abc", 4, ignore_eos=True)
    assert sum(len(c.logprobs) for c in chunks) == 4


@pytest.mark.parametrize("how", ["cancel", "break", "close"])
def test_a_consumer_that_goes_frees_its_blocks_and_hurts_no_other(how):
    async def run() -> Any:
        with serving() as server:
            begun = asyncio.Event()

            async def reads() -> None:
                async with aclosing(server.generate(PROMPT, 80, ignore_eos=True)) as chunks:
                    async for _ in chunks:
                        begun.set()
                        if how == "break":
                            break

            async def closes() -> None:
                stream = server.submit(Request(PROMPT, 80, ignore_eos=True))
                async for _ in stream:
                    begun.set()
                    stream.abort()

            other = asyncio.create_task(server.complete(Request(PROMPT, 20, ignore_eos=True)))
            task = asyncio.create_task(closes() if how == "close" else reads())
            await begun.wait()
            if how == "cancel":
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                await task
            assert len(server._streams) <= 1
            return await other

    result = asyncio.run(asyncio.wait_for(run(), PATIENCE))
    assert result.tokens == served_model().generate(PROMPT, 20, ignore_eos=True)


def test_an_abort_by_id_reaches_the_consumer():
    with serving() as server:
        stream = server.submit(Request(PROMPT, 80, ignore_eos=True, request_id="r"))
        chunks = []
        for chunk in stream:
            chunks.append(chunk)
            server.abort("r")
        assert chunks[-1].finish_reason == "abort"
        assert stream.result.finish_reason == "abort"
        assert not server.abort("r")


def test_an_error_of_one_request_reaches_its_consumer_alone():
    def fails(output: list[int], z: Any) -> Any:
        if len(output) == 2:
            raise KeyError("lost")
        return z

    async def run() -> Any:
        with serving() as server:
            other = asyncio.create_task(server.complete(Request(PROMPT, 9, ignore_eos=True)))
            seen: list[StreamChunk] = []

            async def read(*prompt: Any, **fields: Any) -> None:
                async for chunk in server.generate(*prompt, ignore_eos=True, **fields):
                    seen.append(chunk)

            with pytest.raises(RequestError, match="a logits processor raised KeyError: 'lost'"):
                await read(PROMPT, 9, logits_processors=[fails])
            assert sum(len(chunk.tokens) for chunk in seen) == 2
            with pytest.raises(ValueError, match="prompt is empty"):
                await read([], 9)
            with pytest.raises(ValueError, match="outside the vocabulary"):
                await server.complete(Request([999], 9))
            return await other

    result = asyncio.run(asyncio.wait_for(run(), PATIENCE))
    assert result.tokens == served_model().generate(PROMPT, 9, ignore_eos=True)


def test_an_error_of_the_engine_reaches_everyone():
    def breaks(plan: Any) -> None:
        raise RuntimeError("no device")

    async def run() -> None:
        with serving(on_plan=breaks) as server:
            results = await asyncio.gather(
                *(server.complete(Request(PROMPT, 9)) for _ in range(3)), return_exceptions=True
            )
            assert {type(error) for error in results} == {EngineClosed}
            with pytest.raises(EngineClosed, match="no device"):
                server.submit(Request(PROMPT, 9))

    asyncio.run(asyncio.wait_for(run(), PATIENCE))


class SilentError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no message")

    __repr__ = __str__


def test_an_error_of_the_engine_without_a_message_reaches_everyone():
    def breaks(plan: Any) -> None:
        raise SilentError

    with serving(on_plan=breaks) as server:
        stream = server.submit(Request(PROMPT, 9))
        server._thread.join(PATIENCE)
        assert not server._thread.is_alive()
        assert stream._over
        with pytest.raises(EngineClosed, match="SilentError: .its message could not be read"):
            list(stream)


def test_a_consumer_whose_event_loop_is_gone_hurts_no_other():
    """Its loop is closed at the moment when the engine's thread has something for it."""
    loop = asyncio.new_event_loop()
    loop.is_closed = lambda: False  # as it was when the thread asked
    with serving() as server:
        gone = server.submit(Request(PROMPT, 40, ignore_eos=True))
        with gone._ready:
            gone._waiter = loop, asyncio.Event()
            loop.close()
        other = server.submit(Request(PROMPT, 50, ignore_eos=True)).wait()
        assert other.tokens == served_model().generate(PROMPT, 50, ignore_eos=True)
        assert gone.result is not None
        assert gone.result.finish_reason == "length"
    del loop.is_closed


def test_at_most_max_requests_are_open_and_the_others_wait():
    with serving(max_requests=1) as server:
        first = server.submit(Request(PROMPT, 60, ignore_eos=True))
        with pytest.raises(TimeoutError):
            server.submit(Request(PROMPT, 3), timeout=0.01)
        first.abort()
        second = server.submit(Request(PROMPT, 3, ignore_eos=True), timeout=PATIENCE)
        assert len(second.wait().tokens) == 3
        assert server._free == 1

        async def gives_up() -> None:
            third = server.submit(Request(PROMPT, 60, ignore_eos=True))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(server.complete(Request(PROMPT, 3)), 0.01)
            third.abort()
            assert len((await server.complete(Request(PROMPT, 3, ignore_eos=True))).tokens) == 3

        asyncio.run(asyncio.wait_for(gives_up(), PATIENCE))
        with pytest.raises(ValueError, match="outside the vocabulary"):
            server.submit(Request([999], 9))
        assert server._free == 1
    with pytest.raises(ValueError, match="max_requests must be 1 or more"):
        AsyncEngine(server.engine, max_requests=0)


def test_a_slow_consumer_finds_one_chunk_per_continuation():
    with serving() as server:
        stream = server.submit(Request(PROMPT, 9, n=2, ignore_eos=True, logprobs=0))
        other = server.submit(Request(PROMPT, 30, ignore_eos=True))
        other.wait()  # by then the first has ended, too
        assert len(stream._pending) == 2
        chunks = list(stream)
        assert [len(chunk.tokens) for chunk in chunks] == [9, 9]
        assert [len(chunk.logprobs) for chunk in chunks] == [9, 9]
        assert [chunk.text for chunk in chunks] == [o.text for o in stream.result.outputs]


@pytest.mark.parametrize(
    "fields", [{"n": 2, "beam": True}, {"n": 1, "best_of": 2}, {"max_tokens": 0}]
)
def test_what_is_known_at_the_end_comes_at_the_end(fields):
    with serving() as server:
        request = Request(**{"prompt": PROMPT, "max_tokens": 4, "ignore_eos": True} | fields)
        stream = server.submit(request)
        chunks = list(stream)
        assert [chunk.tokens for chunk in chunks] == [o.tokens for o in stream.result.outputs]
        assert [chunk.index for chunk in chunks] == list(range(request.n))


def test_close_ends_open_requests_and_those_that_wait():
    engine = Engine(served_model(), num_blocks=40, block_size=4)
    server = AsyncEngine(engine, max_requests=1)
    stream = server.submit(Request(PROMPT, 80, ignore_eos=True))
    errors: list[BaseException] = []

    def waits() -> None:
        try:
            server.submit(Request(PROMPT, 3))
        except EngineClosed as error:
            errors.append(error)

    thread = threading.Thread(target=waits)
    thread.start()
    while not server._queue:
        pass
    server.close()
    server.close()
    thread.join(PATIENCE)
    with pytest.raises(EngineClosed, match="was closed"):
        list(stream)
    assert len(errors) == 1
    with pytest.raises(EngineClosed, match="was closed"):
        server.submit(Request(PROMPT, 3))
    assert engine.used_blocks == 0
    assert engine.results == {}
    engine.check()


def test_async_with_closes():
    async def run() -> AsyncEngine:
        async with AsyncEngine(Engine(served_model(), num_blocks=40)) as server:
            await server.complete(Request(PROMPT, 2))
        return server

    server = asyncio.run(run())
    assert not server._thread.is_alive()


def test_chunks_merge():
    first = StreamChunk("a", [1], None, index=2)
    second = StreamChunk("b", [2, 3], None, "stop", 3, index=2)
    assert merge(first, second) == StreamChunk("ab", [1, 2, 3], None, "stop", 3, 2)
