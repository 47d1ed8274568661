"""A model that is too large for floats: how much memory, and how long a token, with weights
in the bytes of a GGUF file.

    python benchmarks/stored.py --output benchmarks/results/stored.json

A file of the shape of Llama-3.1-8B in Q4_K_M is made up of random codes (4.9 GB in a temporary
folder: there must be room for it) and loaded with ``weights="stored"`` in a process of its
own, whose peak of resident memory is the result. The file has no tokenizer: token ids go in
and come out. The time of a step is compared with that of reading the model's bytes once, by a
dot product on the same thread: that is how fast a kernel could be that does nothing else.
What ``weights="float"`` would need is said without loading it.

One thread, float32, batch 1; steps and reads are measured in processor time, which a busy
machine changes less. Left out: prompts, threads, the quality of random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import POOLS, environment, finish, ratios, shown, table

from refllm.checkpoints.gguf_names import architecture, config_metadata, gguf_name
from refllm.checkpoints.tensor_files import tensor_shapes
from refllm.formats.gguf.codec import quantize
from refllm.formats.gguf.mixes import MIXES, Heads, mix
from refllm.formats.gguf.types import gguf_type
from refllm.formats.gguf.writer import plan_bytes, write
from refllm.model.config import ModelConfig

SPARE = 1 << 30  # bytes of disk that are left free


def shape(layers: int, width: int) -> ModelConfig:
    """Llama-3.1-8B's network, with another number of layers, or everything narrower."""
    heads = width // 128
    return ModelConfig(
        "llama",
        vocab_size=128_256 * width // 4096,
        hidden_size=width,
        intermediate_size=7 * width // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=128,
        rope_theta=500_000.0,
        max_position_embeddings=131_072,
    )


def make_file(path: Path, config: ModelConfig, type: str) -> None:
    """A file of the mix ``type``; every tensor repeats a few thousand random blocks."""
    names = {gguf_name(name): shape for name, shape in tensor_shapes(config)}
    heads = Heads(
        architecture(config),
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    types = mix(names, type, heads)
    plan = {name: (types[name], shape) for name, shape in names.items()}
    rng = np.random.default_rng(0)
    blocks = {}
    for stored in sorted(set(types.values())):
        found = gguf_type(stored)
        values = rng.standard_normal((4096, found.block), dtype=np.float32)
        if not found.quantized:  # norms
            values = np.ones_like(values)
        blocks[stored] = quantize(values / np.float32(64 if found.quantized else 1), stored)

    def read(name: str) -> np.ndarray:
        data: np.ndarray = np.resize(blocks[types[name]].reshape(-1), plan_bytes(plan, name))
        return data

    metadata = config_metadata(config, "made up") | {
        "general.file_type": np.uint32(MIXES[type][1]),
        "general.quantization_version": np.uint32(2),
    }
    write(path, metadata, plan, read)


def measure(path: Path, tokens: int, rounds: int) -> dict[str, Any]:
    """Load and decode in this process; bytes and seconds."""
    from refllm.api import load
    from refllm.cli.main import keep_freed_memory
    from refllm.cli.model_facts import describe
    from refllm.decode.fast.captured_step import make_decode_step
    from refllm.kv.contiguous import ContiguousPolicy

    keep_freed_memory()
    in_float = describe(path, np, weights="float")["loaded as"]
    began = time.perf_counter()
    model = load(path, "numpy", weights="stored")
    loaded = time.perf_counter() - began
    step = make_decode_step(model.weights, model.config)
    cache = ContiguousPolicy().new_cache(
        model.config, 1, 1 + tokens * (rounds + 1), like=model.weights["norm"]
    )
    chunk = np.ones(1 << 24, dtype=np.float32)  # 64 MB: read from memory again and again
    repeats = max(1, path.stat().st_size // chunk.nbytes)
    steps = []
    reads = []
    for index in range(rounds + 1):  # the first is warm-up
        began = time.process_time()
        for token in range(tokens):
            step([token], cache.positions([1]), cache.view([1]))
            cache.advance([1])
        middle = time.process_time()
        for _ in range(repeats):
            chunk.dot(chunk)
        if index:
            steps.append((middle - began) / tokens)
            reads.append(
                (time.process_time() - middle) * path.stat().st_size / (repeats * chunk.nbytes)
            )
    return {
        "storage": model.storage,
        "parameters": model.config.num_parameters,
        "load_s": round(loaded, 2),
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "step_s": [round(seconds, 4) for seconds in steps],
        "read_s": [round(seconds, 4) for seconds in reads],
        "in_float": in_float,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.measure is not None:
        print(json.dumps(measure(options.measure, options.tokens, options.rounds)))
        return 0
    config = shape(options.layers, options.width)
    record: dict[str, Any] = {
        "benchmark": "stored",
        "environment": environment([], {"refllm": 1}),
        "settings": {
            "type": options.type,
            "layers": options.layers,
            "width": options.width,
            "tokens": options.tokens,
            "rounds": options.rounds,
        },
    }
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "made-up.gguf"
        needed = int(0.62 * config.num_parameters) + SPARE
        free = shutil.disk_usage(folder).free
        if free < needed:
            print(f"{folder} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are needed")
            return 1
        make_file(path, config, options.type)
        size = path.stat().st_size
        command = [
            *(sys.executable, __file__, "--measure", str(path)),
            *("--tokens", str(options.tokens), "--rounds", str(options.rounds)),
        ]
        own = os.environ | dict.fromkeys(POOLS, "1")
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=own, check=True)
    found = json.loads(done.stdout)
    found |= {
        "file_bytes": size,
        "tokens_per_s": round(1 / float(np.median(found["step_s"])), 3),
        "ratio": ratios(found["step_s"], found["read_s"]),
    }
    record["results"] = [found]
    table(
        f"{found['parameters']:,} parameters, {options.type}, {found['storage']}",
        ["file", "loaded in", "peak memory", "tokens/s", "step / reading its bytes"],
        [
            [
                f"{size / 1e9:.2f} GB",
                f"{found['load_s']:.1f} s",
                f"{found['peak_bytes'] / 1e9:.2f} GB",
                f"{found['tokens_per_s']:.2f}",
                shown(found["ratio"]),
            ]
        ],
    )
    print(f'\nwith weights="float": {found["in_float"]}')
    finish(record, options.output)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A large made-up model in a GGUF file's bytes.")
    parser.add_argument("--type", default="Q4_K_M", help="the mix of the made-up file")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096, help="a multiple of 128")
    parser.add_argument("--tokens", type=int, default=1, help="steps a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the file lies meanwhile")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="where to write the record as JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
