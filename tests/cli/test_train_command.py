"""``refllm train``: the model measures as its card says, and an interrupted run continues."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import Result

from command_line import TEXT, run, write_text
from refllm.corpus import Document
from refllm.jobs import train
from refllm.jobs.train_options import TrainingOptions
from refllm.model.config import ModelConfig
from refllm.train import data
from refllm.train.data import Data, standard_library
from refllm.train.schedule import Phase


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "code.py")


def test_the_defaults_are_the_plan_and_the_network_of_the_bundled_model():
    data = standard_library()
    if len(data.streams) == 1:
        pytest.skip("this Python carries no test package")
    assert TrainingOptions().phases(data) == (
        Phase(10_625, 8, 256, (4, 1)),
        Phase(1_875, 2, 1024, (1, 0)),
    )
    assert TrainingOptions().config(4096, 0) == ModelConfig(
        "llama",
        4096,
        256,
        768,
        4,
        4,
        2,
        64,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_ids=(0,),
    )
    draft = TrainingOptions(width=64, layers=2).config(4096, 0)
    assert (draft.num_attention_heads, draft.num_key_value_heads, draft.intermediate_size) == (
        1,
        1,
        192,
    )


SMALL = shlex.split(
    "--vocab-size 300 --width 16 --layers 1 --heads 2 --context 64 --steps 6 --batch 2 "
    "--length 16 --long-steps 2 --long-length 24 --rate 0.01 --warmup 1 --workers 1 "
    "--evaluate-every 3 --save-every 2"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, text_file) -> tuple[Path, Result]:
    output = tmp_path_factory.mktemp("train") / "mine"
    return output, run("train", "--output", output, "--data", text_file, *SMALL)


def test_train_leaves_a_model_that_measures_as_it_says(trained, text_file, tmp_path):
    output, result = trained
    assert result.exit_code == 0, result.output
    card = json.loads((output / "card.json").read_text())
    bits = card["measured"]["bits per byte"]
    assert (
        result.stdout
        == f"{output}: {bits:.3f} bits per byte on {card['measured']['tokens']:,} held-out tokens\n"
    )
    assert "\x1b" not in result.output
    held = tmp_path / "held"
    held.write_text("".join(TEXT.splitlines(keepends=True)[-4:]))  # 5 % of its 80 lines
    assert (
        json.loads(run("eval", "--model", output, "--text", held, "--json").stdout)["bits per byte"]
        == bits
    )
    assert run("generate", "def", "--model", output, "-n", "5").exit_code == 0
    assert "training" in run("info", "--model", output, "--verify").stdout
    rows = [
        line.split() for line in result.stderr.splitlines() if line.strip().startswith(("3 ", "6 "))
    ]
    assert [row[0] for row in rows] == ["3", "6"]


def test_the_recorded_command_gives_the_same_model(trained, tmp_path, monkeypatch):
    """The command on the card, given from where the data is, ends with the same bytes."""
    output, _ = trained
    command = shlex.split(json.loads((output / "card.json").read_text())["training"]["command"])
    assert command[:2] == ["refllm", "train"]
    monkeypatch.chdir(tmp_path)
    assert run(*command[1:]).exit_code == 0
    again = tmp_path / output.name
    assert (again / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
    assert (again / "tokenizer.json").read_bytes() == (output / "tokenizer.json").read_bytes()


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    trained, text_file, tmp_path, monkeypatch
):
    output, _ = trained
    real = train.train

    def interrupted(*args, **kwargs):
        def on_step(step, loss):
            if step == 5:
                raise KeyboardInterrupt

        return real(*args, **{**kwargs, "on_step": on_step})

    again = tmp_path / "again"
    monkeypatch.setattr(train, "train", interrupted)
    stopped = run("train", "--output", again, "--data", text_file, *SMALL)
    assert stopped.exit_code == 130
    assert not again.exists()
    monkeypatch.setattr(train, "train", real)
    result = run("train", "--output", again, "--data", text_file, *SMALL)
    assert result.exit_code == 0
    assert "continued after 4 steps" in result.stderr
    assert (again / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()


def test_a_finished_run_is_only_finished_again(trained, text_file):
    """Nothing is trained: the state is complete, and the directory is written from it."""
    output, _ = trained
    before = (output / "model.safetensors").read_bytes()
    assert run("train", "--output", output, "--data", text_file, *SMALL).exit_code == 2
    result = run("train", "--output", output, "--data", text_file, *SMALL, "--overwrite")
    assert result.exit_code == 0
    assert (output / "model.safetensors").read_bytes() == before


def test_a_home_directory_is_found_also_where_the_shell_leaves_it(text_file, tmp_path, monkeypatch):
    """``--output=~/tiny`` reaches the program as it is typed."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    result = run("train", "--output", "~/tiny", "--data", text_file, *SMALL)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "home" / "tiny" / "manifest.json").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["home"]


