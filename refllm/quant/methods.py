"""What each method does with one decoder layer, given the text that goes through it.

A method is a record of its options with ``quantize(run, scheme, tell) -> layer``: it reads
its inputs stage by stage from the ``LayerRun``, returns the layer with its projections
quantised (and what was folded into norms), and tells a ``TensorReport`` for each projection
as soon as it is done.

``sequential`` methods put what they have quantised back into the run, so that later
projections, and later layers, see its errors and can make up for them. The others look at
the layer as it was, as their authors do.

``scale_dtype`` is what scales are rounded to before anything is encoded with them: two
bytes a group, as the files have it. None keeps the dtype that is computed in.

Left out: the arithmetic of each technique (its own module).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, Protocol

from refllm.backend import Array, namespace
from refllm.formats.uniform import Scheme
from refllm.model.attention import CausalAttend
from refllm.model.llama import PROJECTIONS, Layer
from refllm.quant.awq_model import awq_layer, fold, scale_groups
from refllm.quant.fp8 import check as check_fp8
from refllm.quant.fp8 import fp8
from refllm.quant.gptq import gptq
from refllm.quant.hessian import Factor, Hessian, factor
from refllm.quant.layer_inputs import STAGES, Batch, LayerRun
from refllm.quant.llm_int8 import Int8Linear
from refllm.quant.observers import MinMax
from refllm.quant.report import Clock, TensorReport, row
from refllm.quant.rtn import Solution, rtn
from refllm.quant.smoothquant import LEVELS, smooth_layer, w8a8

__all__ = [
    "AWQ",
    "FP8",
    "GPTQ",
    "METHODS",
    "RTN",
    "Int8",
    "Method",
    "SmoothQuant",
    "default_scheme",
    "make",
]

Tell = Callable[[TensorReport], None]
CHECKED = 512  # tokens on which the output error of a projection is taken


class Method(Protocol):
    """What a recipe needs to know of a method."""

    calibrates: ClassVar[bool]  # does it need text?
    sequential: ClassVar[bool]  # does the text go on through the quantised layer?

    def check(self, scheme: Scheme) -> None:
        """ValueError for a scheme that the method has no use for."""
        ...

    def quantize(self, run: LayerRun, scheme: Scheme, tell: Tell) -> Layer: ...


@dataclass(frozen=True)
class _ByRow:
    """Weights in any scheme whose steps belong to single rows."""

    def check(self, scheme: Scheme) -> None:
        if scheme.granularity not in ("channel", "group", "tensor"):
            raise ValueError(
                f"weights are quantised by channel, group or tensor, not by {scheme.granularity!r}"
            )


@dataclass(frozen=True)
class RTN(_ByRow):
    """Round to nearest: the baseline of all."""

    scale_dtype: str | None = "float16"
    calibrates: ClassVar[bool] = False
    sequential: ClassVar[bool] = True

    def quantize(self, run: LayerRun, scheme: Scheme, tell: Tell) -> Layer:
        for names in run.stages():
            sample = _sample(run)
            for name in names:
                clock = Clock()
                dense = run.layer[name].dequantize()
                run.layer[name] = rtn(
                    dense, scheme, scale_dtype=self.scale_dtype, name=run.tensor(name)
                )
                tell(row(run.index, name, "rtn", dense, run.layer[name], sample, clock()))
        return run.layer


@dataclass(frozen=True)
class GPTQ(_ByRow):
    """Round column by column and let the columns to come make up for the error; options as
    in ``gptq.gptq``.
    """

    block_size: int = 128
    damp: float = 0.01
    act_order: bool = False
    static_groups: bool = False
    mse: bool = False
    scale_dtype: str | None = "float16"
    calibrates: ClassVar[bool] = True
    sequential: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.damp < float("inf"):
            raise ValueError(
                f"gptq: damp is a share of the mean diagonal, 0 or more, got {self.damp}"
            )

    def quantize(self, run: LayerRun, scheme: Scheme, tell: Tell) -> Layer:
        options = {
            field: getattr(self, field)
            for field in ("block_size", "act_order", "static_groups", "mse")
        }
        for names in run.stages():
            clock = Clock()
            sample = _sample(run)
            found, tokens = self._factor(run)  # siblings read the same input
            shared = clock() / len(names)
            for name in names:
                clock = Clock()
                dense = run.layer[name].dequantize()
                made = gptq(
                    dense,
                    found,
                    scheme,
                    scale_dtype=self.scale_dtype,
                    name=run.tensor(name),
                    **options,
                )
                run.layer[name] = made
                note = _gptq_note(made, tokens, self.damp)
                tell(
                    row(
                        run.index,
                        name,
                        "gptq",
                        dense,
                        made,
                        sample,
                        shared + clock(),
                        made.loss,
                        note,
                    )
                )
        return run.layer

    def _factor(self, run: LayerRun) -> tuple[Factor, int]:
        """Of the Hessian of this stage's inputs, and the tokens that it was taken over."""
        hessian = Hessian(f"the input of {run.tensor(STAGES[run.stage][0])}")
        for x in run.inputs():
            hessian.add(x)
        return factor(hessian.matrix, self.damp, self.act_order), hessian.count


