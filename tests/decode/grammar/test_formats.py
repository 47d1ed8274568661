"""String formats: fixed cases of each, and thousands of strings against the checkers themselves."""

from __future__ import annotations

import random

import pytest

from conftest import oracle
from refllm.decode.grammar.automata.dfa import DFA
from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.json_scalars.formats import FORMATS, Languages, format_rule

IN_PART = ("regex", "idn-hostname")  # formats without an opposite

# format: (accepted, rejected)
CASES = {
    "date": (
        ["2024-02-29", "2000-02-29", "0001-01-01", "9999-12-31", "2023-04-30"],
        ["2023-02-29", "1900-02-29", "0000-01-01", "2023-04-31", "2023-1-01", "20230101"],
    ),
    "time": (["12:30:59", "1:2:3", "23:59:59"], ["24:00:00", "12:30", "12:30:60", "12:30:00Z"]),
    "date-time": (
        ["2024-02-29T12:00:00Z", "2024-01-01t00:00:00.123z", "2024-01-01T23:59:59+05:30"],
        ["2023-02-29T12:00:00Z", "2024-01-01T12:00:00", "2024-01-01T24:00:00Z"],
    ),
    "duration": (
        ["P1D", "PT1M", "P3Y6M4DT12H30M5S", "P4W", "-P1D", "PT1.5S", "P0Y1W", "P,10T1S"],
        ["P", "PT", "1D", "P1S", "P1D1Y", "P1Y1W", "P1", "PD", "P1T1S", "P1DT"],
    ),
    "email": (["a@b", "@", "line\n@"], ["", "nobody"]),
    "idn-email": (["ü@ö"], ["ü"]),
    "hostname": (
        ["localhost", "a.b-c.d", "example.com.", "1", "a" * 63, ".".join(["a" * 61] * 4)],
        ["", "-a", "a-", "a..b", "a_b", "a" * 64, ".".join(["a" * 63] * 4) + ".b", "a.com:80"],
    ),
    "idn-hostname": (["localhost", "a-b.c", "ab-c", "A1"], []),
    "ipv4": (["0.0.0.0", "255.255.255.255"], ["256.0.0.1", "01.0.0.0", "1.2.3", " 1.2.3.4"]),
    "ipv6": (
        ["::", "::1", "1:2:3:4:5:6:7:8", "1:2:3:4:5:6:7::", "::ffff:1.2.3.4", "fe80::1"],
        [":", "1:2:3:4:5:6:7", "1::2::3", "::12345", "fe80::1%eth0", "::1.2.3.04"],
    ),
    "uri": (
        ["http://a.b/c?d#e", "urn:x", "a:", "http://[::1]:80/", "mailto:a@b", "http://a/%41"],
        [
            "a",
            "//a/b",
            "http://a b",
            "http://a/%4",
            "http://ü",
            "1a:b",
            "http://[::1",
            "http://a:b/",
        ],
    ),
    "uri-reference": (["", "a/b", "//a", "#x", "?q", "http://a"], ["a b", "1:b", "\\", "#a#b"]),
    "iri": (["http://ü/ö?\ue000", "a:"], ["ü", "http://ü b", "a:\ue000"]),
    "iri-reference": (["ü", ""], ["a b", "\ue000"]),
    "uri-template": (
        ["", "a{b}", "{+a,b*}", "{?a:3,b[]}", "{a=x\n}", "{&a,}", "{,+a}", "ü{b}"],
        ["{", "}", "{}", "{=a}", "{a:0}", "{a:1000}", "{++a}", "{a,,b}", "{a{b}}", "{-a}"],
    ),
    "uuid": (
        ["12345678-1234-1234-1234-123456789aBc"],
        ["12345678123412341234123456789abc", "12345678-1234-1234-1234-123456789ab", ""],
    ),
    "json-pointer": (["", "/", "/a~0~1/b"], ["a", "/~", "/~2"]),
    "relative-json-pointer": (["0", "1/a", "12#", "10"], ["", "/a", "01", "100", "1#/", "1~"]),
    "regex": (["", "^/api/(.*)$", "[a-z]+", "(a|b){2,3}?", r"\d\.", "(?:a(?=b))*", "[^0-9_-]"], []),
    "color": (["red", "Black", "#fff", "#00aAFf"], ["reddish", "#ffff", "fff", ""]),
}


def within(languages: Languages, text: str) -> bool:
    return any(
        dfa.matches(text) and least <= len(text) and (most is None or len(text) <= most)
        for dfa, least, most in languages
    )


def test_every_known_format_has_cases_and_others_are_annotations():
    assert set(CASES) == set(FORMATS)
    assert format_rule("int32") is None


