"""Checkpoints to GGUF and back: tensors, tokenizer, logits; llama.cpp's logits; workers
that die; bad input.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from chat_models import save_chat_model
from chat_tokenizer import chat_tokenizer
from conftest import oracle
from gguf_data import llama_cpp_logits
from networks import LLAMA3, NETWORKS, TOKENS, full_logits, random_tensors, tolerance
from networks import tokenizer as small_tokenizer
from refllm.api import load
from refllm.checkpoints import loading
from refllm.checkpoints.gguf_names import gguf_name, hf_name, permutation
from refllm.checkpoints.gguf_tokenizer import TOKENIZER_JSON, tokenizer_from_metadata
from refllm.checkpoints.sources import locate
from refllm.checkpoints.tensor_files import CheckpointError, tensor_shapes
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.checkpoints.writer import save
from refllm.cli import app
from refllm.formats.gguf.codec import dequantize
from refllm.formats.gguf.linear import GGUFLinear
from refllm.formats.gguf.mixes import MIXES
from refllm.formats.gguf.reader import GGUFFile
from refllm.formats.gguf.writer import write
from refllm.quant import to_gguf as convert_module
from refllm.quant.imatrix import importance
from refllm.quant.layer_io import CheckpointSource
from refllm.quant.to_gguf import convert
from refllm.quant.worker_pool import processes
from tiny_models import byte_tokenizer, tiny_config

TEXT = "def f(x):\n    return x  # größer 12345\n\n\nclass A(B): pass\n" * 3


@pytest.fixture(scope="module")
def source(tmp_path_factory, make_checkpoint) -> Path:
    config = tiny_config(
        hidden_size=256,
        intermediate_size=512,
        head_dim=64,
        num_hidden_layers=4,
        max_position_embeddings=512,
    )
    return make_checkpoint(config, tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def f32(source, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("f32") / "f32.gguf"
    convert(source, path, "F32", workers=1)
    return path


# --- names, orders, metadata --------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_names_go_there_and_back(name):
    for tensor, _ in tensor_shapes(NETWORKS[name]):
        assert hf_name(gguf_name(tensor)) == tensor
    assert hf_name("blk.0.ffn_gate_exps.weight") is None
    assert hf_name("blk.x.ffn_gate.weight") is None
    assert hf_name("model.norm.weight") is None


@pytest.mark.theorem(
    "GGUF's rows of q and k are W.reshape(h, 2, d/2, N).swapaxes(1, 2), of Llama only",
    source="llama.cpp's converter",
)
@pytest.mark.parametrize("name", NETWORKS)
def test_rows_of_q_and_k(name):
    config = NETWORKS[name]
    for part, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
        w = np.arange(heads * config.head_dim * 3).reshape(-1, 3)
        order = permutation(config, f"model.layers.0.self_attn.{part}_proj.weight")
        if config.family in ("llama", "mistral"):
            expected = w.reshape(heads, 2, config.head_dim // 2, 3).swapaxes(1, 2).reshape(w.shape)
            np.testing.assert_array_equal(w[order], expected)
        else:
            assert order is None
    assert permutation(config, "model.layers.0.self_attn.v_proj.weight") is None


@pytest.mark.theorem(
    "load(convert(model, F32)) has the model's tensors, configuration and tokenizer", source="GGUF"
)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_family_comes_back(name, tmp_path):
    """Biases, query norms, windows, Llama 3's rotation, tied heads: the same logits to the
    bit.
    """
    config = replace(NETWORKS[name], bos_token_id=0, eos_token_ids=(0,))
    tensors = random_tensors(config, 0, "float32")
    save(tmp_path / "hf", config, tensors, small_tokenizer(), dtype="float32")
    convert(tmp_path / "hf", tmp_path / "x.gguf", "F32", workers=1)
    hf, back = (loading.load(tmp_path / p, dtype="float64") for p in ("hf", "x.gguf"))
    # a Mistral without a window is a Llama: GGUF has no other word for it
    plain = config.family == "mistral" and config.sliding_window is None
    assert back.config == (replace(hf.config, family="llama") if plain else hf.config)
    assert back.tokenizer.inner.to_str() == hf.tokenizer.inner.to_str()
    ours, theirs = (full_logits(c.weights, c.config) for c in (back, hf))
    if config.rope_scaling is None:
        np.testing.assert_array_equal(ours, theirs)
    else:
        # the factors are float32: an angle at position 40 is off by 40·2⁻²⁴, and so is what it
        # rotates
        assert (
            np.abs(ours - theirs).max()
            <= tolerance(config, len(TOKENS), theirs) + 1e-4 * np.abs(theirs).max()
        )


def test_stretched_wavelengths_come_from_the_file(tmp_path):
    """Without our own entry the factors alone give the rotation, as in a file of
    llama.cpp's converter.
    """
    config = NETWORKS["llama3-rope"]
    assert config.rope_scaling == LLAMA3
    save(
        tmp_path / "hf",
        config,
        random_tensors(config, 0, "float32"),
        small_tokenizer(),
        dtype="float32",
    )
    convert(tmp_path / "hf", tmp_path / "x.gguf", "F32", workers=1)
    with GGUFFile(tmp_path / "x.gguf") as file:
        metadata = {
            key: value for key, value in file.metadata.items() if not key.startswith("refllm")
        }
        plan = {name: (r.type.name, r.shape) for name, r in file.tensors.items()}
        write(tmp_path / "y.gguf", metadata, plan, lambda name: np.array(file[name]))
    ours, whole = (load(tmp_path / name) for name in ("y.gguf", "x.gguf"))
    assert ours.config == replace(whole.config, rope_scaling=None)
    np.testing.assert_array_equal(
        ours.weights["rope_frequencies"], whole.weights["rope_frequencies"]
    )
    with pytest.raises(
        CheckpointError, match=r"rope_freqs.weight cannot be told from its metadata"
    ):
        convert(tmp_path / "y.gguf", tmp_path / "z.gguf", "F16", workers=1)


# --- weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("type", [name for name in MIXES if name not in ("F32", "F16", "BF16")])
def test_weights_stay_in_their_bytes_and_multiply(source, f32, type, tmp_path):
    made = convert(f32, tmp_path / "x.gguf", type, workers=1)
    assert made.nbytes == (tmp_path / "x.gguf").stat().st_size
    model = load(tmp_path / "x.gguf", dtype="float64", weights="stored")
    plain = load(tmp_path / "x.gguf", dtype="float64", weights="stored")
    with GGUFFile(tmp_path / "x.gguf") as file:
        assert file.metadata["general.file_type"] == MIXES[type][1]
        assert file.metadata["general.quantization_version"] == 2
        for index, layer in enumerate(plain.weights["layers"]):
            for key in ("q_proj", "down_proj"):
                weight = layer[key]
                part = {"q_proj": "attn_q", "down_proj": "ffn_down"}[key]
                raw = file[f"blk.{index}.{part}.weight"]
                assert isinstance(weight, GGUFLinear)
                assert weight.nbytes == raw.nbytes
                floats = dequantize(raw, weight.type)
                order = permutation(
                    model.config, "q_proj.weight" if key == "q_proj" else "v_proj.weight"
                )
                np.testing.assert_array_equal(
                    weight.dequantize(), floats if order is None else floats[np.argsort(order)]
                )
    ids = model.tokenizer.encode(TEXT)
    dense = {gguf_name(name): 0 for name, _ in tensor_shapes(model.config)}
    assert set(made.types) == set(dense)
    out = model.logits(ids)
    from refllm.model.llama import build

    tensors = {name: _dense(plain.weights, name) for name, _ in tensor_shapes(model.config)}
    plain.weights = build(model.config, tensors)
    assert np.abs(plain.logits(ids) - out).max() <= tolerance(model.config, len(ids), out)


def _dense(weights, name):
    parts = name.split(".")
    if parts[1] in ("embed_tokens", "norm"):
        found = weights[parts[1]]
    elif parts[0] == "lm_head":
        found = weights["lm_head"]
    else:
        found = weights["layers"][int(parts[2])][parts[3] if "norm" in parts[3] else parts[4]]
    return found.dequantize() if hasattr(found, "dequantize") else found


def test_a_file_and_its_directory_give_the_same_bytes(source, f32, tmp_path):
    convert(source, tmp_path / "a.gguf", "Q4_K_M", workers=1)
    convert(f32, tmp_path / "b.gguf", "Q4_K_M", workers=1)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_slabs_change_no_byte(source, f32, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_module, "SLAB", 50 * 256)
    convert(source, tmp_path / "a.gguf", "Q4_K_M", workers=1)
    monkeypatch.undo()
    convert(source, tmp_path / "b.gguf", "Q4_K_M", workers=1)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


# --- importance ---------------------------------------------------------------------------


def test_importance_is_the_mean_square_of_the_inputs(source, tmp_path):
    loaded = load(source)
    windows = np.random.default_rng(0).integers(0, 257, (3, 20))
    with CheckpointSource(source) as layers:
        found = importance(layers, windows)
    seen: dict[str, list[np.ndarray]] = {}
    from refllm.quant.taps import tapped

    loaded.weights = tapped(
        loaded.weights, lambda i, key, x: seen.setdefault(f"{i}{key}", []).append(np.array(x))
    )
    for row in windows:
        loaded.logits(row)
    for index in range(loaded.config.num_hidden_layers):
        for key, part in (
            ("q_proj", "attn_q"),
            ("o_proj", "attn_output"),
            ("up_proj", "ffn_up"),
            ("down_proj", "ffn_down"),
        ):
            x = np.concatenate(seen[f"{index}{key}"]).astype(np.float64)
            np.testing.assert_allclose(
                found[f"blk.{index}.{part}.weight"], (x**2).mean(axis=0), rtol=1e-3
            )
    assert len(found) == 7 * loaded.config.num_hidden_layers
    made = convert(source, tmp_path / "a.gguf", "Q4_K_M", importance=found, workers=1)
    convert(source, tmp_path / "b.gguf", "Q4_K_M", workers=1)
    with GGUFFile(tmp_path / "a.gguf") as a, GGUFFile(tmp_path / "b.gguf") as b:
        differ = {name for name in a if not np.array_equal(a[name], b[name])}
    assert differ == set(found) & set(made.types)
    with pytest.raises(ValueError, match="the importance of 'blk.0.attn_q.weight' has shape"):
        convert(
            source,
            tmp_path / "c.gguf",
            importance={"blk.0.attn_q.weight": np.ones(3, np.float32)},
            workers=1,
        )


# --- workers ------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_a_conversion_whose_worker_is_killed_gives_the_same_bytes(source, tmp_path, monkeypatch):
    convert(source, tmp_path / "a.gguf", "Q4_K_S", workers=1)
    monkeypatch.setattr(convert_module, "SLAB", 1 << 14)
    pools: list[ProcessPoolExecutor] = []

    def pool() -> Executor:
        pools.append(processes(2)())
        return pools[-1]

    killed = []

    def progress(done: int, total: int) -> None:
        if done > total // 4 and not killed:
            killed.append(next(iter(pools[0]._processes)))
            os.kill(killed[0], signal.SIGKILL)

    convert(source, tmp_path / "b.gguf", "Q4_K_S", executor=pool, progress=progress)
    assert killed
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]


# --- a source that is rewritten ------------------------------------------------------------

MAPS = Path("/proc/self/maps")  # Linux: the files that a process has mapped


def weights_file(kind: str, source: Path) -> Path:
    return source / "model.safetensors" if kind == "hf" else source


def rewrite(kind: str, source: Path, seed: int) -> dict[str, np.ndarray]:
    """Replace the weights of a checkpoint: the same names, sizes and times, other values."""
    file = weights_file(kind, source)
    before = file.stat() if file.exists() else None
    config = tiny_config(hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    tensors = random_tensors(config, seed, "float32")
    made = source.with_name("made")
    save(made, config, tensors, byte_tokenizer(), dtype="float32")
    if kind == "gguf":
        convert(made, source.with_name("made.gguf"), "F32", workers=1)
        made = made.rename(source.with_name(f"directory{seed}")).with_name("made.gguf")
    if before is None:
        made.rename(source)
    else:
        os.replace(weights_file(kind, made), file)
        assert file.stat().st_size == before.st_size
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        shutil.rmtree(source.with_name("made"), ignore_errors=True)
    return tensors


def written(path: Path) -> dict[str, np.ndarray]:
    """The tensors of an F32 file that are rows in the order of the checkpoint."""
    with GGUFFile(path) as file:
        return {
            name: np.array(file[gguf_name(name)]).view(np.float32)
            for name in ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight")
        }


@pytest.mark.parametrize("kind", ["hf", "gguf"])
@pytest.mark.parametrize("workers", ["this process", "threads", "own processes", "new processes"])
def test_a_source_that_is_rewritten_is_read_again(kind, workers, tmp_path):
    """Twice in one process, and twice on workers that live on between the conversions."""
    source = tmp_path / ("source" if kind == "hf" else "source.gguf")
    spawn = multiprocessing.get_context("spawn")
    executor: Executor | None = None
    if workers == "threads":
        executor = ThreadPoolExecutor(2)
    elif workers == "own processes":
        executor = ProcessPoolExecutor(1, mp_context=spawn)
    count = 1 if workers == "this process" else 2
    try:
        for seed in (1, 2):
            tensors = rewrite(kind, source, seed)
            target = tmp_path / f"{seed}.gguf"
            convert(source, target, "F32", executor=executor, workers=count)
            for name, rows in written(target).items():
                np.testing.assert_array_equal(rows, tensors[name])
        if workers == "own processes" and MAPS.exists():
            mapped = executor.submit(Path.read_text, MAPS).result()
            assert mapped.count(f"{weights_file(kind, source)}\n") <= 1  # the newest source
            assert f"{weights_file(kind, source)} (deleted)" not in mapped
    finally:
        if executor is not None:
            executor.shutdown()
    if MAPS.exists():
        assert str(source) not in MAPS.read_text()


@pytest.mark.skipif(not MAPS.exists(), reason="reads Linux's table of mapped files")
@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_the_source_is_closed_after_a_conversion_that_failed(kind, tmp_path):
    source = tmp_path / ("source" if kind == "hf" else "source.gguf")
    rewrite(kind, source, 1)
    seen = []

    def progress(done: int, total: int) -> None:
        seen.append(str(source) in MAPS.read_text())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "x.gguf", "F32", workers=1, progress=progress)
    assert seen == [True]
    assert str(source) not in MAPS.read_text()
    assert not (tmp_path / "x.gguf").exists()


# --- tokenizers ---------------------------------------------------------------------------


def without(metadata, *keys):
    return {key: value for key, value in metadata.items() if key not in keys}


def test_a_tokenizer_without_its_json_is_rebuilt(f32, source):
    with GGUFFile(f32) as file:
        rebuilt = tokenizer_from_metadata(without(file.metadata, TOKENIZER_JSON), "x")
    original = loading.load(source).tokenizer
    for text in (TEXT, "", " a  b\t\n", "<|endoftext|>", "naïve 😀"):
        assert rebuilt.encode(text) == original.encode(text)
        assert rebuilt.encode(text, special=True) == original.encode(text, special=True)
        assert rebuilt.encode(text, parse_special=True) == original.encode(text, parse_special=True)
        assert rebuilt.decode(rebuilt.encode(text)) == text


def pieces() -> Tokenizer:
    """A small BPE with fallback bytes, as Llama 2 has it."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, normalizers, trainers

    inner = Inner(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, show_progress=False, max_token_length=12
    )
    inner.train_from_iterator([TEXT.replace("größer", "greater")] * 3, trainer)
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(inner)


