"""GBNF against llama.cpp itself: which texts its grammar sampler lets through, up to a length."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from conftest import oracle
from random_rules import accepts, texts
from refllm.checkpoints.sources import locate
from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.rule_grammars.context_free import ContextFree
from refllm.decode.grammar.rule_grammars.ebnf import parse

pytestmark = [
    pytest.mark.llamacpp,
    pytest.mark.real,  # the vocabulary of its file
    pytest.mark.filterwarnings("ignore"),  # what llama_cpp's bindings warn of
]


@pytest.fixture(scope="module")
def vocabulary():
    """A model of llama.cpp without weights, and the token of each letter that the tests use."""
    llama_cpp = oracle("llama_cpp")
    model = llama_cpp.Llama(model_path=str(locate("smollm2")), vocab_only=True, verbose=False)
    yield model
    model.close()


def llama_accepts(model, grammar, text):
    """Whether llama.cpp's sampler allows the tokens of a text and the end; None: no grammar."""
    library = oracle("llama_cpp").llama_cpp
    vocabulary = library.llama_model_get_vocab(model._model.model)
    sampler = library.llama_sampler_init_grammar(vocabulary, grammar.encode(), b"root")
    if not sampler:
        return None
    try:
        tokens = [
            each for letter in text for each in model.tokenize(letter.encode(), add_bos=False)
        ]
        for token in tokens:
            if not allowed(library, sampler, token):
                return False
            library.llama_sampler_accept(sampler, token)
        return allowed(library, sampler, library.llama_vocab_eos(vocabulary))
    finally:
        library.llama_sampler_free(sampler)


def allowed(library, sampler, token):
    """Whether the sampler leaves the token a probability."""
    candidates = (library.llama_token_data * 1)()
    candidates[0].id = token
    candidates[0].logit = 1.0
    array = library.llama_token_data_array(data=candidates, size=1, selected=-1, sorted=False)
    library.llama_sampler_apply(sampler, ctypes.byref(array))
    return candidates[0].logit > -np.inf


GRAMMARS = {
    "repetition": ('root ::= "a"* "b"+ "a"?', "ab", 5),
    "counts": ('root ::= "a"{2} ("b" "a"?){1,2} "a"{0,1} "b"{1,}', "ab", 7),
    "sets": (r"root ::= [a-b] [^a] [\x61-] .", "ab-", 4),
    "escapes": (r'root ::= "\"" [\\\]] "\x61\u00e9" "\t" | "\\" "\n"?', '"\\]aé\t\n', 4),
    "empty alternatives": ('root ::= "a" | | b\nb ::= "b" root', "ab", 4),
    "recursion": ('root ::= "a" root "b" | c\nc ::= "" | "b" c', "ab", 6),
    "line ends": ('root ::= ( "a" # one\n | "b" ) x-1\nx-1 ::=\n "a" |\n "b"', "ab", 3),
    "two operators": ('root ::= "a"+? "b"+', "ab", 4),
    "characters": ('root ::= "é" [α-ω]+ | .', "éαω😀", 3),
}


@pytest.mark.parametrize("name", GRAMMARS)
def test_oracle_texts_are_those_that_llamacpp_accepts(vocabulary, name):
    grammar, letters, longest = GRAMMARS[name]
    automaton = ContextFree(parse(grammar))
    for text in texts(letters, longest):
        assert accepts(automaton, text) == llama_accepts(vocabulary, grammar, text), text


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= "a',
        "root ::= [a",
        'root ::= ("a"',
        'root ::= "a" )',
        'root ::= "\\u12"',
        "root ::= x",
        'rot ::= "a"',
        "root = a",
        "root ::= *",
        'root ::= "a"{x}',
    ],
)
def test_oracle_what_llamacpp_rejects_is_rejected(vocabulary, grammar):
    assert llama_accepts(vocabulary, grammar, "") is None
    with pytest.raises(GrammarError):
        parse(grammar)


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        ('root ::= root "b" | "a"', "abb"),
        ('root ::= "a"{,2} "b"', "aab"),
        ('root ::= "a"?+ "b"', "b"),
        ('root ::= x_1\nx_1 ::= "a"', "a"),
        ('root ::= "\\-\\/\\^"', "-/^"),
        ('root ::= "b"\n | "a"', "a"),
    ],
)
def test_differences_are_those_that_are_listed(vocabulary, grammar, text):
    assert llama_accepts(vocabulary, grammar, text) is None
    assert accepts(ContextFree(parse(grammar)), text)
