"""Verification by exact enumeration: every path of every uniform, over tiny vocabularies.
No Monte Carlo.

One test, ``deviation``, is applied to correct and to wrong code: it returns how far the
distribution of the emitted tokens lies from the target's. For each rule of the library it
is rounding, for each injected bug far more.
"""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

import enumeration
from conftest import to_host
from drafting import use_exact_draws
from enumeration import Table, exact_distribution, extend, largest_difference, sequence_distribution
from refllm.decode.penalties import apply_repetition_penalty
from refllm.decode.sampling import draw, process_logits, sample
from refllm.decode.speculative import verification
from refllm.decode.speculative.acceptance import expected_length
from refllm.decode.speculative.verification import (
    residual,
    verify,
    verify_block,
    verify_greedy,
    verify_typical,
)
from strategies import seeds

EPS = float(np.finfo(np.float64).eps)
RULES = {"token-wise": verify, "block": verify_block}
kinds = st.sampled_from(["dense", "sparse", "peaked"])
vocabs = st.integers(2, 3)
gammas = st.integers(1, 3)


@pytest.fixture(autouse=True, scope="module")
def _exact_draws():
    with pytest.MonkeyPatch.context() as patch:
        use_exact_draws(patch)
        yield


def rounding(vocab: int, gamma: int) -> float:
    """Of a sum of products of γ + 1 probabilities over V^γ drafts, each with a division and
    a sum over V.
    """
    return 8 * EPS * (gamma + 1) * vocab ** (gamma + 1)


# --- a step, and what may go wrong in it --------------------------------------------------


def sampled(q, gamma, rng):
    """γ tokens from q, each with the distribution that it was drawn from."""
    drafts = []
    rows = []
    for _ in range(gamma):
        rows.append(q(drafts))
        drafts.append(enumeration.draw(rows[-1], rng.random()))
    return drafts, np.stack(rows)


def one_hot(q, gamma, rng):
    """The most probable tokens of q, which were not sampled."""
    drafts: list[int] = []
    for _ in range(gamma):
        drafts.append(int(np.argmax(q(drafts))))
    return drafts, None


def step(rule, propose, p, q, gamma):
    """A whole step as a program of ``rng``: draft, verify, emit."""

    def run(rng):
        drafts, rows = propose(q, gamma, rng)
        accepted, token = rule(p.rows([], drafts), rows, drafts, rng)
        return (*drafts[:accepted], token)

    return run


def deviation(rule, propose, p, q, gamma) -> float:
    """How far the distribution of the next γ + 1 tokens lies from the target's: the largest
    difference of a probability.
    """
    emitted = exact_distribution(step(rule, propose, p, q, gamma))
    assert abs(sum(emitted.values()) - 1) < 1e-12
    whole = extend(emitted, p, p.vocab, gamma + 1)
    return largest_difference(whole, sequence_distribution(p, p.vocab, gamma + 1))


@pytest.mark.theorem(
    "The emitted tokens, continued by the target, have the target's distribution: token-wise "
    "and block verification of sampled drafts and of one-hot ones",
    source="Leviathan et al. 2023, appendix A.1; Sun et al. 2024, theorem 1",
)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("propose", [sampled, one_hot])
@given(vocab=vocabs, gamma=gammas, seed=seeds, of_p=kinds, of_q=kinds)
@example(vocab=3, gamma=3, seed=0, of_p="sparse", of_q="sparse")
def test_the_distribution_of_the_emitted_tokens_is_the_targets(
    name, propose, vocab, gamma, seed, of_p, of_q
):
    assume(vocab**gamma <= 9 or seed % 3 == 0)  # the expensive cases less often
    p = Table(vocab, seed, of_p)
    q = Table(vocab, seed + 1, of_q)
    assert deviation(RULES[name], propose, p, q, gamma) <= rounding(vocab, gamma)