def test_the_current_folder_is_an_output_if_it_is_empty(text_file, tmp_path, monkeypatch):
    home = tmp_path / "mine"
    home.mkdir()
    monkeypatch.chdir(home)
    for name, rejected in ((".", False), (".", True), ("..", True), ("/", True)):
        result = run("train", "--output", name, "--data", text_file, *SMALL)
        assert result.exit_code == (2 if rejected else 0), result.output
        assert ("exists already" in result.stderr) == rejected
        monkeypatch.chdir(home)  # it is a new folder now
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "mine.training"]


def test_a_run_is_not_continued_with_other_text(trained, text_file, tmp_path):
    output, _ = trained
    other = tmp_path / "code.py"
    other.write_text(TEXT + "x = 1\n")
    work = output.with_name(output.name + ".training")
    result = run("train", "--output", tmp_path / "m", "--work", work, "--data", other, *SMALL)
    assert result.exit_code == 2
    assert "begun with other text" in result.stderr


def test_another_plan_is_noted(trained, text_file, tmp_path):
    output, _ = trained
    # the others need it
    work = shutil.copytree(output.with_name(output.name + ".training"), tmp_path / "work")
    longer = [word if word != "6" else "8" for word in SMALL]
    result = run(
        "train", "--output", tmp_path / "longer", "--work", work, "--data", text_file, *longer
    )
    assert result.exit_code == 0
    assert "begun with another plan" in result.stderr


@pytest.mark.parametrize(
    ("option", "message"), [("--mlp", "of another network"), ("--seed", "6 steps of another plan")]
)
def test_a_finished_run_is_not_passed_off_as_another(trained, text_file, tmp_path, option, message):
    """Nothing would be trained, and the card would record a command that never ran."""
    work = trained[0].with_name(trained[0].name + ".training")
    before = {p.name: p.read_bytes() for p in work.iterdir()}
    command = ("train", "--output", tmp_path / "other", "--work", work, "--data", text_file, *SMALL)
    result = run(*command, option, "10")
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "other").exists()
    assert {p.name: p.read_bytes() for p in work.iterdir()} == before
    assert run(*command, "--evaluate-every", "1").exit_code == 0  # what is reported does not matter


def test_a_draft_reads_its_teachers_tokens(trained, text_file, tmp_path):
    output, _ = trained
    options = [*SMALL, "--layers", "1", "--width", "8", "--heads", "1"]
    draft = tmp_path / "draft"
    assert (
        run(
            "train", "--output", draft, "--data", text_file, "--draft-of", output, *options
        ).exit_code
        == 0
    )
    assert (draft / "tokenizer.json").read_bytes() == (output / "tokenizer.json").read_bytes()
    card = json.loads((draft / "card.json").read_text())
    assert 0 < card["measured"]["against the teacher"]["acceptance"] < 1
    assert "--teacher" in card["training"]["command"]