def test_broken_tokenizers_are_rejected(f32):
    with GGUFFile(f32) as file:
        metadata = without(file.metadata, TOKENIZER_JSON)
    for change, message in (
        (
            {"tokenizer.ggml.model": "bert"},
            "the tokenizer 'bert' is not supported, .*--tokenizer DIR",
        ),
        ({"tokenizer.ggml.pre": "kimi-k2"}, "tokenizer.ggml.pre is 'kimi-k2', .*--tokenizer DIR"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "holds the token 'a' twice, as ids 0 and 1"),
        ({"tokenizer.ggml.tokens": np.arange(3)}, "is missing, or no list of strings"),
        ({"tokenizer.ggml.merges": ["x y z"]}, "the vocabulary has no token 'y z'"),
        ({"tokenizer.ggml.model": "llama"}, "has not one score for each token"),
    ):
        with pytest.raises(CheckpointError, match=message):
            tokenizer_from_metadata(metadata | change, "x")


# --- llama.cpp ----------------------------------------------------------------------------


@pytest.mark.llamacpp
@pytest.mark.parametrize(
    "name", [n for n in NETWORKS if NETWORKS[n].head_dim % 2 == 0 and n != "mistral-window"]
)
def test_llama_cpp_computes_the_same_logits(name, tmp_path):
    """F32 file, F32 cache, no flash attention: within 3e-4 of the largest logit, for every
    family.
    """
    config = replace(NETWORKS[name], bos_token_id=0, eos_token_ids=(0,))
    save(
        tmp_path / "hf",
        config,
        random_tensors(config, 0, "float32"),
        small_tokenizer(),
        dtype="float32",
    )
    convert(tmp_path / "hf", tmp_path / "x.gguf", "F32", workers=1)
    ours = full_logits(load(tmp_path / "x.gguf").weights, config)
    theirs = llama_cpp_logits(tmp_path / "x.gguf", list(TOKENS))
    assert np.abs(ours - theirs).max() <= 3e-4 * max(1.0, np.abs(ours).max())


