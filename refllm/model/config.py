"""A network's shape as a plain record, read from a Hugging Face ``config.json``.

One dataclass covers the four supported families, which differ in a few switches:

| family  | attention_bias | qk_norm | sliding_window | head_dim            |
|---------|----------------|---------|----------------|---------------------|
| llama   | no             | no      | no             | hidden / heads      |
| mistral | no             | no      | optional       | hidden / heads      |
| qwen2   | q, k, v        | no      | no             | hidden / heads      |
| qwen3   | no             | yes     | no             | stated in the file  |

Source: the configuration classes of Hugging Face's ``transformers``, whose defaults apply
where an entry is missing.

``rope_config`` reads RoPE's base and scaling. Of entries that say a thing twice, the one that
transformers follows decides: ``layer_types`` over ``sliding_window``.

Left out: other families, MLP biases, mixture of experts, windows in some layers only. Each is
rejected by name.
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass

from refllm.array_types import Json, JsonView
from refllm.errors import UnsupportedModel
from refllm.model.rope import RopeScaling, YarnScaling, yarn_range
from refllm.model.rope_config import flag, integer, number, read_rope, write_scaling

__all__ = ["ARCHITECTURES", "ModelConfig", "UnsupportedModel"]

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
# What transformers assumes where an entry is missing. A null in the file is not missing: it
# overrides these.
_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32_768, "sliding_window": 4096}
_DEFAULTS: dict[str, Json] = {
    "llama": {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096, "bos_token_id": 1,
                "eos_token_id": 2, "max_position_embeddings": 131_072},
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
}  # fmt: skip


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of a decoder; the comments give the letters that shapes use.

    >>> ModelConfig("llama", 257, 64, 96, 2, 4, 2, 16, tie_word_embeddings=True).num_parameters
    78208

    Raises
    ------
    UnsupportedModel
        for a value that makes no sense.
    """

    family: str
    vocab_size: int  # V
    hidden_size: int  # N
    intermediate_size: int  # F, width of the MLP
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int  # G
    head_dim: int  # D
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    max_position_embeddings: int = 2048
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if not _is_integer(value) or value < 1:
                raise UnsupportedModel(f"config: {name} must be a positive integer, got {value!r}")
        for name in ("rms_norm_eps", "rope_theta"):  # ε > 0, or a row of zeros is divided by zero
            # the smallest normal number: 1/theta must be finite
            if not sys.float_info.min <= getattr(self, name) < math.inf:
                raise UnsupportedModel(
                    f"config: {name} must be positive and finite, got {getattr(self, name)!r}"
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UnsupportedModel(
                f"config: {self.num_attention_heads} attention heads do not divide into "
                f"{self.num_key_value_heads} key/value heads"
            )
        if self.head_dim % 2:
            raise UnsupportedModel(f"config: head_dim must be even for RoPE, got {self.head_dim}")
        window = self.sliding_window
        if window is not None and (not _is_integer(window) or window < 1):
            raise UnsupportedModel(
                f"config: sliding_window must be a positive integer or null, got {window!r}"
            )
        if isinstance(self.rope_scaling, YarnScaling):
            yarn_range(self.head_dim, self.rope_theta, self.rope_scaling)  # raises where empty
        tokens = list(self.eos_token_ids)
        if self.bos_token_id is not None:
            tokens.append(self.bos_token_id)
        for token in tokens:
            # ids beyond the vocabulary are common where the entry is missing; -1 would be the
            # last row of the embedding
            if not _is_integer(token) or not 0 <= token < 2**31:
                raise UnsupportedModel(
                    f"config: bos_token_id and eos_token_id must be token ids, got {token!r}"
                )

    @classmethod
    def from_hf(cls, raw: JsonView) -> ModelConfig:
        """Read a Hugging Face ``config.json``, of transformers before and after version 5.

        Raises
        ------
        UnsupportedModel
            for an unknown architecture, a part that refllm does not compute, or a value
            that makes no sense.
        """
        family = _family(raw)
        raw = _DEFAULTS[family] | dict(raw)
        _check_supported(family, raw)
        hidden = integer(raw, "hidden_size")
        heads = integer(raw, "num_attention_heads")
        theta, scaling = read_rope(raw)
        return cls(
            family=family,
            vocab_size=integer(raw, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=integer(raw, "intermediate_size"),
            num_hidden_layers=integer(raw, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=integer(raw, "num_key_value_heads", heads),
            head_dim=integer(raw, "head_dim", hidden // max(heads, 1)),
            rms_norm_eps=number(raw, "rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=flag(raw, "tie_word_embeddings"),
            attention_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            sliding_window=_window(family, raw),
            max_position_embeddings=integer(raw, "max_position_embeddings"),
            bos_token_id=raw.get("bos_token_id"),
            eos_token_ids=_end_tokens(raw.get("eos_token_id")),
        )

    def to_hf(self) -> Json:
        """The ``config.json`` that ``transformers`` reads; ``from_hf`` of it equals this record."""
        architecture = next(a for a, f in ARCHITECTURES.items() if f == self.family)
        raw: Json = {
            "architectures": [architecture],
            "model_type": self.family,
            "hidden_act": "silu",
        }
        own = asdict(self)
        for key in (
            "family",
            "qk_norm",
            "attention_bias",
            "rope_scaling",
            "sliding_window",
            "eos_token_ids",
        ):
            own.pop(key)
        raw.update(own)
        if self.rope_scaling is not None:
            raw["rope_scaling"] = write_scaling(self.rope_scaling)
        if self.family == "mistral":
            raw["sliding_window"] = self.sliding_window
        eos = list(self.eos_token_ids)
        raw["eos_token_id"] = eos[0] if len(eos) == 1 else eos or None
        raw["torch_dtype"] = "float16"
        return raw

    @property
    def attention_factor(self) -> float:
        """What RoPE's cos and sin are multiplied by; 1 but for YaRN."""
        return 1.0 if self.rope_scaling is None else self.rope_scaling.attention_factor

    @property
    def num_parameters(self) -> int:
        """Stored parameters: L layers, V·N for the embedding (and the head, if it is not
        tied), norms and biases.
        """
        n = self.hidden_size
        d = self.head_dim
        h = self.num_attention_heads
        g = self.num_key_value_heads
        per_layer = n * d * (2 * h + 2 * g) + 3 * n * self.intermediate_size + 2 * n
        if self.attention_bias:
            per_layer += d * (h + 2 * g)
        if self.qk_norm:
            per_layer += 2 * d
        vocabulary = self.vocab_size * n
        if not self.tie_word_embeddings:
            vocabulary *= 2
        return self.num_hidden_layers * per_layer + n + vocabulary

    @property
    def summary(self) -> str:
        """One readable line: family, layers, width, heads, MLP, vocabulary, context."""
        layers = self.num_hidden_layers
        tied = "tied" if self.tie_word_embeddings else "separate"
        return (
            f"{self.family} network of {layers} layer{'s' * (layers > 1)}, width "
            f"{self.hidden_size}, {self.num_attention_heads} query and "
            f"{self.num_key_value_heads} key/value heads of {self.head_dim}, MLP "
            f"{self.intermediate_size}, {self.vocab_size:,} tokens "
            f"({tied} head), context {self.max_position_embeddings:,}"
        )


def _family(raw: JsonView) -> str:
    """The family of the architecture that the file names first."""
    names = raw.get("architectures") or []
    supported = ", ".join(ARCHITECTURES)
    if not isinstance(names, list) or not names:
        raise UnsupportedModel(f"config: no 'architectures' entry; supported are {supported}")
    if isinstance(names[0], str) and ("Moe" in names[0] or names[0] == "MixtralForCausalLM"):
        raise UnsupportedModel(
            f"config: {names[0]} is a mixture of experts, which is not computed here; supported "
            f"are {supported}"
        )
    if not isinstance(names[0], str) or names[0] not in ARCHITECTURES:
        raise UnsupportedModel(
            f"config: architecture {names[0]!r} is not supported; supported are {supported}"
        )
    return ARCHITECTURES[names[0]]


def _check_supported(family: str, raw: JsonView) -> None:
    """UnsupportedModel for biases, activations and attention that refllm does not compute."""
    if raw.get("mlp_bias") or (raw.get("attention_bias") and family != "qwen2"):
        raise UnsupportedModel(
            f"config: biases are supported in qwen2's q, k, v only, not in {family}"
        )
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedModel(
            f"config: hidden_act {raw['hidden_act']!r} is not supported, only 'silu'"
        )
    if not raw.get("is_causal", True):  # of encoders that were made of decoders
        raise UnsupportedModel(
            f"config: is_causal is {raw['is_causal']!r}: only causal attention is supported"
        )


def _window(family: str, raw: JsonView) -> int | None:
    """The window of all layers; UnsupportedModel if the layers differ.

    ``layer_types`` decides where it is present, as in transformers. Without it Mistral's
    layers have a window where the file has one; Qwen's from ``max_window_layers`` on, if
    ``use_sliding_window`` is set; Llama's never.
    """
    window = raw.get("sliding_window")
    if family in ("qwen2", "qwen3") and not flag(raw, "use_sliding_window"):
        window = None  # Qwen's files carry a window that is off
    count = integer(raw, "num_hidden_layers")
    if (kinds := raw.get("layer_types")) is not None:
        windowed = _windowed(kinds, count)
    elif family == "mistral":
        windowed = count if window is not None else 0
    elif family == "llama":
        windowed = 0
    else:
        first = integer(raw, "max_window_layers", 28)
        windowed = max(0, count - max(0, first)) if window is not None else 0
    if windowed == 0:
        return None
    if windowed < count or family != "mistral":
        raise UnsupportedModel(
            f"config: {windowed} of {count} layers attend through a sliding window: a window is "
            "supported in all layers of mistral only"
        )
    if window is None:
        raise UnsupportedModel(
            "config: layer_types says 'sliding_attention', and sliding_window is missing"
        )
    return window  # type: ignore[no-any-return]  # ModelConfig checks it


def _windowed(kinds: object, count: int) -> int:
    """How many of ``count`` layers ``layer_types`` gives a window."""
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or any(kind not in known for kind in kinds):
        raise UnsupportedModel(
            f"config: layer_types must be a list of {known[0]!r} and {known[1]!r}, got {kinds!r}"
        )
    if len(kinds) != count:
        raise UnsupportedModel(
            f"config: layer_types describes {len(kinds)} layers, and num_hidden_layers is {count}"
        )
    return kinds.count("sliding_attention")


def _end_tokens(value: object) -> tuple[int, ...]:
    """The end-of-text ids: ``eos_token_id`` is one id, a list of them, or null."""
    if value is None:
        ids = []
    elif isinstance(value, list):
        ids = value
    else:
        ids = [value]
    if not all(_is_integer(i) for i in ids):
        raise UnsupportedModel(
            f"config: eos_token_id must be an integer or a list of them, got {value!r}"
        )
    return tuple(ids)


def _is_integer(value: object) -> bool:
    """Whether a value is an int; True and False do not count."""
    return isinstance(value, int) and not isinstance(value, bool)
