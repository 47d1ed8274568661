"""``refllm generate``: continue a prompt, printed token by token."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from refllm.cli.cache_options import (
    KvBitsOption,
    KvGroupOption,
    KvKeepOption,
    KvPolicyOption,
    KvResidualOption,
    cache_summary,
    kivi_from_options,
    sparse_from_options,
)
from refllm.cli.draft_options import (
    DraftDisplay,
    DraftOption,
    GammaOption,
    TreeOption,
    drafter_from_options,
)
from refllm.cli.grammar_options import (
    ChoicesOption,
    GrammarOption,
    JsonSchemaOption,
    JumpForwardOption,
    RegexOption,
    check_one_grammar,
    grammar_from_options,
)
from refllm.cli.main import keep_freed_memory
from refllm.cli.options import (
    AnyModelOption,
    BackendOption,
    TokenizerOption,
    WeightsOption,
    flag,
    opt,
    unescape,
)
from refllm.cli.sampling_options import (
    MinPOption,
    RepetitionPenaltyOption,
    SeedOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    seed_or_random,
)
from refllm.cli.threads import ThreadsOption, use_threads
from refllm.errors import InputError
from refllm.terminal import emit, note, printable, progress

if TYPE_CHECKING:
    from refllm.api import Model

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
StopOption = Annotated[
    list[str] | None,
    opt(
        r"Stop before this text (\n, \t and \\ are read as in Python); may be repeated.",
        metavar="TEXT",
    ),
]
IgnoreEosOption = Annotated[bool, flag("Continue after an end token.", "--ignore-eos")]
ChatOption = Annotated[
    bool,
    flag("The prompt is a user's message to a chat model, which answers it.", "--chat"),
]


def generate(
    prompt: PromptArgument = None,
    prompt_file: PromptFileOption = None,
    chat: ChatOption = False,
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
    regex: RegexOption = None,
    json_schema: JsonSchemaOption = None,
    choices: ChoicesOption = None,
    grammar: GrammarOption = None,
    jump_forward: JumpForwardOption = False,
    draft: DraftOption = None,
    gamma: GammaOption = None,
    tree: TreeOption = False,
    kv_bits: KvBitsOption = None,
    kv_group: KvGroupOption = None,
    kv_residual: KvResidualOption = None,
    kv_keep: KvKeepOption = None,
    kv_policy: KvPolicyOption = None,
    weights: WeightsOption = "auto",
    tokenizer: TokenizerOption = None,
    threads: ThreadsOption = None,
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
      refllm generate --chat 'What is the capital of France?' --model smollm2
      refllm generate --chat 'Is the sky blue?' --model smollm2 --choices yes,no
      refllm generate 'x = ' --grammar python_expression -t 0.8
      refllm generate 'Born in ' --regex '(19|20)[0-9]{2}'
      refllm generate --chat 'Describe a cat.' --model smollm2 --json-schema cat.json

    With --chat the model's chat template makes a prompt of the message; a control token in
    the message is text. With --regex, --json-schema, --choices or --grammar only tokens that
    keep the output legal are sampled; a --max-tokens that is too small cuts it off. With
    --draft, greedy output is unchanged; at other temperatures the output distribution is
    unchanged. On a terminal accepted drafts are shown in green, rejected ones struck through
    in red. With --kv-bits or --kv-keep the text may change with --draft: all tokens of a step
    read the cache as it was before the step.
    """
    from refllm.api import load
    from refllm.decode.sampling_params import SamplingParams
    from refllm.measure.latency import Stopwatch

    text = read_prompt(prompt, prompt_file)
    check_one_grammar(regex, json_schema, choices, grammar, jump_forward)
    sampling = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty)
    if kv_keep is not None and kv_bits is not None:
        raise InputError(
            "--kv-bits keeps all tokens in few bits, --kv-keep some of them in full: choose one"
        )
    sparse = sparse_from_options(kv_keep, kv_policy)
    if tree and (sparse is not None or kv_bits is not None):
        raise InputError(
            "--tree needs a cache that keeps everything: leave out --tree, or the --kv-… options"
        )
    keep_freed_memory()
    computing = use_threads(threads)
    drafter = drafter_from_options(draft, gamma, tree, backend)
    loaded = load(model, backend, weights=weights, tokenizer=tokenizer)
    cache = sparse or kivi_from_options(loaded.config, kv_bits, kv_group, kv_residual)
    compiled = grammar_from_options(regex, json_schema, choices, grammar, loaded.tokenizer)
    display = None if drafter is None else DraftDisplay(loaded.tokenizer)
    ids = prompt_ids(loaded, text, chat)
    length = len(ids)
    if max_tokens is None:
        max_tokens = min(DEFAULT_TOKENS, max(1, loaded.config.max_position_embeddings - length))
    seed = seed_or_random(seed)
    watch = Stopwatch()
    pieces = loaded.stream(
        ids,
        max_tokens,
        sampling=sampling,
        stop=[unescape(text) for text in stop or ()],
        ignore_eos=ignore_eos,
        rng=seed,
        on_token=watch.tick,
        drafter=drafter,
        on_step=None if display is None else display.record,
        cache=cache,
        grammar=compiled,
        jump_forward=jump_forward,
    )
    written: list[str] = []
    pieces = _copied(pieces, written)
    if sys.stdout.isatty():
        _print_to_terminal(text, pieces, display)
    else:
        with progress("generating") as advance:
            _print_to_pipe(pieces, lambda: advance(watch.tokens, max_tokens))
    if watch.tokens:
        facts = [f"{length} + {watch.tokens} tokens", f"the first after {1e3 * watch.ttft:.0f} ms"]
        if watch.tokens > 1:
            facts.append(f"then {watch.tokens_per_second:,.0f} tokens/s")
        facts.append(computing)
        if temperature > 0:
            facts.append(f"seed {seed}")
        note(", ".join(facts))
    if (
        compiled is not None
        and watch.tokens == max_tokens
        and not compiled.matches("".join(written))
    ):
        note(f"cut off by --max-tokens {max_tokens}: the text is not yet one of the grammar")
    if cache is not None and watch.tokens:
        # the last token was never read, so its keys and values were not computed
        note(cache_summary(cache, loaded.config, length, watch.tokens - 1))
    if display is not None:
        note(display.summary())


