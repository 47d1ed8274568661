"""``refllm chat`` in a terminal: a real process behind a pseudo-terminal, keys and all."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from chat_models import save_chat_model
from conftest import ROOT
from refllm.api import load
from refllm.decode.sampling_params import SamplingParams
from refllm.terminal import printable

pty = pytest.importorskip("pty")
termios = pytest.importorskip("termios")

SECONDS = 120  # that a test waits for what must come
CTRL_C = "\x03"
CTRL_D = "\x04"
# The child makes the pseudo-terminal its controlling one, so that Ctrl-C is a signal.
CHILD = """
import fcntl, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
from refllm.cli import app
app()
"""


class Terminal:
    """A program that believes it is in a terminal of 80 columns."""

    def __init__(self, *arguments: str):
        self.master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 80))
        environment = os.environ | {"TERM": "dumb", "COLUMNS": "80", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env=environment,
        )
        os.close(slave)
        self.seen = ""

    def read_until(self, expected: str) -> str:
        """What the program writes up to and with a text."""
        deadline = time.monotonic() + SECONDS
        while expected not in self.seen:
            self._read_more(deadline, expected)
        end = self.seen.index(expected) + len(expected)
        found, self.seen = self.seen[:end], self.seen[end:]
        return found

    def wait_for_answer(self, message: str) -> None:
        """Until the first characters after the echo of a message, which stay unread."""
        deadline = time.monotonic() + SECONDS
        while len(self.seen) < len(message) + 5:
            self._read_more(deadline, "an answer")

    def _read_more(self, deadline: float, expected: str) -> None:
        left = deadline - time.monotonic()
        ready, _, _ = select.select([self.master], [], [], max(0, left))
        if not ready:
            pytest.fail(f"{expected!r} did not come in {SECONDS} s, but {self.seen!r}")
        try:
            data = os.read(self.master, 65536)
        except OSError:  # Linux: the other end is closed
            data = b""
        if not data:
            pytest.fail(f"the program ended before {expected!r}, after {self.seen!r}")
        self.seen += data.decode("utf-8", "replace").replace("\r\n", "\n")

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self.master, keys.encode())

    def wait(self) -> int:
        """The exit code, once everything was read."""
        try:
            while os.read(self.master, 65536):
                pass
        except OSError:
            pass
        return self.process.wait(30)

    def close(self) -> None:
        """End the program."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal() -> Iterator[type[Terminal]]:
    """Opens terminals, and closes them."""
    opened: list[Terminal] = []

    class Opened(Terminal):
        def __init__(self, *arguments: str):
            super().__init__(*arguments)
            opened.append(self)

    yield Opened
    for each in opened:
        each.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers never end by themselves."""
    return save_chat_model(
        tmp_path_factory.mktemp("chat") / "tiny", positions=100_000, eos_token_ids=(0,)
    )


def test_a_conversation_with_every_key(terminal, model):
    """Messages, an answer that Ctrl-C stops, commands, and Ctrl-D."""
    chat = terminal("chat", "--model", str(model), "-n", "90000", "--repetition-penalty", "1")
    banner = chat.read_until("> ")
    assert "\ntiny: 0 M parameters, context of 100,000 tokens, 1 thread" in banner
    assert "Ctrl-C stops an answer, Ctrl-D ends" in banner
    assert max(map(len, banner.splitlines())) <= 80

    chat.type("ab\n")
    chat.wait_for_answer("ab\n")
    chat.type(CTRL_C)
    stopped = chat.read_until("> ")
    assert "\nstopped\n" in stopped
    read, wrote, context = map(
        int, re.search(r"read (\d+) in .*wrote ([\d]+) at .*context (\d+) of", stopped).groups()
    )
    assert 1 < wrote < 90000
    assert read + wrote - 1 <= context <= read + wrote
    answer = stopped.split("\n", 1)[1].split("stopped", 1)[0]
    conversation = load(model).conversation()
    shown = "".join(conversation.say("ab", wrote, sampling=SamplingParams()))
    assert printable(shown).startswith(answer.replace("^C", "").rstrip("\n")[:40])

    chat.type("cd\n")  # the part of the answer is remembered
    chat.wait_for_answer("cd\n")
    chat.type(CTRL_C)
    later = chat.read_until("> ")
    assert int(re.search(r"read (\d+) in", later)[1]) < read
    assert int(re.search(r"context (\d+) of", later)[1]) > context

    chat.type("/nope\n")
    assert "Error: there is no command /nope" in chat.read_until("> ")
    chat.type("half a line")
    chat.read_until("half a line")
    time.sleep(0.1)  # readline waits for a key again: a signal before that is seen with the next
    chat.type(CTRL_C)
    assert "Error" not in chat.read_until("\n> ")  # the line is emptied, nothing is sent
    chat.type("/reset\n")
    assert "a new conversation" in chat.read_until("> ")
    chat.type("e\\\n")
    chat.read_until(". ")
    chat.type("f\n")
    chat.wait_for_answer("f\n")
    chat.type(CTRL_C)
    assert "stopped" in chat.read_until("> ")
    chat.type(CTRL_D)
    assert chat.wait() == 0


def test_quit_ends_it(terminal, model):
    chat = terminal("chat", "--model", str(model), "-n", "3", "--system", "S")
    chat.read_until("> ")
    chat.type("/help\n")
    assert "/quit" in chat.read_until("> ")
    chat.type("ab\n")
    assert "cut at --max-tokens 3" in chat.read_until("> ")
    chat.type("/quit\n")
    assert chat.wait() == 0


@pytest.mark.real
def test_a_conversation_with_the_real_model(terminal):
    chat = terminal("chat", "--repetition-penalty", "1")
    chat.read_until("> ")
    chat.type("What is the capital of France?\n")
    assert "The capital of France is Paris.\n" in chat.read_until("> ")
    chat.type("Count from 1 to 1000, please.\n")
    chat.wait_for_answer("Count from 1 to 1000, please.\n")
    chat.type(CTRL_C)
    assert "stopped" in chat.read_until("> ")
    chat.type("What is the capital of Germany?\n")
    assert "Berlin" in chat.read_until("> ")
    chat.type(CTRL_D)
    assert chat.wait() == 0
