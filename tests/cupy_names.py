"""The names that CuPy offers and the parameters they take, recorded so that every machine
can check against them.

``cupy_names.txt`` is written from an installed CuPy (no GPU is needed: names and signatures
are host facts) by ``python tests/cupy_names.py``, and ``test_fakecupy.py`` compares it with
the CuPy that is installed, if one is. One name a line, relative to the module: ``clip(a,
a_min, a_max, out=...)``. A ufunc takes what all ufuncs take; a name without parentheses is
a constant, a class, or a function whose parameters CuPy does not tell.
"""

from __future__ import annotations

import inspect
import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

PATH = Path(__file__).with_suffix(".txt")
UFUNC = "*args, out=..., dtype=..., where=..., casting=..."
_SIGNATURE = re.compile(r"^[\w.]+\((self)?,? ?(?P<parameters>.*?)\)( ->.*)?$")


def _parameters(function: Any, *, method: bool = False) -> str | None:
    """``a, b=...`` of a callable: names and which of them may be left out, no defaults, no
    annotations.
    """
    found = None
    try:
        found = list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError):
        pass
    if found is None or (found and found[-1].kind is inspect.Parameter.VAR_KEYWORD):
        # Cython, and einsum(*operands, **kwargs), write the signature into the docstring's
        # first line
        match = _SIGNATURE.match((getattr(function, "__doc__", None) or "").strip().split("\n")[0])
        if match is None:
            return None
        text = re.sub(r"\b(int|bint|bool|Py_ssize_t) (?=\w)", "", match["parameters"])
        text = re.sub(r"=[^,]+", "=...", text.replace("subscripts, *operands", "*operands"))
        return text if _parse(text) is not None else None
    if method and found and found[0].name == "self":
        found = found[1:]
    plain = [
        p.replace(annotation=p.empty, default=p.empty if p.default is p.empty else ...).replace(
            kind=p.POSITIONAL_OR_KEYWORD if p.kind is p.POSITIONAL_ONLY else p.kind
        )
        for p in found
    ]
    return str(inspect.Signature(plain))[1:-1].replace("Ellipsis", "...")


def _parse(parameters: str) -> inspect.Signature | None:
    try:
        return inspect.signature(eval(f"lambda {parameters}: None"))
    except SyntaxError:
        return None


def record(cupy: ModuleType) -> str:
    """The text of ``cupy_names.txt`` for an imported CuPy."""
    lines = []
    for prefix, owner in (
        ("", cupy),
        ("linalg.", cupy.linalg),
        ("fft.", cupy.fft),
        ("ndarray.", cupy.ndarray),
    ):
        for name in dir(owner):
            if name.startswith("_"):
                continue
            value = getattr(owner, name)
            if isinstance(value, cupy.ufunc):
                lines.append(f"{prefix}{name}({UFUNC})")
                continue
            parameters = None
            if callable(value) and not isinstance(value, type):
                parameters = _parameters(value, method=prefix == "ndarray.")
            lines.append(prefix + name + ("" if parameters is None else f"({parameters})"))
    return f"# CuPy {cupy.__version__}\n" + "\n".join(lines) + "\n"


@cache
def load() -> dict[str, inspect.Signature | None]:
    """Name → signature, or None where the parameters are not told."""
    names: dict[str, inspect.Signature | None] = {}
    for line in PATH.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            name, _, parameters = line.partition("(")
            names[name] = _parse(parameters[:-1]) if parameters else None
    return names


if __name__ == "__main__":
    import cupy

    PATH.write_text(record(cupy), encoding="utf-8")
