"""Every table of the commands and of the tour is whole at 80 columns: no line is longer, and no
name is cut or folded inside a word; in a pipe, too.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner, Result

from refllm.api import load
from refllm.checkpoints.writer import save
from refllm.cli import app
from refllm.measure.device import DeviceSpec
from refllm.terminal import pairs, table
from refllm.tour import model_stops, stops, technique_stops
from refllm.tour.context import Tour
from tiny_models import byte_tokenizer, tiny_config, tiny_params

WIDTH = 80
RULE = "──"  # stands below the heads of a table, and is as wide as the table
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def lines_of(text: str) -> list[str]:
    """The lines of an output without colours; a progress bar's rewritten lines one by one."""
    return [line.rstrip() for line in re.split(r"[\r\n]+", CONTROL.sub("", text))]


def words_of(text: str) -> Counter[str]:
    """The words of an output, numbers made equal: two runs may measure other ones."""
    words = CONTROL.sub("", text).split()
    return Counter(re.sub(r"[\d.,+-]+", "#", word) for word in words if RULE not in word)


def check_table_widths(text: str) -> int:
    """No table in ``text`` is wider than 80 columns; the number of tables."""
    rules = [line for line in lines_of(text) if RULE in line]
    assert all(len(line) <= WIDTH for line in rules), rules
    return len(rules)


# --- the tour -----------------------------------------------------------------------------


class RecordingConsole(Console):
    """A console that keeps what it is asked to print."""

    def __init__(self) -> None:
        super().__init__(file=io.StringIO(), width=10_000)
        self.printed: list[Table | str] = []

    def print(self, *objects, **options) -> None:
        if not options.get("soft_wrap"):  # the model's own text, and the names of files
            self.printed += objects


def rendered(item: Table | str, width: int) -> str:
    out = Console(file=io.StringIO(), width=width, highlight=False, markup=False, emoji=False)
    out.print(item)
    return out.file.getvalue()


@pytest.fixture(scope="module")
def model():
    return load("stdlib", "numpy")


@pytest.mark.parametrize("name", [stop.name for stop in stops.STOPS])
def test_every_stop_of_the_tour_fits_into_80_columns(model, name, tmp_path, monkeypatch):
    monkeypatch.setattr(model_stops, "REPEATS", 1)
    monkeypatch.setattr(model_stops, "SAMPLE_WINDOWS", 1)
    monkeypatch.setattr(model_stops, "NEW_TOKENS", 16)
    monkeypatch.setattr(technique_stops, "EXCERPTS", (2, 64))
    monkeypatch.setattr(technique_stops, "CALIBRATION", (2, 512))
    monkeypatch.setattr(technique_stops, "CACHED", 256)
    monkeypatch.setattr(Tour, "draw", lambda *arguments: None)
    tour = Tour("stdlib", "numpy", tmp_path, RecordingConsole())
    tour.__dict__["model"] = model
    tour.__dict__["machine"] = DeviceSpec("a machine of round numbers", 1e11, 1e10)
    stops.run(tour, [name])
    tables = [item for item in tour.out.printed if isinstance(item, Table)]
    assert len(tables) == (name not in ("meet", "write", "measure", "chat"))
    for item in tour.out.printed:
        narrow = rendered(item, WIDTH)
        assert all(len(line) <= WIDTH for line in lines_of(narrow)), narrow
        wide = rendered(item, 10_000)
        assert words_of(narrow) == words_of(wide), narrow
    for made in tables:  # a row is one line, in a terminal of 80 columns too
        assert len(lines_of(rendered(made, WIDTH))) == len(lines_of(rendered(made, 10_000)))
        assert check_table_widths(rendered(made, 10_000)) == 1


# --- the commands -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tables") / "tiny"
    config = tiny_config(max_position_embeddings=256, eos_token_ids=())
    save(path, config, tiny_params(config, 0, "float32"), byte_tokenizer(), dtype="float32")
    return path


def run(command: str, *more: str | Path) -> Result:
    result = CliRunner().invoke(app, [*command.split(), *map(str, more)])
    assert result.exit_code == 0, result.output
    return result


COMMANDS = {  # command -> number of tables
    "info --model MODEL": 1,
    "info --model stdlib": 1,
    "info --model stdlib-draft": 1,
    "eval --model MODEL --text TEXT --max-tokens 200": 1,
    "eval --model MODEL --text TEXT --reference MODEL --max-tokens 200": 2,
    "eval --model stdlib-draft --max-tokens 500": 1,
    "generate x --model MODEL -n 20 --draft MODEL": 0,
    "generate x --model MODEL -n 20 --kv-bits 4 --kv-group 4 --kv-residual 8": 0,
    "quantize --model MODEL --output OUT --group-size 0 --overwrite --max-tokens 100": 0,
    "simulate --requests 12 --slots 3000": 1,
    "simulate --requests 12 --slots 3000 --ttft 500": 1,
    "tour --list": 0,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_fits_into_80_columns(command, directory, tmp_path, monkeypatch):
    text = tmp_path / "text.py"
    text.write_text("def f(x):\n    return x + 1\n" * 40)
    names = {"MODEL": str(directory), "TEXT": str(text), "OUT": str(tmp_path / "q")}
    command = " ".join(names.get(word, word) for word in command.split())
    monkeypatch.chdir(tmp_path)
    piped = run(command)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich: this is a terminal
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    shown = run(command)
    for stream in ("stdout", "stderr"):
        for line in lines_of(getattr(shown, stream)):
            assert len(line) <= WIDTH, line
    if not command.startswith("generate"):  # whose output is the model's own text
        # paths are longer than any column; every other word is there, whole
        assert words_without_paths(shown.stdout) == words_without_paths(piped.stdout)
    assert check_table_widths(piped.stdout) == check_table_widths(shown.stdout)


def words_without_paths(text: str) -> Counter[str]:
    words = words_of(text)
    return Counter({word: count for word, count in words.items() if "/" not in word})


def test_a_long_name_is_wrapped_between_words_and_no_number_is_cut():
    made = table("drafter", "tokens/step", "accepted", "ms", "speedup", "output", "again", "more")
    name = "a name of several words that needs a second line"
    made.add_row(name, "1,234.56", "1234/1234", "12,345", "12.34", "near tie", "12345", "123")
    narrow = rendered(made, WIDTH)
    assert words_of(narrow) == words_of(rendered(made, 10_000))
    assert all(len(line) <= WIDTH for line in lines_of(narrow))


def test_pairs_are_wrapped_between_words():
    out = Console(file=io.StringIO(), force_terminal=True, width=WIDTH, color_system=None)
    long = " ".join(f"word{i}" for i in range(60))
    pairs(out, {"a name of four": long, "short": "value"})
    text = out.file.getvalue()
    assert all(len(line) <= WIDTH for line in lines_of(text))
    assert text.split() == ["a", "name", "of", "four", *long.split(), "short", "value"]
