"""Commands in this process: run one, and what they run on."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner, Result

from refllm.checkpoints.writer import save
from refllm.cli import app
from tiny_models import byte_tokenizer, tiny_config, tiny_params

TEXT = "".join(f"def function_{i}(x):\n    return x + {i}\n" for i in range(40))


def run(*args: str | Path, stdin: str | None = None) -> Result:
    """The result of a command: exit code, stdout and stderr."""
    return CliRunner().invoke(app, [str(a) for a in args], input=stdin)


def save_tiny_model(path: Path) -> Path:
    """A directory with a tiny model of 64 positions; returns its path."""
    config = tiny_config(max_position_embeddings=64)
    save(path, config, tiny_params(config, 0, "float32"), byte_tokenizer(), dtype="float32")
    return path


def write_text(path: Path) -> Path:
    """A file of 80 lines of Python; returns its path."""
    path.write_text(TEXT, encoding="utf-8")
    return path


def as_lines(text: str) -> str:
    """The text as a command prints it: with a newline at the end."""
    return text if text.endswith("\n") else text + "\n"