@pytest.mark.llamacpp
@pytest.mark.parametrize("type", MIXES)
def test_llama_cpp_opens_every_type(f32, type, tmp_path):
    """Its activations are rounded to 8 bits, so that logits differ a little; the weights
    are the same.
    """
    convert(f32, tmp_path / "x.gguf", type, workers=1)
    ids = [0, *range(40, 60)]
    ours = load(tmp_path / "x.gguf").logits(ids)
    theirs = llama_cpp_logits(tmp_path / "x.gguf", ids)
    # 8-bit activations cost this random network some 5 %; a weight that was read wrongly
    # costs 140 %
    assert np.linalg.norm(ours - theirs) <= 0.2 * np.linalg.norm(ours)


@pytest.mark.llamacpp
@pytest.mark.parametrize("type", ["F32", "Q8_0", "Q4_K_M"])
def test_llama_cpp_predicts_as_well(type, tmp_path):
    """Bits per byte of the bundled model agree within 1 %."""
    text = (Path(__file__).parents[1] / "strategies.py").read_text(encoding="utf-8")
    convert(locate("stdlib"), tmp_path / "x.gguf", type, workers=1)
    model = load(tmp_path / "x.gguf")
    ids = [0, *model.tokenizer.encode(text)[:300]]
    size = len(model.tokenizer.decode(ids[1:]).encode())
    ours, theirs = (
        _bits(logits, ids, size)
        for logits in (model.logits(ids), llama_cpp_logits(tmp_path / "x.gguf", ids))
    )
    assert theirs == pytest.approx(ours, rel=1e-5 if type == "F32" else 0.01)


