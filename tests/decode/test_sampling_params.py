"""One set of rules for sampling parameters, however they are given."""

from __future__ import annotations

import math
from dataclasses import asdict
from fractions import Fraction
from numbers import Real

import numpy as np
import pytest

from refllm.decode.penalties import apply_repetition_penalty
from refllm.decode.sampling import distribution, process_logits
from refllm.decode.sampling_params import GREEDY, SamplingParams, sampling_params

# the values at the ends of each range, inside and outside
ALLOWED = {
    "temperature": [0, 5e-324, 0.7, 1e308, np.float32(0.5)],
    "top_k": [0, 1, 2.0, 10**9, np.int64(3)],
    "top_p": [5e-324, 0.5, 1, 1.0],
    "min_p": [0, 0.5, 1, 1.0],
    "repetition_penalty": [5e-324, 0.5, 1, 1e308],
}
REJECTED = {
    "temperature": [-5e-324, math.inf, math.nan, True, "1", None],
    "top_k": [-1, 0.5, math.inf, math.nan, False, "1"],
    "top_p": [0, -0.1, np.nextafter(1, 2), math.nan, True, "1"],
    "min_p": [-5e-324, np.nextafter(1, 2), math.nan, True, "1"],
    "repetition_penalty": [0, -1.0, math.inf, math.nan, True, "1"],
}


def pairs(values: dict[str, list[object]]) -> list[tuple[str, object]]:
    return [(name, value) for name in values for value in values[name]]


def as_row(name: str, value: object) -> None:
    """Use the value for the second of two rows of logits."""
    z = np.zeros((2, 4))
    if name == "repetition_penalty":
        apply_repetition_penalty(z, np.ones((2, 4), bool), [1.0, value])
    else:
        process_logits(z, **{name: [1, value]})


@pytest.mark.parametrize(("name", "value"), pairs(ALLOWED))
def test_what_is_allowed_is_allowed_for_a_request_and_for_a_row(name, value):
    assert getattr(SamplingParams(**{name: value}), name) == value
    as_row(name, value)


@pytest.mark.parametrize(("name", "value"), pairs(REJECTED))
def test_what_is_rejected_is_rejected_for_a_request_and_for_a_row(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .*got [^ ]*$"):
        SamplingParams(**{name: value})
    with pytest.raises(ValueError, match=f"^{name} must be .*got [^ ]* in row 1$"):
        as_row(name, value)


class Broken(Real):
    """A number whose conversion fails."""

    def __float__(self) -> float:
        raise RuntimeError("no")


Broken.__abstractmethods__ = frozenset()


@pytest.mark.parametrize("name", ALLOWED)
@pytest.mark.parametrize(
    "value", [Broken(), 10**400, Fraction(10) ** 400], ids=lambda v: str(type(v))
)
def test_a_number_that_no_float_holds_is_rejected_for_a_request_and_for_a_row(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be "):
        SamplingParams(**{name: value})
    with pytest.raises(ValueError, match=f"^{name} must be .* in row 1$"):
        as_row(name, value)


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_any_real_number_is_converted_once(name):
    params = SamplingParams(**{name: Fraction(1, 2)})
    assert params == SamplingParams(**{name: 0.5})
    assert type(getattr(params, name)) is float
    z = np.arange(8.0).reshape(2, 4)
    if name != "repetition_penalty":
        expected = process_logits(z, **{name: 0.5})
        for value in (Fraction(1, 2), [Fraction(1, 2)] * 2):
            assert (process_logits(z, **{name: value}) == expected).all()
    assert type(SamplingParams(top_k=np.int64(3)).top_k) is int


def test_parameters_are_given_in_one_of_two_ways():
    given = SamplingParams(0.7, 3, 0.9, 0.1, 1.2)
    assert sampling_params(None, {}) is GREEDY
    assert sampling_params(given, {}) is given
    assert sampling_params(None, asdict(given)) == given
    for sampling in (GREEDY, given):
        with pytest.raises(ValueError, match=r"either sampling=.* shorthand \(top_p, top_k\), not"):
            sampling_params(sampling, {"top_p": 0.9, "top_k": 0})
    with pytest.raises(ValueError, match=r"sampling must be a SamplingParams\(…\), got 0.7"):
        sampling_params(0.7, {})


def test_each_row_has_the_distribution_of_its_own_parameters():
    z = np.random.default_rng(0).normal(size=(5, 9))
    params = [
        GREEDY,
        SamplingParams(1.0),
        SamplingParams(0.5, top_k=3),
        SamplingParams(2.0, top_p=0.6),
        SamplingParams(0.7, min_p=0.3),
    ]
    alone = [distribution(row, one) for row, one in zip(z, params, strict=True)]
    np.testing.assert_allclose(distribution(z, params), alone, rtol=1e-12)
    np.testing.assert_allclose(distribution(z, params[2])[2], alone[2], rtol=1e-12)
