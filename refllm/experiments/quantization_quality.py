"""What quantisation costs: KL to full precision, top-1 agreement and bits per byte, methods
× bits × granularity.

Every cell of the table is a model that was quantised once and compared with the original on
the same held-out text, token by token, so its intervals are paired: what makes a token hard
for both cancels. ``against rtn`` is paired in the same way: the KL of a method minus that
of round to nearest at the same bits and granularity.

    python -m refllm.experiments.quantization_quality            # writes
    figures/data/quantization.json; `refllm figures` draws it

A finished cell is kept in ``--cache`` under a digest of everything that decides it (model,
text, settings and the code that quantises), so the command goes on where it was stopped,
and computes only what has changed.

| symbol    | name                                                               | unit           |
|-----------|--------------------------------------------------------------------|----------------|
| KL        | mean of KL(full precision ‖ quantised) over tokens                 | nats per token |
| agreement | share of tokens at which both have the same most likely token      |                |
| bits/byte | loss of the quantised model; ``increase`` is its paired difference | bits per byte  |
| bits      | stored bits a quantised weight, scales and zero points included    |                |

Text: ``EXCERPTS`` windows of the held-out modules. Calibration: windows of the training
text, drawn by a seed, the same for every method. Left out: the whole held-out text
(``refllm eval`` scores it), speed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import refllm
from refllm.api import Model, load
from refllm.checkpoints.loading import locate
from refllm.checkpoints.tensor_files import tensor_shapes
from refllm.checkpoints.writer import write_whole
from refllm.corpus import held_out_documents
from refllm.formats.uniform import Scheme
from refllm.measure.bootstrap import Interval, blocks, bootstrap_intervals
from refllm.measure.comparison import (
    Comparison,
    PrecomputedReference,
    compare,
    precompute_reference,
)
from refllm.measure.device import processor
from refllm.measure.records import Record, write
from refllm.quant.calibration_data import calibration_windows
from refllm.quant.recipe import METHODS, quantize_model

BITS = (8, 4, 3, 2)
GROUPS = (0, 128, 64, 32)  # weights that share a scale; 0 is a whole row ("channel")
SEEDS = (0, 1, 2)
# weights and activations in 8 bits, a scale a row: one cell each
BY_ROW_8 = ("smoothquant", "int8")
EXCERPTS = 16  # of held-out text
LENGTH = 256
WINDOWS = 16  # of calibration text
WINDOW = 512
BLOCK = 128  # tokens a block of the bootstrap, and how often it is drawn anew
RESAMPLES = 2000


@dataclass(frozen=True)
class Cell:
    """One quantised model. ``group`` 0 is a scale a row; ``seed`` draws the calibration
    text, None: there is none.
    """

    method: str
    bits: int
    group: int
    rule: str
    seed: int | None

    @property
    def scheme(self) -> Scheme:
        if self.group:
            return Scheme(self.bits, self.rule, "group", self.group)
        return Scheme(self.bits, self.rule, "channel")

    @property
    def name(self) -> str:
        """As a line of progress says it."""
        share = f"groups of {self.group}" if self.group else "a scale a row"
        return f"{self.method}, {self.bits} bits, {share}" + (
            f", seed {self.seed}" if self.seed is not None else ""
        )


def cells(
    methods: Iterable[str] = ("rtn", "gptq", "awq", *BY_ROW_8),
    bits: Sequence[int] = BITS,
    groups: Sequence[int] = GROUPS,
    seeds: Sequence[int] = SEEDS,
    rule: str = "half_integer",
) -> list[Cell]:
    """The table, round to nearest first; a method that needs no text has one cell where
    others have one a seed.
    """
    found = []
    for method in sorted(methods, key=lambda name: name != "rtn"):
        drawn = list(seeds) if METHODS[method].calibrates else [None]
        if method in BY_ROW_8:
            found += [Cell(method, 8, 0, "restricted", seed) for seed in drawn if 8 in bits]
            continue
        found += [Cell(method, b, g, rule, seed) for b in bits for g in groups for seed in drawn]
    return found


class Bench:
    """A model, the text that it is judged by, and its own predictions there, made once."""

    def __init__(
        self, model: Model, digest: str, excerpts: int, length: int, windows: int, window: int
    ):
        self.model = model
        self.windows = windows
        self.window = window
        self.text = list(
            calibration_windows(
                model.tokenizer, excerpts, length, 0, documents=held_out_documents()
            )
        )
        self.settings = {
            "model": digest,
            "code": code_digest(),
            "python": platform.python_version(),
            "excerpts": excerpts,
            "tokens each": length,
            "calibration windows": windows,
            "calibration tokens each": window,
            "block": BLOCK,
            "resamples": RESAMPLES,
        }
        self._kept: PrecomputedReference | None = None
        self._calibration: dict[int, np.ndarray] = {}

    @property
    def reference(self) -> PrecomputedReference:
        if self._kept is None:
            self._kept = precompute_reference(self.model, self.text)
        return self._kept

    def calibration(self, seed: int | None) -> np.ndarray | None:
        if seed is None:
            return None
        if seed not in self._calibration:
            begin = self.model.config.bos_token_id
            self._calibration[seed] = calibration_windows(
                self.model.tokenizer, self.windows, self.window, seed, begin=begin
            )
        return self._calibration[seed]

    def key(self, cell: Cell) -> str:
        """The name of a cell's file in the cache."""
        return hashlib.sha256(json.dumps([self.settings, asdict(cell)]).encode()).hexdigest()[:20]

    def measure(self, cell: Cell) -> tuple[dict[str, Any], np.ndarray]:
        """A row of the table, and the KL of each token [T]."""
        began = time.perf_counter()
        quantised, report = quantize_model(
            self.model, cell.method, cell.scheme, self.calibration(cell.seed)
        )
        seconds = time.perf_counter() - began
        found = compare(
            quantised,
            self.reference,
            self.text,
            rng=np.random.default_rng(0),
            block=BLOCK,
            resamples=RESAMPLES,
        )
        row = {
            "method": cell.method,
            "bits": cell.bits,
            "group": cell.group,
            "rule": cell.rule,
            "seed": cell.seed,
            "bits per weight": report.bits_per_weight,
            "bytes": report.nbytes,
            "kl": _ends(found.kl),
            "agreement": _ends(found.agreement),
            "bits per byte": found.model.bits_per_byte,
            "increase": _ends(increase(found)),
            "quantising seconds": round(seconds, 3),
        }
        return row, found.token_kl

    def against(self, kl: np.ndarray, other: np.ndarray) -> list[float]:
        """Mean of kl − other over tokens, with its interval from the same resamples as all
        others.
        """
        units = blocks(self.reference.plan.document, BLOCK)
        return _ends(
            bootstrap_intervals([kl - other], units, np.random.default_rng(0), resamples=RESAMPLES)[
                0
            ]
        )