def test_the_rule_is_exact_in_rational_numbers():
    """P(x) = min(p, q) + (1 − Σ min(p, q)) · (p − q)₊ / Σ (p − q)₊ = p, in fractions: the
    proof for one position.
    """
    rng = np.random.default_rng(0)
    for _ in range(200):
        n = int(rng.integers(1, 5))
        p, q = ([Fraction(int(a), 1) for a in rng.integers(0, 6, n)] for _ in range(2))
        if not sum(p) or not sum(q):
            continue
        p = [a / sum(p) for a in p]
        q = [b / sum(q) for b in q]
        kept = [min(a, b) for a, b in zip(p, q, strict=True)]
        left = [max(a - b, Fraction()) for a, b in zip(p, q, strict=True)]
        if p == q:
            assert kept == p
            continue
        emitted = [k + (1 - sum(kept)) * r / sum(left) for k, r in zip(kept, left, strict=True)]
        assert emitted == p
        assert sum(left) == 1 - sum(kept)


# --- the field's known bugs, each caught by the same test ---------------------------------


def heated(propose):
    """Draws from q but returns another distribution: a logits processor that was forgotten,
    or applied twice.
    """

    def run(q, gamma, rng):
        drafts, rows = propose(q, gamma, rng)
        rows = rows**0.5
        return drafts, rows / rows.sum(axis=-1, keepdims=True)

    return run


def pretended(q, gamma, rng):
    """Argmax drafts with q's probabilities beside them, as if they had been sampled."""
    drafts, _ = one_hot(q, gamma, rng)
    return drafts, np.stack([q(drafts[:i]) for i in range(gamma)])


def raw_target(p, q, drafts, rng):
    """Verifies against the distribution before the logits processors."""
    raw = p**0.5
    return verify(raw / raw.sum(axis=-1, keepdims=True), q, drafts, rng)


def from_the_target(p, q, drafts, rng):
    """Resamples from p instead of from the residual."""
    accepted, _ = verify(p, q, drafts, rng)
    return accepted, enumeration.draw(p[accepted], rng.random())


def without_the_last_row(p, q, drafts, rng):
    """After full acceptance takes the last draft's row again instead of the bonus row."""
    accepted, token = verify(p, q, drafts, rng)
    return accepted, token if accepted < len(drafts) else enumeration.draw(p[-2], rng.random())


def dropping_the_bonus(p, q, drafts, rng):
    """After full acceptance ends the step, so that the last draft stands where the bonus
    should.
    """
    accepted, token = verify(p, q, drafts, rng)
    return (accepted, token) if accepted < len(drafts) else (accepted, drafts[-1])


def one_uniform(p, q, drafts, rng):
    """One uniform for all drafts, as a seed that is set again within the loop gives."""
    accepted = 0
    u = rng.random()
    while (
        accepted < len(drafts) and u < p[accepted][drafts[accepted]] / q[accepted][drafts[accepted]]
    ):
        accepted += 1
    if accepted == len(drafts):
        return accepted, enumeration.draw(p[-1], rng.random())
    return accepted, enumeration.draw(residual(p[accepted], q[accepted]), rng.random())


def unshifted(p, q, drafts, rng):
    """Row i of the target for draft i + 1: an off-by-one of the logits."""
    return verify(np.concatenate((p[:1], p[:-1])), q, drafts, rng)


def block_without_its_scale(p, q, drafts, rng):
    """Block verification that resamples from p − q where P p − q is due."""
    accepted, token = verify_block(p, q, drafts, rng)
    if accepted in (0, len(drafts)):
        return accepted, token
    return accepted, enumeration.draw(residual(p[accepted], q[accepted]), rng.random())


def typical(p, q, drafts, rng):
    return verify_typical(p, drafts, rng)


BUGS = {
    "q is not the distribution that was sampled": (verify, heated(sampled)),
    "block: q is not the distribution that was sampled": (verify_block, heated(sampled)),
    "argmax drafts are treated as sampled": (verify, pretended),
    "raw instead of warped p": (raw_target, sampled),
    "resampling from p instead of the residual": (from_the_target, sampled),
    "the bonus comes from the last draft's row": (without_the_last_row, sampled),
    "the bonus is dropped": (dropping_the_bonus, sampled),
    "one uniform for the whole run": (one_uniform, sampled),
    "rows of the target off by one": (unshifted, sampled),
    "block verification with the residual of token-wise": (block_without_its_scale, sampled),
    "typical acceptance, which is lossy by design": (typical, sampled),
    "typical acceptance of one-hot drafts": (typical, one_hot),
}