def _copied(pieces: Iterator[str], written: list[str]) -> Iterator[str]:
    """The pieces, each added to ``written`` as well."""
    for piece in pieces:
        written.append(piece)
        yield piece


def _print_to_terminal(prompt: str, pieces: Iterator[str], display: DraftDisplay | None) -> None:
    """The prompt, dimmed, then the new text; drafted tokens in colour."""
    if os.environ.get("TERM") == "dumb":
        emit(prompt)
    else:
        typer.secho(printable(prompt), dim=True, nl=False)
    if display is None:
        for piece in pieces:
            emit(piece)
    else:
        for piece in display.coloured(pieces):
            typer.echo(piece, nl=False)
    emit("\n")


def _print_to_pipe(pieces: Iterator[str], advance: Callable[[], None]) -> None:
    """The new text alone; a newline is added unless the text ends with one, or is empty."""
    last = "\n"
    for piece in pieces:
        emit(piece)
        last = piece[-1]
        advance()
    if last != "\n":
        emit("\n")


def prompt_ids(model: Model, text: str, chat: bool) -> list[int]:
    """The token ids of the prompt; with ``chat``, of a conversation that begins with it."""
    if not chat:
        return model.tokenizer.encode(text, special=True)
    message = {"role": "user", "content": text}
    return model.chat_tokenizer.encode([message], add_generation_prompt=True)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from exactly one of its three sources; ValueError if there is none, two,
    or it is not text.
    """
    if (prompt is None) == (file is None):
        raise InputError(
            "give one prompt: as an argument, as - for standard input, or with --prompt-file"
        )
    try:
        if file is not None:
            return file.read_text(encoding="utf-8")
        return sys.stdin.read() if prompt == "-" else str(prompt)
    except UnicodeDecodeError as error:
        source = file or "standard input"
        raise InputError(f"{source} is not UTF-8 text (byte {error.start})") from error
