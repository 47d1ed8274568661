"""Token trees: the output distribution by exact enumeration, the mask against each path
alone, compaction against recomputing.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from conftest import to_host
from drafting import use_exact_draws
from enumeration import Table, exact_distribution, extend, largest_difference, sequence_distribution
from networks import EPS, NETWORKS, random_tensors, tolerance
from refllm.decode.speculative.tree import Tree
from refllm.decode.speculative.tree_verification import (
    draw_children,
    verify_tree,
    verify_tree_greedy,
)
from refllm.decode.speculative.verification import verify
from refllm.kv.contiguous import ContiguousCache
from refllm.model.llama import build, forward
from strategies import seeds

WAYS = {"with replacement": True, "without replacement": False}
SHAPES = {
    "two": [-1, -1],
    "chain": [-1, 0],
    "fork": [-1, 0, 0],
    "wide": [-1, -1, -1],
    "both": [-1, -1, 0, 1],
}
kinds = st.sampled_from(["dense", "sparse", "peaked"])


@pytest.fixture(autouse=True, scope="module")
def _exact_draws():
    with pytest.MonkeyPatch.context() as patch:
        use_exact_draws(patch)
        yield


@st.composite
def trees(draw: st.DrawFn, most: int = 7) -> Tree:
    return Tree([draw(st.integers(-1, i - 1)) for i in range(draw(st.integers(0, most)))])


# --- the output distribution --------------------------------------------------------------


def grown(tree: Tree, q, rng, replacement: bool, count=None):
    """Tokens and q rows of a tree whose children are drawn; a shape that q cannot fill is
    cut.
    """
    parents = []
    tokens = []
    rows = [q([])]
    places = {-1: (-1, [])}  # node of the shape → (node of the tree, its prefix)
    for row, below in enumerate(tree.children):
        if below and row - 1 in places:
            parent, prefix = places[row - 1]
            drawn = draw_children(q(prefix), len(below), rng, replacement=replacement)
            for node, token in zip(below, drawn, strict=False):
                places[node] = (len(tokens), [*prefix, token])
                parents.append(parent)
                tokens.append(token)
                rows.append(q([*prefix, token]))
    return Tree(parents), tokens, np.stack(rows)


def one_hot(tree: Tree, q, rng, replacement: bool):
    """The likeliest tokens of q at each node, which were not sampled."""
    parents = []
    tokens = []
    places = {-1: (-1, [])}
    for row, below in enumerate(tree.children):
        if below and row - 1 in places:
            parent, prefix = places[row - 1]
            for node, token in zip(
                below, np.argsort(-q(prefix), kind="stable").tolist(), strict=False
            ):
                places[node] = (len(tokens), [*prefix, token])
                parents.append(parent)
                tokens.append(token)
    return Tree(parents), tokens, None


def deviation(tree, p, q, propose, judged_with, drawn_with=None) -> float:
    """How far the distribution of the next depth + 1 tokens lies from the target's."""

    def run(rng):
        drawn = judged_with if drawn_with is None else drawn_with
        shape, tokens, rows = propose(tree, q, rng, drawn)
        prefixes = [[]] + [[tokens[a] for a in shape.ancestors(i)] for i in range(len(shape))]
        target = np.stack([p(s) for s in prefixes])
        path, token = verify_tree(target, rows, shape, tokens, rng, replacement=judged_with)
        return (*(tokens[i] for i in path), token)

    emitted = exact_distribution(run)
    assert abs(sum(emitted.values()) - 1) < 1e-12
    length = max(tree.depths) + 1
    return largest_difference(
        extend(emitted, p, p.vocab, length), sequence_distribution(p, p.vocab, length)
    )


@pytest.mark.theorem(
    "Recursive rejection over a tree gives the target's distribution: children drawn with "
    "replacement, without, and one-hot",
    source="Miao et al. 2024, theorem 4.2; Chen et al. 2024, algorithm 2",
)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("propose", [grown, one_hot])
@given(
    shape=st.sampled_from(list(SHAPES)), vocab=st.integers(2, 3), seed=seeds, of_p=kinds, of_q=kinds
)
def test_the_distribution_over_a_tree_is_the_targets(way, propose, shape, vocab, seed, of_p, of_q):
    p = Table(vocab, seed, of_p)
    q = Table(vocab, seed + 1, of_q)
    # products of a few probabilities, summed over V^m drafts of m ≤ 4 nodes; each rejection
    # divides once more
    assert deviation(Tree(SHAPES[shape]), p, q, propose, WAYS[way]) <= 64 * EPS * vocab**5


