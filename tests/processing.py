"""The logits processors by their definitions, one token at a time: the naive twin of
``decode.logits_processors``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from inspect import signature

import numpy as np

from refllm.decode.sampling_params import SamplingParams


def processed(
    z: np.ndarray,
    sampling: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    min_tokens: int = 0,
    end_tokens: Collection[int] = (),
) -> np.ndarray:
    """z[V] of the token that follows ``output``, in vLLM's order of application."""
    new = [float(x) for x in z]
    text = [*prompt, *output]
    for word in sampling.bad_words:
        if [*output, word[-1]][-len(word) :] == list(word):
            new[word[-1]] = -np.inf
    for token in end_tokens:
        if len(output) < min_tokens:
            new[token] = -np.inf
    for token, bias in (sampling.logit_bias or {}).items():
        new[token] += bias
    row = np.array(new)
    for function in sampling.logits_processors:
        given = (list(prompt),) if len(signature(function).parameters) == 3 else ()
        row = function(*given, list(output), row)
    for token in range(len(row)):
        x = float(row[token])
        if token in text:
            x = x / sampling.repetition_penalty if x > 0 else x * sampling.repetition_penalty
        x -= sampling.frequency_penalty * output.count(token)
        x -= sampling.presence_penalty * (token in output)
        row[token] = x
    return row