def test_another_teacher_is_noticed(trained, text_file, tmp_path):
    """While there is something left to train it is told; a finished run is not passed off
    as another's.
    """
    output, _ = trained
    command = (
        "train",
        "--output",
        tmp_path / "m",
        "--work",
        tmp_path / "w",
        "--data",
        text_file,
        *SMALL,
    )
    taught = (*command, "--teacher", output, "--overwrite")
    assert run(*taught).exit_code == 0
    assert run(*taught).exit_code == 0  # the same again: nothing is left to do
    for other in ((*command, "--overwrite", "--vocab-size", "281"), (*taught, "--alpha", "0.5")):
        result = run(*other)
        assert result.exit_code == 2, result.output
    assert "6 steps of another teacher, or weight of it" in result.stderr
    longer = [word if word != "6" else "8" for word in taught]
    result = run(*longer, "--alpha", "0.5")
    assert result.exit_code == 0
    assert "begun with another teacher, or weight of it" in result.stderr
    # of a run that an earlier version began, nothing is known
    (tmp_path / "w" / train.ORIGIN).unlink()
    assert run(*longer, "--alpha", "1").exit_code == 0


def test_a_run_goes_on_from_the_weights_that_it_began_with(trained, text_file, tmp_path):
    output, _ = trained
    command = (
        "train",
        "--output",
        tmp_path / "m",
        "--work",
        tmp_path / "w",
        "--data",
        text_file,
        *SMALL,
        "--overwrite",
    )
    assert run(*command, "--start", output, "--start-share", 0.5).exit_code == 0
    assert "--start-share 0.5" in (tmp_path / "m" / "card.json").read_text("utf-8")
    alone = run(*command, "--start-share", 0.5)
    assert (alone.exit_code, "name that model, too" in alone.stderr) == (2, True)
    assert run(*command, "--start", output).exit_code == 0
    other = tmp_path / "other"
    shutil.copytree(output, other)
    tensors = load_file(other / "model.safetensors")
    save_file({name: t + 1 for name, t in tensors.items()}, other / "model.safetensors")
    result = run(*command, "--start", other)
    assert result.exit_code == 2
    assert "begun from other weights" in result.stderr


def test_the_installers_are_read_where_they_are_asked_for(monkeypatch, tmp_path):
    """And the card's command says so, either way."""
    asked = []
    commands = []

    def read(**options):
        asked.append(options)
        return Data(
            "letters",
            {"library": [Document("a", TEXT)]},
            [Document("b", TEXT)],
            (1,),
            (1,),
            code=False,
        )

    def keep(run, *, command, **rest):
        commands.append(shlex.split(command))
        return {"measured": {"bits per byte": 1.0, "tokens": 1}}

    monkeypatch.setattr(data, "standard_library", read)
    monkeypatch.setattr(train, "run", keep)
    for option in ((), ("--installers",), ("--no-installers", "--no-tests")):
        assert run("train", "--output", tmp_path / "m", *SMALL, *option).exit_code == 0
    assert asked == [
        {"tests": True, "installers": False},
        {"tests": True, "installers": True},
        {"tests": False, "installers": False},
    ]
    recorded = [
        [word for word in words if "installers" in word or "tests" in word] for words in commands
    ]
    assert recorded == [
        ["--tests", "--no-installers"],
        ["--tests", "--installers"],
        ["--no-tests", "--no-installers"],
    ]


def test_phases_can_be_spelled_out(text_file, tmp_path):
    phases = ["--phase", "2,1,16", "--phase", "1,2,8,1"]
    result = run(
        "train", "--output", tmp_path / "m", "--data", text_file, "--no-tests", *SMALL, *phases
    )
    assert result.exit_code == 0, result.output
    training = json.loads((tmp_path / "m" / "card.json").read_text())["training"]
    words = shlex.split(training["command"])
    assert words.count("--phase") == 2
    assert "--no-tests" in words
    assert "--no-installers" in words
    assert not {"--steps", "--tests", "--work", "--overwrite", "--backend"} & set(words)
    plan = training["plan"]
    assert [list(p.values()) for p in plan["phases"]] == [[2, 1, 16, [1]], [1, 2, 8, [1]]]