def test_children_drawn_one_way_and_verified_the_other_are_caught():
    p = Table(3, 1)
    q = Table(3, 2)
    assert deviation(Tree([-1, -1]), p, q, grown, True, False) > 1e-3
    with pytest.raises(ValueError, match="token 2 has probability 0 in the distribution"):
        deviation(Tree([-1, -1]), p, q, grown, False, True)  # the same token twice


def test_sorted_children_treated_as_drawn_are_caught():
    """The top children of q with q's probabilities beside them: argmax drafts treated as
    sampled.
    """

    def pretended(tree, q, rng, replacement):
        shape, tokens, _ = one_hot(tree, q, rng, replacement)
        return shape, tokens, np.stack([q([])] * (len(shape) + 1))

    assert deviation(Tree([-1, -1]), Table(3, 1), Table(3, 2), pretended, False) > 1e-3


@pytest.mark.theorem(
    "A second child raises the probability that one is accepted, without replacement at least "
    "as much as with it",
    source="Chen et al. 2024, section 3.2",
)
@given(vocab=st.integers(2, 4), seed=seeds)
def test_more_children_accept_more(vocab, seed):
    p = Table(vocab, seed)
    q = Table(vocab, seed + 1)

    def accepted(children, replacement):
        def run(rng):
            shape, tokens, rows = grown(Tree([-1] * children), q, rng, replacement)
            return bool(
                verify_tree(
                    np.stack([p([])] * (len(shape) + 1)),
                    rows,
                    shape,
                    tokens,
                    rng,
                    replacement=replacement,
                )[0]
            )

        return exact_distribution(run).get(True, 0.0)

    single = accepted(1, True)
    assert single <= accepted(2, True) + 64 * EPS
    assert accepted(2, True) <= accepted(2, False) + 64 * EPS
    assert abs(single - np.minimum(p([]), q([])).sum()) <= 64 * EPS


@pytest.mark.theorem(
    "A chain is verified as token-wise verification does it, uniform for uniform",
    source="definition",
)
@given(vocab=st.integers(2, 5), gamma=st.integers(0, 4), seed=seeds)
def test_a_chain_is_token_wise(pure_xp, vocab, gamma, seed):
    p = Table(vocab, seed)
    q = Table(vocab, seed + 1)
    drafts = np.random.default_rng(seed).integers(0, vocab, gamma).tolist()
    rows = p.rows([], drafts), q.rows([], drafts)
    mine = [pure_xp.asarray(x) for x in rows]
    for drawn, given_ in ((mine[1], rows[1][:gamma]), (None, None)):
        path, token = verify_tree(
            mine[0], drawn, Tree.chain(gamma), drafts, np.random.default_rng(seed)
        )
        assert path == list(range(len(path)))
        assert (len(path), token) == verify(rows[0], given_, drafts, np.random.default_rng(seed))


@given(tree=trees(), vocab=st.integers(1, 3), seed=seeds)
def test_greedy_walks_down_the_argmax(tree, vocab, seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, len(tree)).tolist()
    best = rng.integers(0, vocab, len(tree) + 1).tolist()
    path, token = verify_tree_greedy(best, tree, tokens)
    rows = [0, *(node + 1 for node in path)]
    assert [tokens[i] for i in path] == [best[row] for row in rows[:-1]]
    assert [tree.parents[i] for i in path] == [row - 1 for row in rows[:-1]]
    assert token == best[rows[-1]]
    # it ends only where no child continues
    assert all(tokens[c] != token for c in tree.children[rows[-1]])
    sampled = verify_tree(np.eye(vocab)[best], None, tree, tokens, np.random.default_rng(seed))
    assert [tokens[i] for i in sampled[0]] == [tokens[i] for i in path]
    assert sampled[1] == token


# --- shape, mask, positions ---------------------------------------------------------------


@given(tree=trees())
def test_mask_depth_and_paths_agree(tree):
    mask = tree.mask()
    for node in range(len(tree)):
        path = tree.ancestors(node)
        assert path[-1] == node
        assert path == sorted(path)
        assert [j for j, sees in enumerate(mask[node + 1]) if sees] == [0, *(a + 1 for a in path)]
        assert tree.depths[node + 1] == len(path)
        assert node in tree.children[tree.parents[node] + 1]
    assert tree.positions(5) == [5 + d for d in tree.depths]
    assert sum(map(len, tree.children)) == len(tree)