def increase(found: Comparison) -> Interval:
    """Bits per byte of the model minus those of the reference: each byte carries its
    token's share of the loss.
    """
    size = found.model.token_bytes
    some = size > 0  # special tokens stand for no text
    each = (found.model.nats - found.reference.nats)[some] / np.log(2) / size[some]
    units = blocks(found.model.document, BLOCK)[some]
    return bootstrap_intervals(
        [np.repeat(each, size[some])],
        np.repeat(units, size[some]),
        np.random.default_rng(0),
        resamples=RESAMPLES,
    )[0]


def table(bench: Bench, wanted: Sequence[Cell], cache: Path) -> Iterator[dict[str, Any]]:
    """The rows of ``wanted``, each computed or taken from ``cache``, with its difference
    from round to nearest.
    """
    nearest: dict[tuple[int, int, str], np.ndarray] = {}
    for cell in wanted:
        file = cache / f"{bench.key(cell)}.json"
        if file.is_file():
            kept = json.loads(file.read_text("utf-8"))
            row = kept["row"]
            kl = np.asarray(kept["kl"])
        else:
            row, kl = bench.measure(cell)
            cache.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps({"row": row, "kl": kl.tolist()}))
        place = (cell.bits, cell.group, cell.rule)
        if cell.method == "rtn":
            nearest[place] = kl
        elif place in nearest:
            row["against rtn"] = bench.against(kl, nearest[place])
        yield row