def _gptq_note(made: Solution, tokens: int, damp: float) -> str:
    """What a reader of the report should know of a Hessian."""
    columns = made.shape[1]
    dead = int(made.dead.sum())
    notes = [f"{dead} of {columns} inputs are always zero"] if dead else []
    if tokens < columns:
        notes.append(
            f"{tokens} tokens for {columns} columns: only damping makes the Hessian definite"
        )
    if made.damp > damp:
        notes.append(f"damping raised from {damp:g} to {made.damp:g}")
    return "; ".join(notes)


@dataclass(frozen=True)
class AWQ(_ByRow):
    """Scale the columns that carry the activations, clip, round to nearest; options as in
    ``awq_model.awq_layer``.
    """

    duo: bool = False
    clipping: bool = True
    max_tokens: int = 2048  # that the search looks at: it runs attention and MLP twenty times each
    scale_dtype: str | None = "float16"
    calibrates: ClassVar[bool] = True
    sequential: ClassVar[bool] = False

    def quantize(self, run: LayerRun, scheme: Scheme, tell: Tell) -> Layer:
        clock = Clock()
        part = _first(run.batches, self.max_tokens)
        xp = namespace(part[0].x)
        inputs = {names[0]: xp.concat(list(run.inputs(part)), axis=0) for names in run.stages()}
        attend = CausalAttend(
            [n for batch in part for n in batch.lengths], run.config.sliding_window
        )
        rotation = tuple(xp.concat([batch.rotation[i] for batch in part], axis=0) for i in (0, 1))
        layer, found = awq_layer(
            run.layer,
            run.config,
            inputs,
            scheme,
            rotation=rotation,
            attend=attend,
            index=run.index,
            duo=self.duo,
            clipping=self.clipping,
        )
        # what is scaled and not yet clipped or rounded: the same function as the layer
        exact = run.layer
        for group in scale_groups(exact)[0]:
            scale = found.scales[group.name].scale
            exact = fold(exact, group, scale)
            inputs[group.targets[0]] = inputs[group.targets[0]] / scale
        shared = clock() / len(PROJECTIONS)
        for names in STAGES:
            for name in names:
                clock = Clock()
                dense = exact[name].dequantize()
                layer[name] = rtn(
                    layer[name].dequantize(),
                    scheme,
                    scale_dtype=self.scale_dtype,
                    name=run.tensor(name),
                )
                sample = inputs[names[0]][:CHECKED]
                loss = found.losses.get(name)
                tell(
                    row(run.index, name, "awq", dense, layer[name], sample, shared + clock(), loss)
                )
        return layer


def _first(batches: list[Batch], tokens: int) -> list[Batch]:
    """As many of the first batches as hold ``tokens`` tokens, one at least."""
    held = list(accumulate(sum(batch.lengths) for batch in batches))
    return batches[: max(1, sum(count <= tokens for count in held))]


def _sample(run: LayerRun) -> Array | None:
    """A few inputs of this stage, [≤ CHECKED, N]; None where there is no text."""
    return next((x[:CHECKED, :] for x in run.inputs(run.batches[:1])), None)