@pytest.mark.parametrize("bug", BUGS)
def test_each_known_bug_is_caught_by_the_test_of_the_distribution(bug):
    rule, propose = BUGS[bug]
    p = Table(3, 11)
    q = Table(3, 12)
    assert deviation(verify, sampled, p, q, 2) <= rounding(3, 2)
    assert deviation(rule, propose, p, q, 2) > 1e-3, "the wrong code passes the test of the law"


class PenalizedTable(Table):
    """A target with a repetition penalty: its distribution depends on the earlier tokens."""

    def __call__(self, prefix):
        return self.seen_by(prefix, prefix)

    def seen_by(self, prefix, counted):
        z = np.log(super().__call__(prefix))[None] + 1.0
        seen = np.zeros(z.shape, dtype=bool)
        seen[0, list(counted)] = True
        return process_logits(apply_repetition_penalty(z, seen, 3.0))[0]


@pytest.mark.theorem(
    "With a repetition penalty the output distribution is the target's if each row is penalised"
    " for the drafts before it, and is not if all rows are penalised for the same prefix",
    source="Leviathan et al. 2023, section 2.2 (p is what is sampled from)",
)
@pytest.mark.parametrize(
    "counted", ["the drafts before it", "none of the drafts", "all of the drafts"]
)
def test_penalties_are_computed_on_the_prefix_with_the_drafts(counted):
    p = PenalizedTable(3, 5)
    q = Table(3, 6)

    def rule(_, rows, drafts, rng):
        which = {"none of the drafts": lambda i: [], "all of the drafts": lambda i: drafts}
        count = which.get(counted, lambda i: drafts[:i])
        target = np.stack([p.seen_by(drafts[:i], count(i)) for i in range(len(drafts) + 1)])
        return verify(target, rows, drafts, rng)

    lost = deviation(rule, sampled, p, q, 2)
    assert (lost <= rounding(3, 2)) if counted == "the drafts before it" else (lost > 1e-3)


# --- what is accepted ---------------------------------------------------------------------


def accepted_distribution(rule, propose, p, q, gamma):
    """The distribution of the number of accepted drafts."""

    def run(rng):
        drafts, rows = propose(q, gamma, rng)
        return rule(p.rows([], drafts), rows, drafts, rng)[0]

    return exact_distribution(run)


@pytest.mark.theorem(
    "A draft is accepted with probability Σ min(p, q) = 1 − TV(p, q), and the residual has mass"
    " 1 − Σ min(p, q)",
    source="Leviathan et al. 2023, theorem 3.5",
)
@given(vocab=st.integers(2, 6), seed=seeds, of_p=kinds, of_q=kinds)
def test_acceptance_is_one_minus_total_variation(vocab, seed, of_p, of_q):
    p = Table(vocab, seed, of_p)
    q = Table(vocab, seed + 1, of_q)
    one = p([])
    other = q([])
    overlap = np.minimum(one, other).sum()
    assert abs(overlap - (1 - 0.5 * abs(one - other).sum())) <= 4 * vocab * EPS
    for rule in RULES.values():
        assert (
            abs(accepted_distribution(rule, sampled, p, q, 1).get(1, 0.0) - overlap)
            <= 8 * vocab * EPS
        )
    assert abs(residual(one, other).sum() - (1 - overlap)) <= 4 * vocab * EPS or np.array_equal(
        one, other
    )


@pytest.mark.theorem(
    "A one-hot draft x is accepted with probability p(x); a sampled draft treated as one-hot "
    "with Σ p q ≤ Σ min(p, q)",
    source="Leviathan et al. 2023, algorithm 1 for a deterministic draft",
)
@given(vocab=st.integers(2, 6), seed=seeds, of_p=kinds, of_q=kinds)
def test_one_hot_acceptance(vocab, seed, of_p, of_q):
    p = Table(vocab, seed, of_p)
    q = Table(vocab, seed + 1, of_q)
    one = p([])
    other = q([])
    certain = accepted_distribution(verify, one_hot, p, q, 1).get(1, 0.0)
    assert abs(certain - one[np.argmax(other)]) <= 4 * EPS
    as_one_hot = accepted_distribution(
        lambda rows, _, x, rng: verify(rows, None, x, rng), sampled, p, q, 1
    ).get(1, 0.0)
    assert abs(as_one_hot - (one * other).sum()) <= 8 * vocab * EPS
    assert as_one_hot <= np.minimum(one, other).sum() + 8 * vocab * EPS