def _bits(logits: np.ndarray, ids: list[int], size: int) -> float:
    logits = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    nats = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(ids)), [*ids[1:], 0]]
    return float(nats[:-1].sum() / np.log(2) / size)


@pytest.mark.llamacpp
@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_llama_cpp_splits_text_the_same(kind, tmp_path):
    tokenizer = byte_tokenizer(300) if kind == "bytes" else pieces()
    begin, end = (0, 0) if kind == "bytes" else (1, 2)
    config = tiny_config(vocab_size=352, bos_token_id=begin, eos_token_ids=(end,))
    tensors = random_tensors(config, 0, "float32")
    save(tmp_path / "hf", config, tensors, tokenizer, dtype="float32")
    convert(tmp_path / "hf", tmp_path / "x.gguf", "F32", workers=1)
    llama_cpp = oracle("llama_cpp", "pip install llama-cpp-python")
    model = llama_cpp.Llama(str(tmp_path / "x.gguf"), vocab_only=True, verbose=False)
    with GGUFFile(tmp_path / "x.gguf") as file:
        rebuilt = tokenizer_from_metadata(without(file.metadata, TOKENIZER_JSON), "x")
    for text in (TEXT, "a  b", "x = 1", "naïve 😀"):
        expected = tokenizer.encode(text)
        assert model.tokenize(text.encode(), add_bos=False, special=False) == expected
        assert rebuilt.encode(text) == expected
    model.close()


