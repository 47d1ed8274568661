"""The tour's stops that show a technique at work on the model: fewer bits, other formats,
drafts, small caches.

Left out: what a technique is worth in general (``quality``, ``smoothing``, ``prefixes``);
explanations (notebooks).
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from refllm.backend import to_numpy
from refllm.corpus import held_out_documents
from refllm.formats.uniform import Scheme
from refllm.kv.kivi import Kivi, KiviAttend
from refllm.measure.comparison import compare, precompute_reference
from refllm.measure.memory import kv_bytes
from refllm.model.config import ModelConfig
from refllm.quant.calibration_data import calibration_windows
from refllm.quant.recipe import quantize_model
from refllm.terminal import format_bytes, table
from refllm.tour import serving_burst, speculation
from refllm.tour.context import Tour

if TYPE_CHECKING:
    pass

SHRUNK_TEXT = (8, 256)  # excerpts of so many tokens, to judge quantised weights by
CALIBRATION = (8, 512)  # windows of so many tokens that GPTQ looks at
CACHED = 1024  # tokens whose cache is quantised
# tokens that all prompts share, tokens of their own, prompts, new tokens each
BURST = (192, 16, 16, 24)
SCARCE = 0.2  # of the blocks that the burst needs side by side


def shrink(tour: Tour) -> None:
    """Four bits a weight, by rounding to nearest and by GPTQ: how many bytes it saves, and
    what it costs.
    """
    model = tour.model
    scheme = _four_bits(tour.model.config)
    text = list(
        calibration_windows(model.tokenizer, *SHRUNK_TEXT, 0, documents=held_out_documents())
    )
    calibration = calibration_windows(
        model.tokenizer, *CALIBRATION, 0, begin=model.config.bos_token_id
    )
    reference = precompute_reference(model, text)
    made = table(
        "weights",
        "bits a weight",
        "size",
        "quantised in",
        "bits per byte",
        "KL",
        "same first choice",
    )
    kls = []
    for method in ("rtn", "gptq"):
        quantised, report = quantize_model(
            model, method, scheme, calibration if method == "gptq" else None
        )
        found = compare(quantised, reference, text, rng=np.random.default_rng(0))
        kls.append(found.kl.mean)
        if method == "rtn":
            size = format_bytes(4 * report.weights)
            made.add_row(
                "as they were",
                "32.00",
                size,
                "",
                f"{found.reference.bits_per_byte:.4f}",
                "0",
                "100%",
            )
        made.add_row(
            {"rtn": "rounded to nearest", "gptq": "GPTQ"}[method],
            f"{report.bits_per_weight:.2f}",
            format_bytes(report.nbytes),
            f"{report.seconds:.2f} s",
            f"{found.model.bits_per_byte:.4f}",
            f"{found.kl.mean:.4f}",
            f"{found.agreement.mean:.1%}",
        )
    tour.out.print(made)
    tour.say()
    if scheme.group_size:
        share = f"{scheme.group_size} weights"
    else:
        share = "the weights of a row"
    tour.say(
        f"All projections, 4 bits and a scale for {share}; embedding and norms stay as they were. {len(text)} excerpts "
        f"of held-out text; GPTQ saw {calibration.size:,} tokens of training text, none of these."
    )
    if kls[1] < kls[0]:
        tour.say(
            f"GPTQ lets the weights to come make up for each rounding: {kls[0] / kls[1]:.1f} times less KL. Bits per "
            "byte of so short a text are too blunt to tell the two apart."
        )
    tour.say(
        "NumPy multiplies no faster for it: on a CPU quantisation saves memory, on a GPU also time."
    )


def cache(tour: Tour) -> None:
    """Keys and values in few bits, as KIVI keeps them: how many bytes a text takes, and
    what it costs.
    """
    model = tour.model
    config = tour.model.config
    length = min(CACHED, config.max_position_embeddings)
    group = math.gcd(32, config.head_dim)
    [text] = calibration_windows(model.tokenizer, 1, length, 0, documents=held_out_documents())
    reference = precompute_reference(model, [text], window=length, stride=length)
    made = table("keys and values", "bits a number", "cache", "KL", "same first choice")
    made.add_row("float16", "16.00", format_bytes(kv_bytes(config, length)), "0", "100%")
    for bits in (8, 4, 2):
        kivi = Kivi(bits, bits, group)
        memory = partial(KiviAttend, kivi=kivi, window=config.sliding_window)
        found = compare(
            model,
            reference,
            [text],
            rng=np.random.default_rng(0),
            window=length,
            stride=length,
            attend=memory,
        )
        made.add_row(
            f"KIVI, {bits} bits",
            f"{kivi.bits_per_number():.2f}",
            format_bytes(kivi.nbytes(config, length)),
            f"{found.kl.mean:.5f}",
            f"{found.agreement.mean:.1%}",
        )
    tour.out.print(made)
    tour.say()
    tour.say(
        f"{length:,} tokens of held-out code, read as they would be one by one. {group} tokens of a channel of the "
        f"keys share a step, {group} channels of a token of the values; the newest {kivi.residual} tokens stay as they "
        "came, and are why a short text saves little. Steps are counted with 16 bits, as is what waits."
    )


def speculate(tour: Tour) -> None:
    """A small model and a table of n-grams guess, the model checks: the same text in fewer
    steps.
    """
    speculation.visit(tour.model, "stdlib-draft", tour.backend, tour.say, tour.out)


def _four_bits(config: ModelConfig) -> Scheme:
    """Four bits, a scale for as many weights as divide every row, 128 at most."""
    columns = math.gcd(
        config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim
    )
    group = next((g for g in (128, 64, 32, 16, 8) if columns % g == 0), None)
    if group is None:
        return Scheme(4, "half_integer", "channel")
    return Scheme(4, "half_integer", "group", group)


def serve(tour: Tour) -> None:
    """A burst of prompts that begin alike, through the serving engine: with and without a
    prefix cache.
    """
    shared, own, count, new = BURST
    text = "".join(d.text for d in held_out_documents())
    tokens = tour.model.tokenizer.encode(text[: 8 * (shared + own * count)], special=True)
    texts = serving_burst.prompts(tokens, shared, own, count)
    kinds = {
        "no prefix cache": (False, 1.0),
        "radix tree": (True, 1.0),
        "radix tree, few blocks": (True, SCARCE),
    }
    made = table(
        "engine", "steps", "tokens computed", "found in cache", "preemptions", "blocks at most", "s"
    )
    runs = []
    for name, (cached, share) in kinds.items():
        run = serving_burst.serve(tour.model, texts, new, cached=cached, share=share)
        runs.append(run)
        made.add_row(
            name,
            f"{run.steps}",
            f"{run.computed:,}",
            f"{run.cached / run.prompt_tokens:.0%}",
            f"{run.preemptions}",
            f"{run.peak_blocks} of {run.blocks}",
            f"{run.seconds:.2f}",
        )
    tour.out.print(made)
    tour.say()
    same = sum(a == b == c for a, b, c in zip(*(run.outputs for run in runs), strict=True))
    tour.say(
        f"{count} prompts with the same first {shared} tokens and {own} of their own, {new} new tokens each, all at "
        f"once. A plan a step says who computes what in which blocks of {serving_burst.BLOCK} tokens. With a tree the first "
        "prompt goes ahead and the others find what it computed; with few blocks they wait, or give theirs up and "
        f"compute them again. {same} of {count} say the same three times; others part where two logits are as good as "
        "equal in float32."
    )


def formats(tour: Tour) -> None:
    """One weight matrix in every format: bits, error, and a few of its numbers as each has
    them.
    """
    # the block formats are not needed at the other stops
    from refllm.experiments import float_formats

    weight = to_numpy(tour.model.weights["layers"][0]["down_proj"].dequantize()).astype(np.float32)
    shown = weight[0, :8]
    made = table(
        "format", "bits a weight", "error", f"8 of its {weight.size:,} numbers, in thousandths"
    )
    made.add_row("float32", "32.00", "0", _thousandths(shown))
    rows = float_formats.rows(weight)
    for name, bits, error, back in rows:
        made.add_row(name, f"{bits:.3f}", f"{error:.2%}", _thousandths(back[0, :8]))
    tour.out.print(made)
    tour.say()
    tour.say(
        f"The down projection of the first layer, {weight.shape[0]} × {weight.shape[1]}. Bits are counted with scales; "
        "the error is that of the whole matrix, ‖Ŵ − W‖ / ‖W‖."
    )
    eight = {name: error for name, bits, error, _ in rows if 8 <= bits < 9}
    best = min(eight, key=lambda name: eight[name])
    worst = max(eight, key=lambda name: eight[name])
    tour.say(
        f"Of about eight bits, {best} is nearest and {worst} farthest: an exponent costs mantissa."
    )


def _thousandths(numbers: np.ndarray) -> str:
    return " ".join(f"{1e3 * x:5.0f}" for x in numbers.tolist())