@pytest.mark.theorem(
    "A tree step gives every node the hidden state that its path alone gives, and after "
    "compaction the cache is that of the accepted path",
    source="Miao et al. 2024, section 4.2",
)
@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen3"])
@given(tree=trees(), seed=seeds, before=st.integers(0, 9))
@example(tree=Tree.chain(9), seed=0, before=2)  # longer than the window
def test_tree_step_equals_each_path_alone(xp, name, tree, seed, before):
    config = NETWORKS[name]
    rng = np.random.default_rng(seed)
    weights = build(config, {k: xp.asarray(v) for k, v in random_tensors(config, 3).items()})
    like = weights["norm"]
    prefix = rng.integers(0, 300, before).tolist()
    tokens = rng.integers(0, 300, len(tree) + 1).tolist()

    def cached(ids):
        cache = ContiguousCache(config, 2, 24, like=like)
        if ids:
            counts = [0, len(ids)]
            hidden = forward(
                weights,
                config,
                xp.asarray(ids),
                xp.asarray(cache.positions(counts)),
                cache.view(counts),
            )
            cache.advance(counts)
            return cache, to_host(hidden)
        return cache, None

    cache, _ = cached(prefix)
    view = cache.view_tree(1, tree)
    positions = xp.asarray(tree.positions(before))
    hidden = to_host(forward(weights, config, xp.asarray(tokens), positions, view))
    atol = tolerance(config, before + len(tree) + 1, hidden)
    for node in range(-1, len(tree)):
        path = [tokens[0], *(tokens[a + 1] for a in tree.ancestors(node))]
        alone = cached([*prefix, *path])[1]
        np.testing.assert_allclose(hidden[node + 1], alone[-1], rtol=0, atol=atol)
    node = int(rng.integers(-1, len(tree)))
    path = tree.ancestors(node)
    cache.advance_path(1, path)
    expected, _ = cached([*prefix, tokens[0], *(tokens[a + 1] for a in path)])
    assert cache.lengths == expected.lengths
    end = cache.lengths[1]
    for mine, theirs in (
        (cache.keys[..., :end], expected.keys[..., :end]),
        (cache.values[..., :end, :], expected.values[..., :end, :]),
    ):
        mine = to_host(mine)[:, 1]
        theirs = to_host(theirs)[:, 1]
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=atol * max(1, abs(theirs).max()))


# --- bad input ----------------------------------------------------------------------------


def test_bad_trees_are_named():
    with pytest.raises(ValueError, match="node 1 hangs below 1"):
        Tree([-1, 1])
    with pytest.raises(ValueError, match="node 0 hangs below -2"):
        Tree([-2])
    rng = np.random.default_rng(0)
    two = Tree([-1, -1])
    p = np.full((3, 2), 0.5)
    for call, message in (
        (lambda: verify_tree(p, None, two, [0], rng), "as many tokens, got 1"),
        (lambda: verify_tree(p[:2], None, two, [0, 1], rng), r"shape \(3, V\), got \(2, 2\)"),
        (
            lambda: verify_tree(p, p[:2], two, [0, 1], rng),
            r"shape \(3, V\), got \(3, 2\) and \(2, 2\)",
        ),
        (lambda: verify_tree(p * 2, None, two, [0, 1], rng), "row 0 of p sums to 2"),
        (lambda: verify_tree(p, p * 2, two, [0, 1], rng), "row 0 of q sums to 2"),
        (
            lambda: verify_tree(p, None, two, [0, 2], rng),
            "node 1 is token 2, outside the vocabulary of 2",
        ),
        (
            lambda: verify_tree_greedy([0, 1], two, [0, 1]),
            "needs as many tokens and one more target",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="token 1 has probability 0 in the distribution"):
        verify_tree(np.array([[0.5, 0.5]] * 2), np.array([[1.0, 0.0]] * 2), Tree([-1]), [1], rng)
    cache = ContiguousCache(NETWORKS["llama"], 1, 2, like=np.zeros(1))
    with pytest.raises(ValueError, match="0 cached \\+ 3 tokens of a tree exceed 2"):
        cache.view_tree(0, two)


def test_children_run_out_without_replacement():
    q = np.array([0.5, 0.0, 0.5])
    assert sorted(draw_children(q, 5, np.random.default_rng(0))) == [0, 2]
    assert len(draw_children(q, 5, np.random.default_rng(0), replacement=True)) == 5