# --- chat templates -------------------------------------------------------------------------

TURNS = "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"


@pytest.fixture
def chat_source(tmp_path) -> Path:
    """A chat model that ends with three tokens, and whose template writes the second."""
    tokenizer = chat_tokenizer()
    ends = tuple(map(tokenizer.inner.token_to_id, ("<|end|>", "<|im_end|>", "<|eot|>")))
    path = save_chat_model(tmp_path / "chat", eos_token_ids=ends, hidden_size=32)
    (path / "chat_template.jinja").write_text(TURNS)
    return path


def special(path: Path, **tokens: str) -> None:
    (path / "tokenizer_config.json").write_text(json.dumps(tokens))


@pytest.mark.theorem(
    "A chat is the same token ids before and after conversion, where the template's eos_token "
    "is any of the end tokens",
    source="gguf_tokenizer_writer",
)
@pytest.mark.parametrize("eos", ["<|end|>", "<|im_end|>", "<|eot|>"])
def test_a_template_writes_the_same_tokens_after_conversion(chat_source, tmp_path, eos):
    begin = chat_tokenizer().inner.id_to_token(load(chat_source).config.bos_token_id)
    special(chat_source, bos_token=begin, eos_token=eos)
    made = convert(chat_source, tmp_path / "x.gguf", "F32", workers=1)
    assert not any("chat template" in note for note in made.notes)
    before = load(chat_source)
    after = load(tmp_path / "x.gguf")
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": f"c{eos}"}]
    assert before.chat_tokenizer.encode(chat) == after.chat_tokenizer.encode(chat)
    # this vocabulary has more spellings that llama.cpp ends at, which is said
    assert set(before.config.eos_token_ids) <= set(after.config.eos_token_ids)
    assert after.config.eos_token_ids[0] == chat_tokenizer().inner.token_to_id(eos)


