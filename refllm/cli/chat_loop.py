"""The loop of ``refllm chat``: read a line, answer it or run its command, print what that took.

| from          | answers   | prompts, counts | bad input                        |
|---------------|-----------|-----------------|----------------------------------|
| a terminal    | on stdout | on stderr       | is reported; the chat continues  |
| a pipe        | on stdout | counts only     | ends the chat with exit code 2   |

Ctrl-C during an answer ends the answer alone, and its part joins the conversation; where a
line is read, it empties the line.

Left out: choosing among several answers, editing earlier messages, saving conversations.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from refllm.decode.constraint import Constraint
from refllm.decode.conversation import Conversation
from refllm.decode.sampling_params import SamplingParams
from refllm.errors import InputError
from refllm.measure.latency import Stopwatch
from refllm.terminal import emit, note

PROMPT = "> "
CONTINUED = ". "
BYTE_ORDER_MARK = "\ufeff"
HELP = """\
/help         list the commands
/reset        forget the conversation, and keep the system message
/system TEXT  begin a conversation with this system message
/system       show the system message
/quit         end, as Ctrl-D does
Ctrl-C stops an answer.
A line that ends in \\ is continued on the next one.
A message that begins with / is written with //."""
SLOW_TOKENS = 1000  # prompt tokens that are announced before they are computed


class ChatLoop:
    """One conversation with the user at standard input."""

    def __init__(
        self,
        conversation: Conversation,
        sampling: SamplingParams,
        max_tokens: int,
        interactive: bool,
        grammar: Constraint | None = None,
    ):
        """``interactive``: standard input is a terminal. ``grammar`` constrains each answer."""
        self.grammar = grammar
        self.conversation = conversation
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.interactive = interactive

    def run(self) -> None:
        """Answer every line until the input ends.

        InputError for bad input that does not come from a terminal.
        """
        if self.interactive:
            _enable_line_editing()
        for line in self._lines():
            try:
                if line.startswith("/") and not line.startswith("//"):
                    if self._run_command(line):
                        return
                elif line.strip():
                    self._answer(line.removeprefix("/") if line.startswith("//") else line)
            except InputError as error:
                if not self.interactive:
                    raise
                note(f"Error: {error}")

    # --- reading ----------------------------------------------------------------------------

    def _lines(self) -> Iterator[str]:
        """Messages and commands, continued lines joined."""
        parts: list[str] = []
        while True:
            try:
                line = self._read(CONTINUED if parts else PROMPT)
            except EOFError:
                break
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                emit("\n")
                parts = []
                continue
            if line.endswith("\\"):
                parts.append(line[:-1])
                continue
            yield "\n".join([*parts, line])
            parts = []
        if self.interactive:
            emit("\n")
        if parts:
            yield "\n".join(parts)

    def _read(self, prompt: str) -> str:
        """The next line without its end; EOFError after the last one."""
        try:
            if self.interactive and sys.stdout.isatty():
                return self._text(input(prompt))
            if self.interactive:
                print(prompt, end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
        except UnicodeDecodeError:
            return self._reject_bytes()
        if not line:
            raise EOFError
        return self._text(line)

    def _text(self, line: str) -> str:
        """A line without its end, which is \\r\\n in files of Windows, and without the
        byte-order mark that begins some; InputError for one that is not UTF-8.
        """
        if not _is_unicode(line):  # Python keeps such bytes as half characters in some locales
            return self._reject_bytes()
        return line.removesuffix("\n").removesuffix("\r").removeprefix(BYTE_ORDER_MARK)

    def _reject_bytes(self) -> str:
        """An empty line in place of one that is not UTF-8; InputError without a terminal."""
        if not self.interactive:
            raise InputError("standard input is not UTF-8 text")
        note("Error: this line is not UTF-8 text")
        return ""

    # --- commands ---------------------------------------------------------------------------

    def _run_command(self, line: str) -> bool:
        """Run a command; return whether it ends the chat."""
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if command in ("/quit", "/exit"):
            return True
        if command == "/help":
            note(HELP)
        elif command == "/reset":
            self.conversation.reset(self._system())
            note("a new conversation")
        elif command == "/system":
            self._show_or_set_system(rest)
        else:
            raise InputError(
                f"there is no command {command}: /help lists them; a message that begins "
                "with / is written with //"
            )
        return False

    def _system(self) -> str | None:
        """The system message, None if there is none."""
        first = next(iter(self.conversation.messages), {"role": ""})
        return str(first["content"]) if first["role"] == "system" else None

    def _show_or_set_system(self, text: str) -> None:
        """``/system TEXT`` and ``/system``."""
        if text:
            self.conversation.reset(text)
            note("a new conversation with this system message")
        else:
            note(self._system() or "there is no system message of yours")

    # --- answering --------------------------------------------------------------------------

    def _answer(self, text: str) -> None:
        """Stream the answer to a message; then say what it took."""
        watch = Stopwatch()
        pieces = self.conversation.say(
            text,
            self.max_tokens,
            sampling=self.sampling,
            grammar=self.grammar,
            on_prompt=self._announce,
            on_token=watch.tick,
        )
        last = "\n"
        try:
            for piece in pieces:
                emit(piece)
                last = piece[-1]
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            pieces.close()  # what there is of the answer joins the conversation
        if last != "\n" or (self.interactive and not watch.tokens):
            emit("\n")
        if reason := self._reason(watch.tokens):
            note(reason)
        note(self._summary(watch))

    def _announce(self) -> None:
        """Before a prompt is computed: what was left out, and what will take a while."""
        chat = self.conversation
        if chat.dropped:
            note(
                f"the context is full: the oldest {chat.dropped} messages are left out from now on"
            )
        if chat.computed >= SLOW_TOKENS:
            note(f"reading {chat.computed:,} tokens …")

    def _reason(self, tokens: int) -> str:
        """Why the answer ended, unless by itself."""
        finish = self.conversation.finish
        if finish == "interrupted" and not tokens:
            return "stopped: the message is forgotten"
        reasons = {
            "length": f"cut at --max-tokens {self.max_tokens}",
            "context": f"cut: the context of {self.conversation.context_size:,} tokens is full",
            "interrupted": "stopped",
        }
        return reasons.get(finish, "")

    def _summary(self, watch: Stopwatch) -> str:
        """What an answer took, in one line of 80 columns."""
        chat = self.conversation
        facts = []
        if watch.tokens:
            facts.append(f"read {chat.computed:,} in {watch.ttft:.1f} s")
            facts.append(f"wrote {watch.tokens:,}")
        if watch.tokens > 1:
            facts[-1] += f" at {watch.tokens_per_second:,.1f} tokens/s"
        facts.append(f"context {chat.context_used:,} of {chat.context_size:,}")
        return ", ".join(facts)


def _is_unicode(text: str) -> bool:
    """Whether a text consists of whole characters."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _enable_line_editing() -> None:
    """Arrow keys and a history of lines in ``input``, where Python has readline."""
    try:
        import readline  # noqa: F401 (importing it is what does it)
    except ImportError:
        pass
