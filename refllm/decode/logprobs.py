"""Log-probabilities of tokens: of an output as it is sampled, and of a prompt.

Source: vLLM's ``logprobs``, ``prompt_logprobs`` and ``logprobs_mode``
(vllm/sampling_params.py, vllm/v1/sample/sampler.py).

| mode                   | log-probabilities of                                               |
|------------------------|--------------------------------------------------------------------|
| ``raw_logprobs``       | softmax(z), z as the network gives it                              |
| ``processed_logprobs`` | the distribution that the token was drawn from: after the logits   |
|                        | processors, temperature and filters. At temperature 0 softmax(z)   |
|                        | after the processors alone, since the drawn distribution is 0 or 1 |

Of each position there is a dictionary: the token itself first, then the k most probable ones
(with ``k`` = -1 all). The token's entry is one of those k if it is among them, so there are k
or k + 1 entries. Equal probabilities are ranked by token id, lowest first, as
``decode.sampling`` ranks them; vLLM gives each of several equal tokens the rank of the last.

A prompt's first token follows nothing: its entry is None. Prompts have raw log-probabilities in
both modes, as in vLLM.

| symbol | name                                 | shape  |
|--------|--------------------------------------|--------|
| z      | logits                               | [R, V] |
| ℓ      | log-probabilities, float64           | [R, V] |
| k      | most probable tokens of each row     |        |

Left out: modes that return logits; the text of each token (``tokenizer.decode([id])``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from refllm.backend import Array, asarray_like, namespace, to_numpy, top_k
from refllm.decode.sampling import distribution, log_probabilities
from refllm.decode.sampling_params import SamplingParams

MODES = ("raw_logprobs", "processed_logprobs")

# Rows of logits of a prompt at a time: with a vocabulary of 10⁵ that is 200 MB in float64.
ROWS_AT_A_TIME = 256


@dataclass(frozen=True, slots=True)
class Logprob:
    """log p of a token, and its rank: 1 for the most probable token."""

    logprob: float
    rank: int


TokenLogprobs = dict[int, Logprob]
PromptLogprobs = list[TokenLogprobs | None]


def token_logprobs(
    log_p: Array, rows: Sequence[int], tokens: Sequence[int], k: int
) -> list[TokenLogprobs]:
    """ℓ[R, V] → for each (row, token) the entries of that token and of the row's k best.

    >>> log_p = np.log([[0.2, 0.5, 0.3]])
    >>> (entry,) = token_logprobs(log_p, rows=[0], tokens=[0], k=1)
    >>> {token: one.rank for token, one in entry.items()}
    {0: 3, 1: 1}
    """
    if not tokens:
        return []
    xp = namespace(log_p)
    vocabulary = int(log_p.shape[-1])
    k = vocabulary if k < 0 else min(k, vocabulary)
    at = asarray_like([list(rows), list(tokens)], log_p, "int64")  # [2, tokens]
    row = log_p[at[0]]  # [tokens, V]
    chosen = xp.take_along_axis(row, at[1][:, None], axis=-1)  # [tokens, 1]
    earlier = xp.arange(vocabulary) < at[1][:, None]
    above = (row > chosen) | ((row == chosen) & earlier)
    rank = 1 + xp.sum(xp.astype(above, xp.int64), axis=-1, keepdims=True)
    columns = [chosen, xp.astype(rank, xp.float64)]  # ranks and ids are exact as floats
    if k:
        values, ids = top_k(row, k)  # [tokens, k]
        columns += [values, xp.astype(ids, xp.float64)]
    host = to_numpy(xp.concat(columns, axis=-1)).tolist()  # one transfer
    found = []
    for token, (logprob, token_rank, *best) in zip(tokens, host, strict=True):
        entry = {int(token): Logprob(logprob, int(token_rank))}
        for place, (value, other) in enumerate(zip(best[:k], best[k:], strict=True), 1):
            entry.setdefault(int(other), Logprob(value, place))
        found.append(entry)
    return found


def processed_log_probabilities(
    z: Array, sampling: SamplingParams | Sequence[SamplingParams]
) -> Array:
    """z[R, V] after the logits processors → ℓ[R, V] of the distribution that is drawn from;
    for a row of temperature 0 of softmax(z).
    """
    xp = namespace(z)
    greedy = log_probabilities(z)
    each = [sampling] * z.shape[0] if isinstance(sampling, SamplingParams) else list(sampling)
    if all(one.temperature == 0 for one in each):
        return greedy
    p = distribution(z, sampling)
    drawn = xp.where(p > 0, xp.log(xp.where(p > 0, p, 1.0)), -xp.inf)
    is_greedy = asarray_like([[one.temperature == 0] for one in each], z, "bool")  # [R, 1]
    return xp.where(is_greedy, greedy, drawn)


def prompt_logprobs(
    logits: Callable[[Array], Array], hidden: Array, targets: Sequence[int], k: int
) -> list[TokenLogprobs]:
    """hidden[T, N] of consecutive tokens of a prompt, and the token that follows each →
    the entries of those tokens. ``logits`` computes z[rows, V] of hidden[rows, N].
    """
    found: list[TokenLogprobs] = []
    for start in range(0, len(targets), ROWS_AT_A_TIME):
        stop = min(start + ROWS_AT_A_TIME, len(targets))
        log_p = log_probabilities(logits(hidden[start:stop]))  # [rows, V]
        found += token_logprobs(log_p, range(stop - start), targets[start:stop], k)
    return found


@dataclass
class LogprobsRecorder:
    """Collects the log-probabilities of a static batch of ``sequences`` while it is generated.

    ``logprobs`` and ``prompt_logprobs`` are numbers of tokens, or None; ``outputs[b]`` and
    ``prompts[b]`` have an entry per token; those of prompt tokens before ``prompt_start`` are
    None, as that of the first token always is.
    """

    logprobs: int | None = None
    prompt_logprobs: int | None = None
    mode: str = "raw_logprobs"
    sequences: int = 1
    prompt_start: int = 0
    outputs: list[list[TokenLogprobs]] = field(init=False)
    prompts: list[PromptLogprobs] = field(init=False)

    def __post_init__(self) -> None:
        self.outputs = [[] for _ in range(self.sequences)]
        self.prompts = [[None] * max(1, self.prompt_start) for _ in range(self.sequences)]

    def add_prompt(
        self,
        logits: Callable[[Array], Array],
        b: int,
        hidden: Array,
        prompt: Sequence[int],
        start: int,
    ) -> None:
        """Record tokens of prompt ``b`` after position ``start``, from the hidden states
        [T, N] of positions [start, start + T).
        """
        if self.prompt_logprobs is None:
            return
        del self.prompts[b][max(1, len(prompt)) :]  # ``prompt_start`` may lie behind the prompt
        skipped = min(max(0, self.prompt_start - 1 - start), int(hidden.shape[0]))
        hidden = hidden[skipped:]
        first = start + skipped + 1
        targets = prompt[first : first + int(hidden.shape[0])]
        self.prompts[b] += prompt_logprobs(logits, hidden, targets, self.prompt_logprobs)

    def add(
        self,
        sequences: Sequence[int],
        rows: Sequence[int],
        tokens: Sequence[int],
        raw: Array,
        processed: Array,
        sampling: SamplingParams,
    ) -> None:
        """Record ``tokens[i]`` of ``sequences[i]``, drawn from row ``rows[i]`` of z[R, V]:
        ``raw`` and ``processed``.
        """
        if self.logprobs is None:
            return
        if self.mode == "raw_logprobs":
            log_p = log_probabilities(raw)
        else:
            log_p = processed_log_probabilities(processed, sampling)
        entries = token_logprobs(log_p, rows, tokens, self.logprobs)
        for b, entry in zip(sequences, entries, strict=True):
            self.outputs[b].append(entry)
