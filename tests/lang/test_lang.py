"""Programs: what they append equals single requests, in any order, with branches and a chat;
and what is shared is computed once.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest

from chat_models import chat_model
from refllm import load
from refllm.errors import InputError
from refllm.lang import Runtime, State, assistant, gen, program, select, system, user
from refllm.lang.choices import RULES
from refllm.serve.engine import Engine

MODEL = load("stdlib-draft", dtype="float64")
PREFIX = "import os\nimport sys\n\n\ndef main(arguments):\n    return "


@pytest.fixture
def runtime():
    with Runtime(MODEL, block_size=4) as found:
        yield found


def tokens_of(text: str, choice: str) -> tuple[list[int], int]:
    """The tokens of text and choice, and where those begin that the text alone does not have."""
    base = MODEL.tokenizer.encode(text, special=True)
    ids = MODEL.tokenizer.encode(text + choice, special=True)
    differ = [i for i, (a, b) in enumerate(zip(base, ids, strict=False)) if a != b]
    return ids, min([*differ, len(base)])


def mean_logprob(text: str, choice: str) -> float:
    """Of the choice's tokens, by one full forward."""
    ids, start = tokens_of(text, choice)
    z = MODEL.logits(ids)
    log_p = z - z.max(-1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
    return float(np.mean([log_p[i - 1, ids[i]] for i in range(start, len(ids))]))


def test_a_program_appends_what_single_requests_give(runtime):
    s = State(runtime)
    s += PREFIX
    s += gen("first", max_tokens=5)
    s += "\n    " + gen("second", max_tokens=4, stop="\n") + "#"
    first = MODEL.generate(PREFIX, 5)
    text = PREFIX + first + "\n    "
    second = MODEL.generate(text, 4, stop="\n")
    assert (s["first"], s["second"]) == (first, second)
    assert s.text == text + second + "#"
    assert s.names == ["first", "second"]
    assert len(s.meta("first").tokens) == 5


@pytest.mark.parametrize("rule", RULES)
def test_select_scores_choices_by_their_log_probabilities(runtime, rule):
    choices = ["None", "arguments", "[]", "0"]
    s = State(runtime)
    s += PREFIX
    s += select("choice", choices, rule)
    found = s.meta("choice")
    assert s["choice"] == found.choice == choices[found.index]
    assert s.text == PREFIX + found.choice
    means = [float(np.mean(tokens)) for tokens in found.logprobs]
    assert means == pytest.approx([mean_logprob(PREFIX, c) for c in choices], abs=1e-10)
    if rule == "token_length_normalized":
        assert found.index == int(np.argmax(means))


def test_the_third_rule_takes_off_what_the_choice_has_alone(runtime):
    choices = ["None", "arguments[0]"]
    s = State(runtime)
    s += PREFIX + select("choice", choices, "unconditional_likelihood_normalized")
    found = s.meta("choice")
    for choice, score, own in zip(choices, found.scores, found.logprobs, strict=True):
        ids, start = tokens_of(PREFIX, choice)
        ids = ids[start:]
        z = MODEL.logits(ids)
        log_p = z - z.max(-1, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
        alone = [0.0] + [log_p[i - 1, ids[i]] for i in range(1, len(ids))]
        assert score == pytest.approx(np.mean(np.subtract(own, alone)), abs=1e-10)


def test_branches_continue_the_text_so_far_and_join_gathers_them(runtime):
    s = State(runtime)
    s += PREFIX + gen("a", max_tokens=3)
    branches = s.fork(3)
    for i, branch in enumerate(branches):
        branch += f"  # {i} " + gen("comment", max_tokens=4)
    found = branches.join()
    head = PREFIX + s["a"]
    expected = [MODEL.generate(f"{head}  # {i} ", 4) for i in range(3)]
    assert found == {"comment": expected}
    assert s["comment"] == branches["comment"] == expected
    assert branches[1]["a"] == s["a"]
    assert s.text == head  # the branches write on their own
    assert branches[2].text == f"{head}  # 2 {expected[2]}"


def test_the_shared_prefix_is_computed_once():
    shared = len(MODEL.tokenizer.encode(PREFIX * 4, special=True))

    def count(**options):
        with Runtime(MODEL, block_size=4, **options) as runtime:
            s = State(runtime)
            s += PREFIX * 4
            branches = s.fork(5)
            for i, branch in enumerate(branches):
                branch += f"{i}" + gen("x", max_tokens=2)
            texts = branches.join()["x"]
            return texts, runtime.savings

    texts, cached = count()
    naive_texts, naive = count(prefix_cache=None, concurrent=False)
    assert texts == naive_texts
    assert naive.cached_tokens == 0 < cached.cached_tokens
    assert naive.computed_tokens >= 5 * shared
    assert cached.computed_tokens <= shared + 5 * (4 + 4)
    assert cached.hit_rate >= 0.75
    assert cached.forward_passes < naive.forward_passes


def test_select_computes_the_text_once_and_each_choice_from_its_first_token():
    with Runtime(MODEL, block_size=4) as runtime:
        s = State(runtime)
        s += PREFIX * 4 + select("choice", ["None", "[]", "0", "''"])
        s.wait()
        shared = len(MODEL.tokenizer.encode(PREFIX * 4, special=True))
        assert runtime.savings.requests == 5
        assert runtime.savings.computed_tokens <= shared + 4 * (4 + 4)


@program
def complete(s, text, count):
    """Two generations, the second asks for the first."""
    s += text
    s += gen("a", max_tokens=count)
    if s["a"].strip():
        s += "\n" + gen("b", max_tokens=2)
    return len(s["a"])


def test_a_batch_of_programs_gives_what_each_gives_alone(runtime):
    cases = [{"text": text, "count": n} for text in ("def f(", PREFIX, "import ") for n in (1, 4)]
    together = complete.run_batch(runtime, cases)
    for case, state in zip(cases, together, strict=True):
        alone = complete.run(runtime, **case)
        assert (state.text, state.returned) == (alone.text, alone.returned)
    assert complete.run_batch(runtime, []) == []
    assert complete.__doc__ == "Two generations, the second asks for the first."


def test_gen_does_not_wait(runtime):
    """Both states ask before either has an answer: they share the engine's steps."""
    states = [State(runtime) for _ in range(4)]
    for i, s in enumerate(states):
        s += PREFIX + str(i) + gen("x", max_tokens=24)
    for s in states:
        s.wait()
    assert runtime.savings.forward_passes < 4 * 24


def test_an_error_ends_its_state_alone_and_reading_raises_it(runtime):
    good = State(runtime)
    good += "import " + gen("x", max_tokens=2)
    bad = State(runtime)
    bad += "import " + gen("x", max_tokens=2, top_p=7.0) + gen("y", max_tokens=2)
    for name in "xy":
        with pytest.raises(InputError, match="top_p must be within"):
            bad[name]
    with pytest.raises(InputError, match="top_p"):
        bad.text  # noqa: B018
    branches = bad.fork(2)
    branches[0].__iadd__(gen("z", max_tokens=1))
    with pytest.raises(InputError, match="top_p"):
        branches.join()
    assert good["x"] == MODEL.generate("import ", 2)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: select("x", []), "at least one choice"),
        (lambda: select("x", ["a", ""]), "none that is empty"),
        (lambda: select("x", ["a", "a"]), "choices that differ"),
        (lambda: select("x", "ab"), "a list of texts"),
        (lambda: select("x", ["a"], "greedy"), "does not know the rule 'greedy'"),
        (lambda: gen("x", n=2), "takes no n="),
        (lambda: gen("x", regex="a", ebnf="b"), "one grammar, got regex and ebnf"),
        (lambda: gen("x", choices=["a"], stop="b"), "takes no stop"),
    ],
)
def test_bad_arguments_are_named(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_unknown_names_parts_and_counts_are_named(runtime):
    s = State(runtime)
    s += "import " + gen("module", max_tokens=1)
    with pytest.raises(KeyError, match="did you mean 'module'"):
        s["modul"]
    with pytest.raises(TypeError, match="not int: 3"):
        s += 3
    for count in (0, -1, 1.5, True):
        with pytest.raises(InputError, match="1 or more branches"):
            s.fork(count)


def test_an_empty_state_is_named(runtime, monkeypatch):
    monkeypatch.setattr(type(MODEL.tokenizer), "encode", lambda self, text, **how: [])
    s = State(runtime)
    s += gen("x", max_tokens=1)
    with pytest.raises(InputError, match="the state is empty"):
        s["x"]


def test_a_choice_without_a_token_of_its_own_is_named(runtime, monkeypatch):
    monkeypatch.setattr(type(MODEL.tokenizer), "encode", lambda self, text, **how: [5, 6])
    s = State(runtime)
    s += "text" + select("x", ["a", "b"])
    with pytest.raises(InputError, match="the choice 'a' adds no token to the text"):
        s["x"]


def test_a_chat_is_the_template_s_text_and_an_open_answer_is_continued():
    model = chat_model()
    with Runtime(model, block_size=4) as runtime:
        s = State(runtime)
        s += system("Be brief.")
        s += user("Count to " + "three")
        s += assistant("one, " + gen("rest", max_tokens=5) + "!")
        s += user("Again") + assistant(gen("again", max_tokens=4))
        history = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Count to three"},
        ]
        begun = [*history, {"role": "assistant", "content": "one, "}]
        ids = model.chat_tokenizer.encode(begun, continue_final_message=True)
        assert s["rest"] == model.tokenizer.decode(model.generate(ids, 5))
        history.append({"role": "assistant", "content": f"one, {s['rest']}!"})
        history.append({"role": "user", "content": "Again"})
        again = model.chat_tokenizer.encode(history, add_generation_prompt=True)
        assert s["again"] == model.tokenizer.decode(model.generate(again, 4))
        assert s.messages == [*history, {"role": "assistant", "content": s["again"]}]
        assert s.text == model.chat_tokenizer.templates.render(s.messages)
        for branch in s.fork(2):  # between messages, a choice
            branch += user("yes or no?") + assistant(select("choice", ["yes", "no"]))
            assert branch["choice"] in ("yes", "no")
        s += user("Say " + gen("x", max_tokens=1))
        with pytest.raises(InputError, match="stand within a message of user"):
            s["x"]


def test_messages_need_a_chat_template_and_text_stands_within_them(runtime):
    s = State(runtime)
    s += user("hello") + assistant(gen("x", max_tokens=1))
    with pytest.raises(InputError, match="chat template"):
        s["x"]
    s = State(runtime)
    s += user("hello")
    s += "stray"
    with pytest.raises(InputError, match="text stands outside of the messages of a chat: 'stray'"):
        s.wait()
    s = State(runtime)
    s += "text" + user("hello")
    with pytest.raises(InputError, match="begins with text: 'text'"):
        s.wait()
    s = State(runtime)
    s += user("hello" + system("no"))
    with pytest.raises(InputError, match="a message of system begins within one of user"):
        s.wait()


def test_an_engine_is_taken_as_it_is_and_no_thread_is_left():
    engine = Engine(MODEL, num_blocks=64, prefix_cache=None)
    before = threading.active_count()
    with Runtime(engine) as runtime:
        assert runtime.engine is engine
        assert not runtime.caches_prefixes
        s = State(runtime)
        s += "import " + gen("x", max_tokens=2)
        s.wait()
    assert runtime.savings.requests == 1
    for thread in threading.enumerate():
        if thread.name == "refllm-program":
            thread.join(5)
    assert threading.active_count() <= before