def test_a_token_that_a_template_would_write_otherwise_is_said(chat_source, tmp_path):
    special(chat_source, eos_token="[INST]")  # no end token, and no bos_token at all
    made = convert(chat_source, tmp_path / "x.gguf", "F32", workers=1)
    said = [note for note in made.notes if "chat template" in note]
    assert said == [
        "the chat template's bos_token is None, and '<|endoftext|>' in the GGUF file",
        "the chat template's eos_token is '[INST]', and '<|end|>' in the GGUF file",
    ]
    (chat_source / "chat_template.jinja").write_text("{{ messages[0].content }}")  # writes neither
    made = convert(chat_source, tmp_path / "y.gguf", "F32", workers=1)
    assert not any("chat template" in note for note in made.notes)


def test_the_templates_of_the_tokenizer_folder_are_written(chat_source, tmp_path):
    """As ``load(tokenizer=…)`` reads them; a folder without any leaves the source's own."""
    special(chat_source, eos_token="<|end|>")
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((chat_source / "tokenizer.json").read_bytes())
    for name, template in (("own", TURNS), ("other", "{{ messages[0].content }}!")):
        if name == "other":
            (folder / "chat_template.jinja").write_text(template)
        made = tmp_path / f"{name}.gguf"
        convert(chat_source, made, "F32", workers=1, tokenizer=folder)
        assert load(made).chat_templates.sources == {"default": template}
        assert load(chat_source, tokenizer=folder).chat_templates.sources == {"default": template}


