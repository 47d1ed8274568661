"""8- and 4-bit activations on the pretrained model: scales, SmoothQuant, LLM.int8(), rotations.

The pretrained model has the outliers that these techniques exist for, and nothing is injected.

    python -m refllm.experiments.real_activations  # writes figures/data/real_activations.json
    refllm figures                                 # draws it

| question                                   | cases                                            |
|--------------------------------------------|--------------------------------------------------|
| what does the granularity cost?            | W8A8 with one scale per token, per tensor, from  |
|                                            | calibration                                      |
| what does smoothing reach?                 | α swept, with scales from calibration            |
| what can it not reach?                     | ``down_proj``, whose inputs have spikes of single|
|                                            | tokens: apart, with one scale per token          |
| what does the threshold buy?               | LLM.int8() at several thresholds                 |
| what do rotations reach?                   | W8A8, W4A8, W8A4, W4A4 with and without, weights |
|                                            | by rounding and by GPTQ                          |

Full precision, text and intervals are those of ``real_bench``. Finished cases are kept in
``--cache``; a run that is interrupted continues.

Left out: 4-bit keys and values (``real_caches``), groups of activations.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from threadpoolctl import threadpool_limits

from refllm.api import Model
from refllm.array_types import Json
from refllm.experiments.held_out_bench import computed_once, digest_of, ends, increase
from refllm.experiments.real_bench import FULL_PRECISION, MODEL, RealBench
from refllm.formats.quantized_linear import QuantizedLinear
from refllm.formats.uniform import Scheme
from refllm.formats.w8a8_linear import W8A8Linear
from refllm.measure.device import one_thread, versions
from refllm.measure.plotting import FULL, MORE, NEAREST, TECHNIQUE, new_figure, styled
from refllm.measure.records import Record, Values, write
from refllm.model.llama import PROJECTIONS, Weights
from refllm.model.weights import Linear
from refllm.quant.llm_int8 import Int8Linear
from refllm.quant.recipe import quantize_model
from refllm.quant.rotation import RotatedLinear, Rotations, rotate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMMAND = "python -m refllm.experiments.real_activations"
RECORD = Path("figures/data/real_activations.json")
CACHE = Path("runs/real_activations")
ALPHAS = (0.3, 0.5, 0.7, 0.8, 0.9)
THRESHOLDS = (2.0, 4.0, 6.0, 12.0)


@dataclass(frozen=True)
class Case:
    """One network. ``level`` as in ``quant.smoothquant``: O1 per token, O2 per tensor, O3 from
    calibration; ``apart``: inputs of ``down_proj`` with one scale per token.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    level: str = "O1"
    alpha: float | None = None
    apart: bool = False
    rotated: bool = False
    weights: str = "rtn"
    threshold: float | None = None  # of LLM.int8()

    @property
    def name(self) -> str:
        """For a line of progress.

        >>> Case(4, 4, rotated=True, weights="gptq").name
        'W4A4 O1, rotated, gptq'
        """
        words = [f"W{self.weight_bits}A{self.activation_bits} {self.level}"]
        if self.alpha is not None:
            words.append(f"alpha {self.alpha}")
        if self.apart:
            words.append("down_proj per token")
        if self.rotated:
            words.append("rotated")
        if self.weights != "rtn":
            words.append(self.weights)
        if self.threshold is not None:
            words.append(f"int8 threshold {self.threshold}")
        return ", ".join(words)


def cases() -> list[Case]:
    """All cases, those that answer most first."""
    found = [Case(level=level) for level in ("O1", "O2", "O3")]
    found += [Case(rotated=True), Case(level="O3", rotated=True)]
    for bits in ((4, 4), (8, 4), (4, 8)):
        found += [Case(*bits), Case(*bits, rotated=True)]
    found += [Case(level="O3", alpha=0.5), Case(level="O3", apart=True)]
    found += [Case(level="O3", alpha=alpha, apart=True) for alpha in ALPHAS]
    found += [Case(4, 4, rotated=True, weights="gptq"), Case(4, 8, rotated=True, weights="gptq")]
    found += [Case(4, 8, weights="gptq")]
    found += [Case(level="O3", apart=True, rotated=True)]
    found += [Case(level="O3", alpha=0.5, apart=True, rotated=True)]
    found += [Case(alpha=0.5)]
    found += [Case(threshold=threshold) for threshold in THRESHOLDS]
    return found


class Experiment:
    """A bench, and the rotated model, made once."""

    def __init__(self, bench: RealBench):
        self.bench = bench
        self._rotated: Model | None = None

    def base(self, case: Case) -> Model:
        """The network in full precision, rotated or not."""
        if not case.rotated:
            return self.bench.model
        if self._rotated is None:
            self._rotated = rotate(self.bench.model, Rotations())
        return self._rotated

    def make(self, case: Case) -> Model:
        """The quantised network."""
        base = self.base(case)
        ids = self.bench.calibration(0)
        scheme = Scheme(case.weight_bits, "restricted", "channel")
        if case.threshold is not None:
            return quantize_model(base, "int8", threshold=case.threshold)[0]
        if case.weights == "gptq":
            made, _ = quantize_model(base, "gptq", scheme, ids)
            return quantize_inputs(made, case.activation_bits)
        options: Json = {"per_token": ("down_proj",)} if case.apart else {}
        made, _ = quantize_model(
            base,
            "smoothquant",
            scheme,
            ids,
            alpha=case.alpha,
            level=case.level,
            activation_bits=case.activation_bits,
            **options,
        )
        return made

    def measure(self, case: Case) -> Json:
        """A row of the table."""
        model = self.make(case)
        found = self.bench.compare(model)
        row = asdict(case) | {
            "name": case.name,
            "kl": ends(found.kl),
            "bits per byte": found.model.bits_per_byte,
            "full precision": found.reference.bits_per_byte,
            "increase": ends(increase(found)),
        }
        if case.threshold is not None:
            row["in_float"] = share_in_float(model.weights)
        return row

    def table(self, wanted: Sequence[Case], cache: Path) -> Iterator[Json]:
        """The rows of ``wanted``, each computed or taken from ``cache``."""
        for case in wanted:
            file = cache / f"{digest_of(self.bench.settings, asdict(case))}.json"
            yield computed_once(file, lambda case=case: self.measure(case))  # type: ignore[misc]


