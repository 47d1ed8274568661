"""Calibration: token sequences pass through a network one decoder layer at a time, and the
quantiser reads the inputs of each projection.

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

Which tokens: ``calibration_data``. Left out: keeping streams on disk, layers of experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from refllm.backend import Array, asarray_like, namespace
from refllm.errors import InputError
from refllm.model.attention import CausalAttend
from refllm.model.config import ModelConfig
from refllm.model.layers import rms_norm, rope_frequencies, rope_table, swiglu
from refllm.model.llama import PROJECTIONS, SAME_INPUT, Layer, Weights, mixed_heads, projection_name
from refllm.model.weights import Linear
from refllm.quant.calibration_data import Calibration, calibration_windows, sequences

__all__ = ["STAGES", "Batch", "LayerRun", "LayerSource", "Tap", "calibration_windows",
           "sequences", "tapped", "walk"]  # fmt: skip

STAGES = SAME_INPUT  # projections whose inputs are final at the same time
BATCH = 2048  # tokens that go through a layer at a time; a longer sequence goes alone


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
        return swiglu(layer["gate_proj"].matmul(h), layer["up_proj"].matmul(h))  # [T, F]

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
        rotation = rope_table(asarray_like(frequencies, x, "float64"), positions, x.dtype)
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


# --- observing a network that runs ----------------------------------------------------------


class Tap:
    """A ``Linear`` that passes each of its inputs x[T, N] to ``observe`` before it multiplies
    like the one it wraps.
    """

    def __init__(self, inner: Linear, observe: Callable[[Array], None]):
        self.inner = inner
        self.observe = observe

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N)"""
        return self.inner.shape

    @property
    def nbytes(self) -> int:
        """Of the wrapped weight."""
        return self.inner.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Of the wrapped weight."""
        return self.inner.bits_per_weight

    def matmul(self, x: Array) -> Array:
        """x[T, N] → x Wᵀ [T, M]"""
        self.observe(x)
        return self.inner.matmul(x)

    def dequantize(self) -> Array:
        """W[M, N]"""
        return self.inner.dequantize()


def tapped(weights: Weights, observe: Callable[[int, str, Array], None]) -> Weights:
    """A weight tree whose projections call ``observe(layer, "q_proj", x[T, N])`` with each of
    their inputs; nothing is copied.
    """

    def tap(index: int, name: str, inner: Linear) -> Tap:
        return Tap(inner, lambda x: observe(index, name, x))

    layers = [
        layer | {name: tap(index, name, layer[name]) for name in PROJECTIONS}
        for index, layer in enumerate(weights["layers"])
    ]
    return weights | {"layers": layers}
