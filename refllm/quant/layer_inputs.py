"""Calibration: token sequences are drawn from training text and pass through a network one
decoder layer at a time, and the quantiser reads the inputs of each projection.

Source: the order of Frantar et al. 2022 (GPTQ), §4 "true sequential": within a layer the
projections are visited in the order in which they compute, and the inputs of each are
computed with its already quantised predecessors.

| stage | projections            | their input                                 |
|-------|------------------------|---------------------------------------------|
| 0     | q_proj, k_proj, v_proj | norm of the residual stream                 |
| 1     | o_proj                 | concatenated outputs of the attention heads |
| 2     | gate_proj, up_proj     | norm of the stream after the attention      |
| 3     | down_proj              | silu(gate) · up                             |

    for run in walk(source, sequences):      # layer by layer
        for names in run.stages():           # stage by stage, in the order above
            for x in run.inputs(): ...       # [T, N] batch by batch, as often as needed
            run.layer[name] = quantised      # from here on activations go through it

Memory: one layer, the residual stream of all tokens [T, N], and for stage 1 the heads'
outputs [T, H·D]. The MLP's hidden layer [T, F] is computed for one batch at a time, twice
(once to observe it, once to continue).

Which tokens: the windows of the same paper, §5, equally long and drawn at random from training
text with a seed.

Left out: keeping streams on disk, layers of experts, choosing windows by their content,
packing short documents. (``taps`` observes a complete network instead.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np

from refllm.backend import Array, asarray_like, namespace, to_numpy
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.corpus import Document, training_documents
from refllm.errors import InputError
from refllm.model.attention import CausalAttend
from refllm.model.config import ModelConfig
from refllm.model.layers import rms_norm, rope_table, swiglu
from refllm.model.llama import SAME_INPUT, Layer, mixed_heads, projection_name
from refllm.model.rope import rope_frequencies
from refllm.quant.hadamard import hadamard_transform
from refllm.quant.rotation import ROTATED

__all__ = ["STAGES", "Batch", "Calibration", "LayerRun", "LayerSource", "calibration_windows",
           "embed", "sequences", "walk"]  # fmt: skip

STAGES = SAME_INPUT  # projections whose inputs are final at the same time
BATCH = 2048  # tokens that go through a layer at a time; a longer sequence goes alone
# characters that are tokenised first per token that is wanted: source code needs four
CHARACTERS_PER_TOKEN = 8

# token ids [B, S], or sequences of different lengths
Calibration: TypeAlias = Array | Iterable[Array | Sequence[int]]


class LayerSource(Protocol):
    """Where layers come from: a model in memory, or a checkpoint that is read layer by layer."""

    @property
    def config(self) -> ModelConfig:
        """The shapes and constants of the network."""
        ...

    def rows(self, tokens: Sequence[int]) -> Array:
        """Embedding rows of T token ids → [T, N], in the dtype and library of the computation."""
        ...

    def layer(self, index: int) -> Layer:
        """A new dict of layer ``index`` in floating point: projections as ``Dense``, norms
        and biases as arrays.
        """
        ...


@dataclass
class Batch:
    """Sequences one after the other along T, as in every batch of the network."""

    lengths: list[int]
    rotation: tuple[Array, Array]  # ``rope_table`` of their positions
    x: Array  # [T, N], the residual stream as far as it has been computed
    heads: Array | None = None  # [T, H·D], between stages 0 and 1


class LayerRun:
    """One layer while activations pass through it. ``layer`` may be changed, projection by
    projection.
    """

    def __init__(self, config: ModelConfig, index: int, layer: Layer, batches: list[Batch]):
        self.config = config
        self.index = index
        self.layer = layer
        self.batches = batches
        self.stage = 0  # all earlier stages have been computed for every batch

    def stages(self) -> Iterator[tuple[str, ...]]:
        """The names of each stage's projections. Asking for the next stage computes this one
        with ``layer`` as it is then.
        """
        while self.stage < len(STAGES):
            yield STAGES[self.stage]
            self._advance()

    def inputs(self, batches: Sequence[Batch] | None = None) -> Iterator[Array]:
        """The inputs of this stage's projections, [T, N] batch by batch (all batches, or some
        of ``self.batches``).

        Raises
        ------
        ValueError
            naming layer and tensor, if a value is not finite.
        """
        for batch in self.batches if batches is None else batches:
            x = self._input(batch)
            xp = namespace(x)
            if not bool(xp.all(xp.isfinite(x))):
                raise InputError(
                    f"calibration: the input of {self.tensor(STAGES[self.stage][0])} is not "
                    "finite: a weight before it is too large or broken, or the dtype too narrow"
                )
            yield x

    def tensor(self, name: str) -> str:
        """The name of a projection in the checkpoint, without ``.weight``."""
        return projection_name(self.index, name)

    def finish(self) -> None:
        """Compute the remaining stages of the layer."""
        for _ in self.stages():
            pass

    def _input(self, batch: Batch) -> Array:
        """The input x[T, N] of this stage's projections."""
        layer = self.layer
        eps = self.config.rms_norm_eps
        if self.stage == 0:
            return rms_norm(batch.x, layer["input_layernorm"], eps)
        if self.stage == 1:
            assert batch.heads is not None
            return batch.heads  # [T, H·D]
        h = rms_norm(batch.x, layer["post_attention_layernorm"], eps)
        if self.stage == 2:
            return h
        x = swiglu(layer["gate_proj"].matmul(h), layer["up_proj"].matmul(h))  # [T, F]
        return hadamard_transform(x) if ROTATED in layer else x

    def _advance(self) -> None:
        """Compute the current stage for every batch."""
        layer = self.layer
        for batch in self.batches:
            if self.stage == 0:
                x = self._input(batch)
                attend = CausalAttend(batch.lengths, self.config.sliding_window)
                batch.heads = mixed_heads(layer, self.config, x, batch.rotation, attend, self.index)
            elif self.stage == 1:  # stage 2 changes nothing: its products are stage 3's input
                batch.x = batch.x + layer["o_proj"].matmul(self._input(batch))
                batch.heads = None
            elif self.stage == 3:
                batch.x = batch.x + layer["down_proj"].matmul(self._input(batch))
        self.stage += 1