def quantize_inputs(model: Model, bits: int) -> Model:
    """The model with the inputs of its quantised weights rounded to ``bits`` bits, one scale
    per token.
    """
    layers = []
    for layer in model.weights["layers"]:
        made = dict(layer)
        for name in PROJECTIONS:
            weight = made[name]
            if isinstance(weight, RotatedLinear):
                made[name] = RotatedLinear(_with_inputs(weight.weight, bits))
            else:
                made[name] = _with_inputs(weight, bits)
        layers.append(made)
    changed = copy.copy(model)
    changed.weights = model.weights | {"layers": layers}
    return changed


def _with_inputs(weight: Linear, bits: int) -> W8A8Linear:
    assert isinstance(weight, QuantizedLinear)
    return W8A8Linear(weight, "token", "restricted", bits=bits)


def share_in_float(weights: Weights) -> float:
    """The share of all input values that LLM.int8() multiplied in floating point."""
    linears = [w for layer in weights["layers"] for w in layer.values()]
    counted = [w for w in linears if isinstance(w, Int8Linear)]
    return sum(w.in_float for w in counted) / max(1, sum(w.multiplied for w in counted))


@styled
def draw(values: Values) -> Figure:
    """KL divergence of the cases, in three panels."""
    rows = {row["name"]: row for row in values["rows"]}
    figure = new_figure(height=3.4)
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.1, 1, 1.2])
    bars = [
        ("per token", "W8A8 O1", NEAREST),
        ("per tensor", "W8A8 O2", NEAREST),
        ("calibrated", "W8A8 O3", NEAREST),
        ("calibrated,\ndown_proj per token", "W8A8 O3, down_proj per token", MORE[0]),
        ("calibrated,\nrotated", "W8A8 O3, rotated", TECHNIQUE),
        ("per token,\nrotated", "W8A8 O1, rotated", TECHNIQUE),
    ]
    for label, name, colour in bars:
        if name in rows:
            left.barh(label, rows[name]["kl"][0], color=colour)
    left.invert_yaxis()
    left.set(xscale="log", xlabel="KL divergence, nats", title="W8A8: whose scale?")
    swept = [row for row in values["rows"] if row["apart"] and not row["rotated"]]
    swept = sorted((r for r in swept if r["alpha"] is not None), key=lambda r: r["alpha"])
    alphas = [row["alpha"] for row in swept]
    middle.plot(alphas, [row["kl"][0] for row in swept], "o-", color=TECHNIQUE)
    if "W8A8 O3, down_proj per token" in rows:
        middle.axhline(rows["W8A8 O3, down_proj per token"]["kl"][0], color=FULL, ls=":")
    middle.set(xlabel="α of SmoothQuant", yscale="log", title="calibrated scales,\ndown_proj apart")
    for offset, (suffix, colour, label) in enumerate(
        [("", NEAREST, "as it is"), (", rotated", TECHNIQUE, "rotated"),
         (", rotated, gptq", MORE[1], "rotated, GPTQ")]
    ):  # fmt: skip
        names = [f"{bits} O1{suffix}" for bits in ("W4A8", "W8A4", "W4A4")]
        known = [(i, rows[n]["kl"][0]) for i, n in enumerate(names) if n in rows]
        right.bar([i + 0.27 * (offset - 1) for i, _ in known], [kl for _, kl in known], 0.25,
                  color=colour, label=label)  # fmt: skip
    right.set_xticks(range(3), ["W4A8", "W8A4", "W4A4"])
    right.set(yscale="log", title="4 bits, one scale per token")
    right.legend(fontsize=8)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the record; every finished case is kept."""
    parser = argparse.ArgumentParser(description="activations of the pretrained model")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--output", type=Path, default=RECORD)
    parser.add_argument("--cases", type=int, help="the first ones only")
    chosen = parser.parse_args(arguments)
    with threadpool_limits(1):
        bench = RealBench(MODEL)
        wanted = cases()[: chosen.cases]
        rows = []
        for case, row in zip(wanted, Experiment(bench).table(wanted, chosen.cache), strict=True):
            rows.append(row)
            mean, low, high = row["kl"]
            print(
                f"[{len(rows)}/{len(wanted)}] {case.name}: KL {mean:.4f} [{low:.4f}, {high:.4f}]",
                file=sys.stderr,
                flush=True,
            )
            values = bench.settings | {
                "versions": versions(),
                "full precision": FULL_PRECISION,
                "rows": rows,
            }
            write(chosen.output, Record(COMMAND, "A", one_thread(), values))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
