"""The tour's stops that make the model smaller: quantised weights, number formats, a quantised
KV cache.

Left out: what a technique is worth in general (``refllm.experiments``), explanations
(notebooks).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np

from refllm.backend import to_numpy
from refllm.corpus import held_out_documents
from refllm.formats.uniform import Scheme
from refllm.kv.kivi import Kivi
from refllm.kv.kivi_attend import KiviAttend
from refllm.measure.comparison import compare, precompute_reference
from refllm.measure.memory import kv_bytes
from refllm.model.config import ModelConfig
from refllm.quant.layer_inputs import calibration_windows
from refllm.quant.recipe import quantize_model
from refllm.terminal import format_bytes, table
from refllm.tour.context import Tour

EXCERPTS = (8, 256)  # number and tokens of the texts on which quantised weights are judged
CALIBRATION = (8, 512)  # number and tokens of the windows that GPTQ sees
CACHED = 1024  # tokens whose cache is quantised
SHOWN_VALUES = 4  # of a weight matrix, per format


def shrink(tour: Tour) -> None:
    """Four bits per weight, by rounding to nearest and by GPTQ: memory and loss."""
    model = tour.model
    scheme = _four_bit_scheme(model.config)
    text = list(calibration_windows(model.tokenizer, *EXCERPTS, 0, documents=held_out_documents()))
    calibration = calibration_windows(
        model.tokenizer, *CALIBRATION, 0, begin=model.config.bos_token_id
    )
    reference = precompute_reference(model, text)
    made = table("weights", "bits/weight", "size", "seconds", "bits/byte", "KL", "top-1")
    kls = {}
    for method, name in (("rtn", "round to nearest"), ("gptq", "GPTQ")):
        needed = calibration if method == "gptq" else None
        quantised, report = quantize_model(model, method, scheme, needed)
        found = compare(quantised, reference, text, rng=np.random.default_rng(0))
        kls[method] = found.kl.mean
        if method == "rtn":
            size = format_bytes(4 * report.weights)
            bits_per_byte = f"{found.reference.bits_per_byte:.4f}"
            made.add_row("original", "32.00", size, "", bits_per_byte, "0", "100%")
        made.add_row(
            name,
            f"{report.bits_per_weight:.2f}",
            format_bytes(report.nbytes),
            f"{report.seconds:.2f}",
            f"{found.model.bits_per_byte:.4f}",
            f"{found.kl.mean:.4f}",
            f"{found.agreement.mean:.1%}",
        )
    tour.out.print(made)
    tour.say()
    share = "row"
    if scheme.group_size:
        share = f"{scheme.group_size} weights"
    tour.say(
        f"All projections in 4 bits with a scale per {share}; embedding and norms "
        f"unchanged. Judged on {len(text)} excerpts of held-out text; GPTQ saw "
        f"{calibration.size:,} tokens of training text, none of these. KL and top-1 "
        "agreement compare with the original model."
    )
    if kls["gptq"] < kls["rtn"]:
        tour.say(
            "GPTQ adjusts the remaining weights to compensate for each rounding: "
            f"{kls['rtn'] / kls['gptq']:.1f} times less KL. The bits per byte of so short "
            "a text cannot tell the two apart."
        )
    tour.say(
        "NumPy does not multiply faster for it: on a CPU quantisation saves memory, on a "
        "GPU time too."
    )


def _four_bit_scheme(config: ModelConfig) -> Scheme:
    """Four bits, with the largest group of at most 128 weights that divides every row."""
    columns = math.gcd(
        config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim
    )
    group = next((g for g in (128, 64, 32, 16, 8) if columns % g == 0), None)
    if group is None:
        return Scheme(4, "half_integer", "channel")
    return Scheme(4, "half_integer", "group", group)


def formats(tour: Tour) -> None:
    """One weight matrix in every format: bits, error, and a few of its values."""
    # the block formats are not needed at the other stops
    from refllm.experiments import float_formats

    weight = to_numpy(tour.model.weights["layers"][0]["down_proj"].dequantize()).astype(np.float32)
    made = table(
        "format", "bits/weight", "error", f"{SHOWN_VALUES} of {weight.size:,} values × 1000"
    )
    made.add_row("float32", "32.00", "0", _thousandths(weight[0, :SHOWN_VALUES].tolist()))
    rows = float_formats.rows(weight)
    for name, bits, error, back in rows:
        values = to_numpy(back)[0, :SHOWN_VALUES].tolist()
        made.add_row(name, f"{bits:.3f}", f"{error:.2%}", _thousandths(values))
    tour.out.print(made)
    tour.say()
    tour.say(
        f"The down projection of the first layer, {weight.shape[0]} × {weight.shape[1]}. "
        "Bits include the scales; the error is that of the whole matrix, ‖Ŵ − W‖ / ‖W‖."
    )
    eight = {name: error for name, bits, error, _ in rows if 8 <= bits < 9}
    best = min(eight, key=lambda name: eight[name])
    worst = max(eight, key=lambda name: eight[name])
    tour.say(
        f"At about eight bits, {best} has the smallest error and {worst} the largest: "
        "every exponent bit costs a mantissa bit."
    )


def _thousandths(values: Sequence[float]) -> str:
    """Values times 1000, in columns.

    >>> _thousandths([0.012, -0.5])
    '   12  -500'
    """
    return " ".join(f"{1e3 * x:5.0f}" for x in values)


def cache(tour: Tour) -> None:
    """Keys and values in few bits, as KIVI stores them: memory and loss."""
    model = tour.model
    config = model.config
    length = min(CACHED, config.max_position_embeddings)
    group = math.gcd(32, config.head_dim)
    [text] = calibration_windows(model.tokenizer, 1, length, 0, documents=held_out_documents())
    reference = precompute_reference(model, [text], window=length, stride=length)
    made = table("KV cache", "bits/value", "size", "KL", "top-1 agreement")
    made.add_row("float16", "16.00", format_bytes(kv_bytes(config, length)), "0", "100%")
    for bits in (8, 4, 2):
        kivi = Kivi(bits, bits, group)
        found = compare(
            model,
            reference,
            [text],
            rng=np.random.default_rng(0),
            window=length,
            stride=length,
            attend=partial(KiviAttend, kivi=kivi, window=config.sliding_window),
        )
        made.add_row(
            f"KIVI, {bits} bits",
            f"{kivi.bits_per_value():.2f}",
            format_bytes(kivi.nbytes(config, length)),
            f"{found.kl.mean:.5f}",
            f"{found.agreement.mean:.1%}",
        )
    tour.out.print(made)
    tour.say()
    tour.say(
        f"{length:,} tokens of held-out code, each attending as in token-by-token "
        f"decoding. {group} tokens of a key channel share a scale, and {group} channels of "
        f"a value token; the newest {kivi.residual} tokens stay in full precision, which "
        "is why a short text saves little. Scales and the full-precision window are "
        "counted with 16 bits."
    )