# --- bad input ----------------------------------------------------------------------------


def test_a_target_that_is_there_is_kept(source, tmp_path):
    (tmp_path / "x.gguf").write_text("mine")
    advice = r"is there already: choose another name, or replace it with --overwrite"
    with pytest.raises(CheckpointError, match=advice):
        convert(source, tmp_path / "x.gguf", workers=1)
    assert (tmp_path / "x.gguf").read_text() == "mine"
    convert(source, tmp_path / "x.gguf", overwrite=True, workers=1)
    load(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match="is there already: choose another name$"):
        convert(source, tmp_path, overwrite=True, workers=1)
    with pytest.raises(CheckpointError, match=r"create the folder .*/new/folder first"):
        convert(source, tmp_path / "new" / "folder" / "x.gguf", workers=1)
    assert not (tmp_path / "new").exists()


def test_the_case_of_a_type_counts_for_nothing(source, tmp_path):
    convert(source, tmp_path / "a.gguf", "Q8_0", workers=1)
    made = convert(source, tmp_path / "b.gguf", "q8_0", workers=1)
    assert made.path.read_bytes() == (tmp_path / "a.gguf").read_bytes()
    with pytest.raises(ValueError, match=r"unknown GGUF type 'Q4_KM'.*did you mean 'Q4_K_M'\?"):
        convert(source, tmp_path / "x.gguf", "Q4_KM", workers=1)


def test_quantised_sources_are_rejected(source, f32, tmp_path):
    convert(f32, tmp_path / "q.gguf", "Q8_0", workers=1)
    with pytest.raises(
        CheckpointError, match=r"output.weight is quantised already: start from a file of F32"
    ):
        convert(tmp_path / "q.gguf", tmp_path / "x.gguf", workers=1)


