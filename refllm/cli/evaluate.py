"""``refllm eval``: how well a model predicts text, and how far it is from a reference model."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from refllm.cli.cache_options import (
    KvBitsOption,
    KvGroupOption,
    KvResidualOption,
    kivi_from_options,
)
from refllm.cli.main import keep_freed_memory
from refllm.cli.options import (
    AnyModelOption,
    BackendOption,
    JsonOption,
    TokenizerOption,
    WeightsOption,
    opt,
)
from refllm.cli.threads import ThreadsOption, use_threads
from refllm.terminal import console, note, progress, table

if TYPE_CHECKING:
    from rich.console import Console

    from refllm.array_types import Json
    from refllm.kv.kivi import Kivi
    from refllm.measure.comparison import Comparison
    from refllm.measure.perplexity import DocumentScore, Score


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
MaxTokensOption = Annotated[int | None, opt("Score only the first N tokens.", min=1)]
SeedOption = Annotated[int, opt("Seed of the bootstrap intervals.", min=0)]


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
    weights: WeightsOption = "auto",
    tokenizer: TokenizerOption = None,
    as_json: JsonOption = False,
    threads: ThreadsOption = None,
    backend: BackendOption = "numpy",
) -> None:
    """Measure how well a model predicts text.

    In bits per byte and perplexity.

    The default text is the modules of the running Python's standard library that the
    bundled models were not trained on; the Python version is part of the result. Bits per
    byte compare models of any vocabulary, perplexity does not.

    \b
    Examples:
      refllm eval
      refllm eval --text README.md --text src/ --window 512
      refllm eval --model stdlib-draft --reference stdlib --max-tokens 20000
      refllm eval --kv-bits 2 --reference stdlib --max-tokens 8000

    With --kv-bits the model attends to each window as it would in token-by-token decoding,
    with all but the newest keys and values in few bits; the reference keeps its own in full.
    """
    import numpy as np

    from refllm.api import load
    from refllm.corpus import held_out_documents
    from refllm.kv.kivi_attend import KiviAttend
    from refllm.measure import comparison, perplexity
    from refllm.measure.windows import checked_windows
    from refllm.train.data import read_files

    documents = read_files(text) if text else held_out_documents()
    keep_freed_memory()
    computing = use_threads(threads)
    loaded = load(model, backend, weights=weights, tokenizer=tokenizer)
    kivi = kivi_from_options(loaded.config, kv_bits, kv_group, kv_residual)
    window, stride = checked_windows(loaded, window, stride)
    attend = None
    if kivi is not None:
        attend = partial(KiviAttend, kivi=kivi, window=loaded.config.sliding_window)
    settings: Json = {
        "window": window,
        "stride": stride,
        "max_tokens": max_tokens,
        "attend": attend,
    }
    with progress("scoring") as advance:
        if reference is None:
            against = None
            score = perplexity.evaluate(loaded, documents, **settings, progress=advance)
        else:
            other = load(reference, backend, weights=weights, tokenizer=tokenizer)
            rng = np.random.default_rng(seed)
            against = comparison.compare(
                loaded, other, documents, rng=rng, **settings, progress=advance
            )
            score = against.model
    note(f"{score.tokens:,} tokens in {score.seconds:.1f} s, {computing}")
    if kivi is not None:
        _note_unused_kivi(kivi, score)
    if as_json:
        facts = as_data(model, score, reference, against)
        if kivi is not None:
            facts["kv cache"] = vars(kivi)
        typer.echo(json.dumps(finite(facts), indent=2, ensure_ascii=False, allow_nan=False))
        return
    source = "the given text" if text else _name_modules(model, score)
    if score.tokens == max_tokens:
        source = f"the first {max_tokens:,} tokens of {source}"
    _show_score(console(), f"{model} on {source}, Python {score.python}", score, kivi)
    if against is not None:
        _show_comparison(console(), str(reference), against)


def _name_modules(model: str, score: Score) -> str:
    """The default text: held out only from a model whose manifest says so."""
    from refllm.checkpoints.sources import locate
    from refllm.measure.protocol import is_held_out

    if is_held_out(locate(model), [d.name for d in score.documents]):
        return "the held-out modules"
    return "modules of the standard library (no manifest says that they are held out)"


def _note_unused_kivi(kivi: Kivi, score: Score) -> None:
    """Tell the user where every window fits into the full-precision residual window."""
    longest = min(score.window, max(d.tokens for d in score.documents) + 1)
    if longest <= kivi.residual:
        note(
            f"nothing was quantised: the newest {kivi.residual} tokens stay in full "
            f"precision, and the longest window has {longest}"
        )


def as_data(model: str, score: Score, reference: str | None, against: Comparison | None) -> Json:
    """The result as plain data, with the same names as the model cards."""
    facts: Json = {
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
        intervals = {
            "KL": against.kl,
            "top-1 agreement": against.agreement,
            "difference in nats": against.difference,
        }
        facts["against"] = {
            "reference": reference,
            "interval": against.method,
            "reference bits per byte": against.reference.bits_per_byte,
            **{
                name: {"mean": x.mean, "low": x.low, "high": x.high}
                for name, x in intervals.items()
            },
        }
    return facts


def finite(value: object) -> object:
    """``value`` with None in place of numbers that are not finite, which JSON cannot hold.

    >>> finite({"KL": [0.5, float("inf")]})
    {'KL': [0.5, None]}
    """
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _show_score(out: Console, title: str, score: Score, kivi: Kivi | None) -> None:
    """A row per document, then the total."""
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
        made.add_row(
            "all",
            f"{score.tokens:,}",
            f"{score.bytes:,}",
            f"{score.bits_per_byte:.3f}",
            f"{score.perplexity:.2f}",
            style="bold",
        )
    out.print(title, style="bold")
    out.print(made)
    out.print(f"windows of {score.window:,} tokens every {score.stride:,}; {score.seconds:.1f} s")
    if kivi is not None:
        out.print(
            f"keys and values in {kivi.key_bits} bits, {kivi.group} per scale, the newest "
            f"{kivi.residual} in full"
        )


def _show_comparison(out: Console, reference: str, against: Comparison) -> None:
    """KL, top-1 agreement and difference in loss, each with its interval."""
    made = table(f"against {reference}", "mean", "low", "high")
    for name, interval, digits in (
        ("KL, nats per token", against.kl, 5),
        ("top-1 agreement", against.agreement, 4),
        ("loss − reference's, nats", against.difference, 5),
    ):
        values = (interval.mean, interval.low, interval.high)
        made.add_row(name, *(f"{x:.{digits}f}" for x in values))
    out.print()
    out.print(made)
    out.print(f"intervals: {against.method}")


def _perplexity(document: DocumentScore) -> float:
    """exp(nats per token); infinity where float64 overflows."""
    nats = document.nats / document.tokens
    return math.exp(nats) if nats < 700 else math.inf
