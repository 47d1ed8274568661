"""Penalties on tokens that have occurred: the first of the logits processors.

Sources: the repetition penalty, Keskar et al. 2019 (CTRL), §4.1; presence and frequency
penalties, OpenAI's interface, as vLLM has them.

They change logits, before temperature and the filters of ``decode.sampling``.

Left out: penalties for n-grams (``no_repeat_ngram_size``), bad words, logit bias.
"""

from __future__ import annotations

from refllm.backend import Array, namespace
from refllm.decode.sampling_params import Parameter, column


def apply_repetition_penalty(logits: Array, seen: Array, penalty: Parameter) -> Array:
    """Make tokens that were seen less likely (``penalty`` above 1); logits[..., V], in
    their own dtype.

    ``seen`` is a boolean mask of the logits' shape: prompt and output, as transformers and
    vLLM count. A seen token pays once, however often it occurred. The paper divides every
    seen logit by θ, which *raises* a negative one; as its successors do, negative logits
    are multiplied instead. This is not invariant to a shift of the logits: where zero
    lies is an accident of training.

    ValueError if a penalty is not finite and above 0.

    >>> import numpy as np
    >>> seen = np.array([True, True, False])
    >>> apply_repetition_penalty(np.array([2.0, -2.0, 2.0]), seen, 2.0).tolist()
    [1.0, -4.0, 2.0]
    """
    xp = namespace(logits, seen)
    theta = column("repetition_penalty", penalty, logits)
    return xp.where(seen, xp.where(logits > 0, logits / theta, logits * theta), logits)


def apply_count_penalties(
    logits: Array, counts: Array, presence: Parameter = 0.0, frequency: Parameter = 0.0
) -> Array:
    """z - frequency · count - presence · [count > 0], the two penalties of OpenAI's
    interface; [..., V].

    ``counts`` holds how often each token occurred in the *output* (the prompt does not
    count), integers of the logits' shape. Unlike the repetition penalty these do not depend
    on where zero is.

    ValueError if a penalty is not finite.
    """
    xp = namespace(logits, counts)
    alpha = column("presence", presence, logits)
    beta = column("frequency", frequency, logits)
    occurred = xp.astype(counts > 0, logits.dtype)
    return logits - beta * xp.astype(counts, logits.dtype) - alpha * occurred