@pytest.mark.theorem(
    "Block verification accepts at least as many drafts as token-wise in expectation, for all p"
    " and q",
    source="Sun et al. 2024, theorem 2",
)
@given(
    vocab=vocabs,
    gamma=gammas,
    seed=seeds,
    of_p=kinds,
    of_q=kinds,
    propose=st.sampled_from([sampled, one_hot]),
)
def test_block_accepts_at_least_as_many(vocab, gamma, seed, of_p, of_q, propose):
    p = Table(vocab, seed, of_p)
    q = Table(vocab, seed + 1, of_q)
    mean = [
        sum(n * w for n, w in accepted_distribution(rule, propose, p, q, gamma).items())
        for rule in RULES.values()
    ]
    assert mean[1] >= mean[0] - rounding(vocab, gamma)


def test_block_accepts_more_where_it_can():
    """The inequality is not an equality: over twenty pairs block verification accepts some
    per cent more.
    """
    means = []
    for seed in range(20):
        p = Table(3, 2 * seed)
        q = Table(3, 2 * seed + 1)
        means.append(
            [
                sum(n * w for n, w in accepted_distribution(f, sampled, p, q, 2).items())
                for f in RULES.values()
            ]
        )
    tokenwise, block = np.mean(means, axis=0)
    assert 1.02 < block / tokenwise < 1.2


class ConstantTable(Table):
    """The same distribution after every prefix: acceptances are independent."""

    def __call__(self, prefix):
        return super().__call__([])


@pytest.mark.theorem(
    "If drafts are accepted independently with probability α, (1 − α^{γ+1}) / (1 − α) tokens "
    "are emitted per step",
    source="Leviathan et al. 2023, equation 1",
)
@given(vocab=vocabs, gamma=gammas, seed=seeds, of_p=kinds, of_q=kinds)
def test_the_expected_length_is_that_of_the_formula(vocab, gamma, seed, of_p, of_q):
    p = ConstantTable(vocab, seed, of_p)
    q = ConstantTable(vocab, seed + 1, of_q)
    emitted = exact_distribution(step(verify, sampled, p, q, gamma))
    mean = sum(len(s) * w for s, w in emitted.items())
    alpha = min(1.0, float(np.minimum(p([]), q([])).sum()))
    assert abs(mean - expected_length(alpha, gamma)) <= rounding(vocab, gamma)


@pytest.mark.theorem(
    "p = q accepts every draft; disjoint supports accept none, and the token is then "
    "distributed as p",
    source="Leviathan et al. 2023, definition 3.1",
)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_two_ends(rule):
    p = Table(3, 4)
    assert accepted_distribution(rule, sampled, p, p, 3).keys() == {3}
    one = np.array([[0.25, 0.75, 0, 0]] * 3)
    other = np.array([[0, 0, 0.5, 0.5]] * 2)
    found = exact_distribution(lambda rng: rule(one, other, [2, 3], rng))
    assert found == {(0, 0): 0.25, (0, 1): 0.75}


# --- greedy -------------------------------------------------------------------------------


@pytest.mark.theorem(
    "At temperature 0 the token-wise and the block rule are the greedy rule: the drafts up to "
    "the first that is not the argmax, and then the argmax",
    source="Leviathan et al. 2023, section 2.2 (argmax as a distribution)",
)
@given(vocab=st.integers(1, 4), gamma=st.integers(0, 4), seed=seeds)
def test_greedy_is_the_limit_of_both_rules(pure_xp, vocab, gamma, seed):
    rng = np.random.default_rng(seed)
    best = rng.integers(0, vocab, gamma + 1)
    drafts = rng.integers(0, vocab, gamma).tolist()
    p = pure_xp.asarray(np.eye(vocab)[best])
    expected = verify_greedy(best, drafts)
    place = next((i for i in range(gamma) if drafts[i] != best[i]), gamma)
    assert expected == (place, best[place])
    for rule in RULES.values():
        assert rule(p, None, drafts, np.random.default_rng(seed)) == expected


