"""Where an output ends: end tokens, stop tokens, stop strings, min_tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.api import Model
from refllm.decode.completion import OutputReader, output_rules
from refllm.decode.output_params import (
    OutputParams,
    StopTokens,
    split_options,
    truncate_prompt,
)
from refllm.decode.sampling_params import GREEDY, SamplingParams
from tiny_models import byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()
A, B, C = TOKENIZER.encode("abc")
END = TOKENIZER.encode("~")[0]
STOP = TOKENIZER.encode("!")[0]


def read(text: str, params: OutputParams, with_text: bool = True):
    """Read the tokens of a text until the output ends."""
    reader = OutputReader(
        params, StopTokens(frozenset([END]), frozenset([STOP]), params.min_tokens),
        TOKENIZER if with_text else None,
    )  # fmt: skip
    chunks = []
    for token in TOKENIZER.encode(text):
        chunks.append(reader.push(token))
        if reader.finish_reason:
            break
    else:
        chunks.append(reader.finish())
    assert all(chunk.finish_reason is None for chunk in chunks[:-1])
    output = reader.completion(0, TOKENIZER)
    assert "".join(chunk.text for chunk in chunks) == output.text or not with_text
    assert [t for chunk in chunks for t in chunk.tokens] == output.tokens
    return output


def by_definition(text: str, params: OutputParams) -> tuple[str, str, str, int | str | None]:
    """(tokens as text, text, finish_reason, stop_reason) of an output whose tokens are single
    characters.
    """
    include = params.include_stop_str_in_output
    for count in range(1, len(text) + 1):
        seen = text[:count]
        stopping = count >= params.min_tokens and seen[-1] in "~!"
        if stopping:
            seen = seen[:-1]
        # matches that end after the text of the first min_tokens tokens
        ends = [
            (at, len(s), s)
            for s in params.stop
            for at in range(len(seen))
            if seen.startswith(s, at) and at + len(s) > params.min_tokens
        ]
        if ends and not stopping:
            at, length, s = min(ends)
            return seen, seen[: at + length] if include else seen[:at], "stop", s
        if stopping:
            kept = text[:count] if include else seen
            reason = None if text[count - 1] == "~" else STOP
            return kept, kept, "stop", reason
    return text, text, "length", None


@pytest.mark.theorem(
    "An output ends at the first end token, stop token or stop string that counts after "
    "min_tokens, and contains it only with include_stop_str_in_output",
    source="vllm/v1/core/sched/utils.py, vllm/v1/engine/detokenizer.py",
)
@given(
    text=st.text("ab~!", max_size=9),
    stop=st.lists(st.text("ab", min_size=1, max_size=2), max_size=2, unique=True),
    min_tokens=st.integers(0, 4),
    include=st.booleans(),
)
def test_an_output_ends_where_its_definition_says(text, stop, min_tokens, include):
    if any(a != b and a in b for a in stop for b in stop):
        stop = stop[:1]  # one that contains another may be held back: see test_detokenizer
    params = OutputParams(stop=stop, min_tokens=min_tokens, include_stop_str_in_output=include)
    found = read(text, params)
    tokens, shown, finish_reason, stop_reason = by_definition(text, params)
    assert TOKENIZER.decode(found.tokens) == tokens
    assert (found.text, found.finish_reason, found.stop_reason) == (
        shown,
        finish_reason,
        stop_reason,
    )
    if not stop:
        silent = read(text, params, with_text=False)
        assert (silent.tokens, silent.text) == (found.tokens, found.text)


def test_the_first_stop_string_that_is_complete_is_the_reason():
    """A longer one that had begun before it does not hold the output back."""
    for text in ("xab", "xab~", "xabcd"):
        found = read(text, OutputParams(stop=["b", "abcd"]))
        assert (found.text, found.finish_reason, found.stop_reason) == ("xa", "stop", "b")
        assert TOKENIZER.decode(found.tokens) == "xab"


@pytest.mark.parametrize("end", ["", "~"])
def test_half_a_character_may_complete_a_stop_string(end):
    """It is U+FFFD only once the output has ended: the text still ends before it."""
    params = OutputParams(stop="a\N{REPLACEMENT CHARACTER}")
    reader = OutputReader(params, StopTokens(frozenset([END])), TOKENIZER)
    half = TOKENIZER.encode("é")[0]
    pieces = [reader.push(token).text for token in [B, A, half, *TOKENIZER.encode(end)]]
    if not end:
        pieces.append(reader.finish().text)
    assert "".join(pieces) == "b"
    assert (reader.finish_reason, reader.stop_reason) == ("stop", params.stop[0])


def test_half_a_character_is_shown_at_the_end():
    first, _ = TOKENIZER.encode("é")
    reader = OutputReader(OutputParams(), StopTokens(), TOKENIZER)
    assert reader.push(first).text == ""
    assert reader.finish().text == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stop": 3}, "stop must be strings"),
        ({"stop": ["a", ""]}, "stop must be strings"),
        ({"stop_token_ids": [-1]}, "stop_token_ids must be token ids"),
        ({"stop_token_ids": 3}, "stop_token_ids must be token ids"),
        ({"stop_token_ids": [True]}, "stop_token_ids must be token ids"),
        ({"min_tokens": 1.5}, "min_tokens must be an integer"),
        ({"min_tokens": True}, "min_tokens must be an integer"),
    ],
)
def test_bad_fields_are_rejected_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        OutputParams(**fields)


def test_options_are_split_into_two_records():
    sampling, output = split_options(None, None, {"top_k": 2, "min_tokens": 1})
    assert (sampling, output) == (SamplingParams(top_k=2), OutputParams(min_tokens=1))
    assert split_options(sampling, output, {}) == (sampling, output)
    with pytest.raises(ValueError, match=r"either output=.*\(stop\), not both"):
        split_options(None, output, {"stop": "x"})
    with pytest.raises(ValueError, match="output must be an OutputParams"):
        split_options(None, {"stop": "x"}, {})
    with pytest.raises(TypeError, match="temprature"):
        split_options(None, None, {"temprature": 1.0})


def test_a_prompt_is_truncated_from_the_left():
    assert truncate_prompt([1, 2, 3], None, 2) == [1, 2, 3]
    assert truncate_prompt([1, 2, 3], 1, 2) == [3]
    assert truncate_prompt([1, 2, 3], 5, 2) == [1, 2, 3]
    assert truncate_prompt([1, 2, 3], -1, 2) == [2, 3]
    for wrong in (0, -2, 1.0, True):
        with pytest.raises(ValueError, match="truncate_prompt_tokens must be"):
            truncate_prompt([1], wrong, 2)


# --- Model.generate -----------------------------------------------------------------------


def network(**changes) -> Model:
    record = tiny_model(0, max_position_embeddings=64, **changes)
    return Model(record.config, record.weights, record.tokenizer)


FREE = network(eos_token_ids=())
PROMPT = [3, 1]
PLAIN = FREE.generate(PROMPT, 8)


def test_min_tokens_masks_end_and_stop_tokens_in_generation():
    """The first token of the plain output is an end token: it is masked, not skipped."""
    ending = network(eos_token_ids=(PLAIN[0],))
    assert ending.generate(PROMPT, 8) == []
    found = ending.generate(PROMPT, 8, min_tokens=3)
    assert len(found) >= 3
    assert PLAIN[0] not in found[:3]
    by_stop_token = FREE.generate(PROMPT, 8, min_tokens=3, stop_token_ids=[PLAIN[0]])
    assert by_stop_token == found
    # masked also where the end token may pass later
    assert ending.generate(PROMPT, 8, min_tokens=3, ignore_eos=True)[:3] == found[:3]
    batch = ending.generate_batch([PROMPT, [5]], 8, min_tokens=3)
    assert batch[0] == found


def test_token_prompts_stop_at_strings_too():
    whole = FREE.tokenizer.decode(PLAIN)
    stop = next(c for c in whole[2:] if c != "\N{REPLACEMENT CHARACTER}")
    found = FREE.generate(PROMPT, 8, stop=[stop], details=True)
    assert (found.text, found.stop_reason) == (whole[: whole.index(stop)], stop)
    assert found.tokens == PLAIN[: len(found.tokens)]
    assert stop in FREE.tokenizer.decode(found.tokens)
    assert stop not in FREE.tokenizer.decode(found.tokens[:-1])
    (batch,) = FREE.generate_batch([PROMPT], 8, stop=[stop], details=True)
    assert batch == found
    assert FREE.generate(PROMPT, 8, stop=[stop]) == found.tokens


def test_a_custom_processor_may_force_the_output():
    word = [9, 8, 7]

    def forces(output, z):
        z[:] = -1e9
        z[word[len(output) % 3]] = 0.0
        return z

    assert FREE.generate(PROMPT, 5, logits_processors=[forces]) == [9, 8, 7, 9, 8]


def test_truncation_keeps_the_end_of_the_prompt():
    assert FREE.generate([9, 9, *PROMPT], 8, truncate_prompt_tokens=2) == PLAIN
    positions = FREE.config.max_position_embeddings
    long = [3, 1, 4, 1, 5] * positions
    expected = FREE.generate(long[-(positions - 8) :], 8)  # room for the output is left
    assert FREE.generate(long, 8, truncate_prompt_tokens=-1) == expected


def test_rules_name_a_token_outside_the_vocabulary():
    with pytest.raises(ValueError, match="stop_token_ids: token 300 is outside"):
        output_rules(OutputParams(stop_token_ids=[300]), GREEDY, FREE)
