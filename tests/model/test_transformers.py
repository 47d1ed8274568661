"""Our network against transformers', on random networks of every family, in both
directions.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import oracle
from networks import NETWORKS, SIZES, TOKENS, close, full_logits, random_tensors, tokenizer
from refllm import api
from refllm.checkpoints.loading import build_weights, iter_tensors, load
from refllm.checkpoints.sources import locate
from refllm.checkpoints.tensor_files import INDEX
from refllm.checkpoints.writer import save
from refllm.model.config import ModelConfig
from refllm.model.rope_config import write_scaling

pytestmark = pytest.mark.oracle
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def their_network(config: ModelConfig):
    """A transformers model of this shape with our random weights, made from transformers'
    own config class.
    """
    torch = oracle("torch")
    transformers = oracle("transformers")
    shape = {
        key: getattr(config, key)
        for key in (
            *SIZES,
            "head_dim",
            "rms_norm_eps",
            "tie_word_embeddings",
            "max_position_embeddings",
            "bos_token_id",
        )
    }
    shape["eos_token_id"] = list(config.eos_token_ids) or None
    shape["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        shape["rope_parameters"] |= write_scaling(config.rope_scaling)
    if config.family == "mistral":
        shape["sliding_window"] = config.sliding_window
    kind = CLASSES[config.family]
    model = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**shape)
    )
    tensors = {
        name: torch.from_numpy(t) for name, t in random_tensors(config, 3, "float32").items()
    }
    report = model.load_state_dict(tensors, strict=False)
    assert not report.unexpected_keys
    assert set(report.missing_keys) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    return model


def their_logits(path: Path) -> np.ndarray:
    torch = oracle("torch")
    transformers = oracle("transformers")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report  # nothing missing, unexpected or of another shape
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS)[None]).logits[0].numpy()


@pytest.mark.theorem(
    "logits = transformers', |Δ| ≤ 2e-5 · max|logit| in float32: Llama (default and llama3 "
    "RoPE), Mistral with a "
    "window, Qwen2, Qwen3, tied and untied, from single and sharded float32, float16 and "
    "bfloat16 files",
    source="transformers 5",
)
@pytest.mark.parametrize(
    ("dtype", "shard"),
    [("float32", None), ("float32", "20KB"), ("float16", None), ("bfloat16", "20KB")],
)
@pytest.mark.parametrize("name", NETWORKS)
def test_their_checkpoint_in_ours(tmp_path, name, dtype, shard):
    torch = oracle("torch")
    model = their_network(NETWORKS[name]).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path, **({"max_shard_size": shard} if shard else {}))
    tokenizer().save(tmp_path / "tokenizer.json")
    assert (tmp_path / INDEX).exists() == bool(shard)
    ours = load(tmp_path)
    assert ours.config == NETWORKS[name]
    theirs = their_logits(tmp_path)
    assert close(full_logits(ours.weights, ours.config), theirs)
    # The bound is far below what these parts do to the logits: without one of them the
    # comparison would fail.
    for part, value in {"sliding_window": None, "rope_scaling": None, "rope_theta": 2e4}.items():
        if getattr(ours.config, part) is not None:
            changed = replace(ours.config, **{part: value})
            weights = build_weights(changed, dict(iter_tensors(tmp_path, "float32")))
            assert (
                np.abs(full_logits(weights, changed) - theirs).max() > 1e-2 * np.abs(theirs).max()
            ), part


@pytest.mark.theorem(
    "a directory that we write is one that transformers loads with no key missing or left "
    "over, and equal logits",
    source="transformers 5",
)
@pytest.mark.parametrize(
    ("dtype", "limit"), [("float32", None), ("float16", 20_000), ("bfloat16", None)]
)
@pytest.mark.parametrize("name", NETWORKS)
def test_our_checkpoint_in_theirs(tmp_path, name, dtype, limit):
    torch = oracle("torch")
    transformers = oracle("transformers")
    config = NETWORKS[name]
    save(
        tmp_path / "m",
        config,
        random_tensors(config, 5),
        tokenizer(),
        dtype=dtype,
        max_shard_bytes=limit,
    )
    ours = load(tmp_path / "m")
    assert close(full_logits(ours.weights, config), their_logits(tmp_path / "m"))
    as_stored = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    assert as_stored.dtype == getattr(torch, dtype)
    end = as_stored.generation_config.eos_token_id
    assert (
        tuple(end if isinstance(end, list) else [] if end is None else [end])
        == config.eos_token_ids
    )


@pytest.mark.theorem(
    "transformers' AutoTokenizer of a directory that we write gives our ids and our text",
    source="transformers 5",
)
def test_their_tokenizer_gives_our_ids(tmp_path):
    transformers = oracle("transformers")
    config = NETWORKS["llama"]
    save(tmp_path / "m", config, random_tensors(config, 5), tokenizer())
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    for text in (
        "def f(x):\n    return x\n",
        "",
        " \t\n",
        "naïve — 漢字 🙂",
        "a , b . c n't",
        "\r\n\x00\x7f",
    ):
        mine = tokenizer().encode(text)
        assert theirs.encode(text, add_special_tokens=False) == mine
        assert theirs.encode(text) == tokenizer().encode(text, special=True)
        assert theirs.decode(mine) == tokenizer().decode(mine) == text
    special = "x<|endoftext|>y"
    assert theirs.encode(special, add_special_tokens=False) == tokenizer().encode(
        special, parse_special=True
    )
    assert (theirs.eos_token_id, theirs.bos_token_id) == (0, 0)
    assert theirs.model_max_length == config.max_position_embeddings


@pytest.mark.real
def test_the_real_model_computes_what_transformers_reads_from_the_same_file():
    torch = oracle("torch")
    transformers = oracle("transformers")
    oracle("gguf")
    model = api.load("smollm2")
    path = Path(locate("smollm2"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    ids = model.tokenizer.encode("A lock protects data that several threads change. " * 6)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
    z = model.logits(ids)
    assert np.abs(z - expected).max() <= 1e-5 * np.abs(expected).max()