# --- on arrays of every library -----------------------------------------------------------


@pytest.fixture
def real_draws(monkeypatch):
    """The library's own draw instead of the exact one."""
    monkeypatch.setattr(verification, "draw", draw)


@pytest.mark.theorem(
    "The same uniforms give the same result in every array library and precision",
    source="definition",
)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_library_decides_alike(pure_xp, rule, dtype, real_draws):
    for seed in range(20):
        p = Table(5, seed, "sparse")
        q = Table(5, seed + 1)
        drafts = [sample(q([]), 0.3 * i) for i in range(3)]
        drafts = [int(t) for t in drafts]
        host = p.rows([], drafts).astype(dtype), np.stack([q([])] * 3).astype(dtype)
        ours = [pure_xp.asarray(x) for x in host]
        before = to_host(ours[0]).copy(), to_host(ours[1]).copy()
        for rows in (ours[1], None):
            expected = rule(
                host[0], None if rows is None else host[1], drafts, np.random.default_rng(seed)
            )
            assert rule(ours[0], rows, drafts, np.random.default_rng(seed)) == expected
        assert all(np.array_equal(to_host(x), y) for x, y in zip(ours, before, strict=True)), (
            "an argument was changed"
        )


def test_the_residual_of_equal_distributions_is_the_target(pure_xp):
    p = pure_xp.asarray([0.25, 0.75])
    assert to_host(residual(p, p)).tolist() == [0.25, 0.75]
    assert to_host(residual(p, pure_xp.asarray([0.75, 0.25]))).tolist() == [0.0, 0.5]
    assert to_host(residual(p, pure_xp.asarray([0.75, 0.25]), 0.5)).tolist() == [0.0, 0.125]
    # and where rounding rejects nevertheless, the token is distributed as p
    assert draw(np.zeros(2), 0.2, otherwise=np.array([0.25, 0.75])) == 0


# --- bad input ----------------------------------------------------------------------------

