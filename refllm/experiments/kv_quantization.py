"""What a quantised cache costs, and what it saves: KIVI beside the two choices of axes that
it was compared with.

    python -m refllm.experiments.kv_quantization  # writes figures/data/kv_quantization.json
    refllm figures                                # draws it

| part     | what varies              | network            | question                            |
|----------|--------------------------|--------------------|-------------------------------------|
| choices  | bits, and axis of scales | both, see below    | per channel or per token?           |
| residual | R, in 2 bits             | without            | what does the residual window gain? |
| position | every row, by position   | both               | does it get worse with the length?  |
| memory   | bits, by length          | LLaMA-70B's shapes | how many bytes are left?            |

What is measured is KL to the same network with a full-precision cache, over windows of
held-out text, each query reading what a cache would hold at its token (``kivi.KiviAttend``).
Intervals are paired (``measure.comparison``).

KIVI's choice was made for keys with a few large channels. The bundled model has none, so
they are injected as well (``outlier_injection.inject_key_outliers``: the same function bit
for bit), ``FACTOR`` times their size in ``PAIRS`` of 32 rotary pairs. The residual window of
the keys is equally long for scales per token and per channel, so that only the scales
differ; values per channel are quantised R at a time, so their window is half as long on
average.

Left out: downstream tasks; speed (``benchmarks/kivi.py``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from threadpoolctl import threadpool_limits

from refllm.api import Model, load
from refllm.array_types import Json
from refllm.corpus import held_out_documents
from refllm.experiments.outlier_injection import choose_channels, inject_key_outliers
from refllm.kv.kivi import Kivi
from refllm.kv.kivi_attend import KiviAttend
from refllm.measure.bootstrap import blocks, bootstrap_intervals
from refllm.measure.comparison import (
    Comparison,
    PrecomputedReference,
    compare,
    precompute_reference,
)
from refllm.measure.device import one_thread, versions
from refllm.measure.memory import LLAMA_70B, kv_bytes
from refllm.measure.plotting import FULL, MORE, NEAREST, TECHNIQUE, new_figure, styled
from refllm.measure.records import Record, Values, write
from refllm.quant.layer_inputs import calibration_windows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BITS = (8, 4, 3, 2)
# name → which elements of keys and of values share a scale
CHOICES = {
    "KIVI": ("channel", "token"),
    "keys by token": ("token", "token"),
    "values by channel": ("channel", "channel"),
}
RESIDUAL = 128  # R in the paper, as in ``Kivi``
RESIDUALS = (32, 64, RESIDUAL, 256, 512)
GROUP = 32
FACTOR = 8.0
PAIRS = 2
TEXTS = 16
LENGTH = 1024
BINS = 8
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
NETWORKS = ("as it is", "planted")  # the names in the record; the second has outliers
BLOCK = 128  # tokens per block of the bootstrap


@dataclass(frozen=True)
class Case:
    """One cache: in which network, which elements share a scale, how many bits, and the
    length of the residual window.
    """

    network: str
    choice: str
    bits: int
    residual: int = RESIDUAL

    @property
    def kivi(self) -> Kivi:
        """The settings of the cache."""
        return Kivi(self.bits, self.bits, GROUP, self.residual)


def cases() -> list[Case]:
    """Every row of the table, the choices first."""
    found = [
        Case(network, choice, bits) for network in NETWORKS for choice in CHOICES for bits in BITS
    ]
    return found + [Case("as it is", "KIVI", 2, r) for r in RESIDUALS if r != RESIDUAL]


class Experiment:
    """A network with and without outliers in its keys, and the text that both predict."""

    def __init__(self, model: Model, texts: int = TEXTS, length: int = LENGTH):
        self.model = model
        self.length = length
        self.pairs = choose_channels(model.config.head_dim // 2, PAIRS, np.random.default_rng(0))
        self.text = list(
            calibration_windows(model.tokenizer, texts, length, 0, documents=held_out_documents())
        )
        injected = inject_key_outliers(model.weights, model.config, self.pairs, FACTOR)
        self.networks = dict(
            zip(NETWORKS, (model, Model(model.config, injected, model.tokenizer)), strict=True)
        )
        self._references: dict[str, PrecomputedReference] = {}
        self._kivi: dict[Case, np.ndarray] = {}  # KL of each token

    def compare(self, case: Case) -> Comparison:
        """The network with this cache against itself with a full-precision cache."""
        network = self.networks[case.network]
        keys, values = CHOICES[case.choice]
        length = self.length
        if case.network not in self._references:
            self._references[case.network] = precompute_reference(
                network, self.text, window=length, stride=length
            )

        def attend(lengths: list[int]) -> KiviAttend:
            window = network.config.sliding_window
            return KiviAttend(lengths, case.kivi, window, keys=keys, values=values)

        return compare(
            network,
            self._references[case.network],
            self.text,
            rng=np.random.default_rng(0),
            window=length,
            stride=length,
            attend=attend,
        )

    def row(self, case: Case) -> Json:
        """A row of the table; KL by position is the mean over texts of ``BINS`` equally long
        runs of tokens.

        "against KIVI" is the KL minus that of KIVI at the same bits and R, in pairs of
        tokens.
        """
        found = self.compare(case)
        kivi = replace(case, choice="KIVI")
        if kivi not in self._kivi:
            self._kivi[kivi] = (found if kivi == case else self.compare(kivi)).token_kl
        more = found.token_kl - self._kivi[kivi]
        texts = np.repeat(np.arange(len(self.text)), len(more) // len(self.text))
        rng = np.random.default_rng(0)
        paired = bootstrap_intervals([more], blocks(texts, BLOCK), rng)[0]
        by_position = found.token_kl.reshape(len(self.text), -1)  # [texts, tokens]
        parts = np.array_split(by_position, BINS, axis=1)
        return asdict(case) | {
            "bits a number": case.kivi.bits_per_value(),
            "kl": [found.kl.mean, found.kl.low, found.kl.high],
            "against KIVI": [paired.mean, paired.low, paired.high],
            "agreement": found.agreement.mean,
            "difference": [found.difference.mean, found.difference.low, found.difference.high],
            "kl by position": [float(part.mean()) for part in parts],
        }

    def table(self, wanted: Sequence[Case]) -> Iterator[Json]:
        """The rows of ``wanted``."""
        return map(self.row, wanted)


def memory(lengths: Sequence[int] = LENGTHS) -> dict[str, list[float]]:
    """Bytes of one sequence's cache as a share of float16's, by length: codes, scales and the
    residual window.
    """

    def share(bits: int, length: int) -> float:
        return Kivi(bits, bits, GROUP).nbytes(LLAMA_70B, length) / kv_bytes(LLAMA_70B, length)

    return {f"{bits} bits": [share(bits, length) for length in lengths] for bits in (4, 2)}


# --- the figure ---------------------------------------------------------------------------

COLOURS = {"KIVI": TECHNIQUE, "keys by token": NEAREST, "values by channel": MORE[0]}


@styled
def draw(values: Values) -> Figure:
    """A record of this experiment → KL by bits in both networks, KL by R, bytes by length."""
    fig = new_figure(6.2)
    panels = fig.subplots(2, 2)
    rows = values["rows"]
    most = max(row["kl"][2] for row in rows)
    for panel, network, title in (
        (panels[0, 0], "as it is", "Keys as they are: little difference"),
        (panels[0, 1], "planted", f"{values['factor']:g}× key outliers: per channel wins"),
    ):
        inside = [r for r in rows if r["network"] == network and r["residual"] == RESIDUAL]
        _draw_choices(panel, inside)
        panel.set(title=title, ylim=(1e-6, 2 * most))
    panels[0, 0].legend(fontsize=8)
    _draw_residual(panels[1, 0], rows)
    _draw_memory(panels[1, 1], values)
    return fig


def _draw_choices(panel: Axes, rows: Sequence[Json]) -> None:
    """KL by bits, a line for each choice of axes."""
    for at, (name, colour) in enumerate(COLOURS.items()):
        mine = sorted((row for row in rows if row["choice"] == name), key=lambda row: row["bits"])
        # side by side: equal ones would hide each other
        places = [row["bits"] + 0.12 * (at - 1) for row in mine]
        _draw_line(panel, places, mine, colour, name)
    panel.set(
        xlabel="bits per code (points side by side)",
        ylabel="KL (nats per token, log)",
        yscale="log",
    )
    panel.set_xticks([2, 3, 4, 8])


def _draw_residual(panel: Axes, rows: Sequence[Json]) -> None:
    """KL by R, the length of the full-precision residual window, in 2 bits."""
    wanted = ("as it is", "KIVI", 2)
    mine = sorted(
        (row for row in rows if (row["network"], row["choice"], row["bits"]) == wanted),
        key=lambda row: row["residual"],
    )
    places = [row["residual"] for row in mine]
    _draw_line(panel, places, mine, TECHNIQUE, "KIVI")
    panel.set(
        title="2 bits: a longer residual window helps",
        xlabel="R, newest tokens in full precision (log)",
        ylabel="KL (nats per token)",
        xscale="log",
        ylim=(0, None),
    )
    panel.set_xticks(places, [str(r) for r in places])
    panel.minorticks_off()


def _draw_line(
    panel: Axes, places: Sequence[float], rows: Sequence[Json], colour: str, name: str
) -> None:
    """KL with its intervals."""
    means = [row["kl"][0] for row in rows]
    below = [row["kl"][0] - row["kl"][1] for row in rows]
    above = [row["kl"][2] - row["kl"][0] for row in rows]
    panel.errorbar(
        places, means, yerr=(below, above), color=colour, marker="o", ms=4, lw=1.4, label=name
    )


def _draw_memory(panel: Axes, values: Values) -> None:
    """Bytes as a share of float16's, by length."""
    lengths = values["lengths"]
    for (name, shares), colour in zip(values["memory"].items(), (MORE[0], TECHNIQUE), strict=False):
        percent = [100 * share for share in shares]
        panel.plot(lengths, percent, color=colour, marker="o", ms=3, lw=1.4)
        panel.annotate(
            f"{name}: {percent[-1]:.0f} %",
            (lengths[-1], percent[-1]),
            xytext=(0, 6),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=colour,
        )
    panel.axhline(100, color=FULL, lw=1.4, ls="--")
    panel.set(
        title=f"Long caches shrink most (R = {RESIDUAL})",
        xlabel="tokens in the cache (log)",
        ylabel="bytes, share of float16's (%)",
        xscale="log",
        ylim=(0, 110),
    )
    panel.set_xticks([100, 1000, 10000], ["100", "1,000", "10,000"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every case and write the record."""
    parser = argparse.ArgumentParser(
        prog="python -m refllm.experiments.kv_quantization", description=main.__doc__
    )
    add = parser.add_argument
    add("--model", default="stdlib", help="a bundled name or a checkpoint")
    add("--output", type=Path, default=Path("figures/data/kv_quantization.json"))
    add("--texts", type=int, default=TEXTS, help="held-out windows")
    add("--length", type=int, default=LENGTH, help="tokens in each")
    chosen = parser.parse_args(arguments)
    with threadpool_limits(limits=1, user_api="blas"):
        experiment = Experiment(load(chosen.model, backend="numpy"), chosen.texts, chosen.length)
        wanted = cases()
        rows = []
        for case, row in zip(wanted, experiment.table(wanted), strict=True):
            rows.append(row)
            print(
                f"[{len(rows)}/{len(wanted)}] {case.network}, {case.choice}, {case.bits} bits, "
                f"R = {case.residual}: KL {row['kl'][0]:.5f}",
                file=sys.stderr,
            )
    values = {
        "model": Path(chosen.model).name,
        "group": GROUP,
        "factor": FACTOR,
        "pairs": experiment.pairs,
        "texts": chosen.texts,
        "length": chosen.length,
        "rows": rows,
        "lengths": list(LENGTHS),
        "memory": memory(),
        "versions": versions(),
    }
    command = "python -m refllm.experiments.kv_quantization"
    write(chosen.output, Record(command, "A", one_thread(), values))


if __name__ == "__main__":
    main()