@pytest.mark.parametrize("name", FORMATS)
def test_fixed_cases(name):
    rule = format_rule(name)
    good, bad = CASES[name]
    assert [text for text in good if not within(rule.accepted, text)] == []
    assert [text for text in bad if within(rule.accepted, text)] == []
    if name not in IN_PART:
        assert [text for text in good if within(rule.rejected(), text)] == []
        assert [text for text in bad if not within(rule.rejected(), text)] == []


@pytest.mark.parametrize("name", IN_PART)
def test_the_opposite_of_a_format_known_in_part_is_rejected_by_name(name):
    with pytest.raises(GrammarError, match=f"opposite of the format '{name}'") as error:
        format_rule(name).rejected()
    assert error.value.keyword == "format"


def test_leap_days_of_all_years_are_those_of_the_calendar():
    date = format_rule("date").accepted[0][0]
    for year in range(10000):
        leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0) and year > 0
        assert date.matches(f"{year:04}-02-29") == leap
        assert date.matches(f"{year:04}-02-28") == (year > 0)


def test_hostnames_have_up_to_253_characters():
    rule = format_rule("hostname")
    longest = ".".join(["a" * 61] * 3 + ["a" * 61, "a" * 5])
    assert len(longest) == 253
    assert within(rule.accepted, longest)
    assert not within(rule.rejected(), longest)
    # The checker counts a final dot to no length; the automaton leaves such a name open.
    assert not within(rule.rejected(), longest + ".")
    assert within(rule.rejected(), "b" + longest + ".")
    assert within(rule.rejected(), "b" + longest) is False


def test_automata_are_small():
    assert all(format_rule(name).accepted[0][0].states <= 450 for name in FORMATS)


# --- against the checkers ---------------------------------------------------------------------

ODD = [*map(chr, range(32, 127)), *"\n\t٣é²ıſK İß“😀\U0010ffff\x00", "00", "::", "--", "..", "//"]
ODD += ["%41", "{a}", "urn:", "e9", "60", "-02-29", "xn--", "~1", "\\", "(?", "[a"]


def random_word(dfa: DFA, rng: random.Random) -> str:
    """A random walk along the automaton; after 60 characters the shortest way to an end."""
    intervals: dict[int, list[tuple[int, int]]] = {}
    for low, high, cls in dfa.alphabet.intervals():
        intervals.setdefault(cls, []).append((low, high))
    state, word = dfa.start, ""
    while not (dfa.accepting(state) and (rng.random() < 0.15 or len(word) > 60)):
        row = dfa.table[state]
        open_ = [cls for cls in range(dfa.alphabet.count) if row[cls]]
        if len(word) > 60:
            open_ = [
                cls for cls in open_ if dfa.distances[row[cls]] < dfa.distances[state]
            ] or open_
        if not open_:
            break
        cls = rng.choice(open_)
        low, high = rng.choice(intervals[cls])
        word += chr(rng.choice([low, high, rng.randint(low, min(high, low + 60))]))
        state = row[cls]
    return word


def mutated(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(1, 3)):
        at = rng.randint(0, len(text))
        until = rng.choice([at, at + 1, rng.randint(at, len(text))])
        text = text[:at] + rng.choice([*ODD, "", "", ""]) + text[until:]
    return text + rng.choice(["", "", "", "\n"])


# what jsonschema's FormatChecker needs to know every format: the extra jsonschema[format]
FORMAT_PACKAGES = (
    "fqdn",
    "idna",
    "isoduration",
    "jsonpointer",
    "rfc3339_validator",
    "rfc3987",
    "uri_template",
    "webcolors",
)


@pytest.mark.oracle
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.theorem(
    "Each format accepts only strings that jsonschema's FormatChecker accepts, its opposite only "
    "others; a format marked exact accepts all of them.",
    source="jsonschema.FormatChecker",
)
def test_formats_mean_what_the_checkers_accept(name):
    for package in FORMAT_PACKAGES:
        oracle(package)
    checker = oracle("jsonschema").FormatChecker()
    assert set(checker.checkers) == set(FORMATS)
    rng = random.Random(name)
    rule = format_rule(name)
    accepted = rule.accepted
    rejected = () if name in IN_PART else rule.rejected()
    texts = [random_word(accepted[0][0], rng) for _ in range(300)]
    texts += [mutated(text, rng) for text in texts for _ in range(5)]
    texts += [text for cases in CASES[name] for text in cases]
    for text in texts:
        try:
            valid = checker.conforms(text, name)
        except Exception:
            continue  # a checker that fails says nothing
        if rule.exact:
            assert within(accepted, text) == valid, text
            assert within(rejected, text) != valid, text
        assert within(accepted, text) <= valid, text
        assert not (within(rejected, text) and valid), text
    valid_cases = [checker.conforms(text, name) for text in CASES[name][0]]
    assert all(valid_cases)
    assert not any(checker.conforms(t, name) for t in CASES[name][1])