def code_digest() -> str:
    """Of the modules that quantise: a cell that other code has made is not this code's.

    ``quant.recipe`` and what it imports of ``formats`` and ``quant``, so that export
    formats may change.
    """
    root = Path(refllm.__file__).parent
    todo = ["quant/recipe.py"]
    seen = set[str]()
    while todo:
        path = todo.pop()
        if path not in seen and (root / path).is_file():
            seen.add(path)
            todo += [
                f"{m[1]}/{m[2]}.py" for m in _IMPORT.finditer((root / path).read_text("utf-8"))
            ]
    return hashlib.sha256(
        b"".join(path.encode() + (root / path).read_bytes() for path in sorted(seen))
    ).hexdigest()


_IMPORT = re.compile(r"^from refllm\.(formats|quant)\.(\w+) import", re.MULTILINE)


def values(bench: Bench, name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the record holds: the rows, and what they were measured on."""
    config = bench.model.config
    shapes = [shape for name, shape in tensor_shapes(config) if name.endswith("_proj.weight")]
    reference = compare(
        bench.model, bench.reference, bench.text, rng=np.random.default_rng(0), resamples=1
    ).reference
    return {
        "model": name,
        "parameters": config.num_parameters,
        "quantised": sum(math.prod(shape) for shape in shapes),
        "full precision": {
            "bits per byte": reference.bits_per_byte,
            "tokens": reference.tokens,
            "bytes": reference.bytes,
        },
        "settings": bench.settings,
        "versions": {
            "refllm": refllm.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
        "rows": list(rows),
    }


def _ends(interval: Interval) -> list[float]:
    return [interval.mean, interval.low, interval.high]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the table, or what is missing of it, and write the record that the figure is
    drawn from.
    """
    parser = argparse.ArgumentParser(
        prog="python -m refllm.experiments.quantization_quality", description=main.__doc__
    )
    parser.add_argument(
        "--model", default="stdlib", help="a bundled model's name, or a checkpoint's folder"
    )
    parser.add_argument("--output", type=Path, default=Path("figures/data/quantization.json"))
    parser.add_argument(
        "--cache", type=Path, default=Path("build/quality"), help="where finished cells are kept"
    )
    parser.add_argument(
        "--methods", nargs="+", default=["rtn", "gptq", "awq", *BY_ROW_8], choices=METHODS
    )
    parser.add_argument("--bits", nargs="+", type=int, default=BITS)
    parser.add_argument(
        "--groups", nargs="+", type=int, default=GROUPS, help="weights a scale; 0 is a whole row"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=SEEDS, help="of the calibration text"
    )
    parser.add_argument(
        "--excerpts", type=int, default=EXCERPTS, help=f"held-out excerpts of {LENGTH} tokens"
    )
    chosen = parser.parse_args(arguments)
    from threadpoolctl import threadpool_limits

    weights = sorted(locate(chosen.model).glob("*.safetensors"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()
    with threadpool_limits(limits=1, user_api="blas"):
        bench = Bench(
            load(chosen.model, backend="numpy"), digest, chosen.excerpts, LENGTH, WINDOWS, WINDOW
        )
        wanted = cells(chosen.methods, chosen.bits, chosen.groups, chosen.seeds)
        rows = []
        for cell, row in zip(wanted, table(bench, wanted, chosen.cache), strict=True):
            rows.append(row)
            mean, low, high = row["kl"]
            print(
                f"[{len(rows)}/{len(wanted)}] {cell.name}: KL {mean:.5f} [{low:.5f}, {high:.5f}]",
                file=sys.stderr,
            )
        made = values(bench, Path(chosen.model).name, rows)
    hardware = (
        f"{processor()}, one thread, NumPy {np.__version__}, Python {platform.python_version()}"
    )
    write(
        chosen.output,
        Record("python -m refllm.experiments.quantization_quality", "A, B", hardware, made),
    )


if __name__ == "__main__":
    main()