def walk(source: LayerSource, calibration: Calibration | None) -> Iterator[LayerRun]:
    """Every layer of ``source`` in turn, with the token sequences of ``calibration`` passing
    through it.

    Asking for the next layer computes the remaining stages of this one, with ``run.layer``
    as it is then. None as ``calibration`` walks the layers without tokens.
    """
    config = source.config
    batches = []
    if calibration is not None:
        batches = embed(source, sequences(calibration, config.vocab_size))
    for index in range(config.num_hidden_layers):
        run = LayerRun(config, index, source.layer(index), batches)
        yield run
        if index + 1 < config.num_hidden_layers:  # nothing reads the outputs of the last
            run.finish()
        # a caller who keeps the run must not keep its weights in memory with the next layer's
        run.layer = {}


def embed(source: LayerSource, ids: Sequence[Sequence[int]]) -> list[Batch]:
    """The inputs of the first layer, in batches of at most ``BATCH`` tokens."""
    config = source.config
    batches = []
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    for part in _batches(ids):
        x = source.rows([token for sequence in part for token in sequence])  # [T, N]
        lengths = [len(sequence) for sequence in part]
        positions = asarray_like([i for n in lengths for i in range(n)], x, "int64")  # [T]
        on_device = asarray_like(frequencies, x, "float64")  # [D/2]
        rotation = rope_table(on_device, positions, x.dtype, config.rope_scaling)
        batches.append(Batch(lengths, rotation, x))
    return batches


def _batches(ids: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Consecutive sequences of at most ``BATCH`` tokens together."""
    part: list[Sequence[int]] = []
    for sequence in ids:
        if part and sum(map(len, part)) + len(sequence) > BATCH:
            yield part
            part = []
        part.append(sequence)
    if part:
        yield part


# --- which tokens ---------------------------------------------------------------------------


def calibration_windows(
    tokenizer: Tokenizer,
    count: int,
    length: int,
    seed: int | np.random.Generator,
    *,
    documents: Sequence[Document] | None = None,
    begin: int | None = None,
) -> np.ndarray:
    """``count`` windows of ``length`` tokens of training text, never of the held-out modules:
    int64[count, length].

    Each starts at the beginning of the line that holds a character drawn uniformly from
    ``documents`` (default: the standard library). Where its document ends the window
    continues with the next one, after the id ``begin`` if one is given.
    """
    texts = [d.text for d in (training_documents() if documents is None else documents) if d.text]
    if count < 1 or length < 1 or not texts:
        raise InputError(
            f"calibration_windows: no {count} windows of {length} tokens from {len(texts)} "
            "documents"
        )
    ends = np.cumsum([len(text) for text in texts])
    windows = []
    for place in np.random.default_rng(seed).integers(0, ends[-1], count).tolist():
        at = int(np.searchsorted(ends, place, side="right"))  # the document of that character
        character = place - int(ends[at]) + len(texts[at])
        text = texts[at][texts[at].rfind("\n", 0, character) + 1 :]
        ids = _tokenize(tokenizer, text, length)
        while len(ids) < length:
            at = (at + 1) % len(texts)
            if begin is not None:
                ids.append(begin)
            ids += _tokenize(tokenizer, texts[at], length)
        windows.append(ids[:length])
    return np.asarray(windows, dtype=np.int64)


def sequences(calibration: Calibration, vocab_size: int) -> list[list[int]]:
    """Token ids as lists: ``calibration`` is an integer array [B, S], or an iterable of 1-D
    sequences of token ids.

    Raises
    ------
    ValueError
        if there is no sequence, one is empty or not of integers, or an id lies outside the
        vocabulary.

    >>> sequences([[1, 2, 3], (4,)], vocab_size=5)
    [[1, 2, 3], [4]]
    """
    found = []
    for i, row in enumerate(calibration):
        ids = to_numpy(row).tolist() if hasattr(row, "shape") else row
        if not isinstance(ids, Sequence) or not ids or not all(map(_is_integer, ids)):
            raise InputError(
                f"calibration: sequence {i} must be a non-empty sequence of token ids, got "
                f"{row!r:.60}"
            )
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            raise InputError(
                f"calibration: sequence {i} holds a token outside the vocabulary of {vocab_size}"
            )
        found.append([int(token) for token in ids])
    if not found:
        raise InputError("calibration: there is no sequence; pass at least one of token ids")
    return found


def _tokenize(tokenizer: Tokenizer, text: str, length: int) -> list[int]:
    """At least the first ``length`` tokens of ``text``, or all if it has fewer; a long text is
    not tokenised beyond them.
    """
    size = CHARACTERS_PER_TOKEN * length
    while len(ids := tokenizer.encode(text[:size])) < length and size < len(text):
        size *= 2
    return ids


def _is_integer(token: object) -> bool:
    """Whether ``token`` is an integer of Python or NumPy, and not a bool."""
    return isinstance(token, (int, np.integer)) and not isinstance(token, bool)
