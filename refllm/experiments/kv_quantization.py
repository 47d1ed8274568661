"""What a quantised cache costs, and what it saves: KIVI beside the two choices that it was
compared with.

    python -m refllm.experiments.kv_quantization    # writes
    figures/data/kv_quantization.json; `refllm figures` draws it

| part     | what varies               | network               | question                           |
|----------|---------------------------|-----------------------|------------------------------------|
| choices  | bits × what shares a step | as it is, and planted | by channel or by token?            |
| waiting  | R, in 2 bits              | as it is              | what do the newest tokens buy?     |
| position | every row, by position    | both                  | does it get worse with the length? |
| memory   | bits, by length           | LLaMA-70B's shapes    | how many bytes are left?           |

What is measured is KL to the same network with a cache of numbers, over windows of held-out
text that are read as they would be read token by token (``kivi.KiviAttend``), paired as in
``quality``.

KIVI's choice was made for keys with a few large channels. The bundled model has none, so
they are planted as well (``planting.inject_key_outliers``: the same function bit for bit),
``FACTOR`` times their size in ``PAIRS`` of 32 rotary pairs. As many keys wait by token as
by channel, so that the steps alone differ; values by channel wait in runs, half as many.

Left out: downstream tasks; speed (``benchmarks/kivi.py``).
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import refllm
from refllm.api import Model, load
from refllm.corpus import held_out_documents
from refllm.experiments.outlier_injection import inject_key_outliers
from refllm.kv.kivi import Kivi, KiviAttend
from refllm.kv.sparse import choose
from refllm.measure.bootstrap import blocks, bootstrap_intervals
from refllm.measure.comparison import (
    Comparison,
    PrecomputedReference,
    compare,
    precompute_reference,
)
from refllm.measure.device import processor
from refllm.measure.memory import LLAMA_70B, kv_bytes
from refllm.measure.plotting import FULL, MORE, NEAREST, TECHNIQUE, new_figure, styled
from refllm.measure.records import Record, Values, write
from refllm.quant.calibration_data import calibration_windows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BITS = (8, 4, 3, 2)
CHOICES = {
    "KIVI": ("channel", "token"),
    "keys by token": ("token", "token"),
    "values by channel": ("channel", "channel"),
}
WAITING = (32, 64, 128, 256, 512)
GROUP = 32
FACTOR = 8.0
PAIRS = 2
TEXTS = 16
LENGTH = 1024
BINS = 8
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
NETWORKS = ("as it is", "planted")
BLOCK = 128  # tokens a block of the bootstrap


@dataclass(frozen=True)
class Case:
    """One cache: in which network, with how many bits, how many tokens wait, and what
    shares a step.
    """

    network: str
    choice: str
    bits: int
    residual: int = Kivi.residual

    @property
    def kivi(self) -> Kivi:
        return Kivi(self.bits, self.bits, GROUP, self.residual)


def cases() -> list[Case]:
    """Every row of the table, the choices first."""
    found = [
        Case(network, choice, bits) for network in NETWORKS for choice in CHOICES for bits in BITS
    ]
    return found + [Case("as it is", "KIVI", 2, r) for r in WAITING if r != Kivi.residual]


class Experiment:
    """A network as it is and with planted keys, and the text that both are judged by."""

    def __init__(self, model: Model, texts: int = TEXTS, length: int = LENGTH):
        self.model = model
        self.length = length
        self.pairs = choose_channels(model.config.head_dim // 2, PAIRS, np.random.default_rng(0))
        self.text = list(
            calibration_windows(model.tokenizer, texts, length, 0, documents=held_out_documents())
        )
        planted = Model(
            model.config,
            inject_key_outliers(model.weights, model.config, self.pairs, FACTOR),
            model.tokenizer,
        )
        self.networks = {"as it is": model, "planted": planted}
        self._kept: dict[str, PrecomputedReference] = {}
        self._kivi: dict[Case, np.ndarray] = {}  # KL of each token

    def compare(self, case: Case) -> Comparison:
        """The network with this cache against itself with a cache of numbers."""
        network = self.networks[case.network]
        keys, values = CHOICES[case.choice]
        if case.network not in self._kept:
            self._kept[case.network] = precompute_reference(
                network, self.text, window=self.length, stride=self.length
            )

        def memory(lengths: list[int]) -> KiviAttend:
            return KiviAttend(
                lengths, case.kivi, network.config.sliding_window, keys=keys, values=values
            )

        kept = self._kept[case.network]
        rng = np.random.default_rng(0)
        length = self.length
        return compare(
            network, kept, self.text, rng=rng, window=length, stride=length, attend=memory
        )

    def row(self, case: Case) -> dict[str, Any]:
        """A row of the table; KL by position is the mean over texts of equally long runs of
        tokens.

        "against KIVI" is the KL minus that of KIVI at the same bits and R, in pairs of
        tokens.
        """
        found = self.compare(case)
        same = replace(case, choice="KIVI")
        if same not in self._kivi:
            self._kivi[same] = (found if same == case else self.compare(same)).token_kl
        more = found.token_kl - self._kivi[same]
        texts = np.repeat(np.arange(len(self.text)), len(more) // len(self.text))
        paired = bootstrap_intervals([more], blocks(texts, BLOCK), np.random.default_rng(0))[0]
        by_position = found.token_kl.reshape(len(self.text), -1)
        return asdict(case) | {
            "bits a number": case.kivi.bits_per_number(),
            "kl": [found.kl.mean, found.kl.low, found.kl.high],
            "against KIVI": [paired.mean, paired.low, paired.high],
            "agreement": found.agreement.mean,
            "difference": [found.difference.mean, found.difference.low, found.difference.high],
            "kl by position": [
                float(part.mean()) for part in np.array_split(by_position, BINS, axis=1)
            ],
        }

    def table(self, wanted: Sequence[Case]) -> Iterator[dict[str, Any]]:
        return map(self.row, wanted)


def memory(lengths: Sequence[int] = LENGTHS) -> dict[str, list[float]]:
    """Bytes of one sequence's cache as a share of float16's, by length: codes, steps and
    what waits.
    """

    def share(bits: int, length: int) -> float:
        return Kivi(bits, bits, GROUP).nbytes(LLAMA_70B, length) / kv_bytes(LLAMA_70B, length)

    return {f"{bits} bits": [share(bits, length) for length in lengths] for bits in (4, 2)}


# --- the figure ----------------------------------------------------------------------


COLOURS = {"KIVI": TECHNIQUE, "keys by token": NEAREST, "values by channel": MORE[0]}


@styled
def draw(values: Values) -> Figure:
    """A record of ``experiments.kv_quantization`` → KL by bits in both networks; by
    position and R; bytes by length.
    """
    fig = new_figure(6.2)
    panels = fig.subplots(2, 2)
    rows: Sequence[Any] = values["rows"]
    most = max(row["kl"][2] for row in rows)
    for panel, network, title in (
        (panels[0, 0], "as it is", "Keys as they are"),
        (panels[0, 1], "planted", f"Keys with channels {values['factor']:g}× as large"),
    ):
        _choices(
            panel, [row for row in rows if row["network"] == network and row["residual"] == 128]
        )
        panel.set(title=title, ylim=(1e-6, 2 * most))
    panels[0, 0].legend(fontsize=8)
    _by_position(panels[1, 0], rows, values["length"])
    _memory(panels[1, 1], values)
    return fig


def _choices(panel: Axes, rows: Sequence[Any]) -> None:
    for at, (name, colour) in enumerate(COLOURS.items()):
        mine = sorted((row for row in rows if row["choice"] == name), key=lambda row: row["bits"])
        means = [row["kl"][0] for row in mine]
        spread = [
            [mean - row["kl"][1] for mean, row in zip(means, mine, strict=True)],
            [row["kl"][2] - mean for mean, row in zip(means, mine, strict=True)],
        ]
        # side by side: equal ones would hide each other
        places = [row["bits"] + 0.12 * (at - 1) for row in mine]
        panel.errorbar(
            places, means, yerr=spread, color=colour, marker="o", ms=4, lw=1.4, label=name
        )
    panel.set(
        xlabel="bits a code (points side by side)", ylabel="KL (nats per token, log)", yscale="log"
    )
    panel.set_xticks([2, 3, 4, 8])


def _by_position(panel: Axes, rows: Sequence[Any], length: int) -> None:
    mine = sorted(
        (
            row
            for row in rows
            if (row["network"], row["choice"], row["bits"]) == ("as it is", "KIVI", 2)
        ),
        key=lambda row: row["residual"],
    )
    for row, colour in zip(mine, (MORE[3], NEAREST, TECHNIQUE, MORE[0], MORE[1]), strict=False):
        parts = row["kl by position"]
        places = [length * (i + 0.5) / len(parts) for i in range(len(parts))]
        panel.plot(
            places, parts, color=colour, marker="o", ms=3, lw=1.4, label=f"{row['residual']}"
        )
    panel.set(
        title="2 bits: the newest tokens wait",
        xlabel="position in the text (tokens)",
        ylabel="KL (nats per token)",
        ylim=(0, None),
    )
    panel.legend(
        title="R, tokens that wait", fontsize=8, title_fontsize=8, ncols=2, loc="upper left"
    )
    panel.set_ylim(top=1.6 * panel.get_ylim()[1])  # room for the legend above the lines


def _memory(panel: Axes, values: Values) -> None:
    for (name, shares), colour in zip(values["memory"].items(), (MORE[0], TECHNIQUE), strict=False):
        panel.plot(
            values["lengths"],
            [100 * share for share in shares],
            color=colour,
            marker="o",
            ms=3,
            lw=1.4,
        )
        panel.annotate(
            f"{name}: {100 * shares[-1]:.0f} %",
            (values["lengths"][-1], 100 * shares[-1]),
            xytext=(0, 6),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=colour,
        )
    panel.axhline(100, color=FULL, lw=1.4, ls="--")
    panel.set(
        title="Bytes of a cache, R = 128",
        xlabel="tokens (log)",
        ylabel="share of float16's (%)",
        xscale="log",
        ylim=(0, 110),
    )
    panel.set_xticks([100, 1000, 10000], ["100", "1,000", "10,000"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every case and write the record."""
    parser = argparse.ArgumentParser(
        prog="python -m refllm.experiments.kv_quantization", description=main.__doc__
    )
    parser.add_argument("--model", default="stdlib", help="a bundled name or a checkpoint")
    parser.add_argument("--output", type=Path, default=Path("figures/data/kv_quantization.json"))
    parser.add_argument("--texts", type=int, default=TEXTS, help="held-out windows")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens in each")
    chosen = parser.parse_args(arguments)
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1, user_api="blas"):
        experiment = Experiment(load(chosen.model, backend="numpy"), chosen.texts, chosen.length)
        wanted = cases()
        rows = []
        for case, row in zip(wanted, experiment.table(wanted), strict=True):
            rows.append(row)
            print(
                f"[{len(rows)}/{len(wanted)}] {case.network}, {case.choice}, {case.bits} "
                f"bits, R = {case.residual}: "
                f"KL {row['kl'][0]:.5f}",
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
        "versions": {
            "refllm": refllm.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
    }
    hardware = (
        f"{processor()}, one thread, NumPy {np.__version__}, Python {platform.python_version()}"
    )
    write(
        chosen.output, Record("python -m refllm.experiments.kv_quantization", "A", hardware, values)
    )


if __name__ == "__main__":
    main()
