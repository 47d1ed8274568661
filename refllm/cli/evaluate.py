"""``refllm eval``: how well a model predicts text, and how far it is from a reference
model.
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refllm.cli.cache_options import KvBitsOption, KvGroupOption, KvResidualOption, kivi_of
from refllm.cli.main import keep_freed_memory
from refllm.cli.options import AnyModelOption, BackendOption, JsonOption, opt
from refllm.terminal import console, note, progress, table

if TYPE_CHECKING:
    from refllm.measure.perplexity import Comparison
    from refllm.measure.windows import Score


TextOption = Annotated[
    list[Path] | None,
    opt(
        "Text files or folders; may be repeated.",
        metavar="PATH",
        show_default="the held-out modules",
    ),
]
ReferenceOption = Annotated[
    str | None, opt("Also KL and top-1 agreement with this model.", metavar="NAME|DIR")
]
WindowOption = Annotated[
    int | None,
    opt("Tokens that the model sees at once.", min=1, show_default="1024, or the model's context"),
]
StrideOption = Annotated[
    int | None, opt("How far the window moves.", min=1, show_default="half a window")
]
MaxTokensOption = Annotated[int | None, opt("Score the first so many tokens only.", min=1)]
SeedOption = Annotated[int, opt("Of the resampling behind the intervals.", min=0)]


def evaluate(
    model: AnyModelOption = "stdlib",
    text: TextOption = None,
    reference: ReferenceOption = None,
    window: WindowOption = None,
    stride: StrideOption = None,
    max_tokens: MaxTokensOption = None,
    kv_bits: KvBitsOption = None,
    kv_group: KvGroupOption = None,
    kv_residual: KvResidualOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    backend: BackendOption = "numpy",
) -> None:
    """Measure how well a model predicts text.

    In bits per byte and perplexity, on text that it was not trained on.

    The default text is the modules of the running Python's standard library that the
    bundled models were not trained on; the Python version is part of the result. Bits per
    byte compare models of any vocabulary, perplexity does not.

    \b
    Examples:
      refllm eval
      refllm eval --text README.md --text src/ --window 512
      refllm eval --model stdlib-draft --reference stdlib --max-tokens 20000
      refllm eval --kv-bits 2 --reference stdlib --max-tokens 8000

    With --kv-bits the model reads each window as it would token by token, with all but the
    newest keys and values in few bits; the reference reads its own in full.
    """
    import numpy as np

    from refllm.api import load
    from refllm.corpus import held_out_documents
    from refllm.kv.kivi import KiviAttend
    from refllm.measure.perplexity import compare
    from refllm.measure.perplexity import evaluate as score_of
    from refllm.train.data import read_files

    documents = read_files(text) if text else held_out_documents()
    keep_freed_memory()
    loaded = load(model, backend)
    kivi = kivi_of(loaded.config, kv_bits, kv_group, kv_residual)
    window = window or min(1024, loaded.config.max_position_embeddings)
    how: dict[str, Any] = {
        "window": window,
        "stride": stride or max(1, window // 2),
        "max_tokens": max_tokens,
    }
    if window > loaded.config.max_position_embeddings:
        note(
            f"the window of {window} is longer than the model's {loaded.config.max_position_embeddings} positions"
        )
    if kivi is not None:
        how["attend"] = partial(KiviAttend, kivi=kivi, window=loaded.config.sliding_window)
    with progress("scoring") as advance:
        if reference is None:
            score = score_of(loaded, documents, **how, progress=advance)
            against = None
        else:
            other = load(reference, backend)
            rng = np.random.default_rng(seed)
            against = compare(loaded, other, documents, rng=rng, **how, progress=advance)
            score = against.model
    longest = min(window, max(d.tokens for d in score.documents) + 1)
    if kivi is not None and longest <= kivi.residual:
        note(
            f"nothing was quantised: the newest {kivi.residual} tokens stay as they are, and the longest text read at "
            f"once has {longest}"
        )
    if as_json:
        facts = finite(as_data(model, score, reference, against))
        if kivi is not None:
            facts["kv cache"] = vars(kivi)
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        what = "the held-out modules" if not text else "the given text"
        if max_tokens is not None and score.tokens == max_tokens:
            what = f"the first {max_tokens:,} tokens of {what}"
        if kivi is None:
            cache = ""
        else:
            cache = f"keys and values in {kivi.key_bits} bits, {kivi.group} a step, the newest {kivi.residual} in full"
        _show(model, score, what, reference, against, cache)


def as_data(
    model: str, score: Score, reference: str | None, against: Comparison | None
) -> dict[str, Any]:
    """The result as plain data, with the same names as the model cards."""
    facts: dict[str, Any] = {
        "model": model,
        "python": score.python,
        "window": score.window,
        "stride": score.stride,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "seconds": score.seconds,
        "nats per token": score.nats_per_token,
        "perplexity": score.perplexity,
        "bits per byte": score.bits_per_byte,
        "documents": [
            {"name": d.name, "tokens": d.tokens, "bytes": d.bytes, "bits per byte": d.bits_per_byte}
            for d in score.documents
            if d.tokens
        ],
    }
    if against is not None:
        facts["against"] = {
            "reference": reference,
            "interval": against.method,
            "reference bits per byte": against.reference.bits_per_byte,
        } | {
            name: {"mean": i.mean, "low": i.low, "high": i.high}
            for name, i in (
                ("KL", against.kl),
                ("top-1 agreement", against.agreement),
                ("difference in nats", against.difference),
            )
        }
    return facts


def finite(value: Any) -> Any:
    """``value`` with None for each number that is not finite: JSON has no spelling for it."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _show(
    model: str,
    score: Score,
    what: str,
    reference: str | None,
    against: Comparison | None,
    cache: str,
) -> None:
    out = console()
    made = table("document", "tokens", "bytes", "bits/byte", "perplexity")
    rows = [d for d in score.documents if d.tokens]
    for d in rows:
        made.add_row(
            d.name,
            f"{d.tokens:,}",
            f"{d.bytes:,}",
            f"{d.bits_per_byte:.3f}",
            f"{_perplexity(d):.2f}",
        )
    if len(rows) > 1:
        made.add_section()
        whole = (
            f"{score.tokens:,}",
            f"{score.bytes:,}",
            f"{score.bits_per_byte:.3f}",
            f"{score.perplexity:.2f}",
        )
        made.add_row("all", *whole, style="bold")
    out.print(f"{model} on {what}, Python {score.python}", style="bold")
    out.print(made)
    out.print(f"windows of {score.window:,} tokens every {score.stride:,}; {score.seconds:.1f} s")
    if cache:
        out.print(cache)
    if against is not None:
        near = table("against " + str(reference), "mean", "low", "high")
        for name, interval, digits in (
            ("KL, nats per token", against.kl, 5),
            ("same first choice", against.agreement, 4),
            ("loss − reference's, nats", against.difference, 5),
        ):
            near.add_row(
                name, *(f"{x:.{digits}f}" for x in (interval.mean, interval.low, interval.high))
            )
        out.print()
        out.print(near)
        out.print(f"intervals: {against.method}")


def _perplexity(d: Any) -> float:
    nats: float = d.nats / d.tokens
    return math.exp(nats) if nats < 700 else math.inf