GOOD = np.array([[0.5, 0.5, 0.0]] * 3)
BAD = {
    "q of another vocabulary": (
        GOOD,
        GOOD[:2, :2],
        [0, 1],
        r"need q of shape \(2, 3\), got \(2, 2\)",
    ),
    "q of another length": (GOOD, GOOD, [0, 1], r"need q of shape \(2, 3\), got \(3, 3\)"),
    "p without its bonus row": (
        GOOD[:2],
        GOOD[:2],
        [0, 1],
        r"need p of shape \(3, V\), got \(2, 3\)",
    ),
    "p of one row only": (GOOD[0], GOOD[:2], [0, 1], r"need p of shape \(3, V\), got \(3,\)"),
    "p not normalised": (GOOD * [[1], [1], [2]], GOOD[:2], [0, 1], r"row 2 of p sums to 2.0"),
    "q not normalised": (GOOD, GOOD[:2] * [[1], [0.9]], [0, 1], r"row 1 of q sums to 0.9"),
    "negative": (
        np.array([[0.5, 0.5, 0], [1, 0.5, -0.5], [0.5, 0.5, 0]]),
        GOOD[:2],
        [0, 1],
        "row 1 of p .* negative: -0.5",
    ),
    "NaN": (GOOD, GOOD[:2] * [[1], [np.nan]], [0, 1], "row 1 of q .* NaN"),
    "q gives it nothing": (
        GOOD,
        GOOD[:2],
        [0, 2],
        "draft 1 is token 2, to which q gives probability 0",
    ),
    "beyond the vocabulary": (
        GOOD,
        GOOD[:2],
        [0, 3],
        "draft 1 is token 3, outside the vocabulary of 3",
    ),
    "negative id": (GOOD, GOOD[:2], [-1, 0], "draft 0 is token -1, outside the vocabulary of 3"),
    "no ids": (GOOD, GOOD[:2], [0.5, 1], "drafts are token ids"),
    "an array of no ids": (GOOD, GOOD[:2], np.array([0.0, 1.0]), "1-D array of token ids"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_bad_input_is_named(case, rule):
    p, q, drafts, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        rule(p, q, drafts, np.random.default_rng(0))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_randomness_is_a_generator(rule):
    with pytest.raises(
        TypeError, match=r"rng is a generator, numpy.random.default_rng\(seed\), got 3"
    ):
        rule(GOOD, GOOD[:2], [0, 1], 3)


def test_rounding_of_float32_passes_and_more_does_not():
    rows = process_logits(
        np.random.default_rng(0).standard_normal((3, 1000)).astype("float32")
    ).astype("float32")
    assert verify(rows, rows[:2], [1, 2], np.random.default_rng(0))[0] == 2
    with pytest.raises(ValueError, match="sums to"):
        verify(rows * np.float32(1 + 3e-5), rows[:2], [1, 2], np.random.default_rng(0))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_no_drafts_are_plain_sampling(rule):
    p = Table(3, 1)([])[None]
    for q in (None, np.zeros((0, 3))):
        found = exact_distribution(lambda rng, q=q: rule(p, q, [], rng))
        assert largest_difference(found, {(0, t): float(p[0, t]) for t in range(3)}) <= 4 * EPS
    assert verify_greedy([2], []) == (0, 2)
    with pytest.raises(ValueError, match="2 drafts need 3 targets, got 2"):
        verify_greedy([1, 2], [1, 2])


def test_a_numpy_integer_is_a_token_and_a_bool_is_none():
    assert verify_greedy([np.int64(1), 2], np.array([1])) == (1, 2)
    with pytest.raises(ValueError, match="token ids"):
        verify_greedy([1, 2], [True])


def test_enumeration_sees_every_path():
    """The enumerator itself: a reused uniform, a nested comparison, probabilities that sum
    to 1.
    """
    found = exact_distribution(lambda rng: (lambda u: (u < 0.5, u < 0.25))(rng.random()))
    assert found == {(True, True): 0.25, (True, False): 0.25, (False, False): 0.5}
    both = exact_distribution(lambda rng: tuple(rng.random() < x for x in (0.5, 0.25)))
    assert both == {
        (a, b): 0.5 * (0.25 if b else 0.75) for a, b in itertools.product((True, False), repeat=2)
    }


# --- typical acceptance -------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [4, 16, 64])
def test_typical_acceptance_of_a_uniform_distribution(vocab):
    """H = ln V, so the threshold is min(ε, δ / V): every draft has 1 / V, which is more for
    δ < 1 and less for δ > 1.
    """
    p = np.full((3, vocab), 1 / vocab)
    rng = np.random.default_rng(0)
    assert verify_typical(p, [0, vocab - 1], rng, epsilon=1.0)[0] == 2
    assert verify_typical(p, [0, vocab - 1], rng, epsilon=1.0, delta=0.99)[0] == 2
    assert verify_typical(p, [0, vocab - 1], rng, epsilon=1.0, delta=1.01)[0] == 0
    assert verify_typical(p, [0, vocab - 1], rng, epsilon=0.99 / vocab, delta=1.01)[0] == 2


def test_typical_acceptance_by_hand():
    """The defaults: of [0.09, 0.91], H = 0.302 and δ e^{−H} = 0.22, so ε = 0.09 is the
    threshold, which a draft must exceed; of a one-hot row H = 0.
    """
    rng = np.random.default_rng(0)
    row = np.array([0.09, 0.91, 0.0])
    sure = np.array([0.0, 0.0, 1.0])
    assert verify_typical(np.stack([row, sure]), [0], rng)[0] == 0
    assert verify_typical(np.stack([row, sure]), [1], rng) == (1, 2)
    assert verify_typical(np.stack([sure, sure, row]), [2, 1], rng) == (1, 2)
    # 16 likely tokens have H = 2.8, and a draft just below or above 0.3 e^{−H} = 0.018
    for share, accepted in ((0.28, 0), (0.30, 1), (0.34, 1)):
        row16 = np.array([*[(1 - share / 16) / 16] * 16, share / 16])
        entropy = -(row16 * np.log(row16)).sum()
        assert (row16[16] > 0.3 * np.exp(-entropy)) == bool(accepted)
        assert verify_typical(np.stack([row16, row16]), [16], rng)[0] == accepted
    # the row of the rejected draft is the one whose token follows
    assert verify_typical(np.stack([row, sure, sure]), [1, 0], rng) == (1, 2)