@pytest.mark.parametrize("workers", [1, 2])
def test_weights_that_a_type_cannot_hold_are_named(make_checkpoint, tmp_path, workers):
    config = tiny_config(hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    tensors = random_tensors(config, 0, "float32")
    tensors["model.layers.0.mlp.up_proj.weight"][5] *= 1e9
    save(tmp_path / "hf", config, tensors, byte_tokenizer(), dtype="float32")
    with pytest.raises(
        CheckpointError, match=r"up_proj.weight, from row 0 on: quantize: Q4_K cannot hold row 5"
    ):
        convert(tmp_path / "hf", tmp_path / "x.gguf", "Q4_K_S", workers=workers)
    assert not (tmp_path / "x.gguf").exists()


def edited(f32, path, *, metadata=None, drop=(), rename=None, spoil=None):
    """A copy of a file with changes."""
    with GGUFFile(f32) as file:
        names = {name: (rename or {}).get(name, name) for name in file if name not in drop}
        plan = {names[n]: (file.tensors[n].type.name, file.tensors[n].shape) for n in names}
        data = {names[n]: np.array(file[n]) for n in names}
        for name in spoil or ():
            data[name].view(np.float32).reshape(-1)[0] = np.nan
        write(
            path,
            {k: v for k, v in (file.metadata | (metadata or {})).items() if v is not None},
            plan,
            data.__getitem__,
        )
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"metadata": {"general.architecture": "gpt2"}},
            "general.architecture is 'gpt2'; supported are llama",
        ),
        (
            {"metadata": {"llama.embedding_length": "256"}},
            "the entry llama.embedding_length is '256', not an integer",
        ),
        ({"metadata": {"llama.block_count": None}}, "the entry llama.block_count is missing"),
        ({"metadata": {"llama.block_count": np.uint32(2**32 - 1)}}, "the tensor 'blk.4"),
        (
            {"metadata": {"llama.attention.head_count_kv": np.uint32(3)}},
            "attention heads do not divide",
        ),
        (
            {"metadata": {"llama.attention.layer_norm_rms_epsilon": np.float32(0)}},
            "rms_norm_eps must be positive",
        ),
        ({"metadata": {"llama.rope.scaling.type": "su"}}, "RoPE scaling 'su' is not supported"),
        ({"metadata": {"llama.expert_count": np.uint32(8)}}, "experts are not computed here"),
        ({"metadata": {"split.count": np.uint16(2)}}, "the entry split.no is None, not an integer"),
        ({"drop": ("blk.1.ffn_up.weight",)}, "'blk.1.ffn_up.weight' is missing"),
        ({"rename": {"blk.1.ffn_up.weight": "blk.1.ffn_upp.weight"}}, "is missing"),
        ({"spoil": ("blk.1.ffn_up.weight",)}, "NaN or infinite"),
        ({"metadata": {TOKENIZER_JSON: "{"}}, "the tokenizer cannot be built"),
    ],
)
def test_files_that_are_no_such_network_are_rejected(f32, changes, message, tmp_path):
    path = edited(f32, tmp_path / "x.gguf", **changes)
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_what_is_no_gguf_file_is_rejected(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"nothing of the kind at all")
    with pytest.raises(CheckpointError, match="does not begin with 'GGUF'"):
        load(tmp_path / "x.gguf")
    (tmp_path / "x.bin").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="has 4 bytes, fewer than"):
        load(tmp_path / "x.bin")


def test_infinite_steps_are_rejected(f32, tmp_path):
    convert(f32, tmp_path / "q.gguf", "Q8_0", workers=1)
    raw = bytearray((tmp_path / "q.gguf").read_bytes())
    with GGUFFile(tmp_path / "q.gguf") as file:
        at = file.tensors["blk.2.attn_k.weight"].start
    raw[at : at + 2] = np.float16(np.inf).tobytes()
    (tmp_path / "q.gguf").write_bytes(raw)
    with pytest.raises(
        CheckpointError,
        match=r"blk.2.attn_k.weight holds scales that are NaN or infinite, from row 0",
    ):
        load(tmp_path / "q.gguf")


# --- the command --------------------------------------------------------------------------


def test_the_command(source, tmp_path):
    run = CliRunner().invoke
    made = run(
        app,
        [
            "convert",
            "--model",
            str(source),
            "--to",
            str(tmp_path / "x.gguf"),
            "--type",
            "Q5_K_M",
            "--imatrix",
            "--windows",
            "2",
            "--length",
            "16",
            "--workers",
            "1",
        ],
    )
    assert made.exit_code == 0, made.output
    assert "bits per weight" in made.output
    assert "Q5_K" in made.output
    model = load(tmp_path / "x.gguf")
    assert model.generate([1, 2, 3], 4) == load(tmp_path / "x.gguf").generate([1, 2, 3], 4)
    again = run(app, ["convert", "--model", str(source), "--to", str(tmp_path / "x.gguf")])
    assert again.exit_code == 2
    assert (
        run(
            app, ["convert", "--model", str(source), "--to", str(tmp_path / "y"), "--type", "Q9"]
        ).exit_code
        == 2
    )
    far = run(
        app,
        [
            "convert",
            "--model",
            str(source),
            "--to",
            str(tmp_path / "y"),
            "--imatrix",
            "--length",
            "99999",
        ],
    )
    assert far.exit_code == 2
    assert "windows of 99999 tokens are longer than the model's" in far.stderr
    assert not (tmp_path / "y").exists()
