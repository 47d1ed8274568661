"""What the caller did wrong is an InputError, everywhere in the package."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from refllm.checkpoints.tensor_files import CheckpointError
from refllm.errors import InputError
from refllm.formats.gguf.reader import GGUFError
from refllm.formats.quantization_config import UnsupportedQuantization
from refllm.model.config import UnsupportedModel

PACKAGE = Path(__file__).resolve().parents[1] / "refllm"


def plain_value_errors(tree: ast.AST) -> list[int]:
    """Lines that raise a plain ValueError, or derive an error from it."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            lines += [node.lineno] * ast.unparse(node.exc).startswith(("ValueError", "Exception"))
        elif isinstance(node, ast.ClassDef):
            lines += [node.lineno] * ("ValueError" in map(ast.unparse, node.bases))
    return lines


def test_no_file_raises_a_plain_value_error():
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if lines := plain_value_errors(ast.parse(path.read_text(encoding="utf-8"))):
            found[path.relative_to(PACKAGE).as_posix()] = lines
    assert list(found) == ["errors.py"]  # where InputError itself is defined


@pytest.mark.parametrize(
    "kind", [CheckpointError, GGUFError, UnsupportedModel, UnsupportedQuantization]
)
def test_errors_of_files_are_input_errors_and_so_value_errors(kind):
    assert issubclass(kind, InputError)
    assert issubclass(InputError, ValueError)