@dataclass(frozen=True)
class SmoothQuant(_ByRow):
    """Weights and activations in 8 bits, what is hard to round moved from these into those;
    see ``smoothquant``.

    ``alpha`` None smooths nothing; ``keep`` names projections that stay in floating point.
    """

    alpha: float | None = 0.5
    level: str = "O1"
    keep: tuple[str, ...] = ()
    rule: str = "restricted"  # of the activations
    scale_dtype: str | None = None
    calibrates: ClassVar[bool] = True
    sequential: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.keep) - set(PROJECTIONS)):
            raise ValueError(
                f"keep: no projection is called {', '.join(unknown)}; they are {', '.join(PROJECTIONS)}"
            )
        if self.level not in LEVELS:
            raise ValueError(f"unknown level {self.level!r}; choose one of {', '.join(LEVELS)}")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(
                f"smoothquant: alpha lies within 0..1, or is None to smooth nothing, got {self.alpha}"
            )

    def quantize(self, run: LayerRun, scheme: Scheme, tell: Tell) -> Layer:
        clock = Clock()
        absmax: dict[str, Array] = {}
        samples: dict[str, Any] = {}
        for names in run.stages():
            observer = MinMax(axis=-1, name=f"the input of {run.tensor(names[0])}")
            for x in run.inputs():
                observer.observe(x)
            absmax |= dict.fromkeys(names, observer.absmax)
            samples |= dict.fromkeys(names, _sample(run))
        smooth, after = (
            (run.layer, absmax)
            if self.alpha is None
            else smooth_layer(run.layer, absmax, self.alpha)
        )
        layer = dict(smooth)
        shared = clock() / len(PROJECTIONS)
        for name in PROJECTIONS:
            clock = Clock()
            dense = smooth[name].dequantize()
            if name not in self.keep:
                layer[name] = w8a8(
                    dense,
                    self.level,
                    absmax=after[name],
                    scheme=scheme,
                    rule=self.rule,
                    scale_dtype=self.scale_dtype,
                    name=run.tensor(name),
                )
            xp = namespace(dense)
            x = samples[name] * (after[name] / xp.where(absmax[name] > 0, absmax[name], 1.0))  # x/s
            note = "kept in floating point" if name in self.keep else ""
            tell(
                row(
                    run.index,
                    name,
                    "smoothquant",
                    dense,
                    layer[name],
                    x,
                    shared + clock(),
                    None,
                    note,
                )
            )
        return layer


@dataclass(frozen=True)
class Int8:
    """LLM.int8(): 8 bits, but for the columns of the activations that hold outliers; see
    ``outliers``.
    """

    threshold: float = 6.0
    rule: str = "bitsandbytes"
    calibrates: ClassVar[bool] = False
    sequential: ClassVar[bool] = True

    def check(self, scheme: Scheme) -> None:
        if scheme != default_scheme("int8"):
            raise ValueError(f"int8 has one scheme, {default_scheme('int8')}; got {scheme}")

    def quantize(self, run: LayerRun, scheme: Scheme, tell: Tell) -> Layer:
        for names in run.stages():
            sample = _sample(run)
            for name in names:
                clock = Clock()
                dense = run.layer[name].dequantize()
                run.layer[name] = Int8Linear(
                    dense, self.threshold, self.rule, name=run.tensor(name)
                )
                tell(row(run.index, name, "int8", dense, run.layer[name], sample, clock()))
        return run.layer


@dataclass(frozen=True)
class FP8:
    """Weights and activations in 8-bit floats; see ``fp8``. Of the scheme only what shares
    a scale counts.

    ``activations`` False leaves those as they are. Scales are float32, or powers of two
    with ``scale="ue8m0"``.
    """

    format: str = "e4m3"
    scale: str = "float32"
    activations: bool = True
    calibrates: ClassVar[bool] = False
    sequential: ClassVar[bool] = True

    def check(self, scheme: Scheme) -> None:
        check_fp8(scheme, self.format)

    def quantize(self, run: LayerRun, scheme: Scheme, tell: Tell) -> Layer:
        for names in run.stages():
            sample = _sample(run)
            for name in names:
                clock = Clock()
                dense = run.layer[name].dequantize()
                run.layer[name] = fp8(
                    dense, scheme, **dataclasses.asdict(self), name=run.tensor(name)
                )
                tell(row(run.index, name, "fp8", dense, run.layer[name], sample, clock()))
        return run.layer


METHODS: dict[str, type[Any]] = {
    "rtn": RTN, "gptq": GPTQ, "awq": AWQ, "smoothquant": SmoothQuant, "int8": Int8, "fp8": FP8,
}  # fmt: skip


def make(method: str, **options: Any) -> Method:
    """The method of that name with these options; ValueError for names that are unknown,
    listing those that are.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    known = [field.name for field in dataclasses.fields(METHODS[method])]
    for name in options:
        if name not in known:
            raise ValueError(f"{method} has no option {name!r}; its options are {', '.join(known)}")
    made: Method = METHODS[method](**options)
    return made


def default_scheme(method: str) -> Scheme:
    """What a method is used with unless told otherwise."""
    if method in ("smoothquant", "int8"):
        return Scheme(8, "restricted", "channel")
    if method == "fp8":
        return Scheme(8, "restricted", "block", 128)
    if method == "awq":
        return Scheme(4, "awq", "group", 128)
    return Scheme(4, "half_integer", "group", 128)
