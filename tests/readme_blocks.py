"""The blocks of README.md that have numbers, one function each, from the committed records.

A sentence that claims more than its numbers say (better, never, behind) has its claim checked
here, by ``claim``.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 120


def values(name: str) -> dict[str, Any]:
    """The values of a figure's record."""
    text = (ROOT / "figures" / "data" / f"{name}.json").read_text(encoding="utf-8")
    return json.loads(text)["values"]


def benchmark(name: str) -> dict[str, Any]:
    """The record of a benchmark."""
    text = (ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8")
    return json.loads(text)


def card(name: str) -> dict[str, Any]:
    """The model card of a bundled model."""
    text = (ROOT / "refllm" / "models" / name / "card.json").read_text(encoding="utf-8")
    return json.loads(text)


def claim(holds: bool, what: str) -> None:
    """ValueError unless a claim of the page is what the records say."""
    if not holds:
        raise ValueError(f"README.md claims what the records do not say: {what}")


def paragraphs(*texts: str) -> str:
    """Wrapped paragraphs, with an empty line between two."""
    wrapped = [
        textwrap.fill(" ".join(t.split()), WIDTH, break_long_words=False, break_on_hyphens=False)
        for t in texts
    ]
    return "\n\n".join(wrapped)


def table(head: list[str], rule: str, rows: list[list[str]]) -> str:
    """A Markdown table; ``rule`` is the line below its head."""
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    return "\n".join([lines[0].replace("|  |", "| |"), rule, *lines[1:]])


def models() -> str:
    """The bundled models, by their cards."""
    large, small = card("stdlib"), card("stdlib-draft")
    counts = []
    training = large["training"]
    while training:
        counts.append(f"{training['tokens'] / 1e6:.1f} M")
        training = training.get("start", {}).get("training") if training.get("start") else None
    *first, last = reversed(counts)
    workers = large["training"]["plan"]["workers"]
    claim(small["training"]["teacher"] == "stdlib", "the draft model is distilled from stdlib")
    trained = (
        f"{', '.join(first)} and {last} tokens of what CPython carries, on {workers} CPU cores"
    )
    distilled = f"{small['training']['tokens'] / 1e6:.1f} M tokens, distilled from `stdlib`"
    rows = []
    for name, record, source, use in (
        ("stdlib", large, trained, "perplexity, KL, caches, acceptance"),
        ("stdlib-draft", small, distilled, "drafting for `stdlib`"),
    ):
        link = f"[`{name}`](refllm/models/{name}/README.md)"
        bits = f"{record['measured']['bits per byte']:.3f}"
        rows.append([link, f"{record['parameters']:,}", bits, source, use])
    head = ["", "parameters", "bits per byte, held out", "trained on", "good for"]
    return table(head, "|---|---|---|---|---|", rows)


def quantisation() -> str:
    """KL and bits per byte by method and bits, in groups of 128; then the claims about them."""
    record = values("quantization")
    names = {"rtn": "round to nearest", "awq": "AWQ", "gptq": "GPTQ"}
    digits = {8: 5, 4: 4, 3: 3, 2: 3}
    cells = {
        (method, bits): [
            row
            for row in record["rows"]
            if (row["method"], row["bits"], row["group"]) == (method, bits, 128)
        ]
        for method in names
        for bits in digits
    }
    seeds = {row["seed"] for row in cells["gptq", 4]}
    claim(len(seeds) == 3, "three calibration seeds")
    rows = []
    for method, name in names.items():
        kl = [f"{mean(r['kl'][0] for r in cells[method, b]):.{n}f}" for b, n in digits.items()]
        bits_per_byte = mean(row["bits per byte"] for row in cells[method, 4])
        rows.append([name, *kl, f"{bits_per_byte:.3f}"])
    stored = {b: cells["rtn", b][0]["bits per weight"] for b in digits}
    head = ["", *(f"{stored[b]:.3f} bits" for b in digits), f"bits per byte at {stored[4]:.3f}"]
    full = record["full precision"]
    opening = paragraphs(
        f"""On `stdlib`, {full["tokens"]:,} held-out tokens, three calibration seeds; KL to full
        precision ({full["bits per byte"]:.3f} bits per byte on this text) in nats per token,
        groups of 128 weights:"""
    )
    return "\n\n".join([opening, table(head, "|---|---:|---:|---:|---:|---:|", rows)])


def quantisation_claims() -> str:
    """What the table of quantisation says, and what outliers cost."""
    rows = values("quantization")["rows"]
    ahead = [
        row["against rtn"][2] < 0
        for row in rows
        if row["method"] in ("gptq", "awq") and row["bits"] in (3, 4)
    ]
    claim(all(ahead), "GPTQ and AWQ beat round to nearest at 4 and 3 bits")
    at_four = {
        method: mean(
            row["bits per byte"]
            for row in rows
            if (row["method"], row["bits"], row["group"]) == (method, 4, 128)
        )
        for method in ("rtn", "awq")
    }
    claim(at_four["awq"] > at_four["rtn"], "in bits per byte AWQ is behind at 4 bits")
    smoothed = values("smoothquant")
    cost = {
        row["alpha"]: 100 * (row["bits per byte"] / row["full precision"] - 1)
        for row in smoothed["rows"]
        if (row["outliers"], row["level"], row["keep"]) == ("norms", "O1", [])
    }
    return paragraphs(
        f"""In KL, GPTQ and AWQ beat round to nearest at 4 and 3 bits with every size of group and
        every seed, in paired intervals that leave zero out. Bits per byte are too blunt to tell
        at 4 bits: there AWQ is behind. At 8 bits nothing needs help. Small networks have no
        outliers of their own: injected by an exact rescaling of {smoothed["factor"]:g}×, they
        cost W8A8 {cost[None]:.0f} % in bits per byte, and SmoothQuant brings that down to
        {cost[0.5]:.2f} % ([figure](figures/smoothquant.png), with the cases where it does not
        help). In NumPy quantisation saves memory, not time; notebook 02 shows where a GPU gains
        both."""
    )


def kivi_cost() -> str:
    """Bits, bytes and KL of KIVI's cache."""
    record = values("kv_quantization")
    rows = [row for row in record["rows"] if row["residual"] == 128]
    kl = {(row["network"], row["choice"], row["bits"]): row["kl"][0] for row in rows}
    bits = {row["bits a number"] for row in rows if (row["choice"], row["bits"]) == ("KIVI", 2)}
    share = dict(zip(record["lengths"], record["memory"]["2 bits"], strict=True))
    claim(len(record["pairs"]) == 2, "two pairs of channels")
    claim(
        abs(kl["planted", "KIVI", 2] / kl["as it is", "KIVI", 2] - 1) < 1e-3,
        "KIVI's keys cost what they cost before",
    )
    return paragraphs(
        f"""KIVI quantises keys per channel and values per token, and keeps the newest 128 tokens
        in full precision: {bits.pop():g} bits per value with 2-bit codes,
        {100 * share[4096]:.0f} % of float16's bytes at 4,096 tokens, {100 * share[128]:.0f} % at
        128. On `stdlib` that costs KL {kl["as it is", "KIVI", 2]:.3f} at 2 bits and
        {kl["as it is", "KIVI", 4]:.4f} at 4; with keys by token,
        {kl["as it is", "keys by token", 2]:.3f} at 2 bits. Its keys have no outlier channels:
        with two pairs of channels made {record["factor"]:g} times as large, by a rescaling that
        changes no output, keys by token cost {kl["planted", "keys by token", 2]:.2f}, and KIVI's
        what they cost before:"""
    )


def cache_cost() -> str:
    """The time of a quantised cache, and the KL of sparse ones."""
    steps = benchmark("kivi")["results"]
    (ratio,) = [r["ratio"]["median"] for r in steps if (r["context"], r["bits"]) == (1024, 2)]
    rows = {(r["task"], r["policy"], r["budget"]): r for r in values("kv_sparsity")["rows"]}
    near = {p: rows["as it comes", p, 256]["kl"][0] for p in ("newest only", "H2O", "at random")}
    policies = ("newest only", "H2O", "TOVA", "at random", "SnapKV")
    far = {p: rows["a far copy", p, 512]["kl"][0] for p in policies}
    return paragraphs(
        f"""It saves memory, not time: NumPy dequantises what it reads, and a step behind 1,024
        tokens takes {ratio:.1f} times as long in 2 bits ([data](benchmarks/results/kivi.json)).""",
        f"""A sparse cache drops tokens. This small network reads mostly its neighbourhood: on
        code as it comes, the newest 256 tokens cost KL {near["newest only"]:.3f}, H2O's choice
        {near["H2O"]:.3f}, and as many at random {near["at random"]:.3f}. With something far back
        that is asked for again, 512 tokens cost {far["newest only"]:.3f} if they are the newest,
        {far["H2O"]:.3f} by H2O, {far["TOVA"]:.3f} by TOVA, {far["at random"]:.3f} at random;
        SnapKV, which holds {rows["a far copy", "SnapKV", 512]["held"]:.0f} there,
        {far["SnapKV"]:.3f} ([figure](figures/kv_sparsity.png)). That ranks no policy for large
        models, which read farther.""",
    )


def serving() -> str:
    """The engine's rate beside other programs', and the share of its own work."""
    results = benchmark("serving")["results"]
    first, second = results["throughput"]
    theirs = [
        min(v["median"] for k, v in row["ratio"].items() if k.startswith("transformers"))
        for row in (first, second)
    ]
    share = 100 * max(x["median"] for x in results["control_plane_share"].values())
    claim(share < 10, "the share is below its aim")
    return paragraphs(
        f"""With {first["batch"]} and {second["batch"]} equal requests the engine writes
        {theirs[0]:.1f}× and {theirs[1]:.1f}× the tokens of `transformers` and
        {first["ratio"]["llama.cpp"]["median"]:.1f}× and
        {second["ratio"]["llama.cpp"]["median"]:.1f}× those of llama.cpp's slots in float32; all
        work outside the network takes {share:.1f} % of a step, and at most 10 % was the target
        ([data](benchmarks/results/serving.json))."""
    )


def padding() -> str:
    """The factors of the PagedAttention announcement's 24×."""
    rounds = values("unpadding")["factors"]["processor"]
    factors = {name: median(each) for name, each in rounds.items()}
    claim(0.85 < factors["kernel"] < 0.95, "gathering through tables costs a tenth")
    return paragraphs(
        f"""The 24× of the PagedAttention announcement compared with padded batches: on one budget
        of tokens, padding makes {factors["padding"]:.1f}× of the {factors["all three"]:.1f}×
        measured here, paging's larger batch {factors["batch"]:.1f}×, and gathering through tables
        costs a tenth ([figure](figures/unpadding.png),
        [occupancy counted](figures/paging.png), [batching](figures/batching.png))."""
    )


def speculation() -> str:
    """What drafts gain, by drafter, machine and batch."""
    here, there = benchmark("speculative"), benchmark("speculative_haswell")

    def best(record: dict[str, Any], task: str, drafter: str) -> float:
        cells = [r for r in record["results"] if (r["task"], r["drafter"]) == (task, drafter)]
        return max(row["speedup"]["median"] for row in cells)

    def best_hot(temperature: float) -> float:
        cells = [r for r in here["results"] if r["temperature"] == temperature]
        return max(r["speedup"]["median"] for r in cells if r["task"] == "code")

    alone, *batches = here["batches"]
    fixed, adaptive = (
        [1 / row[name]["median"] for row in batches] for name in ("fixed", "adaptive")
    )
    cold = best(here, "code", "n-gram, tree")
    claim("Haswell" in there["environment"]["blas"], "the second record is of Haswell's kernels")
    claim(best(there, "code", "model") < best(here, "code", "model"), "the draft gains less there")
    claim(max(best_hot(0.7), best_hot(1.0)) < cold, "less is gained at temperatures of 0.7 and 1")
    claim((alone["batch"], batches[0]["batch"], batches[-1]["batch"]) == (1, 2, 32), "batches")
    return paragraphs(
        f"""`refllm generate --draft stdlib-draft` (with `--tree`; or `--draft ngram`, or both with
        a comma) changes the number of steps, not the result: greedy output is unchanged; at other
        temperatures the output distribution is unchanged. On a processor with AVX-512, at batch
        1, the draft model writes held-out code {best(here, "code", "model"):.2f}× as fast as plain
        decoding in chains and {best(here, "code", "tree"):.2f}× in trees, n-grams alone
        {best(here, "code", "n-gram"):.2f}×, and {cold:.2f}× where n-grams are asked first, else a
        tree; n-grams write copied text {best(here, "copy", "n-gram"):.2f}× as fast. At
        temperatures of 0.7 and 1 less is gained or nothing. The 2 to 3× of the literature are for
        a device that waits for memory. In the engine, γ = 3 always takes {min(fixed):.1f} to
        {max(fixed):.1f} times as long as no drafts in batches of 2 to 32. Chosen by measured
        cost, drafts make one sequence {alone["adaptive"]["median"]:.2f}× as fast and are hardly
        made in batches of 2 to 32, which take {min(adaptive):.2f} to {max(adaptive):.2f} times as
        long ([figure](figures/speculative.png), [data](benchmarks/results/speculative.json)).
        Where a product of four rows has to copy the weight first, as OpenBLAS does without
        AVX-512, the draft gains less: {best(there, "code", "model"):.2f}× in chains,
        {best(there, "code", "tree"):.2f}× in trees, and copies
        {best(there, "copy", "n-gram"):.2f}× ([data](benchmarks/results/speculative_haswell.json),
        the same machine with the kernels for Haswell)."""
    )


def structured() -> str:
    """Real schemas: judged by three engines, and answered by the pretrained model."""
    record = benchmark("grammar")
    asked = record["settings"]["schemas"]
    judged = record["results"]["judged"]
    ours = judged["refllm"]
    claim(ours["invalid_accepted"] == 0, "no invalid instance is accepted")
    claim(ours["right"] == max(one["right"] for one in judged.values()), "most schemas are right")

    def share(name: str) -> str:
        one = judged[name]
        return (
            f"{one['right'] / asked:.1%} ({one['valid_rejected']} valid instances rejected, "
            f"{one['invalid_accepted']} invalid ones accepted)"
        )

    timed = {row["model"]: row["microseconds"]["refllm"] for row in record["results"]["timed"]}
    times = {key: one["median"] for key, one in timed["smollm2"].items()}
    rows = {row["way"]: row for row in values("structured_output")["rows"]}
    plain = rows["none"]
    masked = rows["compact"]
    jumping = rows["compact + jump"]
    complete = masked["schemas"] - masked["unfinished"]
    claim(masked["valid"] == complete, "every output that ended is valid")
    return paragraphs(
        f"""Of {asked:,} real JSON Schemas with {record["settings"]["instances"]:,} instances marked
        valid or invalid, {share("refllm")} are enforced exactly; llguidance has
        {share("llguidance")}, xgrammar {share("xgrammar")}. `not`, `oneOf` and `if` are exact, a
        schema without values is found when it is compiled, and what cannot be enforced is refused
        by keyword and JSON pointer. A schema compiles in {times["compile_p50"] / 1000:.0f} ms
        (median), a mask over 49,152 tokens takes {times["first_p50"]:.0f} µs (median;
        {times["first_p99"] / 1000:.1f} ms at the 99th percentile)
        ([data](benchmarks/results/grammar.json)).""",
        f"""The pretrained model answers {plain["valid"]} of {plain["schemas"]} real schemas with a
        valid value; with a grammar every answer that ends is valid, {masked["valid"]} of them, and
        {masked["unfinished"]} are cut off by the limit of tokens. Jumping over forced text saves
        {jumping["jumped"] / jumping["tokens"]:.0%} of the forward passes
        ([figure](figures/structured_output.png)).""",
    )


def speed() -> str:
    """Decoding beside transformers and llama.cpp on two machines, and where its time goes."""
    machines = {"": benchmark("decode"), "AVX2, ": benchmark("decode_avx2")}
    rows = []
    for machine, record in machines.items():
        for row in record["results"]:
            ratio, llama = row["ratio_to_peer"], row["ratio"]["llama.cpp"]
            rows.append(
                [
                    f"{machine}{row['batch']}",
                    f"{row['tokens_per_second']['refllm']['median']:,.0f}",
                    f"{ratio['median']:.1f}×",
                    f"{ratio['low']:.1f}–{ratio['high']:.1f}",
                    f"{row['target']:g}×",
                    f"{llama['median']:.1f}×",
                ]
            )
            claim(ratio["median"] < row["target"], "the targets are not reached")
    settings = machines[""]["settings"]
    opening = paragraphs(
        f"""Measured on two machines, one process and one thread per engine, in alternation, greedy,
        {settings["new"]} tokens after prompts of {settings["prompt"]}, the same weights in
        float32; medians of ratios within a round. `python benchmarks/decode.py` repeats it; the
        data name machine and versions ([AVX-512](benchmarks/results/decode.json),
        [AVX2](benchmarks/results/decode_avx2.json), measured before decode steps were
        captured)."""
    )
    head = ["batch", "refllm, tokens/s", "÷ `transformers`", "range of the rounds", "target"]
    body = table([*head, "÷ llama.cpp, F32"], "|---:|---:|---:|---|---:|---:|", rows)
    return "\n\n".join([opening, body, paragraphs(_products())])


def _products() -> str:
    """The share of products in a decode step."""
    steps = benchmark("step")["results"]
    share = {r["batch"]: 100 * r["parts_us"]["products"] / r["whole_us"] for r in steps}
    megabytes = 4 * card("stdlib")["parameters"] / 1e6
    return f"""The targets are not reached. At batch 1 the first machine (AVX-512) reads
        {megabytes:.0f} MB of weights per step: products take {share[1]:.0f} % of its time there,
        and {share[32]:.0f} % with 32 sequences ([data](benchmarks/results/step.json)). On the
        second (AVX2) OpenBLAS copies a weight before it multiplies four rows or more. Which
        layout a weight gets depends on the processor: blocks of 64 output columns with AVX-512,
        one block of all columns without, and matrix-vector products up to three rows."""


def real_speed() -> str:
    """The pretrained model beside transformers and llama.cpp, with one and two threads."""
    record = benchmark("real")
    peers = ("transformers", "llama.cpp, F32", "llama.cpp, Q4_1")
    rows = []
    for row in record["results"]:
        if row["what"] not in ("batch 1", "batch 8", "prefill"):
            continue
        ratios = [f"{row['ratio'][peer]['median']:.1f}×" for peer in peers]
        rows.append(
            [
                f"{row['threads']}",
                row["what"],
                f"{row['tokens_per_second']['refllm']['median']:,.0f}",
                *ratios,
            ]
        )
    nbytes = {name: about.get("bytes") for name, about in record["engines"].items()}
    stored, floats = (nbytes[f"{peer}, threads 1"] for peer in (peers[2], peers[1]))
    claim(5 * stored < floats, "Q4_1 is less than a fifth of float32's bytes")
    ours = {
        (row["threads"], row["what"]): row["tokens_per_second"]
        for row in record["results"]
        if row["what"] != "steps"
    }
    one, two = (ours[threads, "batch 1"]["refllm"]["median"] for threads in (1, 2))
    claim(two <= 1.05 * one, "a second thread gains nothing for one sequence")
    settings = record["settings"]
    opening = paragraphs(
        f"""SmolLM2-135M-Instruct in float32, decoded once from its file, greedy,
        {settings["new"]} tokens after prompts of {settings["prompt"]} and a prefill of
        {settings["prefill"]}, engines in turn; tokens/s count the prompt's time.
        `python benchmarks/real.py` repeats it
        ([data](benchmarks/results/real.json): machine, versions, both kernel families, steps of
        several tokens). llama.cpp also runs the file as it is, in Q4_1, which is less than a
        fifth of the bytes per token. For one sequence a second thread gains refllm nothing on
        this machine, and llama.cpp much."""
    )
    llama = ours[2, "batch 1"][peers[1]]["median"] / ours[1, "batch 1"][peers[1]]["median"]
    claim(llama > 1.3, "llama.cpp gains much from a second thread")
    head = ["threads", "what", "refllm, tokens/s", *(f"÷ {peer}" for peer in peers)]
    head[3] = "÷ `transformers`"
    return "\n\n".join([opening, table(head, "|---:|---|---:|---:|---:|---:|", rows)])


def training() -> str:
    """Training beside PyTorch."""
    (row,) = benchmark("training")["results"]
    return paragraphs(
        f"""Training ran at {row["ratio_to_torch"]["median"]:.1f}× the tokens/s of PyTorch eager
        on the same two cores of the first machine, and at
        {row["ratio_to_torch_memory_kept"]["median"]:.1f}× with freed memory kept, as
        `refllm train` does ([data](benchmarks/results/training.json)).
        [`benchmarks/`](benchmarks/README.md) has the rest: where a step's time goes, the layouts
        of `Dense`, quantising, and serving."""
    )


BLOCKS: dict[str, Callable[[], str]] = {
    "models": models,
    "quantisation": quantisation,
    "quantisation-claims": quantisation_claims,
    "kivi": kivi_cost,
    "caches": cache_cost,
    "serving": serving,
    "padding": padding,
    "speculation": speculation,
    "structured": structured,
    "speed": speed,
    "real-speed": real_speed,
    "training": training,
}
