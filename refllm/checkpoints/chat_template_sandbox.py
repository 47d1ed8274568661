"""Jinja as chat templates use it: in jinja2's sandbox, with their names, within bounds.

A template is a program of unknown origin that comes with a checkpoint, so it runs in jinja2's
``ImmutableSandboxedEnvironment``, which gives no access to Python. The names and settings are
those of ``transformers.utils.chat_template_utils``:

| name or setting                         | meaning                                         |
|-----------------------------------------|-------------------------------------------------|
| ``trim_blocks``, ``lstrip_blocks``      | a line that holds a statement alone is no text  |
| ``{% break %}``, ``{% continue %}``     | jinja2's loop controls                          |
| ``{% generation %}``                    | marks what an assistant says; renders its body  |
| ``tojson``                              | JSON as Python's ``json.dumps`` writes it       |
| ``raise_exception(message)``            | the template rejects the messages               |
| ``strftime_now(format)``                | the current local time                          |

Two things are added. Every string literal of a template is compiled to a ``TemplateText``
(see ``chat_template_text``). And the sandbox bounds one ``range``, not what nested loops make
of it, so the passes through loops are counted and repetitions (``*``, ``**``) are bounded.

Left out: includes and imports of other templates; bounds on the memory that filters such as
``center`` need.
"""

from __future__ import annotations

import json
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import sync_do_join
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from refllm.checkpoints.chat_template_text import TemplateText, concat, literal
from refllm.errors import InputError

__all__ = ["compiled", "literals", "rendered"]

MAX_LOOP_PASSES = 1_000_000  # of all loops of one rendering
MAX_LENGTH = 10_000_000  # characters or items of a repetition, bits of a power

# Passes through loops in the rendering under way; a list, so that it can be counted up.
_passes: ContextVar[list[int]] = ContextVar("passes")
# The clock of the rendering under way, for ``strftime_now``; None: the current time.
_clock: ContextVar[datetime | None] = ContextVar("clock", default=None)


class TemplateRejection(jinja2.TemplateError):
    """What ``raise_exception`` raises: the template does not take these messages."""


@lru_cache(maxsize=64)
def compiled(source: str) -> jinja2.Template:
    """A template, ready to render.

    Raises
    ------
    InputError
        naming the line that is no Jinja.
    """
    try:
        return _Environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(
            f"the chat template is no valid Jinja: line {error.lineno}: {error.message}"
        ) from error
    except RecursionError as error:
        raise InputError("the chat template is nested too deeply") from error


def rendered(template: jinja2.Template, names: dict[str, Any], now: datetime | None) -> str:
    """The text of a template for these names; a ``TemplateText``.

    Raises
    ------
    InputError
        for whatever goes wrong in a template: its own ``raise_exception``, an attribute of
        an undefined name, a wrong type, a loop without end.
    """
    passes = _passes.set([0])
    clock = _clock.set(now)
    try:
        return template.render(names)
    except TemplateRejection as error:
        raise InputError(f"the chat template rejects the messages: {error}") from error
    except jinja2.UndefinedError as error:
        raise InputError(
            f"the chat template needs something that the messages do not give it: {error}"
        ) from error
    except Exception as error:  # a template is a program, and may fail in any way
        detail = str(error).replace(TemplateText.__name__, "str")
        raise InputError(
            f"the chat template failed with {type(error).__name__}: {detail:.300}"
        ) from error
    finally:
        _passes.reset(passes)
        _clock.reset(clock)


def literals(source: str) -> list[str]:
    """All string literals of a template, its text outside of braces included."""
    compiled(source)  # an InputError if it is no template
    tree = _Environment().parse(source)
    found = [node.data for node in tree.find_all(nodes.TemplateData)]
    return found + [n.value for n in tree.find_all(nodes.Const) if isinstance(n.value, str)]


# --- names that templates use --------------------------------------------------------------


def _raise_exception(message: str) -> None:
    raise TemplateRejection(message)


def _strftime_now(format: str) -> str:
    return (_clock.get() or datetime.now()).strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON; jinja2's own filter escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _Namespace(Namespace):
    """``namespace(...)`` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args  # so that ``namespace(self=1)`` is possible
        for name in dict(*rest, **kwargs):
            _check_name(name)
        Namespace.__init__(self, *rest, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: it begins with an underscore")


class _Generation(Extension):
    """``{% generation %} … {% endgeneration %}``: the body, in a scope of its own."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        text: str = caller()
        return text


# --- the environment ------------------------------------------------------------------------


class _CodeGenerator(CodeGenerator):
    """Compiles every string literal to a ``TemplateText``, and joins texts by ``concat``."""

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:  # noqa: N802
        if isinstance(node.value, str):
            self.write(_literal_source(node.value))
        else:
            super().visit_Const(node, frame)

    def visit_TemplateData(self, node: nodes.TemplateData, frame: Frame) -> None:  # noqa: N802
        self.write(_literal_source(node.data))

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        """The operator ``~``."""
        self.write("concat(map(str, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")

    def _output_const_repr(self, group: Any) -> str:
        return _literal_source("".join(group))


def _literal_source(text: str) -> str:
    """Python source of a literal."""
    return f"environment.literal({str.__str__(text)!r})"


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with the names of chat templates."""

    code_generator_class = _CodeGenerator
    concat = staticmethod(concat)
    intercepted_binops = frozenset(("*", "**"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # the optimizer would make plain strings of literals in lists
            extensions=[_Generation, loopcontrols],
        )
        self.literal = literal
        self.filters["tojson"] = _tojson
        self.filters["join"] = self._join
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["namespace"] = _Namespace

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            count = nodes.EnvironmentAttribute("count_pass")
            loop.body.insert(0, nodes.ExprStmt(count).set_lineno(loop.lineno))
        return tree

    @property
    def count_pass(self) -> None:
        """Read, and so counted, at the beginning of each pass through a loop: a read of an
        attribute compiles to what it is, where a call would go through the sandbox's checks.
        """
        passes = _passes.get()
        passes[0] += 1
        if passes[0] > MAX_LOOP_PASSES:
            raise OverflowError(f"more than {MAX_LOOP_PASSES:,} passes through its loops")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """``*`` and ``**``, bounded."""
        size = 0
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            size = left.bit_length() * max(right, 0)
        for sequence, times in ((left, right), (right, left)):
            if isinstance(sequence, (str, list, tuple)) and isinstance(times, int):
                size = len(sequence) * max(times, 0)
        if size > MAX_LENGTH:
            raise OverflowError(f"a result of {operator} has more than {MAX_LENGTH:,} items")
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Any:
        """The sandbox's ``str.format``; the text of a literal stays the template's."""
        wrap: Any = super().wrap_str_format
        apply = wrap(value)
        owner = getattr(value, "__self__", None)
        if apply is None or not isinstance(owner, TemplateText):
            return apply

        def formatted(*args: Any, **kwargs: Any) -> str:
            def format_plain(text: str) -> str:
                result: str = wrap(getattr(text, value.__name__))(*args, **kwargs)
                return result

            return owner.braces_formatted(format_plain)

        return formatted

    @staticmethod
    @jinja2.pass_eval_context
    def _join(context: Any, value: Any, d: str = "", attribute: Any = None) -> str:
        """jinja2's filter, whose default separator is a plain ``str``."""
        separator = concat((d,)) if isinstance(d, str) else d
        joined: str = sync_do_join(context, value, separator, attribute)
        return joined
