"""Jump-forward: forced text is appended without sampling; what that saves, and what it changes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import enumeration
from drafting import PROMPT, SMALL, next_logits, random_model, use_exact_draws
from enumeration import exact_distribution, largest_difference
from grammars import WordGrammar
from refllm.api import Model
from refllm.decode.constraint import ConstraintStates
from refllm.decode.fast import captured_step
from refllm.decode.jump_forward import JumpForward, NoDrafter, whole_characters
from refllm.decode.logits_processors import LogitsProcessors
from refllm.decode.sampling import process_logits
from refllm.decode.sampling_params import SamplingParams
from refllm.decode.speculative import loop as module
from refllm.decode.speculative.loop import speculate
from refllm.decode.speculative.model_drafter import ModelDrafter
from refllm.decode.speculative.ngram_drafter import NGramDrafter
from refllm.decode.speculative.tree_drafter import TreeDrafter
from refllm.errors import InputError
from serving import served_model
from strategies import seeds

TEXTS = [
    '{"return": true, "self": 1}',
    '{"return": true, "self": 2}',
    '{"return": false, "import": "def"}',
    "import self",
]


def grammar_of(model: Model, words: Any = TEXTS) -> WordGrammar:
    return WordGrammar.of(words, model)


# --- what is kept and what is saved ---------------------------------------------------------


@pytest.mark.theorem(
    "With jump_forward every output is a text of the grammar, or the beginning of one; each token "
    "that was appended without sampling saves one forward pass",
    source="Zheng et al. 2024 (SGLang), section 4",
)
@given(seed=seeds, temperature=st.sampled_from([0.0, 1.0]), most=st.integers(1, 40))
def test_outputs_are_of_the_grammar_and_each_jumped_token_saves_a_pass(seed, temperature, most):
    model = served_model(300)
    steps: list[Any] = []
    options = {"grammar": grammar_of(model), "temperature": temperature, "rng": seed}
    found = model.generate([1, seed % 300], most, jump_forward=True, details=True, **options)
    assert len(found.tokens) <= most
    if found.finish_reason == "stop":
        assert found.text in TEXTS
    else:
        assert found.finish_reason == "length"
        assert len(found.tokens) == most
        assert any(text.startswith(found.text) for text in TEXTS)
    pieces = list(
        model.stream([1, seed % 300], most, jump_forward=True, on_step=steps.append, **options)
    )
    assert "".join(pieces) == found.text
    assert len(found.tokens) == len(steps) + found.jumped_tokens
    assert found.jumped_tokens == sum(step.jumped for step in steps)


def test_a_text_that_is_forced_as_a_whole_is_encoded_as_the_tokenizer_does():
    model = served_model(300)
    [word] = words = ["return self if else None"]
    canonical = model.tokenizer.encode(word)
    assert len(canonical) < len(word)
    for seed in range(8):
        options = {"grammar": grammar_of(model, words), "temperature": 1.0, "rng": seed}
        found = model.generate([7, seed], 40, jump_forward=True, details=True, **options)
        assert (found.tokens, found.text, found.finish_reason) == (canonical, word, "stop")
        assert found.jumped_tokens == len(canonical) - 1
        for most in range(1, len(canonical)):
            cut = model.generate([7, seed], most, jump_forward=True, details=True, **options)
            if most > 1:
                assert (cut.tokens, cut.jumped_tokens) == (canonical[:most], most - 1)
            assert (len(cut.tokens), cut.finish_reason) == (most, "length")
        free = model.generate([7, seed], 40, details=True, **options)
        assert free.text == word
        assert free.jumped_tokens == 0


@given(seed=seeds, temperature=st.sampled_from([0.0, 1.0]))
def test_forced_text_is_what_follows_without_jumping(seed, temperature):
    """Up to the first choice after a jump the texts are equal; the tokens need not be."""
    model = served_model(300)
    options = {"grammar": grammar_of(model), "temperature": temperature, "rng": seed}
    jumped = model.generate([1, 2], 40, jump_forward=True, details=True, **options)
    free = model.generate([1, 2], 40, details=True, **options)
    same = [text for text in TEXTS if text[0] == free.text[0]]
    assert jumped.text in same  # the first choice is made before any jump
    assert free.text in same


@pytest.mark.parametrize("kind", [NGramDrafter, ModelDrafter, TreeDrafter])
def test_jumps_and_drafts_together_stay_in_the_grammar(kind):
    model = served_model(300)
    accepted = 0
    for seed in range(12):
        drafter = NGramDrafter(3) if kind is NGramDrafter else kind(model, 3)
        steps: list[Any] = []
        prompt = model.tokenizer.encode(TEXTS[seed % 4])
        text = "".join(
            model.stream(
                prompt,
                40,
                grammar=grammar_of(model),
                jump_forward=True,
                drafter=drafter,
                temperature=1.0,
                rng=seed,
                on_step=steps.append,
            )
        )
        assert text in TEXTS
        assert sum(step.jumped for step in steps) > 0
        accepted += sum(step.accepted for step in steps)
    assert accepted > 0


@pytest.mark.parametrize("tree", [False, True])
def test_the_keys_and_values_of_jumped_tokens_are_computed(tree):
    """What follows a jump is sampled from the logits of the whole text."""
    model = served_model(300)
    found = model.generate(
        [1, 2],
        40,
        grammar=grammar_of(model),
        jump_forward=True,
        details=True,
        drafter=TreeDrafter(model, 2, confidence=0.0) if tree else None,
    )
    grammar = grammar_of(model)
    states = ConstraintStates(grammar, 300, grammar.end_tokens)
    free = [
        at
        for at in range(len(found.tokens))
        if np.count_nonzero(states.mask(found.tokens[:at])) > 1
        and not states.forced(found.tokens[:at])
    ]
    assert free
    for at in free:
        z = np.asarray(model.logits([1, 2, *found.tokens[:at]])[-1])
        best = int(np.where(states.mask(found.tokens[:at]), z, -np.inf).argmax())
        first = model.tokenizer.decode([best])
        assert model.tokenizer.decode(found.tokens[at:])[: len(first)] == first


@pytest.mark.parametrize("tree", [False, True])
def test_every_token_is_computed_once(tree, monkeypatch):
    """But for those of the last step, which are never computed, and drafts that are rejected."""
    model = served_model(300)
    computed: list[int] = []

    def make_decode_step(*parts: Any) -> Any:
        step = captured_step.make_decode_step(*parts)

        def counting(tokens: Any, *rest: Any) -> Any:
            computed.append(len(tokens))
            return step(tokens, *rest)

        return counting

    monkeypatch.setattr(module, "make_decode_step", make_decode_step)
    steps: list[Any] = []
    drafter = TreeDrafter(model, 2, confidence=0.0) if tree else NoDrafter()
    options = {"grammar": grammar_of(model), "jump_forward": True, "drafter": drafter}
    list(model.stream([1, 2], 40, on_step=steps.append, **options))
    emitted = sum(len(step.tokens) for step in steps)
    rejected = sum(len(step.drafts) - step.accepted for step in steps)
    last = len(steps[-1].tokens) - steps[-1].accepted
    assert sum(computed) == emitted + rejected - last
    assert sum(step.jumped for step in steps) > 0


# --- what is changed ------------------------------------------------------------------------

SPELLINGS = ["a", "b", "ab"]


class Letters:
    """A tokenizer of three tokens that takes the longest first."""

    def encode(self, text: str) -> list[int]:
        return _longest(text)

    def decode(self, ids: Any) -> str:
        return "".join(SPELLINGS[i] for i in ids)


def _longest(text: str) -> list[int]:
    found: list[int] = []
    while text:
        token = 2 if text.startswith("ab") else SPELLINGS.index(text[0])
        found.append(token)
        text = text[len(SPELLINGS[token]) :]
    return found


@pytest.mark.theorem(
    "Jumping changes the distribution: of 'aba' and 'abb' with the tokens a, b, ab the first "
    "has probability p(a | ab) with jumps, and P(a) p(a | a b) + P(ab) p(a | ab) without",
    source="by enumeration; Zheng et al. 2024, appendix B.3, on distortion",
)
def test_an_exact_example_of_the_bias(monkeypatch):
    use_exact_draws(monkeypatch)
    sampling = SamplingParams(temperature=1.0)
    monkeypatch.setattr(
        module,
        "choose_tokens",
        lambda z, sampling, rng: [enumeration.draw(process_logits(z, 1.0)[0], rng.random())],
    )
    target = random_model(SMALL, 4)
    grammar = WordGrammar(["aba", "abb"], SPELLINGS)

    def run(rng: Any, jumps: bool) -> tuple[int, ...]:
        states = ConstraintStates(grammar, 3)
        jump = JumpForward(states, Letters()) if jumps else None  # type: ignore[arg-type]
        output: list[int] = []
        for step in speculate(
            target.weights,
            SMALL,
            PROMPT,
            3,
            sampling,
            rng,
            NoDrafter(),
            processors=LogitsProcessors(sampling, constraint=states),
            jump=jump,
        ):
            output += step.tokens
            if states.is_complete(output):
                break
        return tuple(output)

    def p(*output: int, of: tuple[int, ...]) -> np.ndarray:
        z = np.exp(next_logits(target, [*PROMPT, *output]))[list(of)]
        return z / z.sum()

    free = exact_distribution(lambda rng: run(rng, False))
    jumped = exact_distribution(lambda rng: run(rng, True))
    first = p(of=(0, 2))  # a, or ab
    after_ab = p(2, of=(0, 1))
    after_a_b = p(0, 1, of=(0, 1))
    assert (
        largest_difference(
            free,
            {
                (0, 1, 0): first[0] * after_a_b[0],
                (0, 1, 1): first[0] * after_a_b[1],
                (2, 0): first[1] * after_ab[0],
                (2, 1): first[1] * after_ab[1],
            },
        )
        < 1e-12
    )
    assert largest_difference(jumped, {(2, 0): after_ab[0], (2, 1): after_ab[1]}) < 1e-12
    # the probability of the text 'aba'
    biased = jumped[2, 0] - (free[0, 1, 0] + free[2, 0])
    assert abs(biased) > 0.01
    texts = {"".join(SPELLINGS[t] for t in tokens) for tokens in (*free, *jumped)}
    assert texts == {"aba", "abb"}  # the language is the same


# --- how it is encoded ----------------------------------------------------------------------


def jump_over(words: list[str], spellings: list[str], tokenizer: Any, output: list[int]) -> Any:
    grammar = WordGrammar(words, spellings)
    return JumpForward(ConstraintStates(grammar, len(spellings)), tokenizer).replace_last(output, 9)


def test_the_last_token_is_encoded_again_with_what_follows():
    model = served_model(300)
    tokenizer = model.tokenizer
    jump = JumpForward(ConstraintStates(grammar_of(model), 300, [5]), tokenizer)
    canonical = tokenizer.encode("import self")
    letters = tokenizer.encode("i")
    assert jump.replace_last(letters, 20) == canonical
    assert jump.replace_last(letters, 2) == canonical[:2]
    assert jump.replace_last(letters, 1) == letters
    one = tokenizer.encode("r")
    whole = JumpForward(ConstraintStates(grammar_of(model, ["return"]), 300, [5]), tokenizer)
    assert whole.replace_last(one, 20) == tokenizer.encode("return") != one
    assert whole.replace_last(one, 1) == one
    # the tokens before the last one are not the tokenizer's: they stay
    spelled = [tokenizer.encode(letter)[0] for letter in "imp"]
    found = jump.replace_last(spelled, 20)
    assert tokenizer.decode([*spelled[:-1], *found]) == "import self"
    assert found == tokenizer.encode("port self")


def test_the_last_token_is_left_to_the_model_where_a_longer_one_is_legal():
    """After "x" the text "b" is forced, then "b" or "c": of "b" a longer token begins, "bc"."""
    spellings = ["x", "a", "b", "c", "bc", "abc"]

    class Longest:
        def encode(self, text: str) -> list[int]:
            found: list[int] = []
            while text:
                best = max((s for s in spellings if text.startswith(s)), key=len)
                found.append(spellings.index(best))
                text = text[len(best) :]
            return found

        def decode(self, ids: Any) -> str:
            return "".join(spellings[i] for i in ids)

    def jump(words: list[str], output: list[int]) -> list[int]:
        return jump_over(words, spellings, Longest(), output)

    assert jump(["xabb", "xabc"], [0]) == [0, 1]  # not b: bc is legal, too
    assert jump(["xabb", "xaba"], [0]) == [0, 1, 2]  # no token goes beyond b
    assert jump(["xaab", "xaabcc"], [0]) == [0, 1, 1]
    assert jump(["xb", "xbc"], [0]) == [0]  # nothing is left to append
    assert jump(["xa"], [0]) == [0, 1]


def test_nothing_is_jumped_where_there_is_a_choice_or_the_output_may_end():
    tokenizer = Letters()
    assert jump_over(["aba", "abb"], SPELLINGS, tokenizer, [2]) == [2]
    assert jump_over(["a", "ab"], SPELLINGS, tokenizer, [0]) == [0]
    assert jump_over(["ab"], SPELLINGS, tokenizer, [0]) == [2]
    assert jump_over(["bab"], SPELLINGS, tokenizer, [1]) == [1, 2]


def test_a_tokenizer_that_cannot_write_the_text_is_not_used():
    broken = SimpleNamespace(encode=lambda text: [1], decode=Letters().decode)
    assert jump_over(["ab"], SPELLINGS, broken, [0]) == [0, 1]  # only after the last token
    broken = SimpleNamespace(encode=lambda text: [0], decode=Letters().decode)
    assert jump_over(["ab"], SPELLINGS, broken, [0]) == [0]
    half = SimpleNamespace(encode=_longest, decode=lambda ids: "\ufffd")
    assert jump_over(["ab"], SPELLINGS, half, [0]) == [0]


def test_an_encoding_that_the_constraint_rejects_is_not_used():
    class WithoutPairs(WordGrammar):
        def advance(self, state, token):
            if token == 2:
                raise InputError("no pairs")
            return super().advance(state, token)

    states = ConstraintStates(WithoutPairs(["ab"], SPELLINGS), 3)
    jump = JumpForward(states, Letters())  # type: ignore[arg-type]
    assert jump.replace_last([0], 9) == [0, 1]


@given(text=st.text(max_size=6), cut=st.integers(0, 24))
def test_whole_characters_are_the_longest_text_that_the_bytes_begin_with(text, cut):
    data = text.encode("utf-8", "replace")[:cut]
    found = whole_characters(data)
    assert data.startswith(found.encode())
    assert len(data) - len(found.encode()) < 4
    assert text.startswith(found)


def test_bytes_that_begin_in_a_character_have_no_text():
    assert whole_characters("é".encode()[1:] + b"abcdef") == ""


def test_what_cannot_be_jumped_is_rejected():
    model = served_model(300)
    grammar = grammar_of(model)
    with pytest.raises(InputError, match="jump_forward needs a grammar"):
        model.generate([1], 4, jump_forward=True)
    with pytest.raises(InputError, match="without their log-probabilities"):
        model.generate([1], 4, jump_forward=True, grammar=grammar, logprobs=1, details=True)
