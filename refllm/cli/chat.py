"""``refllm chat``: a conversation in the terminal, or over a pipe."""

from __future__ import annotations

import os
import sys
from typing import Annotated

from refllm.cli.grammar_options import (
    ChoicesOption,
    GrammarOption,
    JsonSchemaOption,
    RegexOption,
    check_one_grammar,
    grammar_from_options,
)
from refllm.cli.main import keep_freed_memory
from refllm.cli.options import AnyModelOption, BackendOption, TokenizerOption, WeightsOption, opt
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
from refllm.terminal import note

ANSWER_TOKENS = 1024

SystemOption = Annotated[
    str | None, opt("The system message: instructions to the assistant.", metavar="TEXT")
]
AnswerTokensOption = Annotated[
    int, opt("Tokens of an answer at most.", "--max-tokens", "-n", min=1)
]


def chat(
    model: AnyModelOption = "smollm2",
    system: SystemOption = None,
    max_tokens: AnswerTokensOption = ANSWER_TOKENS,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    repetition_penalty: RepetitionPenaltyOption = 1.1,
    seed: SeedOption = None,
    regex: RegexOption = None,
    json_schema: JsonSchemaOption = None,
    choices: ChoicesOption = None,
    grammar: GrammarOption = None,
    weights: WeightsOption = "auto",
    tokenizer: TokenizerOption = None,
    threads: ThreadsOption = None,
    backend: BackendOption = "numpy",
) -> None:
    """Talk to a chat model.

    Each line is a message; one that ends in a backslash is continued on the next line. The
    answer goes to standard output as it is written, counts and times to standard error.
    Each turn computes only what is new in it. When the context is full, the oldest turns are
    left out. With --regex, --json-schema, --choices or --grammar every answer is one of the
    grammar. Without a repetition penalty small models repeat themselves at temperature 0.

    \b
    Examples:
      refllm chat
      refllm chat --system 'Answer in one sentence.' -t 0.7 --top-p 0.9
      refllm chat --model ./my-chat-model
      refllm chat --system 'Say how the message sounds.' --choices happy,sad,neutral
      printf 'What is the capital of France?\\nAnd of Germany?\\n' | refllm chat

    \b
    Commands:
      /help         list the commands
      /reset        forget the conversation
      /system TEXT  begin a conversation with this system message
      /quit         end, as Ctrl-D does
    Ctrl-C stops an answer.
    """
    from refllm.api import load
    from refllm.cli.chat_loop import ChatLoop
    from refllm.decode.sampling_params import SamplingParams

    sampling = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty)
    check_one_grammar(regex, json_schema, choices, grammar)
    keep_freed_memory()
    computing = use_threads(threads)
    interactive = sys.stdin.isatty()
    if interactive:
        note(f"loading {model} …")
    loaded = load(model, backend, weights=weights, tokenizer=tokenizer)
    seed = seed_or_random(seed)
    compiled = grammar_from_options(regex, json_schema, choices, grammar, loaded.tokenizer)
    conversation = loaded.conversation(system, rng=seed)
    loop = ChatLoop(conversation, sampling, max_tokens, interactive, compiled)
    if interactive:
        facts = (
            f"{os.path.basename(model)}: {loaded.config.num_parameters / 1e6:,.0f} M parameters, "
        )
        facts += f"context of {loaded.config.max_position_embeddings:,} tokens, {computing}"
        note(facts if temperature == 0 else f"{facts}, seed {seed}")
        note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends")
    loop.run()
