"""A model card whose every number is computed: the record of a trained model, and the page
made from it.

| part of the record | what it holds                                                              |
|--------------------|----------------------------------------------------------------------------|
| ``data``           | documents, bytes, tokens of each stream, and the number of passes          |
| ``training``       | the plan, steps, tokens, seconds, the command that reproduces it           |
| ``measured``       | bits per byte (per document, per context length), samples that tokenize,   |
|                    | and for a draft its distance from the model that it was distilled from     |

The acceptance of a draft q by its target p at temperature 1 is the mean over positions of
Σ min(p, q), the probability that speculative sampling accepts a drafted token (Leviathan et
al. 2023, theorem 3.5, β = 1 − D_LK).

Left out: benchmarks of facts or instructions, which models of this size cannot answer.
"""

from __future__ import annotations

import io
import tokenize
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from refllm.api import Model
from refllm.array_types import Json
from refllm.backend import Array, namespace, to_numpy
from refllm.corpus import Document
from refllm.decode.sampling_params import SamplingParams
from refllm.measure.comparison import compare
from refllm.measure.perplexity import Score, bits_by_position, evaluate
from refllm.measure.windows import plan_windows

Progress = Callable[[str, int, int], None]  # (label, done, total)
Record = Json
SAMPLES = 100
SAMPLE_TEMPERATURE = 0.8
SAMPLE_LENGTHS = (64, 128, 256)  # tokens; the shorter samples are prefixes of the longest


def measure(
    model: Model,
    held_out: Sequence[Document],
    *,
    code: Sequence[Document] = (),
    teacher: Model | None = None,
    seed: int = 0,
    progress: Progress = lambda label, done, total: None,
) -> Record:
    """The ``measured`` part of a card.

    ``code`` is the Python source that a model of code was trained on: its samples are
    compared with it.
    """
    window = min(1024, model.config.max_position_embeddings)

    def scored(stride: int, label: str) -> Score:
        return evaluate(
            model,
            held_out,
            window=window,
            stride=stride,
            progress=lambda done, total: progress(label, done, total),
        )

    score = scored(max(1, window // 2), "held-out text")
    record: Record = {
        "bits per byte": score.bits_per_byte,
        "perplexity": score.perplexity,
        "nats per token": score.nats_per_token,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "window": score.window,
        "stride": score.stride,
        "documents": [
            {"name": d.name, "tokens": d.tokens, "bytes": d.bytes, "bits per byte": d.bits_per_byte}
            for d in score.documents
            if d.tokens
        ],
    }
    by_length = bits_by_position(scored(window, "by length of the context"))
    record["by context"] = [
        {
            "from": b.low,
            "to": b.high,
            "tokens": b.tokens,
            "nats per token": b.nats_per_token,
            "bits per byte": b.bits_per_byte,
        }
        for b in by_length
    ]
    if code:
        progress("samples", 0, 1)
        record["samples"] = sample_record(model, code, np.random.default_rng(seed))
    if teacher is not None:
        record["against the teacher"] = _against(model, teacher, held_out, window, seed, progress)
    return record


def sample_record(model: Model, real: Sequence[Document], rng: np.random.Generator) -> Record:
    """The share of free samples that Python's own tokenizer accepts once the last line is
    trimmed, per length.

    A text that is cut inside brackets or a long string fails, however good it is. The same
    share is therefore measured on prefixes of documents drawn from ``real``: an upper bound.
    """
    begin = model.config.bos_token_id or 0
    longest = min(SAMPLE_LENGTHS[-1], model.config.max_position_embeddings - 1)
    sampling = SamplingParams(temperature=SAMPLE_TEMPERATURE)
    ids = model.generate_batch([[begin]] * SAMPLES, longest, sampling=sampling, rng=rng)
    chosen = [real[i] for i in rng.permutation(len(real))[:SAMPLES]]
    texts = [model.tokenizer.encode(d.text[: 40 * longest])[:longest] for d in chosen]

    def share(parts: Sequence[Sequence[int]], length: int) -> float:
        return sum(tokenizes(model.tokenizer.decode(part[:length])) for part in parts) / len(parts)

    lengths = sorted({min(length, longest) for length in SAMPLE_LENGTHS})
    return {
        "count": SAMPLES,
        "temperature": SAMPLE_TEMPERATURE,
        "by length": [
            {"tokens": n, "share": share(ids, n), "share of real text": share(texts, n)}
            for n in lengths
        ],
    }


def tokenizes(text: str) -> bool:
    """Whether ``tokenize`` accepts the text up to its last line break; the rest may be cut
    anywhere.

    >>> tokenizes("x = 1\\nprint(")
    True
    >>> tokenizes("print(\\n")
    False
    """
    whole = text[: text.rfind("\n") + 1]
    try:
        for _ in tokenize.generate_tokens(io.StringIO(whole).readline):
            pass
    except (tokenize.TokenError, SyntaxError):  # IndentationError is a SyntaxError
        return False
    return True


def acceptance(model: Model, target: Model, documents: Iterable[Document], window: int) -> float:
    """Mean Σ min(p, q) over every position of the documents, in windows without overlap."""
    plan = plan_windows(model, list(documents), window, window)
    total = 0.0
    count = 0
    for w in plan.windows:
        tokens = plan.tokens[w.document][w.begin : w.end]  # [T]
        q = _probabilities(model.logits(tokens))  # [T, V]
        p = _probabilities(target.logits(tokens))  # [T, V]
        xp = namespace(p, q)
        total += float(to_numpy(xp.sum(xp.minimum(p, q))))
        count += len(tokens)
    return total / count


def _probabilities(z: Array) -> Array:
    """Softmax of logits z[T, V] over the vocabulary."""
    xp = namespace(z)
    p = xp.exp(z - xp.max(z, axis=-1, keepdims=True))
    return p / xp.sum(p, axis=-1, keepdims=True)


def _against(
    model: Model,
    teacher: Model,
    held_out: Sequence[Document],
    window: int,
    seed: int,
    progress: Progress,
) -> Record:
    """KL, top-1 agreement and acceptance of a draft by its teacher."""
    result = compare(
        model,
        teacher,
        held_out,
        rng=np.random.default_rng(seed),
        window=window,
        stride=window,
        progress=lambda done, total: progress("against the teacher", done, total),
    )
    return {
        "tokens": result.model.tokens,
        "KL": [result.kl.mean, result.kl.low, result.kl.high],
        "same first choice": [result.agreement.mean, result.agreement.low, result.agreement.high],
        "interval": result.method,
        "acceptance": acceptance(model, teacher, held_out, window),
    }
