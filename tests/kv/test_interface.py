"""What every cache policy offers alike: its caches, what they cannot do, and how much memory
they need.
"""

from __future__ import annotations

import dataclasses
import inspect

import numpy as np
import pytest

from conftest import to_host
from kv_caches import run_step, tiny_api_model
from refllm.decode.speculative.tree import Tree
from refllm.decode.speculative.tree_drafter import TreeDrafter
from refllm.kv import interface
from refllm.kv.contiguous import ContiguousPolicy
from refllm.kv.interface import Cache, CachePolicy
from refllm.kv.kivi import Kivi
from refllm.kv.sparse import at_random, h2o, pyramidkv, snapkv
from refllm.model.config import ModelConfig

L, H, G, D = 2, 4, 2, 8
CONFIG = ModelConfig("llama", 5, 8, 8, L, H, G, D)
POLICIES: dict[str, CachePolicy] = {
    "contiguous": ContiguousPolicy(),
    "kivi": Kivi(2, 2, 8, 16),
    "h2o": h2o(12),
    "snapkv": snapkv(12, window=4),
    "pyramidkv": pyramidkv(12, window=4, beta=3.0),
    "random": at_random(12),
}


def cache_of(xp, name: str, sequences: int = 1) -> Cache:
    """A cache of a policy; each has a generator of its own."""
    like = xp.zeros(1, dtype="float32")
    return POLICIES[name].new_cache(CONFIG, sequences, 64, like=like, rng=np.random.default_rng(0))


def random_steps(seed: int, length: int) -> list[np.ndarray]:
    """q, k, v[L, B, T, heads, D] of two sequences."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((L, 2, length, heads, D)).astype("float32") for heads in (H, G, G)]


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_makes_a_cache_with_the_whole_interface(name):
    cache = cache_of(np, name)
    for protocol, made in ((CachePolicy, POLICIES[name]), (Cache, cache)):
        wanted = {*protocol.__annotations__, *vars(protocol)}
        assert {name for name in wanted if not name.startswith("_")} <= set(dir(made))
    # under the same names of arguments, and documented
    for method in ("positions", "view", "advance", "finish_prompt", "view_tree", "advance_path"):
        asked = inspect.signature(getattr(Cache, method)).parameters
        given = inspect.signature(getattr(type(cache), method)).parameters
        assert list(given) == list(asked)
        assert inspect.getdoc(getattr(type(cache), method))


@pytest.mark.parametrize("make", [lambda: Kivi(2, 2, 8, 16), lambda: h2o(12), lambda: snapkv(40)])
def test_the_settings_of_a_policy_are_a_value(make):
    """Checked when they are made, they cannot become others, and may be keys."""
    policy = make()
    assert {policy: 1}[make()] == 1
    for name in vars(policy):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(policy, name, 3)


@pytest.mark.parametrize("name", POLICIES)
def test_a_step_reads_what_was_committed_and_rolls_back_the_rest(xp, name):
    """Two sequences, of which one contributes nothing to a step: the rejected tokens of a step
    leave no trace.
    """
    data = random_steps(1, 14)
    plain, drafted = (cache_of(xp, name, 2) for _ in range(2))
    for cache in (plain, drafted):
        assert cache.lengths == [0, 0]
        assert cache.positions([2, 1]) == [0, 1, 0]
        run_step(xp, cache, data, [5, 9])
        cache.finish_prompt()
        assert cache.positions([0, 2]) == [9, 10]
    run_step(xp, plain, data, [2, 0])
    run_step(xp, drafted, data, [5, 0], kept=[2, 0])
    assert plain.lengths == drafted.lengths == [7, 9]
    ends = [run_step(xp, cache, data, [3, 2]) for cache in (plain, drafted)]
    for one, other in zip(*ends, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(to_host(a), to_host(b), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_says_whether_its_caches_verify_trees(name):
    cache = cache_of(np, name)
    if POLICIES[name].trees:
        cache.view_tree(0, Tree([-1, -1]))
        cache.advance_path(0, [1])
        assert cache.lengths == [2]
        return
    with pytest.raises(ValueError, match=interface.NO_TREES):
        cache.view_tree(0, Tree([-1, -1]))
    with pytest.raises(ValueError, match=interface.NO_TREES):
        cache.advance_path(0, [1])
    assert cache.lengths == [0]
    # and generation asks before it computes anything
    model = tiny_api_model()
    for count in (0, 1, 8):
        with pytest.raises(ValueError, match=interface.NO_TREES):
            model.generate([1, 2], count, cache=POLICIES[name], drafter=TreeDrafter(model, 3))


@pytest.mark.parametrize("name", ["h2o", "snapkv", "pyramidkv", "random"])
@pytest.mark.parametrize(("prompt", "new"), [(3, 0), (12, 0), (12, 1), (20, 0), (20, 4), (9, 9)])
def test_the_memory_of_a_sparse_policy_is_that_of_its_cache(name, prompt, new):
    cache = cache_of(np, name)
    data = random_steps(0, 24)
    run_step(np, cache, data, [prompt])
    cache.finish_prompt()
    for _ in range(new):
        run_step(np, cache, data, [1])
    kept = [layer[0] for layer in cache.layers]
    usage = POLICIES[name].usage(CONFIG, prompt, new)
    assert usage.nbytes == sum(one.keys.nbytes + one.values.nbytes for one in kept)
    mean = sum(one.keys.shape[1] for one in kept) / L
    assert usage.kept == f"{mean:.0f} of {prompt + new} tokens per key head"


def test_the_memory_of_kivi_and_of_a_cache_that_keeps_everything():
    kivi = Kivi(2, 4, 8, 16)
    assert kivi.usage(CONFIG, 10, 5) == (
        None,
        "nothing quantised: 15 tokens fit into the full-precision window of 16",
    )
    for prompt, new in ((16, 0), (10, 7)):  # 16 keys are quantised before the first value
        assert kivi.usage(CONFIG, prompt, new) == (
            kivi.nbytes(CONFIG, prompt + new, full=32),
            "in 2-bit codes except for the newest tokens, at most 16",
        )
    assert ContiguousPolicy().usage(CONFIG, 3, 4) == (None, "all 7 tokens in full precision")


@pytest.mark.parametrize(
    ("policy", "passes"),
    [
        (ContiguousPolicy(), [[256], [128]]),
        (None, [[256], [128]]),
        (h2o(40), [[256], [128]]),
        (Kivi(8, 8, 4, 16), [[384]]),
    ],
)
def test_a_cache_says_in_how_many_passes_a_prompt_is_read(policy, passes, monkeypatch):
    model = tiny_api_model(eos_token_ids=())
    prompt = np.random.default_rng(0).integers(1, 257, 384).tolist()
    kind = type((policy or ContiguousPolicy()).new_cache(model.config, 1, 1, like=np.zeros(1)))
    view = kind.view
    seen = []
    monkeypatch.setattr(
        kind, "view", lambda self, counts: seen.append(list(counts)) or view(self, counts)
    )
    model.generate(prompt, 2, cache=policy)
    assert seen == [*passes, [1]]
