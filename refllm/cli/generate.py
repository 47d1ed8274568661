"""``refllm generate``: text from a prompt, as it comes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from refllm.cli.cache_options import (
    KvBitsOption,
    KvGroupOption,
    KvKeepOption,
    KvPolicyOption,
    KvResidualOption,
    kivi_of,
    sparse_of,
    told,
)
from refllm.cli.draft_options import Speculation, draft_named
from refllm.cli.main import keep_freed_memory
from refllm.cli.options import AnyModelOption, BackendOption, flag, opt
from refllm.terminal import emit, note, printable, progress

DEFAULT_TOKENS = 128


PromptArgument = Annotated[
    str | None,
    typer.Argument(metavar="PROMPT", help="Text to continue; - reads it from standard input."),
]
PromptFileOption = Annotated[Path | None, opt("Read the prompt from a file.", metavar="FILE")]
MaxTokensOption = Annotated[
    int | None,
    opt("New tokens at most.", "--max-tokens", "-n", min=0, show_default=str(DEFAULT_TOKENS)),
]
TemperatureOption = Annotated[
    float, opt("0 takes the most probable token.", "--temperature", "-t", metavar="X")
]
TopKOption = Annotated[int, opt("Keep the N most probable tokens; 0 is off.")]
TopPOption = Annotated[
    float, opt("Keep the fewest tokens of this joint probability; 1 is off.", metavar="X")
]
MinPOption = Annotated[
    float, opt("Keep tokens of this share of the largest probability.", metavar="X")
]
RepetitionPenaltyOption = Annotated[
    float, opt("Above 1, tokens that occurred become less likely.", metavar="X")
]
SeedOption = Annotated[
    int | None, opt("The same seed gives the same text.", min=0, show_default="a fresh one")
]
StopOption = Annotated[
    list[str] | None, opt("End before this text; may be repeated.", metavar="TEXT")
]
IgnoreEosOption = Annotated[bool, flag("Go on after an end token.", "--ignore-eos")]
DraftOption = Annotated[
    str | None,
    opt(
        "Speculate: a draft model, ngram, or both with a comma between them, asked in turn.",
        metavar="NAME|DIR|ngram[,…]",
        show_default="off",
    ),
]
GammaOption = Annotated[
    int | None, opt("Drafted tokens a step.", min=1, show_default="4; ngram: 8; tree: 3")
]
TreeOption = Annotated[
    bool, flag("Draft a tree: a chain as long as the draft is sure, then a fan.", "--tree")
]


def generate(
    prompt: PromptArgument = None,
    prompt_file: PromptFileOption = None,
    model: AnyModelOption = "stdlib",
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    repetition_penalty: RepetitionPenaltyOption = 1.0,
    seed: SeedOption = None,
    stop: StopOption = None,
    ignore_eos: IgnoreEosOption = False,
    draft: DraftOption = None,
    gamma: GammaOption = None,
    tree: TreeOption = False,
    kv_bits: KvBitsOption = None,
    kv_group: KvGroupOption = None,
    kv_residual: KvResidualOption = None,
    kv_keep: KvKeepOption = None,
    kv_policy: KvPolicyOption = None,
    backend: BackendOption = "numpy",
) -> None:
    """Continue a prompt, token by token.

    The new text goes to standard output and ends with a newline; on a terminal the prompt
    is shown before it, dimmed. Counts and times go to standard error.

    \b
    Examples:
      refllm generate 'def fibonacci(n):' --max-tokens 200
      refllm generate 'import os' -t 0.8 --top-p 0.95 --seed 1
      git show HEAD:setup.py | refllm generate - --stop 'def '
      refllm generate 'import os' --draft stdlib-draft --gamma 3
      refllm generate 'import os' --draft ngram,stdlib-draft --tree
      refllm generate --prompt-file long.py --kv-bits 4
      refllm generate --prompt-file long.py --kv-keep 256 --kv-policy h2o

    With --draft the text is the same at temperature 0 and has the same law at others; on a
    terminal drafted tokens are shown as they are judged, accepted ones in green, rejected
    ones struck through in red. With --kv-bits or --kv-keep it may be another one: all
    tokens of a step read the cache that the step found.
    """
    import numpy as np

    from refllm.api import load
    from refllm.decode.sampling_params import SamplingParams
    from refllm.measure.latency import Stopwatch

    text = read_prompt(prompt, prompt_file)
    sampling = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty)
    if gamma is not None and draft is None:
        raise ValueError("--gamma is the number of drafted tokens: say who drafts with --draft")
    if tree and draft is None:
        raise ValueError("--tree says how a model drafts: say which with --draft")
    sparse = sparse_of(kv_keep, kv_policy)
    if sparse is not None and kv_bits is not None:
        raise ValueError(
            "--kv-bits keeps all tokens in few bits, --kv-keep some of them in full: choose one"
        )
    if tree and (sparse is not None or kv_bits is not None):
        raise ValueError(
            "--tree verifies in a cache that keeps everything: draft without --tree, or leave --kv-… out"
        )
    keep_freed_memory()
    loaded = load(model, backend)
    cache = sparse or kivi_of(loaded.config, kv_bits, kv_group, kv_residual)
    if draft is None:
        speculation = None
    else:
        speculation = Speculation(draft_named(draft, gamma, tree, backend), loaded.tokenizer)
    length = len(loaded.tokenizer.encode(text, special=True))
    if max_tokens is None:
        max_tokens = min(DEFAULT_TOKENS, max(1, loaded.config.max_position_embeddings - length))
    if seed is None:
        seed = int(np.random.default_rng().integers(2**32))
    else:
        seed = seed
    if sys.stdout.isatty():
        if os.environ.get("TERM") == "dumb":
            emit(text)
        else:
            typer.secho(printable(text), dim=True, nl=False)
    watch = Stopwatch()
    drafted: Any = (
        {}
        if speculation is None
        else {"drafter": speculation.drafter, "on_step": speculation.judged}
    )
    pieces = loaded.stream(
        text,
        max_tokens,
        sampling=sampling,
        stop=stop or (),
        ignore_eos=ignore_eos,
        rng=seed,
        on_token=watch.tick,
        cache=cache,
        **drafted,
    )
    if sys.stdout.isatty():
        for piece in pieces if speculation is None else speculation.shown(pieces):
            emit(piece) if speculation is None else typer.echo(piece, nl=False)
        emit("\n")
    else:  # the text itself shows nobody that it is being written
        end = "\n"  # of nothing at all
        with progress("generating") as advance:
            for piece in pieces:
                emit(piece)
                end = piece[-1]
                advance(watch.tokens, max_tokens)
        if end != "\n":  # a file of text ends with a line
            emit("\n")
    if watch.tokens:
        drawn = f", seed {seed}" if temperature > 0 else ""
        if watch.tokens > 1:
            speed = f", then {watch.tokens_per_second:,.0f} tokens/s"
        else:
            speed = ""
        note(
            f"{length} + {watch.tokens} tokens, the first after {1e3 * watch.ttft:.0f} ms{speed}{drawn}"
        )
    if cache is not None and watch.tokens:
        note(told(cache, loaded.config, length, watch.tokens - 1))  # the last token was never read
    if speculation is not None:
        note(speculation.summary())


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from exactly one of its three sources; ValueError if there is none, two,
    or it is not text.
    """
    if (prompt is None) == (file is None):
        raise ValueError(
            "give one prompt: as an argument, as - for standard input, or with --prompt-file"
        )
    try:
        if file is not None:
            return file.read_text(encoding="utf-8")
        return sys.stdin.read() if prompt == "-" else str(prompt)
    except UnicodeDecodeError as error:
        where = file or "standard input"
        raise ValueError(f"{where} is not UTF-8 text (byte {error.start})") from error
